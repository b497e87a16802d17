"""TEAL (Liu et al. 2024, arXiv:2408.14690): drop input channels of small magnitude, by fixed thresholds.

    x_i is used iff |x_i| > t_x, h_j iff |h_j| > t_h         t the p-quantile of |x|, |h| on calibration data

Training-free. Sparsities p of a block's matrices are either the same ("uniform") or allocated greedily, the
paper's algorithm 1: from zero, raise the one whose raise, of equal cost, hurts the block's output least.
Blocks all get the same cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .emulation import Block, Rule, emulate

LEVELS = 200  # quantiles kept per tensor
GREEDY_TOKENS = 1024  # that the greedy allocation looks at, of all batches
STEP = 0.05  # of the block's multiply-adds per greedy step


class Teal(Rule):
    """Thresholds by site: what falls to them or below is dropped. The matrices before `down` share one.

    Attributes:
        thresholds: {site: (t_x, t_h)}; a site that is missing runs dense.
    """

    def __init__(self) -> None:
        self.thresholds: dict[str, tuple[float, float]] = {}

    def inputs(self, block: Block, role: str, x: Tensor) -> Tensor | None:
        found = self.thresholds.get(block.site.name)
        return None if found is None else x.abs() > found[0]

    def hidden(self, block: Block, x: Tensor, h: Tensor) -> Tensor | None:
        found = self.thresholds.get(block.site.name)
        return None if found is None else h.abs() > found[1]


class _Quantiles(Rule):
    """Records LEVELS + 1 quantiles of |x| and |h| per site, of about 2^20 values a batch: whole rows."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[Tensor]] = {}
        self.first = 0  # tokens of the first batch

    def _see(self, block: Block, which: str, values: Tensor) -> None:
        rows = values.detach().flatten(0, -2)[:: max(1, values.numel() >> 20)]
        self.found.setdefault((block.site.name, which), []).append(rows.float().abs().flatten())

    def hidden(self, block: Block, x: Tensor, h: Tensor) -> None:
        self.first = self.first or x.numel() // x.shape[-1]
        self._see(block, "x", x)
        self._see(block, "h", h)

    def table(self) -> dict[tuple[str, str], Tensor]:
        """By site and tensor: quantile i / LEVELS at i; -1 at 0, so that nothing is dropped there."""
        tables = {}
        for key, parts in self.found.items():
            ordered = torch.cat(parts).sort().values
            levels = torch.linspace(0, 1, LEVELS + 1, dtype=torch.float64)
            at = (levels * (len(ordered) - 1)).round().long()
            tables[key] = ordered[at.to(ordered.device)].cpu()
            tables[key][0] = -1.0
        return tables


@torch.no_grad()
def teal(
    model: nn.Module,
    blocks: list[Block],
    batches: Sequence[Mapping],
    sparsities: Sequence[float],
    greedy: bool = True,
) -> Iterator[tuple[float, Rule]]:
    """TEAL at target sparsities of every block; greedy allocation looks at
    about GREEDY_TOKENS tokens from all over the batches.

    A sparsity is the share of a block's multiply-adds to drop, by the calibration quantiles.
    """
    recorder = _Quantiles()
    with emulate(blocks, recorder):
        for batch in batches:
            model(**batch)
    tables = recorder.table()
    few = _spread(batches, recorder.first)
    paths: dict[str, list[tuple[float, float]]] = {}
    for block in blocks:
        if greedy:
            paths[block.site.name] = _greedy(model, block, few, tables, max(sparsities))
    for sparsity in sparsities:
        rule = Teal()
        for block in blocks:
            name = block.site.name
            pair = (
                _along(paths[name], _weights(block), sparsity) if greedy else (sparsity, sparsity)
            )
            rule.thresholds[name] = _thresholds(tables, name, pair)
        yield sparsity, rule


def _weights(block: Block) -> tuple[float, float]:
    """Shares of the multiply-adds before `down` and of `down`."""
    return block.matrices / (block.matrices + 1), 1 / (block.matrices + 1)


def _thresholds(
    tables: Mapping[tuple[str, str], Tensor], name: str, pair: tuple[float, float]
) -> tuple[float, float]:
    x, h = (
        tables[name, which][min(round(p * LEVELS), LEVELS)].item()
        for which, p in zip(("x", "h"), pair, strict=True)
    )
    return x, h


def _along(
    path: list[tuple[float, float]], weights: tuple[float, float], sparsity: float
) -> tuple[float, float]:
    """The point of a greedy path at which the block's sparsity is reached, between its corners."""
    before = path[0]
    for corner in path[1:]:
        low, high = (sum(w * p for w, p in zip(weights, c, strict=True)) for c in (before, corner))
        if high >= sparsity:
            t = (sparsity - low) / max(high - low, 1e-12)
            x, h = (a + t * (b - a) for a, b in zip(before, corner, strict=True))
            return x, h
        before = corner
    return before


def _greedy(
    model: nn.Module,
    block: Block,
    batch: Mapping,
    tables: Mapping[tuple[str, str], Tensor],
    target: float,
) -> list[tuple[float, float]]:
    """Corners (p_x, p_h) from dense to the target: algorithm 1, the other blocks dense."""
    weights, name = _weights(block), block.site.name
    rule = Teal()
    exact = _output(model, block, batch, rule)
    pair, path = (0.0, 0.0), [(0.0, 0.0)]
    while sum(w * p for w, p in zip(weights, pair, strict=True)) < target - 1e-9:
        tries = []
        for index in (0, 1):
            raised = list(pair)
            raised[index] = min(raised[index] + STEP / weights[index], 1.0)
            if raised[index] == pair[index]:
                continue
            rule.thresholds[name] = _thresholds(tables, name, (raised[0], raised[1]))
            error = (_output(model, block, batch, rule) - exact).norm().item()
            tries.append((error, (raised[0], raised[1])))
        if not tries:
            break
        pair = min(tries)[1]
        path.append(pair)
    return path


def _output(model: nn.Module, block: Block, batch: Mapping, rule: Rule) -> Tensor:
    """What the block's `down` gives on a batch, at its first call; what comes after it is not run."""
    with emulate([block], rule), _stopping(block.down):
        try:
            model(**batch)
        except _Reached as found:
            return found.output.float().flatten()
    raise ValueError(f"The model did not run block {block.site.name}; expected a batch that does.")


class _Reached(Exception):
    """The module that was waited for has run."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


@contextmanager
def _stopping(module: nn.Module) -> Iterator[None]:
    """Let the module's call raise _Reached with its output."""

    def stop(_: nn.Module, args: Any, output: Tensor) -> None:
        raise _Reached(output)

    hook = module.register_forward_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def _spread(batches: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, Any]:
    """Rows of evenly spaced batches, about GREEDY_TOKENS tokens; `tokens`: of the first batch.

    Of the middle batch alone where the batches' rows differ in shape.
    """
    sizes = [len(v) for v in batches[0].values() if isinstance(v, Tensor) and v.dim()]
    count = max(1, -(-GREEDY_TOKENS * max(sizes, default=1) // max(tokens, 1)))
    number = min(count, len(batches))
    step, each = len(batches) / number, -(-count // number)
    chosen = [batches[int(step * (i + 0.5))] for i in range(number)]
    shapes = {
        tuple((k, v.shape[1:]) for k, v in batch.items() if isinstance(v, Tensor) and v.dim())
        for batch in chosen
    }
    if len(shapes) > 1:
        chosen, each = [batches[len(batches) // 2]], count
    return {
        k: torch.cat([batch[k][:each] for batch in chosen])
        if isinstance(v, Tensor) and v.dim()
        else v
        for k, v in chosen[0].items()
    }
