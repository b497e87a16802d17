"""What benchmarks/gpu.py measures: shapes, routing masks, layers, and the exact answer.

A case is one FFN layer without biases for T tokens, H hidden neurons in E experts of F neighbours,

    y = act(x W_up^T) W_down   or   (silu(x W_gate^T) * x W_up^T) W_down

in so many copies that what one turn touches is out of the cache when its turn comes again. A cell of it
says how many experts run: their executed share f, and for few tokens the share u that any token runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2dcompile.gpu_blocks import FEW, GpuSpec
from d2dcompile.kernels import device
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.trial import COLD, routing_masks

ROUTER = 128  # hidden width of the router
TURNS = (
    16  # layer calls of one graph at few tokens: the start of a graph then costs next to nothing
)
MANY = 4096  # tokens whose masks are drawn; those of more repeat them
CHECKED = 64  # tokens whose output is compared with the exact answer
TEXTS = {"gelu": "gelu(up)", "relu": "relu(up)", "swiglu": "silu(gate) * up"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LEAST = {"bf16": 2.0**-8, "fp32": 2.0**-21}  # error that is never held against a candidate


@dataclass(frozen=True)
class Cell:
    """Executed share of (token, expert) pairs, and share of experts that some token runs, if forced."""

    share: float
    union: float | None = None

    def __str__(self) -> str:
        return f"f{self.share:g}" + ("" if self.union is None else f"-u{self.union:g}")


@dataclass(frozen=True)
class Case:
    """One group: D, H, activation, dtype, T, F, its cells, and the hidden width of its routers."""

    width: int
    hidden: int
    activation: str
    dtype: str
    tokens: int
    cells: tuple[Cell, ...]
    size: int = 128
    router: int = ROUTER

    def __str__(self) -> str:
        kind = f"{self.width}x{self.hidden}-{self.activation}-{self.dtype}"
        return f"{kind}-F{self.size}-T{self.tokens}"

    @property
    def experts(self) -> int:
        return self.hidden // self.size

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def neuron(self) -> int:
        """Weights of one hidden neuron."""
        return self.width * (3 if self.gated else 2)

    @property
    def layer_bytes(self) -> int:
        return self.neuron * self.hidden * self.torch_dtype.itemsize

    @property
    def spec(self) -> GpuSpec:
        text, precision = TEXTS[self.activation], device.precision(self.torch_dtype)
        return GpuSpec(
            self.width, self.width, self.experts, self.size, self.gated, text, precision, self.dtype
        )

    def copies(self, cache: int) -> int:
        """Layers that take turns, so that turns on one are COLD times a cache of so many bytes apart."""
        used = min(self.used(cell) for cell in self.cells)
        rows = 2 * self.tokens * self.width * self.torch_dtype.itemsize
        return max(2, -int(-COLD * cache // (used * self.layer_bytes + rows)))

    def used(self, cell: Cell) -> float:
        """About which share of the experts some token runs."""
        if self.tokens == 1:
            return cell.share
        return cell.union or 1.0

    def turns(self, copies: int, least: int) -> int:
        """Layer calls of one graph, each with a mask of its own; at few tokens no less than `least`."""
        return max(copies, least) if self.tokens <= FEW else copies

    def work(self, masks: list[Tensor] | None) -> tuple[float, float]:
        """(bytes, FLOPs) a layer needs at least, router included; masks None: dense, no router."""
        itemsize = self.torch_dtype.itemsize
        rows = 2 * self.tokens * self.width * itemsize
        if masks is None:
            return self.layer_bytes + rows, 2.0 * self.neuron * self.hidden * self.tokens
        union = sum(int(mask.any(0).sum()) for mask in masks) / len(masks)
        pairs = sum(int(mask.sum()) for mask in masks) / len(masks)
        router = self.router * (self.width + self.experts)
        touched = (union * self.size * self.neuron + router) * itemsize
        return touched + rows, 2.0 * (pairs * self.size * self.neuron + self.tokens * router)


@dataclass(frozen=True, eq=False)
class Layer:
    """up, gate, down [H, D] as kernels take them; linear [D, H], down as models keep it; router w1, w2."""

    up: Tensor
    gate: Tensor | None
    down: Tensor
    linear: Tensor
    w1: Tensor
    w2: Tensor

    def weights(self) -> dict[str, Tensor | None]:
        named: dict[str, Tensor | None] = {
            "w_up": self.up,
            "w_gate": self.gate,
            "w_down": self.down,
        }
        return {**named, "b_up": None, "b_gate": None, "b_down": None}


DECODE = tuple(Cell(f) for f in (0.1, 0.25, 0.5))
PREFILL = tuple(Cell(f) for f in (0.1, 0.25))
SHARED = tuple(Cell(0.1, u) for u in (0.2, 0.5))
LLAMA, OPT, VIT = (4096, 14336, "swiglu"), (2048, 8192, "relu"), (768, 3072, "gelu")
CASES = (  # the most telling first: a run that is cut short goes on where it stopped
    Case(*LLAMA, "bf16", 1, DECODE),
    Case(*VIT, "bf16", 50432, PREFILL),  # 256 images of 197 patches
    Case(*LLAMA, "bf16", 4096, PREFILL),
    Case(*LLAMA, "bf16", 8, SHARED),
    Case(*VIT, "fp32", 50432, (Cell(0.25),)),
    Case(*OPT, "bf16", 1, PREFILL),
    Case(*LLAMA, "bf16", 64, SHARED),
    Case(*OPT, "bf16", 4096, PREFILL),
    Case(*LLAMA, "bf16", 512, PREFILL),
    Case(*VIT, "bf16", 50432, PREFILL, size=32),
    Case(*OPT, "bf16", 64, SHARED),
    Case(*VIT, "bf16", 512, PREFILL),
)
TOYS = (  # every code path, small enough for Triton's interpreter
    Case(32, 32, "swiglu", "fp32", 1, (Cell(0.5), Cell(1.0)), size=16, router=16),
    Case(32, 64, "swiglu", "fp32", 8, (Cell(0.25, 0.5),), size=16, router=16),
    Case(16, 32, "gelu", "fp32", 66, (Cell(0.99),), size=16, router=16),
)


def layers(case: Case, copies: int, where: str) -> list[Layer]:
    """Random weights, scaled so that a dense layer's output is about as large as its input."""
    draw = torch.Generator(where).manual_seed(0)

    def matrix(rows: int, columns: int, summed: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=draw, device=where)
        return drawn.div_(summed**0.5).to(case.torch_dtype)

    found = []
    for _ in range(copies):
        up = matrix(case.hidden, case.width, case.width)
        gate = matrix(case.hidden, case.width, case.width) if case.gated else None
        down = matrix(case.hidden, case.width, case.hidden)
        w1 = matrix(case.router, case.width, case.width)
        w2 = matrix(case.experts, case.router, case.router)
        found.append(Layer(up, gate, down, down.t().contiguous(), w1, w2))
    return found


def rows(case: Case, where: str) -> Tensor:
    """The input [T, D]."""
    draw = torch.Generator(where).manual_seed(1)
    drawn = torch.randn(case.tokens, case.width, generator=draw, device=where)
    return drawn.to(case.torch_dtype)


def masks(case: Case, cell: Cell, turns: int) -> list[Tensor]:
    """A mask [T, E] for each turn, on the CPU; of many tokens one repeated mask, its experts renamed."""
    if cell.union is not None:
        return [union_mask(case, cell.share, cell.union, seed) for seed in range(turns)]
    if case.tokens < MANY:
        drawn = routing_masks(turns * case.tokens, case.experts, cell.share)
        return list(drawn.split(case.tokens))
    drawn = routing_masks(MANY, case.experts, cell.share).repeat(-(-case.tokens // MANY), 1)
    return [drawn[: case.tokens].roll(turn * case.experts // turns, 1) for turn in range(turns)]


def union_mask(case: Case, share: float, union: float, seed: int) -> Tensor:
    """A mask [T, E] of which `share` is chosen, spread over `union` of the experts, each of them used."""
    draw = torch.Generator().manual_seed(seed)
    members = torch.randperm(case.experts, generator=draw)[: round(union * case.experts)]
    inner = routing_masks(case.tokens, len(members), share * case.experts / len(members), seed)
    for expert in (~inner.any(0)).nonzero().flatten().tolist():
        spare = (inner & (inner.sum(0) > 1)).nonzero()
        if len(spare) == 0:
            break  # fewer pairs than experts
        token, other = spare[int(torch.randint(len(spare), (), generator=draw))].tolist()
        inner[token, other], inner[token, expert] = False, True
    mask = torch.zeros(case.tokens, case.experts, dtype=torch.bool)
    mask[:, members] = inner
    return mask


def checked(case: Case, where: str) -> Tensor:
    """Indices of the tokens that are compared with the exact answer."""
    return torch.linspace(0, case.tokens - 1, min(case.tokens, CHECKED)).long().to(where)


def answer(case: Case, layer: Layer, x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A layer's output computed in dtype, one expert at a time: in fp64 the truth; mask None: dense."""
    if mask is None:
        mask = x.new_ones(len(x), case.experts, dtype=torch.bool)
    weights = [None if w is None else w.to(dtype) for w in layer.weights().values()]
    lists = dispatch.meaning(mask.to(x.device))
    found: Tensor = expert_mlp.meaning(
        x.to(dtype), *lists, *weights, None, [], TEXTS[case.activation]
    )
    return found
