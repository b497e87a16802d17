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
    matches: Sequence[Match], states: Mapping[str, State], packs: bool, inductor: bool
) -> frozenset[str]:
    """Names of the sites that become one call of dynamic_mlp, their kernels built in parallel.

    matches: converted matches of one graph, with their attached states by site name. packs: whether
    kernels may keep a copy of the weights. inductor: whether Inductor compiles the graph.
    """
    blocks: dict[str, Prepared] = {}
    for found in matches:
        reason = _refusal(found, states[found.site.name])
        if reason is None:
            blocks[found.site.name] = states[found.site.name].prepared(packs)
        else:
            log.info("site %s runs as separate ops: %s", found.site.name, reason)
    ready = frozenset(name for name, block in blocks.items() if int(block.record[0]))
    if ready and inductor:
        cpu.lower()
    return ready


def _refusal(found: Match, state: State) -> str | None:
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
    return cpu.refusal(state.prepared(True)) if build.compiler() is None else build.compiler()
