"""Train routers, of one site or of several that share their first layer, by Adam on minibatches.

    raw_s(x) = relu(x W1^T) W2_s^T          W1 [R, D] of all sites   W2_s [E_s, R] of site s

What is minimised is the mean of the sites' losses, whatever number of tokens and experts each has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional

LEARNING_RATE = 5e-3  # Adam, warmed up, then a cosine to zero; 2e-3 was worse on MiniLM
STEPS_PER_EPOCH = 64  # batches are chosen for it, between 32 and 1024 tokens
HUBER = 1.0  # relative errors above it count linearly: medians, which for sparse targets are zero
QUIET = 1e-3  # of the mean target
CHECKS = 10  # validations during a fit; the best one is kept


@dataclass(frozen=True)
class Data:
    """A site's tokens, scaled targets, scale of each input feature, rows to fit or validate on, and loss."""

    x: Tensor
    goal: Tensor
    scale: Tensor
    fitted: Tensor
    held: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

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
        if epoch % math.ceil(epochs / CHECKS) == 0 or epoch == epochs - 1:
            losses = _validate(sites, w1, w2)
            if sum(losses) < sum(best.losses):
                best = copied(losses, epoch + 1)
        done = epoch + 1
        if progress is not None:
            progress(done, epochs)
        if patience and done - best.epoch >= patience:
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
    w1 = torch.randn(width, features, generator=generator).to(sites[0].x.device)
    w1 = w1 / math.sqrt(features)
    w2 = []
    for data in sites:
        x, goal = data.rows(data.fitted[:: max(1, len(data.fitted) // 16384)])
        hidden = (x @ w1.T).relu()
        normal = hidden.T @ hidden
        ridge = 1e-2 * normal.diagonal().mean() + 1e-6
        normal += ridge * torch.eye(width, device=normal.device)
        solved = torch.linalg.solve(normal, hidden.T @ goal).T.contiguous()
        w2.append(solved.requires_grad_())
    return w1.requires_grad_(), w2


def raw(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """relu(x w1^T) w2^T, whose absolute value the scores are."""
    return (x @ w1.T).relu() @ w2.T


@dataclass(frozen=True)
class RelativeLoss:
    """Huber loss of the error relative to the largest target of each row.

    A row without a target, to which no expert adds anything, wants as few experts as can be; but scores of
    zero run them all, and a fit that has to answer with zeros turns its units off, for other tokens too.
    There the busiest expert of the site is wanted alone. Those rows weigh no more than the others together.

    Attributes:
        resting: the target [E] of rows whose own is nothing.
        weight: of such a row, 0..1.
    """

    resting: Tensor
    weight: float

    @classmethod
    def of(cls, goal: Tensor) -> RelativeLoss:
        """For targets goal [T, E] of mean 1."""
        most = goal.amax(1)
        heard = most[most >= QUIET]
        resting = torch.zeros_like(goal[0])
        resting[goal.mean(0).argmax()] = heard.median() if len(heard) else 1.0
        return cls(resting, min(1.0, len(heard) / max(len(most) - len(heard), 1)))

    def __call__(self, raw: Tensor, goal: Tensor) -> Tensor:
        """The mean [] over raw and goal [T, E]."""
        quiet = (1 - goal.amax(1, keepdim=True) / QUIET).clamp_min(0)
        goal = goal + quiet * self.resting
        error = (raw - goal) / goal.amax(1, keepdim=True).clamp_min(QUIET)
        zero = torch.zeros_like(error)
        loss = functional.smooth_l1_loss(error, zero, beta=HUBER, reduction="none")
        return (loss * (1 - quiet * (1 - self.weight))).mean()


def cross_entropy(scale: Tensor, raw: Tensor, goal: Tensor) -> Tensor:
    """Binary cross-entropy of the logits whose softplus the scores are, both in units of `scale`."""
    score, y = raw.abs() * scale + 1e-6, -torch.expm1(-goal * scale)
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
