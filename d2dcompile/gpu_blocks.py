"""The nouns of GPU kernels: a kind of block, and a schedule, how it runs under one load."""

from __future__ import annotations

from dataclasses import dataclass

from .load import Block, Load
from .tiles import Tile

FEW = 64  # tokens up to which the union of chosen experts is streamed
STRATEGIES = ("decode", "pairs", "atomic", "dense")
ROUTER = 128  # router's width that the cost model takes where nothing is known
ROWS_BYTES = 256 << 20  # of the buffer of pairs' products, whose columns are worked off in chunks


@dataclass(frozen=True)
class GpuSpec:
    """What generated kernels depend on.

    Attributes:
        d, out: features of the block's input and output. experts, size: E experts of F neurons.
        gated, activation: as of a Site.
        dtype: "bf16", "fp16" or "fp32". precision: "ieee" or "tf32", how fp32 is multiplied.
        int8: whether the strategy "decode" reads int8 copies of the weights (kernels/int8.py).
    """

    d: int
    out: int
    experts: int
    size: int
    gated: bool
    activation: str
    precision: str = "ieee"
    dtype: str = "bf16"
    int8: bool = False

    def __str__(self) -> str:
        kind, dtype = "gated" if self.gated else "plain", self.dtype + " int8" * self.int8
        return f"{kind} {self.d} -> {self.experts} x {self.size} -> {self.out} {dtype}"

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def streamed(self) -> int:
        """Bytes of a weight that the strategy "decode" reads."""
        return 1 if self.int8 else self.itemsize

    def possible(self, load: Load) -> Load:
        """The load, or of one expert a token if it says less: the one with the largest score always runs."""
        if load.share * self.experts >= 1:
            return load
        share = 1 / self.experts
        return Load(load.tokens, share, None if load.union is None else max(share, load.union))

    def block(self, router: int = ROUTER) -> Block:
        """The block as the cost model sees it."""
        dtype = "tf32" if self.precision == "tf32" else self.dtype
        hidden = self.experts * self.size
        return Block(self.d, self.out, hidden, self.experts, router, self.gated, dtype, self.int8)


@dataclass(frozen=True)
class GpuSchedule:
    """How a block runs under one load.

    Attributes:
        strategy: "decode": the weights of the union of chosen experts are read once by the whole device;
            up to FEW tokens. "pairs": tokens grouped per expert, each pair's product stored, those of a
            token added in the order of its experts. "atomic": the same, added with atomics, so that the
            last bits vary. "dense": every expert, through the device's own matrix product.
        up, down: tiles of the two products: block_m tokens or pairs, block_n neurons or columns.
        swap: whether weights are the first operand, for few rows an expert.
        tma: whether weights are read through descriptors (Hopper and later).
        splits: programs that share the chosen experts for the same columns of the output (decode).
        per_multiprocessor: programs of the persistent kernels.
    """

    strategy: str
    up: Tile
    down: Tile
    swap: bool = False
    tma: bool = False
    splits: int = 8
    per_multiprocessor: int = 2


def chunks(spec: GpuSpec, tokens: int, block_n: int = 128) -> int:
    """In how many parts the columns of the output are worked off."""
    return -(-spec.out // chunk(spec, tokens, block_n))


def chunk(spec: GpuSpec, tokens: int, block_n: int) -> int:
    """Columns of the output that are worked off at once, so that pairs' products stay below ROWS_BYTES."""
    pairs, columns = tokens * spec.experts, -(-spec.out // block_n) * block_n
    while columns > block_n and pairs * columns * spec.itemsize > ROWS_BYTES:
        columns = -(-columns // 2 // block_n) * block_n
    return columns


def padded(size: int, least: int = 16) -> int:
    """The smallest power of two that is no less than size and `least`."""
    return max(least, 1 << (size - 1).bit_length())
