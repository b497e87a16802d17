"""replace_projections: blocks in the place of linear layers around attention, converted like any other."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.distilling import ProjectionMLP, Recipe, distil, hidden_width
from d2dcompile.errors import ArtifactError, CalibrationError, ProjectionError
from d2dcompile.testing import Tiny

QUICK: dict[str, Any] = {"epochs": 2, "progress": False}


def _gqa(t: Any) -> Tiny:
    config = t.LlamaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=64,
    )  # fmt: skip
    return Tiny(t.LlamaForCausalLM(config), testing.tiny("llama").inputs, 2)


def _bart(t: Any) -> Tiny:
    config = t.BartConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=1,
    )  # fmt: skip
    inputs = testing.tiny("t5").inputs
    return Tiny(t.BartModel(config), inputs, 2)


FORMS: dict[str, tuple[Callable[[Any], Tiny] | None, list[str], set[tuple[int, int, int]]]] = {
    # roles of the blocks, and their (D, H, d_out)
    "bert": (None, [*"qkvo"] * 2, {(32, 16, 32)}),
    "vit": (None, [*"qkvo"] * 2, {(32, 16, 32)}),
    "gpt2": (None, ["qkv", "o"] * 2, {(32, 24, 96), (32, 16, 32)}),
    "phi3": (None, ["qkv", "o"] * 2, {(32, 24, 96), (32, 16, 32)}),
    "t5": (None, [*"qkvo"] * 6, {(32, 16, 32)}),
    "gqa": (_gqa, [*"qkvo"] * 2, {(64, 32, 64), (64, 13, 16)}),
    "bart": (_bart, [*"qkvo"] * 3, {(32, 16, 32)}),
}


def case_of(form: str) -> Tiny:
    make = FORMS[form][0]
    if make is None:
        return testing.tiny(form)
    import transformers

    torch.manual_seed(0)
    made = make(transformers)
    made.model.eval()
    return made


def run(model: nn.Module, case: Tiny) -> Tensor:
    with torch.no_grad():
        return testing.output(model(**case.inputs))


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_every_form_are_matched_converted_and_equal_at_tau_zero(form: str) -> None:
    case, (_, roles, sizes) = case_of(form), FORMS[form]
    before, original = run(case.model, case), copy.deepcopy(case.model.state_dict())
    done = d2d.replace_projections(case.model, [case.inputs] * 2, **QUICK)
    assert sorted(one.role for one in done.sites) == sorted(roles) and not done.left
    sites = [s for s in d2d.explain(case.model, **case.inputs).sites if s.role]
    assert sorted(s.role for s in sites) == sorted(roles)
    assert {s.kind for s in sites} == {"ffn"}
    assert {(s.d_model, s.d_hidden, s.d_out) for s in sites} == sizes
    for one in done.sites:
        assert one.macs == pytest.approx(one.dense_macs, rel=0.02)
    dense = run(case.model, case)
    exact = run(copy.deepcopy(case.model).double(), Tiny(case.model, _double(case.inputs), 0))
    config = d2d.Config(expert_size=4, router_width=8, router_epochs=1)
    conversion = d2d.convert(case.model, [case.inputs] * 2, config, progress=False)
    assert {one.name for one in done.sites} <= set(conversion.experts)
    for inner in ("eager", "inductor") if form == "gqa" else ("eager",):
        torch._dynamo.reset()
        fast = torch.compile(case.model, backend="d2dmoe", options={"inner": inner})
        assert testing.error_ratio(run(fast, case), dense, exact) <= 2
    stats = d2d.measure(case.model, [case.inputs])
    assert stats.executed == 1.0
    for one in done.sites:
        figures, rows = stats.sites[one.name], stats.sites[one.name].possible
        experts = conversion.experts[one.name].plan.experts
        assert figures.dense_macs == rows // experts * one.macs
    d2d.set_tau(case.model, 1.0)
    assert d2d.measure(case.model, [case.inputs]).executed < 0.6
    d2d.detach(case.model)
    done.undo()
    assert torch.equal(run(case.model, case), before)
    now = case.model.state_dict()
    assert now.keys() == original.keys() and all(torch.equal(now[k], original[k]) for k in now)


def _double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def test_gradients_through_a_converted_block_of_another_width_are_the_dense_ones() -> None:
    case = case_of("gqa")
    model = case.model.double()
    d2d.replace_projections(model, [case.inputs], **QUICK)

    def gradients(run: Callable[..., Any]) -> dict[str, Tensor]:
        model.zero_grad()
        testing.output(run(**case.inputs)).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    dense_model = copy.deepcopy(model)
    config = d2d.Config(experts=None, expert_size=4, router_width=8, router_epochs=1)
    conversion = d2d.convert(model, [case.inputs], config, progress=False)
    fast = torch.compile(model, backend="d2dmoe", options={"inner": "eager", "trainable": True})
    found = gradients(fast)
    name = "model.layers.0.self_attn.k_proj"
    testing.output(dense_model(**case.inputs)).square().sum().backward()
    expected = dict(dense_model.named_parameters())[f"{name}.down.weight"].grad
    order = conversion.experts[name].permutation
    assert expected is not None and expected.abs().max() > 0
    torch.testing.assert_close(found[f"{name}.down.weight"], expected[:, order])


def clustered(tokens: int, d: int) -> Tensor:
    """Tokens that are few at a time, as features of a residual stream: sparse codes of a dictionary."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.rand(tokens, 2 * d, generator=generator) * (
        torch.rand(tokens, 2 * d, generator=generator) < 0.02
    )
    return codes @ torch.randn(2 * d, d, generator=generator)


def test_a_block_errs_less_than_the_best_linear_layer_of_half_its_cost() -> None:
    """On values made of few features at a time: by PCA on the same rows; half of the neurons are silent."""
    d, x = 32, clustered(6000, 32)
    layer, block = nn.Linear(d, d), ProjectionMLP(d, d, hidden_width(d, d))
    (found,) = distil(x, [(layer.weight, layer.bias)], [block], Recipe(20, 3e-3, 0.1, 0))
    fresh = x[-1000:].flip(0)
    with torch.no_grad():
        y = layer(fresh)
        spread = (y - layer(x).mean(0)).square().sum()
        error = float((block(fresh) - y).square().sum() / spread)
        values = torch.linalg.eigvalsh(layer(x).T.cov())
    half = float(values[: -block.up.out_features // 2].sum() / values.sum())
    assert error < 0.75 * half and found.error < 0.75 * half
    assert found.active < 0.65
    held = torch.arange(len(x)) // 128 % 10 == 9
    with torch.no_grad():
        centred = layer(x[held]) - layer(x[~held]).mean(0)
        away = torch.linalg.eigh(layer(x[~held]).T.cov())[1][:, : -block.up.out_features]
        linear = float((centred @ away).square().sum() / centred.square().sum())
    assert found.linear_error == pytest.approx(linear, rel=1e-3)


def test_hoyer_makes_hidden_values_sparse_and_the_same_seed_the_same_block() -> None:
    d, x = 24, clustered(3000, 24)
    layer = nn.Linear(d, d)

    def fit(hoyer: float, seed: int = 0) -> tuple[Any, ProjectionMLP]:
        block = ProjectionMLP(d, d, hidden_width(d, d))
        state = torch.random.get_rng_state()
        (found,) = distil(x, [(layer.weight, layer.bias)], [block], Recipe(20, 3e-3, hoyer, seed))
        assert torch.equal(torch.random.get_rng_state(), state)
        return found, block

    (dense, first), (sparse, _), (_, again) = fit(0.0), fit(1.0), fit(0.0)
    assert sparse.active < 0.7 * dense.active
    assert torch.equal(first.down.weight, again.down.weight)
    assert not torch.equal(first.down.weight, fit(0.0, seed=1)[1].down.weight)


def test_a_block_costs_as_much_as_its_layer_and_experts_divide_it() -> None:
    for d_in, d_out in ((384, 384), (768, 768), (768, 2304), (2048, 512), (4096, 1024), (64, 16)):
        hidden = hidden_width(d_in, d_out)
        assert hidden * (d_in + d_out) == pytest.approx(d_in * d_out, rel=0.02)
        assert hidden % 32 == 0 or d_in == 64
    assert hidden_width(768, 768, 0.5) == 192 and hidden_width(3, 2) == 1


def test_residual_blocks_learn_the_difference_to_their_input() -> None:
    d = 16
    x, layer, block = clustered(2000, d), nn.Linear(d, d), ProjectionMLP(d, d, 8, residual=True)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(d) + torch.randn(d, 4) @ torch.randn(4, d) / 8)
    (found,) = distil(x, [(layer.weight, layer.bias)], [block], Recipe(20, 3e-3, 0.0, 0))
    assert found.error < 0.02


def test_layers_keep_their_dtype_and_blocks_reload_after_fine_tuning(tmp_path: Path) -> None:
    case = testing.in_dtype(testing.tiny("gpt2"), torch.bfloat16)
    plain = copy.deepcopy(case.model)
    done = d2d.replace_projections(case.model, [case.inputs], roles="qkvo", **QUICK)
    block = case.model.transformer.h[0].attn.c_attn
    assert isinstance(block, ProjectionMLP) and block.up.weight.dtype == torch.bfloat16
    with torch.no_grad():
        block.down.bias += 1
    done.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "projections.json", "projections.safetensors",
    }  # fmt: skip
    loaded = d2d.load_projections(plain, tmp_path)
    assert torch.equal(run(plain, case), run(case.model, case))
    assert [one.figures for one in loaded.sites] == [one.figures for one in done.sites]
    fresh = type(plain)(plain.config).to(torch.bfloat16).eval()
    d2d.load_projections(fresh, tmp_path)
    fresh.load_state_dict(case.model.state_dict())
    assert torch.equal(run(fresh, case), run(case.model, case))
    with pytest.raises(
        ProjectionError, match=r"has a ProjectionMLP at 'transformer\.h\.0\.attn\.c_attn'"
    ):
        d2d.load_projections(fresh, tmp_path)
    with pytest.raises(ProjectionError, match="has nothing at"):
        d2d.load_projections(testing.tiny("bert").model, tmp_path)


def test_damaged_files_are_refused_and_the_model_stays(tmp_path: Path) -> None:
    case = testing.tiny("bert")
    plain = copy.deepcopy(case.model)
    d2d.replace_projections(case.model, [case.inputs], roles="q", **QUICK).save(tmp_path)
    file, tensors = tmp_path / "projections.json", tmp_path / "projections.safetensors"
    text, data = file.read_text(), tensors.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(ArtifactError, match=match):
            d2d.load_projections(plain, tmp_path)
        assert not any(isinstance(m, ProjectionMLP) for m in plain.modules())

    document = json.loads(text)
    document["sites"][0]["hidden"] = 8
    file.write_text(json.dumps(document))
    refused("damaged or edited")
    file.write_text(text.replace("d2dmoe-projections", "d2dmoe"))
    refused("expected 'd2dmoe-projections' version 1")
    file.write_text(text)
    tensors.write_bytes(data[:-4] + b"\1\2\3\4")
    refused("the manifest says")
    tensors.unlink()
    refused("has no file")


class Wide(nn.Module):
    """Queries and keys of half the width, so that kernels see outputs narrower than inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(512, 256), nn.Linear(512, 256)
        self.v, self.o = nn.Linear(512, 512), nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(-1, -2) / 16).softmax(-1)
        y: Tensor = x + self.o(weights @ self.v(x))
        return y


@pytest.mark.parametrize("tokens", [1, 40])
def test_one_kernel_runs_blocks_of_another_width(tokens: int) -> None:
    model, x = Wide().eval(), torch.randn(1, tokens, 512)
    done = d2d.replace_projections(
        model, [torch.randn(1, 64, 512)], roles="qk", epochs=1, progress=False
    )
    assert [(one.d_out, one.hidden) for one in done.sites] == [(256, 168)] * 2
    with torch.no_grad():
        dense, exact = model(x), copy.deepcopy(model).double()(x.double())
        d2d.convert(model, [torch.randn(1, 64, 512)], d2d.Config(router_epochs=1), progress=False)
        result = torch.compile(model, backend="d2dmoe")(x)
    assert testing.error_ratio(result, dense, exact) <= 2
    how = d2d.explain(model, x).running
    assert len(how) == 2 and all(text.startswith("one kernel, 512 x 168") for text in how.values())


class Attention(nn.Module):
    """Self-attention of width 16 whose projections are given."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name in "qkvo":
            setattr(self, name, layers.get(name, nn.Linear(16, 16)))

    def project(self, name: str, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, name)(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.project(n, x).view(2, 5, 4, 4).transpose(1, 2) for n in "qkv")
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 16)
        return x + self.project("o", y)


class ReadsWeight(Attention):
    def project(self, name: str, x: Tensor) -> Tensor:
        if name != "k":
            return super().project(name, x)
        return (
            F.linear(x, self.k.weight, self.k.bias) if not isinstance(self.k, ProjectionMLP) else x
        )


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.own = nn.MultiheadAttention(16, 4, batch_first=True), Attention()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.own(x + self.inner(x, x, x, need_weights=False)[0])
        return y


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def tied() -> Attention:
    model = Attention()
    model.k.weight = model.q.weight
    return model


def hooked() -> Attention:
    model = Attention()
    model.v.register_forward_hook(lambda *_: None)
    return model


LEFT = {
    "a subclass with its own forward": (
        lambda: Attention(q=Halved(16, 16)), {}, {"q": "belongs to a Halved; expected nn.Linear"}
    ),
    "tied weights": (tied, {}, {"q": "shares its weight with k.weight"}),
    "hooks": (hooked, {}, {"v": "has forward hooks"}),
    "packed": (Packed, {}, {
        "inner.in_proj_weight": "inside of one call", "inner.out_proj": "inside of one call",
    }),
    "roles": (Attention, {"roles": "qk"}, {"v": "makes v, which roles leaves out", "o": "makes o"}),
    "a weight that is read": (ReadsWeight, {}, {"k": "the matcher does not see a block"}),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT)
def test_what_cannot_be_replaced_stays_and_says_why(what: str) -> None:
    make, given, left = LEFT[what]
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(2, 5, 16)
    done = d2d.replace_projections(model, [x], **given, **QUICK)
    assert set(done.left) == set(left) and done.sites
    for name, reason in left.items():
        assert reason in done.left[name] and name in str(done)
        assert not isinstance(
            model.get_parameter(f"{name}.weight") if name[-1] in "qkvo" else x, ProjectionMLP
        )
    for one in done.sites:
        assert isinstance(model.get_submodule(one.path), ProjectionMLP)


def test_impossible_arguments_and_data_are_refused_before_anything_changes() -> None:
    model, x = Attention(), torch.randn(2, 5, 16)
    before = copy.deepcopy(model.state_dict())
    wrong: dict[str, Any] = {
        "roles": "qx",
        "width": 0,
        "epochs": 0,
        "lr": float("nan"),
        "hoyer": -1,
    }
    for name, value in wrong.items():
        with pytest.raises(ProjectionError, match=f"{name} is {value!r}; expected"):
            d2d.replace_projections(model, [x], **{name: value}, progress=False)
    with pytest.raises(CalibrationError, match="no batches"):
        d2d.replace_projections(model, [], progress=False)
    with pytest.raises(CalibrationError, match="Batch 1 gives NaN or infinity before"):
        d2d.replace_projections(model, [x, x * float("nan")], **QUICK)
    with pytest.raises(ProjectionError, match="No projection of Stack can be replaced"):
        d2d.replace_projections(testing.Stack(), [torch.randn(4, 16)], **QUICK)
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)
    assert model.training


def test_undo_refuses_a_model_that_was_changed_since_and_is_done_once() -> None:
    model = Attention().eval()
    done = d2d.replace_projections(model, [torch.randn(2, 5, 16)], **QUICK)
    block, model.q = model.q, nn.Linear(16, 16)
    with pytest.raises(ProjectionError, match="q is a Linear that was put there since"):
        done.undo()
    assert isinstance(model.k, ProjectionMLP)
    model.q = block
    done.undo()
    done.undo()
    assert type(model.q) is type(model.o) is nn.Linear
    sites = d2d.explain(model, torch.randn(2, 5, 16)).sites
    assert [(s.kind, s.role) for s in sites] == [("projection", letter) for letter in "qkvo"]
