"""Curves of quality against multiply-adds, one point per setting of a method's knob."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import d2dcompile as d2d
from d2dcompile.attachment import states
from d2dcompile.measuring import counting
from d2dcompile.probe import flop_counter

from .emulation import Rule, blocks_of, emulate
from .steps import Steps, code
from .task import Batch, Task
from .training import moved

TAUS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Point:
    """One setting of a method, measured on the test batches.

    Attributes:
        knob: tau, share of kept experts or channels, sparsity, or hidden size as a share.
        cost: multiply-adds of the converted blocks, routers included, as a share of the dense ones.
        model_cost: the same of the whole model.
        quality: {metric: value}.
    """

    knob: float
    cost: float
    model_cost: float
    quality: Mapping[str, float]

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Point:
        return cls(**value)


def converted(
    steps: Steps,
    name: str,
    settings: Mapping[str, Any],
    task: Task,
    model: nn.Module,
    config: d2d.Config,
    device: torch.device,
) -> d2d.Conversion:
    """Experts and routers of a model, attached to it; made on the calibration batches or loaded.

    settings: what decides the model's weights, as `training.settings_of` gives it.
    """
    batches = on(device, task.calibration)

    def make(folder: Path) -> None:
        d2d.convert(model, batches, config, progress=False).save(folder)

    key = {**settings, "config": asdict(config), "code": code()}
    folder = steps.folder_of(name, key, make)
    conversion = d2d.load(folder)
    conversion.attach(model)
    return conversion


@torch.no_grad()
def dynamic(
    task: Task, model: nn.Module, device: torch.device, taus: Iterable[Any] = TAUS
) -> list[Point]:
    """D2DMoE over tau: a number each, or {site: tau}; the model has an attached conversion.

    Quality and costs, which are `d2d.measure`'s, come from one pass over the test batches: the rewritten
    graphs of `torch.compile(model, backend="d2dmoe")`, uncompiled and with their experts counted.
    """
    batches = on(device, task.test)
    points = []
    for tau in taus:
        d2d.set_tau(model, tau)
        with counting(model) as (call, stats):
            quality = dict(task.quality(call, batches))
        sites = stats.sites.values()
        cost = sum(s.macs for s in sites) / sum(s.dense_macs for s in sites)
        knob = sum(tau.values()) / len(tau) if isinstance(tau, Mapping) else float(tau)
        points.append(Point(knob, cost, stats.macs / stats.dense_macs, quality))
    d2d.set_tau(model, 0.0)
    return points


def per_site(
    task: Task, model: nn.Module, device: torch.device, budgets: Sequence[float]
) -> list[Point] | None:
    """D2DMoE with one tau per site, fitted on the validation batches for each executed share.

    None where this version's `fit_tau` has no `per_site`. Budgets that it cannot reach are left out.
    """
    if "per_site" not in inspect.signature(d2d.fit_tau).parameters:
        return None
    fit: Callable[..., Any] = d2d.fit_tau
    batches, taus = on(device, task.validation), []
    for budget in budgets:
        try:
            fit(model, batches, budget=budget, per_site=True)
        except d2d.errors.BudgetError:
            continue
        taus.append({state.site.name: state.tau for state in states(model)})
    return dynamic(task, model, device, taus)


@torch.no_grad()
def emulated(
    task: Task, model: nn.Module, device: torch.device, rules: Iterable[tuple[float, Rule]]
) -> list[Point]:
    """A rival's curve: each rule on all feed-forward blocks of the model, run eagerly."""
    batches = on(device, task.test)
    blocks = blocks_of(model, batches[0])
    total = model_macs(model, batches)
    points = []
    for knob, rule in rules:
        with emulate(blocks, rule) as tally:
            quality = dict(task.quality(model, batches))
        points.append(Point(knob, tally.cost, 1 - tally.saved / total, quality))
    return points


def dense_point(task: Task, model: nn.Module, device: torch.device, cost: float = 1.0) -> Point:
    """A model as it is, on the test batches; cost is that of its blocks, 1 for the dense model."""
    with torch.no_grad():
        return Point(1.0, cost, 1.0, dict(task.quality(model, on(device, task.test))))


def narrower(
    task: Task,
    train: Callable[[int], nn.Module],
    dense: nn.Module,
    hidden: int,
    sizes: Sequence[int],
    device: torch.device,
) -> list[Point]:
    """Dense models with fewer hidden neurons, trained by `train(size)` as the dense model was."""
    batches = on(device, task.test)
    total, points = model_macs(dense, batches), []
    for size in sizes:
        model = train(size)
        share, macs = size / hidden, model_macs(model, batches)
        with torch.no_grad():
            quality = dict(task.quality(model, batches))
        points.append(Point(share, share, macs / total, quality))
    return points


@torch.no_grad()
def model_macs(model: nn.Module, batches: Sequence[Batch]) -> int:
    """Multiply-adds of the whole model on the batches, as `d2d.measure` counts them."""
    with flop_counter() as counter:
        for batch in batches:
            model(**batch)
    return int(counter.get_total_flops()) // 2


def on(device: torch.device, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Batches on a device."""
    return [moved(batch, device) for batch in batches]
