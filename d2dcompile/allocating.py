"""Allocate a budget over sites: which tau each site gets, by what it harms the model's output there.

Around one setting, each site alone is moved to a few other taus, all others staying: how many multiply-adds
of the sites does that save, and how much further from dense is the output then? The lower convex hull of
these points is the site's curve; for one price of a multiply-add (a Lagrange multiplier) the best point of
every curve is known, so that walking the price is walking the hulls' edges in order of their slope.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from .harm import Distance, survey
from .state import State

SHARES = (
    0.4,
    0.6,
    0.8,
    1.25,
    1.6,
    2.2,
)  # of a site's executed share at the centre: its other points
Setting = Mapping[str, float]
Path = Callable[[float], dict[str, float]]
"""From 0, the most that it executes, to 1, the least: {site name: tau}."""


def straight(states: Sequence[State]) -> Path:
    """The path on which all sites go together from one end of their spans to the other."""
    spans = {state.site.name: state.span for state in states}

    def at(u: float) -> dict[str, float]:
        return {name: between(span, u) for name, span in spans.items()}

    return at


def between(ends: tuple[float, float], u: float) -> float:
    """The value at 0 <= u <= 1 between two ends; an integer between integers."""
    value = ends[0] + u * (ends[1] - ends[0])
    return round(value) if all(isinstance(end, int) for end in ends) else float(value)


@dataclass
class Shares:
    """What share each site was seen to execute at which tau, to find the tau of a wanted share.

    A share also depends on the taus before it; what is found is only where to look.
    """

    seen: dict[str, dict[float, float]] = field(default_factory=dict)

    def note(self, name: str, tau: float, share: float) -> None:
        """Remember that a site executed this share at this tau."""
        self.seen.setdefault(name, {})[tau] = share

    def tau(self, state: State, share: float) -> float:
        """About the tau at which the site executes this share."""
        dense, sparse = state.span
        points = {dense: 1.0, sparse: 1 / state.experts.plan.experts}
        points.update(self.seen.get(state.site.name, {}))
        taus, shares = zip(*sorted(points.items(), key=lambda item: item[1]), strict=True)
        return between((dense, sparse), (np.interp(share, shares, taus) - dense) / (sparse - dense))


@dataclass(frozen=True)
class Edge:
    """A step along a site's hull: from one tau to another, what it costs more and harms less."""

    name: str
    taus: tuple[float, float]
    cost: float
    relief: float


@dataclass(frozen=True)
class Allocation:
    """All sites' hulls: `start`, the cheapest tau of each, and edges, those worth most first.

    Calling it with u is the `Path` from everything spent to nothing.
    """

    start: Setting
    edges: tuple[Edge, ...]

    def __call__(self, u: float) -> dict[str, float]:
        left = (1 - u) * sum(edge.cost for edge in self.edges)
        taus = dict(self.start)
        for edge in self.edges:
            if left <= 0:
                break
            taus[edge.name] = between(edge.taus, min(1.0, left / edge.cost))
            left -= edge.cost
        return taus


def allocate(
    model: nn.Module,
    batches: Sequence[Any],
    states: Sequence[State],
    centre: Setting,
    shares: Shares,
    distance: Distance | None,
) -> Allocation:
    """Measure every site's curve around a setting, in len(batches) * (2 + 6 S) forward passes."""
    moves: list[tuple[str, float]] = []
    for state in states:
        name, now = state.site.name, centre[state.site.name]
        share = shares.seen.get(name, {}).get(now, 1.0)
        taus = {shares.tau(state, min(1.0, share * factor)) for factor in SHARES}
        moves += [(name, tau) for tau in sorted(taus - {now})]
    settings = [dict(centre), *({**centre, name: tau} for name, tau in moves)]
    middle, *others = survey(model, batches, settings, distance)
    curves = {name: [(middle.macs, middle.harm, tau)] for name, tau in centre.items()}
    for (name, tau), outcome in zip(moves, others, strict=True):
        curves[name].append((outcome.macs, outcome.harm, tau))
    return of_curves(curves)


def of_curves(curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> Allocation:
    """The allocation of sites whose curves are (cost, harm, tau), in any order."""
    start, edges = {}, []
    for name, points in curves.items():
        found = hull(points)
        start[name] = found[0][2]
        for low, high in pairwise(found):
            edges.append(Edge(name, (low[2], high[2]), high[0] - low[0], low[1] - high[1]))
    edges.sort(key=lambda edge: -edge.relief / edge.cost)
    return Allocation(start, tuple(edges))


def hull(points: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """The points (cost, harm, ...) of the lower convex hull whose harm falls, by rising cost."""
    found: list[tuple[float, float, float]] = []
    for point in sorted(points):
        if found and point[1] >= found[-1][1]:
            continue  # dearer and no better
        while len(found) > 1 and _slope(found[-2], point) <= _slope(found[-2], found[-1]):
            found.pop()  # above the line between its neighbours
        found.append(point)
    return found


def _slope(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
