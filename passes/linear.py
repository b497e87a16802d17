"""Every spelling of a linear layer as one `Linear`: y = x W^T + b along one feature axis.

    linear, addmm, baddbmm, matmul, mm, bmm     the weight through transposes, unsqueeze and expand
    einsum, tensordot                           one weight, one contracted axis
    conv1d, conv2d, conv3d of kernel 1          channels first: the feature axis is not the last
    ... + b                                     a bias that is added afterwards belongs to it

A call that looks like a linear layer but whose weight is no plain parameter is kept as a `Miss`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..ir import Miss
from .names import TRANSPOSES, argument, op_name, shape_of

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_PRODUCTS = ("matmul", "mm", "bmm", "imatmul")


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b: W [d_out, d_in], or [d_in, d_out] when transposed; b [d_out] or None.

    Attributes:
        axis: feature axis of x and y counted from the end, -1 unless channels come first; None for
            weights that are no single matrix (heads as an axis of their own, grouped convolutions).
        parts: calls before `node` that belong to it, such as the product under a bias added later.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    transposed: bool
    d_in: int
    d_out: int
    axis: int | None = -1
    parts: tuple[Node, ...] = ()


def linears_of(nodes: Any, parameter: Any) -> tuple[dict[Node, Linear], dict[Node, Miss]]:
    """The linear layers of a graph by their last node, and linear calls with unusable weights.

    parameter: function from a node to the Parameter behind it, or None.
    """
    reader = _Reader(parameter)
    for node in nodes:
        reader.read(node)
    return reader.found, reader.refused


class _Reader:
    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter
        self.found: dict[Node, Linear] = {}
        self.refused: dict[Node, Miss] = {}

    def read(self, node: Node) -> None:
        name = op_name(node)
        if name == "add":
            self._biased(node)
        elif name in _FORMS:
            linear = _FORMS[name](self, node)
            if linear is not None:
                self.found[node] = linear

    def _biased(self, node: Node) -> None:
        """A product and a vector parameter added to it are one linear layer."""
        if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
            return
        first: Any = node.args[0]
        second: Any = node.args[1]
        for product, vector in ((first, second), (second, first)):
            linear = self.found.get(product) if isinstance(product, Node) else None
            bias = self.parameter(vector)
            if linear is None or bias is None or linear.bias is not None or linear.axis != -1:
                continue
            if tuple(bias.shape) == (linear.d_out,) and len(linear.node.users) == 1:
                del self.found[linear.node]
                parts = (*linear.parts, linear.node)
                self.found[node] = replace(linear, node=node, bias=vector, parts=parts)
                return

    def linear(self, node: Node) -> Linear | None:
        x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
        return self._make(node, x, weight, argument(node, 2, "bias"), stored_in_out=False)

    def addmm(self, node: Node) -> Linear | None:
        if node.op != "call_function" or any(node.kwargs.get(n, 1) != 1 for n in ("alpha", "beta")):
            return None
        bias, x = argument(node, 0, "input"), argument(node, 1, "mat1", node.kwargs.get("batch1"))
        weight = argument(node, 2, "mat2", node.kwargs.get("batch2"))
        return self._make(node, x, weight, bias, stored_in_out=True)

    def product(self, node: Node) -> Linear | None:
        weight = argument(node, 1, "other", node.kwargs.get("mat2"))
        return self._make(node, argument(node, 0, "input"), weight, None, stored_in_out=True)

    def einsum(self, node: Node) -> Linear | None:
        equation: Any = node.args[0]
        operands: list[Any] = list(node.args[1:])
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands = list(operands[0])
        if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
            return None
        inputs, result = equation.replace(" ", "").split("->")
        terms = inputs.split(",")
        if self._matrix(operands[0])[0] is not None:
            operands, terms = operands[::-1], terms[::-1]
        (x, weight), (at, letters) = operands, terms
        shared = [c for c in letters if c in at and c not in result]
        kept = [c for c in letters if c not in at and c in result]
        if len(shared) + len(kept) != len(letters) or not shared or not kept:
            return None
        plain = len(letters) == 2 and at[-1:] == shared[0] and result == at[:-1] + kept[0]
        if plain:
            return self._make(node, x, weight, None, stored_in_out=letters[0] == shared[0])
        sizes = dict(zip(letters, self._shape(weight), strict=False))
        if len(sizes) != len(letters) or not isinstance(x, Node):
            return None
        d_in, d_out = (math.prod(sizes[c] for c in group) for group in (shared, kept))
        return Linear(node, x, weight, None, False, d_in, d_out, None)

    def tensordot(self, node: Node) -> Linear | None:
        x, weight, dims = (argument(node, i, n) for i, n in enumerate(("a", "b", "dims")))
        if not isinstance(x, Node):
            return None
        if op_name(node) == "tensordot" and len(node.args) == 4:  # aten: one list per operand
            dims = node.args[2:4]
        first, second = ([-1], [0]) if dims == 1 else dims if _pair(dims) else ([], [])
        shape = shape_of(x)
        last = {-1, len(shape) - 1} if shape is not None else {-1}
        if len(first) != 1 or len(second) != 1 or first[0] not in last:
            return None
        return self._make(node, x, weight, None, stored_in_out=second[0] in (0, -2))

    def conv(self, node: Node) -> Linear | None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        x, weight, bias, stride, padding, _, groups = (
            argument(node, i, n) for i, n in enumerate(names)
        )
        tensor = self.parameter(weight)
        if tensor is None or not isinstance(x, Node) or any(s != 1 for s in tensor.shape[2:]):
            return None
        if not (_all(stride, 1) and (padding == "valid" or _all(padding, 0))):
            return None
        if not _is_plain(tensor) or (bias is not None and self.parameter(bias) is None):
            return None
        grouped = groups not in (None, 1)
        d_out, d_in = tensor.shape[0], tensor.shape[1] * (groups if grouped else 1)
        axis = None if grouped else 1 - tensor.dim()
        return Linear(node, x, weight, bias, False, d_in, d_out, axis)

    def _make(
        self, node: Node, x: Any, weight: Any, bias: Any, *, stored_in_out: bool
    ) -> Linear | None:
        found, swapped = self._matrix(weight)
        transposed = stored_in_out != swapped
        if not isinstance(x, Node):
            return None
        tensor = self.parameter(found)
        if tensor is None or found is None:
            self._refuse(node, found)
            return None
        if not _is_plain(tensor) or tensor.dim() != 2:
            kind = f"{type(tensor).__name__} of shape {list(tensor.shape)} and {tensor.dtype}"
            self.refused[node] = Miss(node, f"its weight is a {kind}, not a plain matrix")
            return None
        if bias is not None:
            bias = self._vector(bias)
            if bias is None:
                self.refused[node] = Miss(node, "its bias is not a parameter of its own")
                return None
        d_out, d_in = reversed(tensor.shape) if transposed else tensor.shape
        if bias is not None and tuple(self.parameter(bias).shape) != (d_out,):
            self.refused[node] = Miss(node, "its bias is not one value per feature")
            return None
        return Linear(node, x, found, bias, transposed, d_in, d_out)

    def _matrix(self, weight: Any) -> tuple[Node | None, bool]:
        """The parameter node behind a weight operand, and whether it was transposed on the way."""
        swapped = False
        while isinstance(weight, Node) and self.parameter(weight) is None:
            if is_matrix_transpose(weight):
                swapped = not swapped
            elif not _adds_batch(weight):
                return None, False
            inner = weight.args[0]
            assert isinstance(inner, Node)
            weight = inner
        return (weight, swapped) if isinstance(weight, Node) else (None, False)

    def _vector(self, bias: Any) -> Node | None:
        """The vector parameter behind a bias operand, which may have been given leading axes."""
        while isinstance(bias, Node) and self.parameter(bias) is None:
            if not _adds_batch(bias):
                return None
            bias = bias.args[0]
        tensor = self.parameter(bias)
        return bias if tensor is not None and tensor.dim() == 1 else None

    def _shape(self, weight: Any) -> tuple[int, ...]:
        tensor = self.parameter(weight)
        return tuple(tensor.shape) if tensor is not None and _is_plain(tensor) else ()

    def _refuse(self, node: Node, found: Node | None) -> None:
        """Say why a linear call is none; products of two activations are no linears at all."""
        if op_name(node) == "linear":
            self.refused[node] = Miss(
                node, "its weight is computed or held outside of the parameters: parametrised, shared "
                "out by other code, or quantised"
            )  # fmt: skip


_FORMS = {
    "linear": _Reader.linear,
    "addmm": _Reader.addmm,
    "baddbmm": _Reader.addmm,
    "einsum": _Reader.einsum,
    "tensordot": _Reader.tensordot,
    **dict.fromkeys(_PRODUCTS, _Reader.product),
    **dict.fromkeys(CONVOLUTIONS, _Reader.conv),
}


def _pair(dims: Any) -> bool:
    return isinstance(dims, (tuple, list)) and len(dims) == 2


def _all(value: Any, wanted: int) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    return value is None or all(bool(v == wanted) for v in values)


def _adds_batch(node: Node) -> bool:
    """Whether a call only adds leading axes to a matrix: unsqueeze(0), [None], expand."""
    if op_name(node) == "unsqueeze":
        return bool(argument(node, 1, "dim") == 0)
    if op_name(node) == "getitem":
        return node.args[1] in (None, (None,), (None, ...))
    return op_name(node) in ("expand", "broadcast_to")


def is_matrix_transpose(node: Node) -> bool:
    """Whether a call swaps the last two axes; `permute(0, 1)` does not."""
    if op_name(node) not in TRANSPOSES or node.kwargs:
        return False
    # getattr(w, "T") has a name among its arguments.
    dims: list[Any] = [d for d in node.args[1:] if not isinstance(d, str)]
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = list(dims[0])
    if not dims:
        return True
    if not all(isinstance(d, int) for d in dims):
        return False
    if op_name(node) == "permute":
        n = len(dims)
        return [d % n for d in dims] == [*range(n - 2), n - 1, n - 2]
    shape = shape_of(node)
    rank = len(shape) if shape is not None else 2
    return {d % rank for d in dims} == {rank - 2, rank - 1}


def _is_plain(tensor: Tensor) -> bool:
    """Whether a weight can be permuted in place: no subclass, no quantised storage."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.is_floating_point() and not tensor.is_sparse
