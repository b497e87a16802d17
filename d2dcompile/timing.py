"""Median seconds of functions that alternate in one process, other processes' samples thrown away.

Two figures compare only when they were taken in turns: streaming bandwidth drifts by a third over minutes.
A sample is as many calls as fill WINDOW; it is repeated while others took too much of the processor.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Name = TypeVar("Name")
WINDOW = 0.04  # seconds a sample lasts at least: several scheduler ticks of 4 to 10 ms
FOREIGN = 0.1  # share of the processor that others may use in a sample
RETRIES = 4  # times a disturbed sample is taken again before it is kept
TICK = 1 / os.sysconf("SC_CLK_TCK")  # resolution of /proc/stat
BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal: fields of /proc/stat


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and interquartile range of the samples; noisy if most were disturbed.

    rounds: every sample, in the order of the rounds that all candidates took part in.
    """

    seconds: float
    iqr: float
    samples: int
    noisy: bool
    rounds: tuple[float, ...] = ()


def alternate(
    candidates: Mapping[Name, Callable[[], object]],
    estimates: Mapping[Name, float],
    repeats: int = 7,
    seed: int = 0,
) -> dict[Name, Timing]:
    """Timing of each candidate; every repeat runs all of them, in an order drawn anew.

    estimates: seconds a call by `estimate`, which decide how many calls make a sample.
    """
    order = list(candidates)
    draw = random.Random(seed)
    taken: dict[Name, list[tuple[float, bool]]] = {name: [] for name in order}
    for _ in range(repeats):
        draw.shuffle(order)
        for name in order:
            taken[name].append(_quiet_sample(candidates[name], estimates[name]))
    return {name: _summary(taken[name]) for name in candidates}


def speedup(rival: Timing, ours: Timing) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile over rounds of rival's seconds / ours.

    A machine that slows down for a while slows both samples of a round: these ratios spread less than their
    samples do. Both were timed by one call of `alternate`;
    ValueError if they have different numbers of rounds.
    """
    ratios = [a / b for a, b in zip(rival.rounds, ours.rounds, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return low, median, high


def estimate(call: Callable[[], object]) -> float:
    """Seconds a call, from calls doubled until they last a fifth of a sample; warms up on the way."""
    call()
    calls = 1
    while True:
        spent = _seconds(call, calls)
        if spent >= WINDOW / 5:
            return spent / calls
        calls *= 2


def _quiet_sample(call: Callable[[], object], expected: float) -> tuple[float, bool]:
    """Seconds a call, and whether other processes disturbed all attempts; the calmest attempt counts."""
    calls = max(1, -int(-WINDOW // expected))
    if expected < WINDOW:
        call()  # threads and code of the candidate before are still warm, its own are not
    best = (float("inf"), 0.0)
    for _ in range(1 + RETRIES):
        waited, foreign = _waited(), _foreign()
        spent = _seconds(call, calls)
        others = (_foreign() - foreign) / _cores() - TICK
        disturbed = max(_waited() - waited, others) / spent  # one late thread delays all
        best = min(best, (disturbed, spent / calls))
        if disturbed <= FOREIGN:
            break
    return best[1], best[0] > FOREIGN


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def _waited() -> float:
    """Seconds that threads of this process were ready to run while others had their cores; exact."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError):  # the thread ended; the kernel keeps no statistics
            total += int(path.read_text().split()[1])
    return total / 1e9


def _foreign() -> float:
    """Processor seconds of all others on all cores since boot; wrong by a tick a core.

    Sees what _waited cannot: others on cores that we leave idle, who take bandwidth.
    """
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:  # not Linux: nothing is known about the others
        return 0.0
    return sum(int(fields[i]) for i in BUSY) * TICK - time.process_time()


def _cores() -> int:
    return os.cpu_count() or 1


def _summary(samples: list[tuple[float, bool]]) -> Timing:
    times = [seconds for seconds, _ in samples]
    quiet = [seconds for seconds, noisy in samples if not noisy]
    kept = quiet if 2 * len(quiet) > len(times) else times
    low, median, high = statistics.quantiles(kept, n=4) if len(kept) > 1 else [kept[0]] * 3
    return Timing(median, high - low, len(kept), kept is not quiet, tuple(times))
