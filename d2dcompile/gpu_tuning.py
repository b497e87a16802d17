"""Search for the fastest schedule of a block on a GPU, under one load.

Candidates come ranked by the cost model. They are compiled side by side, those that spill or multiply one
after another are dropped, each is checked on poisoned memory, and the rest take turns in rounds of ever
more samples, half of them leaving each time. The closed-form default and the dense block never leave; the
default stays unless another beats it by more than the noise. The device is a `Bench`: a GPU, or in tests
the cost model itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attachment import attached
from .errors import TuningError
from .gpu_blocks import FEW, GpuSchedule, GpuSpec
from .gpu_candidates import modelled, ranked, text
from .gpu_defaults import default
from .gpu_schedules import GpuEntry, Where, bucket, key
from .gpus import BYTES, Gpu
from .kernels import native
from .kernels.expert_mlp.call import NAMES, of_native
from .load import Load
from .recording import record_masks
from .store import STORE
from .targets import Target, kinds_of

LOADS = {  # numbers of tokens, executed shares
    "quick": ((1, 8, 64, 512, 4096), (0.1, 0.25)),
    "full": ((1, 2, 8, 16, 32, 64, 128, 512, 2048, 4096, 16384), (0.05, 0.1, 0.25, 0.5)),
}
COMPILED = {"quick": 12, "full": 32}  # candidates
TIMED = {"quick": 6, "full": 12}
SAMPLES = {"quick": 5, "full": 15}  # of the first round
NOISE = 0.02  # a candidate has to be faster than the default by more
NEAR = 1.05  # times the roofline: nothing is left to find


class Bench(Protocol):
    """Where candidates for one kind of block and one load are judged."""

    gpu: Gpu

    def refused(self, schedules: Sequence[GpuSchedule]) -> list[str | None]:
        """For each, why it is not worth timing once compiled, or None."""

    def wrong(self, schedule: GpuSchedule) -> str | None:
        """What is wrong with a candidate's output, or None."""

    def times(self, schedules: Sequence[GpuSchedule], samples: int) -> list[float]:
        """Median seconds of a call of each, taking turns."""


@dataclass
class Search:
    """A search under one load: what was found, refused and measured so far.

    Attributes:
        spec, load, bench: what is searched for, and where.
        effort: "quick" or "full". until: `time.monotonic()` at which it ends.
        times: seconds of every candidate that was timed, of its last round.
        refused: reasons of the others.
    """

    spec: GpuSpec
    load: Load
    bench: Bench
    effort: str = "quick"
    until: float = float("inf")
    times: dict[GpuSchedule, float] = field(default_factory=dict)
    refused: dict[GpuSchedule, str] = field(default_factory=dict)

    def run(self) -> GpuSchedule:
        """The winner. Raises TuningError if the default is refused or computes something wrong."""
        own = default(self.spec, self.load, self.bench.gpu, dense=False)
        candidates = self._usable(own)
        always = [s for s in candidates if s == own or s.strategy == "dense"]
        racing = [*always, *(s for s in candidates if s not in always)][: TIMED[self.effort]]
        samples = SAMPLES[self.effort]
        while True:
            found = dict(zip(racing, self.bench.times(racing, samples), strict=True))
            self.times.update(found)
            others = sorted((s for s in racing if s not in always), key=lambda s: found[s])
            best = min(found, key=lambda s: found[s])
            done = found[best] <= NEAR * self.roofline() or time.monotonic() > self.until
            if done or len(others) <= 1 or self._within_noise(found, others):
                break
            racing, samples = [*always, *others[: (len(others) + 1) // 2]], 2 * samples
        return best if found[best] < found[own] / (1 + NOISE) else own

    def _usable(self, own: GpuSchedule) -> list[GpuSchedule]:
        """Candidates that compile well and compute the right thing, as ranked."""
        candidates = ranked(self.spec, self.load, self.bench.gpu, COMPILED[self.effort])
        for schedule, reason in zip(candidates, self.bench.refused(candidates), strict=True):
            if reason is not None:
                self.refused[schedule] = reason
        for schedule in candidates:
            if schedule not in self.refused and (reason := self.bench.wrong(schedule)) is not None:
                self.refused[schedule] = reason
        if own in self.refused:
            raise TuningError(
                f"{self.spec}, {self.load.tokens} tokens: the default schedule ({text(own)}) is refused: "
                f"{self.refused[own]}. Nothing was recorded."
            )
        return [schedule for schedule in candidates if schedule not in self.refused]

    def _within_noise(self, found: dict[GpuSchedule, float], others: Sequence[GpuSchedule]) -> bool:
        """Whether those still racing cannot be told apart."""
        return found[others[min(2, len(others) - 1)]] <= found[others[0]] * (1 + NOISE / 2)

    def roofline(self) -> float:
        """Seconds that the chosen experts take at the device's reached bandwidth and arithmetic."""
        gpu, block, load = self.bench.gpu, self.spec.block(), self.load
        weights = load.used * sum(block.streamed)
        values = load.tokens * (block.d + block.out) * BYTES[block.dtype]
        pairs = load.tokens * load.share * block.hidden
        flops = 2 * pairs * (block.ups * block.d + block.out)
        rate = gpu.rate(block.dtype, gpu.dense_fraction)
        return max((weights + values) / gpu.bandwidth(), flops / rate, gpu.floor)


class ModelBench:
    """The cost model as a device: nothing is compiled or run, times are the model's, plus fixed noise.

    For tests of the search, and to see before a device is there what it would try.
    """

    def __init__(self, gpu: Gpu, spec: GpuSpec, load: Load, noise: float = 0.0) -> None:
        self.gpu, self.spec, self.load, self.noise = gpu, spec, load, noise
        self.timed = 0

    def refused(self, schedules: Sequence[GpuSchedule]) -> list[str | None]:
        return [None] * len(schedules)

    def wrong(self, schedule: GpuSchedule) -> str | None:
        return None

    def times(self, schedules: Sequence[GpuSchedule], samples: int) -> list[float]:
        self.timed += len(schedules) * samples
        found = []
        for schedule in schedules:
            spread = (crc32(text(schedule).encode()) % 1000 / 500 - 1) * self.noise
            found.append(modelled(self.spec, self.load, self.gpu, schedule) * (1 + spread))
        return found


def specs_of(
    target: Target, dtypes: Sequence[torch.dtype] = (), int8: bool = False
) -> list[GpuSpec]:
    """The distinct kinds of blocks of a target on GPUs, see `targets.kinds_of`; of a conversion in bf16.

    int8: whether each comes with int8 copies for few tokens too.
    """
    found = kinds_of(target, dtypes, tuple(NAMES), [torch.bfloat16])
    ways = (False, True) if int8 else (False,)
    every = (of_native(spec, dtype, way) for spec, dtype in found for way in ways)
    return list(dict.fromkeys(every))


def masks_of(
    target: object, batches: Iterable[Any], specs: Iterable[GpuSpec]
) -> dict[GpuSpec, Tensor]:
    """The experts that a converted model's tokens choose, by kind of block; its sites one after another.

    Raises TuningError where the target is not a model.
    """
    if not isinstance(target, nn.Module):
        raise TuningError(
            f"batches are for a converted model; the target is {type(target).__name__}."
        )
    recorded, wanted = record_masks(target, batches), set(specs)
    found: dict[GpuSpec, list[Tensor]] = {}
    for state in attached(target):
        dtype = state.weight("down").dtype
        for int8 in (False, True):
            spec = of_native(native.spec_of(state.experts, dtype), dtype, int8)
            if spec in wanted and state.site.name in recorded:
                found.setdefault(spec, []).append(recorded[state.site.name])
    return {spec: torch.cat(parts) for spec, parts in found.items()}


def tune(
    specs: Sequence[GpuSpec],
    device: torch.device,
    *,
    effort: str = "quick",
    budget: float = 120.0,
    progress: bool = True,
    masks: Mapping[GpuSpec, Tensor] | None = None,
    bench: Callable[[GpuSpec, Load], Bench] | None = None,
) -> dict[GpuSpec, list[GpuEntry]]:
    """Search a schedule for every kind of block and load on a device, and keep the winners for later runs.

    effort: "quick" or "full", how many loads and candidates. budget: seconds, shared out among the
    searches; loads that it does not reach keep the closed form, and a later run goes on with them.
    masks: recorded routing [rows, E] by kind of block; random masks, as skewed as real routing, without.
    bench: where candidates are judged, the device by default.

    Results are stored per user (`store.folder`) as each is done.

    Raises TuningError for an unknown effort, or where a default schedule computes something wrong.
    """
    if effort not in LOADS:
        raise TuningError(f"effort is {effort!r}; expected one of {', '.join(LOADS)}.")
    where, end = Where.of(device), time.monotonic() + budget
    known = STORE.read()
    tasks = [(spec, load) for spec in specs for load in loads(spec, effort, masks)]
    fresh = [task for task in tasks if key(task[0], where, bucket(task[1])) not in known]
    found: dict[GpuSpec, list[GpuEntry]] = {spec: [] for spec in specs}
    for spec, load in tasks:
        held = known.get(key(spec, where, bucket(load)))
        if isinstance(held, GpuEntry):
            found[spec].append(held)
    for done, (spec, load) in enumerate(tqdm(fresh, "tune", disable=not progress)):
        now = time.monotonic()
        if now > end:
            break
        judge = bench(spec, load) if bench else _bench(spec, load, device, masks)
        until = now + (end - now) / (len(fresh) - done)
        search = Search(spec, load, judge, effort, until)
        entry = _entry(search, search.run(), where)
        STORE.add([entry])
        found[spec].append(entry)
    return found


def _bench(
    spec: GpuSpec, load: Load, device: torch.device, masks: Mapping[GpuSpec, Tensor] | None
) -> Bench:
    from .gpu_trial import DeviceBench

    return DeviceBench(spec, load, device, None if masks is None else masks.get(spec))


def loads(spec: GpuSpec, effort: str, masks: Mapping[GpuSpec, Tensor] | None = None) -> list[Load]:
    """The loads that a run covers: numbers of tokens, executed shares, and the union they lead to.

    With int8 copies those of few tokens, since no others read them.
    """
    tokens, shares = LOADS[effort]
    if spec.int8:
        tokens = tuple(n for n in tokens if n <= FEW)
    recorded = None if masks is None else masks.get(spec)
    if recorded is None:
        every = [spec.possible(Load(n, share)) for share in shares for n in tokens]
        return list(dict.fromkeys(every))
    share = float(recorded.float().mean())
    return [Load(n, share, max(share, _union(recorded, n))) for n in tokens]


def _union(masks: Tensor, tokens: int) -> float:
    """The mean part of the experts that `tokens` neighbouring rows of recorded masks use."""
    whole = len(masks) // tokens * tokens
    if not whole:
        return float(masks.any(0).float().mean())
    return float(masks[:whole].view(-1, tokens, masks.shape[1]).any(1).float().mean())


def _entry(search: Search, winner: GpuSchedule, where: Where) -> GpuEntry:
    """What a search found, as it is kept."""
    tokens, rows, union = bucket(search.load)
    return GpuEntry(
        spec=search.spec,
        device=where.device,
        multiprocessors=where.multiprocessors,
        software=where.software,
        tokens=tokens,
        rows=rows,
        union=union,
        schedule=winner,
        times={text(schedule): seconds * 1e6 for schedule, seconds in search.times.items()},
        share=search.load.share,
        used=search.load.used,
        roofline=min(1.0, search.roofline() / search.times[winner]),
    )
