"""Curves read off: quality at a budget, cost at a quality, mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .methods import Point

BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)
WITHIN = 0.01  # of the dense quality: what counts as equal
GOALS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)  # budgets at which methods are compared


def at_budget(points: Sequence[Point], budget: float, metric: str) -> float | None:
    """Quality at a cost, between neighbouring points on a straight line.

    Above the dearest point its quality; None below the cheapest, where the method cannot go.
    """
    ordered = sorted(points, key=lambda point: point.cost)
    if not ordered or budget < ordered[0].cost:
        return None
    before = ordered[0]
    for point in ordered:
        if point.cost >= budget:
            span = point.cost - before.cost
            t = (budget - before.cost) / span if span else 1.0
            low, high = before.quality[metric], point.quality[metric]
            return low + t * (high - low)
        before = point
    return before.quality[metric]


def critical(
    points: Sequence[Point], dense: float, metric: str, higher: bool, within: float = WITHIN
) -> float | None:
    """The cost down to which quality stays within a share of the dense one, going down from the dearest.

    None where even the dearest point is outside. A curve that comes back below does not count.
    """
    sign = 1.0 if higher else -1.0
    floor = sign * dense - within * abs(dense)
    ordered = sorted(points, key=lambda point: -point.cost)
    if not ordered or sign * ordered[0].quality[metric] < floor:
        return None
    before = ordered[0]
    for point in ordered[1:]:
        value, last = sign * point.quality[metric], sign * before.quality[metric]
        if value < floor:
            t = (last - floor) / (last - value)
            return before.cost + t * (point.cost - before.cost)
        before = point
    return before.cost


def mean_curve(runs: Sequence[Sequence[Point]], metric: str) -> list[Point]:
    """The mean over seeds at every cost that one of them was measured at and all of them reach."""
    low = max(min(point.cost for point in run) for run in runs)
    costs = sorted({point.cost for run in runs for point in run if point.cost >= low})
    found = []
    for cost in costs:
        values = [value for run in runs if (value := at_budget(run, cost, metric)) is not None]
        found.append(Point(0.0, cost, 0.0, {metric: statistics.fmean(values)}))
    return found


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, sample standard deviation, extremes and the values; None if one is missing."""
    present = [value for value in values if value is not None]
    if not present or len(present) < len(values):
        return None
    deviation = statistics.stdev(present) if len(present) > 1 else 0.0
    return {
        "mean": statistics.fmean(present),
        "std": deviation,
        "min": min(present),
        "max": max(present),
        "values": present,
    }


def summary(
    curves: Mapping[str, Sequence[Sequence[Point]]],
    dense: Sequence[Mapping[str, float]],
    metrics: Mapping[str, bool],
) -> dict[str, Any]:
    """Per method and metric: quality at each budget, and the critical cost, over seeds and of the mean curve.

    The latter decides: one seed's accuracy moves by whole examples, of which a hundredth of the dense
    accuracy may be few.

    curves: {method: one curve per seed, or for the first seeds only}; dense: the dense model's quality per
    seed.
    """
    found: dict[str, Any] = {}
    for method, runs in curves.items():
        found[method] = {}
        for metric, higher in metrics.items():
            budgets = {
                f"{budget:g}": spread([at_budget(run, budget, metric) for run in runs])
                for budget in BUDGETS
            }
            costs = [
                critical(run, base[metric], metric, higher)
                for run, base in zip(runs, dense[: len(runs)], strict=True)
            ]
            found[method][metric] = {
                "budgets": budgets,
                "critical": spread(costs),
                "critical_of_mean": critical(
                    mean_curve(runs, metric),
                    statistics.fmean(base[metric] for base in dense[: len(runs)]),
                    metric,
                    higher,
                )
                if all(runs)
                else None,
                "reached": sum(cost is not None for cost in costs),
            }
    return found


def gaps(
    found: Mapping[str, Any],
    ours: str,
    rivals: Sequence[str],
    metric: str,
    higher: bool,
    budgets: Sequence[float] = GOALS,
) -> dict[str, Any]:
    """By rival and budget: how much better `ours` is, paired by seed, and whether it is nowhere worse.

    found: a `summary`. Budgets that one of the two cannot go down to are null and decide nothing. Worse is a
    mean gap below zero, whatever the spread: that is given beside it.
    """
    result: dict[str, Any] = {}
    sign = 1.0 if higher else -1.0
    for rival in rivals:
        by_budget: dict[str, Any] = {}
        for budget in budgets:
            one, other = (found[name][metric]["budgets"][f"{budget:g}"] for name in (ours, rival))
            if one is None or other is None:
                by_budget[f"{budget:g}"] = None
                continue
            pairs = zip(one["values"], other["values"], strict=False)  # one may have fewer seeds
            by_budget[f"{budget:g}"] = spread([sign * (a - b) for a, b in pairs])
        means = [gap["mean"] for gap in by_budget.values() if gap is not None]
        result[rival] = {"gaps": by_budget, "nowhere_worse": bool(means) and min(means) >= 0}
    return result
