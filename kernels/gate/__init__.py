"""gate: mask[t, e] = not (scores[t, e] < tau * max_j scores[t, j]), which experts a token runs.

scores [..., E] any float dtype   tau [] int32 holding the bits of an fp32 number   mask [..., E] bool
The comparison runs in fp32. It is written as "drop if below", so that it leans to dense: a NaN score
or maximum keeps the expert, an all-zero row keeps all, and the arg-max is always kept
(0 <= tau <= 1, and scores >= 0 as
routers give them).
Szatkowski et al. 2024, arXiv:2310.04361, section 3.3; tau is the paper's (0 runs everything).
"""

import struct

import torch
from torch import Tensor

from ..base import op


@op(version=1)
def gate(scores: Tensor, tau: Tensor) -> Tensor:
    """The mask of chosen experts, [..., E] bool; see the module for the rule."""
    values = scores.float()
    limit = tau.view(torch.float32) * values.amax(dim=-1, keepdim=True)
    return ~(values < limit)


@gate.fake
def _(scores: Tensor, tau: Tensor) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@gate.flops
def _(scores: Tensor, tau: Tensor, **_: object) -> int:
    return 0  # comparisons; multiply-adds are what is counted


gate.autograd(lambda ctx, grad: (None, None), lambda ctx, inputs, output: None)


def tau_bits(tau: float, device: torch.device | str = "cpu") -> Tensor:
    """The threshold as the op takes it: a 0-dim int32 tensor with the bits of fp32 `tau`.

    Integer storage survives `.to(bfloat16)`, which would shift a float (0.3 becomes 0.30078).
    """
    return torch.tensor(
        struct.unpack("<i", struct.pack("<f", tau))[0], dtype=torch.int32, device=device
    )
