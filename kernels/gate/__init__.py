"""gate: mask[t, e] = not (scores[t, e] < limit[t]), which experts a token runs.

scores [..., E] any float dtype, >= 0 as routers give them   mask [..., E] bool
tau [] int32 holding the bits of an fp32 number, which the rule reads:

    "max"    limit = tau * max_j scores[j]            0 <= tau <= 1; 0 runs everything (the paper's rule)
    "top_k"  limit = the k-th largest score           k = tau >= 1; k >= E runs everything
    "top_p"  limit = the score at which the sum of the row's scores in falling order reaches the
             share p of the whole sum                 0 <= p = tau <= 1; 1 runs everything

All in fp32, sums in fp64, and written as "drop if below", so that every rule leans to dense. Traps:
- A NaN score is never compared and never dropped: its expert runs, and the limit is that of the others.
  Experts that are always on have a router row of NaN. A row of nothing but NaN runs everything.
- A row of zeros runs everything. Beside positive scores, "top_k" and "top_p" drop a zero, so that fewer
  than k may run, and "max" does for every tau > 0.
- Scores equal to the limit run: ties make "top_k" run more than k, as bf16 scores often do.
- At least one expert runs: the largest score is never below the limit.
Szatkowski et al. 2024, arXiv:2310.04361, section 3.3 ("max"); top-k is MoEfication's rule (Zhang et al.
2022, arXiv:2110.01786), top-p that of arXiv:2509.00454, with ties kept as there.
"""

import struct

import torch
from torch import Tensor

from ...errors import KernelError
from ..base import op

RULES = ("max", "top_k", "top_p")


@op(version=2)
def gate(scores: Tensor, tau: Tensor, rule: str = "max") -> Tensor:
    """The mask of chosen experts, [..., E] bool; see the module for the rules."""
    values, number = scores.float(), tau.view(torch.float32)
    unknown = values.isnan()
    known = torch.where(unknown, -1.0, values)
    if rule == "max":
        return ~(values < number * known.amax(dim=-1, keepdim=True))
    ranked = known.sort(dim=-1, descending=True).values
    everything = ranked[..., :1] <= 0  # no score to choose by
    if rule == "top_k":
        compared = (~unknown).sum(-1, keepdim=True)
        place = number.clamp(1, scores.shape[-1]).long() - 1
        limit = ranked.gather(-1, place.expand_as(compared))
        everything = everything | (number >= compared)
    elif rule == "top_p":
        sums = ranked.clamp_min(0).double().cumsum(-1)
        reached = sums >= number * sums[..., -1:]
        limit = ranked.gather(-1, reached.int().argmax(-1, keepdim=True))
        everything = everything | (number >= 1)
    else:
        raise KernelError(f"gate got the rule {rule!r}; expected one of {', '.join(RULES)}.")
    return everything | ~((values < limit) | (values <= 0))


@gate.fake
def _(scores: Tensor, tau: Tensor, rule: str = "max") -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@gate.flops
def _(scores: Tensor, tau: Tensor, rule: str = "max", **_: object) -> int:
    return 0  # comparisons; multiply-adds are what is counted


gate.autograd(lambda ctx, grad: (None, None, None), lambda ctx, inputs, output: None)


def tau_bits(tau: float, device: torch.device | str = "cpu") -> Tensor:
    """The threshold as the op takes it: a 0-dim int32 tensor with the bits of fp32 `tau`.

    Integer storage survives `.to(bfloat16)`, which would shift a float (0.3 becomes 0.30078).
    """
    return torch.tensor(
        struct.unpack("<i", struct.pack("<f", tau))[0], dtype=torch.int32, device=device
    )
