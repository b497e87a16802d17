"""judge: what a router's scores get right, against the scores that were wanted, on tokens it never saw.

Masks at several taus say what the rule "max" makes of the scores; correlations do not depend on a rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.gate import gate, tau_bits

TAUS = (0.1, 0.2, 0.3, 0.5)
SHARES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # values of p whose executed share is recorded
RANKED = 1 << 20  # elements that are ranked for correlations over all tokens at once


@torch.no_grad()
def judge(scores: Tensor, goal: Tensor) -> dict[str, float]:
    """Figures of scores against a goal, both [T, E] and not negative; all finite.

    r2: explained variance. Per tau of the rule "max", recall, iou and share of the chosen pairs, and
    exact_share, the share that the goal chooses; share_top_p@p: that of "top_p". pearson and spearman:
    correlation over all (token, expert) pairs, row_pearson and row_spearman: within a token, averaged over
    tokens (0 where nothing varies; equal values share their mean rank).
    """
    spread = (goal - goal.mean(0)).double().square().sum().clamp_min(1e-30)
    stats = {"r2": 1 - ((scores - goal).double().square().sum() / spread).item()}
    for tau in TAUS:
        chosen = ~(scores < tau * scores.amax(1, keepdim=True))
        exact = (goal > 0) & (goal >= tau * goal.amax(1, keepdim=True))
        both = (chosen & exact).sum().item()
        stats[f"recall@{tau}"] = both / max(exact.sum().item(), 1)
        stats[f"iou@{tau}"] = both / (chosen | exact).sum().item()
        stats[f"share@{tau}"] = chosen.float().mean().item()
        stats[f"exact_share@{tau}"] = exact.float().mean().item()
    for p in SHARES:
        chosen = gate.meaning(scores, tau_bits(p, scores.device), "top_p")
        stats[f"share_top_p@{p}"] = chosen.float().mean().item()
    some = slice(None, None, max(1, scores.numel() // RANKED))
    every = [t.flatten()[some][None] for t in (scores, goal)]
    for name, (a, b) in (("", every), ("row_", (scores, goal))):
        stats[f"{name}pearson"] = correlation(a, b).mean().item()
        stats[f"{name}spearman"] = correlation(ranks(a), ranks(b)).mean().item()
    return stats


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation [T] fp64 of the rows of a and b [T, n]; 0 where one of them is constant."""
    a, b = (t.double() - t.double().mean(-1, keepdim=True) for t in (a, b))
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms.clamp_min(1e-300), 0.0)


def ranks(values: Tensor) -> Tensor:
    """Rank of each value within its row [T, n], from 0; equal values have their mean rank."""
    ordered = values.sort(dim=-1).values
    values = values.contiguous()
    below = torch.searchsorted(ordered, values)
    upto = torch.searchsorted(ordered, values, right=True)
    return (below + upto - 1).double() / 2
