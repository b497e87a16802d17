"""expert_mlps: expert_mlp of several sites that read one x, in a list of outputs.

    y_i = expert_mlp(x, lists_i, slabs_i, f)      i = 0 .. sites - 1

x [..., D]   lists: tokens, offsets and slots (see dispatch) of each site, one site after another
slabs: w_up, w_gate, w_down, b_up, b_gate, b_down of each site likewise, None where a site has none; sizes
and output widths may differ, D, dtype and f may not   f: an activation of expert_mlp without scalars
Inference only: it has no gradient. Szatkowski et al. 2024, arXiv:2310.04361, equation 4.
"""

from typing import TypeVar

from torch import Tensor

from ..base import op
from ..expert_mlp import expert_mlp
from ..expert_mlp import pairs as executed
from ..native import SLABS

T = TypeVar("T")


@op(version=1)
def expert_mlps(
    x: Tensor, lists: list[Tensor], slabs: list[Tensor | None], activation: str
) -> list[Tensor]:
    """The outputs [..., OUT_i] from the chosen experts of each site."""
    return [
        expert_mlp(x, *own, *weights, None, [], activation)
        for own, weights in zip(of_sites(lists, 3), of_sites(slabs, len(SLABS)), strict=True)
    ]


def of_sites(flat: list[T], count: int) -> list[list[T]]:
    """A list in parts of `count`, one for each site."""
    return [flat[i : i + count] for i in range(0, len(flat), count)]


@expert_mlps.fake
def _(x: Tensor, lists: list[Tensor], slabs: list[Tensor | None], activation: str) -> list[Tensor]:
    downs = [weights[SLABS.index("w_down")] for weights in of_sites(slabs, len(SLABS))]
    lead = x.shape[:-1]
    return [x.new_empty(*lead, d.shape[1], dtype=d.dtype) for d in downs if d is not None]


@expert_mlps.flops
def _(
    x: Tensor, lists: list[Tensor], slabs: list[Tensor | None], activation: str, **_: object
) -> int:
    """Two FLOPs per multiply-add of the executed experts."""
    total = 0
    for (tokens, offsets, _slots), weights in zip(
        of_sites(lists, 3), of_sites(slabs, len(SLABS)), strict=True
    ):
        size = sum(w.numel() for w in weights[:3] if w is not None)
        total += 2 * executed(tokens, offsets) * size // (offsets.numel() - 1)
    return total


from . import gpu as gpu  # noqa: E402  (registers the Triton implementation of the op above)
