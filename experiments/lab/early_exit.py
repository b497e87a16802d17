"""Early exit, a rival that skips layers instead of neurons: a classifier after every layer.

A head reads the pooled output of each layer but the last; an example leaves at the first whose largest
probability reaches a threshold. Model and heads are trained together on the mean of all exits' losses
(BranchyNet, Teerapittayanon et al. 2016, arXiv:1709.01686), for as many steps as the other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .emulation import blocks_of
from .methods import Point, model_macs, on
from .task import Batch, Task

Pool = Callable[[Tensor, Batch], Tensor]  # hidden values [examples, tokens, D] -> [examples, D]
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)


class MultiExit(nn.Module):
    """A classifier with an exit after every layer.

    model: gives `logits`; layers: name of its ModuleList; pool: what a head reads of hidden values.
    """

    def __init__(self, model: nn.Module, layers: str, pool: Pool, width: int, classes: int) -> None:
        super().__init__()
        self.model, self.pool = model, pool
        self.path = layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.heads = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
                for _ in range(len(self.layers) - 1)
            )

    @property
    def layers(self) -> Any:
        """The layers, in the order they run."""
        return self.model.get_submodule(self.path)

    def forward(self, **batch: Any) -> list[Tensor]:
        """Logits [examples, classes] of all exits, the model's own last."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            last = self.model(**batch).logits
        finally:
            for hook in hooks:
                hook.remove()
        exits = zip(self.heads, seen[:-1], strict=True)
        return [*(head(self.pool(hidden, batch)) for head, hidden in exits), last]

    def shallow_macs(self, batches: Sequence[Batch]) -> int:
        """Multiply-adds of the model on the batches with its first layer alone."""
        path, _, name = self.path.rpartition(".")
        parent, whole = self.model.get_submodule(path), self.layers
        setattr(parent, name, whole[:1])
        try:
            return model_macs(self.model, batches)
        finally:
            setattr(parent, name, whole)


def exits_task(task: Task) -> Task:
    """The task whose loss is the mean over all exits; for a MultiExit in the place of the model."""

    def loss(model: Any, batch: Batch) -> Tensor:
        exits = model(**batch)
        losses = [cross_entropy(found.float(), batch["labels"]) for found in exits]
        return torch.stack(losses).mean()

    return replace(task, loss=loss)


@torch.no_grad()
def early_exit(
    task: Task,
    model: MultiExit,
    device: torch.device,
    thresholds: Iterable[float] = THRESHOLDS,
) -> list[Point]:
    """The curve over thresholds. Every example pays for the layers and heads up to its own exit."""
    batches = on(device, task.test)
    examples = sum(len(batch["labels"]) for batch in batches)
    layers = len(model.layers)
    blocks = blocks_of(model.model, batches[0])
    tokens = sum(_tokens(model, batch) for batch in batches)
    dense = tokens * sum(block.dense_macs for block in blocks)
    head = model.heads[0][1].weight.numel()  # type: ignore[index]
    total = model_macs(model.model, batches)
    layer = (total - model.shallow_macs(batches)) / (layers - 1)
    logits = [model(**batch) for batch in batches]
    points = []
    for threshold in thresholds:
        taken = [_first(exits, threshold) for exits in logits]
        passed = sum(float(found.clamp_max(layers - 2).add(1).sum()) for found in taken)
        deep = sum(float(found.add(1).sum()) for found in taken)
        overhead = passed * head
        cost = deep / (examples * layers) + overhead / dense
        skipped = layers - deep / examples
        answers = iter(zip(logits, taken, strict=True))

        def call(**batch: Any) -> SimpleNamespace:
            exits, found = next(answers)  # noqa: B023 (used before the next threshold)
            chosen = torch.stack(exits)[found, torch.arange(len(found), device=found.device)]
            return SimpleNamespace(logits=chosen, loss=cross_entropy(chosen, batch["labels"]))

        quality = dict(task.quality(call, batches))
        points.append(Point(threshold, cost, 1 - (layer * skipped - overhead) / total, quality))
    return points


def _first(exits: Sequence[Tensor], threshold: float) -> Tensor:
    """The first exit [examples] that is sure enough; the last where none is."""
    sure = torch.stack([found.float().softmax(-1).amax(-1) >= threshold for found in exits])
    sure[-1] = True
    return sure.int().argmax(0)


def _tokens(model: MultiExit, batch: Batch) -> int:
    """Rows that reach the first layer."""
    rows: list[int] = []
    hook = model.layers[0].register_forward_pre_hook(
        lambda module, args: rows.append(args[0].shape[:-1].numel())
    )
    try:
        model.model(**batch)
    finally:
        hook.remove()
    return rows[0]
