"""Find blocks that read the same tokens, so that one first router layer can serve all of them.

    h = relu(x router1^T)     scores_q = |h router2_q^T|     scores_k = |h router2_k^T|     ...

What was fitted together and what a graph computes once are both decided by `same_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .base import Match


@dataclass(frozen=True)
class Shares:
    """Which matches of a graph share a first router layer.

    Attributes:
        leaders: for each match the index of the one whose layer it reads; its own for none.
        widths: R, the features of each one's layer.
    """

    leaders: tuple[int, ...]
    widths: tuple[int, ...]

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

    Same: one node of one graph, features along the same axis, computed in the same dtype. alike(first,
    later): whether two of these indices may go together besides.
    """
    firsts: dict[tuple[object, ...], list[int]] = {}
    found = []
    for i, match in enumerate(matches):
        known = firsts.setdefault(_input(match), [])
        first = next((j for j in known if alike(j, i)), None)
        if first is None:
            known.append(i)
        found.append(i if first is None else first)
    return tuple(found)


def _input(match: Match) -> tuple[object, ...]:
    return id(match.captured), match.x, match.linears[-1].axis, match.dtype
