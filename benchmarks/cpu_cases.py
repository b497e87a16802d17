"""What benchmarks/cpu.py measures: shapes, weights, routing masks, and the exact answer.

A case is a stack of layers x + ffn(x) without biases, so deep that its weights do not stay in the cache:

    ffn(x) = act(x W_up^T) W_down^T   or   (silu(x W_gate^T) * x W_up^T) W_down^T

H hidden neurons in E experts of F = 64 neighbours; a mask says which experts run for which token.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SIZE = 64  # neurons an expert: the smallest at which CPU tiles lose nothing
ROUTER = 128  # hidden width of the router
ROTATIONS = 32  # masks that take turns at T = 1, so that chosen experts are not left in the cache
POPULARITY, SPREAD = 0.7, 0.5  # sigmas of the log-normal popularity of experts, experts per token
CHECKED = 64  # tokens of the input that are compared with the exact answer
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "swiglu": functional.silu,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
SHAPES = {  # (D, H, activation): layers, several times a 32 MiB L3 even in bf16
    (768, 3072, "gelu"): 12,
    (2048, 8192, "relu"): 3,
    (2048, 5632, "swiglu"): 3,
    (4096, 11008, "swiglu"): 1,
}
TOKENS = (1, 4, 16, 64, 788, 2048)  # 788 = 4 images of 197 patches; 2048 = a prefill
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 1.0)
INT8_SHAPES = ((768, 3072, "gelu"), (2048, 8192, "relu"))


@dataclass(frozen=True)
class Case:
    """One group of cells: D, H, activation, dtype of the weights and number of tokens T."""

    width: int
    hidden: int
    activation: str
    dtype: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.width}x{self.hidden}-{self.activation}-{self.dtype}-T{self.tokens}"

    @property
    def shape(self) -> tuple[int, int, str]:
        return self.width, self.hidden, self.activation

    @property
    def experts(self) -> int:
        return self.hidden // SIZE

    @property
    def matrices(self) -> int:
        return 3 if self.activation == "swiglu" else 2

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 1 if self.dtype == "int8" else DTYPES[self.dtype].itemsize

    @property
    def rotations(self) -> int:
        """Masks a layer."""
        return max(1, ROTATIONS // self.tokens)

    def work(self, masks: Sequence[Sequence[Tensor]] | None) -> tuple[float, float]:
        """(bytes of weights touched, floating-point operations) a layer; masks None: dense, no router.

        Bytes are those of the union of the experts that any token chose, and the router's.
        """
        neuron = self.matrices * self.width
        if masks is None:
            return neuron * self.hidden * self.itemsize, 2.0 * neuron * self.hidden * self.tokens
        flat = [mask for layer in masks for mask in layer]
        union = sum(int(mask.any(0).sum()) for mask in flat) / len(flat)
        pairs = sum(int(mask.sum()) for mask in flat) / len(flat)
        router = ROUTER * (self.width + self.experts)
        touched = (union * SIZE * neuron + router) * self.itemsize
        return touched, 2.0 * (pairs * SIZE * neuron + self.tokens * router)


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights: up [H, D], gate [H, D] or None, down [D, H]; router w1 [R, D], w2 [E, R]."""

    up: Tensor
    gate: Tensor | None
    down: Tensor
    w1: Tensor
    w2: Tensor


def cases(quick: bool) -> Iterator[Case]:
    """All groups, or the few that a smoke test runs."""
    if quick:
        for dtype, tokens in (("bf16", 1), ("fp32", 16), ("bf16", 197)):
            yield Case(768, 3072, "gelu", dtype, tokens)
        return
    for shape in SHAPES:
        for dtype in ("bf16", "fp32"):
            for tokens in TOKENS:
                yield Case(*shape, dtype, tokens)
    for shape in INT8_SHAPES:
        yield Case(*shape, "int8", 1)


def layers(case: Case) -> list[Layer]:
    """Random weights of a stack; scaled so that a layer's output is about as large as its input."""
    draw = torch.Generator().manual_seed(zlib.crc32(repr(case.shape).encode()))
    dtype = DTYPES[case.dtype]

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=draw) / columns**0.5).to(dtype)

    gated = case.activation == "swiglu"
    return [
        Layer(
            matrix(case.hidden, case.width),
            matrix(case.hidden, case.width) if gated else None,
            matrix(case.width, case.hidden),
            matrix(ROUTER, case.width),
            matrix(case.experts, ROUTER),
        )
        for _ in range(SHAPES[case.shape])
    ]


def tokens(case: Case) -> Tensor:
    """The input [T, D] of a stack."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(case.tokens, case.width, generator=draw).to(DTYPES[case.dtype])


def routing(case: Case, share: float) -> list[list[Tensor]]:
    """Masks [T, E] of each layer that take turns: call n of a candidate uses masks[layer][n % len]."""
    return [
        list(masks(case.rotations * case.tokens, case.experts, share, seed).split(case.tokens))
        for seed in range(SHAPES[case.shape])
    ]


def masks(rows: int, experts: int, share: float, seed: int) -> Tensor:
    """Which experts [rows, experts] run: skewed as real routing is, the mean share as asked.

    Some experts are popular and some tokens need many (log-normal, POPULARITY and SPREAD); each token
    has at least one. The number of chosen pairs is rounded once for all rows, so the mean share is
    within 1 % whenever rows * experts * share >= 50.
    """
    draw = torch.Generator().manual_seed(seed)
    popularity = POPULARITY * torch.randn(experts, generator=draw)
    need = (SPREAD * torch.randn(rows, generator=draw)).exp().double()
    uniform = torch.rand(rows, experts, generator=draw).clamp_min(1e-30)
    rank = (popularity - (-uniform.log()).log()).argsort(1, descending=True).argsort(1)
    return rank < _counts(need, experts, round(share * rows * experts))[:, None]


def _counts(need: Tensor, experts: int, pairs: int) -> Tensor:
    """Whole numbers [rows] in 1 .. experts, in proportion to need, whose sum is pairs if it can be."""
    low, high = 0.0, experts / float(need.min())
    for _ in range(60):
        scale = (low + high) / 2
        if float((scale * need).clamp(1, experts).sum()) < pairs:
            low = scale
        else:
            high = scale
    exact = (high * need).clamp(1, experts)
    counts = exact.floor()
    missing = min(pairs - int(counts.sum()), len(need))
    if missing > 0:
        counts[(exact - counts).argsort(descending=True)[:missing]] += 1
    return counts.clamp(max=experts)


def answer(
    case: Case,
    stack: Sequence[Layer],
    x: Tensor,
    masks: Sequence[Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The output of a stack computed in dtype: in fp64 the truth, in the case's dtype the yardstick."""
    x = x.to(dtype)
    for index, layer in enumerate(stack):
        h = functional.linear(x, layer.up.to(dtype))
        if layer.gate is not None:
            h = ACTIVATIONS[case.activation](functional.linear(x, layer.gate.to(dtype))) * h
        else:
            h = ACTIVATIONS[case.activation](h)
        if masks is not None:
            h = h * masks[index].repeat_interleave(SIZE, 1)
        x = x + functional.linear(h, layer.down.to(dtype))
    return x


def error(y: Tensor, truth: Tensor, x: Tensor) -> float:
    """Norm of what is wrong relative to what the layers added to x."""
    return float((y.double() - truth).norm() / (truth - x.double()).norm())
