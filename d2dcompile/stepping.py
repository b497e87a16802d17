"""Steps of the optimizer that trains a model, counted without being told, and schedules over them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .errors import SparsifyError

SCHEDULES: Mapping[str, Callable[[float], float]] = {  # of the share of steps that are done
    "constant": lambda done: 1.0,
    "linear": lambda done: min(done, 1.0),
    "linear_warmup": lambda done: min(2 * done, 1.0),
}


def schedule_of(given: str | Callable[[int], float], steps: int | None) -> Callable[[int], float]:
    """A schedule's factor as a function of the step. Raises SparsifyError for what is none."""
    if not isinstance(given, str) and callable(given):
        return given
    if given not in SCHEDULES:
        raise SparsifyError(
            f"schedule is {given!r}; expected one of {', '.join(SCHEDULES)}, or a function of the step."
        )
    if given == "constant":
        return lambda step: 1.0
    total = positive(
        "steps", steps, f"the number of optimizer steps that schedule {given!r} is over"
    )
    return lambda step: SCHEDULES[given](step / total)


def positive(name: str, value: int | None, meaning: str) -> int:
    """The argument if it is an integer >= 1; SparsifyError otherwise."""
    if value is None or isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SparsifyError(f"{name} is {value!r}; expected {meaning}, an integer >= 1.")
    return value


class Clock:
    """Calls `tick` after each step of the first optimizer that steps with parameters of a model.

    Of several optimizers that train one model the first to step counts, so that a step of all of them is
    one. Steps that a GradScaler skips and micro-batches of an accumulated step are none. Ends with
    `stop`, or when nobody refers to it.
    """

    def __init__(self, model: nn.Module, tick: Callable[[], None]) -> None:
        self._model = weakref.ref(model)
        self._tick = tick
        self._optimizer: weakref.ref[Optimizer] | None = None
        _hook()
        _CLOCKS.add(self)

    def stop(self) -> None:
        """Count no more."""
        _CLOCKS.discard(self)

    def stepped(self, optimizer: Optimizer) -> None:
        """Take note that an optimizer, any in this process, has made a step."""
        known = self._optimizer() if self._optimizer is not None else None
        if known is None and self._trains(optimizer):
            known, self._optimizer = optimizer, weakref.ref(optimizer)
        if known is optimizer:
            self._tick()

    def _trains(self, optimizer: Optimizer) -> bool:
        model = self._model()
        own = {id(p) for p in model.parameters()} if model is not None else set()
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])


_CLOCKS: weakref.WeakSet[Clock] = weakref.WeakSet()


@cache
def _hook() -> None:
    """Register the one hook there is, for good: torch iterates over its hooks while they run."""

    def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for clock in list(_CLOCKS):
            clock.stepped(optimizer)

    register_optimizer_step_post_hook(stepped)
