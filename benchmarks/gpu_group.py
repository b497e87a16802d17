"""Time all candidates of one case in turns, and put them beside the device's limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import gpu_cases
import gpu_device
import gpu_ours
import gpu_rivals
import torch
from gpu_cases import Case, Cell
from gpu_check import Candidate, Group, Truth
from gpu_device import Place, Replay, Timing
from gpu_rivals import Dense
from torch import Tensor

from d2dcompile.gpu_blocks import GpuSchedule

Limits = Mapping[str, tuple[Replay, float]]


def measure(
    case: Case,
    place: Place,
    repeats: int,
    without: Container[str] = (),
    note: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """All figures of one case: the device, and each cell with its candidates and phases."""
    start = time.time()
    torch.set_float32_matmul_precision("highest")
    note("")
    limits = place.ceilings(case.torch_dtype)
    group = Group(case, place, without, note)
    dense = _dense(group)
    record: dict[str, Any] = {
        "device": place.describe(),
        "timed_as": place.timed_as,
        "layers": len(group.layers),
        "turns": group.turns,
        "cells": {str(cell): _cell(group, cell, dense, limits, repeats) for cell in case.cells},
        "failed": group.failed,
    }
    return {**record, "seconds": time.time() - start}


def _dense(group: Group) -> dict[str, Candidate]:
    case, found = group.case, {}
    dense = Dense(case, group.layers, group.x)
    builders = {"eager": dense.eager}
    if case.gated:
        builders["merged"] = dense.merged
    builders["inductor"] = partial(dense.inductor, group.place.name == "cpu", best=True)
    for name, build in builders.items():
        group.add(found, name, build, group.truth, case.work(None))
    return found


def _cell(
    group: Group,
    cell: Cell,
    dense: Mapping[str, Candidate],
    limits: Limits,
    repeats: int,
) -> dict[str, Any]:
    """Candidates of one cell, timed in turns with the dense ones and the device's limits."""
    case, before = group.case, set(group.failed)
    given = Given(group, cell)
    found, phases = dict(dense), {}
    plan = _add_ours(given, found, phases)
    _add_ideal(group, cell, found)
    rivals = gpu_rivals.sparse(case, group.layers, group.x, given.masks, group.place)
    for name, build in rivals.items():
        group.add(found, name, build, given.truth, given.work)
    for name in set(group.failed) - before:
        group.failed[f"{cell}: {name}"] = group.failed.pop(name)
    group.note("")
    replays = {name: candidate.replay for name, candidate in (found | phases).items()}
    replays |= {name: call for name, (call, _) in limits.items()}
    timings = gpu_device.alternate(group.place, replays, repeats)
    bandwidth, peak = (limits[name][1] / timings[name].seconds for name in ("copy", "product"))
    figures = {
        name: _figures(candidate, timings[name], group.turns, bandwidth, peak)
        for name, candidate in found.items()
    }
    return {
        "executed": given.mean(lambda mask: mask),
        "union": given.mean(lambda mask: mask.any(0)),
        "copy_tb_s": bandwidth / 1e12,
        "product_tflop_s": peak / 1e12,
        "figures": figures,
        "schedules": {name: asdict(schedule) for name, schedule in plan.items()},
        "phases_us": {name: timings[name].seconds / group.turns * 1e6 for name in phases},
    }


class Given:
    """The masks of a cell, what the first turns must give under them, and what a turn needs."""

    def __init__(self, group: Group, cell: Cell) -> None:
        self.group, self.cell = group, cell
        self.masks: list[Tensor] = gpu_cases.masks(group.case, cell, group.turns)
        self.truth: Truth = group.truth_of(self.masks)
        self.work = group.case.work(self.masks)

    def mean(self, of: Callable[[Tensor], Tensor]) -> float:
        return sum(float(of(mask).float().mean()) for mask in self.masks) / len(self.masks)


def _add_ours(
    given: Given, found: dict[str, Candidate], phases: dict[str, Candidate]
) -> dict[str, GpuSchedule]:
    """Add our candidates and the phases of those that are right; returns the schedules."""
    group, case = given.group, given.group.case
    ours = gpu_ours.Ours(case, group.layers, group.x, given.masks, group.outputs)
    plan = {
        name: schedule
        for name, schedule in gpu_ours.schedules(case, given.cell).items()
        if f"ours {name}" not in group.without
    }
    group.note("compiling")
    broken = ours.compile(plan)
    group.failed.update({f"ours {name}": reason for name, reason in broken.items()})
    for name, schedule in plan.items():
        if name not in broken:
            build = partial(ours.whole, schedule)
            group.add(found, f"ours {name}", build, given.truth, given.work)
    group.add(found, "ours dense", ours.everything, group.truth, case.work(None))
    right = {name: schedule for name, schedule in plan.items() if f"ours {name}" in found}
    for name, turn in ours.phases(right).items():
        group.add(phases, name, lambda turn=turn: turn, None, given.work)
    return plan


def _add_ideal(group: Group, cell: Cell, found: dict[str, Candidate]) -> None:
    """The dense layer with as many neurons as are executed, or, of few tokens, as any of them needs."""
    case = group.case
    share = cell.share if cell.union is None else cell.union
    width = max(16, round(share * case.hidden / 16) * 16)
    narrow = Dense(case, group.layers, group.x, width)
    less = replace(case, hidden=width, size=width).work(None)
    dry = group.place.name == "cpu"
    group.add(found, "ideal eager", narrow.eager, None, less)
    group.add(found, "ideal inductor", partial(narrow.inductor, dry, best=False), None, less)


def _figures(
    candidate: Candidate, taken: Timing, turns: int, bandwidth: float, peak: float
) -> dict[str, Any]:
    """Times a layer, and the share of the roofline: what the slower of memory and arithmetic allows."""
    seconds = taken.seconds / turns
    size, operations = candidate.work
    return {
        "us": seconds * 1e6,
        "iqr_us": taken.iqr / turns * 1e6,
        "samples": taken.samples,
        "of_roofline": max(size / bandwidth, operations / peak) / seconds,
        **candidate.checks,
    }
