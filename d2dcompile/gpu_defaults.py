"""The closed-form schedule of a block on a GPU: the cost model's strategy, and tiles by rule."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil

from . import cost
from .gpu_blocks import FEW, GpuSchedule, GpuSpec, chunks, padded
from .gpus import Gpu
from .load import Load
from .tiles import LINE, Gemm, Tile, default_tile, down_gemm, up_gemm

SWAP_BELOW = 64  # rows an expert: wgmma needs 64 rows of its first operand
WHOLE = 1 << 16  # bytes of a weight that a program of the one-token kernel holds at once


def default(spec: GpuSpec, load: Load, gpu: Gpu, dense: bool = True) -> GpuSchedule:
    """The closed-form schedule: the strategy that the cost model ranks first, with default tiles.

    dense: whether running every expert takes part.
    """
    block = spec.block()
    times = {"pairs": cost.pairs_time(gpu, block, load, chunks(spec, load.tokens))}
    if load.tokens <= FEW:
        times["decode"] = cost.union_time(gpu, block, load)
    if dense:
        times["dense"] = cost.dense_time(gpu, block, load.tokens)
    return of_strategy(min(times, key=lambda name: times[name]), spec, load, gpu)


def of_strategy(strategy: str, spec: GpuSpec, load: Load, gpu: Gpu) -> GpuSchedule:
    """A strategy's schedule with default tiles."""
    if strategy == "decode":
        return _decode(spec, load, gpu)
    swap = gpu.target == "sm_90" and load.rows < SWAP_BELOW
    up, down = gemms(spec, load, swap)
    tiles = [turned(default_tile(gpu, gemm), swap) for gemm in (up, down)]
    if strategy == "atomic" and gpu.target != "sm_90":  # every sum has an address: registers spill
        tiles[1] = replace(tiles[1], block_n=min(64, tiles[1].block_n))
    return GpuSchedule(strategy, tiles[0], tiles[1], swap=swap)


def gemms(spec: GpuSpec, load: Load, swap: bool) -> tuple[Gemm, Gemm]:
    """The two grouped products of a load."""
    block = spec.block()
    return replace(up_gemm(block, load), swapped=swap), replace(
        down_gemm(block, load), swapped=swap
    )


def turned(tile: Tile, swap: bool) -> Tile:
    """A tile of a product whose first operand is the weights, with tokens as block_m again."""
    return replace(tile, block_m=tile.block_n, block_n=tile.block_m) if swap else tile


def _decode(spec: GpuSpec, load: Load, gpu: Gpu) -> GpuSchedule:
    if load.tokens == 1:
        neurons, programs = _even(spec, load, gpu)
        columns = Tile(1, 128, min(128, padded(spec.size)), 8, 1)
        whole = Tile(1, neurons, padded(spec.d), 8, 1)
        return GpuSchedule("decode", whole, columns, per_multiprocessor=programs)
    tokens = padded(load.tokens)
    neurons = 32 if spec.int8 and spec.size % 32 == 0 else _neurons(spec, load, gpu)
    up, down = up_tile(spec, neurons, tokens), down_tile(spec, tokens)
    of_up, of_down = (
        replace(of(spec.block(), load), swapped=first, int8=spec.int8)
        for of, first in ((up_gemm, True), (down_gemm, spec.int8))
    )
    return GpuSchedule(
        "decode",
        turned(_fitting(gpu, of_up, turned(up, True)), True),
        turned(_fitting(gpu, of_down, turned(down, spec.int8)), spec.int8),
        per_multiprocessor=4 if spec.int8 else 2,
    )


def up_tile(spec: GpuSpec, neurons: int, tokens: int) -> Tile:
    """A tile of few tokens and so many neurons: a line of each row of a weight, more of few rows.

    Tiles of int8 have fewer rows and warps: mma.sync, 16 rows a warp, takes 8 of them from shared memory
    at once where wgmma takes 2, and twice as many instructions become too many for memory's pace.
    """
    line = LINE // spec.itemsize
    if not spec.int8 or neurons >= 64:
        return Tile(tokens, neurons, min(64 // neurons * line, padded(spec.d)), 4, 4)
    inner, warps = (line, 4) if spec.dtype == "fp32" else (LINE, 2)
    return Tile(tokens, neurons, min(inner, padded(spec.d)), warps, 4)


def down_tile(spec: GpuSpec, tokens: int) -> Tile:
    """A tile of few tokens and the columns of the output that a program makes."""
    line = LINE // spec.itemsize
    if not spec.int8:
        return Tile(tokens, 128, min(line, padded(spec.size)), 4, 3)
    if spec.dtype == "fp32":
        return Tile(tokens, 32, min(line, padded(spec.size)), 4, 3)
    return Tile(tokens, 64, min(LINE, padded(spec.size)), 2, 3)


def _even(spec: GpuSpec, load: Load, gpu: Gpu) -> tuple[int, int]:
    """Rows of a weight that one program reads for one token, and programs an SM, with the least idle time.

    Of equally even ones those with the most bytes on their way, which is what bandwidth takes.
    """
    most = max(1, min(8, WHOLE // spec.streamed // padded(spec.d)))
    used = max(1.0, spec.experts * load.used)
    found = []
    for neurons, programs in product({most, max(1, most // 2)}, (2, 1)):
        units, slots = used * ceil(spec.size / neurons), gpu.sms * programs
        idle = 1 - units / (ceil(units / slots) * slots)
        found.append((round(idle, 2), -neurons * programs, neurons, programs))
    return min(found)[2:]


def _neurons(spec: GpuSpec, load: Load, gpu: Gpu) -> int:
    """Rows of a weight in a tile of few tokens: 64, or fewer where SMs were left without a tile.

    Every tile reads all of x again, so low ones take more from L2 than from memory; wgmma needs 64.
    """
    used = spec.experts * load.used
    full = (n for n in (64, 32) if spec.size % n == 0 and used * (spec.size // n) >= gpu.sms)
    return next(full, 16)


def _fitting(gpu: Gpu, gemm: Gemm, tile: Tile) -> Tile:
    """A tile with as many of its buffers, two at least, as leave room for two CTAs on an SM."""
    tiles = [replace(tile, stages=n) for n in range(tile.stages, 1, -1)]
    return next((t for t in tiles if t.resident(gpu, gemm) >= 2), tiles[-1])
