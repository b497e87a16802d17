"""The generated C++ kernels against the ops' meanings in fp64: every schedule, dtype, layout and edge.

Tolerances are not picked: the error is held to twice that of the meaning in the same dtype, both in root
mean square over enough numbers (several random blocks where one has few). Each spec is compiled once;
hypothesis draws rows, masks and layouts for it.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from blocks import block_of, masks, meaning, rows_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from d2dcompile import testing
from d2dcompile.kernels import build, native
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.dynamic_mlp import Prepared, cpu, dynamic_mlp
from d2dcompile.kernels.expert_mlp import cpu as expert_cpu
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.gate import gate, tau_bits

pytestmark = [
    pytest.mark.skipif(build.compiler() is not None, reason=str(build.compiler())),
    pytest.mark.usefixtures("any_size"),
]

GELU, SWIGLU = "gelu(up)", "silu(gate) * up"
SPECS = {  # d, experts, expert size, router width, gated, bf16
    "fp32": native.Spec(64, 64, 6, 32, 24, False, False, GELU),
    "fp32_odd": native.Spec(97, 35, 7, 5, 30, True, False, SWIGLU),
    "fp32_tiny": native.Spec(5, 3, 3, 1, 2, False, False, "relu(up)"),
    "bf16": native.Spec(160, 160, 40, 16, 128, True, True, SWIGLU),
    "bf16_odd": native.Spec(97, 35, 7, 5, 30, False, True, GELU),
    "bf16_units": native.Spec(64, 128, 4, 24, 20, False, True, "relu(up)"),
}
DRAWN = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def run(block: Prepared, x: Tensor) -> Tensor:
    """The kernel's output in a buffer that was NaN before."""
    width = block.w_down.shape[1]
    out = torch.full((*x.shape[:-1], width), torch.nan, dtype=x.dtype)
    return cpu.run_out(x, block.record, width, out=out)


def usual_error(block: Prepared, spec: native.Spec) -> float:
    """The error of eager with all experts on many rows, in units of the output: what it makes usually."""
    x = rows_of(spec, 256, seed=2)
    everything = torch.ones(256, spec.experts, dtype=torch.bool)
    exact = meaning(block, x, everything, torch.float64)
    eager = meaning(block, x, everything, x.dtype)
    return testing.rms(eager.double() - exact) / testing.rms(exact)


def assert_as_good(result: Tensor, eager: Tensor, exact: Tensor, usual: float = 0.0) -> None:
    """The error against fp64 is at most twice eager's, in root mean square; nothing is left NaN.

    On a few values eager may be right by luck; `usual` is then what it makes on many.
    """
    assert result.shape == exact.shape and not result.isnan().any()
    if result.numel() == 0:
        return
    error, allowed = testing.rms(result.double() - exact), testing.rms(eager.double() - exact)
    assert error <= 2 * max(allowed, usual * testing.rms(exact)) + 1e-30


@pytest.mark.parametrize("name", SPECS)
@DRAWN
@given(
    rows=st.sampled_from([0, 1, 2, 3, 7, 12, 13, 29, 150, 301]),
    share=st.sampled_from(["none", 0.1, 0.5, "all", "one expert"]),
    bias=st.booleans(),
    spread=st.booleans(),
    packs=st.booleans(),
    seed=st.integers(0, 99),
)
@example(rows=1, share=0.5, bias=True, spread=True, packs=False, seed=0)
@example(rows=150, share="all", bias=True, spread=True, packs=False, seed=0)
@example(rows=13, share="none", bias=False, spread=False, packs=True, seed=0)
@example(rows=1, share="none", bias=False, spread=False, packs=True, seed=0)
def test_equals_the_meaning(name, threads, rows, share, bias, spread, packs, seed) -> None:
    spec, found = SPECS[name], []
    for number in range(8 * seed, 8 * seed + (1 if rows > 100 else 8)):
        block = block_of(spec, bias=bias, spread=spread, seed=number)
        native.write(block.record, packs=int(packs))
        x, mask = rows_of(spec, rows, number), masks(rows, spec.experts, share, number)
        if rows:
            cpu.force(block, mask)
        result = run(block, x)
        found.append(
            (result, meaning(block, x, mask, x.dtype), meaning(block, x, mask, torch.float64))
        )
        assert torch.equal(result, run(block, x))  # the same bits again
        assert (block.packed is not None) == (packs and rows > 1)
    results = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert_as_good(*results, usual=usual_error(block, spec))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_routes_as_the_router_and_gate_say(name, threads) -> None:
    """Experts whose score is not within rounding of the limit are chosen as the meaning chooses them."""
    spec = replace(SPECS[name], activation="relu(up)", gated=False)
    block = block_of(spec, bias=False)
    # One neuron tells which experts ran: every other weight of the block is zero.
    block.w_up.zero_()[:, 0] = 1
    block.w_down.zero_()
    for e in range(min(spec.experts, spec.out)):
        block.w_down[e * spec.size, e] = 1
    block.w_up[:, 0] = 1
    block.tau.copy_(tau_bits(0.4))
    for rows in (1, 5, 200):
        x = rows_of(spec, rows)
        x[:, 0] = 1
        ran = run(block, x) != 0
        weights = [block.router1.double(), block.router2.double()]
        scores = torch.relu(x.double() @ weights[0].T).matmul(weights[1].T).abs()
        limit = 0.4 * scores.amax(-1, keepdim=True)
        clear = (scores - limit).abs() > (0.03 if spec.bf16 else 1e-4) * limit
        seen = min(spec.experts, spec.out)
        expected = gate.meaning(scores.float(), block.tau)
        assert torch.equal(ran[:, :seen][clear[:, :seen]], expected[:, :seen][clear[:, :seen]])
        assert clear.float().mean() > 0.9


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_an_expert_with_nan_scores_always_runs_and_is_not_compared(name) -> None:
    """Shared experts: at tau = 1 they run beside the largest of the others, as the gate has it."""
    spec = SPECS[name]
    x = rows_of(spec, 100)
    router2 = torch.rand(spec.experts, spec.router).to(x.dtype)
    router2[[0, -1]] = torch.nan
    block = block_of(spec, router2=router2)
    block.tau.copy_(tau_bits(1.0))
    scores = F.linear(F.relu(F.linear(x, block.router1)), block.router2).abs()
    mask = gate.meaning(scores, block.tau)
    best = scores.float().nan_to_num(-1).topk(2).values
    clear = best[:, 0] - best[:, 1] > (0.03 if spec.bf16 else 1e-4) * best[:, 0]
    assert clear.any() and (mask.sum(-1) == 3)[clear].all() and mask[:, [0, -1]].all()
    exact = meaning(block, x, mask, torch.float64)[clear]
    eager = meaning(block, x, mask, x.dtype)[clear]
    assert_as_good(run(block, x)[clear], eager, exact)
    alone = torch.cat([run(block, row[None]) for row in x[clear]])
    assert_as_good(alone, eager, exact)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_row_without_finite_scores_runs_everything(name) -> None:
    """The drop rule leans dense: NaN scores drop nothing, whether tau is 0 or not."""
    spec = SPECS[name]
    x = rows_of(spec, 30)
    router2 = torch.full((spec.experts, spec.router), torch.nan).to(x.dtype)
    block = block_of(spec, router2=router2)
    everything = torch.ones(30, spec.experts, dtype=torch.bool)
    for tau in (0.0, 0.5):
        block.tau.copy_(tau_bits(tau))
        exact = meaning(block, x, everything, torch.float64)
        assert_as_good(run(block, x), meaning(block, x, everything, x.dtype), exact)


@pytest.mark.parametrize("name", ["fp32_odd", "bf16"])
@pytest.mark.parametrize("rows", [0, 1, 20, 200])
def test_given_lists(name, rows, threads) -> None:
    """expert_mlp by C++: the lists of a dispatch, and learnable scalars."""
    spec = replace(SPECS[name], activation=f"{SPECS[name].activation} * p1 + p0 * up", router=1)
    block = block_of(spec)
    x, mask = rows_of(spec, rows), masks(rows, spec.experts, 0.4, 0)
    lists, weights = dispatch(mask), block.weights().values()
    scalars = [torch.tensor(0.5, dtype=x.dtype), torch.tensor([2.0], dtype=x.dtype)]
    given_ = (x, *lists, *weights, None, scalars, spec.activation)
    assert expert_cpu.accepts(*given_)
    wide = [None if w is None else w.double() for w in weights]
    exact = expert_mlp.meaning(
        x.double(), *lists, *wide, None, [s.double() for s in scalars], spec.activation
    )
    assert_as_good(expert_cpu.run(*given_), expert_mlp.meaning(*given_), exact)


def test_given_lists_may_hold_no_pair() -> None:
    """No expert runs, where it once was all of them: a tensor without elements has no address."""
    block = block_of(replace(SPECS["fp32"], router=1))
    x, mask = rows_of(SPECS["fp32"], 4), masks(4, SPECS["fp32"].experts, 0.5, 0)
    tokens, offsets, slots = dispatch(torch.zeros_like(mask))
    weights = block.weights() | {"b_down": None}
    given = (tokens[:0].clone(), offsets, slots, *weights.values(), None, [], block.activation)
    assert expert_cpu.accepts(x, *given)
    assert not expert_cpu.run(x, *given).any()


def test_given_lists_refuse_what_they_do_not_compute() -> None:
    spec = replace(SPECS["fp32"], router=1)
    block = block_of(spec)
    x, lists = rows_of(spec, 4), dispatch(masks(4, spec.experts, 0.5, 0))
    weights, text = list(block.weights().values()), spec.activation
    assert expert_cpu.accepts(x, *lists, *weights, None, [], text)
    noise = torch.ones(4, spec.experts * spec.size)
    assert not expert_cpu.accepts(x, *lists, *weights, noise, [], text)
    assert not expert_cpu.accepts(x.double(), *lists, *weights, None, [], text)
    assert not expert_cpu.accepts(x, *lists, *weights, None, [torch.ones(2)], text)
    assert not expert_cpu.accepts(x, *lists, *weights, None, [], "cast(up, dtype='int32')")
    turned = [w if w is None or w.dim() < 2 else w.t().contiguous().t() for w in weights]
    assert not expert_cpu.accepts(x, *lists, *turned, None, [], text)


def test_op_runs_the_kernel_and_the_reference_agrees() -> None:
    """Through the dispatcher: 3-D and non-contiguous rows; forced masks mean the same in the reference."""
    block = block_of(SPECS["fp32"])
    cpu.force(block, testing.routing_masks(5, SPECS["fp32"].experts, 0.5))
    x = rows_of(SPECS["fp32"], 12).view(3, 4, -1).transpose(0, 1)
    result = dynamic_mlp(x, block.record, 64)
    assert cpu.accepts(x, block.record, 64)
    torch.testing.assert_close(result, dynamic_mlp.meaning(x, block.record, 64))
    assert result.shape == x.shape


def test_a_record_outlives_its_block_without_harm() -> None:
    block = block_of(SPECS["fp32"])
    record, x = block.record, rows_of(SPECS["fp32"], 2)
    del block
    from d2dcompile.errors import KernelError

    with pytest.raises(KernelError, match="detached or converted again"):
        cpu.run_out(x, record, 64, out=torch.empty(2, 64))


def test_a_block_that_dies_while_a_graph_is_traced_gives_up_its_record() -> None:
    """Garbage is collected anywhere, also where a FakeTensorMode takes every op."""
    block = block_of(SPECS["fp32_tiny"])
    record = block.record
    assert cpu.fill(block) and native.read(record, "run") != 0
    with FakeTensorMode():
        del block
        gc.collect()
    assert native.read(record, "run") == 0


def test_blocks_that_cannot_be_kernels_say_why() -> None:
    block = block_of(SPECS["fp32"])
    spec, weights = cpu.spec_of(block), block.weights()
    assert native.refusal(spec, weights) is None
    half = {name: None if w is None else w.half() for name, w in weights.items()}
    assert "float32 or all bfloat16" in str(native.refusal(spec, half))
    mixed = {**weights, "w_down": weights["w_down"].bfloat16()}
    assert "float32 or all bfloat16" in str(native.refusal(spec, mixed))
    meta = {name: None if w is None else w.to("meta") for name, w in weights.items()}
    assert "not on a CPU" in str(native.refusal(spec, meta))
    turned = {**weights, "w_up": weights["w_up"].t().contiguous().t()}
    assert "neuron-major" in str(native.refusal(spec, turned))


def test_too_small_a_block_is_not_worth_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(SPECS["fp32"])
    monkeypatch.setattr(native, "SMALLEST", 1 << 16)
    assert "too few" in str(cpu.refusal(block))


def test_source_is_deterministic_and_differs_by_what_matters() -> None:
    texts = {name: native.source(spec) for name, spec in SPECS.items()}
    assert len(set(texts.values())) == len(texts)
    assert native.source(replace(SPECS["fp32"])) == texts["fp32"]
    assert not any(line.startswith('#include "') for line in texts["fp32"].splitlines())


def test_record_fields_are_those_of_the_struct() -> None:
    """FIELDS and struct Site list the same names in the same order."""
    text = (native.SKELETONS / "site.h").read_text()
    body = text.split("struct Site {")[1].split("};")[0]
    names: list[str] = []
    for line in body.splitlines():
        declared = line.split("//")[0].strip().rstrip(";")
        if declared:
            parts = declared.replace("const ", "").split(" ", 1)[1]
            names += [part.strip(" *") for part in parts.split(",")]
    assert tuple(names) == native.FIELDS


def test_no_memory_is_a_typed_error() -> None:
    assert "fewer tokens" in str(native.no_memory(7))


def test_without_a_compiler_blocks_run_as_separate_ops_and_one_warning_says_how_to_change_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from d2dcompile.errors import DenseFallbackWarning

    monkeypatch.setenv("CXX", "no-such-compiler")
    for cached in (build.compiler, build.load, build._warn, native.library):
        cached.cache_clear()
    try:
        monkeypatch.setattr(build, "_cached", broken)
        with pytest.warns(DenseFallbackWarning, match="Install"):
            assert native.library(SPECS["fp32"]) is None
        block = Prepared(
            **{f: getattr(REFERENCE, f) for f in ("router1", "router2", "tau")},
            **REFERENCE.weights(),
            activation=GELU,
        )
        assert not cpu.fill(block)
        x = rows_of(SPECS["fp32"], 3)
        assert torch.equal(
            dynamic_mlp(x, block.record, 64), dynamic_mlp.meaning(x, block.record, 64)
        )
    finally:
        for cached in (build.compiler, build.load, build._warn, native.library):
            cached.cache_clear()


def broken(source: str) -> ctypes.CDLL:
    raise RuntimeError("internal compiler error")


@pytest.fixture(autouse=True, scope="module")
def _reference():
    global REFERENCE
    before, native.SMALLEST = native.SMALLEST, 0
    REFERENCE = block_of(SPECS["fp32"])
    native.SMALLEST = before


def test_all_pairs_of_threads_and_schedules_agree() -> None:
    """The two schedules for many rows compute the same up to the order of sums."""
    block = block_of(SPECS["bf16"])
    x = rows_of(SPECS["bf16"], 100)
    cpu.force(block, testing.routing_masks(100, SPECS["bf16"].experts, 0.3))
    results = []
    before = torch.get_num_threads()
    for count, fused in itertools.product((1, 2), (0, 1000)):
        torch.set_num_threads(count)
        native.write(block.record, fused_rows=fused)
        results.append(run(block, x).float())
    torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-2, atol=2e-2)
