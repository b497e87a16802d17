"""Few tokens on int8 copies on GPUs: the copy, the kernels against the weights it stands for, the option.

Kernels are held to the same tolerance as those on the weights themselves: twice the error of the meaning in
the block's dtype, of the weights that the copy stands for. How far these are off is tested apart, on the
exact block. Without a GPU kernels run in Triton's interpreter, and the option on weights of this CPU.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from blocks import masks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operands import DTYPES, ON, SPECS, Operands, assert_as_good
from torch import Tensor

import d2dcompile as d2d
from d2dcompile import attachment, lowering, testing
from d2dcompile.errors import D2DWarning
from d2dcompile.gpu_blocks import FEW, GpuSchedule, GpuSpec
from d2dcompile.gpu_defaults import of_strategy
from d2dcompile.gpus import A100, H200, MI300X
from d2dcompile.kernels import int8
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.expert_mlp import expert_mlp, gpu
from d2dcompile.kernels.expert_mlp_int8 import expert_mlp_int8
from d2dcompile.load import Load
from d2dcompile.tiles import Tile

pytestmark = pytest.mark.triton
COPIED = {name: replace(spec, int8=True) for name, spec in SPECS.items()}
COPIED["odd"] = GpuSpec(97, 35, 3, 7, True, "silu(gate) * up", int8=True)
LOSS = 0.015  # relative error of w8a16 on random weights; measured: .008 to .010
BOUNDED = settings(max_examples=4, deadline=None)
shares = st.sampled_from(["none", "all", "one expert", 0.1, 0.5])


# ---- The copy.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_once", [1 << 24, 100])
def test_a_copy_is_half_a_step_off(dtype, at_once, monkeypatch) -> None:
    monkeypatch.setattr(int8, "AT_ONCE", at_once)  # rows that are rounded together: all, or two
    operands = Operands(COPIED["odd"], masks(1, 3, "all", 0), DTYPES[dtype], True, 0)
    copy = operands.int8()
    assert [len(copy), copy.q_down.shape, copy.scales.shape] == [5, (3, 35, 7), (3, 21)]
    assert copy.nbytes == sum(part.nbytes for part in copy)
    assert float(torch.frexp(copy.unit).mantissa) == 0.5 and copy.scales[-1].max() <= 1
    slabs = (operands.weights[name] for name in ("w_up", "w_gate", "w_down"))
    steps = (*copy.scales[:2], copy.scales[2] * copy.unit)
    for found, exact, step in zip(int8.weights_of(copy, torch.float64), slabs, steps, strict=True):
        largest = exact.double().abs().amax(1)
        assert torch.allclose(step.double() * 127, largest, rtol=1e-6)
        off = (found - exact.double()).abs() / step.double()[:, None]
        assert off.max() <= 0.5 + 1e-4
    assert all(q.abs().max() == 127 for q in copy[:3])


def test_rows_of_zeros_of_nothing_and_not_finite() -> None:
    w_up = torch.randn(8, 6)
    w_up[1], w_up[2], w_up[3, 2], w_up[4, 0] = 0.0, 1e-39, torch.nan, -torch.inf
    w_down = torch.zeros(8, 5)
    copy = int8.copy_of(w_up, None, w_down, 2)
    up, gate, down = int8.weights_of(copy, torch.float32)
    assert gate is None and copy.q_gate is None and copy.unit == 1
    assert not up[1:3].any() and not down.any()
    assert up[3:5].isnan().all() and up[[0, 5, 6, 7]].isfinite().all()


def test_a_copy_made_in_inference_mode_is_an_ordinary_tensor() -> None:
    w = torch.randn(8, 6, requires_grad=True)
    with torch.inference_mode():
        copy = int8.copy_of(w, None, w, 2)
    assert not any(part.is_inference() or part.requires_grad for part in copy if part is not None)


# ---- Kernels.


def small(rows: int) -> GpuSchedule:
    """Tiles that do not divide the blocks' sizes."""
    few, down = Tile(16, 16, 32, 4, 1), Tile(16, 32, 16, 4, 1)
    if rows == 1:
        few, down = replace(few, block_n=8), replace(down, block_m=1)
    elif rows > 16:
        few, down = replace(few, block_m=64), replace(down, block_m=64)
    return GpuSchedule("decode", few, down, splits=3)


@pytest.mark.parametrize("name", COPIED)
@BOUNDED
@given(
    st.integers(0, FEW), shares, st.sampled_from(sorted(DTYPES)), st.booleans(), st.integers(0, 9)
)
@example(0, "all", "fp32", True, 0)
@example(1, "none", "fp16", True, 2)
@example(1, 0.5, "bf16", True, 0)
@example(5, 0.5, "bf16", True, 0)
@example(17, "none", "fp16", True, 0)
@example(FEW, "all", "fp16", False, 0)
def test_equals_the_meaning(name, rows, share, dtype, bias, seed) -> None:
    spec = COPIED[name]
    operands = Operands(spec, masks(rows, spec.experts, share, seed), DTYPES[dtype], bias, seed)
    result = operands.run(small(rows))
    if rows:
        assert_as_good(result, operands)


@pytest.mark.parametrize("rows", [1, 5, FEW])
@pytest.mark.parametrize("name", ["plain", "gated"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_default_schedule_is_right(name, rows, dtype) -> None:
    spec = replace(COPIED[name], dtype=dtype)
    operands = Operands(spec, masks(rows, spec.experts, 0.3, 0), DTYPES[dtype], True, 0)
    for device in (H200, A100, MI300X):
        schedule = of_strategy("decode", spec, Load(rows, 0.3), device)
        assert_as_good(operands.run(schedule), operands)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(("down", "up"), [(1e-4, 5e2), (1e2, 5e-4), (1e-2, 5e-2)])
def test_sizes_at_the_ends_of_fp16(rows, down, up) -> None:
    """Scales of W_down alone would push hidden values below what fp16 holds."""
    spec = replace(COPIED["plain"], activation="relu(up)", dtype="fp16")
    operands = Operands(spec, masks(rows, spec.experts, "all", 0), torch.float16, False, 0)
    operands.weights["w_down"] *= down
    operands.weights["w_up"] *= up
    operands.weights["w_down"][3] *= 1e-2  # a row far below the others
    assert_as_good(operands.run(small(rows)), operands)


@pytest.mark.parametrize("rows", [1, 6, FEW])
@pytest.mark.parametrize("name", ["plain", "gated", "odd"])
def test_is_about_a_hundredth_off_the_exact_block(name, rows) -> None:
    spec, off, exact = COPIED[name], [], []
    for seed in range(10):
        operands = Operands(spec, masks(rows, spec.experts, 0.5, seed), torch.float32, True, seed)
        exact.append(replaced(operands, int8=False).meaning(torch.float64))
        off.append(operands.run(small(rows)).double() - exact[-1])
    error = testing.rms(torch.cat(off)) / testing.rms(torch.cat(exact))
    assert 1e-4 < error < LOSS  # as exact as that would mean that int8 is not used


def replaced(operands: Operands, **changes) -> Operands:
    """The same operands for another spec."""
    other = object.__new__(Operands)
    other.__dict__.update(vars(operands), spec=replace(operands.spec, **changes))
    return other


@pytest.mark.parametrize("matrix", ["w_up", "w_gate", "w_down"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [1, 6])
def test_weights_that_are_not_finite_spoil_the_tokens_of_their_expert(matrix, value, rows) -> None:
    spec = COPIED["gated"]
    mask = torch.arange(rows)[:, None] % 3 == torch.arange(3)  # token t chose expert t modulo 3
    for expert in range(3):
        operands = Operands(spec, mask, torch.float32, True, 0)
        operands.weights[matrix][expert * spec.size + 1, 3] = value
        bad = torch.arange(rows, device=ON) % 3 == expert
        result = operands.run(small(rows))
        assert result[bad].isnan().all() and result[~bad].isfinite().all()
        nan = operands.meaning(torch.float32).isnan()
        assert torch.equal(result.isnan(), nan)


def test_bits_do_not_depend_on_the_order_of_programs() -> None:
    if ON == "cuda":
        pytest.skip("a device chooses the order itself")
    from interpreter import shuffled

    operands = Operands(COPIED["gated"], masks(16, 3, 0.5, 0), torch.float32, True, 0)
    first = operands.run(small(16))
    for seed in range(3):
        with shuffled(seed):
            assert torch.equal(operands.run(small(16)), first)


# ---- The op.


def arguments(operands: Operands) -> tuple[object, ...]:
    rest = (*operands.weights.values(), *operands.int8(), operands.scalars)
    return (operands.rows, *operands.lists, *rest, operands.spec.activation)


@pytest.mark.parametrize("rows", [0, 1, 6, FEW, FEW + 1])
@pytest.mark.parametrize("name", ["many experts", "gated"])
def test_the_op_reads_the_copy_for_few_tokens_only(name, rows, monkeypatch) -> None:
    spec = COPIED[name]
    operands = Operands(spec, masks(rows, spec.experts, 0.3, 0), torch.float32, True, 0)
    lists = dispatch.meaning(operands.mask.to(ON))
    slabs = [w.double() if w is not None else None for w in operands.weights.values()]
    scalars = [s.double() for s in operands.scalars]
    exact = expert_mlp.meaning(
        operands.rows.double(), *lists, *slabs, None, scalars, spec.activation
    )
    way = "gpu" if ON == "cuda" else "interpreter"
    monkeypatch.setattr(gpu, "choose", lambda spec, load, *_, **__: chosen(spec, load))
    for wanted in ("reference", way):
        monkeypatch.setenv("D2D_IMPL", f"expert_mlp_int8:{wanted},expert_mlp:{wanted}")
        y = expert_mlp_int8(*arguments(operands))
        assert y.shape == exact.shape
        if rows:
            error = testing.rms(y.double() - exact) / testing.rms(exact)
            assert 1e-4 < error < LOSS if rows <= FEW else error < 1e-6


def chosen(spec: GpuSpec, load: Load) -> GpuSchedule:
    assert spec.int8 == (load.tokens <= FEW)
    return of_strategy("decode" if load.tokens <= FEW else "pairs", spec, load, H200)


@pytest.mark.parametrize("rows", [0, 6, FEW + 1])
@pytest.mark.parametrize("name", ["plain", "gated", "many experts"])
def test_registration(name, rows) -> None:
    spec = COPIED[name]
    operands = Operands(spec, masks(rows, spec.experts, 0.3, 0), torch.bfloat16, name == "plain", 0)
    torch.library.opcheck(expert_mlp_int8.overload, arguments(operands))


def test_what_kernels_do_not_read_is_refused(monkeypatch) -> None:
    operands = Operands(COPIED["gated"], masks(6, 3, 0.5, 0), torch.float32, True, 0)
    given_ = list(arguments(operands))
    accepts = expert_mlp_int8._implementations[-1].accepts
    assert accepts(*given_)
    for place, other in ((10, given_[10].t().contiguous().t()), (12, given_[12].float())):
        assert not accepts(*given_[:place], other, *given_[place + 1 :])


# ---- Through the backend, as on a GPU.

CONFIG = d2d.Config(router_epochs=1, expert_size=8)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are lowered as for a GPU; their ops then run in plain PyTorch on this CPU."""
    monkeypatch.setattr(lowering, "_on_gpu", lambda state: True)


def converted(depth: int = 2) -> testing.Stack:
    torch.manual_seed(0)
    model = testing.Stack(depth)
    d2d.convert(model, [torch.randn(64, 16) for _ in range(4)], CONFIG, progress=False)
    d2d.set_tau(model, 0.0)
    return model


def compiled(model: torch.nn.Module, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="d2dmoe", fullgraph=True, options=options)


def off(found: Tensor, exact: Tensor) -> float:
    return testing.rms(found - exact) / testing.rms(exact)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_option_int8(inner, as_on_a_gpu) -> None:
    """Off: exact. On: near, a copy is kept, counted and named; more tokens are exact; detach drops it."""
    model, few, many = converted(), torch.randn(9, 16), torch.randn(FEW + 1, 16)
    sites = attachment.states(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", D2DWarning)
        assert off(compiled(model, inner=inner)(few), model(few)) < 1e-6
        assert not any(site.packed_bytes for site in sites)
        assert "int8" not in lowering.running(sites[0])
        fast = compiled(model, inner=inner, int8=True)
        assert 1e-4 < off(fast(few), model(few)) < LOSS
        assert off(fast(many), model(many)) < 1e-6
        for site in sites:
            weights, neurons = site.weight("up").numel(), len(site.weight("up"))
            assert site.packed_bytes == 2 * weights + 4 * 2 * neurons + 4
        assert "decode on int8 copies of" in lowering.running(sites[0])
    d2d.detach(model)
    assert not any(site.packed_bytes for site in sites)


def test_new_weights_get_a_new_copy(as_on_a_gpu) -> None:
    model, few = converted(), torch.randn(3, 16)
    fast = compiled(model, inner="eager", int8=True, trainable=True)
    with torch.no_grad():
        before = fast(few)
        kept = [site.int8_copy() for site in attachment.states(model)]
        assert [site.int8_copy() for site in attachment.states(model)] == kept
        for block in model.blocks:
            block.down.weight.mul_(3)
        after, dense = fast(few), model(few)
        assert off(after, dense) < LOSS and off(after, before) > 10 * LOSS


def test_gradients_are_those_of_the_weights(as_on_a_gpu) -> None:
    """While they are recorded the copy is neither made nor read, and nothing is warned of."""
    model, few = converted(), torch.randn(3, 16)
    fast = compiled(model, inner="aot_eager", int8=True, trainable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", D2DWarning)
        y = fast(few)
        y.square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    assert not any(site.packed_bytes for site in attachment.states(model))
    model.zero_grad()
    dense = model(few)
    dense.square().sum().backward()
    assert off(y, dense) < 1e-6
    for a, b in zip(found, (p.grad for p in model.parameters()), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with torch.no_grad():
        assert 1e-4 < off(fast(few), dense) < LOSS


def test_where_it_has_no_effect_a_warning_says_so(as_on_a_gpu, monkeypatch) -> None:
    model, few = converted(), torch.randn(3, 16)
    monkeypatch.setenv("D2D_IMPL", "expert_mlp:reference")
    with torch.no_grad(), pytest.warns(D2DWarning, match=r"int8=True has no effect on 2 of 2"):
        assert off(compiled(model, inner="eager", int8=True)(few), model(few)) < 1e-6
    monkeypatch.delenv("D2D_IMPL")
    half = torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), half, pytest.warns(D2DWarning, match="no effect on 2 of 2"):
        compiled(model, inner="eager", int8=True)(few)
    assert not any(site.packed_bytes for site in attachment.states(model))
