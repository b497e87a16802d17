"""dispatch in Triton (kernels/gpu/route.py): no look from the host, no atomics."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from ...gpu_blocks import padded
from .. import device, render
from ..launching import launch
from . import buffers, dispatch

MOST_EXPERTS = 1024  # a token's row is held in one program
FEW = 64  # tokens of a program that makes lists, at most
PAIRS = 1 << 13  # (token, expert) pairs of such a program: with 2 ** 14 its registers spill
WARPS = 8
ADDED = 32  # blocks of tokens above which their counts are added up once for all


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
    """Fill the lists from a mask [T, E] int8 and `counts_of` its blocks of tokens."""
    (rows, experts), blocks = mask.shape, len(counts) - 1
    added = blocks > ADDED
    if added:
        launch(
            kernels.add_up, (-(-experts // 16),), counts, blocks,
            BLOCK_E=16, BLOCK_B=128, warps=4,
        )  # fmt: skip
    some = 1 if added else padded(blocks, 1)
    launch(
        kernels.write_lists, (blocks,), mask, counts, *lists, rows, blocks,
        BLOCK_T=block, BLOCK_B=some, ADDED=added, warps=WARPS,
    )  # fmt: skip


def counts_of(mask: Tensor, block: int) -> Tensor:
    """Room for how often each block of a mask's tokens chose each expert, [blocks + 1, E] int32."""
    rows, experts = mask.shape
    return mask.new_empty(-(-rows // block) + 1, experts, dtype=torch.int32)


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
    counts = counts_of(flat, block)
    kernels = module(16, 16, experts, "ieee")
    launch(kernels.count, (len(counts) - 1,), flat, counts, len(flat), BLOCK_T=block, warps=WARPS)
    write_lists(kernels, flat, counts, lists, block)
    return lists


device.register(dispatch, run, accepts)
