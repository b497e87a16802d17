"""expert_mlp: y[t] = b_down + sum over e in S(t) of f(g_e, u_e) W_down[e], the chosen experts only.

    u_e = x[t] W_up[e]^T + b_up[e]      g_e = x[t] W_gate[e]^T + b_gate[e]      (gated blocks)

x [..., D]   w_up, w_gate, w_down [H, D], neuron-major: expert e owns rows e F to (e + 1) F, F = H / E
b_up, b_gate [H]   b_down [D]   tokens, offsets, slots: see dispatch, S(t) = experts whose list holds t
activation: text of f over up, gate and the scalars p0, p1, ... (d2dcompile.expr)   y [..., D]
noise: [..., H], what active dropout multiplies by: the variable "noise" of the text, without gradient

Each expert's product is rounded to w_down's dtype, the sum over experts is kept in fp32 (fp64 for
fp64 weights) and added in expert order: the same input gives the same bits. With every expert chosen
this is the dense block. Szatkowski et al. 2024, arXiv:2310.04361, equation 4.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...expr import function
from ..base import op


@op(version=3)
def expert_mlp(
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
    """The block's output from the chosen experts, [..., D] in w_down's dtype; one expert at a time."""
    rows = x.reshape(-1, x.shape[-1])
    wide = torch.float64 if w_down.dtype == torch.float64 else torch.float32
    result = rows.new_zeros(*x.shape[:-1], w_down.shape[1], dtype=wide)  # no view: may be changed
    y = result.view(len(rows), w_down.shape[1])
    for t, own in owned(tokens, offsets, w_up.shape[0]):
        values = inputs_of(rows.index_select(0, t), own, w_up, w_gate, b_up, b_gate, scalars)
        values.update(noise_of(noise, t, own))
        hidden = function(activation)(values)
        y.index_add_(0, t, (hidden.to(w_down.dtype) @ w_down[own]).to(wide))
    if b_down is not None:
        y += b_down
    return result.to(w_down.dtype)


def owned(tokens: Tensor, offsets: Tensor, neurons: int) -> list[tuple[Tensor, slice]]:
    """(token indices, neuron slice) of each expert that owns at least one token."""
    bounds = offsets.tolist()
    size = neurons // (len(bounds) - 1)
    return [
        (tokens[start:stop].long(), slice(e * size, (e + 1) * size))
        for e, (start, stop) in enumerate(pairwise(bounds))
        if stop > start
    ]


def noise_of(noise: Tensor | None, t: Tensor, own: slice) -> dict[str, Tensor]:
    """The activation's variable "noise" for one expert's tokens t [n], [n, F], if there is any."""
    if noise is None:
        return {}
    return {"noise": noise.reshape(-1, noise.shape[-1])[:, own].index_select(0, t)}


def inputs_of(
    rows: Tensor,
    own: slice,
    w_up: Tensor,
    w_gate: Tensor | None,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    scalars: list[Tensor],
) -> dict[str, Tensor]:
    """The activation's variables for one expert: up and gate [n, F], and the scalars."""
    values = {"up": F.linear(rows, w_up[own], None if b_up is None else b_up[own])}
    if w_gate is not None:
        values["gate"] = F.linear(rows, w_gate[own], None if b_gate is None else b_gate[own])
    values.update((f"p{i}", scalar) for i, scalar in enumerate(scalars))
    return values


@expert_mlp.fake
def _(
    x: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    slots: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    *_: Any,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], w_down.shape[1], dtype=w_down.dtype)


def pairs(tokens: Tensor, offsets: Tensor) -> int:
    """Executed (token, expert) pairs; the worst case T * E where the offsets hold no data."""
    fake = offsets.is_meta or isinstance(offsets, torch._subclasses.FakeTensor)
    return tokens.numel() if fake else int(offsets[-1])


@expert_mlp.flops
def _(
    x: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    slots: Tensor,
    w_up: Tensor,
    w_gate: Any,
    w_down: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    """Two FLOPs per multiply-add of the executed experts."""
    weights = (1 if w_gate is None else 2) * w_up.numel() + w_down.numel()
    return 2 * pairs(tokens, offsets) * weights // (offsets.numel() - 1)


from . import cpu as cpu  # noqa: E402  (registers the C++ implementation of the op above)
from . import gpu as gpu  # noqa: E402  (registers the Triton one)
from . import gradient as gradient  # noqa: E402  (registers its gradient)
from . import grouped as grouped  # noqa: E402  (registers the gradient's grouped products)
