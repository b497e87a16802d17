"""Random converted blocks, tokens and masks for the tests of the generated kernels, and the exact answer."""

from __future__ import annotations

import torch
from torch import Tensor

from d2dcompile import testing
from d2dcompile.kernels import native
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.dynamic_mlp import Prepared, cpu
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.gate import tau_bits


def block_of(
    spec: native.Spec,
    *,
    bias: bool = True,
    spread: bool = False,
    seed: int = 0,
    router2: Tensor | None = None,
    int8: bool = False,
) -> Prepared:
    """Random operands for a spec; `spread`: rows of the slabs lie apart, as in a fused matrix."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if spec.bf16 else torch.float32
    hidden = spec.experts * spec.size

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    def slab(width: int) -> Tensor:
        return random(hidden, 2 * width + 3)[:, 2 : 2 + width] if spread else random(hidden, width)

    block = Prepared(
        router1=random(spec.router, spec.d),
        router2=random(spec.experts, spec.router) if router2 is None else router2,
        tau=tau_bits(0.0),
        w_up=slab(spec.d),
        w_gate=slab(spec.d) if spec.gated else None,
        w_down=slab(spec.out),
        b_up=random(hidden) if bias else None,
        b_gate=random(hidden) if bias and spec.gated else None,
        b_down=random(spec.out) if bias else None,
        activation=spec.activation,
        int8=int8,
    )
    assert cpu.fill(block)
    return block


def rows_of(spec: native.Spec, rows: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, spec.d, generator=generator)
    return x.to(torch.bfloat16 if spec.bf16 else torch.float32)


def masks(rows: int, experts: int, share, seed: int) -> Tensor:
    if share == "none":
        return torch.zeros(rows, experts, dtype=torch.bool)
    if share == "all" or rows == 0:
        return torch.ones(rows, experts, dtype=torch.bool)
    if share == "one expert":
        return (torch.arange(experts) == seed % experts).expand(rows, experts)
    return testing.routing_masks(rows, experts, share, seed)


def meaning(block: Prepared, x: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """expert_mlp in plain PyTorch with every operand in `dtype`."""
    weights = [None if w is None else w.to(dtype) for w in block.weights().values()]
    lists = dispatch(mask)
    return expert_mlp.meaning(x.to(dtype), *lists, *weights, None, [], block.activation)
