"""What a rule is, and how rules run over a graph: each linear ends up in a Match or has a Miss.

A rule is pure: it looks at one linear as the possible last matrix of a block and returns a Match, or
a falsy Miss with the node to blame. `match_all` runs the rules and settles what concerns more than one
match: blocks that would share a linear, and weights that are also used elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.fx import Node

from ..capture import Captured
from ..ir import Miss, Site
from .canonicalize import TRANSPOSES, Linear, View, op_name


@dataclass(frozen=True)
class Match:
    """A site found in one graph, with the nodes that a rewrite needs.

    Attributes:
        site: what was found, by names.
        x, root: input node of the block, and the node whose value the block computes.
        weights: role -> parameter node; biases as `role.bias`, activation scalars as `p0`, ...
        linears: the linear calls of the block.
        inside: every node that the block replaces, in execution order, `root` last.
    """

    site: Site
    x: Node
    root: Node
    weights: Mapping[str, Node]
    linears: tuple[Linear, ...]
    inside: tuple[Node, ...]

    def roles(self) -> dict[str, Node]:
        """Parameter nodes by the roles of `Site.tensors`: "up", "up.bias", ..., "p0.bias"."""
        return {
            f"{role}.bias"
            if role in self.site.biases and role not in self.site.params
            else role: node
            for role, node in self.weights.items()
        }

    def tensors(self, captured: Captured) -> dict[str, Tensor]:
        """Parameters by the roles of `Site.tensors`."""
        return {role: captured.tensors[node] for role, node in self.roles().items()}


class Unfit(Miss):
    """A miss because another number of linears feeds it: what any other rule says is better."""


class Rule(Protocol):
    """One family of blocks: `match` says whether `down` is the last linear of such a block."""

    kind: str

    def match(self, view: View, down: Linear) -> Match | Miss: ...


def match_all(captured: Captured, rules: Sequence[Rule]) -> tuple[list[Match], list[Miss]]:
    """All matches of a graph in execution order, and one Miss for each linear outside of them.

    The same weights run several times give several matches with one site name. Time is linear in the
    number of nodes: each linear is walked back from once per rule.
    """
    view = View(captured)
    matches: list[Match] = []
    misses: dict[Node, Miss] = {}
    taken: dict[Node, Match] = {}
    for node, linear in view.linears.items():
        found = _first(view, linear, rules)
        if isinstance(found, Match):
            other = next((taken[part.node] for part in found.linears if part.node in taken), None)
            if other is None:
                matches.append(found)
                taken.update((part.node, found) for part in found.linears)
                continue
            found = Miss(node, f"shares a linear with the block {other.site.name!r}")
        misses[node] = found
    matches = _exclusive(view, matches, misses)
    inside = {part.node for match in matches for part in match.linears}
    named = [
        replace(miss, where=where(captured.name(view.linears[node].weight), miss.node))
        for node, miss in misses.items()
        if node not in inside
    ]
    return _unique_names(matches), named


def _first(view: View, linear: Linear, rules: Sequence[Rule]) -> Match | Miss:
    """The first rule's match, or the first miss of a rule that takes as many linears."""
    best: Miss = Unfit(linear.node, "no rule looked at it")
    for rule in rules:
        result = rule.match(view, linear)
        if isinstance(result, Match):
            return result
        if isinstance(best, Unfit):
            best = result
    return best


def _exclusive(view: View, matches: list[Match], misses: dict[Node, Miss]) -> list[Match]:
    """Drop blocks whose weights are read by anything but the same role of the same block."""
    readers: dict[int, set[Node]] = {}
    owners: dict[int, set[tuple[Any, ...]]] = {}
    for match in matches:
        weights = _identities(view, match)
        for role, weight in weights.items():
            readers.setdefault(weight, set()).update(part.node for part in match.linears)
            owners.setdefault(weight, set()).add((role, *weights.values()))
    kept = []
    for match in matches:
        problem = _shared(view, match, readers, owners)
        if problem is None:
            kept.append(match)
        else:
            misses.update((part.node, problem) for part in match.linears)
    return kept


def _identities(view: View, match: Match) -> dict[str, int]:
    """The block's parameters by identity: symbolic_trace makes a node of each use of one."""
    tensors = view.captured.tensors
    return {role: id(tensors[node]) for role, node in match.weights.items() if role[0] != "p"}


def _shared(
    view: View,
    match: Match,
    readers: Mapping[int, set[Node]],
    owners: Mapping[int, set[tuple[Any, ...]]],
) -> Miss | None:
    """Why permuting the block's neurons in place would change something else, or None."""
    weights = list(_identities(view, match).values())
    if len(set(weights)) < len(weights):
        return Miss(match.root, "two of its matrices are one parameter")
    for weight in weights:
        uses = (user for node in view.nodes_of[weight] for user in _readers(view, node))
        strangers = [user for user in uses if user not in readers[weight]]
        if strangers:
            return Miss(strangers[0], "its weight is also used outside of the block")
        if len(owners[weight]) > 1:
            return Miss(match.root, "another block shares some of its weights, but not all")
    return None


def _readers(view: View, weight: Node) -> Iterable[Node]:
    for user in view.users(weight):
        if op_name(user) in TRANSPOSES:
            yield from _readers(view, user)
        else:
            yield user


def _unique_names(matches: list[Match]) -> list[Match]:
    """Site names made unique: two blocks under one module path get their first weight's path."""
    owners: dict[str, set[tuple[str, ...]]] = {}
    keys = [tuple(match.site.params.values()) for match in matches]
    calls = Counter(keys)
    for match, key in zip(matches, keys, strict=True):
        owners.setdefault(match.site.name, set()).add(key)
    result = []
    for match, key in zip(matches, keys, strict=True):
        name = match.site.name
        if not name or len(owners[name]) > 1:
            name = key[0].removesuffix(".weight")
        result.append(replace(match, site=replace(match.site, name=name, calls=calls[key])))
    return result


def where(weight: str, node: Node) -> str:
    """The linear's module path, and file:line of the node to blame as far as it is known."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    source = f"{Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else ""
    return ", ".join(part for part in (weight.removesuffix(".weight"), source) if part)
