"""d2d.rewrite on the graphs of Dynamo, torch.export and symbolic_trace; explain."""

import copy

import pytest
import torch
from torch import nn

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.errors import ConversionMismatchError, NoConversionError
from d2dcompile.kernels.expert_mlp import expert_mlp

QUICK = d2d.Config(router_epochs=1, expert_size=8)


class Untouched:
    """A stack, a dense copy of it, and its conversion detached again."""

    def __init__(self) -> None:
        self.model = testing.Stack()
        self.dense = copy.deepcopy(self.model)
        self.conversion = d2d.convert(self.model, [torch.randn(64, 16)], QUICK, progress=False)
        d2d.detach(self.model)
        self.x = torch.randn(8, 16)


def graph_of(model: nn.Module, x: torch.Tensor, how: str):
    """(graph module, its inputs, example inputs for rewrite)."""
    if how == "symbolic_trace":
        return torch.fx.symbolic_trace(model), (x,), None
    if how == "export":
        dynamic = {0: torch.export.Dim("rows", min=2)}
        program = torch.export.export(model, (x,), dynamic_shapes=(dynamic,), strict=False)
        return program.module(), (x,), None
    captured = testing.capture(model, x)
    inputs = [captured.tensors.get(node, x) for node in captured.placeholders()]
    return captured.gm, inputs, inputs


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("how", ["symbolic_trace", "export", "dynamo"])
def test_rewritten_graphs_equal_dense_and_follow_tau(how: str, attached: bool) -> None:
    case = Untouched()
    if attached:
        case.conversion.attach(case.model)
    gm, inputs, examples = graph_of(case.model, case.x, how)
    before = str(gm.graph)
    with torch.no_grad():
        rewritten = d2d.rewrite(gm, case.conversion, examples)
        assert str(gm.graph) == before
        targets = [node.target for node in rewritten.graph.nodes]
        assert targets.count(expert_mlp.overload) == 2
        first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
        exact = first(rewritten(*inputs))
        assert torch.allclose(exact, case.dense(case.x), atol=1e-5)
        d2d.set_tau(case.model, 0.9)
        assert not torch.allclose(first(rewritten(*inputs)), exact, atol=1e-5)


def test_symbolic_trace_of_a_sequential_and_leaf_modules() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16)).eval()
    dense = copy.deepcopy(model)
    conversion = d2d.convert(model, [torch.randn(64, 16)], QUICK, progress=False)
    rewritten = d2d.rewrite(torch.fx.symbolic_trace(model), conversion)
    x = torch.randn(4, 3, 16)
    assert torch.allclose(rewritten(x), dense(x), atol=1e-5)
    assert set(conversion.experts) == {"0"} and conversion.experts["0"].site.kind == "ffn"


def test_rewritten_graph_compiles_and_survives_no_edit_of_state_dict() -> None:
    case = Untouched()
    rewritten = d2d.rewrite(torch.fx.symbolic_trace(case.model), case.conversion)
    assert set(rewritten.state_dict()) == set(case.model.state_dict())
    fast = torch.compile(rewritten, fullgraph=True, backend="aot_eager")
    assert torch.allclose(fast(case.x), case.dense(case.x), atol=1e-5)


def test_rewrite_refuses_foreign_graphs() -> None:
    case = Untouched()
    with pytest.raises(NoConversionError, match="has 0 convertible sites"):
        d2d.rewrite(torch.fx.symbolic_trace(nn.Linear(4, 4)), case.conversion)
    with pytest.raises(ConversionMismatchError, match="made for other weights"):
        d2d.rewrite(torch.fx.symbolic_trace(testing.Stack(seed=1)), case.conversion)
    with pytest.raises(NoConversionError, match="none of which belongs"):
        d2d.rewrite(torch.fx.symbolic_trace(testing.Stack(h=32)), case.conversion)


def test_explain_reports_sites_misses_and_shares_and_changes_nothing() -> None:
    case = testing.tiny("bert")
    before = copy.deepcopy(case.model.state_dict())
    case.model.train()
    state = torch.get_rng_state()
    report = d2d.explain(case.model, **case.inputs)
    assert case.model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())
    blocks = [site for site in report.sites if site.convertible]
    first = blocks[0]
    assert (first.name, first.kind, first.activation) == ("encoder.layer.0", "ffn", "gelu(up)")
    assert first.params == {
        "up": "encoder.layer.0.intermediate.dense.weight",
        "down": "encoder.layer.0.output.dense.weight",
    }
    assert (first.d_model, first.d_hidden, first.calls) == (32, 64, 1)
    assert report.graphs == 1 and not report.breaks and not report.recompiles and len(blocks) == 2
    projections = [site for site in report.sites if not site.convertible]
    assert sorted(str(site.role) for site in projections) == sorted(2 * "qkvo")
    assert [miss.where.split(",")[0] for miss in report.misses] == ["pooler.dense"]
    assert report.misses[0].weight == "pooler.dense.weight" and report.misses[0].reason
    # By hand for 2 x 17 tokens: 2 layers of 2 * 32 * 64 in the FFN and 4 * 32 * 32 in projections,
    # 2 * 17 * 32 per token in attention, and the pooler's 32 * 32 for each of two sequences.
    tokens = 2 * 17
    ffn = tokens * 2 * 32 * 64
    total = 2 * (ffn + tokens * (4 * 32 * 32 + 2 * 17 * 32)) + 2 * 32 * 32
    assert report.macs == total
    assert first.share == pytest.approx(ffn / total)
    assert projections[0].share == pytest.approx(tokens * 32 * 32 / total)
    assert report.misses[0].share == pytest.approx(2 * 32 * 32 / total)
    lines = str(report).splitlines()
    for site in report.sites:
        assert sum(line.startswith(f"{site.name} ") for line in lines) == 1
    assert "8 projections hold" in str(report) and "pooler.dense" in lines[-1]


class Broken(nn.Module):
    """A block that Dynamo breaks in two, one that it does not, a linear that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.idle = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 8)
        self.whole = testing.FFN(8, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(x))
        torch._dynamo.graph_break()
        return self.whole(x + self.down(hidden))


def test_explain_gives_the_reason_of_graph_breaks_and_finds_what_did_not_run() -> None:
    report = d2d.explain(Broken().eval(), torch.randn(4, 8))
    assert report.graphs == 2 and [site.name for site in report.sites] == ["whole"]
    (reason,) = report.breaks
    assert "graph_break" in reason and reason in str(report)
    reasons = {miss.weight: miss.reason for miss in report.misses}
    assert reasons["up.weight"] == f"the graph breaks between it and what reads it: {reason}"
    assert reasons["down.weight"] == f"the graph breaks between it and what feeds it: {reason}"
    assert reasons["idle.weight"].startswith("in no captured graph")


def test_explain_counts_recompilations() -> None:
    model = testing.Stack().eval()
    assert d2d.explain(model, torch.randn(4, 16)).recompiles == 0
    assert d2d.explain(model, torch.randn(2, 4, 16)).recompiles == 1


def test_explain_runs_flex_attention() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (m(x).view(2, 16, 4, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
            return x + self.o(flex_attention(q, k, v).transpose(1, 2).reshape(2, 16, 32))

    report = d2d.explain(Flex().eval(), torch.randn(2, 16, 32))
    assert sorted(str(site.role) for site in report.sites) == sorted("qkvo")


def test_dump_writes_captured_and_rewritten_graphs(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("D2D_DUMP", str(tmp_path / "graphs"))
    case = Untouched()
    case.conversion.attach(case.model)
    torch.compile(case.model, backend="d2dmoe", options={"inner": "eager"})(case.x)
    names = sorted(path.name for path in (tmp_path / "graphs").iterdir())
    assert names == ["000_capture.py", "001_rewritten.py"]
    assert "d2d.expert_mlp_v3" in (tmp_path / "graphs" / names[1]).read_text()
