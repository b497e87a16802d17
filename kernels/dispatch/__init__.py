"""dispatch: which tokens each expert runs and which experts each token runs, as two lists of pairs.

mask [..., E] bool, T rows, N = sum of the mask   ->
    tokens [T * E] int32, offsets [E + 1] int32     sorted by expert, then by token
    slots [T, E + 1] int32                          by token
Expert e owns tokens[offsets[e] : offsets[e + 1]]; offsets[0] = 0 and offsets[E] = N. Token t runs
k = slots[t, 0] experts; slots[t, 1 : k + 1] are the places of its pairs in `tokens`, rising, so that what
pairs wrote can be added up per token in the order of the experts, without atomics.
What lies behind the N pairs, or behind a token's k, means nothing: buffers have the worst-case size, so
that no shape depends on data (CUDA-graph capture, fake tensors). An expert may own no token.
"""

import torch
from torch import Tensor

from ..base import op


@op(version=2)
def dispatch(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lists (tokens, offsets, slots), all int32; see the module for the layout. Unused places are 0."""
    flat = mask.reshape(-1, mask.shape[-1])
    tokens = torch.zeros(flat.numel(), dtype=torch.int32, device=mask.device)
    experts, chosen = flat.t().nonzero().unbind(1)
    tokens[: len(chosen)] = chosen.to(torch.int32)
    offsets = torch.zeros(flat.shape[1] + 1, dtype=torch.int32, device=mask.device)
    offsets[1:] = flat.sum(0, dtype=torch.int32).cumsum(0)
    slots = offsets.new_zeros(flat.shape[0], flat.shape[1] + 1)
    slots[:, 0] = flat.sum(1, dtype=torch.int32)
    places = flat.cumsum(1)[chosen, experts]
    slots[chosen, places] = torch.arange(len(chosen), dtype=torch.int32, device=mask.device)
    return tokens, offsets, slots


def buffers(like: Tensor, rows: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised lists for T rows and E experts."""
    tokens = like.new_empty(rows * experts, dtype=torch.int32)
    offsets = like.new_empty(experts + 1, dtype=torch.int32)
    return tokens, offsets, like.new_empty(rows, experts + 1, dtype=torch.int32)


@dispatch.fake
def _(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    experts = mask.shape[-1]
    return buffers(mask, mask.numel() // experts, experts)


@dispatch.flops
def _(mask: Tensor, **_: object) -> int:
    return 0


dispatch.autograd(lambda ctx, *grads: None, lambda ctx, inputs, output: None)

from . import gpu as gpu  # noqa: E402  (registers the Triton implementation of the op above)
