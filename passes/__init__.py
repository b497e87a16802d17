"""Graph passes, in the order they run.

canonicalize  one view of linears, activations and reshapes, whatever the spelling
match_glu     down(f(gate(x), up(x)))         -> Match or Miss
match_ffn     down(act(up(x)))                -> Match or Miss
match_qkvo    the linears around attention    -> Match or Miss
insert_moe    Match + operands                -> router, gate, dispatch and expert_mlp nodes
verify        the invariants of a graph, before and after
"""

from __future__ import annotations

import inspect
from typing import Any

from ..composites import composite
from .base import GraphRule, Match, Rule
from .match_ffn import MatchFFN
from .match_glu import MatchGLU
from .match_qkvo import MatchQKVO
from .run import match_all

RULES: tuple[Rule, ...] = (
    MatchGLU(),  # first: a gated block also ends in a linear whose input is elementwise
    MatchFFN(),
)
GRAPH_RULES: tuple[GraphRule, ...] = (MatchQKVO(),)  # linears that blocks have left over

_REGISTERED: list[Rule | GraphRule] = []


def register(rule: Rule | GraphRule) -> None:
    """Let a rule take part in every match: in `explain`, `convert`, the backend and `rewrite`.

    rule: an object with `match` (a `Rule`, tried on each linear after the built-in ones) or with `find`
    (a `GraphRule`). It must be pure, and sites of kind "ffn" and "glu" are converted. Rules apply to
    graphs that are captured from then on. Raises TypeError for anything else.
    """
    if not _takes_two(rule, "match") and not _takes_two(rule, "find"):
        raise TypeError(
            f"register() got a {type(rule).__name__}; expected a rule with a `match` or `find` method."
        )
    _REGISTERED.append(rule)


def _takes_two(rule: Any, name: str) -> bool:
    """Whether an object has a method of this name with two arguments; a text has a `find` too."""
    try:
        return len(inspect.signature(getattr(rule, name, None)).parameters) == 2  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def unregister(rule: Rule | GraphRule) -> None:
    """Undo `register`; raises ValueError if the rule is not registered."""
    _REGISTERED.remove(rule)


def rules() -> tuple[tuple[Rule, ...], tuple[GraphRule, ...]]:
    """The rules in force, built-in ones first."""
    own: Any = _REGISTERED
    return (
        (*RULES, *(rule for rule in own if _takes_two(rule, "match"))),
        (*GRAPH_RULES, *(rule for rule in own if _takes_two(rule, "find"))),
    )


__all__ = [
    "GRAPH_RULES", "RULES", "GraphRule", "Match", "MatchFFN", "MatchGLU", "MatchQKVO", "Rule",
    "composite", "match_all", "register", "rules", "unregister",
]  # fmt: skip
