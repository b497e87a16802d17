"""Task: what an experiment trains and measures, apart from any method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Batch = Mapping[str, Any]  # keyword arguments of the model, on the CPU


@dataclass(frozen=True, eq=False)
class Task:
    """A model family, its data and its quality.

    Attributes:
        name: of files and plots.
        settings: JSON values that decide model and data (sizes, split, seed); part of every step's key.
        model: a fresh dense model, deterministic (seed it inside); its argument is the hidden size of the
            feed-forward blocks, None for the task's own.
        train: (seed, step) -> the batch of that training step. A pure function, which is what makes
            an interrupted training resume exactly.
        calibration: batches to fit routers and thresholds on, of training data.
        validation: batches to choose taus and settings on.
        test: batches that points are measured on, and nothing else.
        loss: (model, batch) -> scalar loss. `model` may be compiled or hooked.
        quality: (callable, batches) -> {metric: value}; called without gradients, in eval mode.
        metrics: {metric: whether higher is better}; the first is the one that budgets are judged by.
    """

    name: str
    settings: Mapping[str, Any]
    model: Callable[[int | None], nn.Module]
    train: Callable[[int, int], Batch]
    calibration: Sequence[Batch]
    validation: Sequence[Batch]
    test: Sequence[Batch]
    loss: Callable[[Any, Batch], Tensor]
    quality: Callable[[Any, Sequence[Batch]], Mapping[str, float]]
    metrics: Mapping[str, bool]

    @property
    def metric(self) -> str:
        """The metric that budgets are judged by."""
        return next(iter(self.metrics))
