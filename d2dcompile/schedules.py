"""Measured schedules of kernels: a JSON file per user, read when a block is prepared, written by `tune`.

An entry belongs to one kind of block (native.Spec) on one processor with one number of threads, made by
one version of the kernels' text; anything else takes the closed-form default. Writes are locked and
atomic, so tuning runs may overlap. D2D_CACHE names another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from .errors import DenseFallbackWarning, TuningError
from .ir import Schedule
from .kernels import build, native
from .kernels.native import Spec

FORMAT = 1
NAME = "schedules.json"
MOST_ROWS = 1 << 40
_LOCK = threading.Lock()  # filelock's locks are reentrant within a process


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


def folder() -> Path:
    """Where measured schedules are kept: $D2D_CACHE, or d2dcompile in the user's cache folder."""
    given = os.environ.get("D2D_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d2dcompile"


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


def lookup(spec: Spec) -> Schedule:
    """The measured schedule of a kind of block on this machine, or the default one."""
    found = _held(folder() / NAME).get(
        key(spec, device(), torch.get_num_threads(), kernels_version())
    )
    return Schedule() if found is None else found.schedule


def read(path: Path) -> dict[str, Entry]:
    """All entries of a file by key; none if it does not exist. Raises TuningError if it is damaged."""
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise TuningError(f"{path} has format {document['format']!r}; expected {FORMAT}.")
        entries = [_entry(item) for item in document["entries"]]
    except TuningError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise TuningError(
            f"{path} does not hold schedules as `d2dcompile tune` writes them "
            f"({type(error).__name__}: {error}). Delete it and tune again."
        ) from None
    return {entry.key: entry for entry in entries}


def add(entries: Iterable[Entry], path: Path | None = None) -> Path:
    """Put entries into a file, in place of older ones of the same key; returns its path."""
    path = path or folder() / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with _LOCK, FileLock(f"{path}.lock"):
        held = read(path) | {entry.key: entry for entry in entries}
        document = {"format": FORMAT, "entries": [asdict(held[name]) for name in sorted(held)]}
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        os.replace(file.name, path)
    _read_once.cache_clear()
    return path


def _held(path: Path) -> Mapping[str, Entry]:
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return {}
    return _read_once(path, stamp)


@lru_cache(maxsize=2)
def _read_once(path: Path, stamp: int) -> Mapping[str, Entry]:
    """A file's entries as of one time of change; a damaged file is one warning, not an error."""
    try:
        return read(path)
    except TuningError as error:
        warnings.warn(
            f"{error} Until then default schedules run.", DenseFallbackWarning, stacklevel=2
        )
        return {}


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
