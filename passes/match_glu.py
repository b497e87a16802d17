"""Match the gated feed-forward block, down(f(gate(x), up(x))), most often f = act(gate) * up.

    g = x W_gate^T + b_gate         x [..., D]   W_gate, W_up [H, D]
    u = x W_up^T + b_up             or both halves of one W_gate_up [2 H, D], either order
    y = f(g, u) W_down^T + b_down   W_down [D, H]

The gate is the operand under the nonlinearity; where both or neither are, the one computed first.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Miss
from .base import Match, Unfit
from .block import check, make, whole
from .canonicalize import View
from .halves import Leaf
from .linear import Linear
from .region import Region, walk


@dataclass(frozen=True)
class MatchGLU:
    """Rule for blocks with two linears, or one fused linear, before the activation.

    accept: decoys (see `passes.decoys`) that this rule takes for blocks, e.g. ("adapter",).
    """

    accept: tuple[str, ...] = ()
    kind: ClassVar[str] = "glu"

    def match(self, view: View, down: Linear) -> Match | Miss:
        """The block whose last linear is `down`, or why there is none."""
        region = walk(view, down)
        if isinstance(region, Miss):
            return region
        if len(region.leaves) != 2:
            return Unfit(down.node, f"{len(region.leaves)} linears feed it; two expected")
        first, second = region.leaves.values()
        names = _names(view, region)
        if whole(region.leaves):
            sizes = {first.linear.d_out, second.linear.d_out, down.d_in}
            roles = {names[v]: leaf.linear for v, leaf in region.leaves.items()}
            roles = {role: roles[role] for role in ("gate", "up")}
        elif first.linear is second.linear and _are_halves(first, second):
            sizes = {first.linear.d_out // 2, down.d_in}
            roles = {"gate_up": first.linear}
        else:
            return Miss(
                down.node, "its gate and up values are not the two halves of one projection"
            )
        if len(sizes) > 1:
            return Miss(
                down.node, f"gate, up and down disagree on the hidden size: {sorted(sizes)}"
            )
        problem = check(view, down, region, self.accept)
        if problem is not None:
            return problem
        return make(view, self.kind, down, region, roles, names)


def _are_halves(first: Leaf, second: Leaf) -> bool:
    return {first.half, second.half} == {0, 1} and first.interleaved == second.interleaved


def _names(view: View, region: Region) -> dict[str, str]:
    """Which variable is the gate and which is up."""
    v0, v1 = region.leaves
    under = [region.expression.nonlinear_in(v) for v in (v0, v1)]
    if under[0] != under[1]:
        gate = v0 if under[0] else v1
    else:
        leaves = region.leaves
        gate = min(leaves, key=lambda v: (view.order[leaves[v].linear.node], leaves[v].half or 0))
    return {v: "gate" if v == gate else "up" for v in (v0, v1)}
