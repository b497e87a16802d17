"""Match the projections around attention: out = W_o attention(W_q x, W_k y, W_v y).

    q = x W_q^T + b_q       k = y W_k^T + b_k       v = y W_v^T + b_v       o = attention(q, k, v) W_o^T + b_o

Where they stand is what `around` says. A fused matrix is one site, its role the letters of what it makes:
"qkv", "kv", "qk".
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from torch.fx import Node

from ..ir import Miss, Site
from .around import ROLES, around, spelt
from .attention import Packed, cores
from .base import Match
from .canonicalize import View
from .linear import Linear


class MatchQKVO:
    """Rule for the linears around attention cores."""

    def find(self, view: View, taken: Set[Node]) -> tuple[list[Match], dict[Node, Miss]]:
        """One match per projection, and a miss for each linear near a core that is none."""
        misses: dict[Node, Miss] = {}
        packed = [core for core in cores(view) if isinstance(core, Packed)]
        matches = [match for core in packed for match in _unpacked(view, core)]
        roles = {node: letters for node, letters in around(view).items() if node not in taken}
        for node, letters in roles.items():
            made = _match(view, view.linears[node], letters)
            if isinstance(made, Match):
                matches.append(made)
            else:
                misses[node] = made
        return _one_role_each(matches, misses)


def _match(view: View, linear: Linear, letters: set[str]) -> Match | Miss:
    role = spelt(letters)
    if role not in ROLES:
        return Miss(linear.node, f"makes {' and '.join(role)} of one attention")
    if linear.x not in view.runtime:
        return Miss(linear.node, "projects positions or other constants, not values of the call")
    return projection(view, role, (linear,))


def projection(view: View, role: str, linears: tuple[Linear, ...]) -> Match:
    """The match of one projection; several linears are parts of one packed weight."""
    first = linears[0]
    name = view.captured.name(first.weight)
    biases = {} if first.bias is None else {"weight": view.captured.name(first.bias)}
    weights = {"weight": first.weight}
    if first.bias is not None:
        weights["weight.bias"] = first.bias
    site = Site(
        name=name.removesuffix(".weight"),
        kind="projection",
        params={"weight": name},
        biases=biases,
        activation="",
        d_model=first.d_in,
        d_hidden=sum(linear.d_out for linear in linears),
        transposed=("weight",) if first.transposed else (),
        role=role,
    )
    return Match(view.captured, site, first.x, first.node, weights, linears)


def _unpacked(view: View, core: Packed) -> list[Match]:
    """The matches of a call that holds its projections."""
    found = []
    for role, (weight, bias) in core.weights.items():
        tensor = view.parameter(weight)
        if tensor is None or tensor.dim() != 2:
            continue
        bias = bias if view.parameter(bias) is not None else None
        letters = ["q"] if role == "o" else list(role)
        d_out, d_in = tensor.shape[0] // len(letters), tensor.shape[1]
        linears = tuple(
            Linear(core.out, core.inputs[letter], weight, bias, False, d_in, d_out)
            for letter in letters
        )
        found.append(projection(view, role, linears))
    return found


def _one_role_each(
    matches: list[Match], misses: dict[Node, Miss]
) -> tuple[list[Match], dict[Node, Miss]]:
    """Weights that several calls use as different things get the letters of all of them."""
    letters: dict[str, set[str]] = {}
    for match in matches:
        letters.setdefault(match.site.params["weight"], set()).update(match.site.role or "")
    kept = []
    for match in matches:
        found = letters[match.site.params["weight"]]
        role = "".join(letter for letter in "qkvo" if letter in found)
        if role in ROLES:
            kept.append(replace(match, site=replace(match.site, role=role)))
        else:
            misses[match.root] = Miss(
                match.root, f"its weight makes {' and '.join(role)} in different calls"
            )
    return kept, misses
