"""What a rule is and what it returns: each linear ends up in a Match or has a Miss.

A rule is pure: it looks at one linear as the possible last matrix of a block and returns a Match, or
a falsy Miss with the node to blame.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import Node

from ..capture import Captured
from ..ir import Miss, Site
from .canonicalize import View
from .linear import Linear


@dataclass(frozen=True)
class Match:
    """A site found in one graph, with the nodes that a rewrite needs.

    Attributes:
        captured: the graph it is in, which may be the body of a call of the captured one.
        site: what was found, by names.
        x, root: input node of the block, and the node whose value the block computes.
        weights: role -> parameter node; biases as `role.bias`, activation parameters as `p0`, ...
        linears: the linear calls of the block.
        inside: every node that the block replaces, in execution order, `root` last.
        activation: the site's, as this graph spells it: with its casts and the noise of dropout.
        scalars: nodes of the activation's variables p0, p1, ...: parameters and buffers.
        noise: the call of active dropout between the matrices, or None.
        dtype: what autocast computes the block in; None where that is the dtype of its weights.
        reshaped: whether the block's output has other leading dimensions than its input.
    """

    captured: Captured
    site: Site
    x: Node
    root: Node
    weights: Mapping[str, Node]
    linears: tuple[Linear, ...]
    inside: tuple[Node, ...] = ()
    activation: str = ""
    scalars: tuple[Node, ...] = ()
    noise: Node | None = None
    dtype: torch.dtype | None = None
    reshaped: bool = False

    def roles(self) -> dict[str, Node]:
        """Parameter nodes by the roles of `Site.tensors`: "up", "up.bias", ..., "p0.bias"."""
        return {
            f"{role}.bias"
            if role in self.site.biases and role not in self.site.params
            else role: node
            for role, node in self.weights.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Parameters by the roles of `Site.tensors`."""
        return {role: self.captured.tensors[node] for role, node in self.roles().items()}


class Unfit(Miss):
    """A miss because another number of linears feeds it: what any other rule says is better."""


class Rule(Protocol):
    """One family of blocks: `match` says whether `down` is the last linear of such a block."""

    def match(self, view: View, down: Linear) -> Match | Miss: ...


class GraphRule(Protocol):
    """A family found from a whole graph: `find` returns its matches, and misses by linear node.

    taken: nodes of linears that belong to matches already.
    """

    def find(self, view: View, taken: Set[Node]) -> tuple[list[Match], dict[Node, Miss]]: ...
