"""What users add: the meaning of composite calls, and rules of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2dcompile as d2d
from d2dcompile import composites
from d2dcompile.passes import MatchFFN, Rule, composite, register, rules, unregister


@torch.library.custom_op("d2d_test::mlp", mutates_args=())
def mlp(x: Tensor, w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1)) * scale, w2)


@mlp.register_fake
def _(x: Tensor, w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    return x.new_empty(*x.shape[:-1], w2.shape[0])


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + mlp(x, self.up.weight, self.down.weight, scale=0.5)


@pytest.fixture
def meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composites, "_MEANINGS", dict(composites._MEANINGS))

    @composite(torch.ops.d2d_test.mlp.default)
    def mean(x: Tensor, w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1)) * scale, w2)


@pytest.mark.usefixtures("meaning")
@pytest.mark.parametrize("how", ["dynamo", "export", "symbolic_trace"])
def test_a_composite_call_is_matched_and_rewritten(
    how: str, trace: Any, convert_by_hand: Any
) -> None:
    model, x = Fused().double(), torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        traced = trace(model, x, how)
        (found,) = traced.matches()
        assert found.site.params == {"up": "up.weight", "down": "down.weight"}
        assert found.site.activation == "gelu(up) * 0.5"
        expected = model(x)
        assert torch.allclose(
            traced.rewritten(convert_by_hand(traced))(), expected, rtol=0, atol=1e-12
        )


@pytest.mark.usefixtures("meaning")
def test_what_a_composite_means_has_shapes(trace: Any) -> None:
    traced = trace(Fused(), torch.randn(3, 5, 8))
    up = next(n for n in traced.captured.gm.graph.nodes if n.target is F.linear)
    assert tuple(up.meta["example_value"].shape) == (3, 5, 32)
    assert "test_extending" in up.meta["stack_trace"]


def test_without_a_meaning_the_call_stays_opaque(trace: Any) -> None:
    assert not trace(Fused(), torch.randn(3, 5, 8)).matches()


@pytest.mark.usefixtures("meaning")
def test_a_meaning_returns_one_tensor(trace: Any) -> None:
    @composite(torch.ops.d2d_test.mlp.default)
    def two(x: Tensor, w1: Tensor, w2: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        return F.linear(x, w1), x

    with pytest.raises(Exception, match=r"'two'.*returned a tuple; expected one tensor"):
        trace(Fused(), torch.randn(3, 5, 8))


def test_only_what_can_be_called_has_a_meaning() -> None:
    with pytest.raises(TypeError, match="got a str; expected the function or operator overload"):
        composite("mylib::mlp")


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 4), nn.Linear(4, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x + 1)))


def test_a_registered_rule_takes_part_until_it_is_removed() -> None:
    model, x = Bottleneck().eval(), torch.randn(64, 32)
    assert not d2d.explain(model, x).sites
    rule: Rule = MatchFFN(accept=("adapter",))
    register(rule)
    try:
        assert rules()[0][-1] is rule
        (site,) = d2d.explain(model, x).sites
        assert site.kind == "ffn"
        assert d2d.convert(model, [x], d2d.Config(router_epochs=1), progress=False).experts
    finally:
        unregister(rule)
    assert not d2d.explain(Bottleneck().eval(), x).sites


class FindEverything:
    """A graph rule that takes every linear that is left for a projection."""

    def find(self, view: Any, taken: Any) -> Any:
        from d2dcompile.passes.match_qkvo import projection

        left = [linear for node, linear in view.linears.items() if node not in taken]
        return [projection(view, "o", (linear,)) for linear in left], {}


def test_a_registered_graph_rule_finds_what_the_others_leave() -> None:
    rule = FindEverything()
    register(rule)
    try:
        assert rules()[1][-1] is rule
        report = d2d.explain(nn.Linear(8, 8), torch.randn(3, 8))
        assert [site.role for site in report.sites] == ["o"] and not report.misses
    finally:
        unregister(rule)


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(TypeError, match="got a str; expected a rule with a `match` or `find`"):
        register("match")
    with pytest.raises(ValueError):
        unregister(MatchFFN(accept=("gate",)))
