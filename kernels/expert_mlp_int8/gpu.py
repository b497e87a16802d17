"""expert_mlp_int8 in Triton: the strategy "decode" (kernels/gpu/decode.py) on the copy, others on weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ...gpu_blocks import FEW
from .. import device
from ..expert_mlp import gpu
from ..int8 import Copy
from . import expert_mlp_int8


def accepts(
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
    q_up: Tensor,
    q_gate: Tensor | None,
    q_down: Tensor,
    scales: Tensor,
    unit: Tensor,
    scalars: list[Tensor],
    activation: str,
) -> bool:
    """Whether expert_mlp's kernels take the operands, and the copy is what they read, on the same device."""
    numbers = [q for q in (q_up, q_gate, q_down) if q is not None]
    copy = (*numbers, scales, unit)
    slabs, biases = (w_up, w_gate, w_down), (b_up, b_gate, b_down)
    return (
        all(q.dtype == torch.int8 for q in numbers)
        and scales.dtype == unit.dtype == torch.float32
        and all(part.is_contiguous() for part in copy)
        and device.takes(copy, x.device)
        and gpu.accepts(x, tokens, offsets, slots, *slabs, *biases, None, scalars, activation)
    )


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
    q_up: Tensor,
    q_gate: Tensor | None,
    q_down: Tensor,
    scales: Tensor,
    unit: Tensor,
    scalars: list[Tensor],
    activation: str,
) -> Tensor:
    """The block's output from the chosen experts, [..., D]."""
    few = x.shape[:-1].numel() <= FEW
    copy = Copy(q_up, q_gate, q_down, scales, unit) if few else None
    weights = w_up, w_gate, w_down, b_up, b_gate, b_down
    return gpu.run_with(copy, x, (tokens, offsets, slots), weights, scalars, activation)


device.register(expert_mlp_int8, run, accepts)
