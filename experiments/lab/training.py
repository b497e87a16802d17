"""The one training loop: AdamW, warm-up and cosine, clipping, batches by seed and step.

An interrupted run continues where its last saved state was, and ends with the same weights bit for
bit as one that was not interrupted: batches are a function of the step, and the random state of
dropout is saved too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

import d2dcompile as d2d

from .steps import Partial, Steps
from .task import Batch, Task

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        steps, rate: optimizer steps, and the learning rate after warm-up.
        warmup: share of the steps over which the rate rises from 0.
        final: share of the rate that the cosine ends at.
        decay: weight decay of matrices; vectors and scalars have none.
        clip: largest norm of the gradient.
        bf16: whether forward and loss run under bf16 autocast.
        seed: of the batches' order and of dropout.
        looks: how often in all the loss on the validation batches is looked at.
        sparsity: keyword arguments of `d2d.sparsify` (weight, penalty, schedule), {} for none.
        note: what else decides the result, such as the key of the model it starts from.
    """

    steps: int
    rate: float
    warmup: float = 0.05
    final: float = 0.0
    decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    looks: int = 10
    sparsity: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass
class History:
    """What training saw: [[step, mean training loss since the last look, validation loss], ...]."""

    looks: list[list[float]] = field(default_factory=list)
    sparsity: str = ""


def moved(batch: Batch, device: torch.device) -> dict[str, Any]:
    """A batch on a device; what is no tensor stays as it is."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def train(
    task: Task,
    model: nn.Module,
    recipe: Recipe,
    device: torch.device,
    partial: Partial | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> History:
    """Train a model in place; it is left on the device, in eval mode.

    partial: where the running state is kept and, if it is there, resumed from. watch(step, loss) is
    called after each step; what it raises ends the training, as an interruption would.
    """
    model.to(device).train()
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, recipe))
    handle = _sparsifier(task, model, recipe, device)
    history, start, running = History(), 0, 0.0
    state = partial.load() if partial is not None else None
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(recipe.seed)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            _set_random(state["random"], device)
            start, running, history = state["step"], state["running"], History(state["looks"])
            if handle is not None:
                handle.steps = start

        def snapshot(step: int) -> dict[str, Any]:
            return {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "random": _random(device),
                "step": step,
                "running": running,
                "looks": history.looks,
            }

        every = max(recipe.steps // max(recipe.looks, 1), 1)
        for step in range(start, recipe.steps):
            batch = moved(task.train(recipe.seed, step), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                loss = task.loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            running += loss.item() / every
            if (step + 1) % every == 0:
                history.looks.append([step + 1, running, validation_loss(task, model, device)])
                running = 0.0
            if partial is not None:
                partial.save(lambda done=step + 1: snapshot(done))
            if watch is not None:
                watch(step, loss.item())
    if handle is not None:
        history.sparsity = str(handle)
        handle.remove()
    model.eval()
    return history


def trained(
    steps: Steps,
    name: str,
    task: Task,
    recipe: Recipe,
    make: Callable[[], Model],
    device: torch.device,
) -> Model:
    """The model that `make` builds, trained or, where that was done before, with its weights loaded.

    `make` must give the same structure each time (activations replaced, layers swapped); if it starts
    from trained weights, say which in `recipe.note`.
    """
    settings = settings_of(task, recipe)
    model = make().to(device)

    def run() -> None:
        partial = steps.partial(name, settings)
        history = train(task, model, recipe, device, partial)
        steps.value(f"{name}-history", settings, lambda: asdict(history))
        partial.done()

    steps.weights(name, settings, model, run)
    return model.eval()


def settings_of(task: Task, recipe: Recipe) -> dict[str, Any]:
    """What decides a trained model: give it to `Steps.path` and to the notes of what follows."""
    return {"task": task.name, **task.settings, "recipe": asdict(recipe)}


@torch.no_grad()
def validation_loss(task: Task, model: nn.Module, device: torch.device) -> float:
    """Mean loss over the validation batches, in eval mode; the mode is restored."""
    mode = model.training
    model.eval()
    losses = [task.loss(model, moved(batch, device)).item() for batch in task.validation]
    model.train(mode)
    return sum(losses) / len(losses)


def rate_at(step: int, recipe: Recipe) -> float:
    """Share of the learning rate at a step: linear warm-up, then half a cosine down to `final`."""
    rise = max(int(recipe.warmup * recipe.steps), 1)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(recipe.steps - rise, 1)
    return recipe.final + (1 - recipe.final) * (0.5 + 0.5 * math.cos(math.pi * progress))


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=recipe.betas, fused=True)


def _sparsifier(
    task: Task, model: nn.Module, recipe: Recipe, device: torch.device
) -> d2d.Sparsifier | None:
    if not recipe.sparsity:
        return None
    options = {"steps": recipe.steps, **recipe.sparsity}
    return d2d.sparsify(model, moved(task.train(recipe.seed, 0), device), **options)


def _random(device: torch.device) -> Sequence[torch.Tensor]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _set_random(states: Sequence[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
