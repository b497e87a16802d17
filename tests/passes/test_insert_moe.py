"""The rewrite keeps everything but the dense block: shapes read elsewhere, outputs, arguments, inputs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from d2dcompile import recognising, rewriting
from d2dcompile.capture import from_graph_module, inline_modules, parameter_names
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.route import route
from d2dcompile.passes.verify import verify

D, H = 8, 16


class Conv1D(nn.Module):
    """GPT-2's linear, whose output shape is computed from its input's."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.d_out = d_out
        self.weight = nn.Parameter(torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[:-1] + (self.d_out,)  # noqa: RUF005  (symbolic_trace cannot unpack)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Gpt2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.proj = Conv1D(H, D), Conv1D(D, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))


class ReadsShapes(nn.Module):
    """The hidden value's shape is used for what the block does not compute."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fc, self.proj = nn.Linear(D, 2 * H if kind == "halves" else H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if self.kind == "halves":
            u = h.chunk(2, -1)
            h = F.silu(u[0]) * u[1]
        elif self.kind == "views":
            h = F.gelu(h.flatten(0, 1)).view(h.shape)
        else:
            h = F.gelu(h)
        rows, width = h.size(0) * h.shape[1], h.size(-1)
        return self.proj(h) / (rows * width) + x.new_ones(h.size(0), 1, 1)


def dense_macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


NAMES = ("conv1d", "plain", "halves", "views")
HOWS = ("dynamo", "export", "symbolic_trace")
UNSEEN = ("views", "symbolic_trace")  # without shapes nothing says that flatten keeps the features


@pytest.mark.parametrize(
    ("name", "how"), [c for c in itertools.product(NAMES, HOWS) if c != UNSEEN]
)
def test_no_dense_multiplication_is_left_where_shapes_are_read(
    name: str, how: str, trace, convert_by_hand
) -> None:
    """Run eagerly, as `measure` does: what is alive only for its shape would be multiplied out."""
    model = (Gpt2() if name == "conv1d" else ReadsShapes(name)).double().eval()
    x = torch.randn(3, 7, D, dtype=torch.float64)
    with torch.no_grad():
        traced = trace(model, x, how, dynamic=True)
        assert len(traced.matches()) == 1, traced.reasons()
        expected, dense = model(x), dense_macs(model, x)
        run = traced.rewritten(convert_by_hand(traced, experts=4))
        with FlopCounterMode(display=False) as counter:
            result = run()
    assert torch.allclose(result, expected, rtol=0, atol=1e-12)
    router = 3 * 7 * 8 * (D + 4)
    assert counter.get_total_flops() // 2 == dense + router


def test_a_hidden_value_left_for_its_shape_takes_no_memory(trace, convert_by_hand) -> None:
    model = ReadsShapes("plain").eval()
    traced = trace(model, torch.randn(3, 7, D), "symbolic_trace")
    gm = rewriting.rewrite(traced.gm, convert_by_hand(traced))
    targets = [node.target for node in gm.graph.nodes]
    assert "expand" in targets and F.gelu not in targets and "new_empty" in targets
    assert targets.count(F.linear) == 2, "only the router's two matrices are left"


class Outputs(nn.Module):
    """Nested outputs, keyword arguments with defaults, a non-tensor argument and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(
        self, x: Tensor, scale: float = 2.0, *, shift: Any = None, unused: Any = None
    ) -> Any:
        y = self.down(F.gelu(self.up(x)))
        if shift is not None:
            y = y + shift["by"]
        return {"y": y * scale, "pair": (x, [y.sum(-1)]), "none": None}


def test_rewritten_export_takes_and_returns_nested_containers(convert_by_hand, trace) -> None:
    model, x = Outputs().double().eval(), torch.randn(4, D, dtype=torch.float64)
    shift = {"by": torch.randn(D, dtype=torch.float64)}
    with torch.no_grad():
        gm = torch.export.export(model, (x, 3.0), {"shift": shift}).module()
        captured = from_graph_module(gm, parameter_names(model))
        copied, _ = captured.copy()
        expected = model(x, 3.0, shift=shift)
        same(copied(x, 3.0, shift=shift), expected)
        conversion = convert_by_hand(_traced(captured))
        same(rewriting.rewrite(gm, conversion)(x, 3.0, shift=shift), expected)


def test_rewritten_symbolic_graph_keeps_keywords_and_outputs(convert_by_hand) -> None:
    model, x = Outputs().double().eval(), torch.randn(4, D, dtype=torch.float64)
    with torch.no_grad():
        gm = torch.fx.symbolic_trace(model, concrete_args={"shift": None, "unused": None})
        expected = model(x, 0.5)
        same(from_graph_module(gm, {}).copy()[0](x, 0.5), expected)
        conversion = convert_by_hand(_traced(from_graph_module(gm, parameter_names(model))))
        same(rewriting.rewrite(gm, conversion)(x, 0.5), expected)


def _traced(captured: Any) -> Any:
    class Found:
        def __init__(self) -> None:
            self.captured = captured

        def matches(self) -> Any:
            return rewriting.match(captured)[0]

    return Found()


def same(result: Any, expected: Any) -> None:
    assert list(result) == list(expected) and result["none"] is None
    torch.testing.assert_close(result["y"], expected["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(result["pair"][0], expected["pair"][0])
    torch.testing.assert_close(result["pair"][1][0], expected["pair"][1][0], rtol=0, atol=1e-12)


def test_a_copy_of_a_dynamo_graph_is_the_same_graph_with_its_sources(trace) -> None:
    captured = trace(Outputs(), torch.randn(4, D)).captured
    copied, where = captured.copy()
    assert copied.code == captured.gm.code
    assert copied.graph is not captured.gm.graph
    old, new = list(captured.gm.graph.nodes), list(copied.graph.nodes)
    for before, after in zip(old, new, strict=True):
        assert before.op == "output" or where[before] is after
        assert before.meta.keys() == after.meta.keys()
        assert getattr(before, "_dynamo_source", None) is getattr(after, "_dynamo_source", None)
    new[-2].meta["mark"] = 1
    assert "mark" not in old[-2].meta, "metadata of the copy is shared with the original"


def test_a_graph_without_matches_is_unchanged(trace) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3))
    captured = trace(model, torch.randn(4, D)).captured
    done = rewriting.rewrite_captured(captured, ())
    assert done.gm.code == captured.gm.code and done.inserted == ()


def test_matching_and_rewriting_leave_the_captured_graph_as_it_was(trace, convert_by_hand) -> None:
    traced = trace(Gpt2(), torch.randn(2, 5, D), dynamic=True)
    before = traced.captured.gm.code
    traced.rewritten(convert_by_hand(traced))
    assert traced.captured.gm.code == before


def test_a_rewritten_graph_has_nothing_more_to_match(trace, convert_by_hand) -> None:
    for how in ("export", "symbolic_trace"):
        model = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))
        traced = trace(model, torch.randn(4, D), how)
        gm = rewriting.rewrite(traced.gm, convert_by_hand(traced))
        matches, _ = rewriting.match(from_graph_module(gm, parameter_names(model)))
        assert matches == []


def test_a_gate_whose_input_has_fewer_dimensions_than_up_is_no_block(trace) -> None:
    """gate(x[s, d]) * up(x[1, s, d]) has the shape of up, not of the gate's input."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x) * F.silu(self.gate(x.view(5, D))))

    for how in ("dynamo", "export", "symbolic_trace"):
        traced = trace(Mixed(), torch.randn(1, 5, D), how)
        assert traced.matches() == []
        assert "the leading dimensions change between the matrices" in traced.reasons()


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_in_place_is_found_where_nobody_sees_the_change(
    inplace, trace, convert_by_hand
):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            x = F.layer_norm(x, (D,))
            y = self.down(F.silu(self.up(x), inplace=inplace))
            y += x
            return y.mul_(2)

    model, x = Net().double(), torch.randn(2, 5, D, dtype=torch.float64)
    with torch.no_grad():
        traced = trace(model, x)
        expected = model(x)
        assert torch.allclose(traced.rewritten(convert_by_hand(traced))(), expected, atol=1e-12)


def test_inlining_runs_no_module_that_counts() -> None:
    """Symbolic tracing of a BatchNorm in training mode would add to num_batches_tracked."""
    model = nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.Linear(H, D)).train()
    gm = inline_modules(torch.fx.symbolic_trace(model))
    assert int(model[1].num_batches_tracked) == 0
    assert [node.target for node in gm.graph.nodes if node.op == "call_module"] == ["1"]


def test_inlining_leaves_modules_that_cannot_be_traced() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    class Starred(nn.Module):
        def forward(self, *xs: Tensor) -> Tensor:
            return xs[0] + xs[1]

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return not isinstance(m, Outer)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Branching(), Starred(), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(input=self.b(self.a(x), x))

    outer = Outer()
    gm = torch.fx.GraphModule(outer, Leaves().trace(outer))
    inlined = inline_modules(gm)
    assert [node.target for node in inlined.graph.nodes if node.op == "call_module"] == ["a", "b"]
    x = torch.randn(3, D)
    assert torch.equal(inlined(x), outer(x))


def test_two_calls_make_two_mixtures_with_shared_operands(trace, convert_by_hand) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + self.down(F.gelu(self.up(x)))
            return x

    traced = trace(Twice(), torch.randn(4, D), "export")
    gm = rewriting.rewrite(traced.gm, convert_by_hand(traced))
    blocks = [node for node in gm.graph.nodes if node.target is expert_mlp.overload]
    assert blocks[0].args[4].target == blocks[1].args[4].target == "d2d_up_w_up"


def test_the_routed_form_computes_what_separate_ops_compute(trace, convert_by_hand) -> None:
    """One op from tokens to lists in place of six nodes, the same bits; on a GPU that is not here too."""
    traced = trace(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)), torch.randn(2, 5, D))
    matches = traced.matches()
    state = recognising.state_of(matches[0], convert_by_hand(traced))
    forms = {matches[0].site.name: "routed"}
    plain = rewriting.rewrite_captured(traced.captured, matches).gm
    routed = rewriting.rewrite_captured(traced.captured, matches, forms).gm
    verify(routed, 1)
    assert [n for n in routed.graph.nodes if n.target is route.overload]
    assert not [n for n in routed.graph.nodes if n.target is dispatch.overload]
    arguments = [*traced.args, *state.operands()]
    with torch.no_grad():
        expected = plain(*arguments)[0]
        assert torch.equal(routed(*arguments)[0], expected)
    with FakeTensorMode(), torch.no_grad():
        moved = [torch.empty(a.shape, dtype=a.dtype, device="cuda") for a in arguments]
        y = routed(*moved)[0]
    assert y.device.type == "cuda" and y.shape == expected.shape
