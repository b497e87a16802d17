"""Masks on feed-forward blocks by forward hooks, with the cost of a kernel that skips what is masked.

    y = down(m_h * act(up(m_x * x)))         m_x [T, D], m_h [T, H] in {0, 1}; the bias is always added

Per token t with a = sum m_x[t] inputs and n = sum m_h[t] hidden values kept, M matrices before `down`:

    multiply-adds = M a n' + n D + overhead        n' = n if the rule knows m_h ahead, else H

A masked hidden value adds exactly nothing to y, so masking is the same as not computing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import d2dcompile as d2d


@dataclass(frozen=True, eq=False)
class Block:
    """A feed-forward block of a model: its site, and the modules that hold its matrices.

    Attributes:
        ups: {role: module} of the matrices before the activation: up, gate or gate_up.
        down: the module after it.
    """

    site: d2d.Site
    ups: Mapping[str, nn.Module]
    down: nn.Module

    @property
    def matrices(self) -> int:
        """Matrices [H, D] before `down`."""
        return 2 if self.site.kind == "glu" else 1

    @property
    def dense_macs(self) -> int:
        """Multiply-adds per token without masks."""
        return (self.matrices + 1) * self.site.d_model * self.site.d_hidden

    def weight(self, role: str) -> Tensor:
        """The weight of a role as [out, in]."""
        module = self.down if role == "down" else self.ups[role]
        weight = module.weight.detach()
        return weight.T if role in self.site.transposed else weight


class Rule:
    """What a method computes of a block; this one computes everything.

    Attributes:
        ahead: whether the hidden mask is known before the block runs, from its input alone.
    """

    ahead = False

    def inputs(self, block: Block, role: str, x: Tensor) -> Tensor | None:
        """Which inputs x [..., D] of the matrix of that role to use; None for all."""
        return None

    def hidden(self, block: Block, x: Tensor, h: Tensor) -> Tensor | None:
        """Which hidden values h [..., H] to use, x being the block's input; None for all."""
        return None

    def overhead(self, block: Block) -> int:
        """Multiply-adds per token that choosing costs, such as a router's."""
        return 0


@dataclass
class Tally:
    """Multiply-adds by site, summed over tokens: executed and dense."""

    macs: dict[str, float] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, macs: float, dense: float, rows: int) -> None:
        for table, value in ((self.macs, macs), (self.dense, dense), (self.rows, rows)):
            table[name] = table.get(name, 0) + value  # type: ignore[assignment]

    @property
    def cost(self) -> float:
        """Executed as a share of dense, over all sites."""
        return sum(self.macs.values()) / sum(self.dense.values())

    @property
    def saved(self) -> float:
        """Multiply-adds less than dense; negative where choosing costs more than it saves."""
        return sum(self.dense.values()) - sum(self.macs.values())


def blocks_of(model: nn.Module, batch: Mapping[str, Any]) -> list[Block]:
    """The feed-forward blocks that the matcher finds, in the order they run.

    Raises ValueError for one whose matrices are not the `weight` of a module each: there is nothing to
    hook there.
    """
    found = []
    for site in d2d.explain(model, **batch).sites:
        if not site.convertible:
            continue
        modules = {}
        for role, name in site.params.items():
            path, _, last = name.rpartition(".")
            if last != "weight":
                raise ValueError(
                    f"Parameter {name} of site {site.name} is no module's weight; expected one."
                )
            modules[role] = model.get_submodule(path)
        down = modules.pop("down")
        found.append(Block(site, modules, down))
    return found


@contextmanager
def emulate(blocks: list[Block], rule: Rule) -> Iterator[Tally]:
    """Run the blocks under a rule, eagerly, and tally what it computes.

    Do not compile the model inside: the hooks are Python.
    """
    tally = Tally()
    hooks = []
    for block in blocks:
        hooked = _Hooked(block, rule, tally)
        for role, module in block.ups.items():
            hooks.append(module.register_forward_pre_hook(hooked.before_up(role)))
        hooks.append(block.down.register_forward_pre_hook(hooked.before_down))
    try:
        yield tally
    finally:
        for hook in hooks:
            hook.remove()


class _Hooked:
    """The hooks of one block, and what they remember from its first matrix to its last."""

    def __init__(self, block: Block, rule: Rule, tally: Tally) -> None:
        self.block, self.rule, self.tally = block, rule, tally
        self.x: Tensor | None = None
        self.kept: dict[str, Tensor] = {}

    def before_up(self, role: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            self.x = x
            mask = self.rule.inputs(self.block, role, x)
            rows = x.numel() // x.shape[-1]
            if mask is None:
                self.kept[role] = torch.full((rows,), x.shape[-1], device=x.device)
                return args
            self.kept[role] = mask.reshape(rows, -1).sum(1)
            return (x * mask, *args[1:])

        return hook

    def before_down(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, x = args[0], self.x
        assert x is not None
        mask = self.rule.hidden(self.block, x, h)
        rows, site = h.numel() // h.shape[-1], self.block.site
        full = torch.full((rows,), site.d_hidden, device=h.device)
        kept = full if mask is None else mask.reshape(rows, -1).sum(1)
        columns = kept if self.rule.ahead else full
        total = kept.double() * site.d_model
        for role in self.block.ups:
            matrices = 2 if role == "gate_up" else 1
            total += matrices * self.kept[role].double() * columns.double()
        macs = total.sum().item() + rows * self.rule.overhead(self.block)
        self.tally.add(site.name, macs, rows * self.block.dense_macs, rows)
        return args if mask is None else (h * mask, *args[1:])
