"""Replace a matched block by router, gate, dispatch and expert_mlp.

    scores = |relu(x router1^T) router2^T|     mask = gate(scores, tau)
    tokens, offsets = dispatch(mask)           y = expert_mlp(x, tokens, offsets, slabs, biases, f)

The only pass that edits a graph. Operands (slabs, router, tau) are nodes made by the caller: trailing
placeholders for the backend, attributes for programmatic rewriting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import add, getitem

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from ..ir import Site
from ..kernels.dispatch import dispatch
from ..kernels.expert_mlp import expert_mlp
from ..kernels.gate import gate
from .base import Match
from .canonicalize import CASTS, SHAPE_ONLY, VIEWS, op_name
from .halves import SPLITS

_SHAPE_ARITHMETIC = ("getitem", "add", "sub", "mul", "floordiv", "Size")
SLABS = ("w_up", "w_gate", "w_down", "b_up", "b_gate", "b_down")


@dataclass(frozen=True)
class Inserted:
    """The nodes of one inserted mixture of experts: scores, mask, offsets of dispatch, output."""

    scores: Node
    mask: Node
    offsets: Node
    output: Node


def operand_names(site: Site) -> tuple[str, ...]:
    """Which operands a site's nodes take, in order: router1, router2, tau, then present slabs."""
    present = {"w_up", "w_down"}
    if site.kind == "glu":
        present.add("w_gate")
    for role in site.biases:
        if role == "gate_up":
            present |= {"b_up", "b_gate"}
        elif role in ("up", "gate", "down"):
            present.add(f"b_{role}")
    return ("router1", "router2", "tau", *(name for name in SLABS if name in present))


def insert_moe(
    graph: Graph, match: Match, operands: Mapping[str, Node], at: Callable[[Node], Node]
) -> Inserted:
    """Insert the nodes of one converted site and erase the dense block they replace.

    graph is a copy of the matched graph and `at` maps the match's nodes to that copy. The block's last
    node becomes the expert_mlp call, so that it stays the input of whatever is matched after it.
    Whoever reads the shape of a hidden value reads it from a stand-in without memory.
    """
    root, x = at(match.root), at(match.x)
    scalars = [at(match.weights[name]) for name in match.site.biases if _is_scalar(name)]
    with graph.inserting_before(root):
        hidden = graph.call_function(
            F.relu, (graph.call_function(F.linear, (x, operands["router1"])),)
        )
        scores = graph.call_function(
            torch.abs, (graph.call_function(F.linear, (hidden, operands["router2"])),)
        )
        mask = graph.call_function(gate.overload, (scores, operands["tau"]))
        lists = graph.call_function(dispatch.overload, (mask,))
        tokens, offsets = (graph.call_function(getitem, (lists, i)) for i in (0, 1))
    slabs = [operands.get(name) for name in SLABS]
    root.op, root.target, root.kwargs = "call_function", expert_mlp.overload, {}
    root.args = (x, tokens, offsets, *slabs, scalars, match.site.activation)
    stand_ins = _StandIns(graph, match, at)
    for node in reversed(match.inside[:-1]):
        for user in list(at(node).users):
            _erase_shape_reader(graph, user)
        for user in list(at(node).users):
            user.replace_input_with(at(node), stand_ins[node])
        graph.erase_node(at(node))
    return Inserted(scores, mask, offsets, root)


def _erase_shape_reader(graph: Graph, node: Node) -> None:
    """Erase a node that reads a shape, and the arithmetic on it, where nothing uses the result."""
    if op_name(node) not in (*SHAPE_ONLY, *_SHAPE_ARITHMETIC):
        return
    for user in list(node.users):
        _erase_shape_reader(graph, user)
    if not node.users:
        graph.erase_node(node)


class _StandIns(dict[Node, Node]):
    """Hidden node -> a node of its shape that holds one element, in the copied graph; made on demand.

    A hidden value has the shape of its linears but for reshapes, casts and halves, which are repeated.
    """

    def __init__(self, graph: Graph, match: Match, at: Callable[[Node], Node]) -> None:
        super().__init__()
        self.graph, self.at = graph, at
        self.linears = {linear.node: linear for linear in match.linears[:-1]}
        self.inside = set(match.inside)

    def __missing__(self, node: Node) -> Node:
        linear = self.linears.get(node)
        if linear is not None:
            made = self._expanded(self.at(linear.x), linear.d_out, self.at(node))
        else:
            before = next(arg for arg in node.all_input_nodes if self._is_hidden(arg))
            made = self[before]
            if op_name(node) in (*VIEWS, *CASTS, *SPLITS, "getitem", "slice"):
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

    def _expanded(self, x: Node, width: int, before: Node) -> Node:
        """x.new_empty(()).expand(*x.shape[:-1], width)"""
        with self.graph.inserting_before(before):
            size = self.graph.call_method("size", (x,))
            lead = self.graph.call_function(getitem, (size, slice(None, -1)))
            shape = self.graph.call_function(add, (lead, (width,)))
            element = self.graph.call_method("new_empty", (x, ()))
            return self.graph.call_method("expand", (element, shape))


def _is_scalar(name: str) -> bool:
    return name[:1] == "p" and name[1:].isdigit()
