"""router_hidden on CPUs: d2d_hidden of the blocks' own library, behind the op and behind Inductor.

The layer is one product for all sharers instead of one for each.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from .. import build, native
from ..dynamic_mlp.cpu import spec_of
from ..native import Spec, read, write
from . import Layer, router_hidden


def shareable(spec: Spec) -> bool:
    """Whether kernels of a spec share their first layer: rows of x and of h need no padding."""
    found = native.library(spec)
    return found is not None and bool(found.d2d_shareable())


def fill(layer: Layer) -> None:
    """Complete a layer's record for its kernel, if there is one."""
    first = layer.blocks[0]
    if not all(read(block.record, "run") and shareable(spec_of(block)) for block in layer.blocks):
        return
    with torch.inference_mode(False):
        addresses = [block.record.data_ptr() for block in layer.blocks]
        sharers = torch.tensor(addresses, dtype=torch.int64)
    layer.kept = [sharers, *first.kept]
    run = ctypes.cast(native.library(spec_of(first)).d2d_hidden, ctypes.c_void_p).value  # type: ignore[union-attr]
    write(layer.record, run=run, router=read(first.record, "router"))
    write(layer.record, sharers=sharers, sharer_count=len(layer.blocks))


def run_out(x: Tensor, record: Tensor, width: int, *, out: Tensor) -> Tensor:
    """router_hidden into `out`, for contiguous x and out."""
    if read(record, "run"):
        call = build.call()
        assert call is not None
        call(record, x, out, x.numel())
    else:
        out.copy_(router_hidden.meaning(x, record, width))
    return out


def run(x: Tensor, record: Tensor, width: int) -> Tensor:
    """router_hidden as an implementation of the op."""
    x = x.contiguous()
    return run_out(x, record, width, out=x.new_empty(*x.shape[:-1], width))


def accepts(x: Tensor, record: Tensor, width: int) -> bool:
    """Whether the record is complete and x has its weights' dtype."""
    same = x.device.type == "cpu" and x.dtype == Layer.of(record).blocks[0].router1.dtype
    return same and read(record, "run") != 0


router_hidden.impl("cpu", run, accepts=accepts)


@lru_cache(maxsize=1)
def lower() -> None:
    """Let Inductor compile the op to a direct call of `run_out`."""
    build.lower_to_out(router_hidden.overload, "d2d_router_hidden", run_out)
