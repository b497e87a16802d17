"""In-place calls: where they keep a block from being replaced.

A rewrite runs the block at its end, from its input, and drops what was inside. That is the same
unless the input is changed meanwhile, or a hidden value is changed and read again under its old name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..ir import Miss
from ..operators import OPERATORS
from .names import CASTS, TRANSPOSES, op_name

if TYPE_CHECKING:
    from .canonicalize import View

_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imatmul", "setitem")
_ALIASING = (  # calls whose result may share memory with their first argument
    "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view", "contiguous",
    "identity", "detach", "alias", "dropout", "movedim", "moveaxis", "ravel", "as_strided", "broadcast_to",
    "unsafe_chunk", "unsafe_split", "unfold", "real", "imag", "data", "hsplit", "vsplit", "dsplit",
    "atleast_1d", "atleast_2d", "atleast_3d", "reshape_as", "view_as_real", "view_as_complex", "conj",
    "resolve_conj", "resolve_neg", "positive", "lift_fresh_copy", "native_dropout",
    "chunk", "split", "split_with_sizes", "tensor_split",
    "getitem", "slice", "narrow", "select", "unbind", "expand", "view_as", "diagonal",
    *CASTS, *TRANSPOSES,
)  # fmt: skip


def changed_in_place(view: View, x: Iterable[Node], inside: set[Node], root: Node) -> Miss | None:
    """Why in-place calls forbid to replace the nodes `inside`, which read `x` and end at `root`."""
    inputs = {origin(node) for node in x}
    first = min(view.order[node] for node in inside)
    for call, changed in mutations(view):
        if changed in inputs and first < view.order[call] < view.order[root]:
            return Miss(call, "its input is changed in place before the block ends")
        if call in inside and _read_again(view, call, changed):
            return Miss(call, "a hidden value is changed in place and read again")
    return None


def mutations(view: View) -> list[tuple[Node, Node]]:
    """Each in-place call of a graph with the origin of the value it changes."""
    if view.mutations is None:
        changes = ((node, value) for node in view.order for value in all_changed_by(node))
        view.mutations = [(node, origin(value)) for node, value in changes]
    return view.mutations


WRITES = {  # calls that write a value into memory, and which argument that value is
    "setitem": 2, "copy": 1, "index_copy": 3, "scatter": 3, "index_put": 2, "masked_scatter": 2,
}  # fmt: skip


def written(view: View, origin: Node) -> list[Node]:
    """The values that are written in place into the memory which begins at `origin`."""
    if view.writes is None:
        view.writes = {}
        for call, changed in mutations(view):
            place = WRITES.get(op_name(call))
            value = call.args[place] if place is not None and len(call.args) > place else None
            value = call.kwargs.get("source", call.kwargs.get("src", value))
            if isinstance(value, Node):
                view.writes.setdefault(changed, []).append(value)
    return view.writes.get(origin, [])


def memory_of(view: View, call: Node, value: Node) -> Node | None:
    """The memory into which a call writes `value` in place, or None."""
    target = changed_by(call)
    if target is None or op_name(call) not in WRITES:
        return None
    memory = origin(target)
    return memory if value in written(view, memory) else None


def all_changed_by(node: Node) -> list[Node]:
    """The values that a call changes in place; `torch._foreach_mul_` changes a list of them."""
    if op_name(node).startswith("_foreach"):
        name = getattr(node.target, "__name__", "")
        return list(_flat(node.args[0])) if name.split(".")[0].endswith("_") else []
    value = changed_by(node)
    return [] if value is None else [value]


def _flat(values: Any) -> list[Node]:
    return [v for v in values if isinstance(v, Node)] if isinstance(values, (list, tuple)) else []


def changed_by(node: Node) -> Node | None:
    """The value that a call changes in place, or None."""
    target: Any = node.target
    value: Any = node.kwargs.get("out")
    if value is None and _is_inplace(node, target) and node.args:
        value = node.args[0]
    return value if isinstance(value, Node) else None


def _is_inplace(node: Node, target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name = target if node.op == "call_method" else getattr(target, "__name__", "")
    if node.op not in ("call_method", "call_function"):
        return False
    if (name.endswith("_") and not name.endswith("__")) or name.strip("_") in _OPERATORS:
        return True
    if op_name(node) in ("dropout", "alpha_dropout", "feature_dropout") and len(node.args) > 3:
        return node.args[3] is True  # nn.Dropout(inplace=True) passes it by position
    known = OPERATORS.get(op_name(node))
    positional = known is not None and len(node.args) > known.tensors + len(known.params)
    return node.kwargs.get("inplace") is True or (positional and node.args[-1] is True)


def origin(node: Node) -> Node:
    """The first node whose memory a value may share."""
    while (op_name(node) in _ALIASING or changed_by(node) is not None) and node.args:
        inner = node.args[0]
        if not isinstance(inner, Node):
            break
        node = inner
    return node


def _read_again(view: View, call: Node, changed: Node) -> bool:
    """Whether something after `call` reads the memory it changed, other than through its result."""
    stack = [changed]
    while stack:
        for user in view.users(stack.pop()):
            if user is call:
                continue
            if view.order[user] > view.order[call]:
                return True
            if op_name(user) in _ALIASING or changed_by(user) is not None:
                stack.append(user)
    return False
