"""How a block's Triton kernels run on a GPU: schedules, the closed-form default, and the measured ones.

A schedule belongs to a kind of block, a device and a load: how many tokens a call has, how many rows an
expert gets of them and what part of the experts is used at all, each rounded to a power of two. What was
never measured takes the cost model's choice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import cost
from .errors import TuningError
from .gpus import GPUS, H100, Gpu
from .kernels.render import SKELETONS
from .load import Block, Load
from .store import Store
from .tiles import LINE, Gemm, Tile, default_tile, down_gemm, up_gemm

STRATEGIES = ("decode", "pairs", "atomic", "dense")
FEW = 64  # tokens up to which the union of chosen experts is streamed
SHARE = 0.2  # executed share that is expected where nothing is known
ROUTER = 128  # router's width that the cost model takes where nothing is known
ROWS_BYTES = 256 << 20  # of the buffer of pairs' products, whose columns are worked off in chunks
SWAP_BELOW = 64  # rows an expert: wgmma needs 64 rows of its first operand
WHOLE = 1 << 15  # values of a weight that a program of the one-token kernel holds at once


@dataclass(frozen=True)
class GpuSpec:
    """What generated kernels depend on.

    Attributes:
        d, out: features of the block's input and output. experts, size: E experts of F neurons.
        gated, activation: as of a Site.
        dtype: "bf16", "fp16" or "fp32". precision: "ieee" or "tf32", how fp32 is multiplied.
    """

    d: int
    out: int
    experts: int
    size: int
    gated: bool
    activation: str
    precision: str = "ieee"
    dtype: str = "bf16"

    def __str__(self) -> str:
        kind = "gated" if self.gated else "plain"
        return f"{kind} {self.d} -> {self.experts} x {self.size} -> {self.out} {self.dtype}"

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return 4 if self.dtype == "fp32" else 2

    def block(self, router: int = ROUTER) -> Block:
        """The block as the cost model sees it."""
        dtype = "tf32" if self.precision == "tf32" else self.dtype
        hidden = self.experts * self.size
        return Block(self.d, self.out, hidden, self.experts, router, self.gated, dtype)


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


@dataclass(frozen=True)
class GpuEntry:
    """A measured schedule and what it rests on.

    Attributes:
        spec, device, multiprocessors, software: the kind of block, the device's name and size, and the
            versions of Triton, torch and the kernels' text.
        tokens, rows, union: the load's bucket, see `bucket`.
        schedule: the winner.
        times: {candidate: microseconds a call} of the last round; "dense" among them.
        share, used: executed share and part of the experts in use when it was measured.
        roofline: the winner's share of what the device could reach, 0..1.
    """

    spec: GpuSpec
    device: str
    multiprocessors: int
    software: str
    tokens: int
    rows: int
    union: int
    schedule: GpuSchedule
    times: Mapping[str, float]
    share: float
    used: float
    roofline: float

    @property
    def key(self) -> str:
        where = Where(self.device, self.multiprocessors, self.software)
        return key(self.spec, where, (self.tokens, self.rows, self.union))


@dataclass(frozen=True)
class Where:
    """A device and the software that compiles for it: schedules of others do not count."""

    device: str
    multiprocessors: int
    software: str

    @classmethod
    def of(cls, device: torch.device) -> Where:
        """A CUDA device of this machine, or for the interpreter its name."""
        if device.type != "cuda":
            return cls("interpreter", 1, software())
        found = torch.cuda.get_device_properties(device)
        return cls(found.name, found.multi_processor_count, software())


@lru_cache(maxsize=1)
def software() -> str:
    """Versions of Triton, torch and the kernels' text, on which the best schedule depends."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(SKELETONS.glob("*.py")))
    kernels = hashlib.sha256(text.encode()).hexdigest()[:12]
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"triton {triton}, torch {torch.__version__.partition('+')[0]}, kernels {kernels}"


def bucket(load: Load) -> tuple[int, int, int]:
    """(tokens, rows of an expert in use, percent of the experts in use) of a load, as powers of two."""
    percent = _power(100 * load.used) if load.tokens <= FEW else 100
    return _power(load.tokens), _power(load.rows), min(100, percent)


def _power(value: float) -> int:
    return 1 << max(0, math.ceil(value) - 1).bit_length()


def key(spec: GpuSpec, where: Where, at: tuple[int, int, int]) -> str:
    """The name of an entry."""
    tokens, rows, union = at
    return (
        f"{spec} {spec.precision} {spec.activation} | {where.device} {where.multiprocessors} | "
        f"{where.software} | {tokens} tokens, {rows} rows an expert, {union} % used"
    )


def gpu_of(device: torch.device) -> Gpu:
    """The device as the cost model sees it: a known one by name, else an H100 of its size."""
    if device.type != "cuda":
        return H100
    found = torch.cuda.get_device_properties(device)
    known = next((gpu for name, gpu in GPUS.items() if name in found.name), H100)
    return replace(known, sms=found.multi_processor_count)


def choose(spec: GpuSpec, load: Load, device: torch.device, dense: bool) -> GpuSchedule:
    """The measured schedule of a load on a device, or the closed-form one.

    dense: whether every expert may run where few would be skipped; else chosen experts only.
    """
    return _choose(spec, load, device, dense, _stamp())


def _stamp() -> int:
    try:
        return STORE.path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=4096)
def _choose(
    spec: GpuSpec, load: Load, device: torch.device, dense: bool, stamp: int
) -> GpuSchedule:
    found = STORE.get(key(spec, Where.of(device), bucket(load)))
    if found is not None and (dense or found.schedule.strategy != "dense"):
        return found.schedule
    return default(spec, load, gpu_of(device), dense)


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
        neurons = max(1, min(8, WHOLE // padded(spec.d)))
        down = Tile(1, 128, min(128, padded(spec.size)), 8, 1)
        return GpuSchedule("decode", Tile(1, neurons, padded(spec.d), 8, 1), down)
    tokens, block = padded(load.tokens), spec.block()
    neurons = _neurons(spec, load, gpu)
    line = LINE // spec.itemsize
    inner = min(64 // neurons * line, padded(spec.d))
    up = replace(up_gemm(block, load), swapped=True)
    down = Tile(tokens, 128, min(line, padded(spec.size)), 4, 3)
    return GpuSchedule(
        "decode",
        turned(_fitting(gpu, up, Tile(neurons, tokens, inner, 4, 4)), True),
        _fitting(gpu, down_gemm(block, load), down),
    )


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


def _entry(item: Any) -> GpuEntry:
    """An entry from JSON, with every field of its type and in its range."""
    given = dict(item)
    spec, chosen = GpuSpec(**given.pop("spec")), dict(given.pop("schedule"))
    up, down = (Tile(**chosen.pop(name)) for name in ("up", "down"))
    schedule = GpuSchedule(**chosen, up=up, down=down)
    sizes = (spec.d, spec.out, spec.experts, spec.size, schedule.splits, given["tokens"])
    whole = (*sizes, given["rows"], schedule.per_multiprocessor, *asdict(up).values())
    if any(type(n) is not int or n < 1 for n in (*whole, *asdict(down).values())):
        raise ValueError("sizes, tiles and buckets have to be integers from 1 on")
    if any(type(flag) is not bool for flag in (spec.gated, schedule.swap, schedule.tma)):
        raise ValueError("gated, swap and tma have to be true or false")
    if schedule.strategy not in STRATEGIES:
        raise TuningError(
            f"Strategy {schedule.strategy!r} is not known; expected one of {', '.join(STRATEGIES)}."
        )
    return GpuEntry(**given, spec=spec, schedule=schedule)


STORE = Store("gpu_schedules.json", _entry)
