"""What is measured: the converted stack under given masks. The only file that knows this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from cpu_cases import Case, Layer
from torch import Tensor, nn

from d2dcompile.kernels.dynamic_mlp import Prepared, cpu, dynamic_mlp
from d2dcompile.kernels.gate import tau_bits
from d2dcompile.kernels.native import FIELDS

Call = Callable[[Tensor], Tensor]
TEXTS = {"gelu": "gelu(up)", "relu": "relu(up)", "swiglu": "silu(gate) * up"}


class Stack(nn.Module):
    """x + block(x), layer after layer: what the backend hands to Inductor for a converted stack."""

    def forward(self, x: Tensor, records: list[Tensor]) -> Tensor:
        for record in records:
            x = x + dynamic_mlp.overload(x, record, x.shape[-1])
        return x


def ours(
    case: Case, stack: Sequence[Layer], masks: Sequence[Sequence[Tensor]], int8: bool = False
) -> Call:
    """The stack as a function of x [T, D] whose call n runs the pairs of masks[layer][n % len].

    Router and gate run in every call; the given mask then takes the place of the gate's. int8: whether
    T = 1 runs on int8 copies of the experts (routers stay in the weights' dtype).
    """
    compiled, blocks = _stack(case, stack, int8)
    places = [block.record.numpy() for block in blocks]
    turns = [[mask.contiguous() for mask in layer] for layer in masks]
    addresses = [[mask.data_ptr() for mask in layer] for layer in turns]
    for place, layer in zip(places, turns, strict=True):
        place[FIELDS.index("forced_rows")] = len(layer[0])
    calls, forced = count(), FIELDS.index("forced")

    def run(x: Tensor) -> Tensor:
        n = next(calls)
        for place, layer in zip(places, addresses, strict=True):
            place[forced] = layer[n % len(layer)]
        return compiled(x)

    run.keeps = turns  # type: ignore[attr-defined]
    return run


def everything(case: Case, stack: Sequence[Layer]) -> Call:
    """The stack with every expert on and no router: what a block does above its break-even."""
    compiled, blocks = _stack(case, stack, int8=False)
    for block in blocks:
        block.record[FIELDS.index("dense_rows")] = 1
    return compiled


def _stack(case: Case, stack: Sequence[Layer], int8: bool) -> tuple[Call, list[Prepared]]:
    """The compiled stack as a function of x, and the blocks whose records steer it."""
    blocks = [_block(case, layer, int8) for layer in stack]
    records = [block.record for block in blocks]
    cpu.lower()
    compiled: Any = torch.compile(Stack(), dynamic=False)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return compiled(x, records)

    run.keeps = blocks  # type: ignore[attr-defined]
    return run, blocks


def _block(case: Case, layer: Layer, int8: bool) -> Prepared:
    block = Prepared(
        router1=layer.w1,
        router2=layer.w2,
        tau=tau_bits(0.5),
        w_up=layer.up,
        w_gate=layer.gate,
        w_down=layer.down.t().contiguous(),
        b_up=None,
        b_gate=None,
        b_down=None,
        activation=TEXTS[case.activation],
        int8=int8,
    )
    if not cpu.fill(block):
        raise RuntimeError(f"no kernel for {case}: {cpu.refusal(block)}")
    return block


def ours_int8(case: Case, stack: Sequence[Layer], masks: Sequence[Sequence[Tensor]]) -> Call:
    """The stack with int8 weights, T = 1."""
    return ours(case, stack, masks, int8=True)
