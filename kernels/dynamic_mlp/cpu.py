"""dynamic_mlp on CPUs: the generated kernels of kernels.native behind the op, and behind Inductor.

A block's weights are read where they lie for one token, or from an int8 copy that the first such call makes
where `Prepared.int8` says so; for more, the first call packs a copy, unless `Prepared.packs` says no, in
which case each call packs what it needs.
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache

import torch
from torch import Tensor

from ...ir import Schedule
from .. import build, native
from ..native import Spec, address, read, write
from . import Prepared, dynamic_mlp

ATTEMPTS = 4  # of a first call: both copies, another thread's, and the run
_COPYING = threading.Lock()  # of copies of weights: a second one would free what kernels read


def spec_of(block: Prepared) -> Spec:
    """What a block's kernels depend on."""
    hidden, d = block.w_up.shape
    return Spec(
        d=d,
        out=block.w_down.shape[1],
        experts=block.experts,
        size=hidden // block.experts,
        router=block.router1.shape[0],
        gated=block.w_gate is not None,
        bf16=block.w_up.dtype == torch.bfloat16,
        activation=block.activation,
    )


def refusal(block: Prepared) -> str | None:
    """Why a block cannot run as one kernel, or None if it can."""
    return native.refusal(spec_of(block), block.weights())


def fill(block: Prepared) -> bool:
    """Complete a block's record for its kernels; False where there are none."""
    if refusal(block) is not None:
        return False
    found = native.library(spec_of(block))
    if found is None or build.call() is None:
        return False
    router = torch.empty(found.d2d_lanes(1), dtype=torch.int32)
    parts = [t.detach().contiguous() for t in (block.router1, block.router2)]
    found.d2d_pack_router(*map(address, parts), address(router))
    block.kept = [router]
    native.write_weights(block.record, block.weights())
    run = ctypes.cast(found.d2d_run_shared, ctypes.c_void_p).value
    write(block.record, run=run, router=router, tau=block.tau)
    write(block.record, packs=int(block.packs), quantises=int(block.int8))
    return True


def schedule(block: Prepared, chosen: Schedule, share: float) -> None:
    """Let a block's kernels follow a schedule, `share` of the experts being expected to run."""
    native.write_schedule(block.record, chosen)
    write(block.record, dense_rows=chosen.dense_rows(share))


def force(block: Prepared, masks: Tensor | None) -> None:
    """Let every call use these masks [rows, E] instead of the gate's, the router still being computed."""
    block.forced = None if masks is None else masks.to("cpu", torch.bool).contiguous()
    rows = 0 if block.forced is None else len(block.forced)
    write(block.record, forced=block.forced, forced_rows=rows)


def pack(block: Prepared) -> None:
    """Make the block's packed copy and let its kernels use it; without memory they pack as they run."""
    write(block.record, packs=0)
    block.packed = _copy(block, 0, "d2d_pack")
    write(block.record, packed=block.packed)


def quantise(block: Prepared) -> None:
    """Make the block's int8 copy and let one token use it; without memory it reads the model's weights."""
    write(block.record, quantises=0)
    block.quantised = _copy(block, 2, "d2d_pack_int8")
    write(block.record, quantised=block.quantised)


def _copy(block: Prepared, kind: int, entry: str) -> Tensor | None:
    """A copy of the block's weights for kernels, of d2d_lanes(kind) lanes; None if memory is short."""
    found = native.library(spec_of(block))
    assert found is not None
    try:
        with torch.inference_mode(False):
            copy = torch.empty(found.d2d_lanes(kind), dtype=torch.int32)
    except RuntimeError:  # the allocator's "not enough memory"
        return None
    getattr(found, entry)(address(block.record), address(copy))
    return copy


def run_out(x: Tensor, record: Tensor, width: int, *, out: Tensor) -> Tensor:
    """dynamic_mlp into `out`, for contiguous x and out."""
    call = build.call()
    assert call is not None
    try:
        call(record, x, out, x.numel())
    except RuntimeError:
        _attend(x, record, None, width, out)
    return out


def run_given_out(x: Tensor, record: Tensor, hidden: Tensor, width: int, *, out: Tensor) -> Tensor:
    """dynamic_mlp with a shared first router layer into `out`, all contiguous."""
    call = build.call(given=True)
    assert call is not None
    try:
        call(record, x, hidden, out, x.numel())
    except RuntimeError:
        _attend(x, record, hidden, width, out)
    return out


def _attend(x: Tensor, record: Tensor, hidden: Tensor | None, width: int, out: Tensor) -> None:
    """What the kernel could not do: copy weights at a first call, or run a block without a kernel."""
    block, rows = Prepared.of(record), x.numel() // x.shape[-1]
    if not read(record, "run"):
        out.copy_(dynamic_mlp.meaning(x, record, width, hidden))
        return
    parts = (record, x, out) if hidden is None else (record, x, hidden, out)
    call = build.call(given=hidden is not None)
    assert call is not None
    for attempt in range(ATTEMPTS):
        with _COPYING:
            if rows == 1 and read(record, "quantises"):
                quantise(block)
            elif read(record, "packs"):
                pack(block)
            elif attempt:  # at first another thread may have made what this one asked for
                break
        try:
            call(*parts, x.numel())
            return
        except RuntimeError:
            continue
    raise native.no_memory(rows) from None


def run(x: Tensor, record: Tensor, width: int, hidden: Tensor | None = None) -> Tensor:
    """dynamic_mlp as an implementation of the op."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], width)
    if hidden is None:
        return run_out(x, record, width, out=out)
    return run_given_out(x, record, hidden.contiguous(), width, out=out)


def accepts(x: Tensor, record: Tensor, width: int, hidden: Tensor | None = None) -> bool:
    """Whether the record is complete and x has its weights' dtype, as a given hidden has."""
    block = Prepared.of(record)
    same = x.device.type == "cpu" and x.dtype == block.w_up.dtype and read(record, "run") != 0
    if hidden is None or not same:
        return same
    found = native.library(spec_of(block))
    return hidden.dtype == x.dtype and found is not None and bool(found.d2d_shareable())


dynamic_mlp.impl("cpu", run, accepts=accepts)


@lru_cache(maxsize=1)
def lower() -> None:
    """Let Inductor compile the op to a direct call of `run_out`."""
    build.lower_to_out(dynamic_mlp.overload, "d2d_dynamic_mlp", run_out, run_given_out)
