"""dispatch: the tokens of each expert, as one list sorted by expert and then by token.

mask [..., E] bool, T rows   ->   tokens [T * E] int32, offsets [E + 1] int32
Expert e owns tokens[offsets[e] : offsets[e + 1]]; offsets[0] = 0 and offsets[E] = N = sum of the mask.
Entries from N on are 0 and mean nothing: the buffer has the worst-case size, so that no shape depends
on data (CUDA-graph capture, fake tensors). An expert may own no token.
"""

import torch
from torch import Tensor

from ..base import op


@op(version=1)
def dispatch(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Token lists (tokens [T * E], offsets [E + 1]), both int32; see the module for the layout."""
    flat = mask.reshape(-1, mask.shape[-1])
    tokens = torch.zeros(flat.numel(), dtype=torch.int32, device=mask.device)
    chosen = flat.t().nonzero()[:, 1]
    tokens[: len(chosen)] = chosen.to(torch.int32)
    offsets = torch.zeros(flat.shape[1] + 1, dtype=torch.int32, device=mask.device)
    offsets[1:] = flat.sum(0, dtype=torch.int32).cumsum(0)
    return tokens, offsets


@dispatch.fake
def _(mask: Tensor) -> tuple[Tensor, Tensor]:
    tokens = mask.new_empty(mask.numel(), dtype=torch.int32)
    return tokens, mask.new_empty(mask.shape[-1] + 1, dtype=torch.int32)


@dispatch.flops
def _(mask: Tensor, **_: object) -> int:
    return 0


dispatch.autograd(lambda ctx, *grads: None, lambda ctx, inputs, output: None)
