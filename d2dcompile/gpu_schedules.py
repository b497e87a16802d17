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

from .errors import TuningError
from .gpu_blocks import FEW, STRATEGIES, GpuSchedule, GpuSpec
from .gpu_defaults import default
from .gpus import GPUS, H100, Gpu
from .kernels.render import SKELETONS
from .load import Load
from .store import STORE
from .tiles import Tile

SHARE = 0.2  # executed share that is expected where nothing is known


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
    return _choose(spec, spec.possible(load), device, dense, _stamp())


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
    if isinstance(found, GpuEntry) and (dense or found.schedule.strategy != "dense"):
        return found.schedule
    return default(spec, load, gpu_of(device), dense)


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
    if any(type(flag) is not bool for flag in (spec.gated, spec.int8, schedule.swap, schedule.tma)):
        raise ValueError("gated, int8, swap and tma have to be true or false")
    held = min(up.block_m, schedule.down.block_m, FEW)
    if schedule.strategy == "decode" and given["tokens"] > held:
        raise ValueError(
            f"a decode schedule holds {held} tokens, its entry is for {given['tokens']}"
        )
    if schedule.strategy not in STRATEGIES:
        raise TuningError(
            f"Strategy {schedule.strategy!r} is not known; expected one of {', '.join(STRATEGIES)}."
        )
    return GpuEntry(**given, spec=spec, schedule=schedule)


STORE.register("multiprocessors", _entry)
