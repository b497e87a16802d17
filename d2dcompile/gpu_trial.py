"""Judging schedules on a GPU as a model runs them: weights cold, skewed masks, replays of CUDA graphs.

A trial holds so many copies of a block that its weights do not stay in L2 from one pass over them to the
next, each with lists of its own. On a CPU device kernels run in Triton's interpreter and by the clock, which
is good for nothing but to test this file.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import TuningError
from .gpu_blocks import GpuSchedule, GpuSpec
from .gpu_candidates import ranked, text
from .gpu_schedules import gpu_of
from .gpu_tuning import COMPILED
from .gpus import TARGETS, Gpu
from .kernels import device as devices
from .kernels.aot import compile_all
from .kernels.dispatch import dispatch
from .kernels.expert_mlp import expert_mlp
from .kernels.expert_mlp.call import NAMES, Call, launches, scalar_count
from .kernels.int8 import Copy, copy_of, weights_of
from .kernels.launching import Launched
from .kernels.native import SLABS
from .kernels.resources import Resources
from .load import Load
from .trial import CHECKED, routing_masks

COLD = 3  # times L2 that all copies take together
MOST_COPIES = 64
WARM = 3  # calls before a graph is captured: the kernels are loaded then
ERROR = 2  # times the error of plain PyTorch in the same dtype that a candidate may have
SERIALIZED = "ptxas runs its wgmma one after another"


class DeviceBench:
    """A `gpu_tuning.Bench` on a device.

    masks: recorded routing [rows, E] to cut the trial's masks from, row after row; without it they are
    random, as skewed as real routing. With it the load's union is what those masks use.
    """

    def __init__(
        self, spec: GpuSpec, load: Load, device: torch.device, masks: Tensor | None = None
    ) -> None:
        self.spec, self.load, self.device = spec, load, device
        self.gpu: Gpu = gpu_of(device)
        self.dtype = next(dtype for dtype, name in NAMES.items() if name == spec.dtype)
        neuron = spec.d * (2 if spec.gated else 1) + spec.out
        size = neuron * spec.experts * spec.size * spec.streamed
        copies = max(1, min(MOST_COPIES, -(-COLD * self.gpu.l2 // size)))
        self.copies = copies if device.type == "cuda" else 1
        self.weights = [self._weights(seed) for seed in range(self.copies)]
        self.int8 = [self._int8(weights) if spec.int8 else None for weights in self.weights]
        count = scalar_count(spec.activation)
        self.scalars = [torch.ones((), device=device, dtype=self.dtype)] * count
        self.masks = [self._mask(masks, seed).to(device) for seed in range(self.copies)]
        self.lists = [dispatch.meaning(mask) for mask in self.masks]
        draw = torch.Generator(device).manual_seed(1)
        self.x = self._normal((load.tokens, spec.d), 1.0, draw)
        self._graphs: dict[GpuSchedule, Callable[[], object]] = {}

    def _mask(self, recorded: Tensor | None, seed: int) -> Tensor:
        rows = self.load.tokens
        if recorded is None:
            return routing_masks(rows, self.spec.experts, self.load.share, seed)
        at = torch.arange(seed * rows, (seed + 1) * rows) % len(recorded)
        return recorded[at]

    def _normal(self, shape: tuple[int, ...], scale: float, draw: torch.Generator) -> Tensor:
        drawn = torch.randn(shape, generator=draw, device=self.device, dtype=torch.float32)
        return drawn.mul_(scale).to(self.dtype)

    def _weights(self, seed: int) -> dict[str, Tensor | None]:
        spec, draw = self.spec, torch.Generator(self.device).manual_seed(seed)
        hidden = spec.experts * spec.size
        held: dict[str, Tensor | None] = dict.fromkeys(SLABS)
        for name in ("w_up", "w_gate") if spec.gated else ("w_up",):
            held[name] = self._normal((hidden, spec.d), 1 / math.sqrt(spec.d), draw)
        held["w_down"] = self._normal((hidden, spec.out), 1 / math.sqrt(hidden), draw)
        return held

    def _int8(self, weights: Mapping[str, Tensor | None]) -> Copy:
        w_up, w_gate, w_down = (weights[name] for name in SLABS[:3])
        assert w_up is not None and w_down is not None
        return copy_of(w_up, w_gate, w_down, self.spec.experts)

    def refused(self, schedules: Sequence[GpuSchedule]) -> list[str | None]:
        """Kernels that do not compile, spill, or serialise; compiled side by side, for this device."""
        if self.device.type != "cuda":
            return [None] * len(schedules)
        return compiled_badly(self.spec, self.load.tokens, schedules, self.gpu.target)

    def wrong(self, schedule: GpuSchedule) -> str | None:
        """What is wrong with a candidate's output on poisoned memory, against fp64 on some tokens."""
        y = self.x.new_full((self.load.tokens, self.spec.out), torch.nan)
        try:
            self._call(0, schedule, y)()
        except Exception as raised:  # whatever Triton says of a candidate, the others go on
            return f"it does not run ({type(raised).__name__}: {str(raised)[:200]})"
        mask = self.masks[0] if schedule.strategy != "dense" else self.masks[0] | True
        some = torch.linspace(0, len(y) - 1, min(len(y), CHECKED)).long().to(self.device)
        int8 = self.int8[0] if schedule.strategy == "decode" else None
        exact, eager = (
            self._meaning(mask[some], some, dtype, int8) for dtype in (torch.float64, self.dtype)
        )
        if not y.isfinite().all():
            return "its output is not finite"
        error, allowed = ((t.double() - exact).norm() for t in (y[some], eager))
        least = torch.finfo(self.dtype).eps / 2 * exact.norm()
        if error > max(ERROR * allowed, least):
            return f"its error is {float(error):.1e}, plain PyTorch's {float(allowed):.1e}"
        return None

    def _meaning(self, mask: Tensor, some: Tensor, dtype: torch.dtype, int8: Copy | None) -> Tensor:
        held = self.weights[0]
        if int8 is not None:
            held = {**held, **dict(zip(SLABS, weights_of(int8, dtype), strict=False))}
        weights = [None if w is None else w.to(dtype) for w in held.values()]
        scalars = [s.to(dtype) for s in self.scalars]
        lists, x = dispatch.meaning(mask), self.x[some].to(dtype)
        found: Tensor = expert_mlp.meaning(x, *lists, *weights, None, scalars, self.spec.activation)
        return found

    def _call(self, copy: int, schedule: GpuSchedule, y: Tensor) -> Callable[[], object]:
        def once() -> None:
            weights, lists = self.weights[copy], self.lists[copy]
            call = Call(self.spec, self.x, lists, weights, self.scalars, y, self.int8[copy])
            with devices.on(self.device):
                call.run(schedule)

        return once

    def times(self, schedules: Sequence[GpuSchedule], samples: int) -> list[float]:
        """Median seconds of a call of each over passes of all copies, taking turns."""
        passes = [self._pass(schedule) for schedule in schedules]
        taken: list[list[float]] = [[] for _ in schedules]
        for _ in range(samples):
            for one, found in zip(passes, taken, strict=True):
                found.append(self._seconds(one) / self.copies)
        return [statistics.median(found) for found in taken]

    def _pass(self, schedule: GpuSchedule) -> Callable[[], object]:
        """A function that runs all copies once: on a GPU the replay of a graph, captured once."""
        if schedule not in self._graphs:
            y = self.x.new_empty(self.load.tokens, self.spec.out)
            calls = [self._call(copy, schedule, y) for copy in range(self.copies)]

            def once() -> None:
                for call in calls:
                    call()

            self._graphs[schedule] = once if self.device.type != "cuda" else captured(once)
        return self._graphs[schedule]

    def _seconds(self, once: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            once()
            return time.perf_counter() - began
        event: Any = torch.cuda.Event
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        once()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def captured(once: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of a function that was warmed up on another stream."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph.replay


@dataclass(frozen=True)
class Compiled:
    """A load's candidates as text, compiled for a target: the good, and why others are not."""

    spec: GpuSpec
    load: Load
    target: str
    good: list[str]
    refused: dict[str, str]


def precompile(spec: GpuSpec, load: Load, target: str, effort: str = "quick") -> Compiled:
    """Compile the candidates of a tuning run for a device that need not be here, into Triton's cache.

    Raises TuningError for a target of which no device is known.
    """
    if target not in TARGETS:
        raise TuningError(f"target is {target!r}; expected one of {', '.join(TARGETS)}.")
    candidates = ranked(spec, load, TARGETS[target], COMPILED[effort])
    reasons = compiled_badly(spec, load.tokens, candidates, target, progress=True)
    judged = dict(zip(map(text, candidates), reasons, strict=True))
    good = [name for name, reason in judged.items() if reason is None]
    return Compiled(spec, load, target, good, {n: r for n, r in judged.items() if r is not None})


def compiled_badly(
    spec: GpuSpec,
    tokens: int,
    schedules: Sequence[GpuSchedule],
    target: str,
    progress: bool = False,
) -> list[str | None]:
    """For each schedule, what is wrong with its kernels as compiled for a target, or None.

    Kernels that several schedules share are compiled once. Fills Triton's cache on the way.
    """
    noted = [launches(spec, tokens, schedule) for schedule in schedules]
    distinct = {_name(launch): launch for group in noted for launch in group}
    found = compile_all([launch.job(target) for launch in distinct.values()], progress=progress)
    judged = {name: judgement(result) for name, result in zip(distinct, found, strict=True)}
    reasons = [
        [f"{launch.name}: {judged[_name(launch)]}" for launch in group if judged[_name(launch)]]
        for group in noted
    ]
    return [group[0] if group else None for group in reasons]


def _name(launch: Launched) -> str:
    """A launch as text, tensors by dtype: equal for launches of the same compiled kernel."""
    job = launch.job("")
    return f"{job.fn} {job.args} {job.options}"


def judgement(found: Resources | str) -> str | None:
    """Why a compiled kernel is not worth timing, or None."""
    if isinstance(found, str):
        return found
    if found.spill:
        return f"spills {found.spill} bytes a thread"
    if found.resident() == 0:
        return f"does not fit: {found.shared} bytes of shared memory, {found.registers} registers"
    return SERIALIZED if found.serialized else None
