"""Run rules over a graph, and settle what concerns more than one match.

That is: blocks that would share a linear, weights that are also used elsewhere, names, and graphs inside
of the graph.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch.fx import Node

from ..capture import Captured, source_path
from ..ir import Miss
from .base import GraphRule, Match, Rule, Unfit
from .canonicalize import View
from .linear import Linear
from .sharing import exclusive


def match_all(
    captured: Captured, rules: Sequence[Rule], graph_rules: Sequence[GraphRule] = ()
) -> tuple[list[Match], list[Miss]]:
    """All matches of a graph in execution order, and one Miss for each linear outside of them.

    Bodies of calls such as activation checkpoints are searched like the graph itself. The same weights
    run several times give several matches with one site name. Time is linear in the number of nodes:
    each linear is walked back from once per rule.
    """
    views = list(_views(captured))
    found = [_match_blocks(view, rules) for view in views]
    misses = {node: miss for _, missed in found for node, miss in missed.items()}
    blocks = exclusive(views, [match for matches, _ in found for match in matches], misses)
    matches: list[Match] = []
    named: list[Miss] = []
    for view in views:
        own = [match for match in blocks if match.captured is view.captured]
        own, missed = _match_rest(view, own, misses, graph_rules)
        matches += own
        named += missed
    return _unique_names(matches), named


def _views(captured: Captured) -> Iterator[View]:
    yield View(captured)
    for body in captured.bodies:
        yield from _views(body.captured)


def _match_rest(
    view: View,
    matches: list[Match],
    misses: dict[Node, Miss],
    graph_rules: Sequence[GraphRule],
) -> tuple[list[Match], list[Miss]]:
    """All matches of one graph in execution order, given its blocks, and its misses with their places."""
    own = {node: miss for node, miss in misses.items() if node in view.linears}
    for rule in graph_rules:
        found, missed = rule.find(view, {part.node for m in matches for part in m.linears})
        matches = matches + found
        own.update(missed)
    matches = sorted(matches, key=lambda match: view.order[match.root])
    inside = {part.node for match in matches for part in match.linears}
    named = [
        replace(
            miss, where=where(_weight_name(view, node), miss.node), weight=_weight_name(view, node)
        )
        for node, miss in {**own, **view.unusable}.items()
        if node not in inside
    ]
    return matches, named


def _weight_name(view: View, node: Node) -> str:
    """The name of a linear's weight, or the module path of a linear call without a usable one."""
    linear = view.linears.get(node)
    if linear is not None:
        return view.captured.name(linear.weight)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return source_path(str(stack[-1][0])) if stack else ""


def _match_blocks(view: View, rules: Sequence[Rule]) -> tuple[list[Match], dict[Node, Miss]]:
    """The blocks that end in each linear, no two of them with a linear in common."""
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
    return matches, misses


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


def where(weight: str, node: Node | None) -> str:
    """The linear's module path, and file:line of the node to blame as far as it is known."""
    trace = node.meta.get("stack_trace") if node is not None else None
    lines = re.findall(r'File "([^"]+)", line (\d+)', str(trace or ""))
    source = f"{Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else ""
    return ", ".join(part for part in (weight.removesuffix(".weight"), source) if part)
