"""Where candidates run: a GPU with CUDA graphs and events, or the CPU with a clock for a dry run."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Replay = Callable[[], object]
Work = Callable[[], list[Tensor]]
WINDOW = 0.004  # seconds of one sample at least
WARM = 0.3  # seconds of products after which clocks are up
BYTES = 1 << 30  # of the copy that measures bandwidth: 20 times an L2
GEMM = {torch.bfloat16: 8192, torch.float32: 4096}  # edge of the product that measures FLOP/s


class Lost(BaseException):
    """The device takes no more work in this process: a kernel read or wrote where it may not."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one replay: median and interquartile range of the samples."""

    seconds: float
    iqr: float
    samples: int


class Gpu:
    """The current CUDA device."""

    name = "cuda"
    timed_as = "CUDA graph"
    least_turns = 16  # of a graph at few tokens: its start then costs next to nothing
    replays = 10  # that have to give the same bits

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(0)
        self.cache = int(self.properties.L2_cache_size)

    def describe(self) -> dict[str, Any]:
        p = self.properties
        return {
            "name": p.name,
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": self.cache,
            "memory_bytes": p.total_memory,
        }

    def capture(self, work: Work) -> tuple[Replay, list[Tensor]]:
        """A replay of what `work` launches, and the outputs that it fills (without graphs, anew).

        Runs it once before, on the stream of the capture: what libraries set up for a stream, and
        modules that are loaded at first use, then stay out of the graph.
        """
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            work()
            stream.synchronize()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    kept = work()
            except Exception as error:
                cause = error.__context__ or error  # the end of a broken capture raises once more
                del graph
                self._mend(pool)
                raise RuntimeError(f"not captured: {cause}") from cause
        torch.cuda.synchronize()
        return graph.replay, kept

    def _mend(self, pool: Any) -> None:
        """Leave a broken capture behind. Raises Lost if no graph can be captured any more.

        A capture whose end raised leaves the allocator in it, which then refuses to empty its cache.
        """
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(0, pool)
        with suppress(Exception):
            torch._C._cuda_releasePool(0, pool)
        self.sync()
        probe = torch.zeros(1, device="cuda")
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                probe.add_(1)
        except Exception as error:
            raise Lost(f"nothing is captured any more: {error}") from error

    def seconds(self, replay: Replay, times: int) -> float:
        """Of one replay, in a row of `times` behind one that is not timed."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replay()
        start.record()
        for _ in range(times):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times

    def sync(self) -> None:
        """Wait for all work. Raises Lost if the device is out of order since."""
        try:
            torch.cuda.synchronize()
        except Exception:
            try:
                torch.cuda.synchronize()
            except Exception as error:
                raise Lost(str(error).splitlines()[0]) from error
            raise

    def free(self) -> int:
        """Bytes that can be allocated."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def ceilings(self, dtype: torch.dtype) -> dict[str, tuple[Replay, float]]:
        """{"copy", "product": (replay, bytes or FLOPs of one)}."""
        source = torch.randint(-(2**31), 2**31, (BYTES // 4,), dtype=torch.int32, device="cuda")
        target = torch.empty_like(source)
        copy, _ = self.capture(lambda: [target.copy_(source)])
        n = GEMM[dtype]
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        c = torch.empty_like(a)
        product, _ = self.capture(lambda: [torch.mm(a, b.t(), out=c)])
        start = time.perf_counter()
        while time.perf_counter() - start < WARM:
            product()
            torch.cuda.synchronize()
        return {"copy": (copy, 2.0 * BYTES), "product": (product, 2.0 * n**3)}


class Dry:
    """The CPU, on which Triton's interpreter stands in for a GPU: times mean nothing."""

    name = "cpu"
    timed_as = "wall clock, a dry run"
    least_turns = replays = 2
    cache = 1 << 10

    def describe(self) -> dict[str, Any]:
        return {"name": "Triton's interpreter", "multiprocessors": 0, "l2_bytes": 0}

    def capture(self, work: Work) -> tuple[Replay, list[Tensor]]:
        kept: list[Tensor] = []

        def replay() -> None:
            kept[:] = work()

        return replay, kept

    def seconds(self, replay: Replay, times: int) -> float:
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start

    def sync(self) -> None:
        pass

    def free(self) -> int:
        return 1 << 30

    def ceilings(self, dtype: torch.dtype) -> dict[str, tuple[Replay, float]]:
        a = torch.randn(64, 64)
        return {
            "copy": (lambda: a.clone(), 2.0 * a.nbytes),
            "product": (lambda: a @ a, 2.0 * 64**3),
        }


Place = Gpu | Dry


def alternate(place: Place, replays: Mapping[str, Replay], repeats: int) -> dict[str, Timing]:
    """Timing of each candidate; every repeat takes a sample of all of them, in an order drawn anew.

    Without repeats the estimate has to do, which decides how many replays make a sample.
    """
    estimates = {name: place.seconds(replay, 1) for name, replay in replays.items()}
    order, draw = list(replays), random.Random(0)
    taken = {name: [] if repeats else [estimates[name]] for name in order}
    for _ in range(repeats):
        draw.shuffle(order)
        for name in order:
            times = max(1, -int(-WINDOW // max(estimates[name], 1e-9)))
            taken[name].append(place.seconds(replays[name], times))
    return {name: _summary(samples) for name, samples in taken.items()}


def _summary(samples: list[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return Timing(median, high - low, len(samples))


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN or the largest integer inside."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def poison(tensors: list[Tensor]) -> None:
    """Overwrite outputs, so that a replay that writes less than all of them is found out."""
    for tensor in tensors:
        tensor.fill_(torch.nan)
