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
from ..expr import MAX_DEPTH, MAX_SIZE, Expr, const, var
from ..ir import Miss
from ..operators import OPERATORS
from .canonicalize import View
from .elementwise import operator_of
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
        if name == "detach":
            inner = self.visit(node.args[0])
            if inner.variables():
                raise Refuse(node, "detach between the matrices stops the gradient")
            return inner
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
            return operator_of(node, name, self.visit)
        if name in NORMS and node.args and self._is_region(node.args[0]):
            raise Refuse(node, f"{name} between the matrices: hidden values depend on one another")
        if name == "getitem" and op_name(node.all_input_nodes[0]) == "autograd_function_apply":
            raise Refuse(
                node, "a custom autograd.Function is before it, with a gradient of its own"
            )
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
            inner = self.visit(node.args[0])
            if not inner.neurons():
                raise Refuse(node, "active dropout of something else than hidden values")
            self.region.noise.append(node)
            return Expr("mul", (inner, var("noise")))
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
        inner = self.visit(source)
        other_type = dtype_of(source) != dtype_of(node) or any(
            isinstance(arg, torch.dtype) for arg in node.args
        )
        if not keeps or other_type or (before != after and not inner.neurons()):
            raise Refuse(node, "hidden features are rearranged between the matrices")
        if before != after:
            self.region.reshaped = node
        return inner

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


def _is_zeros(node: Node) -> bool:
    return op_name(node) == "zeros_like" and node.kwargs.get("dtype") is None
