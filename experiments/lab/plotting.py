"""One plot per experiment: quality against multiply-adds, every method, bands over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .curves import at_budget
from .methods import Point

GRID = 120


def draw(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[Sequence[Point]]],
    dense: Sequence[Mapping[str, float]],
    metrics: Mapping[str, bool],
    floor: float = 0.6,
) -> None:
    """Draw a panel per metric; lines are means over seeds, bands from the lowest to the highest.

    The axis of quality ends where the dense model's error has grown much: what is far below says
    nothing about which method to take. floor: share of the dense quality at which a "higher is better"
    axis ends; others end at the dense value over it, squared.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(metrics), figsize=(6.4 * len(metrics), 4.6), squeeze=False, layout="constrained"
    )
    colours = pyplot.get_cmap("tab20").colors
    for axis, (metric, higher) in zip(axes[0], metrics.items(), strict=True):
        base = sum(q[metric] for q in dense) / len(dense)
        axis.axhline(base, color="black", linewidth=0.8, linestyle=":", label="dense")
        for index, (method, runs) in enumerate(curves.items()):
            xs, low, mean, high = _band(runs, metric)
            colour = colours[index % len(colours)]
            axis.plot(xs, mean, label=method, color=colour, linewidth=1.6)
            axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xlabel("multiply-adds of the converted blocks / dense")
        axis.set_ylabel(metric)
        axis.set_xlim(0, 1.1)
        values = [p.quality[metric] for runs in curves.values() for run in runs for p in run]
        if values and higher:
            top = max(*values, base)
            axis.set_ylim(max(min(values), base * floor), top + 0.02 * abs(top))
        elif values:
            top = min(max(values), base / floor**2)
            axis.set_ylim(0.95 * min(*values, base), max(top, 1.05 * base))
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=72, metadata={"Software": None})
    pyplot.close(figure)


def _band(
    runs: Sequence[Sequence[Point]], metric: str
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Costs that every seed's curve covers, and there the lowest, mean and highest quality."""
    low = max(min(point.cost for point in run) for run in runs)
    high = min(max(point.cost for point in run) for run in runs)
    xs = [low + (high - low) * i / (GRID - 1) for i in range(GRID)] if high > low else [low]
    columns = []
    for x in xs:
        values = [at_budget(run, x, metric) for run in runs]
        columns.append([value for value in values if value is not None] or [float("nan")])
    return (
        xs,
        [min(column) for column in columns],
        [sum(column) / len(column) for column in columns],
        [max(column) for column in columns],
    )
