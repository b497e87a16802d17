"""exact_scores: what a perfect router would say, the norms of the experts' outputs to a power.

    h = f(x W_up^T, ..)      scores[t, e] = |h_te W_e|_2 ^ exponent, NaN for a shared expert

x [..., D]   w_up, w_gate [H, D]   w_down [H, OUT]   router1 [R, D]   router2 [E, R]   scores [..., E] fp32
For evaluation: it computes every expert. The router's weights give E and the shared experts (rows of
NaN), and its multiply-adds are those that are counted, so that costs compare with a real router's. The
choice has no gradient. Szatkowski et al. 2024, arXiv:2310.04361, section 3.2 (the router's target).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...expr import function
from ...router import expert_norms, gram
from ..base import op
from ..expert_mlp import inputs_of


@op(version=1)
def exact_scores(
    x: Tensor,
    router1: Tensor,
    router2: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    noise: Tensor | None,
    scalars: list[Tensor],
    activation: str,
    exponent: float,
) -> Tensor:
    """The norm of each expert's output for each row of x, to the power of `exponent`, [..., E] fp32."""
    experts, everything = len(router2), slice(None)
    rows = x.reshape(-1, x.shape[-1])
    values = inputs_of(rows, everything, w_up, w_gate, b_up, b_gate, scalars)
    if noise is not None:
        values["noise"] = noise.reshape(-1, noise.shape[-1])
    hidden = function(activation)(values).reshape(len(rows), experts, -1)
    norms = expert_norms(hidden, gram(w_down.reshape(experts, -1, w_down.shape[1])))
    norms = norms.pow(exponent).masked_fill(router2[:, 0].isnan(), torch.nan)
    return norms.reshape(*x.shape[:-1], experts)


@exact_scores.fake
def _(x: Tensor, router1: Tensor, router2: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], router2.shape[0], dtype=torch.float32)


@exact_scores.flops
def _(x: Tensor, router1: Tensor, router2: Tensor, *_: object, **__: object) -> int:
    """Two FLOPs per multiply-add of the router that it stands for."""
    return 2 * (x.numel() // x.shape[-1]) * (router1.numel() + router2.numel())


exact_scores.autograd(lambda ctx, grad: (None,) * 12, lambda ctx, inputs, output: None)
