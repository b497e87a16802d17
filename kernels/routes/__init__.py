"""routes: route of several sites that read one x, whose routers may share their first layer.

    lists_i = route(x, router1[reads[i]], router2[i], tau[i])      i = 0 .. sites - 1

x [..., D]   router1: one [R, D] for each distinct first layer   router2: [E_i, R] of each site, of each
its own E_i   tau: [] int32 of each site   reads: for each site the number of the first layer it reads
Returns tokens, offsets and slots (see dispatch) of the first site, then those of the next, and so on.
Inference only. Szatkowski et al. 2024, arXiv:2310.04361, section 3.3, of whose routers each has a first
layer of its own.
"""

from torch import Tensor

from ..base import op
from ..dispatch import buffers
from ..route import route


@op(version=1)
def routes(
    x: Tensor,
    router1: list[Tensor],
    router2: list[Tensor],
    tau: list[Tensor],
    reads: list[int],
) -> list[Tensor]:
    """The lists of the experts that each row of x runs, of all sites."""
    found: list[Tensor] = []
    for number, second, threshold in zip(reads, router2, tau, strict=True):
        found += route(x, router1[number], second, threshold)
    return found


@routes.fake
def _(
    x: Tensor,
    router1: list[Tensor],
    router2: list[Tensor],
    tau: list[Tensor],
    reads: list[int],
) -> list[Tensor]:
    rows = x.numel() // x.shape[-1]
    return [made for second in router2 for made in buffers(x, rows, second.shape[0])]


@routes.flops
def _(
    x: Tensor,
    router1: list[Tensor],
    router2: list[Tensor],
    tau: list[Tensor],
    reads: list[int],
    **_: object,
) -> int:
    """Two FLOPs per multiply-add: each first layer once, each second one."""
    weights = sum(layer.numel() for layer in (*router1, *router2))
    return 2 * (x.numel() // x.shape[-1]) * weights


from . import gpu as gpu  # noqa: E402  (registers the Triton implementation of the op above)
