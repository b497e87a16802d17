"""Which blocks may be permuted in place: those whose weights nothing else reads as something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch.fx import Node

from ..ir import Miss
from .base import Match
from .canonicalize import View
from .names import TRANSPOSES, op_name

_RESHAPES = (*TRANSPOSES, "unsqueeze", "expand", "broadcast_to")  # of a weight, before its product
_Roles = frozenset[tuple[str, int]]  # a block's weights by role and identity


def exclusive(views: Sequence[View], matches: list[Match], misses: dict[Node, Miss]) -> list[Match]:
    """Drop blocks whose weights are read by anything but the same role of the same block.

    views: of the graph and of its bodies, whose matches these are.
    """
    readers: dict[int, set[Node]] = {}
    owners: dict[int, set[_Roles]] = {}
    for match in matches:
        weights = _identities(match)
        for weight in weights.values():
            nodes = (node for part in match.linears for node in (*part.parts, part.node))
            readers.setdefault(weight, set()).update(nodes)
            owners.setdefault(weight, set()).add(frozenset(weights.items()))
    kept = []
    for match in matches:
        problem = _shared(views, match, readers, owners)
        if problem is None:
            kept.append(match)
        else:
            misses.update((part.node, problem) for part in match.linears)
    return kept


def _identities(match: Match) -> dict[str, int]:
    """The block's parameters by identity: symbolic_trace makes a node of each use of one."""
    tensors = match.captured.tensors
    return {role: id(tensors[node]) for role, node in match.weights.items() if role[0] != "p"}


def _shared(
    views: Sequence[View],
    match: Match,
    readers: Mapping[int, set[Node]],
    owners: Mapping[int, set[_Roles]],
) -> Miss | None:
    """Why permuting the block's neurons in place would change something else, or None."""
    identities = _identities(match)
    if len(set(identities.values())) < len(identities) and not _tied(match, identities):
        return Miss(match.root, "two of its matrices are one parameter")
    for weight in identities.values():
        uses = (
            user
            for view in views
            for node in view.nodes_of.get(weight, ())
            for user in _readers(view, node)
        )
        strangers = [user for user in uses if user not in readers[weight]]
        if strangers:
            return Miss(strangers[0], "its weight is also used outside of the block")
        if len(owners[weight]) > 1:
            return Miss(match.root, "another block shares some of its weights, but not all")
    return None


def _tied(match: Match, identities: Mapping[str, int]) -> bool:
    """Whether what is one parameter has its neurons along the same axis in all its roles."""
    axes: dict[int, set[int]] = {}
    for role, weight in identities.items():
        if role.endswith(".bias"):
            axes.setdefault(weight, set()).add(-1 if role == "down.bias" else -2)
        else:
            axes.setdefault(weight, set()).add((role == "down") ^ (role in match.site.transposed))
    shared = [weight for weight, count in _counted(identities).items() if count > 1]
    gated = match.site.kind == "glu" and identities.get("gate") == identities.get("up")
    return not gated and all(len(axes[weight]) == 1 for weight in shared)


def _counted(identities: Mapping[str, int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for weight in identities.values():
        counts[weight] = counts.get(weight, 0) + 1
    return counts


def _readers(view: View, weight: Node) -> Iterable[Node]:
    bodies = [body.call for body in view.captured.bodies]
    for user in view.users(weight):
        if user in bodies:
            continue  # which only hands it on
        if op_name(user) in _RESHAPES:
            yield from _readers(view, user)
        else:
            yield user
