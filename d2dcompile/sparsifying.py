"""sparsify: train a model towards sparse hidden activations, in whatever loop already trains it.

    loss + weight(step) / C * sum over the C calls of sites in a forward pass of
                              factor[site] * mean over tokens of penalty(activation)

is what the gradients are of, although the loss is the loop's own: each activation passes unchanged, and
on the way back the penalty's gradient is added to it. What the loop multiplies its loss by (a
GradScaler's scale, one over the accumulated micro-batches) must multiply the penalty too; it is read off
as the gradient that reaches the model's own loss, before any activation's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import unwrap
from .errors import SparsifyError
from .injecting import enter, leave, penalised, share_of, shifts_labels, watched, with_loss
from .penalties import gradient, penalty_of, value
from .probe import forget_compiled
from .stepping import Clock, positive, schedule_of
from .tapping import PLACES, Tap, tap_hook, taps

SMALL = 1e-3  # of a token's largest activation: what counts as nearly zero


@dataclass(frozen=True)
class SiteSparsity:
    """What one site's activations were like when last looked at.

    Attributes:
        step: the optimizer step of that look.
        zeros: share of activations that are exactly zero.
        small: share of at most a thousandth of their token's largest.
        penalty: mean over tokens, without weight.
    """

    step: int
    zeros: float
    small: float
    penalty: float


class Sparsifier:
    """A model in sparsity training: `stats`, printable, and `remove`. Made by `sparsify`.

    Attributes:
        taps: where the sites' activations are penalised.
        steps: optimizer steps so far; set it when training resumes.
        seed: the gradient that reached the loss in the running backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        found: list[Tap],
        penalty: Callable[[Tensor], Tensor],
        factor: Callable[[int], float],
        sites: Mapping[str, float],
        loss_scale: Any,
        log_every: int,
    ) -> None:
        self.model = model
        self.taps = tuple(found)
        self.steps = 0
        self._penalty = penalty
        self._factor = factor
        self._loss_scale = loss_scale
        self._log_every = log_every
        self.seed: Tensor | None = None
        self._looks: dict[str, tuple[int, tuple[Tensor, Tensor, Tensor]]] = {}
        calls = sum(tap.calls for tap in found)
        self._shares = [sites.get(tap.site.name, 1.0) / calls for tap in found]
        self._key = enter(self)
        self._clock = Clock(model, self._tick)
        self._hooks = [tap_hook(tap, self._penalised(i)) for i, tap in enumerate(found)]
        owner = loss_scale if isinstance(loss_scale, nn.Module) else model
        self._hooks.append(owner.register_forward_hook(self._watching(model), with_kwargs=True))

    @property
    def weight(self) -> float:
        """The penalty's weight at this step."""
        return self._factor(self.steps)

    @property
    def stats(self) -> dict[str, SiteSparsity]:
        """{site name: SiteSparsity} as of the last look; empty before the first backward pass."""
        names = (tap.site.name for tap in self.taps)
        looks = {name: self._looks[name] for name in names if name in self._looks}
        return {
            name: SiteSparsity(step, *map(float, found)) for name, (step, found) in looks.items()
        }

    def __str__(self) -> str:
        lines = [f"{'site':<44} {'step':>7} {'zeros':>7} {'small':>7} {'penalty':>8}"]
        for name, s in self.stats.items():
            lines.append(
                f"{name:<44} {s.step:>7} {s.zeros:>7.1%} {s.small:>7.1%} {s.penalty:>8.4f}"
            )
        lines.append(f"step {self.steps}, weight {self.weight:.3g}")
        return "\n".join(lines)

    def step(self) -> None:
        """Count an optimizer step by hand, for optimizers that are no torch.optim.Optimizer.

        Steps are no longer counted automatically from the first call on.
        """
        self._clock.stop()
        self._tick()

    def remove(self) -> None:
        """Take every hook off the model again. Graphs compiled with them no longer penalise."""
        self._clock.stop()
        leave(self._key)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _tick(self) -> None:
        self.steps += 1

    def _penalised(self, index: int) -> Callable[[Tensor], Tensor]:
        key = self._key

        def replace(values: Tensor) -> Tensor:
            tap = self.taps[index]  # by way of self, which has to live as long as the hook
            if not (tap.module.training and torch.is_grad_enabled()):
                return values
            return penalised(values, key, index, tap.copied)

        return replace

    def _watching(self, model: nn.Module) -> Callable[..., Any]:
        """A forward hook that lets the gradient at the loss be seen."""
        key, shifts = self._key, shifts_labels(model)

        def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if not (model.training and torch.is_grad_enabled()):
                return output
            self.seed = None
            share = share_of(kwargs, shifts)
            return with_loss(output, lambda loss: watched(loss, share, key))

        return watch

    def slope(self, index: int, values: Tensor) -> Tensor:
        """The gradient of the weighted penalty at the tensor that a tap sees."""
        tap = self.taps[index]
        rows = tap.rows(values)
        self._look(tap, rows)
        scale = self._scale(tap, values) * (self.weight * self._shares[index] / max(len(rows), 1))
        return tap.slope(values, lambda a: gradient(self._penalty, a) * scale)

    def _scale(self, tap: Tap, values: Tensor) -> Any:
        """What the loop multiplies its loss by."""
        given = self._loss_scale
        if given is None or isinstance(given, nn.Module):
            if self.seed is None and (given is not None or values.dtype == torch.float16):
                where = "in the output of the model" if given is None else "that of loss_scale"
                raise SparsifyError(
                    f"Site {tap.site.name!r}: backward() of {values.dtype} activations from a loss that is "
                    f"not {where}. Its scale is unknown; expected loss_scale=scaler, the module that "
                    "computes the loss, or what the loop multiplies it by."
                )
            return 1.0 if self.seed is None else self.seed.to(values.device)
        if hasattr(given, "get_scale"):
            return given.scale(torch.ones((), device=values.device))  # without a synchronisation
        return given() if callable(given) else given

    def _look(self, tap: Tap, rows: Tensor) -> None:
        """Statistics of a site, once at every `log_every`-th step."""
        last = self._looks.get(tap.site.name)
        if self.steps % self._log_every or not len(rows) or (last and last[0] == self.steps):
            return
        a = tap.activation(rows)
        size = a.abs()
        small = size <= SMALL * size.amax(-1, keepdim=True)
        zeros = (a == 0).float().mean()
        found = (zeros, small.float().mean(), value(self._penalty, a if tap.penalised else rows))
        self._looks[tap.site.name] = (self.steps, found)


def sparsify(
    model: nn.Module,
    example: Any,
    *,
    weight: float,
    penalty: str | Callable[[Tensor], Tensor] = "hoyer",
    at: str | None = None,
    schedule: str | Callable[[int], float] = "constant",
    steps: int | None = None,
    sites: Mapping[str, float] | None = None,
    loss_scale: Any = None,
    log_every: int = 100,
) -> Sparsifier:
    """Add a sparsity penalty to the gradients of a model's training, whatever loop trains it.

    From here until `remove`, backward passes in training mode give the gradients of

        loss + weight * schedule(step) / C * sum over C site calls of factor * mean over tokens of penalty

    while outputs and the reported loss stay those of the task. Sites are found by the matcher; parameters,
    state_dict, eval mode and no_grad are untouched. Graphs compiled before are compiled again.

    Args:
        example: what the model is called with, as one batch of `convert`: it runs to find the sites.
        weight: the same at every width, batch size and number of layers. Of the official code's alpha for
            Hoyer and L1 it is alpha * H.
        penalty: "hoyer" (square Hoyer), "l1", "clamped_hoyer" and "clamped_l1" (of pre-activations, down
            to -10), or a callable from activations [tokens, H] to [tokens]; see `d2dcompile.penalties`.
        at: "activation": after the activation function, in gated blocks that of the gate; "hidden": what
            enters the down projection; "preactivation": what enters the activation function. None: what
            the penalty is for, else "activation".
        schedule: "constant", "linear" (0 to 1 over `steps`), "linear_warmup" (0 to 1 over the first half
            of them), or a function of the step. Steps are those of the optimizer, counted by a hook.
        sites: {site name: factor} of the weight, 1 for others; 0 leaves a site alone.
        loss_scale: what the loop multiplies its loss by before backward(). None: read off at the loss in
            the model's output ("loss", the first of a tuple, or itself), 1 if it has none. Where the loss
            is computed outside: the module that computes it, a GradScaler, a number such as one over the
            accumulated micro-batches, or a function that returns it.
        log_every: optimizer steps between two looks at `stats`.

    Padding tokens count like any other. Raises SparsifyError for arguments that are impossible, a model
    without sites, and a site whose activation is not the input or output of a module; and in backward(),
    for fp16 activations whose loss scale is not known.
    """
    chosen = penalty_of(penalty)
    at = at if at is not None else str(getattr(chosen, "at", "activation"))
    if at not in PLACES:
        raise SparsifyError(f"at is {at!r}; expected one of {', '.join(PLACES)}.")
    if not (isinstance(weight, (int, float)) and 0 <= weight < math.inf):
        raise SparsifyError(f"weight is {weight!r}; expected a finite number >= 0.")
    positive("log_every", log_every, "optimizer steps between two looks")
    number = isinstance(loss_scale, (int, float, type(None)))
    if not (number or callable(loss_scale) or hasattr(loss_scale, "get_scale")):
        raise SparsifyError(
            f"loss_scale is a {type(loss_scale).__name__}; expected a number, a GradScaler, a function, "
            "or the module that computes the loss."
        )
    shape = schedule_of(schedule, steps)
    found = taps(model, example, at, sites or {})
    forget_compiled()
    return Sparsifier(
        unwrap(model), found, chosen, lambda step: weight * shape(step), sites or {}, loss_scale, log_every
    )  # fmt: skip
