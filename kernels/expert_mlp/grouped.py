"""expert_mlp_backward as grouped products: torch's own grouped_mm, and sums over a token's experts in Triton.

Pairs (token, expert) are gathered in the order of the lists, N of them; each product of the backward
pass then is one grouped product, and hidden values are computed again instead of kept. N is read by the
host once a call. No atomics: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...expr import vjp
from .. import device, native
from .call import Call, spec_of
from .gradient import _none, expert_mlp_backward

ALIGNED = 16  # bytes that every row of a grouped product's operands has to be a multiple of
ONES = 16  # bytes of a row of ones, by which biases are summed


def accepts(grad_y: Tensor, x: Tensor, *others: Any) -> bool:
    """Whether all is on one device in a dtype that grouped_mm takes there, without noise."""
    tokens, offsets, slots, *slabs, noise, scalars, _activation = others
    given = [t for t in (x, grad_y, *slabs) if t is not None]
    dtypes = (torch.bfloat16,) if x.device.type == "cuda" else device.DTYPES
    if noise is not None or x.dtype not in dtypes or any(t.dtype != x.dtype for t in given):
        return False
    w_up, _w_gate, w_down = slabs[:3]
    sizes = (x.shape[-1], w_down.shape[1], w_up.shape[0] // (offsets.numel() - 1))
    if any(size * x.element_size() % ALIGNED for size in sizes):
        return False
    if any(s.numel() != 1 for s in scalars):
        return False
    return device.takes((*given, tokens, offsets, slots, *scalars), x.device)


def run(
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
    """Gradients of all operands of expert_mlp, in the order of `expert_mlp_backward`."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    pairs = Pairs(tokens[: int(offsets[-1])].long(), offsets)
    xs, gs = rows.index_select(0, pairs.token), grads.index_select(0, pairs.token)
    sides = [("up", w_up, b_up)] + ([] if w_gate is None else [("gate", w_gate, b_gate)])
    values = {name: pairs.times(xs, weight, bias) for name, weight, bias in sides}
    values.update((f"p{i}", scalar) for i, scalar in enumerate(scalars))
    through = pairs.times(gs, w_down)
    hidden, slopes = vjp(activation, values, lambda value: through.to(value.dtype))
    to_x = [pairs.back(slopes[name].to(x.dtype), weight).float() for name, weight, _ in sides]
    weights = [pairs.outer(slopes[name].to(x.dtype), xs) for name, _, _ in sides]
    if w_gate is None:
        weights.append(_none(x))
    biases = [
        pairs.summed(slopes[name].to(x.dtype)) if bias is not None else _none(x)
        for name, bias in (("up", b_up), ("gate", b_gate))
    ]
    gb = _none(x) if b_down is None else grads.sum(0, dtype=torch.float32).to(b_down.dtype)
    spec = spec_of(x, offsets, w_up, None, w_down, "relu(up)")  # whose kernel for sums will do
    slabs: dict[str, Tensor | None] = dict.fromkeys(native.SLABS)
    call = Call(spec, rows, (tokens, offsets, slots), slabs, scalars, rows)
    gx = call.summed(sum(to_x[1:], to_x[0]).to(x.dtype))
    extra = [slopes[f"p{i}"].to(scalar.dtype) for i, scalar in enumerate(scalars)]
    down = pairs.outer(hidden.to(x.dtype), gs)
    return [gx.reshape(x.shape), *weights, down, *biases, gb, *extra]


class Pairs:
    """The pairs of a call as rows: token [N] int64, grouped by expert as `offsets` [E + 1] says."""

    def __init__(self, token: Tensor, offsets: Tensor) -> None:
        self.token, self.ends = token, offsets[1:]

    def _slabs(self, weight: Tensor) -> Tensor:
        return weight.contiguous().view(len(self.ends), -1, weight.shape[1])

    def times(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows[i] W[e]^T + b[e], [N, F] of rows [N, D] and a weight [H, D]."""
        found = F.grouped_mm(rows, self._slabs(weight).transpose(1, 2), offs=self.ends)
        if bias is None:
            return found
        expert = torch.searchsorted(
            self.ends, torch.arange(len(rows), device=rows.device, dtype=torch.int32), right=True
        )
        return found + bias.view(len(self.ends), -1)[expert]

    def back(self, slopes: Tensor, weight: Tensor) -> Tensor:
        """slopes[i] W[e], [N, D] of slopes [N, F]."""
        return F.grouped_mm(slopes, self._slabs(weight), offs=self.ends)

    def outer(self, slopes: Tensor, rows: Tensor) -> Tensor:
        """The gradient [H, D] of a weight: slopes^T rows of each expert's pairs."""
        return F.grouped_mm(slopes.t(), rows, offs=self.ends).flatten(0, 1)

    def summed(self, slopes: Tensor) -> Tensor:
        """The gradient [H] of a bias: each expert's sum of slopes."""
        ones = slopes.new_ones(len(slopes), ONES // slopes.element_size())
        return F.grouped_mm(slopes.t(), ones, offs=self.ends)[..., 0].flatten()


device.register(expert_mlp_backward, run, accepts)
