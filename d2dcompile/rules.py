"""The selection rules' numbers: what each may be, and which is denser.

A site follows one rule (see `kernels.gate`) with one number: tau of "max", k of "top_k", p of "top_p". The
share of experts that run falls with tau and rises with k and p; a *sparsity* of 0 (everything runs) to 1
(the fewest that the rule runs) orders the numbers of every rule alike, for searches.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from .errors import RuleError, TauError
from .kernels.gate import RULES as RULES

NUMBERS = {"max": "tau", "top_k": "k", "top_p": "p"}
MOST_K = 1 << 24  # fp32 holds every whole number up to here


def check_rule(rule: Any) -> str:
    """The rule; RuleError unless it is one of RULES."""
    if rule not in RULES:
        raise RuleError(f"The rule is {rule!r}; expected one of {', '.join(RULES)}.")
    return str(rule)


def check_value(rule: str, value: Any) -> float:
    """A rule's number as a float; TauError for "max" and RuleError for others, if it cannot be one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if rule == "max" and not (number and 0 <= value <= 1):
        raise TauError(f"tau is {value!r}; expected a finite number in 0..1 (0 runs all experts).")
    if rule == "top_p" and not (number and 0 <= value <= 1):
        raise RuleError(f"p is {value!r}; expected a number in 0..1 (1 runs all experts).")
    if rule == "top_k" and not (number and value in range(1, MOST_K + 1)):
        raise RuleError(
            f"k is {value!r}; expected a whole number of experts, at least 1 (as many as there are, or "
            "more, run all)."
        )
    return float(value)


def dense_value(rule: str, experts: int) -> float:
    """The number at which everything runs: tau = 0, k = E, p = 1."""
    return value_at(rule, 0.0, experts)


def value_at(rule: str, sparsity: float, experts: int) -> float:
    """The number of a sparsity in 0..1: tau = sparsity, p = 1 - sparsity, k from E down to 1, rounded."""
    if rule == "max":
        return sparsity
    return 1 - sparsity if rule == "top_p" else float(round(experts - sparsity * (experts - 1)))


def sparsity_of(rule: str, value: float, experts: int) -> float:
    """Where a number lies between everything (0) and the fewest (1), so that `value_at` gives it back."""
    if rule == "max":
        return value
    if rule == "top_p":
        return 1 - value
    return (experts - min(value, experts)) / max(experts - 1, 1)


def calibrated_share(rule: str, value: float, stats: Mapping[str, float], experts: float) -> float:
    """The executed share of so many routed experts at a rule's number, by what calibration saw of them.

    stats: {"share@0.1": share at tau .1, "share_top_p@0.9": share at p .9, ...}; between them on a line,
    from everything at 0 to nothing at 1. Of "top_k" it is known without.
    """
    if rule == "top_k":
        return min(1.0, value / max(experts, 1))
    sparsity = sparsity_of(rule, value, 0)
    key = "share@" if rule == "max" else "share_top_p@"
    known = {
        sparsity_of(rule, float(name.removeprefix(key)), 0): share
        for name, share in stats.items()
        if name.startswith(key)
    }
    points = sorted({0.0: 1.0, 1.0: 0.0, **known}.items())
    for (low, above), (high, below) in pairwise(points):
        if sparsity <= high:
            return above + (below - above) * (sparsity - low) / (high - low)
    return 0.0
