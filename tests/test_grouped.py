"""Sites that read one x are routed and run together on a GPU; here with lowering made to see one.

Their ops then run as their meanings, or on request in Triton's interpreter.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_projections import QUICK, case_of
from test_projections import run as called_with
from test_share_routers import batches, compiled, converted, layer, targets_of
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import d2dcompile as d2d
from d2dcompile import backend, lowering, rewriting, testing
from d2dcompile.attachment import states
from d2dcompile.errors import VerifyError
from d2dcompile.gpu_defaults import of_strategy
from d2dcompile.gpus import H200
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.expert_mlp import gpu as experts_gpu
from d2dcompile.kernels.expert_mlps import expert_mlps
from d2dcompile.kernels.gate import gate
from d2dcompile.kernels.launching import noting
from d2dcompile.kernels.route import route
from d2dcompile.kernels.routes import routes
from d2dcompile.passes import share_routing
from d2dcompile.passes.share_routing import in_parts
from d2dcompile.passes.verify import verify

OPS = ("route", "expert_mlp", "routes", "expert_mlps")


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The rewritten graphs of a test, in which sites seem to be on a GPU."""
    made: list[GraphModule] = []
    real = backend._inner
    monkeypatch.setattr(lowering, "_on_gpu", lambda state: True)
    monkeypatch.setattr(backend, "_inner", lambda gm, *rest: made.append(gm) or real(gm, *rest))
    return made


def counted(gm: GraphModule) -> dict[str, Any]:
    """Sites of each call of the ops for several sites, and calls of those for one."""
    return {
        "routes": [len(node.args[2]) for node in targets_of(gm, routes.overload)],
        "expert_mlps": [len(node.args[1]) // 3 for node in targets_of(gm, expert_mlps.overload)],
        "route": len(targets_of(gm, route.overload)),
        "expert_mlp": len(targets_of(gm, expert_mlp.overload)),
    }


def run(model: nn.Module, x: Tensor, inner: str = "eager") -> Tensor:
    with torch.no_grad():
        result: Tensor = compiled(model, inner=inner)(x)
    return result


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
def test_all_that_reads_x_is_one_call_and_what_reads_another_is_not(share, graphs) -> None:
    """Q, K, V and a feed-forward block beside them; the output projection is by itself."""
    model, x = layer(), batches()[0]
    with torch.no_grad():
        dense, exact = model(x), copy.deepcopy(model).double()(x.double())
    converted(model, share_routers=share)
    assert testing.error_ratio(run(model, x), dense, exact) <= 2
    d2d.set_tau(model, 0.5)
    sparse = run(model, x)
    assert torch.equal(sparse, run(model, x, "aot_eager"))
    assert not torch.allclose(sparse, dense, atol=1e-3)
    assert counted(graphs[0]) == {"routes": [4], "expert_mlps": [4], "route": 1, "expert_mlp": 1}
    (call,) = targets_of(graphs[0], routes.overload)
    assert call.args[4] == ([0, 0, 0, 1] if share else [0, 1, 2, 3])
    assert len(call.args[1]) == (2 if share else 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2D_IMPL", "expert_mlp:reference")
        assert torch.equal(run(model, x), sparse)
    assert counted(graphs[-1]) == {"routes": [], "expert_mlps": [], "route": 5, "expert_mlp": 5}


@pytest.mark.parametrize(
    "form, calls, alone",
    [("gqa", [3, 3], 4), ("bert", [3, 3], 4), ("t5", [3, 3, 3, 4, 3], 12)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_projections_of_a_model_are_grouped_by_what_they_read(form, calls, alone, graphs) -> None:
    """Q, K and V of every attention; K and V of all cross-attentions, which read the encoder's output."""
    case = case_of(form)
    d2d.replace_projections(case.model, [case.inputs] * 2, **QUICK)
    dense = called_with(case.model, case)
    exact = called_with(copy.deepcopy(case.model).double(), case)
    config = d2d.Config(expert_size=4, router_width=8, router_epochs=1)
    d2d.convert(case.model, [case.inputs] * 2, config, progress=False)
    fast = compiled(case.model)
    assert testing.error_ratio(called_with(fast, case), dense, exact) <= 2
    d2d.set_tau(case.model, 0.5)
    grouped = called_with(fast, case)
    found = counted(graphs[0])
    assert found == {"routes": calls, "expert_mlps": calls, "route": alone, "expert_mlp": alone}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2D_IMPL", "expert_mlp:reference")
        assert torch.equal(called_with(compiled(case.model), case), grouped)


def test_inductor_compiles_the_calls(graphs) -> None:
    model, x = layer(), batches()[0]
    converted(model, tau=0.5)
    torch.testing.assert_close(run(model, x, "inductor"), run(model, x))
    assert counted(graphs[0])["expert_mlps"] == [4]


@pytest.mark.triton
@pytest.mark.parametrize("rows", [1, 20])
def test_few_tokens_take_fewer_launches_and_give_the_same_bits(rows, monkeypatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs on CPU tensors")
    monkeypatch.setattr(experts_gpu, "choose", lambda spec, load, *_, **__: decode(spec, load))
    model, x = layer(), batches()[0][:1, :rows]
    converted(model, tau=0.5)
    results, counts = [], []
    monkeypatch.setenv("D2D_IMPL", ",".join(f"{name}:interpreter" for name in OPS))
    for group in (False, True):
        if group:  # although ops for one site are asked for
            monkeypatch.setattr(lowering, "GROUPED", ())
        with torch.no_grad():
            fast = compiled(model)
            results.append(fast(x))
            with noting() as noted:
                fast(x)
        counts.append(Counter(item.name for item in noted))
    assert torch.equal(*results)
    up = "decode_up_one" if rows == 1 else "decode_up"
    kernels = ("hidden_few", "route_few", up, "decode_down")
    assert counts == [dict.fromkeys(kernels, 5), dict.fromkeys(kernels, 2)]


def decode(spec: Any, load: Any) -> Any:
    return of_strategy("decode", spec, load, H200)


def test_no_group_while_gradients_are_recorded_or_a_single_op_is_asked_for(
    graphs, monkeypatch
) -> None:
    model, x = layer(), batches()[0]
    converted(model)
    compiled(model, trainable=True)(x)
    monkeypatch.setenv("D2D_IMPL", "expert_mlp:reference")
    run(model, x)
    monkeypatch.setenv("D2D_IMPL", "expert_mlps:reference")
    run(model, x)
    alone = {"routes": [], "expert_mlps": [], "route": 5, "expert_mlp": 5}
    assert [counted(gm) for gm in graphs] == [alone] * 3


def test_sites_with_another_rule_exact_ones_and_those_left_dense_are_in_no_group(graphs) -> None:
    model, x = layer(), batches()[0]
    converted(model, exclude=("v_proj",))
    run(model, x)
    assert counted(graphs[-1])["expert_mlps"] == [3]
    d2d.set_rule(model, "top_k", 2)
    run(model, x)
    assert counted(graphs[-1])["expert_mlps"] == []
    assert len(targets_of(graphs[-1], gate.overload)) == 4
    d2d.set_rule(model, "max", 0.1)
    with testing.oracle(model):
        run(model, x)
    assert counted(graphs[-1])["expert_mlps"] == []


class Blocks(nn.Module):
    """Feed-forward blocks that read one x, each with an activation of its own."""

    def __init__(self, activations: list[Any], change: int | None = None, out: int = 16) -> None:
        super().__init__()
        self.activations, self.change = activations, change
        widths = [out] * len(activations)
        self.ups = nn.ModuleList(nn.Linear(16, 32) for _ in widths)
        self.downs = nn.ModuleList(nn.Linear(32, width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        x, total = x * 2, torch.zeros(())
        for i, activation in enumerate(self.activations):
            if i == self.change:
                x.add_(1)
            total = total + self.downs[i](activation(self.ups[i](x)))
        return total


def equals_dense(model: nn.Module, **given: Any) -> Tensor:
    """Convert and compile a model whose result at tau 0 has to be the dense one's."""
    x = batches()[0]
    with torch.no_grad():
        dense, exact = model(x), Blocks.forward(model, x)
    converted(model, **given)
    found = run(model, x)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)
    assert torch.equal(dense, exact)
    return found


def test_blocks_of_other_activations_are_routed_together_and_run_apart(graphs) -> None:
    equals_dense(Blocks([F.relu, F.gelu, F.relu]))
    assert counted(graphs[0]) == {"routes": [3], "expert_mlps": [2], "route": 0, "expert_mlp": 1}


def test_a_change_of_x_in_place_ends_a_group(graphs) -> None:
    equals_dense(Blocks([F.relu] * 4, change=2))
    assert counted(graphs[0]) == {
        "routes": [2, 2],
        "expert_mlps": [2, 2],
        "route": 0,
        "expert_mlp": 0,
    }


def test_active_dropout_keeps_a_block_out_of_a_call_of_experts(graphs) -> None:
    def dropped(u: Tensor) -> Tensor:
        return F.dropout(F.relu(u), 1e-9, training=True)

    equals_dense(Blocks([dropped, dropped, F.relu, F.relu]))
    assert counted(graphs[0])["expert_mlps"] == [2]
    assert counted(graphs[0])["routes"] == [4]


def test_many_sites_go_in_parts_and_the_last_one_reads_the_first_ones_layer(graphs) -> None:
    model = Blocks([F.relu] * 5)
    equals_dense(model)
    first = states(model)
    assert counted(graphs[0]) == {"routes": [4], "expert_mlps": [4], "route": 1, "expert_mlp": 1}
    for state in first[1:]:  # as sites that were fitted together
        state.experts = replace(state.experts, router1=first[0].experts.router1)
    run(model, batches()[0])
    calls = targets_of(graphs[-1], routes.overload)
    assert [call.args[4] for call in calls] == [[0, 0, 0, 0], [0]]
    assert calls[0].args[1] == calls[1].args[1]
    assert counted(graphs[-1])["expert_mlp"] == 1


def test_in_parts() -> None:
    assert in_parts([0, 0, 2, 0, 0, 2, 0], 2) == (0, 0, 2, 3, 3, 2, 6)
    assert in_parts([0, 0, 0], share_routing.MOST) == (0, 0, 0)


def called(gm: GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "get_attr" and "body" in node.target]


def test_a_group_inside_of_a_checkpoint_and_under_autocast(graphs) -> None:
    class Inside(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model, x = Inside([F.relu] * 2), batches()[0]
    equals_dense(model)
    (body,) = (graphs[0].get_submodule(node.target) for node in called(graphs[0]))
    assert counted(body)["expert_mlps"] == [2] and counted(graphs[0])["expert_mlps"] == []
    plain = Blocks([F.relu] * 2)
    converted(plain)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(plain, x)
        with torch.no_grad():
            dense = plain(x)
    torch.testing.assert_close(found, dense, rtol=0.05, atol=0.05)
    (call,) = targets_of(graphs[-1], expert_mlps.overload)
    assert call.args[0].target == "to" and call.args[2][0].target == "to"


def test_another_instance_of_the_model_runs_by_the_same_graph(graphs) -> None:
    """Its own weights, routers and taus in the group's call."""

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    one, other, x = Blocks([F.relu] * 3), Blocks([F.relu] * 3), batches()[0]
    converted(one)
    converted(other)
    d2d.set_tau(other, 0.6)
    torch._dynamo.reset()
    fast = torch.compile(call, backend="d2dmoe", options={"inner": "eager"})
    with torch.no_grad():
        fast(one, x)
        found = fast(other, x)
    assert len(graphs) == 1
    assert torch.equal(found, run(other, x))


def test_verify_refuses_lists_of_other_calls_and_sites_twice() -> None:
    model, x = layer(), batches()[0]
    converted(model)
    torch._dynamo.reset()
    made: list[GraphModule] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewriting, "verify", lambda gm, count: made.append(gm) or verify(gm, count))
        run(model, x)
    (gm,) = made
    (call,), (single,) = (targets_of(gm, op.overload) for op in (expert_mlps, expert_mlp))
    lists, own = call.args[1], single.args[1:4]
    for wrong, message in (
        ([*lists[:3], *lists[:3], *lists[6:]], "one site twice"),
        ([*lists[:3], lists[4], lists[3], *lists[5:]], "different dispatches"),
        ([*lists[:3], *lists[4:7], *lists[6:]], "different dispatches"),
        (lists[:9], "4 expert_mlp and 0"),
    ):
        call.update_arg(1, wrong)
        with pytest.raises(VerifyError, match=message):
            verify(gm, 5)
    call.update_arg(1, lists)
    verify(gm, 5)
    single.args = (single.args[0], *lists[3:6], *single.args[4:])
    verify(gm, 5)  # one site of a call for several may run by itself
    other = single.graph.node_copy(call)
    single.append(other)
    other.update_arg(1, [*lists[:3], *own])
    with pytest.raises(VerifyError, match="other calls"):
        verify(gm, 7)
