"""Write the tables of experiments from results/*.json: `python -m experiments.lab.report`.

A summary into the README, all tables into docs/experiments.md; in each between two comments, which have to
be there once each:

    <!-- experiments:begin -->
    <!-- experiments:end -->

With --check nothing is written, and the exit status says whether both are up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .results import RESULTS, ROOT, read

BEGIN, END = "<!-- experiments:begin -->", "<!-- experiments:end -->"
SHOWN = ("0.8", "0.6", "0.4", "0.3", "0.2")
COMPARED = {
    "D2DMoE": "D2DMoE",
    "D2DMoE, a tau per site": "a tau per block",
    "static top-k": "static top-k",
    "MoEfication": "MoEfication",
    "TEAL, sparse model": "TEAL, sparse model",
    "WINA, sparse model": "WINA, sparse model",
    "TEAL": "TEAL",
    "WINA": "WINA",
}  # methods of the summary, and what they are called there


def table(result: Mapping[str, Any]) -> str:
    """One experiment: a row per method, critical cost of the mean curve, and quality at budgets, mean and
    deviation."""
    metric = next(iter(result["metrics"]))
    base = [quality[metric] for quality in result["dense"]]
    percent = ", ".join(f"at {float(budget):.0%}" for budget in SHOWN).replace("%", " %")
    head = ["method", "cost at 99 %", *percent.split(", ")]
    seeds = ", ".join(map(str, result["seeds"]))
    lines = [
        f"**{result['title']}** {metric}, dense {sum(base) / len(base):.4g}; "
        f"seeds {seeds}; `{result['command']}`, {result['versions']['processor']}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for method, found in result["summary"].items():
        figures = found[metric]
        cells = [method, _critical(result, method)]
        cells += [_quality(figures["budgets"][budget]) for budget in SHOWN]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"![{result['title']}](../results/{result['name']}.png)"]
    return "\n".join(lines)


def overview(results: Sequence[Mapping[str, Any]]) -> str:
    """A row per experiment that compares methods: the critical cost of each, by its first metric."""
    lines = [
        "| " + " | ".join(("experiment", "dense", *COMPARED.values())) + " |",
        "|" + "---|" * (len(COMPARED) + 2),
    ]
    for result in results:
        metric, summary = next(iter(result["metrics"])), result["summary"]
        if not {"D2DMoE", "static top-k", "MoEfication"} <= set(summary):
            continue
        base = [quality[metric] for quality in result["dense"]]
        cells = [f"{result['title']} (`{result['command']}`)"]
        cells.append(f"{metric} {sum(base) / len(base):.4g}")
        cells += [_critical(result, method) if method in summary else "-" for method in COMPARED]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _critical(result: Mapping[str, Any], method: str) -> str:
    """The cost by the first metric; "≤" where no cheaper point was measured, seeds where they are few."""
    metric, runs = next(iter(result["metrics"])), result["curves"][method]
    found = result["summary"][method][metric]["critical_of_mean"]
    if found is None:
        text = "never"
    else:
        cheapest = max(min(point["cost"] for point in run) for run in runs)
        text = f"{'≤ ' * (found <= cheapest)}{100 * found:.0f} %"
    return text if len(runs) == len(result["seeds"]) else f"{text} (seeds: {len(runs)})"


def _quality(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:.4g}" + f" ± {found['std']:.2g}" * (len(found["values"]) > 1)


def found(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results of experiments of a folder, by name."""
    results = [read(path) for path in sorted(folder.glob("*.json"))]
    return [result for result in results if "summary" in result]


def replaced(text: str, inside: str) -> str:
    """The text with what stands between the markers replaced; ValueError unless each is there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"Expected {BEGIN} and then {END}, once each, in the page; add them.")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{inside}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.lab.report")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    given = parser.parse_args(argv)
    results = found()
    pages = {
        ROOT / "README.md": overview(results),
        ROOT / "docs" / "experiments.md": "\n\n".join(map(table, results)),
    }
    old = 0
    for path, inside in pages.items():
        before = path.read_text()
        after = replaced(before, inside)
        old += after != before
        if not given.check:
            path.write_text(after)
    return int(given.check and old > 0)


if __name__ == "__main__":
    sys.exit(main())
