"""Schedules of a block on a GPU that are worth compiling, ranked by the cost model before any is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product, zip_longest
from math import ceil

from . import cost
from .gpu_blocks import FEW, GpuSchedule, GpuSpec, chunks
from .gpu_defaults import default, gemms, of_strategy, turned, up_tile
from .gpus import H100, Gpu
from .load import Load
from .tiles import Tile, candidates, estimate

TILES = 6  # of each product that are combined with those of the other
NEURONS, WARPS, SPLITS, PROGRAMS = (4, 8, 16), (4, 8, 16), (4, 8, 16), (1, 2, 4)  # of one token
WEIGHT_ROWS = (16, 64)  # of a program for few tokens: mma.sync, wgmma
INT8_ROWS = (16, 32, 64)  # of int8 weights
TMA = ("sm_90", "sm_100")
ALIGNED = 16  # bytes that a weight's rows have to be a multiple of, to be read by descriptors


def ranked(spec: GpuSpec, load: Load, gpu: Gpu, limit: int) -> list[GpuSchedule]:
    """The schedules that the model takes for the fastest, in that order, at most `limit`.

    Each way to compute the block (strategy, order of operands, descriptors) sends its fastest in turn,
    since the model knows less about them than about tiles of one. The closed-form default and running
    everything are always among them.
    """
    timed = dict(_all(spec, load, gpu))
    ways: dict[tuple[str, bool, bool], list[GpuSchedule]] = {}
    for schedule in sorted(timed, key=lambda schedule: timed[schedule]):
        ways.setdefault((schedule.strategy, schedule.swap, schedule.tma), []).append(schedule)
    always = [default(spec, load, gpu, dense=False), of_strategy("dense", spec, load, gpu)]
    in_turn = (s for turn in zip_longest(*ways.values()) for s in turn if s not in (None, *always))
    kept = [*always, *islice(in_turn, max(0, limit - len(always)))]
    return sorted(kept, key=lambda s: modelled(spec, load, gpu, s))


def _all(spec: GpuSpec, load: Load, gpu: Gpu) -> Iterator[tuple[GpuSchedule, float]]:
    """Every schedule that fits, with the model's seconds."""
    for schedule in (*_grouped(spec, load, gpu), *_decode(spec, load)):
        yield schedule, modelled(spec, load, gpu, schedule)


def _grouped(spec: GpuSpec, load: Load, gpu: Gpu) -> Iterator[GpuSchedule]:
    """Tokens grouped by expert: the best tiles of both products, with each other."""
    for swap in (False, True) if gpu.target == "sm_90" else (False,):
        up, down = gemms(spec, load, swap)
        ups, downs = (
            [turned(tile, swap) for tile, _ in candidates(gpu, gemm, TILES)] for gemm in (up, down)
        )
        for strategy, first, second, tma in product(
            ("pairs", "atomic"), ups, downs, (False, True) if _describable(spec, gpu) else (False,)
        ):
            yield GpuSchedule(strategy, first, second, swap=swap, tma=tma)


def _describable(spec: GpuSpec, gpu: Gpu) -> bool:
    """Whether weights can be read through descriptors."""
    rows = (spec.d * spec.itemsize, spec.out * spec.itemsize)
    return gpu.target in TMA and not any(size % ALIGNED for size in rows)


def _decode(spec: GpuSpec, load: Load) -> Iterator[GpuSchedule]:
    """The union of chosen experts streamed once."""
    if load.tokens > FEW:
        return
    plain = of_strategy("decode", spec, load, H100)
    if load.tokens == 1:
        for neurons, warps, splits, programs in product(NEURONS, WARPS, SPLITS, PROGRAMS):
            if neurons * plain.up.block_k <= 1 << 16:
                up = replace(plain.up, block_n=neurons, warps=warps)
                yield replace(plain, up=up, splits=splits, per_multiprocessor=programs)
        return
    rows = INT8_ROWS if spec.int8 else WEIGHT_ROWS
    for neurons, stages, splits, programs in product(rows, (3, 4), SPLITS, PROGRAMS):
        up = replace(up_tile(spec, neurons, plain.up.block_m), stages=stages)
        yield replace(plain, up=up, splits=splits, per_multiprocessor=programs)


def modelled(spec: GpuSpec, load: Load, gpu: Gpu, schedule: GpuSchedule) -> float:
    """The model's seconds of a call's experts, routing left out."""
    block = spec.block()
    if schedule.strategy == "dense":
        return cost.dense_time(gpu, block, load.tokens)
    if schedule.strategy == "decode":
        time = cost.union_time(gpu, block, load) - cost.router_time(gpu, block, load)
        return time / _filled(spec, load, gpu, schedule)
    up, down = gemms(spec, load, schedule.swap)
    tiles = [turned(tile, schedule.swap) for tile in (schedule.up, schedule.down)]
    time = estimate(gpu, up, tiles[0])
    if schedule.strategy == "atomic":
        moved = cost.atomics_time(gpu, block, load) - cost.up_time(gpu, block, load)
        return time + max(estimate(gpu, down, tiles[1]), moved - cost.router_time(gpu, block, load))
    parts = chunks(spec, load.tokens, schedule.down.block_n)
    rest = cost.pairs_time(gpu, block, load, parts) - cost.router_time(gpu, block, load)
    rest -= cost.up_time(gpu, block, load)
    return time + max(rest, estimate(gpu, replace(down, n=ceil(down.n / parts)), tiles[1]) * parts)


def _filled(spec: GpuSpec, load: Load, gpu: Gpu, schedule: GpuSchedule) -> float:
    """The part of the programs' time that is work: units of neurons do not divide evenly."""
    units = max(1.0, load.used * spec.experts) * ceil(spec.size / schedule.up.block_n)
    programs = gpu.sms * schedule.per_multiprocessor
    even = units / (ceil(units / programs) * programs)
    columns = ceil(spec.out / schedule.down.block_n) * schedule.splits
    shared = columns / (ceil(columns / gpu.sms) * gpu.sms)
    return (even + shared) / 2


def tile_text(tile: Tile) -> str:
    """A tile in a few characters: rows x columns x inner, warps, stages."""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} {tile.warps}w{tile.stages}s"


def text(schedule: GpuSchedule) -> str:
    """A schedule in one line."""
    flags = " weights first" * schedule.swap + " TMA" * schedule.tma
    if schedule.strategy == "dense":
        return "dense"
    tiles = f"{tile_text(schedule.up)}, {tile_text(schedule.down)}"
    more = f", {schedule.splits} splits" if schedule.strategy == "decode" else ""
    return f"{schedule.strategy}{flags} {tiles}{more}, {schedule.per_multiprocessor} a SM"
