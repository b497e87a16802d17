"""Time all candidates of one case in turns, and put them beside each other and the machine's limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import cpu_cases
import cpu_ours
import cpu_rivals
import torch
from cpu_cases import Case
from cpu_ceilings import ceilings
from groups import time_limit
from torch import Tensor

from d2dcompile import timing

COMPILE_LIMIT = 150  # seconds until a rival's first call must be over
SLOW = 4  # a rival this many times slower than the best dense one is timed once, outside the turns
ALWAYS = ("ours", "eager", "onednn", "read", "peak")  # first words of those that are never left out
ERROR = 2  # times the error of eager in the same dtype that ours may have
RIVAL_ERROR = (
    16  # rivals may: in fp32 oneDNN has 2.1, Inductor's template 4; refusing them flatters us
)
INT8_ERROR = (
    0.03  # relative error of torch's int8 weights in 12 layers, rounded up (measured: 0.028)
)

Truth = list[tuple[Tensor, float]]  # of the first masks in turn: exact output, error of eager


class Group:
    """Candidates of one case that gave the right answer, and the reasons of those that did not."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.stack = cpu_cases.layers(case)
        self.x = cpu_cases.tokens(case)
        self.rows = torch.linspace(0, case.tokens - 1, min(case.tokens, cpu_cases.CHECKED)).long()
        self.calls: dict[str, Callable[[], object]] = {}
        self.work: dict[str, tuple[float, float]] = {}
        self.depth: dict[str, int] = {}
        self.errors: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def truth(self, masks: Sequence[Sequence[Tensor]] | None) -> Truth:
        """What the first two calls must give on the checked rows."""
        x, case = self.x[self.rows], self.case
        found = []
        for turn in range(min(2, case.rotations)):
            chosen = None
            if masks is not None:
                chosen = [turns[turn][self.rows] for turns in masks]
            exact = cpu_cases.answer(case, self.stack, x, chosen, torch.float64)
            eager = cpu_cases.answer(case, self.stack, x, chosen, x.dtype)
            found.append((exact, cpu_cases.error(eager, exact, x)))
        return found

    def add(
        self,
        name: str,
        build: Callable[[], Any],
        truth: Truth | None,
        work: tuple[float, float],
        depth: int | None = None,
    ) -> None:
        """Build a candidate, check it and keep it, or the reason why it is not timed.

        truth None: not checked, for stacks that compute something else (the ideal). work: bytes and
        operations a layer. depth: number of layers, where it is not the stack's.
        """
        try:
            with time_limit(COMPILE_LIMIT):
                call = build()
                if call is None:
                    return
                first = call(self.x)
            problem = self._problem(name, call, first, truth)
        except Exception as error:  # whatever a rival does, the others are still timed
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        if problem:
            self.failed[name] = problem
            return
        self.calls[name] = lambda: call(self.x)
        self.work[name], self.depth[name] = work, depth or len(self.stack)

    def _problem(
        self, name: str, call: Callable[[Tensor], Tensor], first: Tensor, truth: Truth | None
    ) -> str | None:
        """Why the outputs of a candidate are wrong, or None."""
        bound = ERROR if name.startswith("ours") else RIVAL_ERROR
        for turn, (exact, eager) in enumerate(truth or []):
            y = first if turn == 0 else call(self.x)
            error = cpu_cases.error(y[self.rows], exact, self.x[self.rows])
            self.errors[name] = max(error, self.errors.get(name, 0.0))
            yardstick = max(eager, INT8_ERROR) if self.case.dtype == "int8" else eager
            if not error <= bound * yardstick:  # NaN is refused too
                return f"error {error:.1e}, eager has {yardstick:.1e}"
        return None


def measure(
    case: Case, shares: Sequence[float], repeats: int, without: Sequence[str], threads: int
) -> dict[str, Any]:
    """All figures of one case: ceilings, dense rivals, and a cell for each share."""
    start = time.time()
    with torch.no_grad():
        group = Group(case)
        _add_dense(group, without)
        limits = ceilings(case.dtype, threads)
        for name, (call, _) in limits.items():
            group.calls[name] = call
        for share in shares:
            _add_sparse(group, share, without)
        timings = _timings(group, repeats)
    reached = {name: limits[name][1] / timings[name].seconds / 1e9 for name in limits}
    record = {
        "layers": len(group.stack),
        "bandwidth_gb_s": max(v for name, v in reached.items() if name.startswith("read")),
        "peak_gflop_s": max(v for name, v in reached.items() if name.startswith("peak")),
        "ceilings": reached,
        "figures": _figures(group, timings),
        "errors": group.errors,
        "failed": group.failed,
    }
    record["cells"] = {
        f"{share:g}": cell for share in shares if (cell := _cell(record, f"{share:g}")) is not None
    }
    return {**record, "seconds": time.time() - start}


def _add_dense(group: Group, without: Sequence[str]) -> None:
    case = group.case
    builders = (cpu_rivals.int8 if case.dtype == "int8" else cpu_rivals.dense)(case, group.stack)
    truth = group.truth(None)
    for name, build in builders.items():
        if name not in without:
            group.add(name, build, truth, case.work(None))
    if case.dtype != "int8":
        seam = partial(cpu_ours.everything, case, group.stack)
        group.add("ours everything", seam, truth, case.work(None))


def _add_sparse(group: Group, share: float, without: Sequence[str]) -> None:
    """Add what depends on the share: ours, the grouped rivals and the ideal."""
    case, stack = group.case, group.stack
    masks = cpu_cases.routing(case, share)
    truth, work = group.truth(masks), case.work(masks)
    seam = cpu_ours.ours_int8 if case.dtype == "int8" else cpu_ours.ours
    group.add(f"ours {share:g}", lambda: seam(case, stack, masks), truth, work)
    if case.dtype == "int8":
        return
    for name, build in cpu_rivals.sparse(case, stack, masks).items():
        if name not in without:
            group.add(f"{name} {share:g}", build, truth, work)
    if share < 1 and "ideal" not in without:
        builders, hidden, depth = cpu_rivals.ideal(case, stack, share)
        narrow = replace(case, hidden=hidden).work(None)
        for name, build in builders.items():
            group.add(f"{name} {share:g}", build, None, narrow, depth)


def _timings(group: Group, repeats: int) -> dict[str, timing.Timing]:
    """Timing of a call; rivals far behind are not run again, what they showed at first is kept."""
    estimates = {name: timing.estimate(call) for name, call in group.calls.items()}
    dense = [estimates[name] for name in group.work if " " not in name]
    behind = {
        name: timing.Timing(seconds, 0.0, 1, False)
        for name, seconds in estimates.items()
        if not name.startswith(ALWAYS) and seconds > SLOW * min(dense, default=seconds)
    }
    kept = {name: call for name, call in group.calls.items() if name not in behind}
    return behind | timing.alternate(kept, estimates, repeats)


def _figures(group: Group, timings: Mapping[str, timing.Timing]) -> dict[str, dict[str, Any]]:
    """{candidate: time a layer, rates} of all but the ceilings."""
    found = {}
    for name, (touched, operations) in group.work.items():
        taken, depth = timings[name], group.depth[name]
        seconds = taken.seconds / depth
        found[name] = {
            "us": seconds * 1e6,
            "iqr_us": taken.iqr / depth * 1e6,
            "samples": taken.samples,
            "noisy": taken.noisy,
            "gb_s": touched / seconds / 1e9,
            "gflop_s": operations / seconds / 1e9,
        }
    return found


def _cell(record: Mapping[str, Any], share: str) -> dict[str, Any] | None:
    """Ours at one share against the best rivals and the limits; None if ours was not timed.

    Ours is the faster of the chosen experts and of everything without the router: what a tuning run
    measures too, and a converted block then does at an executed share above its break-even.
    """
    figures = record["figures"]
    ours = routed = figures.get(f"ours {share}")
    dense = {name: row for name, row in figures.items() if " " not in name}
    if ours is None or not dense:
        return None
    everything = figures.get("ours everything", routed)
    if everything["us"] < routed["us"]:
        ours = everything
    at_share = {
        name.split()[0]: row for name, row in figures.items() if name.split()[1:] == [share]
    }
    grouped = {name: at_share[name] for name in ("transformers", "grouped_mm") if name in at_share}
    ideals = [row["us"] for name, row in at_share.items() if name.startswith("ideal")]
    rivals = dense | grouped
    best_dense = min(dense, key=lambda name: dense[name]["us"])
    best = min(rivals, key=lambda name: rivals[name]["us"])
    us = ours["us"]
    if share == "1":
        ideals = [dense[best_dense]["us"]]
    return {
        "ours_us": us,
        "routed_us": routed["us"],
        "everything": ours is not routed,
        "best_dense": best_dense,
        "best_dense_us": dense[best_dense]["us"],
        "best": best,
        "us": {name: row["us"] for name, row in (rivals | at_share).items()},
        "speedup": rivals[best]["us"] / us,
        **{f"vs_{name}": row["us"] / us for name, row in rivals.items()},
        "gb_s": ours["gb_s"],
        "gflop_s": ours["gflop_s"],
        **_shares_of_limits(ours, record),
        "of_ideal": min(ideals) / us if ideals else None,
        "noisy": ours["noisy"] or rivals[best]["noisy"],
    }


def _shares_of_limits(row: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, float]:
    bandwidth = row["gb_s"] / record["bandwidth_gb_s"]
    peak = row["gflop_s"] / record["peak_gflop_s"]
    return {"of_bandwidth": bandwidth, "of_peak": peak, "roofline": max(bandwidth, peak)}
