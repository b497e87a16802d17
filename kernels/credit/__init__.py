"""credit: y as it is; on the way back, router scores get a gradient, although the choice has none.

    dL/ds_e(t) = task <dL/dy(t), f_e(x(t))> / m(t)      e in S(t): as if the pair weighed s_e / m
               + fit dR/ds_e(t)                       every e: the router's own loss, of exact norms

s [..., E] scores >= 0, m(t) their largest, held fixed   y [..., D]   f_e(x) what expert e adds to y
R = mean over tokens and experts of huber((s_e - n_e) / max_j n_j), n_e = |f_e(x)| ** exponent, with what
    `fitting.RelativeLoss` says of tokens to which no expert adds anything
aims [3] fp32: task, fit, exponent. All others as for expert_mlp; norms are those without dropout.

The first line is the straight-through gradient of y = sum over S(t) of (s_e / m) f_e(x): what the loss
would change by, had an executed expert a little more weight. It costs the hidden values of the executed
experts once more, the second line those of all experts. Both are left out where their factor is 0.
Scores of real tokens are larger than 0; a row of zeros gets no task gradient. The choice itself and tau
have none (arXiv:2310.04361, section 3.3, trains routers apart, by the second line).
"""

from typing import Any

import torch
from torch import Tensor

from ...expr import function
from ...fitting import RelativeLoss
from ...router import expert_norms, gram
from ..base import op
from ..expert_mlp import inputs_of, noise_of, owned


@op(version=1)
def credit(
    y: Tensor,
    scores: Tensor,
    aims: Tensor,
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
    """y itself, [..., D]; see the module for the gradient of the scores."""
    return y.clone()


@credit.fake
def _(y: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(y)


@op(version=1)
def credit_backward(
    grad_y: Tensor,
    scores: Tensor,
    aims: Tensor,
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
    """The gradient of the scores, [..., E] in their dtype."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    rows, grads = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    s = scores.reshape(-1, scores.shape[-1]).to(wide)
    task, fit, exponent = aims.tolist()
    total = torch.zeros_like(s)
    slabs = (w_up, w_gate, b_up, b_gate, scalars)
    if task:
        most = s.amax(1)
        for e, (t, own) in _lists(tokens, offsets, len(w_up)):
            values = inputs_of(rows.index_select(0, t), own, *slabs)
            values.update(noise_of(noise, t, own))
            hidden = function(activation)(values).to(w_down.dtype)
            back = grads.index_select(0, t).to(w_down.dtype) @ w_down[own].t()
            worth = (hidden.to(wide) * back.to(wide)).sum(1)
            peak = most.index_select(0, t)
            total[t, e] = torch.where(peak > 0, task * worth / peak, 0)
    if fit:
        values = inputs_of(rows, slice(None), *slabs)
        values["noise"] = rows.new_ones(())
        parts = function(activation)(values).reshape(len(rows), s.shape[1], len(w_up) // s.shape[1])
        norms = expert_norms(parts, gram(w_down.reshape(s.shape[1], -1, w_down.shape[1])))
        goal = norms.to(wide).pow(exponent)
        if len(goal):
            total += fit * RelativeLoss.of(goal).slope(s, goal)
    return total.to(scores.dtype).reshape(scores.shape)


def _lists(tokens: Tensor, offsets: Tensor, neurons: int) -> Any:
    """(expert, (its tokens, its neurons)) of each expert that owns a token."""
    size = neurons // (offsets.numel() - 1)
    return [(own.start // size, (t, own)) for t, own in owned(tokens, offsets, neurons)]


@credit_backward.fake
def _(grad_y: Tensor, scores: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _y, *tensors, scalars, activation = inputs
    ctx.save_for_backward(*tensors, *scalars)
    ctx.scalars, ctx.activation = len(scalars), activation


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors = saved[: len(saved) - ctx.scalars]
    scalars = list(saved[len(tensors) :])
    found = credit_backward(grad_y, *tensors, scalars, ctx.activation)
    return grad_y, found, *(None,) * (len(tensors) - 1), [None] * ctx.scalars, None


credit.autograd(_backward, _setup)
