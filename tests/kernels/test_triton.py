"""The generated Triton kernels against the ops' meanings in fp64: every strategy, dtype and edge.

Without a GPU they run in Triton's interpreter, with bf16 mended (tests/interpreter.py). Memory that is not
written is NaN, or an index far out of range. Tolerances are not picked: the error is held to twice that of
the meaning in the same dtype.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blocks import masks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operands import DTYPES, ON, SPECS, Operands, assert_as_good
from torch import Tensor

from d2dcompile import gpu_blocks, testing
from d2dcompile.gpu_blocks import GpuSchedule, GpuSpec
from d2dcompile.gpu_defaults import of_strategy
from d2dcompile.gpus import H200
from d2dcompile.kernels import render
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.dispatch import gpu as lists_gpu
from d2dcompile.kernels.expert_mlp import call, expert_mlp, gpu, grouped
from d2dcompile.kernels.expert_mlp.gradient import expert_mlp_backward
from d2dcompile.kernels.gate import tau_bits
from d2dcompile.kernels.route import gpu as route_gpu
from d2dcompile.kernels.route import route
from d2dcompile.load import Load
from d2dcompile.tiles import Tile

EXPECTED = Path(__file__).parent.parent / "expected"
pytestmark = pytest.mark.triton
BOUNDED = settings(max_examples=4, deadline=None)
FEW, MANY = Tile(16, 16, 32, 4, 1), Tile(16, 32, 16, 4, 1)
SCHEDULES = {
    "decode": GpuSchedule("decode", FEW, MANY, splits=3),
    "pairs": GpuSchedule("pairs", FEW, MANY),
    "pairs, weights first": GpuSchedule("pairs", FEW, MANY, swap=True),
    "atomic": GpuSchedule("atomic", FEW, MANY),
    "dense": GpuSchedule("dense", FEW, MANY),
}


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory is NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    added = lists_gpu.ADDED
    yield
    torch.use_deterministic_algorithms(False)
    lists_gpu.ADDED = added


shares = st.sampled_from(["none", "all", "one expert", 0.1, 0.5])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("way", SCHEDULES)
@BOUNDED
@given(
    st.integers(0, 21), shares, st.sampled_from(sorted(DTYPES)), st.booleans(), st.integers(0, 9)
)
@example(0, "all", "fp32", True, 0)
@example(1, "none", "fp32", False, 2)
@example(1, 0.5, "bf16", True, 0)
@example(17, "none", "fp16", True, 0)
@example(21, "all", "fp32", False, 0)
def test_equals_the_meaning(name, way, rows, share, dtype, bias, seed) -> None:
    spec, schedule = SPECS[name], SCHEDULES[way]
    if way == "dense":
        share = "all"
    if way == "decode" and rows == 1:
        schedule = replace(schedule, up=replace(FEW, block_n=8), down=replace(MANY, block_m=1))
    elif way == "decode":
        schedule = replace(schedule, up=replace(FEW, block_m=64), down=replace(MANY, block_m=64))
    operands = Operands(spec, masks(rows, spec.experts, share, seed), DTYPES[dtype], bias, seed)
    result = operands.run(schedule)
    if rows:
        assert_as_good(result, operands)


@pytest.mark.parametrize("rows", [1, 5, 64, 130])
@pytest.mark.parametrize("name", ["plain", "gated"])
def test_the_default_schedule_is_right(name, rows) -> None:
    spec = SPECS[name]
    operands = Operands(spec, masks(rows, spec.experts, 0.3, 0), torch.float32, True, 0)
    for strategy in ("decode", "pairs", "atomic") if rows <= 64 else ("pairs", "atomic"):
        schedule = of_strategy(strategy, spec, Load(rows, 0.3), H200)
        assert_as_good(operands.run(schedule), operands)


@pytest.mark.parametrize("strategy", ["pairs", "atomic"])
def test_weights_through_descriptors(strategy) -> None:
    """The rows of a descriptor's tiles have to start at multiples of 16 bytes."""
    spec = GpuSpec(64, 48, 3, 16, True, "silu(gate) * up")
    operands = Operands(spec, masks(20, 3, 0.5, 0), torch.float32, True, 0)
    schedule = replace(SCHEDULES["pairs"], strategy=strategy, tma=True)
    assert_as_good(operands.run(schedule), operands)


def test_columns_are_worked_off_in_chunks(monkeypatch) -> None:
    """A small limit of memory: three chunks, the last one narrower."""
    monkeypatch.setattr(gpu_blocks, "ROWS_BYTES", 20 * 5 * 32 * 2)
    spec = SPECS["plain"]
    assert gpu_blocks.chunk(spec, 20, 32) == 32
    operands = Operands(spec, masks(20, 5, 0.5, 0), torch.float32, True, 0)
    assert_as_good(operands.run(SCHEDULES["pairs"]), operands)


@pytest.mark.parametrize("way", ["decode", "pairs", "pairs, weights first"])
def test_bits_do_not_depend_on_the_order_of_programs(way) -> None:
    if ON == "cuda":
        pytest.skip("a device chooses the order itself")
    from interpreter import shuffled

    spec = SPECS["gated"]
    operands = Operands(spec, masks(16, 3, 0.5, 0), torch.float32, True, 0)
    first = operands.run(SCHEDULES[way])
    for seed in range(3):
        with shuffled(seed):
            assert torch.equal(operands.run(SCHEDULES[way]), first)


@pytest.mark.parametrize("experts, size", [(4, 8), (37, 3)])
@BOUNDED
@given(st.integers(0, 90), st.sampled_from(sorted(DTYPES)), st.floats(0, 1), st.integers(0, 9))
@example(0, "fp32", 0.5, 0)
@example(1, "bf16", 0.5, 0)
@example(64, "fp32", 0.0, 0)
@example(90, "fp32", 1.0, 0)
def test_routing_lists_what_the_gate_chooses(experts, size, rows, dtype, tau, seed) -> None:
    """Lists are those of a mask, and that mask is the gate's but for scores within rounding of the limit."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 40, generator=draw).to(ON, DTYPES[dtype])
    w1 = (torch.randn(12, 40, generator=draw) / 40**0.5).to(ON, DTYPES[dtype])
    w2 = (torch.randn(experts, 12, generator=draw) / 12**0.5).to(ON, DTYPES[dtype])
    found = route_gpu.run(x, w1, w2, tau_bits(tau, ON))
    mask = mask_of(found, rows, experts)
    assert_lists(found, mask)
    hidden = (x.double() @ w1.double().t()).relu()
    scores = (hidden @ w2.double().t()).abs()
    limit = tau * scores.amax(1, keepdim=True) if rows else scores
    sure = (scores - limit).abs() > 4 * torch.finfo(x.dtype).eps * scores.amax() if rows else mask
    assert torch.equal(mask[sure], (scores >= limit)[sure])
    assert mask.any(1).all()


def mask_of(lists: tuple[Tensor, Tensor, Tensor], rows: int, experts: int) -> Tensor:
    tokens, offsets, _ = lists
    mask = torch.zeros(rows, experts, dtype=torch.bool, device=tokens.device)
    chosen = torch.arange(experts, device=tokens.device).repeat_interleave(offsets.diff())
    mask[tokens[: offsets[-1]].long(), chosen] = True
    return mask


def assert_lists(found: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> None:
    tokens, offsets, slots = dispatch.meaning(mask)
    assert torch.equal(found[1], offsets)
    assert torch.equal(found[0][: offsets[-1]], tokens[: offsets[-1]])
    used = torch.arange(mask.shape[1] + 1, device=mask.device)[None] <= slots[:, :1]
    assert torch.equal(found[2][used], slots[used])


@pytest.mark.parametrize("added", [0, 32], ids=["added up", "each adds"])
@pytest.mark.parametrize("experts", [1, 5, 130])
@BOUNDED
@given(st.integers(0, 150), shares, st.integers(0, 9))
@example(150, "all", 0)
def test_lists_of_a_given_mask(experts, added, rows, share, seed) -> None:
    lists_gpu.ADDED = added  # blocks of tokens from which their counts are added up apart
    mask = masks(rows, experts, share, seed).to(ON)
    assert_lists(lists_gpu.run(mask), mask)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [3, 100])
def test_strange_scores_lean_to_dense(value, rows) -> None:
    """A token with NaN runs everything, as the gate says; an infinite one what the gate chooses."""
    x, w1 = torch.randn(rows, 16, device=ON), torch.eye(16, device=ON)
    w2 = torch.eye(16, device=ON)[:8].contiguous()
    x[1, 2] = value
    lists = route_gpu.run(x, w1, w2, tau_bits(0.5, ON))
    expected = route.meaning(x, w1, w2, tau_bits(0.5, ON))
    assert torch.equal(mask_of(lists, rows, 8)[1], mask_of(expected, rows, 8)[1])


@pytest.mark.parametrize("rows", [3, 100])
def test_an_expert_with_nan_scores_always_runs_and_is_not_compared(rows) -> None:
    x, w1 = torch.randn(rows, 16, device=ON), torch.eye(16, device=ON)
    w2 = torch.eye(16, device=ON)[:8].contiguous()
    w2[[2, 5]] = torch.nan
    for tau in (0.0, 0.5, 1.0):
        found = mask_of(route_gpu.run(x, w1, w2, tau_bits(tau, ON)), rows, 8)
        expected = mask_of(route.meaning(x, w1, w2, tau_bits(tau, ON)), rows, 8)
        assert torch.equal(found, expected) and found[:, [2, 5]].all()
        assert tau == 0 or not found.all(1).all()


def test_an_op_runs_in_the_interpreter_on_request(monkeypatch) -> None:
    monkeypatch.setenv("D2D_IMPL", "expert_mlp:interpreter,route:interpreter")
    if ON == "cuda":
        monkeypatch.setenv("D2D_IMPL", "expert_mlp:gpu,route:gpu")
    spec = SPECS["gated"]
    operands = Operands(spec, masks(6, 3, 0.5, 0), torch.float32, True, 0)
    x, given_ = operands.rows.view(2, 3, -1), operands.weights.values()
    y = expert_mlp(x, *operands.lists, *given_, None, [], spec.activation)
    assert y.shape == (2, 3, spec.out)
    assert_as_good(y.view(6, -1), operands)
    w1, w2 = torch.randn(8, spec.d, device=ON), torch.randn(3, 8, device=ON)
    found = route(x, w1, w2, tau_bits(0.2, ON))
    assert_lists(found, mask_of(found, 6, 3))


@pytest.mark.parametrize("activation", ["gelu(up)", "silu(gate) * up", "p0 * relu(up) + p1 * up"])
@pytest.mark.parametrize("share", ["none", "all", "one expert", 0.4])
def test_gradient_by_grouped_products(activation, share, monkeypatch) -> None:
    """Every operand's gradient, against the meaning in fp64; twice gives the same bits."""
    dtype = torch.bfloat16 if ON == "cuda" else torch.float32
    spec = GpuSpec(16, 32, 3, 8, "gate" in activation, activation)
    operands = Operands(spec, masks(9, 3, share, 0), dtype, True, 0)
    grad = torch.randn(9, 32, device=ON).to(dtype)
    given_ = (*operands.weights.values(), None, operands.scalars, activation)
    arguments = (grad, operands.rows, *operands.lists, *given_)
    assert grouped.accepts(*arguments)
    monkeypatch.setenv(
        "D2D_IMPL", f"expert_mlp_backward:{'gpu' if ON == 'cuda' else 'interpreter'}"
    )
    found, again = expert_mlp_backward(*arguments), expert_mlp_backward(*arguments)
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    wide[-2] = [s.double() for s in operands.scalars]
    expected = expert_mlp_backward.meaning(*wide)
    for a, b, exact in zip(found, again, expected, strict=True):
        assert torch.equal(a, b) and a.dtype == dtype and a.shape == exact.shape
        if a.numel():
            bound = 8 * torch.finfo(dtype).eps
            assert testing.rms(a.double() - exact) <= bound * testing.rms(exact)


def test_what_has_no_spelling_is_refused() -> None:
    spec = SPECS["plain"]
    operands = Operands(spec, masks(6, 5, 0.5, 0), torch.float32, True, 0)
    given_ = (operands.rows, *operands.lists, *operands.weights.values(), None, [])
    assert gpu.accepts(*given_, "gelu(up)")
    assert not gpu.accepts(*given_, "up * noise + relu(up)")
    assert not gpu.accepts(operands.rows.double(), *given_[1:], "gelu(up)")


def test_source_is_the_same_every_time_and_imports_by_itself() -> None:
    assert call.source(SPECS["gated"]) == call.source(SPECS["gated"])
    assert "silu" in call.source(SPECS["gated"]) and "silu" not in call.source(SPECS["plain"])


@pytest.mark.parametrize("name", ["experts", "routing"])
def test_generated_source(name) -> None:
    """What a user reads; UPDATE_EXPECTED=1 accepts what it is now."""
    spec = GpuSpec(768, 768, 24, 128, True, "gelu(gate) * p0 * up")
    text = call.source(spec) if name == "experts" else lists_gpu.source(768, 128, 24, "ieee")
    path = EXPECTED / f"triton_{name}.txt"
    if os.environ.get("UPDATE_EXPECTED"):
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; UPDATE_EXPECTED=1 accepts the new source"


def test_dump_leaves_generated_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("D2D_DUMP", str(tmp_path / "dump"))
    text = call.source(GpuSpec(48, 48, 3, 16, False, "relu6(up)"))
    made = render.module(text)
    (path,) = (tmp_path / "dump").iterdir()
    assert path.read_text() == text and path.name.startswith("000_d2d_")
    assert made.up is render.module(text).up
