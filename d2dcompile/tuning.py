"""tune: which schedule of its kernel runs each kind of block fastest on this machine, measured.

Candidates take turns in one process on cold weights and skewed masks; each is first checked against
the op's meaning on poisoned memory. The closed-form default always takes part and stays unless another
beats it by more than the noise.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from . import gpu_tuning, schedules, timing
from .attachment import attached
from .errors import D2DWarning, TuningError
from .gpu_blocks import GpuSpec
from .gpu_schedules import GpuEntry
from .ir import Schedule
from .kernels import build, native
from .kernels.device import has_triton
from .kernels.native import Spec
from .schedules import Entry
from .store import STORE
from .targets import Target, kinds_of
from .trial import Candidate, Trial

SHARE = 0.2  # executed, at which schedules are compared
SHARES = (0.6, 0.8, 0.9, 1.0)  # between which the break-even with running everything is looked for
ROWS = {"quick": (1, 4, 16, 64, 256), "full": (1, 4, 16, 64, 256, 1024)}
REPEATS = {"quick": 3, "full": 7}
NEAR, FAR = (2048, 8192, 32768), (8192, 65536, 262144)  # bytes to fetch ahead
NOISE = 0.02  # a candidate has to be faster than the default by more
ALWAYS_FUSED = 1 << 20  # tokens, where the two-phase schedule never won
DTYPES = (torch.float32, torch.bfloat16)


def specs_of(target: Target, dtypes: Sequence[torch.dtype] = ()) -> list[Spec]:
    """The distinct kinds of blocks of a target on CPUs, see `targets.kinds_of`; of a conversion in fp32 and
    bf16."""
    return list(dict.fromkeys(spec for spec, _ in kinds_of(target, dtypes, DTYPES, DTYPES)))


@dataclass
class Run:
    """One kind of block being tuned: what was measured so far, and the schedule that follows."""

    trial: Trial
    repeats: int
    until: float
    schedule: Schedule = field(init=False)
    times: dict[int, dict[str, float]] = field(default_factory=dict)
    noisy: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.schedule = schedules.default(self.trial.spec)

    def compare(self, rows: int, candidates: Mapping[str, tuple[Candidate, float]]) -> bool:
        """Measure candidates, each at a share, for calls of so many tokens.

        False where they cannot be told apart: time is up, or other processes disturbed most samples.
        Raises TuningError for a candidate that computes something wrong.
        """
        if time.monotonic() > self.until:
            return False
        calls = {}
        for name, (candidate, share) in candidates.items():
            problem = self.trial.wrong(candidate, rows, share)
            if problem is not None:
                raise TuningError(f"{self.trial.spec}, {rows} tokens, {name}: {problem}.")
            calls[name] = self.trial.kernel(candidate, rows, share)
        estimates = {name: timing.estimate(call) for name, call in calls.items()}
        taken = timing.alternate(calls, estimates, self.repeats)
        copies = len(self.trial.blocks)
        self.times.setdefault(rows, {}).update(
            (name, found.seconds / copies * 1e6) for name, found in taken.items()
        )
        disturbed = [f"{rows} tokens, {name}" for name, found in taken.items() if found.noisy]
        self.noisy += disturbed
        return not disturbed

    def beats(self, name: str, default: str, rows: Iterable[int]) -> float:
        """How many times faster than the default a candidate was, the geometric mean over `rows`."""
        product, count = 1.0, 0
        for n in rows:
            product *= self.times[n][default] / self.times[n][name]
            count += 1
        return product ** (1 / count) if count else 1.0

    def tune(self, all_rows: Sequence[int]) -> None:
        """Choose every field of the schedule in turn, each with those chosen before."""
        self._choose_decode()
        self._choose("near", NEAR, [n for n in all_rows if 1 < n <= 16])
        self._choose("far", FAR, [n for n in all_rows if n >= 64])
        self._choose_fused([n for n in all_rows if n >= 16])
        self._choose_break_even(all_rows)

    def _choose_decode(self) -> None:
        own, copy = (replace(self.schedule, decode=flag, fused_rows=1) for flag in (True, False))
        candidates = {"own weights": (Candidate(own), SHARE), "packed": (Candidate(copy), SHARE)}
        if self.compare(1, candidates) and self.beats("packed", "own weights", [1]) > 1 + NOISE:
            self.schedule = replace(self.schedule, decode=False)

    def _choose(self, name: str, values: Sequence[int], rows: Sequence[int]) -> None:
        """Choose the value of one field that is fastest over several numbers of tokens."""
        done = []
        for n in rows:
            variants = {
                f"{name} {value}": (Candidate(self._with(name, value)), SHARE) for value in values
            }
            if self.compare(n, variants):
                done.append(n)
        default = f"{name} {getattr(self.schedule, name)}"
        gains = {value: self.beats(f"{name} {value}", default, done) for value in values}
        best = max(gains, key=lambda value: gains[value])
        if gains[best] > 1 + NOISE:
            self.schedule = self._with(name, best)

    def _with(self, name: str, value: Any) -> Schedule:
        return replace(self.schedule, **{name: value})

    def _choose_fused(self, rows: Sequence[int]) -> None:
        """Choose the number of tokens from which hidden values are computed first, all at once."""
        fused: dict[int, bool] = {}
        for n in rows:
            pair = {
                "fused": (Candidate(replace(self.schedule, fused_rows=n)), SHARE),
                "two-phase": (Candidate(replace(self.schedule, fused_rows=0)), SHARE),
            }
            if not self.compare(n, pair):
                continue
            gain = self.beats("two-phase", "fused", [n])
            default = n <= self.schedule.fused_rows
            fused[n] = default if 1 / (1 + NOISE) <= gain <= 1 + NOISE else gain < 1
        limits = [n for n in fused if not fused[n]]
        last = max((n for n in fused if fused[n]), default=0)
        if all(flag == (n <= self.schedule.fused_rows) for n, flag in fused.items()):
            return  # nothing speaks against the default
        if not limits:
            self.schedule = replace(self.schedule, fused_rows=ALWAYS_FUSED)
        elif last < min(limits):  # otherwise they alternate, which no one limit describes
            limit = round(((last or 1) * min(limits)) ** 0.5)
            self.schedule = replace(self.schedule, fused_rows=limit)

    def _choose_break_even(self, rows: Sequence[int]) -> None:
        """Choose for each number of tokens the executed share above which everything runs."""
        found = []
        for n in rows:
            plain = Candidate(self.schedule)
            shares = {f"share {share:g}": (plain, share) for share in SHARES}
            everything = {"everything": (Candidate(self.schedule, everything=True), 1.0)}
            if not self.compare(n, shares | everything):
                return
            found.append((n, self._break_even(n)))
        self.schedule = replace(self.schedule, break_even=tuple(found))

    def _break_even(self, rows: int) -> float:
        """The share, by linear interpolation, at which a call takes as long as running everything."""
        times, dense = self.times[rows], self.times[rows]["everything"]
        points = [(share, times[f"share {share:g}"]) for share in SHARES]
        if points[0][1] >= dense:
            return points[0][0]
        for (low, below), (high, above) in pairwise(points):
            if above >= dense > below:
                return low + (high - low) * (dense - below) / (above - below)
        return 1.0


def tune(
    target: Target,
    *,
    device: str | torch.device = "auto",
    batches: Iterable[Any] | None = None,
    dtypes: Sequence[torch.dtype] = (),
    effort: str = "quick",
    budget: float = 120.0,
    progress: bool = True,
    int8: bool = False,
) -> dict[Spec, Entry] | dict[GpuSpec, list[GpuEntry]]:
    """Measure the kernels of all kinds of blocks and keep the fastest schedules for later runs.

    target: a converted model, a Conversion or kinds of blocks. device: "cpu", "cuda" or "auto", which is
    where a model's weights are, else a GPU if there is one. batches: what a converted model is called
    with; GPU kernels are then tuned on the experts that it chooses, else on random masks. dtypes: see
    `specs_of`; on a GPU bf16 for a conversion. effort: "quick" or "full", how many numbers of tokens and
    repeats. budget: seconds, shared out among the kinds; what it does not reach, and what other processes
    disturbed, keeps the default. int8: on a GPU, whether few tokens on int8 copies are tuned too, for models
    compiled with that option; a CPU's copies have nothing to tune.

    Results are stored per user (`store.folder`) as each kind is done, and used by models compiled
    from then on.

    Raises TuningError where there is nothing to tune or a kernel computes something wrong.
    """
    where = device_of(target, device)
    if where.type == "cuda":
        kinds = gpu_tuning.specs_of(target, dtypes, int8)
        if not kinds:
            raise TuningError("There is no kind of block to tune; expected at least one.")
        masks = None if batches is None else gpu_tuning.masks_of(target, batches, kinds)
        return gpu_tuning.tune(
            kinds, where, effort=effort, budget=budget, progress=progress, masks=masks
        )
    if batches is not None:
        raise TuningError("batches are for tuning on a GPU; CPU kernels are tuned on random masks.")
    if effort not in ROWS:
        raise TuningError(f"effort is {effort!r}; expected one of {', '.join(ROWS)}.")
    specs = specs_of(target, dtypes)
    if not specs:
        raise TuningError("There is no kind of block to tune; expected at least one.")
    build.load_all([native.source(spec) for spec in specs], progress)
    found: dict[Spec, Entry] = {}
    for spec in tqdm(specs, "tune", disable=not progress):
        run = Run(Trial(spec), REPEATS[effort], time.monotonic() + budget / len(specs))
        with torch.no_grad():
            run.tune(ROWS[effort])
        if run.noisy:
            warnings.warn(
                f"Other processes disturbed {len(run.noisy)} measurements of {spec}; those choices keep "
                "their defaults. Tune on an idle machine.",
                D2DWarning,
                stacklevel=2,
            )
        found[spec] = entry(spec, run)
        STORE.add([found[spec]])
    return found


def device_of(target: object, device: str | torch.device) -> torch.device:
    """The device that is tuned, see `tune`. Raises TuningError for one that is not here."""
    if device == "auto":
        if isinstance(target, nn.Module):
            return attached(target)[0].weight("down").device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise TuningError(f"device is {str(device)!r}; expected auto, cpu or cuda.")
    if found.type == "cuda" and not (torch.cuda.is_available() and has_triton()):
        raise TuningError(
            "Tuning on cuda needs a CUDA device and Triton, and one of them is not here. "
            "`d2dcompile tune TARGET --precompile-only --target sm_90` compiles without a device."
        )
    return found


def entry(spec: Spec, run: Run) -> Entry:
    """What a run found, as it is kept."""
    return Entry(
        spec=spec,
        device=schedules.device(),
        threads=torch.get_num_threads(),
        kernels=schedules.kernels_version(),
        schedule=run.schedule,
        times={str(rows): times for rows, times in run.times.items()},
        share=SHARE,
        versions={name: version(name) for name in ("torch", "d2dcompile")},
    )


def bench(
    spec: Spec,
    rows: Sequence[int],
    shares: Sequence[float],
    *,
    autotuned: bool = False,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Times of all candidates for one kind of block: kernels, everything, and the dense block.

    rows: numbers of tokens; shares: executed shares of the kernels; autotuned: also the dense block
    under Inductor with freezing and max-autotune, which takes some seconds to compile. Returns a row
    {"tokens", "share", "candidate", "us", "chosen"} for each; dense ones have no share.
    """
    trial, chosen = Trial(spec), schedules.lookup(spec)
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        for n in rows:
            calls: dict[tuple[str, float | None], Callable[[], object]] = {}
            calls["dense eager", None] = trial.dense(n)
            if autotuned:
                calls["dense Inductor", None] = trial.dense(n, autotuned=True)
            calls["everything", 1.0] = trial.kernel(Candidate(chosen, True), n, 1.0)
            picked: dict[float | None, str] = {}
            for share in shares:
                variants = _variants(chosen, n)
                dense_rows = chosen.dense_rows(share)
                dense = dense_rows and n >= dense_rows
                picked[share] = "everything" if dense else next(iter(variants))
                for variant, candidate in variants.items():
                    calls[variant, share] = trial.kernel(candidate, n, share)
            estimates = {key: timing.estimate(call) for key, call in calls.items()}
            taken = timing.alternate(calls, estimates, repeats)
            for (name, at), timed in taken.items():
                found.append(
                    {
                        "tokens": n,
                        "share": at,
                        "candidate": name,
                        "us": timed.seconds / len(trial.blocks) * 1e6,
                        "chosen": picked.get(at) == name,
                        "noisy": timed.noisy,
                    }
                )
    return found


def _variants(chosen: Schedule, rows: int) -> dict[str, Candidate]:
    """The schedules a kernel can run for so many tokens, the chosen one first."""
    named = {
        "fused": replace(chosen, decode=False, fused_rows=rows),
        "two-phase": replace(chosen, decode=False, fused_rows=0),
    }
    if rows == 1:
        named = {"own weights": replace(chosen, decode=True), **named}
    first = "fused" if rows <= chosen.fused_rows else "two-phase"
    if rows == 1 and chosen.decode:
        first = "own weights"
    return {name: Candidate(named[name]) for name in (first, *(k for k in named if k != first))}
