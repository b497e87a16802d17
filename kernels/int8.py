"""int8 copies of a block's slabs, in the order in which GPU kernels stream them for few tokens.

    W_up[n] = scales[0, n] q_up[n]    W_gate[n] = scales[1, n] q_gate[n]    (rows n of [H, D])
    W_down[e F + f] = unit scales[-1, e F + f] q_down[e, :, f]              (rows of [H, OUT])

q_up, q_gate [H, D], q_down [E, OUT, F] int8, |q| <= 127: an expert is one run of bytes in each.
scales [2 or 3, H] fp32, a row's largest absolute weight / 127; those of W_down over `unit`, a power of two
[1] fp32, which makes them at most 1: hidden values times them are in a dtype's range where hidden values are.

A row of zeros, or of nothing above 1e-35, has the scale 0. A row with a weight that is not finite has the
scale NaN, which makes every token that chose its expert NaN, and no other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127
LEAST = 1e-35  # of a row's largest weight: below, its reciprocal is not finite and the row is 0
AT_ONCE = 1 << 24  # weights that are fp32 while they are copied


class Copy(NamedTuple):
    """An int8 copy of a block's slabs, see above."""

    q_up: Tensor
    q_gate: Tensor | None
    q_down: Tensor
    scales: Tensor
    unit: Tensor

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self if part is not None)


def copy_of(w_up: Tensor, w_gate: Tensor | None, w_down: Tensor, experts: int) -> Copy:
    """The int8 copy of slabs [H, D] and [H, OUT]."""
    with torch.inference_mode(False), torch.no_grad():
        slabs = [w for w in (w_up, w_gate, w_down) if w is not None]
        parts = [_rounded(slab) for slab in slabs]
        down, scale = parts[-1]
        unit = _unit(scale)
        scales = torch.stack([s for _, s in parts[:-1]] + [scale / unit])
        gate = None if w_gate is None else parts[1][0]
        by_output = down.view(experts, -1, down.shape[1]).transpose(1, 2).contiguous()
        return Copy(parts[0][0], gate, by_output, scales, unit)


def weights_of(copy: Copy, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """The slabs w_up, w_gate, w_down that a copy stands for, each weight rounded once to a dtype."""
    q_up, q_gate, q_down, scales, unit = copy
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    down = q_down.transpose(1, 2).reshape(-1, q_down.shape[1])
    of_down = scales[-1].to(wide) * unit.to(wide)

    def times(q: Tensor, scale: Tensor) -> Tensor:
        return (q.to(wide) * scale.to(wide)[:, None]).to(dtype)

    gate = None if q_gate is None else times(q_gate, scales[1])
    return times(q_up, scales[0]), gate, times(down, of_down)


def _rounded(slab: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and scales [H] of a slab [H, N]; rows not finite are 0 with the scale NaN."""
    q = torch.empty(slab.shape, dtype=torch.int8, device=slab.device)
    scales = torch.empty(len(slab), dtype=torch.float32, device=slab.device)
    rows = max(1, AT_ONCE // max(1, slab.shape[1]))
    for first in range(0, len(slab), rows):
        own = slice(first, first + rows)
        wide = slab[own].float()
        largest = wide.abs().amax(1)
        usable = largest.isfinite() & (largest >= LEAST)
        steps = torch.where(usable[:, None], wide * (LARGEST / largest)[:, None], 0)
        q[own] = steps.round_().to(torch.int8)
        scales[own] = torch.where(usable, largest / LARGEST, largest * 0)  # NaN of infinity too
    return q, scales


def _unit(scales: Tensor) -> Tensor:
    """The smallest power of two that no scale exceeds, [1]; 1 where there is none but 0 and NaN."""
    largest = scales.nan_to_num(0.0).amax(0, keepdim=True)
    return torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)
