"""One call of an elementwise operator as an expression: its operands, and parameters unlike the defaults."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..expr import Expr
from ..operators import OPERATORS
from .halves import Refuse
from .names import dtype_of

Visit = Callable[..., Expr]  # of an operand, and the call that reads it


def operator_of(node: Node, name: str, visit: Visit) -> Expr:
    """The expression of a call of an elementwise operator; `visit` gives those of its operands."""
    if name in ("add", "sub", "rsub") and node.kwargs.get("alpha", 1) != 1:
        raise Refuse(node, f"{name} with alpha is not supported between the matrices")
    args = list(node.args) + [node.kwargs[k] for k in ("other", "exponent") if k in node.kwargs]
    if "input" in node.kwargs:
        args.insert(0, node.kwargs["input"])
    if name == "rsub":
        name, args = "sub", args[::-1]
    if name == "clamp_max":
        name, args = "clamp", [args[0], None, *args[1:]]
    known = OPERATORS[name]
    if name == "clamp" and any(isinstance(bound, Node) for bound in _bounds(node, args)):
        return _between(node, args, visit)
    if len(args) < known.tensors:
        raise Refuse(node, f"{name} of one argument is a reduction, not elementwise")
    tensors = tuple(visit(arg, node) for arg in args[: known.tensors])
    tensors = _promoted(node, args[: known.tensors], tensors)
    params = _params(node, name, args[known.tensors :])
    return Expr(name, tensors, params)


def _between(node: Node, args: list[Any], visit: Visit) -> Expr:
    """A clamp whose bounds are scalars of the model, not numbers in its code."""
    value = visit(args[0])
    for outside, bound in zip(("lt", "gt"), _bounds(node, args), strict=True):
        if bound is not None:  # keeps NaN, and the gradient at the bound itself, as clamp does
            limit = visit(bound, node)
            value = Expr("where", (Expr(outside, (value, limit)), limit, value))
    return value


def _promoted(node: Node, args: list[Any], tensors: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The operands in the dtype that autocast computes this operator in, where it widens it."""
    after = dtype_of(node)
    known = [dtype_of(arg) for arg in args if isinstance(arg, Node)]
    wide = (torch.float32, torch.float64)
    if after not in wide or not known or any(d in (None, *wide) for d in known):
        return tensors
    dtype = (("dtype", str(after).removeprefix("torch.")),)
    return tuple(
        Expr("cast", (t,), dtype) if isinstance(a, Node) else t
        for a, t in zip(args, tensors, strict=True)
    )


def _params(node: Node, name: str, rest: list[Any]) -> tuple[tuple[str, Any], ...]:
    """Named parameters that differ from their defaults; a trailing `inplace` is dropped."""
    known = OPERATORS[name]
    more = rest[len(known.params) :]  # a trailing `inplace` at most
    if len(more) > 1 or (more and (known.tensors != 1 or not isinstance(more[0], bool))):
        raise Refuse(node, f"{name} has {len(rest)} parameters; expected {len(known.params)}")
    values = dict(zip(known.params, rest, strict=False))
    values.update({k: v for k, v in node.kwargs.items() if k in known.params})
    unknown = set(node.kwargs) - {
        *known.params,
        "inplace",
        "input",
        "other",
        "exponent",
        "alpha",
    }
    if any(node.kwargs[k] is not None for k in unknown):
        raise Refuse(node, f"{name} has an argument that is not understood: {sorted(unknown)}")
    kept = []
    for key, default in zip(known.params, known.defaults, strict=True):
        value = values.get(key, default)
        if isinstance(value, Node):
            raise Refuse(node, f"parameter {key} of {name} is computed in the graph")
        if isinstance(value, float) and not math.isfinite(value):
            raise Refuse(node, f"parameter {key} of {name} is {value!r}, not a finite number")
        if value != default:
            kept.append((key, value))
    return tuple(kept)


def _bounds(node: Node, args: list[Any]) -> tuple[Any, Any]:
    """The lower and upper bound of a clamp, None where there is none."""
    low, high = (*args[1:], None, None)[:2]
    return node.kwargs.get("min", low), node.kwargs.get("max", high)
