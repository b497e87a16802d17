"""Stand-ins: nodes with the shape of a block's hidden values, once the block computes none.

Whoever reads a hidden value's shape, or draws its dropout, has one of these to read it from.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import add, getitem

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from .base import Match
from .halves import SPLITS
from .linear import Linear
from .names import CASTS, SHAPE_ONLY, VIEWS, argument, dtype_of, op_name

_SHAPE_ARITHMETIC = ("getitem", "add", "sub", "mul", "floordiv", "Size")


class StandIns(dict[Node, Node]):
    """Hidden node -> a node of its shape that holds one element, in the copied graph; made on demand.

    A hidden value has the shape of its linears but for reshapes, casts and halves, which are repeated.
    """

    def __init__(self, graph: Graph, match: Match, at: Callable[[Node], Node]) -> None:
        super().__init__()
        self.graph, self.at = graph, at
        self.linears = {
            node: linear for linear in match.linears[:-1] for node in (*linear.parts, linear.node)
        }
        self.inside = set(match.inside)

    def __missing__(self, node: Node) -> Node:
        linear = self.linears.get(node)
        if linear is not None:
            made = self._expanded(self.at(linear.x), linear, self.at(node))
        else:
            before = next(arg for arg in node.all_input_nodes if self._is_hidden(arg))
            made = self[before]
            if op_name(node) in (*VIEWS, *CASTS, *SPLITS, "getitem", "slice", "select"):
                with self.graph.inserting_before(self.at(node)):
                    made = self.graph.node_copy(self.at(node))
                made.replace_input_with(self.at(before), self[before])
        self[node] = made
        return made

    def _is_hidden(self, node: Node) -> bool:
        """Whether a node descends from a linear of the block, unlike softplus(p0)."""
        if node in self.linears:
            return True
        return node in self.inside and any(map(self._is_hidden, node.all_input_nodes))

    def _expanded(self, x: Node, linear: Linear, before: Node) -> Node:
        """x.new_empty(()).expand(*x.shape[:-1], d_out), or the same along another axis."""
        axis = linear.axis or -1
        with self.graph.inserting_before(before):
            size = self.graph.call_method("size", (x,))
            lead = self.graph.call_function(getitem, (size, slice(None, axis)))
            shape = self.graph.call_function(add, (lead, (linear.d_out,)))
            if axis != -1:
                rest = self.graph.call_function(getitem, (size, slice(axis + 1, None)))
                shape = self.graph.call_function(add, (shape, rest))
            element = self.graph.call_method("new_empty", (x, ()))
            return self.graph.call_method("expand", (element, shape))


def noise_of(graph: Graph, match: Match, at: Callable[[Node], Node]) -> Node:
    """What active dropout multiplies by, [..., H]: drawn where and as the dense block draws it."""
    call, axis = match.noise, match.linears[-1].axis
    assert call is not None
    dtype, p = dtype_of(call), argument(call, 1, "p", 0.5)
    shape = StandIns(graph, match, at)[call]
    with graph.inserting_before(at(call)):
        moves = axis not in (None, -1)
        if moves and is_channels_last(call):
            shape, moves = graph.call_function(torch.movedim, (shape, axis, -1)), False
        ones = graph.call_method("new_ones", (shape, ()), {} if dtype is None else {"dtype": dtype})
        full = graph.call_method("expand_as", (ones, shape))
        noise = graph.call_function(F.dropout, (full, p, True))
        return graph.call_function(torch.movedim, (noise, axis, -1)) if moves else noise


def is_channels_last(node: Node) -> bool:
    """Whether a convolution's captured output has its features innermost in memory."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return isinstance(value, Tensor) and value.dim() > 2 and not value.is_contiguous()


def erase_shape_reader(graph: Graph, node: Node) -> None:
    """Erase a node that reads a shape, and the arithmetic on it, where nothing uses the result."""
    if op_name(node) not in (*SHAPE_ONLY, *_SHAPE_ARITHMETIC):
        return
    for user in list(node.users):
        erase_shape_reader(graph, user)
    if not node.users:
        graph.erase_node(node)
