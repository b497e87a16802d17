"""One token on int8 copies: the kernel against its own arithmetic in fp64, and against the exact block.

The first is tight: every column may be off by fp32 rounding, and by one step of those hidden values that lie
so near a half that fp32 may round them either way. The second is how lossy int8 is, on random weights.
"""

from __future__ import annotations

import pytest
import torch
from blocks import block_of, masks, meaning, rows_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import d2dcompile as d2d
from d2dcompile import attachment, testing
from d2dcompile.errors import OptionError
from d2dcompile.expr import function
from d2dcompile.kernels import build, native
from d2dcompile.kernels.dynamic_mlp import Prepared, cpu

pytestmark = [
    pytest.mark.skipif(build.compiler() is not None, reason=str(build.compiler())),
    pytest.mark.usefixtures("any_size"),
]

GROUP, UNIT = 32, 16  # features of x, and neurons, with one scale
LOSS = 0.03  # relative error of int8 on both sides of both products; measured: .008 to .02
SPECS = {  # d, out, experts, expert size, router width, gated, bf16
    "fp32": native.Spec(64, 64, 6, 32, 24, False, False, "gelu(up)"),
    "fp32_odd": native.Spec(97, 35, 7, 5, 30, True, False, "silu(gate) * up"),
    "fp32_tiny": native.Spec(5, 3, 3, 1, 2, False, False, "relu(up)"),
    "bf16_gated": native.Spec(160, 160, 40, 16, 128, True, True, "silu(gate) * up"),
    "bf16_odd": native.Spec(301, 35, 7, 19, 30, False, True, "gelu(up)"),
    "fp32_not_0_at_0": native.Spec(256, 130, 4, 24, 20, False, False, "exp(up) + 1"),
}
DRAWN = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def run(block: Prepared, x: Tensor) -> Tensor:
    """The kernel's output in a buffer that was NaN before."""
    out = torch.full((len(x), block.w_down.shape[1]), torch.nan, dtype=x.dtype)
    return cpu.run_out(x, block.record, block.w_down.shape[1], out=out)


def quantised(values: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of fp32 values [..., n]: whole numbers, scales [..., n / group], where rounding is a toss-up."""
    parts = functional.pad(values, (0, -values.shape[-1] % group)).unflatten(-1, (-1, group))
    largest = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    steps = parts * torch.full_like(largest, 127).div(largest)  # 127 / t is 127 (1 / t) in torch
    toss_up = (steps - steps.floor() - 0.5).abs() < 1e-3
    whole, n = steps.round(), values.shape[-1]
    return whole.flatten(-2)[..., :n], (largest / 127)[..., 0], toss_up.flatten(-2)[..., :n]


def arithmetic(block: Prepared, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel computes for x [1, D], in fp64 between the roundings; how far it may be off."""
    hidden, d = block.w_up.shape
    tokens, t_scale, _ = quantised(x[0].float(), GROUP)
    x_scale = t_scale.double().repeat_interleave(GROUP)[:d]

    def above(weight: Tensor, bias: Tensor | None) -> Tensor:
        whole, scale, _ = quantised(weight.float(), d)
        sums = whole.double() @ (tokens.double() * x_scale) * scale[:, 0].double()
        return sums if bias is None else sums + bias.double()

    values = {"up": above(block.w_up, block.b_up)}
    if block.w_gate is not None:
        values["gate"] = above(block.w_gate, block.b_gate)
    h = function(block.activation)(values)
    whole, scale, _ = quantised(block.w_down.float(), block.w_down.shape[1])
    own = (h.float() * scale[:, 0]).view(block.experts, -1)  # units do not cross experts
    k, r, toss_up = quantised(own, UNIT)
    r_neuron = r.double().repeat_interleave(UNIT, -1)[:, : own.shape[1]]
    chosen = mask[0, :, None].double()
    terms = ((k.double() * r_neuron * chosen).view(hidden, 1)) * whole.double()
    y, size = terms.sum(0), terms.abs().sum(0)
    slack = ((toss_up * r_neuron * chosen).view(hidden, 1) * whole.double().abs()).sum(0)
    if block.b_down is not None:
        y = y + block.b_down.double()
    rounding = torch.finfo(x.dtype).eps / 2 * y.abs() * (1.001 if x.dtype == torch.bfloat16 else 2)
    return y[None], (slack + 4e-6 * size + rounding + 1e-30)[None]


@pytest.mark.parametrize("name", SPECS)
@DRAWN
@given(
    share=st.sampled_from(["none", 0.1, 0.5, "all", "one expert"]),
    bias=st.booleans(),
    spread=st.booleans(),
    outlier=st.sampled_from([1.0, 300.0]),
    seed=st.integers(0, 999),
)
@example(share="all", bias=True, spread=True, outlier=300.0, seed=0)
@example(share="none", bias=True, spread=False, outlier=1.0, seed=0)
@example(share="one expert", bias=False, spread=True, outlier=1.0, seed=3)
def test_computes_exactly_what_it_says(name, threads, share, bias, spread, outlier, seed) -> None:
    spec = SPECS[name]
    block = block_of(spec, bias=bias, spread=spread, seed=seed, int8=True)
    x, mask = rows_of(spec, 1, seed), masks(1, spec.experts, share, seed)
    x[0, seed % spec.d] *= outlier
    if "exp" in spec.activation:
        x /= outlier
    cpu.force(block, mask)
    result = run(block, x)
    expected, allowed = arithmetic(block, x, mask)
    assert ((result.double() - expected).abs() <= allowed).all()
    assert torch.equal(result, run(block, x))  # the same bits again
    assert block.quantised is not None and block.packed is None


@pytest.mark.parametrize("name", SPECS)
def test_is_a_few_hundredths_off_the_exact_block(name, threads) -> None:
    spec, found, exact = SPECS[name], [], []
    for seed in range(30):
        block = block_of(spec, seed=seed, int8=True)
        x, mask = rows_of(spec, 1, seed), masks(1, spec.experts, 0.5, seed)
        cpu.force(block, mask)
        found.append(run(block, x).double())
        exact.append(meaning(block, x, mask, torch.float64))
    error = testing.rms(torch.cat(found) - torch.cat(exact)) / testing.rms(torch.cat(exact))
    assert 1e-4 < error < LOSS  # as exact as that would mean that int8 is not used


def test_zero_x_gives_what_the_biases_make(threads) -> None:
    for bias in (False, True):
        block = block_of(SPECS["fp32_odd"], bias=bias, int8=True)
        x, mask = torch.zeros(1, 97), torch.ones(1, 7, dtype=torch.bool)
        exact = meaning(block, x, mask, torch.float64)
        error = (run(block, x).double() - exact).abs().max()
        assert error <= LOSS * exact.abs().max() if bias else error == 0


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e25])
def test_tiny_and_huge_x(size) -> None:
    """relu(up) is homogeneous: the error is as at any other size, or the output as good as 0."""
    spec = native.Spec(64, 64, 6, 32, 24, False, False, "relu(up)")
    block = block_of(spec, bias=False, int8=True)
    x = rows_of(spec, 1)
    exact = meaning(block, x, torch.ones(1, 6, dtype=torch.bool), torch.float64) * size
    error = testing.rms(run(block, x * size).double() - exact)
    assert error <= max(LOSS * testing.rms(exact), 1e-30)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["fp32_odd", "bf16_gated"])
def test_rows_that_are_not_finite_run_without_int8(name, value, threads) -> None:
    spec = SPECS[name]
    block, plain = block_of(spec, int8=True), block_of(spec)
    for place in (0, spec.d - 1):
        x = rows_of(spec, 1)
        assert run(block, x).isfinite().all()
        x[0, place] = value
        result = run(block, x)
        assert torch.equal(result.isnan(), run(plain, x).isnan()) and not result.isfinite().any()
        assert torch.equal(result.nan_to_num(), run(plain, x).nan_to_num())


@pytest.mark.parametrize("matrix", ["w_up", "w_gate", "w_down"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_spoil_the_tokens_of_their_expert(matrix, value) -> None:
    spec = SPECS["fp32_odd"]
    block = block_of(spec, int8=True)
    getattr(block, matrix)[2 * spec.size + 1, 3] = value  # of expert 2
    x = rows_of(spec, 1)
    for expert in range(spec.experts):
        cpu.force(block, torch.arange(spec.experts)[None] == expert)
        assert run(block, x).isfinite().all() == (expert != 2)


def test_more_tokens_and_routing_are_as_without(threads) -> None:
    """A call of more tokens gives the same bits; one token runs the experts that it would run anyway."""
    spec = SPECS["bf16_gated"]
    block, plain = block_of(spec, int8=True), block_of(spec)
    for rows in (0, 2, 30):
        x = rows_of(spec, rows)
        assert torch.equal(run(block, x), run(plain, x))
    assert block.quantised is None
    x = rows_of(spec, 1)
    differ = []
    for tau in (0.0, 0.3, 0.9):
        for one in (block, plain):
            one.tau.fill_(int(torch.tensor(tau).view(torch.int32)))
        ours, theirs = run(block, x).double(), run(plain, x).double()
        assert testing.rms(ours - theirs) <= LOSS * testing.rms(theirs)
        differ.append(theirs)
    assert not torch.equal(differ[0], differ[-1])


def test_without_memory_for_the_copy_one_token_runs_without_int8(monkeypatch) -> None:
    block, plain = block_of(SPECS["fp32"], int8=True), block_of(SPECS["fp32"])
    x = rows_of(SPECS["fp32"], 1)

    def short(*size, **_):
        raise RuntimeError("not enough memory")

    expected = run(plain, x)
    out = torch.empty_like(x)
    monkeypatch.setattr(cpu.torch, "empty", short)
    cpu.run_out(x, block.record, 64, out=out)
    monkeypatch.undo()
    assert block.quantised is None and torch.equal(out, expected)


# ---- Through the backend.

CONFIG = d2d.Config(router_epochs=1, expert_size=8)


def converted() -> testing.Stack:
    torch.manual_seed(0)
    model = testing.Stack(2)
    d2d.convert(model, [torch.randn(64, 16) for _ in range(4)], CONFIG, progress=False)
    return model


def compiled(model: torch.nn.Module, **options):
    return torch.compile(model, backend="d2dmoe", fullgraph=True, options=options)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_option_int8(inner) -> None:
    """Off: exact. On: near, a copy is kept and counted; more tokens are exact; detach drops it all."""
    model, one, many = converted(), torch.randn(1, 16), torch.randn(9, 16)
    d2d.set_tau(model, 0.0)
    sites = attachment.states(model)
    with torch.no_grad():
        dense = model(one)
        assert torch.allclose(compiled(model, inner=inner)(one), dense, atol=1e-5)
        assert sum(site.packed_bytes for site in sites) == 0
        fast = compiled(model, inner=inner, int8=True)
        result = fast(one)
        assert not torch.allclose(result, dense, atol=1e-5)
        assert testing.rms(result - dense) < LOSS * testing.rms(dense)
        copies = [site.packed_bytes for site in sites]
        weights = sum(2 * site.weight("down").numel() for site in sites)
        assert sum(copies) >= weights and all(copies)
        assert torch.allclose(fast(many), model(many), atol=1e-5)
        assert all(site.packed_bytes > copy for site, copy in zip(sites, copies, strict=True))
    d2d.detach(model)
    assert all(site.packed_bytes == 0 for site in sites)


def test_new_weights_get_a_new_copy() -> None:
    model, one = converted(), torch.randn(1, 16)
    d2d.set_tau(model, 0.0)
    fast = compiled(model, inner="eager", int8=True, trainable=True)
    with torch.no_grad():
        before = fast(one)
        for block in model.blocks:
            block.down.weight.mul_(3)
        after, dense = fast(one), model(one)
        assert testing.rms(after - dense) < LOSS * testing.rms(dense)
        assert testing.rms(after - before) > 10 * testing.rms(after - dense)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_option_int8_must_be_a_bool(value) -> None:
    with pytest.raises(OptionError, match=r"'int8' is .*; expected a bool"):
        compiled(converted(), int8=value)(torch.randn(1, 16))
