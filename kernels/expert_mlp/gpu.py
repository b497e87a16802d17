"""expert_mlp in Triton: generated kernels for many tokens (kernels/gpu/experts.py) and few (decode.py).

Four strategies lead to the same sums; `d2dcompile.gpu_blocks` says which, `gpu_schedules` when and how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...gpu_blocks import GpuSchedule
from ...gpu_schedules import SHARE, choose
from ...load import Load
from .. import device, native
from ..int8 import Copy
from . import expert_mlp
from .call import Call, source_or_none, spec_of

MOST_EXPERTS = 1024
EXPECTED: dict[int, float] = {}
"""Executed shares to expect of attached sites, by the address of w_up's values.

Schedules are chosen for them; where none is known, the lists are obeyed, else every expert may run.
"""


def accepts(x: Tensor, tokens: Tensor, offsets: Tensor, slots: Tensor, *others: Any) -> bool:
    """Whether all is on one device in one supported dtype, and nothing but plain experts is asked for."""
    *slabs, noise, scalars, activation = others
    given = [t for t in (x, *slabs) if t is not None]
    if noise is not None or x.dtype not in device.DTYPES or any(t.dtype != x.dtype for t in given):
        return False
    if any(s.numel() != 1 for s in scalars) or offsets.numel() - 1 > MOST_EXPERTS:
        return False
    if not device.takes((*given, tokens, offsets, slots, *scalars), x.device):
        return False
    w_up, w_gate, w_down = slabs[:3]
    return source_or_none(spec_of(x, offsets, w_up, w_gate, w_down, activation)) is not None


def run(
    x: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    slots: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    noise: Tensor | None,
    scalars: list[Tensor],
    activation: str,
) -> Tensor:
    """The block's output from the chosen experts, [..., D]."""
    weights = w_up, w_gate, w_down, b_up, b_gate, b_down
    return run_with(None, x, (tokens, offsets, slots), weights, scalars, activation)


def run_with(
    copy: Copy | None,
    x: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    slabs: Sequence[Tensor | None],
    scalars: list[Tensor],
    activation: str,
) -> Tensor:
    """The block's output [..., D] from slabs and biases, and for few tokens from an int8 copy if given."""
    y, call, chosen = prepare(x, lists, slabs, scalars, activation, copy)
    if len(call.rows):
        with device.on(x.device):
            call.run(chosen)
    return y


def prepare(
    x: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    slabs: Sequence[Tensor | None],
    scalars: list[Tensor],
    activation: str,
    copy: Copy | None = None,
) -> tuple[Tensor, Call, GpuSchedule]:
    """Room for an output [..., OUT], the call that fills it, and the schedule that it is to follow.

    slabs: in the order of `native.SLABS`.
    """
    weights = dict(zip(native.SLABS, slabs, strict=True))
    w_up, w_down = weights["w_up"], weights["w_down"]
    assert w_up is not None and w_down is not None
    spec = spec_of(x, lists[1], w_up, weights["w_gate"], w_down, activation, copy is not None)
    rows = x.reshape(-1, spec.d).contiguous()
    y = rows.new_empty(*x.shape[:-1], spec.out)
    expected = EXPECTED.get(w_up.data_ptr())
    load = Load(max(1, len(rows)), SHARE if expected is None else expected)
    chosen = choose(spec, load, x.device, dense=expected is not None)
    return y, Call(spec, rows, lists, weights, scalars, y.view(-1, spec.out), copy), chosen


device.register(expert_mlp, run, accepts)
