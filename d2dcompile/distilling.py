"""Distil linear layers into two-layer ReLU blocks of equal cost, on what the layers see.

    y = x W^T + b     is replaced by     y' = relu(x U^T + c) V^T + e        U [H, D]   V [d_out, H]

H is about D d_out / (D + d_out), so that both have as many weights and multiply-adds. Szatkowski et al.
2024, arXiv:2310.04361, section 3 and appendix; mean squared error, plus square Hoyer of the hidden values
with a weight that rises linearly. Here the error is relative to the variance of y, features of x are
standardised while training, and U, V start from the principal components of y (see `_start`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .penalties import Hoyer

ROUNDED = 0.02  # how far rounding may move the cost
HELD_OUT, BLOCK = 10, 128  # every 10th block of BLOCK rows is held out: neighbours share a text
LAST_RATE = 1e-3  # of the learning rate, at the end of a cosine; the official code's 1e-6 of 1e-3
CHUNK = 8192  # rows of x at once where no gradient is kept


class ProjectionMLP(nn.Module):
    """down(relu(up(x))), and x added to it if `residual`: what stands for a linear layer D -> d_out."""

    def __init__(self, d_in: int, d_out: int, hidden: int, residual: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.residual = d_in, d_out, residual
        self.up, self.act, self.down = nn.Linear(d_in, hidden), nn.ReLU(), nn.Linear(hidden, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """Values [..., d_out] of x [..., D]."""
        y: Tensor = self.down(self.act(self.up(x)))
        return x + y if self.residual else y


def hidden_width(d_in: int, d_out: int, width: float = 1.0) -> int:
    """Hidden neurons of a block that costs `width` times a linear layer, as multiple of a power of two.

    The largest power up to 64 that moves the cost by 2 % at most, so that experts of usual sizes divide it.
    """
    exact = width * d_in * d_out / (d_in + d_out)
    for step in (64, 32, 16, 8, 4, 2):
        near = step * round(exact / step)
        if near and abs(near - exact) <= ROUNDED * exact:
            return near
    return max(1, round(exact))


@dataclass(frozen=True)
class Recipe:
    """How blocks are trained: passes over the rows, learning rate, weight of square Hoyer, seed, start."""

    epochs: int
    lr: float
    hoyer: float
    seed: int
    batch: int = 256
    start: str = "pairs"


@dataclass(frozen=True)
class Fitted:
    """How well a block stands for its layer, on held-out rows.

    Attributes:
        error: squared error as a share of the variance of y; 0 is exact, 1 as bad as the mean of fitted rows.
        linear_error: the same of the best linear layer through H values (PCA of y), which costs as much.
        active: share of the hidden values above zero.
    """

    error: float
    linear_error: float
    active: float


@dataclass(frozen=True)
class Scaled:
    """Rows of x [T, D] standardised by feature, and one layer's y [T, d_out] with mean 0, variance 1."""

    mean: Tensor
    scale: Tensor
    y_mean: Tensor
    y_scale: Tensor
    weight: Tensor  # of the layer that makes the scaled y of the standardised x, without bias


@torch.enable_grad()
def distil(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None]],
    blocks: Sequence[ProjectionMLP],
    recipe: Recipe,
    progress: Callable[[], None] = lambda: None,
) -> list[Fitted]:
    """Fit one block to each linear layer, all on the same rows, and write it into the block.

    x [T, D]: rows of any float dtype, in the order of the stream. layers: weight [d_out, D] and bias
    [d_out] or None each, on the device to train on. Trains in fp32 whatever the dtypes. progress is
    called after each epoch. The same seed gives the same blocks; the global random state is not touched.
    """
    device = layers[0][0].device
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        index = torch.arange(len(x))
        size = min(BLOCK, max(1, len(x) // (2 * HELD_OUT)))
        held = (index // size) % HELD_OUT == HELD_OUT - 1
        fitted = x[~held] if bool((~held).any()) else x
        kept = x[held] if bool(held.any()) else x
        targets = [_target(w, b, blk) for (w, b), blk in zip(layers, blocks, strict=True)]
        scaled = [_scaled(fitted, w, b) for w, b in targets]
        generator = torch.Generator().manual_seed(recipe.seed)
        parameters = [
            _start(fitted, one, blk.up.out_features, recipe.start, generator)
            for one, blk in zip(scaled, blocks, strict=True)
        ]
        _train(fitted, scaled, parameters, recipe, generator, progress)
        found = []
        for layer, target, one, values, blk in zip(
            layers, targets, scaled, parameters, blocks, strict=True
        ):
            _write(blk, one, values)
            bottleneck = _bottleneck(fitted, one, blk.up.out_features)
            found.append(_judge(kept, layer, target, one, bottleneck, blk))
        return found


def _target(weight: Tensor, bias: Tensor | None, blk: ProjectionMLP) -> tuple[Tensor, Tensor]:
    """Weight and bias, fp32, of what the block's matrices stand for: the layer, less x if it is added."""
    w = weight.detach().float().clone()
    if blk.residual:
        w -= torch.eye(len(w), device=w.device)
    return w, torch.zeros_like(w[:, 0]) if bias is None else bias.detach().float()


def _scaled(x: Tensor, weight: Tensor, bias: Tensor) -> Scaled:
    rows = _sums(x, weight.device)
    mean, covariance = rows
    variance = covariance.diagonal()
    scale = (variance + 1e-6 * variance.mean() + 1e-30).sqrt()  # a constant feature stays small
    spread = ((weight @ covariance) * weight).sum(1).mean().clamp_min(1e-30).sqrt()
    return Scaled(mean, scale, weight @ mean + bias, spread, weight * scale / spread)


def _sums(x: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of rows, fp32 from sums in fp64 over blocks."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=device)
    for part in torch.split(x, CHUNK):
        total += part.to(device, torch.float64).sum(0)
    mean = (total / len(x)).float()
    products = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=device)
    for part in torch.split(x, CHUNK):
        centred = part.to(device, torch.float32) - mean
        products += (centred.T @ centred).double()
    return mean, (products / len(x)).float()


def _components(x: Tensor, one: Scaled, count: int) -> tuple[Tensor, Tensor]:
    """The first principal components [count, d_out] of the scaled y, and the variance along each."""
    covariance = one.weight.new_zeros(len(one.weight), len(one.weight))
    for part in torch.split(x, CHUNK):
        y = _standard(part, one) @ one.weight.T
        covariance += y.T @ y / len(x)
    values, vectors = torch.linalg.eigh(covariance.double())
    order = values.argsort(descending=True)[:count]
    return vectors[:, order].T.float().contiguous(), values[order].clamp_min(0).float()


def _standard(x: Tensor, one: Scaled) -> Tensor:
    return (x.to(one.mean.device, torch.float32) - one.mean) / one.scale


def _start(
    x: Tensor, one: Scaled, hidden: int, start: str, generator: torch.Generator
) -> list[Tensor]:
    """U, c, V, e of the scaled problem to begin with.

    "pairs": the first H/2 principal components of y, each as relu(z) - relu(-z): half of the neurons are
    silent, and what an expert adds is small where it is skipped. "components": the first H, each through
    one neuron whose bias keeps nearly all rows above zero: the best linear layer through H values, but
    every neuron is active, so that no expert can be skipped at little harm. "random": as nn.Linear begins.
    """
    d_out, d_in = one.weight.shape
    if start == "random":
        bounds = ((hidden, d_in), (hidden,), (d_out, hidden), (d_out,))
        fans = (d_in, d_in, hidden, hidden)
        made = [
            (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan)
            for shape, fan in zip(bounds, fans, strict=True)
        ]
    else:
        paired = start == "pairs"
        count = min(hidden // 2 if paired else hidden, d_out)
        rows, variance = _components(x, one, count)
        spread = (variance + 1e-6).sqrt()
        up = rows @ one.weight / spread[:, None]  # each neuron's input has variance 1
        down = rows.T * spread
        bias, out = torch.zeros(count), torch.zeros(d_out)
        if paired:
            up, down, bias = (
                torch.cat([up, -up]),
                torch.cat([down, -down], 1),
                torch.zeros(2 * count),
            )
        else:
            bias += OFFSET
            out = -OFFSET * down.sum(1)
        rest = hidden - len(up)  # more neurons than components
        extra = torch.randn(rest, d_in, generator=generator).to(up) / math.sqrt(d_in)
        up, down = torch.cat([up, extra]), F.pad(down, (0, rest))
        made = [up, F.pad(bias, (0, rest)), down, out]
    return [t.to(one.weight.device).contiguous().requires_grad_() for t in made]


OFFSET = 2.0  # standard deviations of a component below its mean where its neuron falls silent


def _train(
    x: Tensor,
    scaled: Sequence[Scaled],
    parameters: Sequence[list[Tensor]],
    recipe: Recipe,
    generator: torch.Generator,
    progress: Callable[[], None],
) -> None:
    """Adam on minibatches of rows, all blocks on the same ones; no parameter is shared among blocks."""
    device, penalty = scaled[0].weight.device, Hoyer()
    optimizer = torch.optim.Adam([t for values in parameters for t in values], lr=recipe.lr)
    batches = math.ceil(len(x) / recipe.batch)
    steps = recipe.epochs * batches

    def rate(step: int) -> float:
        warm = min(1.0, 30 * (step + 1) / steps)
        return warm * (LAST_RATE + (1 - LAST_RATE) * (0.5 + 0.5 * math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    step = 0
    for _ in range(recipe.epochs):
        for rows in torch.split(torch.randperm(len(x), generator=generator), recipe.batch):
            part = _standard(x[rows], scaled[0])
            loss = torch.zeros((), device=device)
            for one, (up, bias, down, out) in zip(scaled, parameters, strict=True):
                hidden = F.linear(part, up, bias).relu()
                error = F.linear(hidden, down, out) - part @ one.weight.T
                loss = loss + error.square().mean()
                if recipe.hoyer:
                    loss = loss + recipe.hoyer * step / steps * penalty(hidden).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            step += 1
        progress()


@torch.no_grad()
def _write(blk: ProjectionMLP, one: Scaled, values: Sequence[Tensor]) -> None:
    """The block's parameters, in its dtype, from those of the scaled problem."""
    up, bias, down, out = (t.detach().double() for t in values)
    up = up / one.scale
    blk.up.weight.copy_(up)
    blk.up.bias.copy_(bias - up @ one.mean.double())
    blk.down.weight.copy_(down * one.y_scale)
    blk.down.bias.copy_(one.y_mean + out * one.y_scale)


def _bottleneck(x: Tensor, one: Scaled, hidden: int) -> Tensor:
    """The projector [d_out, d_out] on the first H principal components of y."""
    rows, _ = _components(x, one, hidden)
    return rows.T @ rows


@torch.no_grad()
def _judge(
    x: Tensor,
    layer: tuple[Tensor, Tensor | None],
    target: tuple[Tensor, Tensor],
    one: Scaled,
    bottleneck: Tensor,
    blk: ProjectionMLP,
) -> Fitted:
    """The figures of a block as it will run, in its dtype, on held-out rows."""
    weight, device = blk.up.weight, layer[0].device
    squares, linear, active = 0.0, 0.0, 0.0
    outputs = torch.cat(
        [F.linear(p.to(device, torch.float32), *target) for p in torch.split(x, CHUNK)]
    )
    centred = outputs - one.y_mean
    spread = float(centred.square().sum().clamp_min(1e-30))
    for part, exact, own in zip(
        torch.split(x, CHUNK), torch.split(outputs, CHUNK), torch.split(centred, CHUNK), strict=True
    ):
        hidden = blk.act(blk.up(part.to(device, weight.dtype)))
        squares += float((blk.down(hidden).float() - exact).square().sum())
        linear += float((own - own @ bottleneck).square().sum())
        active += float((hidden > 0).float().sum())
    return Fitted(squares / spread, linear / spread, active / (len(x) * len(weight)))
