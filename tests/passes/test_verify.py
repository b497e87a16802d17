"""verify refuses each way in which a rewritten graph can be broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from d2dcompile import rewriting
from d2dcompile.errors import VerifyError
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.gate import gate
from d2dcompile.passes.verify import verify


def nodes(gm: GraphModule, target: object) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.target is target]


def mix_dispatches(gm: GraphModule) -> None:
    first, second = nodes(gm, expert_mlp.overload)
    second.update_arg(1, first.args[1])


def swap_lists(gm: GraphModule) -> None:
    block = nodes(gm, expert_mlp.overload)[0]
    block.args = (block.args[0], block.args[2], block.args[1], *block.args[3:])


def drop_abs(gm: GraphModule) -> None:
    gm_gate = nodes(gm, gate.overload)[0]
    gm_gate.update_arg(0, gm_gate.args[0].args[0])


def skip_gate(gm: GraphModule) -> None:
    lists = nodes(gm, dispatch.overload)[0]
    lists.update_arg(0, lists.args[0].args[0])


def tokens_from_nowhere(gm: GraphModule) -> None:
    nodes(gm, expert_mlp.overload)[0].update_arg(1, None)


def read_before_computed(gm: GraphModule) -> None:
    first, second = nodes(gm, expert_mlp.overload)
    first.update_arg(0, second)


def lose_one(gm: GraphModule) -> None:
    block = nodes(gm, expert_mlp.overload)[0]
    block.replace_all_uses_with(block.args[0])
    gm.graph.erase_node(block)


BREAKS: dict[Callable[[GraphModule], None], str] = {
    mix_dispatches: "different dispatches",
    swap_lists: "different dispatches",
    drop_abs: "does not call",
    skip_gate: "does not call",
    tokens_from_nowhere: "None does not call",
    read_before_computed: "not well formed",
    lose_one: "1 expert_mlp and 0 dynamic_mlp nodes in the rewritten graph; expected 2",
}


@pytest.mark.parametrize("broken", BREAKS, ids=lambda f: f.__name__)
def test_a_broken_graph_is_refused(broken, trace) -> None:
    model = nn.Sequential(
        *[nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)]
    )
    traced = trace(model, torch.randn(4, 8))
    gm = rewriting.rewrite_captured(traced.captured, traced.matches()).gm
    verify(gm, 2)
    broken(gm)
    with pytest.raises(VerifyError, match=BREAKS[broken]):
        verify(gm, 2)
