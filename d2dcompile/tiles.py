"""Tiles of a product over experts: which can run at all, which are worth compiling, in what order.

Tokens come in groups, one per expert in use; a kernel walks tiles of block_m rows and block_n columns of
every group, block_k values of the inner dimension at a time, through a ring of `stages` buffers in shared
memory. Four rules drop what cannot be fast without compiling it; the rest is ranked by a roofline with
whole waves of tiles. Shapes and rules: compiled for sm_80, sm_90 and gfx942 with Triton 3.6 and 3.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import ceil

from .errors import TuningError
from .gpus import BYTES, Gpu
from .load import Block, Load

LINE = 128  # bytes of a memory transaction, and of a row of a default tile
MOST_ACCUMULATORS = 128  # a thread: with 256 every kernel spilled
FEWEST_ACCUMULATORS = 8  # a thread: below, it waits for loads
MOST_WARPS = 8
ROWS, COLUMNS, INNER = (16, 32, 64, 128, 256), (32, 64, 128, 256), (32, 64, 128)
WARPS, STAGES = (4, 8), (2, 3, 4, 5)
WGMMA_ROWS, WGMMA_WARPS = 64, 4  # of an instruction


@dataclass(frozen=True)
class Gemm:
    """Products of one kernel: `groups` times [rows, k] x [k, n], `outputs` of them from the same rows.

    Attributes:
        rows: mean tokens of a group. groups: experts in use.
        n, k: features of a result, and summed over.
        outputs: 2 where a gate and an up matrix are read side by side, each with its accumulators.
        dtype: see `gpus.BYTES`. swapped: whether weights are the operand with block_m rows, as for few
            tokens on Hopper: block_m then splits n and block_n the tokens.

    Raises TuningError for sizes below 1 or an unknown dtype.
    """

    rows: float
    groups: float
    n: int
    k: int
    outputs: int = 1
    dtype: str = "bf16"
    swapped: bool = False
    int8: bool = False

    def __post_init__(self) -> None:
        if self.rows <= 0 or self.groups <= 0 or min(self.n, self.k, self.outputs) < 1:
            raise TuningError(f"{self} is no product; expected positive sizes.")
        if self.dtype not in BYTES:
            raise TuningError(f"{self} has no known dtype; expected one of {', '.join(BYTES)}.")


def up_gemm(block: Block, load: Load) -> Gemm:
    """The product of a block's up, and gate, matrices under a load."""
    groups = block.experts * load.used
    return Gemm(load.rows, groups, block.size, block.d, block.ups, block.dtype)


def down_gemm(block: Block, load: Load) -> Gemm:
    """The product of a block's down matrix under a load."""
    return Gemm(load.rows, block.experts * load.used, block.out, block.size, 1, block.dtype)


@dataclass(frozen=True)
class Tile:
    """A tile and how it is computed: see above; warps of a CTA, buffers of the ring."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def wgmma(self, gpu: Gpu) -> bool:
        """Whether the compiler multiplies warpgroup by warpgroup, from shared memory."""
        hopper = gpu.target == "sm_90"
        return hopper and self.block_m >= WGMMA_ROWS and self.warps >= WGMMA_WARPS

    def step(self, gemm: Gemm) -> int:
        """Bytes of one buffer: a step's values of both operands."""
        rows, weights = self.block_m, self.block_n
        if gemm.swapped:
            rows, weights = weights, rows
        value = BYTES[gemm.dtype]
        of_weights = weights * gemm.outputs * (1 if gemm.int8 else value)
        return (rows * value + of_weights) * self.block_k

    def shared(self, gpu: Gpu, gemm: Gemm) -> int:
        """Bytes of shared memory of a CTA, exact for two stages or more.

        wgmma reads `stages` buffers; mma.sync and MFMA hold one of them in registers. On NVIDIA a result
        passes through shared memory on its way out, after the ring is done.
        """
        buffers = self.stages if self.wgmma(gpu) else self.stages - 1
        result = self.block_m * self.block_n * BYTES[gemm.dtype] if gpu.warp == 32 else 0
        return max(buffers * self.step(gemm), result)

    def accumulators(self, gpu: Gpu, gemm: Gemm) -> int:
        """32-bit registers of a thread that hold sums."""
        return self.block_m * self.block_n * gemm.outputs // (gpu.warp * self.warps)

    def registers(self, gpu: Gpu, gemm: Gemm) -> int:
        """Estimated registers of a thread: sums, addresses, and operands where they pass through them.

        A product of 128 x 128 with 64 sums took 100 to 127 with wgmma and 135 to 224 with mma.sync.
        """
        sums = self.accumulators(gpu, gemm)
        return min(255, sums + 56 if self.wgmma(gpu) else 2 * sums + 40)

    def resident(self, gpu: Gpu, gemm: Gemm) -> int:
        """How many CTAs are expected to run on an SM at once."""
        return gpu.resident(self.registers(gpu, gemm), self.shared(gpu, gemm), self.warps)


def unfit(gpu: Gpu, gemm: Gemm, tile: Tile) -> str | None:
    """Why a tile cannot be fast, or None: the four rules, before any compilation."""
    if (needed := tile.shared(gpu, gemm)) > gpu.shared_cta:
        return f"needs {needed} bytes of shared memory of {gpu.shared_cta}"
    sums = tile.accumulators(gpu, gemm)
    if sums > MOST_ACCUMULATORS:
        return f"keeps {sums} sums a thread, more than {MOST_ACCUMULATORS}: would spill"
    if gpu.target == "sm_90" and tile.block_m >= WGMMA_ROWS and tile.warps < WGMMA_WARPS:
        return f"has {tile.warps} warps; wgmma needs {WGMMA_WARPS}"
    if sums < FEWEST_ACCUMULATORS or tile.block_k * BYTES[gemm.dtype] < LINE // 2:
        return f"is tiny: {sums} sums a thread, rows of {tile.block_k * BYTES[gemm.dtype]} bytes"
    return None


def estimate(gpu: Gpu, gemm: Gemm, tile: Tile) -> float:
    """Seconds of a product with a tile; infinite if no CTA fits.

    Rows differ between groups, so a group's last tile is half full on average. Tiles go out in waves of as
    many as fit the SMs; one lasts as long as its arithmetic, its bytes from L2, or the latency of its loads,
    of which all but one buffer are under way. Below that lie launch, floor, and memory's bandwidth.
    """
    resident = tile.resident(gpu, gemm)
    if resident == 0:
        return float("inf")
    along_n, along_rows = (
        (tile.block_m, tile.block_n) if gemm.swapped else (tile.block_n, tile.block_m)
    )
    tiles = gemm.groups * max(1.0, gemm.rows / along_rows + 0.5) * ceil(gemm.n / along_n)
    full, rest = divmod(tiles, gpu.sms * resident)
    waves = full * _wave(gpu, gemm, tile, resident)
    if rest:
        waves += _wave(gpu, gemm, tile, ceil(rest / gpu.sms))
    value = BYTES[gemm.dtype]
    weights = gemm.groups * gemm.n * gemm.k * gemm.outputs * value
    results = gemm.groups * gemm.rows * gemm.n * value
    return gpu.launch + max(gpu.floor, waves, (weights + results) / gpu.bandwidth())


def _wave(gpu: Gpu, gemm: Gemm, tile: Tile, resident: int) -> float:
    """Seconds in which an SM computes `resident` tiles side by side."""
    steps = ceil(gemm.k / tile.block_k)
    rate = gpu.rate(gemm.dtype, gpu.dense_fraction) / gpu.sms
    if not tile.wgmma(gpu):
        rate *= gpu.sync_mma
    area = tile.block_m * tile.block_n
    flops = 2 * area * gemm.outputs * steps * tile.block_k
    moved = steps * tile.step(gemm) + area * BYTES[gemm.dtype]
    waited = (1 + steps / max(1, tile.stages - 1)) * gpu.latency
    return max(resident * flops / rate, resident * moved * gpu.sms / gpu.l2_rate, waited)


def default_tile(gpu: Gpu, gemm: Gemm) -> Tile:
    """The tile in closed form, usable without any measurement; no rule ever drops it.

    Rows: the power of two from the mean of a group, 16 to 128; a memory line of the inner dimension, less
    where that is shorter; half the sums where mma.sync keeps operands in the registers beside them; 2048
    sums a warp, 64 of a thread, with which two CTAs of 128 x 128 share an SM (one's result leaves while
    the other multiplies); a buffer for each step, four at most, and three where that makes room for the
    second CTA (vLLM's and triton_kernels' choices look alike).
    """
    value = BYTES[gemm.dtype]
    few = min(128, max(16, _power(gemm.rows)))
    wide = min(128, max(32, _power(gemm.n)))
    rows, columns = (max(64, wide), few) if gemm.swapped else (few, wide)
    most = MOST_ACCUMULATORS // 2 if gpu.target == "sm_80" else MOST_ACCUMULATORS
    while rows * columns * gemm.outputs > most * gpu.warp * MOST_WARPS:
        columns //= 2
    warps = min(MOST_WARPS, max(4, rows * columns * gemm.outputs // 2048))
    while rows * columns * gemm.outputs < FEWEST_ACCUMULATORS * gpu.warp * warps:
        if warps > 1:
            warps //= 2
        else:
            columns *= 2
    line = LINE // value if gemm.k >= LINE // value else LINE // value // 2
    fitting = [
        tile
        for inner in (line, line // 2)
        for stages in (4, 3, 2)
        if stages <= max(2, ceil(gemm.k / inner))
        and unfit(gpu, gemm, tile := Tile(rows, columns, inner, warps, stages)) is None
    ]
    inner = fitting[0].block_k
    deep = [t for t in fitting if t.block_k == inner and t.stages >= min(3, ceil(gemm.k / inner))]
    return next((tile for tile in deep if tile.resident(gpu, gemm) >= 2), fitting[0])


def candidates(gpu: Gpu, gemm: Gemm, limit: int = 24) -> list[tuple[Tile, float]]:
    """Tiles that no rule drops and their estimated seconds, fastest first, the default among them.

    Of equally fast ones those that read whole memory lines come first, then those with less shared memory.
    limit: how many.
    """
    grid = {Tile(*sizes) for sizes in product(ROWS, COLUMNS, INNER, WARPS, STAGES)}
    default = default_tile(gpu, gemm)
    timed = {
        tile: estimate(gpu, gemm, tile)
        for tile in grid | {default}
        if unfit(gpu, gemm, tile) is None
    }

    def order(tile: Tile) -> tuple[float, bool, int, str]:
        broken = tile.block_k * BYTES[gemm.dtype] < LINE
        return timed[tile], broken, tile.shared(gpu, gemm), str(tile)

    ranked = sorted(timed, key=order)
    kept = ranked[:limit]
    if default not in kept:
        kept = [*kept[: limit - 1], default]
    return [(tile, timed[tile]) for tile in kept]


def _power(value: float) -> int:
    """The smallest power of two from a value on, 1 at least."""
    return 1 << max(0, ceil(value) - 1).bit_length()
