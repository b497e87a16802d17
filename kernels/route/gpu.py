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


class Router:
    """One routing of rows x [T, D] by router1 [R, D] and router2 [E, R], all contiguous, into `lists`."""

    def __init__(self, x: Tensor, router1: Tensor, router2: Tensor, tau: Tensor) -> None:
        self.x, self.w1, self.w2, self.tau = x, router1, router2, tau
        (self.width, self.d), self.experts = router1.shape, router2.shape[0]
        precision = device.precision(x.dtype)
        self.kernels = module(self.d, self.width, self.experts, precision)
        self.lists = buffers(x, len(x), self.experts)

    def hidden_few(self) -> Tensor:
        """Parts of x W1^T, [SPLITS, T, R] fp32, of few tokens."""
        x, few = self.x, padded(len(self.x))
        part = padded(min(self.d, (512 if few == 16 else 256) // x.element_size()))
        parts = x.new_empty(SPLITS, len(x), self.width, dtype=torch.float32)
        launch(
            self.kernels.hidden_few, (-(-self.width // 16), SPLITS), x, self.w1, parts, len(x),
            BLOCK_T=few, BLOCK_R=16, BLOCK_K=part, SPLITS=SPLITS, warps=4, stages=3,
        )  # fmt: skip
        return parts

    def route_few(self, parts: Tensor) -> None:
        """Fill the lists of few tokens."""
        rows = len(self.x)
        launch(
            self.kernels.route_few, (1,), parts, self.w2, self.tau, *self.lists, rows,
            BLOCK_T=padded(rows), SPLITS=SPLITS, warps=WARPS,
        )  # fmt: skip

    def hidden_many(self, block: int) -> Tensor:
        """relu(x W1^T) [T, R] in x's dtype, of `block` tokens a program."""
        hidden = self.x.new_empty(len(self.x), self.width)
        launch(
            self.kernels.hidden_many, (-(-len(self.x) // block),),
            self.x, self.w1, hidden, len(self.x), BLOCK_T=block, BLOCK_K=64, warps=WARPS, stages=3,
        )  # fmt: skip
        return hidden

    def route_many(self, block: int) -> tuple[Tensor, Tensor]:
        """The mask [T, E] int8 of x, and the counts of its blocks of tokens."""
        mask, counts = self._masked(block)
        launch(
            self.kernels.route_many, (len(counts) - 1,),
            self.x, self.w1, self.w2, self.tau, mask, counts, len(self.x),
            BLOCK_T=block, BLOCK_K=64, warps=WARPS, stages=3,
        )  # fmt: skip
        return mask, counts

    def route_given(self, hidden: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """The same of hidden values [T, R]."""
        mask, counts = self._masked(block)
        launch(
            self.kernels.route_given, (len(counts) - 1,),
            hidden, self.w2, self.tau, mask, counts, len(self.x), BLOCK_T=block, warps=WARPS,
        )  # fmt: skip
        return mask, counts

    def _masked(self, block: int) -> tuple[Tensor, Tensor]:
        mask = self.x.new_empty(len(self.x), self.experts, dtype=torch.int8)
        return mask, counts_of(mask, block)

    def write_lists(self, mask: Tensor, counts: Tensor, block: int) -> None:
        """Fill the lists of many tokens."""
        write_lists(self.kernels, mask, counts, self.lists, block)


def run(x: Tensor, router1: Tensor, router2: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lists of the experts that each row of x runs."""
    x = x.reshape(-1, x.shape[-1]).contiguous()
    router = Router(x, router1.contiguous(), router2.contiguous(), tau)
    block = block_rows(router.experts)
    if len(x) == 0:
        router.lists[1].zero_()
    elif len(x) <= block:
        router.route_few(router.hidden_few())
    else:
        router.write_lists(*router.route_many(block), block)
    return router.lists


def launches(d: int, router: int, experts: int, tokens: int, dtype: torch.dtype) -> list[Launched]:
    """What routing so many tokens launches, without data and without a device."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with noting() as noted:
        run(new(tokens, d), new(router, d), new(experts, router), new(dtype=torch.int32))
    return noted


device.register(route, run, accepts)
