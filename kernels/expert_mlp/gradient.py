"""expert_mlp_backward: gradients of expert_mlp, recomputing each expert's hidden values.

Inputs are those of expert_mlp with grad_y [..., D] before them. The result lists the gradients of x,
w_up, w_gate, w_down, b_up, b_gate, b_down and the scalars, in that order and in their dtypes; an
absent operand has an empty tensor. The choice of experts has no gradient (section 3.3 of
arXiv:2310.04361 trains routers apart), tokens that skipped an expert contribute nothing to it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...expr import vjp
from ..base import op
from . import expert_mlp, inputs_of, noise_of, owned, pairs


@op(version=3)
def expert_mlp_backward(
    grad_y: Tensor,
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
) -> list[Tensor]:
    """Gradients of all operands of expert_mlp; see the module for their order."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    wide = torch.float64 if w_down.dtype == torch.float64 else torch.float32
    gx = rows.new_zeros(rows.shape, dtype=wide)
    weights = [_none(x) if w is None else w.new_zeros(w.shape) for w in (w_up, w_gate, w_down)]
    biases = [_none(x) if b is None else b.new_zeros(b.shape) for b in (b_up, b_gate)]
    extra = [scalar.new_zeros(scalar.shape, dtype=wide) for scalar in scalars]
    for t, own in owned(tokens, offsets, w_up.shape[0]):
        xt, gt = rows.index_select(0, t), grads.index_select(0, t).to(w_down.dtype)
        values = inputs_of(xt, own, w_up, w_gate, b_up, b_gate, scalars)
        values.update(noise_of(noise, t, own))
        hidden, slopes = vjp(activation, values, _through(gt, w_down[own]))
        weights[2][own] += hidden.to(gt.dtype).t() @ gt
        gated = () if w_gate is None else (("gate", 1, w_gate),)
        for name, i, weight in (("up", 0, w_up), *gated):
            gx.index_add_(0, t, (slopes[name] @ weight[own]).to(wide))
            weights[i][own] += slopes[name].t() @ xt
            if biases[i].numel():
                biases[i][own] += slopes[name].sum(0)
        for i, total in enumerate(extra):
            total += slopes[f"p{i}"]
    gb = _none(x) if b_down is None else grads.sum(0, dtype=wide).to(b_down.dtype)
    found = [total.to(scalar.dtype) for total, scalar in zip(extra, scalars, strict=True)]
    return [gx.to(x.dtype).reshape(x.shape), *weights, *biases, gb, *found]


def _through(grad: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """From a hidden value to its gradient, in its dtype: the product is made in the weight's own."""
    return lambda hidden: (grad @ weight.t()).to(hidden.dtype)


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0)


@expert_mlp_backward.fake
def _(grad_y: Tensor, x: Tensor, *others: Any) -> list[Tensor]:
    *tensors, scalars, _activation = others
    return [
        _none(x) if o is None else torch.empty_like(o, memory_format=torch.contiguous_format)
        for o in _operands((x, *tensors), scalars)
    ]


@expert_mlp_backward.flops
def _(
    grad_y: Tensor,
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
    """Recomputed up and gate, then two products per matrix."""
    ups = (1 if w_gate is None else 2) * w_up.numel()
    weights = 3 * ups + 2 * w_down.numel()
    return 2 * pairs(tokens, offsets) * weights // (offsets.numel() - 1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, scalars, activation = inputs
    ctx.save_for_backward(*tensors, *scalars)
    ctx.scalars, ctx.activation = len(scalars), activation


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors = saved[: len(saved) - ctx.scalars]
    scalars = list(saved[len(tensors) :])
    found = expert_mlp_backward(grad_y, *tensors, scalars, ctx.activation)
    x, *rest = (
        g if g.numel() or o is not None else None
        for g, o in zip(found, _operands(tensors, scalars), strict=True)
    )
    return x, None, None, None, *rest[:6], None, list(rest[6:]), None


def _operands(tensors: tuple[Any, ...], scalars: list[Tensor]) -> list[Any]:
    x, _tokens, _offsets, _slots, *weights, _noise = tensors
    return [x, *weights, *scalars]


expert_mlp.autograd(_backward, _setup)
