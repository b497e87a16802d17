"""dispatch in Triton (kernels/gpu/route.py): no look from the host, no atomics."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from ...gpu_schedules import padded
from .. import device, render
from ..launching import launch
from . import buffers, dispatch

MOST_EXPERTS = 1024  # a token's row is held in one program
FEW = 64  # tokens of a program that makes lists, at most
PAIRS = 1 << 13  # (token, expert) pairs of such a program: with 2 ** 14 its registers spill
WARPS = 8


def source(d: int, router: int, experts: int, precision: str) -> str:
    """The source of the kernels of a router and its lists."""
    constants: dict[str, bool | int | str] = {
        "D": d, "R": router, "R_PADDED": padded(router), "E": experts,
        "E_PADDED": padded(experts), "PRECISION": precision,
    }  # fmt: skip
    title = f"Routing of {experts} experts: {d} features, router width {router}."
    return render.render(title, ["route.py"], constants)


@lru_cache(maxsize=256)
def module(d: int, router: int, experts: int, precision: str) -> ModuleType:
    """The generated kernels of a router and its lists."""
    return render.module(source(d, router, experts, precision))


def block_rows(experts: int) -> int:
    """Tokens of a program that makes lists."""
    return max(16, min(FEW, PAIRS // padded(experts)))


def write_lists(
    kernels: ModuleType,
    mask: Tensor,
    counts: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    block: int,
) -> None:
    """Fill the lists from a mask [T, E] int8 and the counts [blocks, E] of its blocks of tokens."""
    rows, blocks = len(mask), len(counts)
    some = min(32, padded(blocks, 1))
    launch(
        kernels.write_lists, (blocks,), mask, counts, *lists, rows, blocks,
        BLOCK_T=block, BLOCK_B=some, warps=WARPS,
    )  # fmt: skip


def accepts(mask: Tensor) -> bool:
    """Whether a mask is where Triton kernels run, and a row of it fits a program."""
    return mask.shape[-1] <= MOST_EXPERTS and device.takes((), mask.device)


def run(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dispatch of a given mask."""
    experts = mask.shape[-1]
    flat = mask.reshape(-1, experts).contiguous().view(torch.int8)
    lists, block = buffers(mask, len(flat), experts), block_rows(experts)
    if len(flat) == 0:
        lists[1].zero_()
        return lists
    blocks = -(-len(flat) // block)
    counts = mask.new_empty(blocks, experts, dtype=torch.int32)
    kernels = module(16, 16, experts, "ieee")
    launch(kernels.count, (blocks,), flat, counts, len(flat), BLOCK_T=block, warps=WARPS)
    write_lists(kernels, flat, counts, lists, block)
    return lists


device.register(dispatch, run, accepts)
