"""What both feed-forward families share: checks on a region, names, and the Match they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from ..expr import MAX_LENGTH, Expr
from ..ir import Miss, Site
from .base import Match
from .canonicalize import (
    IDENTITIES,
    VIEWS,
    Linear,
    View,
    argument,
    op_name,
    same_size,
    shape_of,
)
from .halves import Leaf
from .inplace import changed_in_place
from .region import Region


def source(node: Node) -> Node:
    """The value a node carries, through reshapes, copies and inactive dropout."""
    while op_name(node) in (*IDENTITIES, *VIEWS) or _inactive_dropout(node):
        inner = node.args[0]
        assert isinstance(inner, Node)
        node = inner
    return node


def _inactive_dropout(node: Node) -> bool:
    return op_name(node) == "dropout" and argument(node, 2, "training", True) is False


def check(view: View, down: Linear, region: Region) -> Miss | None:
    """The first reason why a region between linears is no feed-forward block, or None."""
    leaves = [leaf.linear for leaf in region.leaves.values()]
    if view.autocast:
        return Miss(
            down.node, "runs under autocast, which changes dtypes that the graph does not show"
        )
    if not region.expression.is_nonlinear():
        return Miss(down.node, "no nonlinearity between it and the linear before it")
    if len({source(leaf.x) for leaf in leaves}) > 1:
        return Miss(down.node, "the linears before it read different inputs")
    if view.captured.tensors.get(source(leaves[0].x)) is not None:
        return Miss(down.node, "its input is a parameter or buffer, not a value of the call")
    d_in = next((leaf.d_in for leaf in leaves if leaf.d_in != down.d_out), down.d_out)
    if d_in != down.d_out:
        return Miss(down.node, f"maps {d_in} features to {down.d_out}: a head, not a block")
    if not _same_rows(down, leaves, region):
        return Miss(down.node, "the leading dimensions change between the matrices")
    if _is_gate(view, down.node):
        return Miss(down.node, "only a sigmoid reads its output: a gate, not a block")
    inside = {*region.nodes, down.node, *(leaf.node for leaf in leaves)}
    for node in [*region.nodes, *(leaf.node for leaf in leaves)]:
        if any(user not in inside for user in view.users(node)):
            return Miss(node, "a hidden value is used outside of the block")
    return changed_in_place(view, (leaf.x for leaf in leaves), inside, down.node)


def _is_gate(view: View, node: Node) -> bool:
    """Whether a value only goes through a sigmoid, as in squeeze-and-excitation."""
    users = list(view.users(node))
    return bool(users) and all(
        _is_gate(view, user)
        if op_name(user) in (*IDENTITIES, *VIEWS)
        else op_name(user) in ("sigmoid", "hardsigmoid")
        for user in users
    )


def _same_rows(down: Linear, leaves: list[Linear], region: Region) -> bool:
    """Whether all matrices see the same leading dimensions.

    Where the graph carries no shapes: addmm and mm have one leading dimension, and without reshapes
    in between it is the input's.
    """
    after = shape_of(down.node)
    shapes = [shape_of(leaf.x) for leaf in leaves]
    if after is not None and None not in shapes:
        return all(_same_lead(shape, after) for shape in shapes if shape is not None)
    flat = all(op_name(linear.node) in ("addmm", "mm") for linear in (down, *leaves))
    same_x = len({leaf.x for leaf in leaves}) == 1
    return flat or (same_x and not any(op_name(node) in VIEWS for node in region.nodes))


def _same_lead(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return len(left) == len(right) and all(map(same_size, left[:-1], right[:-1]))


def make(
    view: View,
    kind: str,
    down: Linear,
    region: Region,
    roles: Mapping[str, Linear],
    names: Mapping[str, str],
) -> Match | Miss:
    """The Match of a checked region; `names` maps its variables v0, v1 to "up" and "gate"."""
    linears = {**roles, "down": down}
    weights = {role: linear.weight for role, linear in linears.items()}
    biases = {f"{role}.bias": ln.bias for role, ln in linears.items() if ln.bias is not None}
    name = view.captured.name
    activation = str(rename(region.expression, names))
    if len(activation) > MAX_LENGTH:
        return Miss(down.node, f"the activation takes {len(activation)} characters to write down")
    site = Site(
        name=common_path([name(node) for node in weights.values()]),
        kind=kind,
        params={role: name(node) for role, node in weights.items()},
        biases={
            **{key.removesuffix(".bias"): name(node) for key, node in biases.items()},
            **{key: name(node) for key, node in region.scalars.items()},
        },
        activation=activation,
        d_model=down.d_out,
        d_hidden=down.d_in,
        transposed=tuple(role for role, linear in linears.items() if linear.transposed),
        halves=tuple(names[v] for v in sorted(names, key=lambda v: region.leaves[v].half or 0))
        if "gate_up" in linears
        else (),
    )
    x = next(iter(roles.values())).x
    inside = {*region.nodes, *(linear.node for linear in linears.values())}
    return Match(
        site,
        x,
        down.node,
        {**weights, **biases, **region.scalars},
        tuple(linears.values()),
        tuple(sorted(inside, key=view.order.__getitem__)),
    )


def rename(expression: Expr, names: Mapping[str, str]) -> Expr:
    """The expression with its variables renamed; unknown ones stay."""
    if expression.op == "var":
        return Expr("var", (names.get(expression.args[0], expression.args[0]),))
    if expression.op == "const":
        return expression
    args = tuple(rename(arg, names) for arg in expression.args)
    return Expr(expression.op, args, expression.params)


def common_path(names: list[str]) -> str:
    """The module path shared by parameter names: "layer.0" of layer.0.up.weight, layer.0.down.weight."""
    split = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def whole(leaves: Mapping[str, Leaf]) -> bool:
    """Whether no leaf is a half of a fused projection."""
    return all(leaf.half is None for leaf in leaves.values())
