"""Markdown tables from the JSON of benchmarks/cpu.py, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import groups


def tables(found: Mapping[str, Any]) -> str:
    """One table a dtype: a row for each shape and number of tokens, a column for each share."""
    lines = [
        f"{found['machine']['cpu']}, {found['machine']['threads']} threads, "
        f"torch {found['versions']['torch']}; `{found['command']}`.",
        "",
        "Cells: times faster than the best rival, in brackets the share of the roofline that ours",
        "reaches and, after a slash, of the dense block of equal active width; ~ marks noisy cells,",
        "d those where every expert runs and no router (their share is above the break-even).",
        "Behind f .1: times faster than oneDNN and than eager.",
    ]
    for dtype in ("bf16", "fp32", "int8"):
        rows = {key: group for key, group in found["groups"].items() if f"-{dtype}-" in key}
        if rows:
            lines += ["", f"### {dtype}", "", *_table(rows)]
    return "\n".join([*lines, *groups.not_timed(found)])


def _table(rows: Mapping[str, Any]) -> Iterator[str]:
    shares = sorted({share for group in rows.values() for share in group["cells"]}, key=float)
    heads = ["FFN", "T", "best dense", "us", "of roofline", *(f"f {share}" for share in shares)]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for key, group in rows.items():
        shape, activation, _, tokens = key.split("-")
        best = _best_dense(group)
        if best is None:
            continue
        row = group["figures"][best]
        rates = (
            row["gb_s"] / group["bandwidth_gb_s"],
            row["gflop_s"] / group["peak_gflop_s"],
        )
        first = [f"{shape} {activation}", tokens[1:], best, f"{row['us']:.1f}", f"{max(rates):.0%}"]
        cells = [_cell(share, group["cells"].get(share)) for share in shares]
        yield f"| {' | '.join([*first, *cells])} |"


def _best_dense(group: Mapping[str, Any]) -> str | None:
    dense = {name: row["us"] for name, row in group["figures"].items() if " " not in name}
    return min(dense, key=lambda name: dense[name], default=None)


def _cell(share: str, cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    mark = "~" * cell["noisy"] + "d " * cell.get("everything", False)
    ideal = "" if cell["of_ideal"] is None else f"/{100 * cell['of_ideal']:.0f}"
    text = f"{mark}{cell['speedup']:.3g} ({100 * cell['roofline']:.0f}{ideal} %)"
    if share == "0.1":
        text += "".join(f", {cell[k]:.3g}" for k in ("vs_onednn", "vs_eager") if k in cell)
    return text
