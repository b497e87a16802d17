"""Attention cores: where queries, keys and values meet, and where what they give comes out.

    out = softmax(f(q k^T)) v        one fused call (SDPA, flex attention), or
                                     matmul -> elementwise calls -> softmax -> elementwise calls -> matmul

A fused core is a declaration: which operands are q, k and v. A packed one (torch's multi-head attention)
also holds the projections themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..operators import OPERATORS
from .canonicalize import View
from .inplace import memory_of, written
from .linear import is_matrix_transpose
from .names import CASTS, IDENTITIES, TRANSPOSES, VIEWS, argument, op_name, shape_of


@dataclass(frozen=True)
class Core:
    """One attention core: operand nodes of the queries, keys and values, and its output node.

    weights: the softmax, None where it is inside of a fused call.
    """

    q: Node
    k: Node
    v: Node
    out: Node
    weights: Node | None = None


@dataclass(frozen=True)
class Packed:
    """One call that projects and attends: inputs by role, and weight nodes with their bias nodes.

    Attributes:
        out: the call.
        inputs: role "q", "k", "v" -> input node.
        weights: role "qkv", "q", "k", "v" or "o" -> (weight node, bias node or None).
    """

    out: Node
    inputs: dict[str, Node]
    weights: dict[str, tuple[Node, Node | None]]


FUSED = {  # operand positions and keywords of q, k, v
    "scaled_dot_product_attention": ("query", "key", "value"),
    "flex_attention": ("query", "key", "value"),
    "flash_attn_func": ("q", "k", "v"),
    "_scaled_dot_product_flash_attention_for_cpu": ("query", "key", "value"),
}
PACKED = {  # positions of q, k, v and of in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias
    "multi_head_attention_forward": (5, 6, 11, 12),
    "_native_multi_head_attention": (5, 6, 7, 8),
}
_PACKED_NAMES = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")
PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "mm", "imatmul")
_BETWEEN = (  # calls between scores, weights and the products around them
    *IDENTITIES, *VIEWS, *CASTS, *TRANSPOSES, *OPERATORS, "dropout", "masked_fill", "cat", "expand",
    "getitem", "slice", "where", "pad", "index_put", "squeeze", "softmax", "log_softmax", "tril",
    "nan_to_num", "narrow", "split", "chunk", "unbind", "roll", "clamp_max",
    "as_strided", "flip", "index_select", "select", "repeat", "stack", "setitem", "copy",
)  # fmt: skip
_HEADS = 64  # more attention heads than any model has
_REACH = 64  # calls between a product and its softmax; T5 has 8, DeBERTa under 40


def cores(view: View) -> Iterator[Core | Packed]:
    """The attention cores of a graph in execution order."""
    for node in view.captured.gm.graph.nodes:
        name = op_name(node)
        if name in FUSED:
            operands = [argument(node, i, n) for i, n in enumerate(FUSED[name])]
            if all(isinstance(operand, Node) for operand in operands):
                q, k, v = operands
                yield Core(q, k, v, node)
        elif name in PACKED and node.op == "call_function":
            yield _packed(node, PACKED[name])
        elif name in ("softmax", "sparsemax"):
            yield from _explicit(view, node)


def _packed(node: Node, places: tuple[int, ...]) -> Packed:
    inputs = {role: argument(node, i, n) for i, (role, n) in enumerate(_INPUTS.items())}
    in_weight, in_bias, out_weight, out_bias = (
        argument(node, place, name) for place, name in zip(places, _PACKED_NAMES, strict=True)
    )
    separate = {role: node.kwargs.get(f"{role}_proj_weight") for role in "qkv"}
    if node.kwargs.get("use_separate_proj_weight") or in_weight is None:
        weights = {role: (w, None) for role, w in separate.items() if isinstance(w, Node)}
    else:
        weights = {"qkv": (in_weight, in_bias)}
    return Packed(node, inputs, {**weights, "o": (out_weight, out_bias)})


_INPUTS = {"q": "query", "k": "key", "v": "value"}


def _explicit(view: View, softmax: Node) -> Iterator[Core]:
    """The core around a softmax whose scores are a product of two values of the call."""
    scores = _first_product(view, argument(softmax, 0, "input"))
    found = _next_product(view, softmax)
    if scores is None or found is None:
        return
    out, weights = found
    product, turned = scores
    left, right = _operands(product)
    first, second = _operands(out)
    values = second if first is weights else first
    if _over_rows(softmax) != turned:
        left, right = right, left
    yield Core(left, right, values, out, softmax)


def _over_rows(softmax: Node) -> bool:
    """Whether a softmax runs over the rows of its scores, so that keys are the first operand."""
    dim = argument(softmax, 1, "dim")
    shape = shape_of(softmax)
    rank = len(shape) if shape is not None else 4
    return isinstance(dim, int) and dim % rank == rank - 2


def _operands(product: Node) -> tuple[Any, Any]:
    if op_name(product) == "einsum":
        operands = product.args[1:]
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands = tuple(operands[0])
        return operands[0], operands[1]
    if op_name(product) == "baddbmm":
        return argument(product, 1, "batch1"), argument(product, 2, "batch2")
    return argument(product, 0, "input"), argument(product, 1, "other", product.kwargs.get("mat2"))


def _is_product(view: View, node: Node) -> bool:
    """Whether a call multiplies two values of the call; a linear layer does not."""
    if op_name(node) not in PRODUCTS or node in view.linears:
        return False
    operands = node.args[1:] if op_name(node) == "einsum" else _operands(node)
    flat = (
        operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    )
    nodes = [n for n in flat if isinstance(n, Node)]
    return len(flat) == len(nodes) == 2 and any(n in view.runtime for n in nodes)


def _between(view: View, node: Node) -> bool:
    """Whether a call may stand between a core's products: elementwise, or a map that mixes heads."""
    linear = view.linears.get(node)
    if linear is None:
        return op_name(node) in _BETWEEN
    return linear.d_in == linear.d_out <= _HEADS and op_name(linear.x) in TRANSPOSES


def _first_product(view: View, scores: Any) -> tuple[Node, bool] | None:
    """The earliest product that the scores are made of, and whether it is transposed on the way.

    Content comes before positions in every model known.
    """
    stack: list[tuple[Any, bool]] = [(scores, False)]
    seen: set[Node] = set()
    found: dict[Node, bool] = {}
    while stack and len(seen) < _REACH:
        node, turned = stack.pop(0)
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if _is_product(view, node):
            found[node] = turned
        elif _between(view, node):
            turned ^= is_matrix_transpose(node)
            stack += [(inner, turned) for inner in node.all_input_nodes]
        stack += [(value, turned) for value in written(view, node)]
    first = min(found, key=view.order.__getitem__, default=None)
    return None if first is None else (first, found[first])


def _next_product(view: View, softmax: Node) -> tuple[Node, Node] | None:
    """The product that the attention weights enter, and the operand that they are there."""
    stack, seen = [softmax], {softmax}
    while stack and len(seen) < _REACH:
        node = stack.pop(0)
        for user in view.users(node):
            memory = memory_of(view, user, node)
            if memory is not None and memory not in seen:
                seen.add(memory)
                stack.append(memory)
            if _is_product(view, user):
                return user, node
            if user not in seen and _between(view, user):
                seen.add(user)
                stack.append(user)
    return None
