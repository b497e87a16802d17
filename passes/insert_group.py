"""Insert what stands for several blocks that read the same x, before the end of the first of them.

    lists_q, lists_k, lists_v = routes(x, router1, router2, tau, reads)
    y_q, y_k, y_v = expert_mlps(x, lists, slabs, f)

All that these read is x and operands, which there are before any of the blocks. Blocks that compute
something else than the others are routed with them and have an expert_mlp of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import getitem

from torch.fx import Graph, Node

from ..kernels.expert_mlps import expert_mlps
from ..kernels.native import SLABS
from ..kernels.routes import routes
from .base import Match
from .insert_moe import Given, input_of, slabs_of
from .share_routing import Shares


class Groups:
    """What stands for several matches of a graph, inserted where the first of them is replaced.

    operands: the nodes of each match's operands, in the graph that the match is in.
    """

    def __init__(
        self, shares: Shares, matches: Sequence[Match], operands: Sequence[Mapping[str, Node]]
    ) -> None:
        self._shares, self._matches, self._operands = shares, matches, operands
        self._given: dict[int, Given] = {}

    def given(self, index: int, graph: Graph, at: Callable[[Node], Node]) -> Given | None:
        """What there is for a match by now, or None where it shares nothing; matches come in order."""
        with graph.inserting_before(at(self._matches[index].root)):
            routed = _led(self._shares.routing, index)
            if len(routed) > 1 or (routed and self._shares.follows(index)):
                self._route(routed, graph, at)
            together = _led(self._shares.experts, index)
            if len(together) > 1:
                self._run(together, graph)
        return self._given.get(index)

    def _route(self, members: Sequence[int], graph: Graph, at: Callable[[Node], Node]) -> None:
        """Insert the lists of matches that read one x."""
        first = self._matches[members[0]]
        x = input_of(graph, first, at(first.x))
        slabs = {i: slabs_of(graph, self._matches[i], self._operands[i]) for i in members}
        owners: list[int] = []  # of the first layers that are read
        for i in members:
            if self._shares.leaders[i] not in owners:
                owners.append(self._shares.leaders[i])
        held = [slabs.get(i) or self._given[i].slabs for i in owners]
        made = graph.call_function(
            routes.overload,
            (
                x,
                [one["router1"] for one in held],
                [slabs[i]["router2"] for i in members],
                [slabs[i]["tau"] for i in members],
                [owners.index(self._shares.leaders[i]) for i in members],
            ),
        )
        for place, i in enumerate(members):
            lists = (graph.call_function(getitem, (made, 3 * place + k)) for k in range(3))
            self._given[i] = Given(x, slabs[i], tuple(lists))

    def _run(self, members: Sequence[int], graph: Graph) -> None:
        """Insert the experts of matches that were routed together and compute the same."""
        given = [self._given[i] for i in members]
        lists = [node for one in given for node in one.lists]
        slabs = [one.slabs.get(name) for one in given for name in SLABS]
        activation = self._matches[members[0]].activation
        made = graph.call_function(expert_mlps.overload, (given[0].x, lists, slabs, activation))
        for place, i in enumerate(members):
            self._given[i] = replace(self._given[i], outputs=(made, place))


def _led(leaders: Sequence[int], index: int) -> list[int]:
    """The matches that this one leads, itself first."""
    return [i for i, leader in enumerate(leaders) if leader == index]
