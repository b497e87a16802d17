"""Train routers, of one site or of several that share their first layer, by Adam on minibatches.

    raw_s(x) = relu(x W1^T) W2_s^T          W1 [R, D] of all sites   W2_s [E_s, R] of site s

What is minimised is the mean of the sites' losses, whatever number of tokens and experts each has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

LEARNING_RATE = 5e-3  # Adam, warmed up, then a cosine to zero; 2e-3 was worse on MiniLM
STEPS_PER_EPOCH = 64  # batches are chosen for it, between 32 and 1024 tokens
HUBER = 1.0  # relative errors above it count linearly: medians, which for sparse targets are zero
QUIET = 1e-3  # of the median row's largest target
CHECKS = 10  # validations during a fit; the best one is kept


@dataclass(frozen=True)
class Data:
    """A site's tokens, scaled targets, scale of each input feature, rows to fit or validate on, and loss."""

    x: Tensor
    goal: Tensor
    scale: Tensor
    fitted: Tensor
    held: Tensor
    loss: Loss

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index].float() / self.scale, self.goal[index]


@dataclass(frozen=True)
class Fitted:
    """What `train` found: w1 [R, D], per site w2 [E, R] and loss, the best epoch, and epochs run."""

    w1: Tensor
    w2: Sequence[Tensor]
    losses: Sequence[float]
    epoch: int
    epochs: int


def train(
    sites: Sequence[Data],
    width: int,
    seed: int,
    epochs: int,
    patience: int,
    progress: Callable[[int, int], None] | None,
) -> Fitted:
    """The weights of the best validation, by the mean over the sites."""
    generator = torch.Generator().manual_seed(seed)
    w1, w2 = _start(sites, width, generator)
    optimizer = torch.optim.Adam([w1, *w2], lr=LEARNING_RATE, betas=(0.9, 0.98))
    most = max(len(data.fitted) for data in sites)
    batch = min(1024, max(32, most // STEPS_PER_EPOCH))
    per_epoch = math.ceil(most / batch)
    steps = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))

    def copied(losses: list[float], epoch: int) -> Fitted:
        kept = [w.detach().clone() for w in (w1, *w2)]
        return Fitted(kept[0], kept[1:], losses, epoch, 0)

    best, done = copied(_validate(sites, w1, w2), 0), 0
    for epoch in range(epochs):
        parts = [_parts(data, batch, per_epoch, most, generator) for data in sites]
        for indices in zip_longest(*parts):
            optimizer.zero_grad()
            for data, w, index in zip(sites, w2, indices, strict=True):
                if index is not None:
                    x, goal = data.rows(data.fitted[index])
                    torch.autograd.backward(data.loss(raw(x, w1, w), goal) / len(sites))
            optimizer.step()
            schedule.step()
        checked = epoch % math.ceil(epochs / CHECKS) == 0 or epoch == epochs - 1
        if checked:
            losses = _validate(sites, w1, w2)
            if sum(losses) < sum(best.losses):
                best = copied(losses, epoch + 1)
        done = epoch + 1
        if progress is not None:
            progress(done, epochs)
        if checked and patience and done - best.epoch >= patience:
            break
    return Fitted(best.w1, best.w2, best.losses, best.epoch, done)


def _parts(
    data: Data, batch: int, per_epoch: int, most: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """A site's rows in random order, in at most as many batches as the site with the most rows has."""
    order = torch.randperm(len(data.fitted), generator=generator).to(data.x.device)
    size = batch if len(order) == most else math.ceil(len(order) / per_epoch)
    return torch.split(order, size)


def _start(
    sites: Sequence[Data], width: int, generator: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Random first layer; second layers by ridge regression on its features."""
    features = sites[0].x.shape[1]
    w1 = torch.randn(width, features, generator=generator, dtype=torch.float32).to(
        sites[0].x.device
    )
    w1 = w1 / math.sqrt(features)
    w2 = []
    for data in sites:
        x, goal = data.rows(data.fitted[:: max(1, len(data.fitted) // 16384)])
        goal, weight = data.loss.wanted(goal)
        hidden, goal = (x @ w1.T).relu() * weight, goal * weight
        normal = hidden.T @ hidden
        ridge = 1e-2 * normal.diagonal().mean() + 1e-6
        normal += ridge * torch.eye(width, device=normal.device, dtype=normal.dtype)
        solved = torch.linalg.solve(normal, hidden.T @ goal).T.contiguous()
        w2.append(solved.requires_grad_())
    return w1.requires_grad_(), w2


def raw(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """relu(x w1^T) w2^T, whose absolute value the scores are."""
    return (x @ w1.T).relu() @ w2.T


class Loss(Protocol):
    """What a router's raw scores [T, E] are to be, given targets [T, E], and how far from it they are."""

    def __call__(self, raw: Tensor, goal: Tensor) -> Tensor: ...

    def wanted(self, goal: Tensor) -> tuple[Tensor, Tensor]:
        """What is wanted [T, E], and by what [T, 1] an error is multiplied."""
        ...


@dataclass(frozen=True)
class RelativeLoss:
    """Huber loss of the error relative to the largest target of each row.

    A row without a target, to which no expert adds anything, wants as few experts as can be; but scores of
    zero run them all, and a fit that has to answer with zeros turns its units off, for other tokens too.
    There the expert that is busiest on the others is wanted alone. Those rows weigh no more than the others
    together.

    Attributes:
        floor: a largest target below it counts as none, the less of it the more.
        resting: the target [E] of rows whose own is nothing.
        weight: of such a row, 0..1.
    """

    floor: Tensor
    resting: Tensor
    weight: Tensor

    @classmethod
    def of(cls, goal: Tensor) -> RelativeLoss:
        """For rows like these targets [T, E] of any unit; medians, since few rows may be huge."""
        unit = unit_of(goal)
        most = goal.amax(1, keepdim=True)
        floor = QUIET * unit
        heard = most.squeeze(1) >= floor
        share = torch.where(heard[:, None], goal / most.clamp_min(floor), 0)
        resting = torch.zeros_like(goal[0])
        resting[share.sum(0).argmax()] = unit
        loud, silent = heard.sum(), (~heard).sum()
        weight = torch.where(loud > 0, loud / silent.clamp_min(1), 1.0).clamp_max(1)
        return cls(floor, resting, weight)

    def wanted(self, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Targets [T, E] with those of rows without, and one over their largest [T, 1]."""
        full = goal + self._quiet(goal) * self.resting
        return full, 1 / full.amax(1, keepdim=True).clamp_min(self.floor)

    def __call__(self, raw: Tensor, goal: Tensor) -> Tensor:
        """The mean [] over raw and goal [T, E]."""
        full, inverse = self.wanted(goal)
        error = (raw - full) * inverse
        zero = torch.zeros_like(error)
        loss = functional.smooth_l1_loss(error, zero, beta=HUBER, reduction="none")
        return (loss * self._weight(goal)).mean()

    def slope(self, raw: Tensor, goal: Tensor) -> Tensor:
        """The derivative [T, E] by raw."""
        full, inverse = self.wanted(goal)
        error = (raw - full) * inverse
        return (error / HUBER).clamp(-1, 1) * inverse * self._weight(goal) / max(raw.numel(), 1)

    def _quiet(self, goal: Tensor) -> Tensor:
        """How much a row is without a target [T, 1], 0..1."""
        return (1 - goal.amax(1, keepdim=True) / self.floor).clamp_min(0)

    def _weight(self, goal: Tensor) -> Tensor:
        return 1 - self._quiet(goal) * (1 - self.weight)


def unit_of(goal: Tensor) -> Tensor:
    """The median [] of the largest targets of rows [T, E] that have any; 1 where none has."""
    most = goal.amax(1)
    heard = most[most > 0]
    return heard.median() if len(heard) else goal.new_ones(())


@dataclass(frozen=True)
class CrossEntropy:
    """Binary cross-entropy of the logits whose softplus the scores are, both in units of `scale`."""

    scale: Tensor

    def wanted(self, goal: Tensor) -> tuple[Tensor, Tensor]:
        """The targets, all of one weight."""
        return goal, goal.new_ones(())

    def __call__(self, raw: Tensor, goal: Tensor) -> Tensor:
        """The mean [] over raw and goal [T, E]."""
        score, y = raw.abs() * self.scale + 1e-6, -torch.expm1(-goal * self.scale)
        return ((1 - y) * score - y * torch.log(-torch.expm1(-score))).mean()


@torch.no_grad()
def _validate(sites: Sequence[Data], w1: Tensor, w2: Sequence[Tensor]) -> list[float]:
    losses = []
    for data, w in zip(sites, w2, strict=True):
        x, goal = data.rows(data.held[:: max(1, len(data.held) // 8192)])
        losses.append(data.loss(raw(x, w1, w), goal).item())
    return losses


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a linear warm-up over a thirtieth, then half a cosine."""
    return min(1.0, 30 * (step + 1) / steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
