"""Walk back from a linear's input through elementwise calls to the linears that feed it.

    hidden = expression(v0, v1, ...)     v_i = a whole linear, or one half of a fused linear

A region is accepted whatever its spelling (one gelu node or eight nodes of arithmetic), since what
matters is only that hidden neuron i depends on nothing but neuron i of each linear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..errors import ExpressionError
from ..expr import MAX_DEPTH, MAX_SIZE, OPERATORS, Expr, const, var
from ..ir import Miss
from .canonicalize import View
from .halves import Leaf, Refuse, both_halves, half_of
from .linear import Linear
from .names import (
    CASTS,
    IDENTITIES,
    NORMS,
    VIEWS,
    argument,
    dtype_of,
    op_name,
    same_size,
    shape_of,
)


@dataclass
class Region:
    """The elementwise subgraph between linears and a final linear's input.

    Attributes:
        expression: over variables named v0, v1, ... and activation scalars p0, p1, ...
        leaves: variable name -> Leaf.
        scalars: scalar name -> its node, a parameter or a buffer.
        noise: calls of active dropout between the matrices, each the variable "noise".
        reshaped: a call that changes the shape between the matrices, or None.
        nodes: calls inside the region, leaves not included.
    """

    expression: Expr = field(default_factory=lambda: const(0.0))
    leaves: dict[str, Leaf] = field(default_factory=dict)
    scalars: dict[str, Node] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    noise: list[Node] = field(default_factory=list)
    reshaped: Node | None = None


def walk(view: View, down: Linear) -> Region | Miss:
    """The region that feeds `down`, or the Miss at the node where the walk had to stop."""
    walker = _Walker(view)
    try:
        walker.region.expression = walker.visit(down.x)
    except Refuse as refused:
        return refused.miss
    except RecursionError:
        return Miss(down.node, "its input is an elementwise chain too long to follow")
    return walker.region


class _Walker:
    def __init__(self, view: View) -> None:
        self.view = view
        self.region = Region()
        self.memo: dict[Node, Expr] = {}

    def visit(self, node: Any, user: Node | None = None) -> Expr:
        if not isinstance(node, Node):
            if isinstance(node, (bool, int, float)) and math.isfinite(node):
                return const(node)
            raise Refuse(
                user, f"the activation has an argument {node!r} that is not a finite number"
            )
        if node not in self.memo:
            self.memo[node] = self._remembering(node)
        return self.memo[node]

    def _remembering(self, node: Node) -> Expr:
        """Visit a node unless an earlier walk was refused there: residual streams are walked once."""
        known = self.view.refused.get(node)
        if known is not None:
            raise Refuse(known.node, known.reason)
        try:
            return self._visit(node)
        except ExpressionError:
            refused = Refuse(
                node, f"its activation has over {MAX_SIZE} operations or {MAX_DEPTH} levels"
            )
        except Refuse as caught:
            refused = caught
        self.view.refused[node] = refused.miss
        raise refused

    def _visit(self, node: Node) -> Expr:
        if node in self.view.linears:
            return self._leaf(Leaf(self.view.linears[node]))
        scalar = self.view.parameter(node)
        if scalar is not None and tuple(scalar.shape) not in ((), (1,)):
            shape = list(scalar.shape)
            raise Refuse(
                node, f"the activation has a parameter of shape {shape}; [] or [1] expected"
            )
        half = half_of(self.view.linears, node)
        if half is not None:
            self.region.nodes += half[1]
            return self._leaf(half[0])
        number = self.view.constant(node)
        if number is not None:
            return self.visit(number, node)
        if scalar is not None or self.view.scalar(node):
            return self._scalar(node)
        name = op_name(node)
        self.region.nodes.append(node)
        if _is_zeros(node):
            return const(0.0)
        if node in self.view.captured.tensors:
            raise Refuse(node, "the activation reads a tensor that is not one number")
        if name in IDENTITIES:
            return self.visit(node.args[0])
        if name in ("dropout", "native_dropout", "feature_dropout"):
            return self._dropout(node)
        if name in VIEWS:
            return self._reshape(node)
        if name in CASTS:
            return self._cast(node)
        if name == "glu":
            first, second = (self._leaf(leaf) for leaf in both_halves(self.view.linears, node))
            return Expr("mul", (first, Expr("sigmoid", (second,))))
        if name in OPERATORS or name in ("rsub", "clamp_max"):
            return self._operator(node, name)
        if name in NORMS and node.args and self._is_region(node.args[0]):
            raise Refuse(node, f"{name} between the matrices: hidden values depend on one another")
        label = name or f"a {node.op}"
        raise Refuse(
            node, f"its input comes from {label}, not from an activation of a linear layer"
        )

    def _is_region(self, node: Any) -> bool:
        """Whether a value is elementwise in linears, so that what reads it stands between matrices."""
        try:
            return bool(self.visit(node).neurons())
        except Refuse:
            return False

    def _leaf(self, leaf: Leaf) -> Expr:
        for name, known in self.region.leaves.items():
            if known == leaf:
                return var(name)
        name = f"v{len(self.region.leaves)}"
        self.region.leaves[name] = leaf
        return var(name)

    def _scalar(self, node: Node) -> Expr:
        name = f"p{len(self.region.scalars)}"
        self.region.scalars[name] = node
        return var(name)

    def _dropout(self, node: Node) -> Expr:
        """Inactive dropout is nothing; active dropout multiplies by noise, drawn once per call."""
        training = argument(node, 2, "training", argument(node, 2, "train", True))
        if training and argument(node, 1, "p", 0.5) != 0:
            if op_name(node) != "dropout":
                raise Refuse(node, f"active {op_name(node)} between the matrices")
            self.region.noise.append(node)
            return Expr("mul", (self.visit(node.args[0]), var("noise")))
        return self.visit(node.args[0])

    def _reshape(self, node: Node) -> Expr:
        """Any reshape that keeps the feature axis last and whole."""
        source = node.args[0]
        assert isinstance(source, Node)
        before, after = shape_of(source), shape_of(node)
        if before is None or after is None:
            last = node.args[-1][-1] if isinstance(node.args[-1], (tuple, list)) else node.args[-1]
            keeps = op_name(node) in ("view", "reshape") and (isinstance(last, Node) or last == -1)
        else:
            keeps = bool(before and after) and same_size(before[-1], after[-1])
        if not keeps:
            raise Refuse(node, "hidden features are rearranged between the matrices")
        if before != after:
            self.region.reshaped = node
        return self.visit(source)

    def _cast(self, node: Node) -> Expr:
        source = node.args[0]
        assert isinstance(source, Node)
        before, after = dtype_of(source), dtype_of(node)
        if before is None or after is None:
            raise Refuse(node, "a cast between the matrices whose dtypes the graph does not carry")
        inner = self.visit(source)
        if before == after:
            return inner
        return Expr("cast", (inner,), (("dtype", str(after).removeprefix("torch.")),))

    def _operator(self, node: Node, name: str) -> Expr:
        if name in ("add", "sub") and node.kwargs.get("alpha", 1) != 1:
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
            return self._between(node, args)
        if len(args) < known.tensors:
            raise Refuse(node, f"{name} of one argument is a reduction, not elementwise")
        tensors = tuple(self.visit(arg, node) for arg in args[: known.tensors])
        tensors = self._promoted(node, name, args[: known.tensors], tensors)
        params = self._params(node, name, args[known.tensors :])
        if name in ("maximum", "minimum"):
            return _extreme(name, tensors)
        return Expr(name, tensors, params)

    def _between(self, node: Node, args: list[Any]) -> Expr:
        """A clamp whose bounds are scalars of the model, not numbers in its code."""
        value = self.visit(args[0])
        for name, bound in zip(("maximum", "minimum"), _bounds(node, args), strict=True):
            if bound is not None:
                value = _extreme(name, (value, self.visit(bound, node)))
        return value

    def _promoted(
        self, node: Node, name: str, args: list[Any], tensors: tuple[Expr, ...]
    ) -> tuple[Expr, ...]:
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

    def _params(self, node: Node, name: str, rest: list[Any]) -> tuple[tuple[str, Any], ...]:
        """Named parameters that differ from their defaults; a trailing `inplace` is dropped."""
        known = OPERATORS[name]
        if len(rest) > len(known.params) + (known.tensors == 1):
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


def _is_zeros(node: Node) -> bool:
    return op_name(node) == "zeros_like" and node.kwargs.get("dtype") is None


def _extreme(name: str, tensors: tuple[Expr, ...]) -> Expr:
    """maximum or minimum; against a number it is a clamp, which takes numbers."""
    for value, limit in (tensors, tensors[::-1]):
        if limit.op == "const":
            side = "min" if name == "maximum" else "max"
            return Expr("clamp", (value,), ((side, limit.args[0]),))
    return Expr(name, tensors)
