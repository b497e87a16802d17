"""route in Triton (kernels/gpu/route.py): no look from the host, no atomics."""

from __future__ import annotations

import torch
from torch import Tensor

from ...gpu_blocks import padded
from .. import device
from ..dispatch import buffers
from ..dispatch.gpu import MOST_EXPERTS, WARPS, block_rows, counts_of, module, write_lists
from ..launching import Launched, launch, noting
from . import route

MOST_ROUTER = 256  # both layers of a block of tokens are held in one program
SPLITS = 4  # programs that share the features of few tokens, for each block of the router's width


def accepts(x: Tensor, router1: Tensor, router2: Tensor, tau: Tensor) -> bool:
    """Whether all is on one device in one supported dtype, and a row of scores fits a program."""
    fits = router2.shape[0] <= MOST_EXPERTS and router1.shape[0] <= MOST_ROUTER
    same = x.dtype == router1.dtype == router2.dtype and x.dtype in device.DTYPES
    return fits and same and device.takes((router1, router2, tau), x.device)


def run(x: Tensor, router1: Tensor, router2: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lists of the experts that each row of x runs."""
    (width, d), experts = router1.shape, router2.shape[0]
    x = x.reshape(-1, d).contiguous()
    w1, w2 = router1.contiguous(), router2.contiguous()
    kernels = module(d, width, experts, device.precision(x.dtype))
    rows, lists = len(x), buffers(x, len(x), experts)
    if rows == 0:
        lists[1].zero_()
        return lists
    block = block_rows(experts)
    if rows <= block:
        few = padded(rows)
        part = padded(min(d, (512 if few == 16 else 256) // x.element_size()))
        parts = x.new_empty(SPLITS, rows, width, dtype=torch.float32)
        launch(
            kernels.hidden_few, (-(-width // 16), SPLITS), x, w1, parts, rows,
            BLOCK_T=few, BLOCK_R=16, BLOCK_K=part, SPLITS=SPLITS, warps=4, stages=3,
        )  # fmt: skip
        launch(
            kernels.route_few, (1,), parts, w2, tau, *lists, rows,
            BLOCK_T=few, SPLITS=SPLITS, warps=WARPS,
        )  # fmt: skip
        return lists
    blocks = -(-rows // block)
    mask = x.new_empty(rows, experts, dtype=torch.int8)
    counts = counts_of(mask, block)
    launch(
        kernels.route_many, (blocks,), x, w1, w2, tau, mask, counts, rows,
        BLOCK_T=block, BLOCK_K=64, warps=WARPS, stages=3,
    )  # fmt: skip
    write_lists(kernels, mask, counts, lists, block)
    return lists


def launches(d: int, router: int, experts: int, tokens: int, dtype: torch.dtype) -> list[Launched]:
    """What routing so many tokens launches, without data and without a device."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with noting() as noted:
        run(new(tokens, d), new(router, d), new(experts, router), new(dtype=torch.int32))
    return noted


device.register(route, run, accepts)
