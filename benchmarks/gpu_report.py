"""Markdown tables from the JSON of benchmarks/gpu.py, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import groups

DENSE = ("eager", "merged", "inductor")
GROUPED = ("grouped_mm", "transformers")
IDEAL = ("ideal eager", "ideal inductor")


def tables(found: Mapping[str, Any]) -> str:
    """Each cell against its rivals, each of our schedules, the phases, and what the checks found."""
    measured = {name: group for name, group in found["groups"].items() if "cells" in group}
    checks = [group for group in found["groups"].values() if "checks" in group]
    ways = sorted({group["timed_as"] for group in found["groups"].values()})
    lines = [
        f"{found['machine']['gpu']}, torch {found['versions']['torch']}, "
        f"triton {found['versions']['triton']}; `{found['command']}`.",
        "",
        f"Microseconds a layer, router included, weights cold; timed as {', '.join(ways)}. In brackets:",
        "share of the roofline, what the slower of the measured copy bandwidth and product rate allows.",
        "Rivals have the masks for nothing. * without a graph, with its looks from the host.",
    ]
    if measured:
        lines += ["", *_cells(measured), "", *_schedules(measured), "", *_phases(measured)]
    for group in checks:
        lines += ["", *_checks(group)]
    broken = [f"- {name}: {reason}" for name, reason in found["broken"].items()]
    if broken:
        lines += ["", "Failed groups:", "", *broken]
    return "\n".join([*lines, *groups.not_timed(found)])


def _rows(measured: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, group in measured.items():
        for cell, record in group["cells"].items():
            yield f"{name} {cell}", record


def best(figures: Mapping[str, Any], names: Any) -> str | None:
    """The fastest of some candidates; None if none of them was timed."""
    timed = {name: figures[name]["us"] for name in names if name in figures}
    return min(timed, key=lambda name: timed[name], default=None)


def ours(figures: Mapping[str, Any]) -> str | None:
    return best(figures, [name for name in figures if name.startswith("ours ")])


def _time(figures: Mapping[str, Any], name: str | None, named: bool = False) -> str:
    if name not in figures:
        return "-"
    row = figures[name]
    mark = "" if row["captured"] else "*"
    text = f"{row['us']:.1f}{mark} ({row['of_roofline']:.0%})"
    return f"{name.removeprefix('ours ')} {text}" if named else text


def _times(figures: Mapping[str, Any], slow: str | None, fast: str | None) -> str:
    if slow is None or fast is None:
        return "-"
    return f"{figures[slow]['us'] / figures[fast]['us']:.2f}"


def _cells(measured: Mapping[str, Any]) -> Iterator[str]:
    heads = ["case", "f", "union", *DENSE, *GROUPED, *IDEAL, "ours", "iqr", "vs dense", "vs all"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for name, record in _rows(measured):
        figures = record["figures"]
        own = ours(figures)
        cells = [
            name,
            f"{record['executed']:.3f}",
            f"{record['union']:.2f}",
            *(_time(figures, rival) for rival in (*DENSE, *GROUPED, *IDEAL)),
            _time(figures, own, named=True),
            "-" if own is None else f"{figures[own]['iqr_us']:.1f}",
            _times(figures, best(figures, DENSE), own),
            _times(figures, best(figures, (*DENSE, *GROUPED)), own),
        ]
        yield f"| {' | '.join(cells)} |"


def _schedules(measured: Mapping[str, Any]) -> Iterator[str]:
    names: list[str] = []
    for _, record in _rows(measured):
        names += [n for n in record["figures"] if n.startswith("ours ") and n not in names]
    yield f"| ours, us | {' | '.join(name.removeprefix('ours ') for name in names)} |"
    yield "|---|" + "---|" * len(names)
    for name, record in _rows(measured):
        figures = record["figures"]
        cells = [f"{figures[n]['us']:.1f}" if n in figures else "-" for n in names]
        yield f"| {name} | {' | '.join(cells)} |"


def _phases(measured: Mapping[str, Any]) -> Iterator[str]:
    yield "| phases, us | TB/s copy | TFLOP/s product | what ran |"
    yield "|---|---|---|---|"
    for name, record in _rows(measured):
        parts = "; ".join(f"{phase} {us:.1f}" for phase, us in record["phases_us"].items())
        rates = f"{record['copy_tb_s']:.2f} | {record['product_tflop_s']:.0f}"
        yield f"| {name} | {rates} | {parts} |"


def _checks(group: Mapping[str, Any]) -> Iterator[str]:
    yield "| path | captured | right on other rows | same bits | executed |"
    yield "|---|---|---|---|---|"
    for name, found in group["checks"].items():
        held = " | ".join("yes" if found[k] else "NO" for k in ("captured", "right", "same_bits"))
        yield f"| {name} | {held} | {', '.join(f'{e:.2f}' for e in found['executed'])} |"
