"""dispatch: the tokens of each expert in one list, sorted by expert and then by token."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from d2dcompile.kernels.dispatch import dispatch

BOUNDED = settings(max_examples=60, deadline=None)


@st.composite
def masks(draw):
    rows, experts = draw(st.integers(0, 9)), draw(st.integers(1, 7))
    bits = draw(st.lists(st.booleans(), min_size=rows * experts, max_size=rows * experts))
    return torch.tensor(bits, dtype=torch.bool).reshape(rows, experts)


def looped(mask):
    """(tokens, offsets) as Python lists, without the padding behind the last offset."""
    tokens, offsets = [], [0]
    for e in range(mask.shape[1]):
        tokens += [t for t in range(len(mask)) if mask[t, e]]
        offsets.append(len(tokens))
    return tokens, offsets


@BOUNDED
@given(masks())
@example(torch.zeros(0, 4, dtype=torch.bool))
@example(torch.zeros(5, 4, dtype=torch.bool))
@example(torch.ones(5, 4, dtype=torch.bool))
@example(torch.ones(1, 1, dtype=torch.bool))
@example(torch.eye(4, dtype=torch.bool)[[2, 2, 2]])  # one expert owns every token
@example(torch.eye(4, dtype=torch.bool)[[0, 3, 3]])  # two experts in the middle own none
def test_lists_the_tokens_of_each_expert(mask):
    tokens, offsets, _ = dispatch(mask)
    expected, bounds = looped(mask)
    assert offsets.tolist() == bounds
    assert tokens[: bounds[-1]].tolist() == expected


@BOUNDED
@given(masks())
def test_buffers_have_the_worst_case_size(mask):
    tokens, offsets, slots = dispatch(mask)
    assert slots.shape == (len(mask), mask.shape[1] + 1) and slots.dtype is torch.int32
    assert tokens.shape == (mask.numel(),) and tokens.dtype is torch.int32
    assert offsets.shape == (mask.shape[1] + 1,) and offsets.dtype is torch.int32
    assert not tokens[mask.sum() :].any()  # padding is 0, an index that is always in range


@BOUNDED
@given(masks())
def test_mask_comes_back_from_the_lists(mask):
    tokens, offsets, slots = dispatch(mask)
    sizes = offsets.diff()
    assert offsets[0] == 0 and (sizes >= 0).all()
    again = torch.zeros_like(mask)
    again[tokens[: offsets[-1]].long(), torch.arange(mask.shape[1]).repeat_interleave(sizes)] = True
    assert torch.equal(again, mask)
    experts = torch.arange(mask.shape[1]).repeat_interleave(sizes)
    for t, (count, *places) in enumerate(slots.tolist()):
        assert [tokens[i] for i in places[:count]] == [t] * count
        assert experts[places[:count]].tolist() == mask[t].nonzero().flatten().tolist()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0), (1, 1, 1)])
def test_rows_are_the_flattened_leading_dimensions(lead):
    mask = torch.rand(*lead, 5) < 0.5
    flat = mask.reshape(-1, 5)
    for found, expected in zip(dispatch(mask), dispatch(flat), strict=True):
        assert torch.equal(found, expected)
    assert dispatch(mask)[1].tolist() == looped(flat)[1]


def test_takes_a_mask_of_any_layout():
    mask = torch.rand(6, 5) < 0.5
    for view in (mask.t().contiguous().t(), mask.repeat_interleave(2, dim=1)[:, ::2]):
        assert not view.is_contiguous()
        assert torch.equal(dispatch(view)[0], dispatch(mask)[0])


@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(4, 3) < 0.5,
        (torch.rand(3, 4) < 0.5).t(),
        torch.zeros(4, 3, dtype=torch.bool),
        torch.zeros(0, 3, dtype=torch.bool),
        torch.rand(2, 4, 3) < 0.5,
    ],
    ids=["plain", "transposed", "nothing chosen", "no rows", "leading dimensions"],
)
def test_registration(mask):
    torch.library.opcheck(dispatch.overload, (mask,))


def test_fake_does_not_depend_on_data():
    with FakeTensorMode() as mode:
        lists = dispatch(mode.from_tensor(torch.zeros(2, 3, 4, dtype=torch.bool)))
    assert [part.shape for part in lists] == [(24,), (5,), (6, 5)]
    assert all(part.dtype is torch.int32 for part in lists)
