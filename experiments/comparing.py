"""All methods on the models of one seed: what the language models and the encoder have in common.

Each curve is a step of its own: a run that was stopped goes on with the first curve that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import d2dcompile as d2d

from . import lab

TAUS = (0.0, 0.03, 0.1, 0.15, 0.2, 0.25, 0.3, 0.37, 0.45, 0.57, 0.7)
SHARES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.1)
QUICK_TAUS, QUICK_SHARES = (0.0, 0.1, 0.3, 1.0), (0.75, 0.4, 0.2)
BUDGETS = (0.5, 0.3, 0.15)  # executed shares that per-site taus are fitted to


@dataclass(frozen=True)
class Variant:
    """A trained model and what decides its weights."""

    model: nn.Module
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One seed of an experiment: its task, checkpoints, configuration of experts, and `budgets`.

    masked: the models that TEAL and WINA are measured on for this seed. thresholds: taus of the
    curves, if not the usual ones.
    """

    session: lab.Session
    steps: lab.Steps
    task: lab.Task
    config: d2d.Config
    executed: Sequence[float] = BUDGETS
    masked: Sequence[str] = ("dense", "sparse")
    thresholds: Sequence[float] = ()

    @property
    def taus(self) -> Sequence[float]:
        """Thresholds of the curves."""
        if self.thresholds:
            return self.thresholds
        return QUICK_TAUS if self.session.quick else TAUS

    @property
    def shares(self) -> Sequence[float]:
        """Shares of kept experts or channels of the rivals' curves."""
        return QUICK_SHARES if self.session.quick else SHARES

    @property
    def budgets(self) -> Sequence[float]:
        """Executed shares that a tau per site is fitted to."""
        return (0.4,) if self.session.quick else self.executed

    def curves(
        self, dense: Variant, relu: Variant, sparse: Variant, kept: Variant | None
    ) -> dict[str, list[lab.Point]]:
        """{method: curve}. relu: for MoEfication and what the penalty brings; kept: GELU with a penalty.

        What explains the comparison and is none of its methods is measured for the first seed alone.
        """
        first = self.config.seed == 0
        found = self._ours("D2DMoE", sparse)
        found |= self._static("static top-k", sparse)
        if first:
            found |= self._oracle("oracle", sparse)
        if kept is not None:
            found |= self.dynamic("D2DMoE, activation kept", kept)
        if first:
            found |= self.dynamic("D2DMoE, no penalty", relu)
        found |= self._moefication("MoEfication", relu)
        if first:
            found |= self._moefication("MoEfication, sparse model", sparse)
        if "dense" in self.masked:
            found |= self._training_free("", dense)
        if first and "sparse" in self.masked:
            found |= self._training_free(", sparse model", sparse)
        return found

    def _ours(self, name: str, variant: Variant) -> dict[str, list[lab.Point]]:
        found = self.dynamic(name, variant)
        each = f"{name}, a tau per site"

        def fitted() -> list[lab.Point]:
            self._convert(variant)
            points = lab.per_site(self.task, variant.model, self.session.device, self.budgets)
            return points if points is not None else []

        points = self._curve(each, variant, {"budgets": self.budgets}, fitted)
        return found | {each: [found[name][0], *points]}

    def dynamic(self, name: str, variant: Variant) -> dict[str, list[lab.Point]]:
        """{name: a curve over tau} of the variant as this comparison converts it."""

        def measured() -> list[lab.Point]:
            self._convert(variant)
            return lab.dynamic(self.task, variant.model, self.session.device, self.taus)

        return {name: self._curve(name, variant, {"taus": self.taus}, measured)}

    def _static(self, name: str, variant: Variant) -> dict[str, list[lab.Point]]:
        """A fixed number of D2DMoE's experts."""

        def measured() -> list[lab.Point]:
            self._convert(variant)
            return self._emulated(variant, lab.static_topk(variant.model, self.shares))

        return {name: self._curve(name, variant, {"shares": self.shares}, measured)}

    def _oracle(self, name: str, variant: Variant) -> dict[str, list[lab.Point]]:
        """D2DMoE's experts by their true norms."""

        def measured() -> list[lab.Point]:
            self._convert(variant)
            return self._emulated(variant, lab.oracle(variant.model, self.taus))

        return {name: self._curve(name, variant, {"taus": self.taus}, measured)}

    def _moefication(self, name: str, variant: Variant) -> dict[str, list[lab.Point]]:
        def measured() -> list[lab.Point]:
            self._convert(variant)
            batches = lab.on(self.session.device, self.task.calibration)
            routers = lab.fit_moefication(
                variant.model,
                lab.blocks_of(variant.model, batches[0]),
                batches,
                width=self.config.router_width,
                epochs=self.config.router_epochs,
                seed=self.config.seed,
            )
            rules = lab.moefication(variant.model, routers, self.shares)
            return self._emulated(variant, rules)

        return {name: self._curve(name, variant, {"shares": self.shares}, measured)}

    def _training_free(self, name: str, variant: Variant) -> dict[str, list[lab.Point]]:
        """Input channels skipped; TEAL's thresholds are calibrated, WINA needs nothing."""
        sparsities = tuple(round(1 - share, 3) for share in self.shares)

        def teal() -> list[lab.Point]:
            batches = lab.on(self.session.device, self.task.calibration)
            blocks = lab.blocks_of(variant.model, batches[0])
            greedy = not self.session.quick
            rules = lab.teal(variant.model, blocks, batches, sparsities, greedy)
            return self._emulated(variant, rules)

        def wina() -> list[lab.Point]:
            return self._emulated(variant, lab.wina(self.shares))

        settings = {"shares": self.shares}
        return {
            f"TEAL{name}": self._curve(f"TEAL{name}", variant, settings, teal),
            f"WINA{name}": self._curve(f"WINA{name}", variant, settings, wina),
        }

    def _emulated(self, variant: Variant, rules: Iterable[Any]) -> list[lab.Point]:
        return lab.emulated(self.task, variant.model, self.session.device, rules)

    def _convert(self, variant: Variant) -> None:
        name = f"experts-{variant.settings['variant']}"
        lab.converted(
            self.steps, name, variant.settings, self.task, variant.model, self.config,
            self.session.device,
        )  # fmt: skip

    def _curve(
        self,
        name: str,
        variant: Variant,
        settings: Mapping[str, Any],
        make: Callable[[], list[lab.Point]],
    ) -> list[lab.Point]:
        def run() -> list[dict[str, Any]]:
            points = [point.json() for point in make()]
            self.session.say(f"{self.steps.folder.name}: {name}, {len(points)} points")
            return points

        full = {**variant.settings, **settings, "config": vars(self.config), "curve": name}
        full["code"] = lab.code()
        slug = name.lower().replace(" ", "-").replace(",", "")
        torch.manual_seed(0)
        return [lab.Point.of(p) for p in self.steps.value(f"curve-{slug}", full, run)]
