"""expert_mlp_int8: expert_mlp on weights of 8 bits where tokens are few, on the weights themselves else.

    up to FEW rows of x:  y = expert_mlp(x, *lists, *weights_of(copy), biases, f)
    more:                 y = expert_mlp(x, *lists, w_up, w_gate, w_down, biases, f)

x, lists, slabs, biases, scalars, activation: see expert_mlp   q_up, q_gate, q_down, scales, unit: the copy of
the slabs, see kernels.int8, |q| <= 127.

Only weights are rounded: products of the 8-bit numbers and x in its own dtype are summed in fp32, and
multiplied by a neuron's scale before its bias. An implementation may read the weights themselves for few
tokens too, which is exact, where that is expected to be faster (with most experts in use). Inference only:
it has no gradient.
"""

from typing import Any

from torch import Tensor

from ...gpu_blocks import FEW
from ..base import op
from ..expert_mlp import expert_mlp, pairs
from ..int8 import Copy, weights_of


@op(version=1)
def expert_mlp_int8(
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
    q_up: Tensor,
    q_gate: Tensor | None,
    q_down: Tensor,
    scales: Tensor,
    unit: Tensor,
    scalars: list[Tensor],
    activation: str,
) -> Tensor:
    """The block's output from the chosen experts, [..., D] in w_down's dtype."""
    slabs = w_up, w_gate, w_down
    if x.shape[:-1].numel() <= FEW:
        slabs = weights_of(Copy(q_up, q_gate, q_down, scales, unit), w_down.dtype)
    lists, biases = (tokens, offsets, slots), (b_up, b_gate, b_down)
    result: Tensor = expert_mlp(x, *lists, *slabs, *biases, None, scalars, activation)
    return result


@expert_mlp_int8.fake
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


@expert_mlp_int8.flops
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


from . import gpu as gpu  # noqa: E402  (registers the Triton implementation of the op above)
