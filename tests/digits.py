"""A tiny vision transformer on scikit-learn's digits, trained in seconds towards sparse activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import d2dcompile as d2d

PATCHES, PIXELS, HEADS = 16, 4, 4


class Block(nn.Module):
    """Pre-norm attention and feed-forward block of a transformer."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.act, self.down = nn.Linear(d, h), nn.ReLU(), nn.Linear(h, d)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(split[0], split[1], split[2])
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.between(x))))


class Digits(nn.Module):
    """patches [B, 16, 4] -> logits [B, 10]."""

    def __init__(self, d: int = 32, h: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.patch, self.place = nn.Linear(PIXELS, d), nn.Parameter(torch.randn(PATCHES, d) / 8)
        self.blocks = nn.ModuleList(Block(d, h) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@dataclass(frozen=True)
class Data:
    """Patches [N, 16, 4] and labels [N]."""

    x: Tensor
    y: Tensor

    def __getitem__(self, rows: Any) -> Data:
        return Data(self.x[rows], self.y[rows])


def data() -> tuple[Data, Data]:
    """1000 training and 797 held-out digits, drawn by seed 0."""
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32) / 8 - 1
    patches = pixels.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, PATCHES, PIXELS)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    both = Data(patches[order], torch.tensor(found.target)[order])
    return both[:1000], both[1000:]


def train(
    model: nn.Module, forward: Callable[[Tensor], Tensor], seen: Data, epochs: int, rate: float
) -> None:
    """AdamW on batches of 100, warmed up and down again; `forward` is the model or compiled from it."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    steps = epochs * -(-len(seen.x) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(seen.x), generator=generator).split(100):
            optimizer.zero_grad()
            F.cross_entropy(forward(seen.x[rows]), seen.y[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def trained(epochs: int = 25, weight: float = 0.3, **sizes: int) -> Digits:
    """A model trained to about 0.95 on held-out digits, its activations made sparse; once a process."""
    return copy.deepcopy(_trained(epochs, weight, **sizes))


@cache
def _trained(epochs: int, weight: float, **sizes: int) -> Digits:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Digits(**sizes)
    seen, _ = data()
    steps = 10 * epochs
    penalty = d2d.sparsify(model, seen.x[:2], weight=weight, schedule="linear_warmup", steps=steps)
    train(model, model, seen, epochs, 3e-3)
    penalty.remove()
    return model


@torch.no_grad()
def loss(forward: Callable[[Tensor], Tensor], held: Data) -> float:
    """Cross-entropy, nats."""
    return float(F.cross_entropy(forward(held.x), held.y))


@torch.no_grad()
def accuracy(forward: Callable[[Tensor], Tensor], held: Data) -> float:
    """Share of digits that are named right."""
    return float((forward(held.x).argmax(1) == held.y).float().mean())
