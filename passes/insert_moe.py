"""Replace a matched block by router, gate, dispatch and expert_mlp.

    scores = |relu(x router1^T) router2^T|     mask = gate(scores, tau, rule)
    lists = dispatch(mask)                     y = expert_mlp(x, *lists, slabs, biases, f)

or with the first line as one op, lists = route(x, router1, router2, tau), which GPU kernels run at once,
for several sites too (see `insert_group`), and expert_mlp_int8 with int8 copies of the slabs in place of
expert_mlp where these are wanted for few tokens, or all of it as one, y = dynamic_mlp(x, record), on CPUs.
Where routers learn, the first form reads x.detach() and ends in y = credit(y, scores, ...). Sites that
share their first router layer share the node of relu(x router1^T), which the first of them inserts. These
two passes alone edit a graph.
Operands (slabs, router, tau, or the record of them) are nodes made by the caller: trailing placeholders
for the backend, attributes for programmatic rewriting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import add, getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from ..kernels.credit import credit
from ..kernels.dispatch import dispatch
from ..kernels.dynamic_mlp import dynamic_mlp
from ..kernels.exact_scores import exact_scores
from ..kernels.expert_mlp import expert_mlp
from ..kernels.expert_mlp_int8 import expert_mlp_int8
from ..kernels.gate import gate
from ..kernels.native import SLABS
from ..kernels.route import route
from ..kernels.router_hidden import router_hidden
from .base import Match
from .forms import BY_TAU, COPIED, ROUTED, Choice, Form, has_layer
from .stand_ins import StandIns, erase_shape_reader, is_channels_last, noise_of


@dataclass(frozen=True)
class Inserted:
    """The nodes of one inserted mixture of experts.

    Attributes:
        output: its output.
        offsets: of its lists, where it has some.
        hidden: relu(x router1^T) where that is a node, for later sites to share.
    """

    output: Node
    offsets: Node | None = None
    hidden: Node | None = None


@dataclass(frozen=True)
class Given:
    """What was inserted for a site together with others.

    Attributes:
        x, slabs: its input with features last, and its operands, in the dtype that it is computed in.
        lists: tokens, offsets and slots of its experts.
        outputs: outputs of the experts of several sites, and which of them is its own; None for none.
    """

    x: Node
    slabs: Mapping[str, Node]
    lists: tuple[Node, ...]
    outputs: tuple[Node, int] | None = None


def insert_moe(
    graph: Graph,
    match: Match,
    operands: Mapping[str, Node],
    at: Callable[[Node], Node],
    form: Form = "ops",
    choice: Choice = BY_TAU,
    hidden: Node | None = None,
    width: int = 0,
    given: Given | None = None,
) -> Inserted:
    """Insert the nodes of one converted site and erase the dense block they replace.

    graph is a copy of the matched graph and `at` maps the match's nodes to that copy. The block's last
    node becomes the expert_mlp call, so that it stays the input of whatever is matched after it.
    hidden: the node of relu(x router1^T) that an earlier site inserted, for this one to share. width: R,
    where this one's is to be shared as one op with a record. given: what stands for it in the graph already.
    Whoever reads the shape of a hidden value reads it from a stand-in without memory.
    """
    root = at(match.root)
    with graph.inserting_before(root):
        if given is not None:
            x, slabs = given.x, given.slabs
        else:
            x = input_of(graph, match, at(match.x))
            slabs = slabs_of(graph, match, operands)
        if "layer" in operands:
            hidden = graph.call_function(router_hidden.overload, (x, operands["layer"], width))
        elif hidden is None and has_layer(form, choice):
            read = graph.call_method("detach", (x,)) if form == "learning" else x
            first = graph.call_function(F.linear, (read, slabs["router1"]))
            hidden = graph.call_function(F.relu, (first,))
    offsets, stand_ins = None, StandIns(graph, match, at)
    if form == "record":
        last = () if hidden is None else (hidden,)
        call = (dynamic_mlp.overload, (x, operands["record"], match.linears[-1].d_out, *last))
    elif given is not None and given.outputs is not None:
        offsets, call = given.lists[1], (getitem, given.outputs)
    else:
        lists = () if given is None else given.lists
        offsets, call = _experts(graph, match, at, x, slabs, form, choice, hidden, lists)
    rows = stand_ins[match.linears[-1].x] if match.reshaped else None
    output = _output(graph, match, root, call, rows)
    for node in reversed(match.inside[:-1]):
        for user in list(at(node).users):
            erase_shape_reader(graph, user)
        for user in list(at(node).users):
            user.replace_input_with(at(node), stand_ins[node])
        graph.erase_node(at(node))
    return Inserted(output, offsets, hidden)


def _experts(
    graph: Graph,
    match: Match,
    at: Callable[[Node], Node],
    x: Node,
    slabs: Mapping[str, Node],
    form: Form,
    choice: Choice,
    hidden: Node | None,
    parts: Sequence[Node],
) -> tuple[Node, tuple[Any, tuple[Any, ...]]]:
    """Routing before the block's last node: offsets, and the call that gives the block's output.

    parts: the lists, where there are some already.
    """
    noise = noise_of(graph, match, at) if match.noise is not None else None
    scalars = [at(node) for node in match.scalars]
    with graph.inserting_before(at(match.root)):
        if parts:
            lists = None
        elif form == "grouped" or form in ROUTED:
            router = (slabs["router1"], slabs["router2"], slabs["tau"])
            lists = graph.call_function(route.overload, (x, *router))
        else:
            if hidden is not None:
                scores = graph.call_function(
                    torch.abs, (graph.call_function(F.linear, (hidden, slabs["router2"])),)
                )
            else:
                of = (*map(slabs.get, SLABS[:-1]), noise, scalars, match.activation, choice.exact)
                given = (x, slabs["router1"], slabs["router2"], *of)
                scores = graph.call_function(exact_scores.overload, given)
            rule = () if choice.rule == "max" else (choice.rule,)
            mask = graph.call_function(gate.overload, (scores, slabs["tau"], *rule))
            lists = graph.call_function(dispatch.overload, (mask,))
        parts = parts or [graph.call_function(getitem, (lists, i)) for i in range(3)]
        if form == "int8":
            operands = (x, *parts, *map(slabs.get, SLABS), *map(slabs.get, COPIED), scalars)
            return parts[1], (expert_mlp_int8.overload, (*operands, match.activation))
        args = (x, *parts, *map(slabs.get, SLABS), noise, scalars, match.activation)
        if form != "learning":
            return parts[1], (expert_mlp.overload, args)
        y = graph.call_function(expert_mlp.overload, args)
    return parts[1], (credit.overload, (y, scores, slabs["aims"], *args))


def input_of(graph: Graph, match: Match, x: Node) -> Node:
    """x with features last, in the dtype that autocast computes the block in."""
    axis = match.linears[-1].axis
    if axis not in (None, -1):
        x = graph.call_function(torch.movedim, (x, axis, -1))
    return x if match.dtype is None else graph.call_method("to", (x, match.dtype))


def slabs_of(graph: Graph, match: Match, operands: Mapping[str, Node]) -> dict[str, Node]:
    """The operands in that dtype."""
    slabs = dict(operands)
    if match.dtype is not None:
        kept = ("tau", "aims", "record", "layer", *COPIED)
        for name in [name for name in slabs if name not in kept]:
            slabs[name] = graph.call_method("to", (slabs[name], match.dtype))
    return slabs


def _output(
    graph: Graph, match: Match, root: Node, call: tuple[Any, tuple[Any, ...]], rows: Node | None
) -> Node:
    """Let the block's last node compute the experts' output; returns the call that does.

    rows: a node with the leading dimensions of the output, where they are not those of the input.
    """
    axis, root.kwargs = match.linears[-1].axis, {}
    root.op = "call_function"
    if axis == -1 and rows is None:
        root.target, root.args = call
        return root
    with graph.inserting_before(root):
        output = graph.call_function(*call)
        if rows is not None:
            size = graph.call_method("size", (rows,))
            lead = graph.call_function(getitem, (size, slice(None, -1)))
            shape = graph.call_function(add, (lead, (-1,)))
            root.target, root.args = torch.reshape, (output, shape)
        elif is_channels_last(match.root):
            root.target, root.args = torch.movedim, (output, -1, axis)
        else:  # in memory as a convolution's output: dropout after it draws in that order
            moved = graph.call_function(torch.movedim, (output, -1, axis))
            root.op, root.target, root.args = "call_method", "contiguous", (moved,)
    return output
