"""gate: drop an expert iff its score is below tau times the row's largest, leaning to dense."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from d2dcompile.errors import KernelError
from d2dcompile.kernels.gate import RULES, gate, tau_bits

BOUNDED = settings(max_examples=40, deadline=None)
NAN, INF = math.nan, math.inf
TAUS = st.floats(0, 1, width=32)
NUMBERS = st.floats(0, width=32)  # infinity included; scores are absolute values
ANY = NUMBERS | st.just(NAN)


@st.composite
def tables(draw, scores=ANY):
    rows, experts = draw(st.integers(0, 5)), draw(st.integers(1, 7))
    values = draw(st.lists(scores, min_size=rows * experts, max_size=rows * experts))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, experts)


def looped(scores, tau):
    """The rule as a loop over Python floats, every step rounded to fp32 as the op does."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for t, row in enumerate(scores.float().tolist()):
        largest = max((score for score in row if not math.isnan(score)), default=NAN)
        for e, score in enumerate(row):
            mask[t, e] = not score < single(single(tau) * largest)
    return mask


def single(value):
    return struct.unpack("<f", struct.pack("<f", value))[0] if math.isfinite(value) else value


@BOUNDED
@given(tables(), TAUS)
def test_is_the_rule_of_the_paper(scores, tau):
    mask = gate(scores, tau_bits(tau))
    assert mask.dtype is torch.bool
    assert torch.equal(mask, looped(scores, tau))


@BOUNDED
@given(tables(NUMBERS), TAUS)
def test_largest_score_always_runs(scores, tau):
    mask = gate(scores, tau_bits(tau))
    assert mask.gather(1, scores.argmax(1, keepdim=True)).all()


@BOUNDED
@given(tables(), TAUS, TAUS)
def test_raising_tau_never_adds_an_expert(scores, one, other):
    low, high = sorted((one, other))
    assert not (gate(scores, tau_bits(high)) & ~gate(scores, tau_bits(low))).any()


@BOUNDED
@given(tables())
def test_tau_zero_runs_everything(scores):
    assert gate(scores, tau_bits(0.0)).all()


def plainly(scores, number, rule):
    """top_k and top_p over a row at a time in numpy, as the module states them."""
    mask = np.ones(scores.shape, dtype=bool)
    for t, row in enumerate(scores.numpy().astype(np.float64)):
        known = np.sort(row[~np.isnan(row)])[::-1]
        everything = number >= (len(known) if rule == "top_k" else 1)
        if everything or not known.max(initial=0) > 0:
            continue
        if rule == "top_k":
            limit = known[number - 1]
        else:
            with np.errstate(invalid="ignore"):
                wanted, total, count = single(number) * known.sum(), 0.0, 0
            while count < len(known) and not total >= wanted:
                total, count = total + known[count], count + 1
            if math.isnan(wanted):  # no share of infinity
                count = 1
            limit = known[max(count, 1) - 1]
        mask[t] = np.isnan(row) | ((row >= limit) & (row > 0))
    return torch.from_numpy(mask)


TIED = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, NAN])  # sums of these are exact in any order


@BOUNDED
@given(tables(TIED) | tables(NUMBERS | st.just(NAN)), st.integers(1, 9))
def test_top_k_runs_the_k_largest_with_their_ties(scores, k):
    mask = gate(scores, tau_bits(k), "top_k")
    assert torch.equal(mask, plainly(scores, k, "top_k"))
    distinct = [r for r in scores.tolist() if len(set(r)) == len(r) and all(v > 0 for v in r)]
    for row in distinct:
        assert gate(torch.tensor([row]), tau_bits(k), "top_k").sum() == min(k, len(row))


@BOUNDED
@given(tables(TIED), st.sampled_from([0.0, 0.125, 0.5, 0.75, 0.9, 1.0]))
def test_top_p_runs_the_fewest_that_reach_the_share(scores, p):
    mask = gate(scores, tau_bits(p), "top_p")
    assert torch.equal(mask, plainly(scores, p, "top_p"))
    kept, total = ((scores.nan_to_num(0) * m).sum(-1) for m in (mask, torch.ones_like(mask)))
    assert (kept >= single(p) * total - 1e-6).all()


@BOUNDED
@given(tables(ANY), st.sampled_from(["top_k", "top_p"]), TAUS, TAUS)
def test_raising_k_or_p_never_drops_an_expert(scores, rule, one, other):
    low, high = sorted((one, other))
    if rule == "top_k":
        low, high = round(1 + 8 * low), round(1 + 8 * high)
    assert not (gate(scores, tau_bits(low), rule) & ~gate(scores, tau_bits(high), rule)).any()


@BOUNDED
@given(tables(ANY), st.sampled_from([("max", 1), ("top_k", 1), ("top_p", 0)]))
def test_every_rule_runs_the_largest_and_nan(scores, sparsest):
    rule, number = sparsest
    mask = gate(scores, tau_bits(number), rule)
    assert (mask | ~scores.isnan()).all()
    assert mask.gather(1, scores.nan_to_num(-1, posinf=INF).argmax(1, keepdim=True)).all()


@BOUNDED
@given(tables(ANY))
def test_every_rule_has_a_number_that_runs_everything(scores):
    for rule, number in (("max", 0), ("top_k", 7), ("top_p", 1)):
        assert gate(scores, tau_bits(number), rule).all()


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_zeros_or_nan_run_everything_under_every_rule(rule):
    scores = torch.tensor([[0.0, 0.0, 0.0], [NAN, NAN, NAN], [NAN, 0.0, 0.0]])
    assert gate(scores, tau_bits(1.0 if rule != "top_p" else 0.5), rule).all()


def test_an_unknown_rule_is_refused():
    with pytest.raises(KernelError, match=r"'top_q'.*max, top_k, top_p"):
        gate(torch.rand(2, 3), tau_bits(0.5), "top_q")


def test_tau_one_runs_the_largest_and_its_equals():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 0.0, 0.0, 4.999]])
    expected = [[False, True, True, False], [True, False, False, False]]
    assert gate(scores, tau_bits(1.0)).tolist() == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([NAN, 1.0, 0.0], [True, True, False]),  # NaN is kept, and the others are compared
        ([NAN, NAN, NAN], [True, True, True]),
        ([0.0, 0.0, 0.0], [True, True, True]),
        ([INF, 1.0, 0.0], [True, False, False]),
        ([4.0, 2.0, 1.999], [True, True, False]),  # equal to the limit is not below it
    ],
)
def test_leans_to_dense(row, expected):
    """A strange row changes its own row only."""
    plain = [8.0, 1.0, 7.0]
    mask = gate(torch.tensor([plain, row, plain]), tau_bits(0.5))
    assert mask.tolist() == [[True, False, True], expected, [True, False, True]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_compares_other_dtypes_in_fp32(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(64, 16, generator=generator, dtype=torch.float64).to(dtype)
    for tau in (0.0, 0.3, 0.9, 1.0):
        assert torch.equal(gate(scores, tau_bits(tau)), looped(scores, tau))


def test_compares_bf16_scores_with_an_fp32_limit():
    """0.3 in bf16 is 0.30078: a limit rounded to the scores' dtype would drop this expert."""
    scores = torch.tensor([[1.0, 0.30078125]], dtype=torch.bfloat16)
    assert gate(scores, tau_bits(0.3007)).all()
    assert gate(scores, tau_bits(0.301)).tolist() == [[True, False]]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (2, 3, 4), (4,), (1, 1)])
def test_keeps_leading_dimensions(shape):
    assert gate(torch.rand(shape), tau_bits(0.5)).shape == shape


@BOUNDED
@given(TAUS)
def test_tau_keeps_its_fp32_bits(tau):
    bits = tau_bits(tau)
    assert bits.shape == () and bits.dtype is torch.int32
    assert bits.view(torch.float32).item() == tau


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_module_does_not_shift_tau(dtype):
    module = nn.Linear(2, 2)
    module.register_buffer("tau", tau_bits(0.3))
    assert module.to(dtype).weight.dtype is dtype
    assert torch.equal(module.tau, tau_bits(0.3))
    assert torch.equal(module.half().float().tau, tau_bits(0.3))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded"])
def test_registration(layout):
    scores = {
        "contiguous": torch.rand(3, 5),
        "transposed": torch.rand(5, 3).t(),
        "strided": torch.rand(3, 10)[:, ::2],
        "expanded": torch.rand(1, 5).expand(3, 5),
    }[layout]
    torch.library.opcheck(gate.overload, (scores, tau_bits(0.5)))
    for rule in RULES:
        torch.library.opcheck(gate.overload, (scores, tau_bits(0.5), rule))
    torch.library.opcheck(gate.overload, (scores.clone().requires_grad_(), tau_bits(0.5)))


def test_fake_has_the_shape_of_the_scores():
    with FakeTensorMode() as mode:
        scores = mode.from_tensor(torch.rand(2, 3, 4, dtype=torch.bfloat16))
        for rule in RULES:
            mask = gate(scores, mode.from_tensor(tau_bits(0.5)), rule)
            assert mask.shape == (2, 3, 4) and mask.dtype is torch.bool


def test_changing_tau_does_not_recompile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, t: gate(s, t), backend="aot_eager", fullgraph=True)
    scores, tau = torch.rand(4, 6), tau_bits(0.0)
    assert compiled(scores, tau).all()
    with torch._dynamo.config.patch(error_on_recompile=True):
        tau.copy_(tau_bits(1.0))
        assert compiled(scores, tau).sum() == 4
