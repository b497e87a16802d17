"""Which linears stand around attention cores, and what they make there: queries, keys, values, or the output.

From each operand of a core the graph is walked back, from its output forward, to the nearest linears: past
reshapes, norms, rotary embeddings, gates, concatenations and caches written in place, but never past a
residual add. A linear found so is a projection, or the nearest matrix of a block that stands for one.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from .attention import Core, Packed, cores
from .canonicalize import View
from .linear import Linear
from .reach import Conflict, Reach

ROLES = ("q", "k", "v", "o", "qk", "kv", "qkv")


def around(view: View) -> dict[Node, set[str]]:
    """The letters "q", "k", "v", "o" of each linear next to a core, by its last node; walked once a view."""
    if view.around is None:
        view.around, reach = {}, Reach(view)
        for core in cores(view):
            for linear, letter in [] if isinstance(core, Packed) else _around(reach, core):
                view.around.setdefault(linear, set()).add(letter)
    return view.around


def spelt(letters: Iterable[str]) -> str:
    """The role of letters in their usual order; an output that the next core reads as it is stays "o"."""
    found = set(letters)
    return "o" if "o" in found else "".join(letter for letter in "qkv" if letter in found)


def role_of(view: View, up: Linear, down: Linear) -> str | None:
    """What a block makes for attention: its last matrix q, k or v, or its first one o; None if nothing."""
    found = around(view)
    letters = found.get(down.node, set()) - {"o"} | found.get(up.node, set()) & {"o"}
    return role if (role := spelt(letters)) in ROLES else None


def _around(reach: Reach, core: Core) -> list[tuple[Node, str]]:
    found: list[tuple[Node, str]] = []
    if core.k is core.v and core.q not in reach.view.runtime:
        return found  # pools values as they are, such as the outputs of earlier layers
    for role, operand in (("q", core.q), ("k", core.k), ("v", core.v)):
        back = reach.back(operand)
        if not isinstance(back, Conflict):
            found += [(linear, role) for linear in back]
    if core.weights is not None and {role for _, role in found} == {"k"}:
        return []  # nothing projected asks: a soft assignment, not attention
    return [*found, *((linear, "o") for linear in reach.forward(core.out, core.weights))]
