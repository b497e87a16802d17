"""lower: which converted sites of a graph run as one generated kernel, and which as separate ops."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from .attachment import State
from .kernels import build
from .kernels.dynamic_mlp import Prepared, cpu
from .passes import Match
from .passes.names import dtype_of

log = logging.getLogger(__name__)


def lower(
    matches: Sequence[Match],
    states: Mapping[str, State],
    packs: bool,
    int8: bool,
    inductor: bool,
) -> frozenset[str]:
    """Names of the sites that become one call of dynamic_mlp, their kernels built in parallel.

    matches: converted matches of one graph, with their attached states by site name. packs: whether
    kernels may keep a copy of the weights; int8: whether one token runs on an int8 copy. inductor:
    whether Inductor compiles the graph.
    """
    blocks: dict[str, Prepared] = {}
    for found in matches:
        reason = _refusal(found, states[found.site.name], packs, int8)
        if reason is None:
            blocks[found.site.name] = states[found.site.name].prepared(packs, int8)
        else:
            log.info("site %s runs as separate ops: %s", found.site.name, reason)
    ready = frozenset(name for name, block in blocks.items() if int(block.record[0]))
    if ready and inductor:
        cpu.lower()
    return ready


def _refusal(found: Match, state: State, packs: bool, int8: bool) -> str | None:
    """Why a converted site cannot be one call of a kernel, or None if it can."""
    weights = state.weight("down").dtype
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if found.noise is not None:
        return "it has active dropout inside"
    if found.scalars:
        return "its activation has learnable scalars"
    if found.dtype not in (None, weights) or dtype_of(found.x) not in (None, weights):
        return "its input is computed in another dtype than its weights"
    return build.compiler() or cpu.refusal(state.prepared(packs, int8))
