"""Find blocks that read the same tokens: one first router layer, and one launch, can serve all of them.

    h = relu(x router1^T)     scores_q = |h router2_q^T|     scores_k = |h router2_k^T|     ...

What was fitted together and what a graph computes once are both decided by `same_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .base import Match
from .canonicalize import View
from .inplace import mutations, origin

MOST = 4  # sites of one launch: Q, K, V and a feed-forward block beside them


@dataclass(frozen=True)
class Shares:
    """What matches of a graph share: a first router layer, and calls that compute several of them.

    Attributes:
        leaders: for each match the index of the one whose layer it reads; its own for none.
        widths: R, the features of each one's layer.
        routing: for each match the index of the one before which it is routed too; its own for none.
            Empty where no match shares a call.
        experts: the same of the call that runs its experts; those together are routed together.
    """

    leaders: tuple[int, ...]
    widths: tuple[int, ...]
    routing: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()

    def follows(self, index: int) -> bool:
        """Whether this match reads the layer of an earlier one."""
        return self.leaders[index] != index

    def led(self, index: int) -> tuple[int, ...]:
        """The matches that read this one's layer, itself first; none where no other does."""
        found = tuple(i for i, leader in enumerate(self.leaders) if leader == index)
        return found if len(found) > 1 else ()


def same_inputs(
    matches: Sequence[Match], alike: Callable[[int, int], bool] = lambda first, later: True
) -> tuple[int, ...]:
    """For each match the index of the first one that reads the same x as it does; its own without one.

    Same: one node of one graph, not changed in place between them, features along the same axis, computed
    in the same dtype. alike(first, later): whether two of these indices may go together besides.
    """
    firsts: dict[tuple[object, ...], list[int]] = {}
    views: dict[int, View] = {}
    found = []
    for i, match in enumerate(matches):
        view = views.setdefault(id(match.captured), View(match.captured))
        known = firsts.setdefault(_input(view, match), [])
        first = next((j for j in known if alike(j, i)), None)
        if first is None:
            known.append(i)
        found.append(i if first is None else first)
    return tuple(found)


def _input(view: View, match: Match) -> tuple[object, ...]:
    """What tells inputs apart: the node, how often it was changed before the block ends, and the rest."""
    memory, end = origin(match.x), view.order[match.root]
    changes = sum(what is memory and view.order[call] < end for call, what in mutations(view))
    return id(match.captured), match.x, changes, match.linears[-1].axis, match.dtype


def in_parts(leaders: Sequence[int], most: int = MOST) -> tuple[int, ...]:
    """The same groups in parts of at most `most`, each led by its first."""
    counts: dict[int, int] = {}
    present: dict[int, int] = {}
    found = []
    for i, leader in enumerate(leaders):
        count = counts.get(leader, 0)
        if count % most == 0:
            present[leader] = i
        counts[leader] = count + 1
        found.append(present[leader])
    return tuple(found)
