"""routes in Triton: the launches of route (kernels/gpu/route.py) for several sites, as one each.

A first layer that sites share is computed once.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from .. import device
from ..beside import launch_beside
from ..dispatch.gpu import block_rows
from ..launching import Launched, noting
from ..route import gpu as single
from ..route.gpu import Router
from . import routes


def accepts(
    x: Tensor,
    router1: list[Tensor],
    router2: list[Tensor],
    tau: list[Tensor],
    reads: list[int],
) -> bool:
    """Whether the kernels of each site's route take its operands."""
    parts = zip(reads, router2, tau, strict=True)
    return all(single.accepts(x, router1[n], second, limit) for n, second, limit in parts)


def run(
    x: Tensor,
    router1: list[Tensor],
    router2: list[Tensor],
    tau: list[Tensor],
    reads: list[int],
) -> list[Tensor]:
    """The lists of the experts that each row of x runs, of all sites."""
    x = x.reshape(-1, x.shape[-1]).contiguous()
    firsts = [layer.contiguous() for layer in router1]
    parts = zip(reads, router2, tau, strict=True)
    sites = [Router(x, firsts[n], second.contiguous(), limit) for n, second, limit in parts]
    if len(x) == 0:
        for site in sites:
            site.lists[1].zero_()
    elif len(x) <= min(block_rows(site.experts) for site in sites):
        _few(sites, reads)
    else:
        _many(sites, reads)
    return [made for site in sites for made in site.lists]


def _few(sites: list[Router], reads: list[int]) -> None:
    with noting() as hidden:
        parts = {n: site.hidden_few() for n, site in _leaders(sites, reads).items()}
    with noting() as rest:
        for number, site in zip(reads, sites, strict=True):
            site.route_few(parts[number])
    launch_beside(hidden)
    launch_beside(rest)


def _many(sites: list[Router], reads: list[int]) -> None:
    """Sites with a first layer of their own make masks of x, others of the hidden values they share."""
    block, uses = min(block_rows(site.experts) for site in sites), Counter(reads)
    with noting() as hidden:
        shared = {
            n: site.hidden_many(block) for n, site in _leaders(sites, reads).items() if uses[n] > 1
        }
    with noting() as alone:
        own = {i: site.route_many(block) for i, site in enumerate(sites) if uses[reads[i]] == 1}
    with noting() as given:
        others = {
            i: site.route_given(shared[reads[i]], block)
            for i, site in enumerate(sites)
            if uses[reads[i]] > 1
        }
    with noting() as rest:
        for i, made in (own | others).items():
            sites[i].write_lists(*made, block)
    for launches in (hidden, alone, given):
        if launches:
            launch_beside(launches)
    for name in ("add_up", "write_lists"):
        launches = [item for item in rest if item.name == name]
        if launches:
            launch_beside(launches)


def _leaders(sites: list[Router], reads: list[int]) -> dict[int, Router]:
    """The first site that reads each first layer, by the layer's number."""
    found: dict[int, Router] = {}
    for number, site in zip(reads, sites, strict=True):
        found.setdefault(number, site)
    return found


def launches(
    d: int,
    widths: list[int],
    experts: list[int],
    reads: list[int],
    tokens: int,
    dtype: torch.dtype,
) -> list[Launched]:
    """What routing so many tokens launches, without data and without a device.

    widths: R of each first layer. experts: E of each site.
    """

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    seconds = [new(count, widths[n]) for count, n in zip(experts, reads, strict=True)]
    taus = [new(dtype=torch.int32) for _ in experts]
    with noting() as noted:
        run(new(tokens, d), [new(width, d) for width in widths], seconds, taus, reads)
    return noted


device.register(routes, run, accepts)
