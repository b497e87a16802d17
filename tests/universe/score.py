"""Compare what `explain` reports of a case with the truth about it.

python -m universe.score [pattern ...]       (with tests/ on PYTHONPATH)
"""

from __future__ import annotations

import fnmatch
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import d2dcompile as d2d
from d2dcompile.explaining import Report

from .case import Case, Truth


@dataclass
class Score:
    """What was found of one case.

    Attributes:
        blocks, found_blocks: feed-forward blocks in the truth, and those of them reported.
        projections, found_projections: projection weights in the truth, and those with the right role.
        false: sites that the truth does not know, as text.
        missed: blocks and projections not found, with the reasons reported for their weights.
        graphs: how many graphs Dynamo made of the model.
        error: what went wrong instead, or "".
    """

    case: str
    blocks: int = 0
    found_blocks: int = 0
    projections: int = 0
    found_projections: int = 0
    false: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    graphs: int = 0
    error: str = ""


def call(model: nn.Module, inputs: tuple[Any, ...] | dict[str, Any]) -> Report:
    """`explain` with a case's inputs."""
    if isinstance(inputs, dict):
        return d2d.explain(model, **inputs)
    return d2d.explain(model, *inputs)


def score(case: Case) -> Score:
    """Explain a case and compare."""
    torch._dynamo.reset()
    result = Score(case.name)
    try:
        model, inputs = case.make()
        truth = case.truth(model)
        report = call(model, inputs)
    except Exception:
        result.error = traceback.format_exc(limit=-3)
        return result
    compare(result, report, truth, aliases(model))
    return result


def aliases(model: nn.Module) -> dict[str, str]:
    """{parameter name: first name of the same parameter}, for tied weights."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(p), name)
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def compare(result: Score, report: Report, truth: Truth, alias: dict[str, str]) -> None:
    """Fill in a score from a report and the truth."""

    def plain(name: str) -> str:
        return alias.get(name, name)

    result.graphs = report.graphs
    optional = {plain(name) for name in truth.optional}
    blocks = {frozenset(plain(w) for w in block.values()): block for block in truth.blocks}
    projections = {plain(name): role for name, role in dict(truth.projections).items()}
    found = set()
    for site in report.sites:
        weights = frozenset(plain(w) for w in site.params.values())
        known = weights in blocks if site.convertible else projections.get(*weights) == site.role
        if known:
            found.add(weights)
        elif not weights <= optional:
            result.false.append(f"{site.kind} {site.role or ''} {dict(site.params)}")
    reasons = {miss.weight: miss.reason for miss in report.misses}
    result.blocks, result.projections = len(blocks), len(projections)
    for weights, block in blocks.items():
        result.found_blocks += weights in found
        if weights not in found:
            why = "; ".join(f"{r}: {reasons.get(w, 'not in any graph')}" for r, w in block.items())
            result.missed.append(f"block {dict(block)}: {why}")
    for weight, role in projections.items():
        result.found_projections += frozenset((weight,)) in found
        if frozenset((weight,)) not in found:
            result.missed.append(f"{role} {weight}: {reasons.get(weight, 'not in any graph')}")


def select(cases: Iterable[Case], patterns: list[str]) -> list[Case]:
    """The cases whose names match one of the patterns; all without patterns."""
    return [c for c in cases if not patterns or any(fnmatch.fnmatch(c.name, p) for p in patterns)]


def total(scores: list[Score]) -> str:
    """One line over all scores."""
    keys = ("found_blocks", "blocks", "found_projections", "projections")
    sums = {key: sum(getattr(s, key) for s in scores) for key in keys}
    return (
        f"{len(scores)} models; blocks {sums['found_blocks']} of {sums['blocks']}; projections "
        f"{sums['found_projections']} of {sums['projections']}; "
        f"{sum(len(s.false) for s in scores)} false; {sum(bool(s.error) for s in scores)} errors"
    )


def main() -> None:
    """Score the cases named on the command line and print what is wrong."""
    from . import all_cases

    torch.set_num_threads(1)
    scores = []
    for case in select(all_cases(), sys.argv[1:]):
        scores.append(score(case))
        one = scores[-1]
        for text in (*(f"FALSE {f}" for f in one.false), *one.missed, *one.error.splitlines()):
            print(f"{case.name}: {text}", flush=True)
    print(total(scores))


if __name__ == "__main__":
    main()
