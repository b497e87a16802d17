"""Gradients added on the way back: what goes through an activation unchanged, and how the loss is scaled.

Both are identities forward. Backward they call ops, which look their owner up by key when they run: step,
weight and scale may change between calls of one compiled graph, and a recomputed forward pass
(activation checkpoints) adds nothing by itself.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Live(Protocol):
    """Who says what is added: `seed` is the gradient at the loss, `slope` the penalty's at a tap."""

    model: nn.Module
    seed: Tensor | None

    def slope(self, index: int, values: Tensor) -> Tensor: ...


_KEYS = itertools.count()
_LIVE: weakref.WeakValueDictionary[int, Live] = weakref.WeakValueDictionary()


def enter(live: Live) -> int:
    """A new key by which backward passes find `live`, as long as it lives or until `leave`."""
    key = next(_KEYS)
    _LIVE[key] = live
    return key


def is_penalised(model: nn.Module) -> bool:
    """Whether anything is added in the backward passes of a model."""
    return any(live.model is model for live in _LIVE.values())


def leave(key: int) -> None:
    """Let backward passes with this key add nothing."""
    _LIVE.pop(key, None)


@torch.library.custom_op(
    "d2d::sparsity_slope_v1", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _slope(grad: Tensor, values: Tensor, key: int, index: int) -> Tensor:
    """The gradient of an activation with that of its penalty added.

    An op, because step, weight, scale and statistics are looked up when a compiled backward pass runs;
    it finds them by `key`, and adds nothing once they are gone.
    """
    live, result = _LIVE.get(key), grad.clone()
    return result if live is None else result.add_(live.slope(index, values))


@_slope.register_fake
def _(grad: Tensor, values: Tensor, key: int, index: int) -> Tensor:
    return torch.empty_like(grad)


@torch.library.custom_op(
    "d2d::sparsity_seed_v1", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _seed(grad: Tensor, share: Tensor | None, key: int) -> Tensor:
    """The gradient of the loss, noted; all other gradients depend on the result, so come later."""
    live = _LIVE.get(key)
    if live is not None:
        live.seed = grad.clone() if share is None else grad * share
    return grad.clone()


@_seed.register_fake
def _(grad: Tensor, share: Tensor | None, key: int) -> Tensor:
    return torch.empty_like(grad)


class _Penalised(torch.autograd.Function):
    """Its input; backward, the gradient with the penalty's added."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, key: int, index: int, copied: bool) -> Tensor:
        ctx.save_for_backward(values)
        ctx.site = (key, index)
        return values.clone() if copied else values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (values,) = ctx.saved_tensors
        return torch.ops.d2d.sparsity_slope_v1(grad, values, *ctx.site), None, None, None


class _Seed(torch.autograd.Function):
    """The loss; backward, its gradient noted as what the loop multiplies it by."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, share: Tensor | None, key: int) -> Tensor:
        ctx.save_for_backward(share)
        ctx.key = key
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return torch.ops.d2d.sparsity_seed_v1(grad, share, ctx.key), None, None


def penalised(values: Tensor, key: int, index: int, copied: bool) -> Tensor:
    """The values, whose gradient gets that of their penalty added; `copied` if they change in place."""
    result: Tensor = _Penalised.apply(values, key, index, copied)  # type: ignore[no-untyped-call]
    return result


def watched(loss: Tensor, share: Tensor | None, key: int) -> Tensor:
    """The loss, whose gradient, times the share that the call is of a step, is noted as the scale."""
    result: Tensor = _Seed.apply(loss, share, key)  # type: ignore[no-untyped-call]
    return result


def with_loss(output: Any, watch: Callable[[Tensor], Tensor]) -> Any:
    """A model's output with its loss replaced: itself, the entry "loss", or the first of a tuple."""
    if _is_scalar(output):
        return watch(output)
    if isinstance(output, MutableMapping) and _is_scalar(output.get("loss")):
        output["loss"] = watch(output["loss"])
    elif type(output) is tuple and output and _is_scalar(output[0]):
        return (watch(output[0]), *output[1:])
    return output


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad


def share_of(kwargs: Mapping[str, Any], shifts: bool) -> Tensor | None:
    """The share of an accumulated batch that a call is, where the caller says how large that is.

    Hugging Face's Trainer divides the sum over a micro-batch's labels by `num_items_in_batch`, the labels
    of all micro-batches of the step, so that the gradient at the loss is 1 for each of them.
    """
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return None
    counted = labels[..., 1:] if shifts else labels
    share: Tensor = (counted != -100).sum() / items
    return share


def shifts_labels(model: nn.Module) -> bool:
    """Whether Hugging Face counts the labels of a model without the first of each row."""
    decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return decoder and getattr(model, "loss_type", None) == "ForCausalLM"
