"""Candidates of one case that gave the right answer, on poisoned outputs, and as replays again."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import gpu_cases
import gpu_device
import torch
from gpu_cases import Case
from gpu_device import Place
from gpu_rivals import Turn
from groups import time_limit
from torch import Tensor

LIMIT = 75  # seconds until a candidate must have given its first outputs
ERROR = 2  # times the error of plain PyTorch in the same dtype that ours may have
RIVAL_ERROR = 16  # rivals may: refusing them would flatter us
UNSURE = (
    "grouped_mm",
    "transformers",
)  # may look from the host, and then are timed without a graph
Truth = list[tuple[Tensor, float]]  # of the first two turns: exact output, error of plain PyTorch


@dataclass(frozen=True)
class Candidate:
    """A replay of all turns, what it needs at least a turn (bytes, FLOPs), and what its check found."""

    replay: Callable[[], object]
    work: tuple[float, float]
    checks: dict[str, Any]


class Group:
    """Layers, input and outputs of a case, and the candidates that gave the right answer."""

    def __init__(
        self, case: Case, place: Place, without: Container[str], note: Callable[[str], object]
    ) -> None:
        self.case, self.place, self.without, self.note = case, place, without, note
        copies = case.copies(place.cache)
        self.turns = case.turns(copies, place.least_turns)
        self.layers = gpu_cases.layers(case, copies, place.name)
        self.x = gpu_cases.rows(case, place.name)
        self.outputs = [torch.empty_like(self.x) for _ in range(self.turns)]
        self.rows = gpu_cases.checked(case, place.name)
        self.failed: dict[str, str] = {}
        self.truth = self.truth_of(None)

    def truth_of(self, masks: Sequence[Tensor] | None) -> Truth:
        """What the first two turns must give on the checked rows."""
        x, found = self.x[self.rows], []
        for turn in range(2):
            layer = self.layers[turn % len(self.layers)]
            mask = None if masks is None else masks[turn].to(x.device)[self.rows]
            exact = gpu_cases.answer(self.case, layer, x, mask, torch.float64)
            eager = gpu_cases.answer(self.case, layer, x, mask, x.dtype)
            found.append((exact, relative_error(eager, exact)))
        return found

    def add(
        self,
        to: dict[str, Candidate],
        name: str,
        build: Callable[[], Turn],
        truth: Truth | None,
        work: tuple[float, float],
    ) -> None:
        """Build, check and capture a candidate, or keep the reason why it is not timed.

        truth None: not checked, for what computes something else (the ideal, phases). Raises Lost if
        it broke the device for this process.
        """
        if name in self.without:
            return
        self.note(name)
        try:
            to[name] = self._candidate(name, build, truth, work)
        except Exception as error:  # whatever one does, the others are still timed
            self.failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            self.place.sync()

    def _candidate(
        self, name: str, build: Callable[[], Turn], truth: Truth | None, work: tuple[float, float]
    ) -> Candidate:
        bound = ERROR if name.startswith("ours") else RIVAL_ERROR
        with time_limit(LIMIT), torch.no_grad():
            turn = build()
            with gpu_device.poisoned() if name.startswith("ours") else nullcontext():
                gpu_device.poison(self.outputs)
                first = [turn(0), turn(1)]
            self.place.sync()
        self._check(first, truth, bound)
        del first
        replay, outputs, checks = self._capture(name, turn)
        if truth is not None:
            checks.update(self._replayed(replay, outputs, truth, bound))
        return Candidate(replay, work, checks)

    def _capture(
        self, name: str, turn: Turn
    ) -> tuple[Callable[[], object], list[Tensor], dict[str, Any]]:
        """(replay of all turns, outputs of the first two, whether it is a graph)."""

        def work() -> list[Tensor]:
            found = [turn(t) for t in range(2)]
            for t in range(2, self.turns):
                turn(t)
            return found

        if name not in UNSURE:
            return *self.place.capture(work), {"captured": True}
        outputs: list[Tensor] = []

        def eager() -> None:
            outputs[:] = work()

        if self.case.dtype != "bf16" and self.place.name == "cuda":
            return eager, outputs, {"captured": False}  # torch's other dtypes loop on the host
        try:
            return *self.place.capture(work), {"captured": True}
        except Exception as error:
            self.place.sync()
            return eager, outputs, {"captured": False, "why": str(error)[:200]}

    def _check(self, outputs: Sequence[Tensor], truth: Truth | None, bound: float) -> float:
        """The largest relative error. Raises ValueError if that is too much."""
        largest = 0.0
        for y, (exact, eager) in zip(outputs, truth or [], strict=False):
            error = relative_error(y[self.rows], exact)
            allowed = max(bound * eager, gpu_cases.LEAST[self.case.dtype])
            if not error <= allowed:  # NaN is refused too
                raise ValueError(f"error {error:.1e}, allowed {allowed:.1e}")
            largest = max(largest, error)
        return largest

    def _replayed(
        self, replay: Callable[[], object], outputs: list[Tensor], truth: Truth, bound: float
    ) -> dict[str, Any]:
        """Error of a replay into poisoned outputs, and whether another one gives the same bits."""
        gpu_device.poison([*self.outputs, *outputs])
        replay()
        self.place.sync()
        error, first = self._check(outputs, truth, bound), [y.clone() for y in outputs]
        replay()
        self.place.sync()
        same = all(torch.equal(a, b) for a, b in zip(first, outputs, strict=True))
        return {"error": error, "same_bits": same}


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())
