"""Measured schedules of kernels: a JSON file per user, read when a block is prepared, written by `tune`.

An entry belongs to one kind of block (native.Spec) on one processor with one number of threads, made by
one version of the kernels' text; anything else takes the closed-form default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .ir import Schedule
from .kernels import build, native
from .kernels.native import Spec
from .store import STORE

MOST_ROWS = 1 << 40


@dataclass(frozen=True)
class Entry:
    """A schedule and what it rests on.

    Attributes:
        spec, device, threads: the kind of block, the processor's name and instruction sets, and how
            many threads ran.
        kernels: `kernels_version` when it was measured.
        schedule: the winner.
        times: {tokens: {candidate: microseconds a call}} at the executed share `share`.
        share: see there.
        versions: of torch and of this package's kernels, for the reader.
    """

    spec: Spec
    device: str
    threads: int
    kernels: str
    schedule: Schedule
    times: Mapping[str, Mapping[str, float]]
    share: float
    versions: Mapping[str, str]

    @property
    def key(self) -> str:
        return key(self.spec, self.device, self.threads, self.kernels)


@lru_cache(maxsize=1)
def device() -> str:
    """This processor as schedules are keyed by: its model's name and instruction sets."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return f"{name or 'unknown'}: {build.processor()}"


@lru_cache(maxsize=1)
def kernels_version() -> str:
    """A hash of the kernels' skeletons: times of other ones do not count."""
    names = ("vec.h", *native.BODY)
    text = "".join((native.SKELETONS / name).read_text() for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def key(spec: Spec, device: str, threads: int, kernels: str) -> str:
    """The name of an entry."""
    return f"{spec}: {spec.activation}, router {spec.router} | {device} | {threads} | {kernels}"


def default(spec: Spec) -> Schedule:
    """The closed-form schedule of a kind of block on this processor.

    On tile registers, where arithmetic is cheap, copying the rows of chosen tokens and adding up outputs in
    memory weighs more: running everything was as fast as an executed share of .71 to .82 with experts of 64
    (768/3072 and 2048/5632, 197 and 788 tokens, two cores of a Xeon), of .53 with experts of 32 (384/1536).
    In fp32 it was as fast as .95 with experts of 64 (768/3072, 788 tokens), of .85 with experts of 32
    (384/1536, 2,048 tokens; the same Xeon, no other processor was measured for it), since what all tokens run
    is summed over several experts at once.
    """
    tiles = spec.bf16 and "amx_bf16" in build.processor()
    if spec.size < 64:
        return Schedule(break_even=((129, 0.55 if tiles else 0.85),))
    return Schedule(break_even=((129, 0.75),)) if tiles else Schedule()


def lookup(spec: Spec) -> Schedule:
    """The measured schedule of a kind of block on this machine, or the default one."""
    found = STORE.get(key(spec, device(), torch.get_num_threads(), kernels_version()))
    return found.schedule if isinstance(found, Entry) else default(spec)


def _entry(item: Any) -> Entry:
    """An entry from JSON, with every field of its type and in its range."""
    given = dict(item)
    spec, chosen = Spec(**given.pop("spec")), dict(given.pop("schedule"))
    pairs = tuple((rows, float(share)) for rows, share in chosen.pop("break_even"))
    schedule = Schedule(**chosen, break_even=pairs)
    sizes = (spec.d, spec.out, spec.experts, spec.size, spec.router, given["threads"])
    whole = (schedule.fused_rows, schedule.near, schedule.far, *(rows for rows, _ in pairs))
    if any(type(n) is not int or not 0 <= n <= MOST_ROWS for n in (*sizes, *whole)):
        raise ValueError("sizes and numbers of tokens have to be integers from 0 on")
    if any(type(flag) is not bool for flag in (spec.gated, spec.bf16, schedule.decode)):
        raise ValueError("gated, bf16 and decode have to be true or false")
    if not all(0 <= share <= 1 for _, share in pairs):
        raise ValueError("break-even shares have to lie in 0..1")
    if [rows for rows, _ in pairs] != sorted({rows for rows, _ in pairs}):
        raise ValueError("break-even tokens have to rise")
    return Entry(**given, spec=spec, schedule=schedule)


STORE.register("threads", _entry)
