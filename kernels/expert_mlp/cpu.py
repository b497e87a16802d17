"""expert_mlp on CPUs, in C++: the kernels of kernels.native for lists that are given.

Weights are packed as they are read, since the op has nowhere to keep a copy: about twice the bytes of a
call whose weights are packed, and no Python between experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import expert_mlp


def _spec(x: Tensor, offsets: Tensor, weights: Mapping[str, Any], activation: str) -> native.Spec:
    experts, w_up = offsets.numel() - 1, weights["w_up"]
    return native.Spec(
        d=x.shape[-1],
        out=weights["w_down"].shape[1],
        experts=experts,
        size=w_up.shape[0] // experts,
        router=1,
        gated=weights["w_gate"] is not None,
        bf16=w_up.dtype == torch.bfloat16,
        activation=activation,
    )


def accepts(x: Tensor, tokens: Tensor, offsets: Tensor, slots: Tensor, *others: Any) -> bool:
    """Whether all is on the CPU in one supported dtype, and nothing but plain experts is asked for."""
    *slabs, noise, scalars, activation = others
    weights = dict(zip(native.SLABS, slabs, strict=True))
    if noise is not None or x.device.type != "cpu" or x.dtype != weights["w_up"].dtype:
        return False
    if any(scalar.numel() != 1 for scalar in scalars):
        return False
    spec = _spec(x, offsets, weights, activation)
    return native.refusal(spec, weights) is None and native.library(spec) is not None


def run(
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
    """The block's output from the chosen experts, [..., D]."""
    weights = dict(zip(native.SLABS, (w_up, w_gate, w_down, b_up, b_gate, b_down), strict=True))
    found = native.library(_spec(x, offsets, weights, activation))
    assert found is not None
    record, x = native.table(), x.contiguous()
    values = torch.stack([s.detach().reshape(()).float() for s in scalars]) if scalars else None
    native.write_weights(record, weights)
    native.write(record, scalars=values)
    y = x.new_empty(*x.shape[:-1], w_down.shape[1], dtype=w_down.dtype)
    rows = x.numel() // x.shape[-1]
    lists = (tokens.contiguous(), offsets.contiguous())
    operands = [native.address(t) for t in (record, x, y)]
    status = found.d2d_run_lists(*operands, native.count(rows), *map(native.address, lists))
    if status != native.RAN:
        raise native.no_memory(rows)
    return y


expert_mlp.impl("cpu", run, accepts=accepts)
