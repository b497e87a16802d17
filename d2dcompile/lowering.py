"""lower: which generated kernels run a graph's converted sites: one on a CPU, two ops on a GPU, or none.

On a GPU sites that read one x share these two ops, unless gradients are recorded.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence, Set

import torch

from .errors import D2DWarning
from .gpu_blocks import FEW
from .gpu_candidates import text as spelt
from .gpu_schedules import choose
from .kernels import build, native
from .kernels.base import requested
from .kernels.device import has_triton
from .kernels.dynamic_mlp import cpu
from .kernels.expert_mlp.call import NAMES, of_native, source_or_none
from .kernels.expert_mlp.gpu import MOST_EXPERTS
from .kernels.router_hidden import cpu as router_hidden
from .load import Load
from .passes import Match
from .passes.forms import Form, operand_names
from .passes.names import dtype_of
from .state import State

log = logging.getLogger(__name__)
BLOCK = {"dynamic_mlp": {"gate", "dispatch", "expert_mlp"}}  # op and what it does
ROUTED = {"route": {"gate", "dispatch"}}
COPIED = {"expert_mlp_int8": {"expert_mlp"}}
GROUPED = {"routes": {"route"}}, {"expert_mlps": {"expert_mlp"}}
REPORTED = (1, 64, 4096)  # tokens of a call that a report names the schedules of


def lower(
    matches: Sequence[Match],
    states: Mapping[str, State],
    packs: bool,
    int8: bool,
    inductor: bool,
) -> dict[str, Form]:
    """What stands for each site in the rewritten graph, by name; kernels for CPUs are built in parallel.

    matches: converted matches of one graph, with their attached states by site name. packs: whether
    kernels may keep a copy of the weights; int8: whether one token, on GPUs few, runs on an int8 copy.
    inductor: whether Inductor compiles the graph.
    """
    forms: dict[str, Form] = {found.site.name: "ops" for found in matches}
    chosen: dict[str, State] = {}
    for found in matches:
        state = states[found.site.name]
        if state.learning is not None and torch.is_grad_enabled():
            forms[found.site.name] = "learning"
            continue
        reason = _chosen_otherwise(state)
        if _on_gpu(state):
            if reason is None and _requested(ROUTED) is None:
                alone = torch.is_grad_enabled() or any(map(_requested, GROUPED))
                forms[found.site.name] = "routed" if alone else "grouped"
                if int8:
                    reason = _no_int8(found, state)
                    if reason is None:
                        forms[found.site.name] = "int8"
                    else:
                        log.info("site %s runs without int8: %s", found.site.name, reason)
            continue
        reason = reason or _requested(BLOCK) or _unsuited(found, state) or _scalars(found)
        reason = reason or _no_kernel(state)
        if reason is None:
            chosen[found.site.name] = state
        else:
            log.info("site %s runs as separate ops: %s", found.site.name, reason)
    build.load_all((native.source(_spec(state)) for state in chosen.values()), progress=True)
    blocks = {name: state.prepared(packs, int8) for name, state in chosen.items()}
    for state in chosen.values():
        state.steer()
    for name, block in blocks.items():
        if int(block.record[0]):
            forms[name] = "record"
    left = [name for name, form in forms.items() if form not in ("record", "int8", "learning")]
    if int8 and left and not torch.is_grad_enabled():
        warnings.warn(
            f"int8=True has no effect on {len(left)} of {len(forms)} blocks ({', '.join(left[:3])}"
            f"{', ...' if len(left) > 3 else ''}): no kernel with int8 weights runs them; "
            "log d2dcompile.lowering says why.",
            D2DWarning,
            stacklevel=2,
        )
    if inductor and "record" in forms.values():
        cpu.lower()
        router_hidden.lower()
    return forms


def running(state: State) -> str:
    """How an attached site runs here and why, for a report: kernel or ops, dense or not, copies."""
    if _on_gpu(state):
        return _on_gpu_text(state)
    reason = _chosen_otherwise(state) or _requested(BLOCK) or _no_kernel(state)
    if reason is not None:
        return f"separate ops, since {reason}"
    text = [f"one kernel, {_spec(state)}"]
    share, rows = state.expected_share(), state.dense_rows
    if rows:
        limit = max(limit for n, limit in state.schedule.break_even if n >= rows)
        text.append(
            f"dense from {rows} tokens on, since the executed share is expected to be {share:.2f}, "
            f"above the break-even of {limit:.2f}"
        )
    if state.packed_bytes:
        text.append(f"copies of {state.packed_bytes / 1e6:.1f} MB")
    return "; ".join(text)


def _on_gpu_text(state: State) -> str:
    """Which schedules a site's Triton kernels follow at the share that is expected, dense ones among them."""
    weight, share = state.weight("down"), state.expected_share()
    copied = state.int8_bytes
    chosen = {}
    for n in REPORTED:
        spec = of_native(_spec(state), weight.dtype, int8=bool(copied) and n <= FEW)
        chosen[n] = choose(spec, Load(n, share), weight.device, dense=True)
    listed = "; ".join(f"{n} tokens: {spelt(schedule)}" for n, schedule in chosen.items())
    apart = _chosen_otherwise(state) or _requested(ROUTED)
    routing = f"routing as separate ops, since {apart}; " if apart else ""
    int8 = f"; decode on int8 copies of {copied / 1e6:.1f} MB" if copied else ""
    return (
        f"{routing}Triton kernels, an executed share of {share:.2f} being expected; {listed}{int8}"
    )


def _on_gpu(state: State) -> bool:
    """Whether a site's weights are where Triton kernels run."""
    return has_triton() and state.weight("down").device.type == "cuda"


def _chosen_otherwise(state: State) -> str | None:
    """Why kernels cannot choose a site's experts, or None if they can."""
    if state.exact is not None:
        return "the exact norms of its experts are compared"
    return None if state.rule == "max" else f"kernels know the rule 'max', not {state.rule!r}"


def _requested(whole: Mapping[str, Set[str]]) -> str | None:
    """Which implementations D2D_IMPL asks for that a kernel of several ops would pass over, or None."""
    (name, parts), *_ = whole.items()
    others = [
        f"{op}:{wanted}"
        for op, wanted in sorted(requested().items())
        if op in parts or (op == name and wanted == "reference")
    ]
    return f"D2D_IMPL asks for {', '.join(others)}" if others else None


def _spec(state: State) -> native.Spec:
    return native.spec_of(state.experts, state.weight("down").dtype)


def _no_kernel(state: State) -> str | None:
    """Why there is no kernel for a site's weights here, or None if there is."""
    operands = dict(zip(operand_names(state.site), state.operands(), strict=True))
    return native.refusal(_spec(state), {name: operands.get(name) for name in native.SLABS})


def _no_int8(found: Match, state: State) -> str | None:
    """Why few tokens of a site on a GPU cannot run on an int8 copy of its weights, or None if they can."""
    reason = _unsuited(found, state) or _requested(COPIED)
    if reason is not None:
        return reason
    first, *others = (state.weight(role).dtype for role in state.site.params)
    if first not in NAMES or any(dtype != first for dtype in others):
        return "its weights are not all of one dtype that GPU kernels have"
    spec = of_native(_spec(state), first)
    if spec.experts > MOST_EXPERTS or source_or_none(spec) is None:
        return "no Triton kernel runs its experts"
    return None


def _scalars(found: Match) -> str | None:
    return "its activation has learnable scalars" if found.scalars else None


def _unsuited(found: Match, state: State) -> str | None:
    """Why kernels for inference on a site's own weights cannot run it in this graph, or None if they can."""
    weights = state.weight("down").dtype
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if found.noise is not None:
        return "it has active dropout inside"
    if found.dtype not in (None, weights) or dtype_of(found.x) not in (None, weights):
        return "its input is computed in another dtype than its weights"
    return None
