"""Teach the matcher two things of your own: what a fused call means, and a rule.

    python examples/write_a_pass.py

A library runs a whole feed-forward block as one custom operator, so that no linear layer is left in the
captured graph. Registering what the operator means makes its blocks convertible. And a rule of one's own
takes bottleneck blocks for feed-forward blocks, which the built-in rules decline as adapters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2dcompile as d2d
from d2dcompile.passes import MatchFFN, composite, register, unregister


@torch.library.custom_op("example::fused_mlp", mutates_args=())
def fused_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """gelu(x w1^T + b1) w2^T in one call, as a vendor's library would offer it."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2)


@fused_mlp.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w2.shape[0])


class Fused(nn.Module):
    """A residual block that calls the operator."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, h), nn.Linear(h, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + fused_mlp(x, self.up.weight, self.up.bias, self.down.weight)


class Bottleneck(nn.Module):
    """A block with fewer hidden values than features."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Fused(64, 256), Bottleneck(64, 16)).eval()
    x = torch.randn(4096, 64)
    print("before:", [site.name for site in d2d.explain(model, x).sites])

    @composite(torch.ops.example.fused_mlp.default)
    def meaning(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2)

    rule = MatchFFN(accept=("adapter",))
    register(rule)
    try:
        torch.compiler.reset()  # rules apply to graphs captured from now on
        print("after: ", [site.name for site in d2d.explain(model, x).sites])
        conversion = d2d.convert(model, [x], d2d.Config(router_epochs=5), progress=False)
        fast = torch.compile(model, backend="d2dmoe")
        with torch.no_grad():
            difference = (fast(x) - model(x)).abs().max().item()
        print(f"converted {len(conversion.experts)} blocks; tau = 0 differs by {difference:.1e}")
    finally:
        unregister(rule)


if __name__ == "__main__":
    main()
