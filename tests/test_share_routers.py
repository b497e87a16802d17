"""Q, K and V blocks that read the same x share the first layer of their routers, from fit to file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2dcompile as d2d
from d2dcompile import backend, recognising, rewriting, testing
from d2dcompile.attachment import states
from d2dcompile.capture import from_graph_module
from d2dcompile.errors import ArtifactError, DenseFallbackWarning, RuleError
from d2dcompile.kernels import build
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.dynamic_mlp import dynamic_mlp
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.gate import gate
from d2dcompile.kernels.router_hidden import cpu as router_hidden_cpu
from d2dcompile.kernels.router_hidden import router_hidden
from d2dcompile.passes.share_routing import Shares
from d2dcompile.router import fit_router, fit_routers

D, R, SIZE, TOKENS = 16, 8, 2, 48
QKV = ("q_proj", "k_proj", "v_proj")


class Layer(nn.Module):
    """Self-attention with four projections, and a feed-forward block that reads the same x."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        for name in (*QKV, "o_proj"):
            setattr(self, name, nn.Linear(d, d))
        self.up, self.down = nn.Linear(d, 32), nn.Linear(32, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (getattr(self, name)(x).unflatten(-1, (2, -1)).transpose(1, 2) for name in QKV)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.o_proj(mixed) + self.down(F.relu(self.up(x)))


def batches(d: int = D) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, TOKENS // 2, d, generator=generator) for _ in range(4)]


def layer(d: int = D) -> nn.Module:
    """A layer whose projections are blocks."""
    torch.manual_seed(0)
    model = Layer(d).eval()
    d2d.replace_projections(model, batches(d)[:2], epochs=2, progress=False)
    return model


def converted(model: nn.Module, **given: Any) -> d2d.Conversion:
    given = {"share_routers": True, **given}
    config = d2d.Config(expert_size=SIZE, router_width=R, router_epochs=3, **given)
    return d2d.convert(model, batches(), config, progress=False)


@pytest.fixture
def model() -> nn.Module:
    return layer()


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="d2dmoe", options={"inner": "eager", **options})


def exported(model: nn.Module) -> torch.fx.GraphModule:
    return torch.export.export(model, (batches()[0],)).module()


def targets_of(gm: torch.fx.GraphModule, target: Any) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.target == target]


def routers_of(gm: torch.fx.GraphModule) -> list[tuple[torch.fx.Node, torch.fx.Node]]:
    """Of each mixture of experts the node of relu(x router1^T), and the relu's first argument."""
    found = []
    for block in targets_of(gm, expert_mlp.overload):
        lists = block.args[1].args[0]
        assert lists.target is dispatch.overload and lists.args[0].target is gate.overload
        hidden = lists.args[0].args[0].args[0].args[0]
        assert hidden.target is F.relu
        found.append((hidden, hidden.args[0]))
    return found


def test_one_first_layer_for_q_k_and_v_and_none_for_what_reads_another_x_or_is_no_projection(
    model: nn.Module,
) -> None:
    experts = converted(model).experts
    assert len(experts) == 5
    first = experts["q_proj"].router1
    sharing = {name for name, one in experts.items() if one.router1 is first}
    assert sharing == set(QKV)
    assert len({id(one.router1) for one in experts.values()}) == 3
    d2d.detach(model)
    alone = converted(model, share_routers=False).experts
    assert len({id(one.router1) for one in alone.values()}) == 5
    for name in ("o_proj", "down"):  # whose fit is none of the group's business
        same = [n for n in alone if name in n or (name == "down" and n not in (*QKV, "o_proj"))]
        assert all(torch.equal(alone[n].router2, experts[n].router2) for n in same) and same
    d2d.detach(model)
    centroid = converted(model, router="centroid").experts
    assert len({id(one.router1) for one in centroid.values()}) == 5


def test_a_graph_computes_the_shared_layer_once_and_chooses_what_sites_alone_would(
    model: nn.Module,
) -> None:
    conversion = converted(model)
    x = batches()[0]
    with torch.no_grad():
        dense = model(x)
        exact = copy.deepcopy(model).double()(x.double())
        gm = d2d.rewrite(exported(model), conversion)
        hidden = [node for node, _ in routers_of(gm)]
        assert len(hidden) == 5 and len(set(hidden)) == 3
        assert testing.error_ratio(gm(x), dense, exact) <= 2
        captured = from_graph_module(exported(model), {}, None)
        matches = rewriting.match(captured)[0]
        found = [(m, s) for m in matches if (s := recognising.state_of(m, None)) is not None]
        apart = rewriting.rewrite_captured(captured, [m for m, _ in found]).gm
        assert len({node for node, _ in routers_of(apart)}) == 5
        for tau in (0.0, 0.4, 0.9):
            d2d.set_tau(model, tau)
            operands = [operand for _, state in found for operand in state.operands()]
            assert torch.equal(masks(gm, x), masks(apart, x, *operands))
        assert 0 < masks(gm, x).float().mean() < 1


def masks(gm: torch.fx.GraphModule, *args: Tensor) -> Tensor:
    """All masks of a graph, flattened, in the order of its blocks."""
    seen: list[Tensor] = []

    class Watching(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            result = super().call_function(target, args, kwargs)
            if target is gate.overload:
                seen.append(result.flatten())
            return result

    Watching(gm).run(*args)
    return torch.cat(seen)


def test_compiled_sites_share_and_equal_dense_at_tau_zero_in_inference_and_training(
    model: nn.Module,
) -> None:
    x = batches()[0]
    with torch.no_grad():
        dense, exact = model(x), copy.deepcopy(model).double()(x.double())
    converted(model)
    graphs: list[torch.fx.GraphModule] = []
    real = backend._inner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d2d.backend, "_inner", lambda gm, *rest: graphs.append(gm) or real(gm, *rest))
        with torch.no_grad():
            assert testing.error_ratio(compiled(model)(x), dense, exact) <= 2
        fast = compiled(model, trainable=True)
        assert testing.error_ratio(fast(x).detach(), dense, exact) <= 2
    assert [len({node for node, _ in routers_of(gm)}) for gm in graphs] == [3, 3]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_one_kernel_a_site_takes_the_shared_layer_with_the_bits_of_its_own(inner: str) -> None:
    """Of a width that has kernels; calls of many rows and of one."""
    if build.compiler() is not None:
        pytest.skip("needs a C++ compiler")
    wide, x = layer(512), batches(512)[0]
    config = d2d.Config(share_routers=True, expert_size=32, router_width=32, router_epochs=1)
    d2d.convert(wide, batches(512), config, progress=False)
    graphs: list[torch.fx.GraphModule] = []
    real = backend._inner
    alone = Shares(tuple(range(5)), (32,) * 5)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(backend, "_inner", lambda gm, *rest: graphs.append(gm) or real(gm, *rest))
        dense, exact = wide(x), copy.deepcopy(wide).double()(x.double())
        fast = compiled(wide, inner=inner)
        assert testing.error_ratio(fast(x), dense, exact) <= 2
        d2d.set_tau(wide, 0.6)
        shared, one = fast(x), fast(x[:1, :1])
        assert not torch.allclose(shared, dense, atol=1e-3)
        patch.setattr(backend, "shared", lambda *_: alone)
        apart = compiled(wide, inner=inner)
        assert torch.equal(shared, apart(x)) and torch.equal(one, apart(x[:1, :1]))
    hidden = [len(targets_of(gm, router_hidden.overload)) for gm in graphs]
    assert set(hidden[: len(hidden) // 2]) == {1} and set(hidden[len(hidden) // 2 :]) == {0}
    blocks = targets_of(graphs[0], dynamic_mlp.overload)
    assert sorted(len(block.args) for block in blocks) == [3, 4, 4, 4]


def test_the_shared_layer_is_left_out_where_no_site_reads_it() -> None:
    if build.compiler() is not None:
        pytest.skip("needs a C++ compiler")
    wide, x = layer(512), batches(512)[0].flatten(0, 1)
    config = d2d.Config(share_routers=True, expert_size=32, router_width=32, router_epochs=1)
    d2d.convert(wide, batches(512), config, progress=False)
    some = [state for state in states(wide) if state.site.name in QKV]
    made = some[0].layer(some, True, False)
    assert some[0].layer(some, True, False) is made

    def ran() -> Tensor:
        out = torch.zeros(len(x), 32)
        return router_hidden_cpu.run_out(x, made.record, 32, out=out)

    assert ran().isnan().all()
    d2d.set_tau(wide, {"v_proj": 0.1})
    torch.testing.assert_close(ran(), F.relu(x @ some[0].routers[0].T), rtol=1e-4, atol=1e-5)


def test_a_folder_keeps_what_is_shared_once_and_refuses_sharing_with_no_earlier_site(
    model: nn.Module, tmp_path: Path
) -> None:
    from safetensors import safe_open

    conversion = converted(model)
    conversion.save(tmp_path)
    with safe_open(tmp_path / "d2dmoe.safetensors", "pt") as file:
        assert sum(name.endswith("router1") for name in file.keys()) == 3  # noqa: SIM118
    again = d2d.load(tmp_path)
    assert again.experts["k_proj"].router1 is again.experts["q_proj"].router1
    assert again.experts["o_proj"].router1 is not again.experts["q_proj"].router1
    for name, one in conversion.experts.items():
        assert torch.equal(again.experts[name].router1, one.router1)
    again.save(tmp_path / "again")
    names = ("d2dmoe.json", "d2dmoe.safetensors")
    assert all((tmp_path / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)
    for wrong in ("nowhere", "k_proj", "v_proj", 3):
        damage(tmp_path, wrong)
        with pytest.raises(ArtifactError, match="earlier site"):
            d2d.load(tmp_path)


def damage(folder: Path, owner: Any) -> None:
    """Let v_proj name another owner of its first layer, the digest being right."""
    import json

    from d2dcompile.artifact import digest_of

    path = folder / "d2dmoe.json"
    document = json.loads(path.read_text())
    (site,) = (s for s in document["sites"] if s["site"]["name"] == "v_proj")
    assert site["router1"] != owner
    site["router1"] = owner
    document["sha256"] = digest_of(document)
    path.write_text(json.dumps(document))


def test_a_folder_of_before_there_was_sharing_loads_with_nothing_shared(
    model: nn.Module, tmp_path: Path
) -> None:
    import json

    from d2dcompile.artifact import digest_of

    converted(model, share_routers=False).save(tmp_path)
    path = tmp_path / "d2dmoe.json"
    document = json.loads(path.read_text())
    assert not any("router1" in site for site in document["sites"])
    del document["config"]["share_routers"]
    document["sha256"] = digest_of(document)
    path.write_text(json.dumps(document))
    again = d2d.load(tmp_path)
    assert again.config.share_routers is False
    assert len({id(one.router1) for one in again.experts.values()}) == 5


def test_measure_counts_the_shared_layer_for_the_first_site_only_and_sums_are_exact(
    model: nn.Module,
) -> None:
    conversion = converted(model)
    d2d.set_tau(model, 0.5)
    x = batches()[0]
    stats = d2d.measure(model, [x])
    assert stats.executed < 1
    expected = 0
    for name, site in stats.sites.items():
        one = conversion.experts[name]
        e, h = one.plan.experts, one.site.d_hidden
        layer1 = 0 if name in QKV[1:] else D
        assert site.dense_macs == TOKENS * 2 * D * h
        assert site.macs == site.pairs * 2 * D * one.plan.expert_size + TOKENS * R * (layer1 + e)
        expected += site.macs
    attention = 2 * 2 * 2 * (TOKENS // 2) ** 2 * (D // 2)  # batch, products, heads, T T width
    assert stats.macs == expected + attention
    assert stats.dense_macs == sum(s.dense_macs for s in stats.sites.values()) + attention
    parts = (site.bytes for site in stats.sites.values())
    assert stats.bytes - sum(parts) == 4 * 5 * D + 4 * sum(
        one.site.d_hidden for one in conversion.experts.values()
    )  # the biases of down and of up, read whatever is executed


def call(model: nn.Module, x: Tensor) -> Tensor:
    """Compiled as a function of the model, so that Dynamo serves several models with one graph."""
    return model(x)


@pytest.mark.parametrize("strict", [True, False])
def test_a_graph_of_shared_sites_does_not_serve_sites_that_do_not_share(strict: bool) -> None:
    shared, apart = layer(), layer()
    converted(shared)
    converted(apart, share_routers=False)
    x = batches()[0]
    fast = torch.compile(call, backend="d2dmoe", options={"inner": "eager", "strict": strict})
    with torch.no_grad():
        fast(shared, x)
        if strict:
            with pytest.raises(RuleError, match="'q_proj' and 'k_proj', which do not"):
                fast(apart, x)
        else:
            with pytest.warns(DenseFallbackWarning):
                assert torch.equal(fast(apart, x), apart(x))
    torch._dynamo.reset()
    with torch.no_grad():  # the other way round is right: a layer for each serves those that share
        fast(apart, x)
        torch.testing.assert_close(fast(shared, x), shared(x))


def test_fine_tuning_learns_one_first_layer_and_closes_with_one(model: nn.Module) -> None:
    conversion = converted(model, tau=0.3)
    x, before = batches()[0], conversion.experts["q_proj"].router1.clone()
    tuning = d2d.finetune(model, conversion)
    firsts = {id(first) for first, _ in tuning.routers.values()}
    assert len(firsts) == 3 and len(tuning.parameters()) == 3 + 5
    fast = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        fast(x).square().mean().backward()
        optimizer.step()
    done = tuning.close(batches())
    first = done.experts["q_proj"].router1
    assert not torch.equal(first, before) and first.isfinite().all()
    assert {name for name, one in done.experts.items() if one.router1 is first} == set(QKV)
    assert all(state.routers[0] is done.experts[state.site.name].router1 for state in states(model))
    again = d2d.finetune(model, done).close(batches(), refit=True)
    assert again.experts["k_proj"].router1 is again.experts["q_proj"].router1
    assert again.experts["o_proj"].router1 is not again.experts["q_proj"].router1


def test_sites_fitted_together_weigh_the_same_and_one_site_is_fitted_as_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(900, D, generator=generator)
    code = torch.randn(4, D, generator=generator)
    easy = (x @ code.T).relu() + 0.01
    (one,) = fit_routers([(x, easy)], width=16, epochs=5)
    alone = fit_router(x, easy, width=16, epochs=5)
    assert torch.equal(one.w1, alone.w1) and torch.equal(one.w2, alone.w2)
    # A site of huge norms and one of tiny ones, on fewer tokens: both learn.
    pair = fit_routers([(x, easy * 1e6), (x[:500], easy[:500].flip(1) * 1e-6)], width=32, epochs=20)
    assert pair[0].w1 is pair[1].w1
    assert all(router.stats["recall@0.3"] > 0.9 for router in pair)
