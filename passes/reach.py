"""Which linears a value of the attention comes from, and which linear its output goes to.

Walks stop at the first linear on each path. A sum of values from different linears is a residual stream,
unless one of them is a low-rank update (LoRA) of the other: from there nothing is concluded.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..operators import OPERATORS
from .block import source
from .canonicalize import View
from .inplace import WRITES, changed_by, memory_of, written
from .linear import CONVOLUTIONS
from .names import (
    CASTS,
    IDENTITIES,
    NORMS,
    TRANSPOSES,
    VIEWS,
    argument,
    op_name,
    same_size,
    shape_of,
)

_MOVES = (
    "cat", "stack", "concat", "detach", "getitem", "slice", "select", "narrow", "chunk", "split", "unbind",
    "split_with_sizes", "tensor_split", "expand", "repeat", "repeat_interleave", "broadcast_to",
    "masked_fill", "dropout", "pad", "roll", "flip", "as_strided", "unfold", "gather", "index_select",
    "index", "view_as_complex", "view_as_real", "movedim", "moveaxis", "tile", "tril", "triu", "take",
    "constant_pad_nd", "hstack", "vstack", "unflatten", "view_as", "chunk", "rot90", "real", "complex",
    "reshape_as", "nan_to_num", "take_along_dim", "zeros_like", "clamp_max", "einops", "set", "ravel",
)  # fmt: skip
TRANSPARENT = frozenset(
    (*IDENTITIES, *VIEWS, *CASTS, *TRANSPOSES, *OPERATORS, *NORMS, *_MOVES, *WRITES)
)
_GATES = ("sigmoid", "silu", "tanh", "softplus", "hardsigmoid", "relu", "gelu", "softmax", "exp")
_DEPTH = 96  # calls between a projection and its core; rotary chains have about 30


class Conflict:
    """A walk that met a residual stream, or found no end."""


CONFLICT = Conflict()
Found = frozenset[Node] | Conflict
NOTHING: frozenset[Node] = frozenset()


class Reach:
    """Walks from attention cores to the nearest linears."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.memo: dict[Node, Found] = {}

    def back(self, node: Node, depth: int = 0) -> Found:
        """The linears that a value is made of, or CONFLICT."""
        if node in self.view.linears:
            return frozenset((node,))
        if depth > _DEPTH:
            return CONFLICT
        if node not in self.memo:
            self.memo[node] = CONFLICT  # a value that is written from itself
            self.memo[node] = self._back(node, depth + 1)
        return self.memo[node]

    def _back(self, node: Node, depth: int) -> Found:
        values = [self.back(value, depth) for value in written(self.view, node)]
        return _union([self._through(node, depth), *values])

    def _through(self, node: Node, depth: int) -> Found:
        """The linears behind the inputs of a call that passes values on."""
        if op_name(node) in CONVOLUTIONS and argument(node, 6, "groups") not in (None, 1):
            return self.back(node.all_input_nodes[0], depth)  # along the tokens, one per feature
        if node not in self.view.runtime or op_name(node) not in TRANSPARENT:
            return NOTHING
        inputs = [n for n in node.all_input_nodes if n in self.view.runtime]
        if op_name(node) in ("add", "sub") and len(inputs) == 2:
            found = self._sum(*(self.back(n, depth) for n in inputs))
            return CONFLICT if found and self._is_residual(inputs, depth) else found
        if op_name(node) == "mul" and len(inputs) == 2:
            return self._product(inputs, depth)
        return _union([self.back(n, depth) for n in self._data(node, inputs)])

    def _data(self, node: Node, inputs: list[Node]) -> list[Node]:
        """The inputs whose values a call passes on; not indices, masks or conditions."""
        name = op_name(node)
        if name in ("getitem", "slice", "gather", "index_select", "masked_fill", "expand", "index"):
            return [n for n in inputs if n is argument(node, 0, "input")]
        if name == "where":
            return [n for n in inputs if n is not argument(node, 0, "condition")]
        if changed_by(node) is not None and name in WRITES:
            return [n for n in inputs if n in (node.args[0], node.args[WRITES[name]])]
        return inputs

    def _sum(self, left: Found, right: Found) -> Found:
        if isinstance(left, Conflict) or isinstance(right, Conflict):
            return CONFLICT
        if left == right or not left or not right:
            return left | right
        for base, update in ((left, right), (right, left)):
            if self._is_low_rank(base, update):
                return base
        return CONFLICT

    def _is_residual(self, inputs: list[Node], depth: int) -> bool:
        """Whether a sum adds a linear's output to a value of the same shape that no linear made."""
        left, right = (shape_of(node) for node in inputs)
        empty = any(self.back(node, depth) == NOTHING for node in inputs)
        return empty and left is not None and right is not None and _same_shape(left, right)

    def _is_low_rank(self, base: frozenset[Node], update: frozenset[Node]) -> bool:
        """Whether `update` is B(A(x)) beside W x, as LoRA adds it."""
        linears = self.view.linears
        read = {source(linears[node].x) for node in base}
        inner = [linears.get(source(linears[node].x)) for node in update]
        return all(a is not None and source(a.x) in read for a in inner)

    def _product(self, inputs: list[Node], depth: int) -> Found:
        """A product passes on what is gated, not the gate."""
        found = [self.back(n, depth) for n in inputs]
        if found[0] == found[1]:
            return found[0]
        for mine, other in ((0, 1), (1, 0)):
            if op_name(source(inputs[other])) in _GATES and op_name(inputs[mine]) not in _GATES:
                return found[mine]
        return self._sum(*found)

    def forward(self, node: Node, weights: Node | None = None) -> list[Node]:
        """The one linear that an attention's output enters, before any residual add; or nothing.

        weights: the attention's softmax; values that come from it too, such as those of relative
        positions, may be added to the output.
        """
        stack, seen, found = [node], {node}, set()
        while stack and len(seen) < 4 * _DEPTH:
            at = stack.pop()
            for user in self.view.users(at):
                memory = memory_of(self.view, user, at)
                if memory is not None and memory not in seen:
                    seen.add(memory)
                    stack.append(memory)
                linear = self.view.calls.get(user)
                if linear is not None:
                    if linear.x in seen:
                        found.add(linear.node)
                elif user not in seen and self._passes(user, seen, weights):
                    seen.add(user)
                    stack.append(user)
        different = {id(self.view.captured.tensors[self.view.linears[n].weight]) for n in found}
        return sorted(found, key=self.view.order.__getitem__) if len(different) == 1 else []

    def _passes(self, user: Node, seen: set[Node], weights: Node | None) -> bool:
        """Whether an output goes on through a call that adds nothing else to it."""
        if op_name(user) not in TRANSPARENT:
            return False
        if op_name(user) in ("add", "sub"):
            others = [n for n in user.all_input_nodes if n not in seen and n in self.view.runtime]
            return all(weights is not None and self._comes_from(n, weights) for n in others)
        return True

    def _comes_from(self, node: Node, weights: Node) -> bool:
        """Whether a value is made of attention weights within a few calls."""
        stack, seen = [node], {node}
        while stack and len(seen) < _DEPTH:
            for inner in stack.pop(0).all_input_nodes:
                if inner is weights:
                    return True
                if inner not in seen and inner not in self.view.linears:
                    seen.add(inner)
                    stack.append(inner)
        return False


def _same_shape(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return len(left) == len(right) and all(map(same_size, left, right))


def _union(found: list[Found]) -> Found:
    total: frozenset[Node] = NOTHING
    for part in found:
        if isinstance(part, Conflict):
            return CONFLICT
        total |= part
    return total
