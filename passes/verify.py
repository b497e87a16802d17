"""The invariants that a rewritten graph keeps, checked after every rewrite.

Each inserted expert_mlp or expert_mlp_int8 reads the lists of one route, of one site of one routes, or of one
dispatch, whose mask comes from one gate, whose scores are never negative (they come from abs, or are exact
norms); an expert_mlps counts for as many as it stands for, and reads the lists of other sites of one routes
for each; a dynamic_mlp reads a record of its own; nothing reads a value before it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..errors import VerifyError
from ..kernels.dispatch import dispatch
from ..kernels.dynamic_mlp import dynamic_mlp
from ..kernels.exact_scores import exact_scores
from ..kernels.expert_mlp import expert_mlp
from ..kernels.expert_mlp_int8 import expert_mlp_int8
from ..kernels.expert_mlps import expert_mlps
from ..kernels.gate import gate
from ..kernels.route import route
from ..kernels.routes import routes


def verify(gm: GraphModule, expected: int) -> None:
    """Raise VerifyError unless the graph is well formed and holds `expected` converted sites."""
    graphs = list(_graphs(gm))
    try:
        for graph in graphs:
            graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"The rewritten graph is not well formed: {error}") from error
    experts = expert_mlp.overload, expert_mlp_int8.overload
    blocks = [node for g in graphs for node in g.nodes if node.target in experts]
    groups = [node for g in graphs for node in g.nodes if node.target is expert_mlps.overload]
    records = [n.args[1] for g in graphs for n in g.nodes if n.target is dynamic_mlp.overload]
    sites = len(blocks) + sum(len(node.args[1]) // 3 for node in groups)
    if sites + len(records) != expected:
        raise VerifyError(
            f"{sites} expert_mlp and {len(records)} dynamic_mlp nodes in the rewritten graph; "
            f"expected {expected}."
        )
    if len(set(records)) != len(records):
        raise VerifyError("Two blocks of the rewritten graph read one record.")
    for group in groups:
        own = [_lists_of(group, group.args[1][i : i + 3]) for i in range(0, len(group.args[1]), 3)]
        if len({lists for lists, _ in own}) > 1 or len({place for _, place in own}) < len(own):
            raise VerifyError(f"{group.name} reads lists of other calls, or of one site twice.")
        _from(own[0][0], routes.overload)
    for block in blocks:
        lists, place = _lists_of(block, block.args[1:4])
        target = getattr(lists, "target", None)
        if target is routes.overload or (target is route.overload and place == 0):
            continue
        if place:
            raise VerifyError(f"{block.name} reads lists that its call does not make.")
        scores = _from(_from(lists, dispatch.overload), gate.overload)
        if getattr(scores, "target", None) is exact_scores.overload:
            continue
        if _from(scores, torch.abs) is None:
            raise VerifyError(f"{block.name} is not fed by abs -> gate -> dispatch, or by route.")


def _lists_of(block: Node, parts: Any) -> tuple[Any, int]:
    """The call that makes a block's three lists, and of which of its sites they are, from 0 on."""
    lists, first = _from(parts[0], getitem), parts[0].args[1]
    if first % 3 or any(
        lists is not _from(part, getitem) or part.args[1] != first + i
        for i, part in enumerate(parts)
    ):
        raise VerifyError(f"{block.name} reads lists of different dispatches.")
    return lists, first // 3


def _graphs(gm: GraphModule) -> Iterator[Graph]:
    """The graph of a module, and the bodies that its calls run."""
    yield gm.graph
    for node in gm.graph.nodes:
        body = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(body, GraphModule):
            yield from _graphs(body)


def _from(node: Any, target: Any) -> Any:
    """The first argument of `node`, which has to call `target`."""
    if not isinstance(node, Node) or node.target is not target:
        raise VerifyError(f"{node} does not call {target}.")
    return node.args[0]
