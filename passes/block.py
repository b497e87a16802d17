"""What both feed-forward families share: checks on a region, names, and the Match they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..expr import MAX_LENGTH, Expr, quiet
from ..ir import Miss, Site
from .base import Match
from .canonicalize import View
from .decoys import not_a_block
from .halves import Leaf
from .inplace import changed_in_place
from .linear import Linear
from .names import (
    IDENTITIES,
    VIEWS,
    argument,
    dtype_of,
    op_name,
    same_size,
    shape_of,
)
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


def check(
    view: View,
    down: Linear,
    region: Region,
    accept: Sequence[str] = (),
    role: str | None = None,
) -> Miss | None:
    """The first reason why a region between linears is no feed-forward block, or None.

    accept: names of DECOYS that are taken for blocks. role: what it makes for attention: such a block may
    have another width behind it than before.
    """
    leaves = [leaf.linear for leaf in region.leaves.values()]
    problem = _unreadable(view, down, leaves, region)
    if problem is not None:
        return problem
    if not region.expression.is_nonlinear():
        return Miss(down.node, "no nonlinearity between it and the linear before it")
    if any(_is_low_rank(view, one, leaves) for one in leaves):
        return Miss(
            down.node, "a low-rank update (LoRA) is added to a linear before it: merge it first"
        )
    if len({source(leaf.x) for leaf in leaves}) > 1:
        return Miss(down.node, "the linears before it read different inputs")
    if source(leaves[0].x) not in view.runtime:
        return Miss(down.node, "its input is the model's own state, not a value of the call")
    d_in = next((leaf.d_in for leaf in leaves if leaf.d_in != down.d_out), down.d_out)
    if d_in != down.d_out and role is None:
        return Miss(down.node, f"maps {d_in} features to {down.d_out}: a head, not a block")
    if not _same_rows(down, leaves, region):
        return Miss(down.node, "the leading dimensions change between the matrices")
    problem = not_a_block(view, down, leaves[0], accept)
    if problem is not None:
        return problem
    inside = {*region.nodes, *(n for ln in (down, *leaves) for n in (*ln.parts, ln.node))}
    for node in inside - {down.node}:
        if any(user not in inside for user in view.users(node)):
            return Miss(node, "a hidden value is used outside of the block")
    if _grad_mode_changes(view, inside):
        return Miss(down.node, "gradients are switched on or off between its matrices")
    read = (*(leaf.x for leaf in leaves), *region.scalars.values())
    return changed_in_place(view, read, inside, down.node)


def _grad_mode_changes(view: View, inside: set[Node]) -> bool:
    """Whether torch.no_grad() begins or ends between the calls of a block."""
    places = [view.order[node] for node in inside]
    return any(min(places) < place < max(places) for place in view.grad_switches)


def _is_low_rank(view: View, update: Linear, others: list[Linear]) -> bool:
    """Whether `update` is B of B(A(x)), with x what the others read."""
    inner = view.linears.get(source(update.x))
    return inner is not None and source(inner.x) in {source(ln.x) for ln in others}


def _unreadable(view: View, down: Linear, leaves: list[Linear], region: Region) -> Miss | None:
    """Why the region is none that one expression over neurons can say, or None."""
    if down.axis is None or any(leaf.axis != down.axis for leaf in leaves):
        return Miss(down.node, "its matrices have features on different axes, or in groups")
    if down.axis != -1 and region.reshaped is not None:
        return Miss(region.reshaped, "hidden features are rearranged between the matrices")
    if len(set(region.noise)) > 1:
        return Miss(region.noise[0], "several active dropouts between the matrices")
    if view.autocast and any(dtype_of(ln.node) is None for ln in (down, *leaves)):
        return Miss(
            down.node, "runs under autocast, which changes dtypes that the graph does not show"
        )
    return None


def _same_rows(down: Linear, leaves: list[Linear], region: Region) -> bool:
    """Whether all matrices see the same rows, whatever their leading dimensions.

    Reshapes in a region keep the feature axis whole, so the rows and their order stay the same. Where
    the graph carries no shapes, addmm and mm have one leading dimension, and without reshapes in between
    it is the input's.
    """
    shapes = [shape_of(leaf.x) for leaf in leaves]
    if down.axis == -1 and not all(_keeps_lead(linear) for linear in (down, *leaves)):
        return False  # a weight with leading axes of its own adds them to the product
    if shape_of(down.node) is not None and None not in shapes:
        return all(_same_lead(shape, shapes[0]) for shape in shapes if shape and shapes[0])
    if down.axis != -1:
        return True  # convolutions of kernel 1 keep every axis but their features
    flat = all(op_name(linear.node) in ("addmm", "mm") for linear in (down, *leaves))
    same_x = len({leaf.x for leaf in leaves}) == 1
    return flat or (same_x and not any(op_name(node) in VIEWS for node in region.nodes))


def _keeps_lead(linear: Linear) -> bool:
    before, after = shape_of(linear.x), shape_of(linear.node)
    return before is None or after is None or _same_lead(before, after)


def _same_lead(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return len(left) == len(right) and all(map(same_size, left[:-1], right[:-1]))


def make(
    view: View,
    kind: str,
    down: Linear,
    region: Region,
    roles: Mapping[str, Linear],
    names: Mapping[str, str],
    role: str | None = None,
) -> Match | Miss:
    """The Match of a checked region; `names` maps its variables v0, v1 to "up" and "gate"."""
    linears, up = {**roles, "down": down}, next(iter(roles.values()))
    weights = {role: linear.weight for role, linear in linears.items()}
    biases = {f"{role}.bias": ln.bias for role, ln in linears.items() if ln.bias is not None}
    name = view.captured.name
    expression = rename(region.expression, names)
    if len(str(expression)) > MAX_LENGTH:
        return Miss(
            down.node, f"the activation takes {len(str(expression))} characters to write down"
        )
    owned = {key: node for key, node in region.scalars.items() if view.parameter(node) is not None}
    fused = [leaf for leaf in region.leaves.values() if leaf.half is not None]
    site = Site(
        name=common_path([name(node) for node in weights.values()]),
        kind=kind,
        params={role: name(node) for role, node in weights.items()},
        biases={
            **{key.removesuffix(".bias"): name(node) for key, node in biases.items()},
            **{key: name(node) for key, node in owned.items()},
        },
        activation=str(quiet(expression)),
        d_model=up.d_in,
        d_hidden=down.d_in,
        transposed=tuple(role for role, linear in linears.items() if linear.transposed),
        halves=tuple(names[v] for v in sorted(names, key=lambda v: region.leaves[v].half or 0))
        if fused
        else (),
        interleaved=any(leaf.interleaved for leaf in fused),
        role=role,
        d_out=down.d_out,
    )
    parts = {node for linear in linears.values() for node in (*linear.parts, linear.node)}
    return Match(
        captured=view.captured,
        site=site,
        x=up.x,
        root=down.node,
        weights={**weights, **biases, **owned},
        linears=tuple(linears.values()),
        inside=tuple(sorted({*region.nodes, *parts}, key=view.order.__getitem__)),
        activation=str(expression),
        scalars=tuple(region.scalars.values()),
        noise=region.noise[0] if region.noise else None,
        dtype=_computed_in(view, down),
        reshaped=_reshaped(up, down),
    )


def _reshaped(up: Linear, down: Linear) -> bool:
    """Whether the block's output has other leading dimensions than its input."""
    before, after = shape_of(up.x), shape_of(down.node)
    return before is not None and after is not None and not _same_lead(before, after)


def _computed_in(view: View, down: Linear) -> torch.dtype | None:
    """The dtype that autocast computes a block in, or None where that is its weights' own."""
    computed, weight = dtype_of(down.node), view.parameter(down.weight)
    return computed if weight is not None and computed != weight.dtype else None


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
