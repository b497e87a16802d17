"""Rivals that choose experts or channels per token, as rules: see emulation.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from d2dcompile.attachment import states
from d2dcompile.router import expert_norms, gram

from .emulation import Block, Rule

Scores = Callable[[Tensor], Tensor]  # x [..., D] -> scores [..., E]


class ExpertRule(Rule, ABC):
    """A rule over experts: E contiguous groups of hidden neurons, as an attached conversion has them."""

    ahead = True

    def __init__(self, experts: Mapping[str, int]) -> None:
        self.experts = experts

    @abstractmethod
    def chosen(self, block: Block, x: Tensor, h: Tensor) -> Tensor:
        """Which experts run, [..., E]."""

    def hidden(self, block: Block, x: Tensor, h: Tensor) -> Tensor:
        size = block.site.d_hidden // self.experts[block.site.name]
        return self.chosen(block, x, h).repeat_interleave(size, dim=-1)


class RoutedRule(ExpertRule):
    """A rule over predicted scores; a router of two linear layers costs R (D + E) per token."""

    def __init__(
        self, experts: Mapping[str, int], scores: Mapping[str, Scores], widths: Mapping[str, int]
    ) -> None:
        super().__init__(experts)
        self.scores, self.widths = scores, widths

    def overhead(self, block: Block) -> int:
        name = block.site.name
        return self.widths[name] * (block.site.d_model + self.experts[name])


class StaticTopK(RoutedRule):
    """The k experts of the highest score, k the same for every token: round(share * E), at least 1."""

    share = 1.0

    def chosen(self, block: Block, x: Tensor, h: Tensor) -> Tensor:
        return top(self.scores[block.site.name](x), self.share)


class Threshold(RoutedRule):
    """The rule of D2DMoE, not (score < tau * max): what the library runs, here to check the emulation."""

    tau = 0.0

    def chosen(self, block: Block, x: Tensor, h: Tensor) -> Tensor:
        scores = self.scores[block.site.name](x)
        return ~(scores < self.tau * scores.amax(-1, keepdim=True))


class Oracle(ExpertRule):
    """The true norms of the experts' outputs instead of a router, at no cost: what no router can beat
    at this rule and split. Needs the whole block first, so it is a bound and no method.
    """

    tau = 0.0

    def __init__(self, experts: Mapping[str, int]) -> None:
        super().__init__(experts)
        self._grams: dict[str, Tensor] = {}

    def chosen(self, block: Block, x: Tensor, h: Tensor) -> Tensor:
        name, count = block.site.name, self.experts[block.site.name]
        if name not in self._grams:
            slabs = block.weight("down").T.reshape(count, -1, block.weight("down").shape[0])
            self._grams[name] = gram(slabs)
        parts = h.reshape(-1, count, block.site.d_hidden // count)
        norms = expert_norms(parts, self._grams[name]).view(*h.shape[:-1], count)
        return (norms > 0) & ~(norms < self.tau * norms.amax(-1, keepdim=True))


class Wina(Rule):
    """WINA: per token the inputs of the largest |x_i| ||W_:i||, a fixed share of each matrix's.

    Chen et al. 2025, arXiv:2505.19427. The matrices before `down` choose among the block's inputs, each by
    its own column norms; `down` among the hidden values. Zeros cost nothing, as TEAL's. Training-free and
    without a router. All matrices keep the same share; the official code allocates shares greedily.
    """

    share = 1.0

    def __init__(self) -> None:
        self._norms: dict[tuple[str, str], Tensor] = {}

    def _mask(self, block: Block, role: str, x: Tensor) -> Tensor:
        key = (block.site.name, role)
        if key not in self._norms:
            self._norms[key] = block.weight(role).float().norm(dim=0)
        return top(x.abs() * self._norms[key], self.share) & (x != 0)

    def inputs(self, block: Block, role: str, x: Tensor) -> Tensor:
        return self._mask(block, role, x)

    def hidden(self, block: Block, x: Tensor, h: Tensor) -> Tensor:
        return self._mask(block, "down", h)


def top(scores: Tensor, share: float) -> Tensor:
    """Mask of the round(share * n) largest of the last axis, at least one; exactly so many, ties by index."""
    count = max(1, round(share * scores.shape[-1]))
    index = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)


def attached_scores(
    model: nn.Module,
) -> tuple[dict[str, int], dict[str, Scores], dict[str, int]]:
    """Experts, routers as functions, and router widths of an attached conversion, by site name."""
    experts, scores, widths = {}, {}, {}
    for state in states(model):
        found, name = state.experts, state.site.name
        device = state.weight("down").device
        experts[name], widths[name] = found.plan.experts, found.plan.router_width
        w1, w2 = found.router1.to(device), found.router2.to(device)
        scores[name] = lambda x, w1=w1, w2=w2: ((x.float() @ w1.T).relu() @ w2.T).abs()
    return experts, scores, widths


def swept(rule: Rule, knob: str, values: Sequence[float]) -> Iterator[tuple[float, Rule]]:
    """The rule at each value of its knob."""
    for value in values:
        setattr(rule, knob, value)
        yield value, rule


SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05)


def static_topk(model: nn.Module, shares: Sequence[float] = SHARES) -> Iterator[tuple[float, Rule]]:
    """Static top-k on the experts and routers of the attached conversion."""
    return swept(StaticTopK(*attached_scores(model)), "share", shares)


def oracle(model: nn.Module, taus: Sequence[float]) -> Iterator[tuple[float, Rule]]:
    """The true norms on the experts of the attached conversion."""
    return swept(Oracle(attached_scores(model)[0]), "tau", taus)


def wina(shares: Sequence[float] = SHARES) -> Iterator[tuple[float, Rule]]:
    """WINA at shares of kept channels."""
    return swept(Wina(), "share", shares)
