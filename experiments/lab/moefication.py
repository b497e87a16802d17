"""MoEfication (Zhang et al. 2022, arXiv:2110.01786): static top-k over a router trained on activations.

    score_e(x) = (W2 tanh(W1 x))_e                    W1 [R, D]   W2 [E, R]
    target[t, e] = sum of h_t over the neurons of e, divided by the largest such sum of all
    loss = binary cross-entropy of sigmoid(score) and target; k experts of the highest score run

The model is a ReLU one; the split is by balanced k-means on the rows of `up`, which is also D2DMoE's, so the
experts are those of the attached conversion. Activations that can be negative count by size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .baselines import SHARES, StaticTopK, attached_scores, swept
from .emulation import Block, Rule, emulate


class MoEfication(StaticTopK):
    """Static top-k over MoEfication's router."""


class _Recorder(Rule):
    """Keeps a block's inputs and the experts' summed activations, up to `limit` tokens a site."""

    def __init__(self, experts: Mapping[str, int], limit: int) -> None:
        self.experts, self.limit = experts, limit
        self.x: dict[str, list[Tensor]] = {}
        self.sums: dict[str, list[Tensor]] = {}
        self.rows: dict[str, int] = {}

    def hidden(self, block: Block, x: Tensor, h: Tensor) -> None:
        name = block.site.name
        if self.rows.get(name, 0) >= self.limit:
            return
        experts = self.experts[name]
        sums = h.float().abs().reshape(-1, experts, h.shape[-1] // experts).sum(-1)
        self.x.setdefault(name, []).append(x.float().reshape(-1, x.shape[-1]))
        self.sums.setdefault(name, []).append(sums)
        self.rows[name] = self.rows.get(name, 0) + len(sums)


@torch.no_grad()
def record(
    model: nn.Module, blocks: list[Block], batches: Sequence[Mapping], limit: int
) -> _Recorder:
    """Inputs and activation sums of the attached conversion's experts over the batches."""
    recorder = _Recorder(attached_scores(model)[0], limit)
    with emulate(blocks, recorder):
        for batch in batches:
            model(**batch)
    return recorder


def fit_moefication(
    model: nn.Module,
    blocks: list[Block],
    batches: Sequence[Mapping],
    *,
    width: int,
    epochs: int = 30,
    rate: float = 5e-3,
    seed: int = 0,
    limit: int = 65536,
) -> dict[str, Tensor]:
    """Routers of all blocks: {"<site>|w1": [R, D], "<site>|w2": [E, R]}, by Adam with a cosine to zero.

    As many epochs, minibatches and units as D2DMoE's routers get.
    """
    recorder = record(model, blocks, batches, limit)
    routers = {}
    for index, block in enumerate(blocks):
        name = block.site.name
        x, sums = torch.cat(recorder.x[name]), torch.cat(recorder.sums[name])
        target = sums / sums.max().clamp_min(1e-12)
        w1, w2 = _fit(x, target, width, epochs, rate, seed + index)
        routers[f"{name}|w1"], routers[f"{name}|w2"] = w1, w2
    return routers


def _fit(
    x: Tensor, target: Tensor, width: int, epochs: int, rate: float, seed: int
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w1 = torch.randn(width, x.shape[1], generator=generator).to(x.device) / x.shape[1] ** 0.5
    w2 = torch.randn(target.shape[1], width, generator=generator).to(x.device) / width**0.5
    scale = x.square().mean(0).sqrt().clamp_min(1e-6)
    x = x / scale
    w1.requires_grad_(), w2.requires_grad_()
    batch = min(1024, max(32, len(x) // 64))
    optimizer = torch.optim.Adam([w1, w2], lr=rate)
    total = epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    with torch.enable_grad():
        for _ in range(epochs):
            for index in torch.randperm(len(x), generator=generator).to(x.device).split(batch):
                logits = (x[index] @ w1.T).tanh() @ w2.T
                loss = functional.binary_cross_entropy_with_logits(logits, target[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return (w1 / scale).detach(), w2.detach()


def moefication(
    model: nn.Module, routers: Mapping[str, Tensor], shares: Sequence[float] = SHARES
) -> Iterator[tuple[float, Rule]]:
    """MoEfication on the experts of the attached conversion, with routers of `fit_moefication`."""
    experts = attached_scores(model)[0]
    device = next(model.parameters()).device
    scores, widths = {}, {}
    for name in experts:
        w1, w2 = (routers[f"{name}|{part}"].to(device) for part in ("w1", "w2"))
        scores[name] = lambda x, w1=w1, w2=w2: (x.float() @ w1.T).tanh() @ w2.T
        widths[name] = len(w1)
    return swept(MoEfication(experts, scores, widths), "share", shares)
