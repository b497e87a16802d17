"""Match the plain feed-forward block, down(act(up(x))).

    h = act(x W_up^T + b_up)        x [..., D]   W_up [H, D]
    y = h W_down^T + b_down         W_down [D, H]

act is any elementwise expression of h; biases are optional. A block that makes what attention reads, or
reads what it gives, stands for a projection: it has a role, and its output may have another width.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Miss
from .around import role_of
from .base import Match, Unfit
from .block import check, make, whole
from .canonicalize import View
from .linear import Linear
from .region import walk

PROJECTIONS_TOO = ("adapter", "deeper_mlp", "pooled_head")  # what looks like these around attention


@dataclass(frozen=True)
class MatchFFN:
    """Rule for blocks with one linear before the activation.

    accept: decoys (see `passes.decoys`) that this rule takes for blocks, e.g. ("adapter",).
    """

    accept: tuple[str, ...] = ()
    kind: ClassVar[str] = "ffn"

    def match(self, view: View, down: Linear) -> Match | Miss:
        """The block whose last linear is `down`, or why there is none."""
        region = walk(view, down)
        if isinstance(region, Miss):
            return region
        if not region.leaves:
            return Miss(down.node, "no linear layer feeds its activation")
        if len(region.leaves) > 1:
            return Unfit(down.node, f"{len(region.leaves)} linears feed it; one or two expected")
        leaf = next(iter(region.leaves.values()))
        if not whole(region.leaves):
            return Miss(down.node, "only one half of a fused projection is used")
        if leaf.linear.d_out != down.d_in:
            return Miss(
                down.node, f"its {down.d_in} inputs are not the {leaf.linear.d_out} hidden ones"
            )
        role = role_of(view, leaf.linear, down)
        accept = (*self.accept, *PROJECTIONS_TOO) if role else self.accept
        problem = check(view, down, region, accept, role)
        if problem is not None:
            return problem
        return make(view, self.kind, down, region, {"up": leaf.linear}, {"v0": "up"}, role)
