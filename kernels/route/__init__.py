"""route: which experts each token runs, from the token: router, gate and dispatch in one.

    scores = |relu(x router1^T) router2^T|      tokens, offsets, slots = dispatch(gate(scores, tau))

x [..., D], T rows   router1 [R, D]   router2 [E, R], no biases   tau [] int32 (see gate)
tokens [T * E], offsets [E + 1], slots [T, E + 1] int32: see dispatch.
Kernels keep scores in fp32, plain PyTorch rounds them to the weights' dtype: a pair whose score lies
within that rounding of the limit may be decided differently. The choice has no gradient.
Szatkowski et al. 2024, arXiv:2310.04361, section 3.3.
"""

import torch.nn.functional as F
from torch import Tensor

from ..base import op
from ..dispatch import buffers, dispatch
from ..gate import gate


@op(version=1)
def route(
    x: Tensor, router1: Tensor, router2: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The lists (tokens, offsets, slots) of the experts that each row of x runs."""
    scores = F.linear(F.relu(F.linear(x, router1)), router2).abs()
    lists: tuple[Tensor, Tensor, Tensor] = dispatch(gate(scores, tau))
    return lists


@route.fake
def _(x: Tensor, router1: Tensor, router2: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return buffers(x, x.numel() // x.shape[-1], router2.shape[0])


@route.flops
def _(x: Tensor, router1: Tensor, router2: Tensor, tau: Tensor, **_: object) -> int:
    """Two FLOPs per multiply-add of both layers."""
    return 2 * (x.numel() // x.shape[-1]) * (router1.numel() + router2.numel())


route.autograd(lambda ctx, *grads: (None,) * 4, lambda ctx, inputs, output: None)

from . import gpu as gpu  # noqa: E402  (registers the Triton implementation of the op above)
