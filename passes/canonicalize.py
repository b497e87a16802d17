"""One spelling of linears and elementwise calls, as a view: the graph itself is not edited.

    Linear   y = x W^T + b          from linear, addmm (GPT-2's Conv1D), matmul and mm
    op_name  "relu"                 from F.relu, torch.relu, x.relu(), x.relu_(), aten.relu.default

A view is made once per graph and shared by all rules. Leaving the graph as captured means that
whatever no rule converts runs exactly as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..capture import Captured
from ..ir import Miss

_ALIASES = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div",
    "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "ipow": "pow",
    "__pow__": "pow", "negative": "neg", "clip": "clamp", "max": "maximum", "min": "minimum",
    "float_power": "pow", "greater": "gt", "less": "lt", "absolute": "abs", "imatmul": "matmul",
    "clamp_min": "clamp", "special_erf": "erf", "special_expit": "sigmoid", "swish": "silu",
    "where_self": "where", "_threshold": "threshold", "_to_copy": "to", "type": "to", "expand_as": "expand",
}  # fmt: skip
IDENTITIES = ("contiguous", "clone", "identity", "detach", "alias", "lift_fresh_copy")
VIEWS = ("view", "reshape", "flatten", "unsqueeze", "squeeze", "_unsafe_view", "unflatten")
CASTS = ("to", "float", "half", "bfloat16", "double", "type_as")
TRANSPOSES = ("t", "transpose", "permute", "adjoint", "numpy_T", "mT", "T", "swapaxes", "swapdims")
_CONSTANTS = ("_tensor_constant", "lifted_tensor_")  # named so by torch.fx and torch.export
SHAPE_ONLY = (
    "size", "dim", "shape", "ndim", "dtype", "device", "numel", "sym_size", "is_floating_point",
    "_assert_tensor_metadata",
)  # fmt: skip


def op_name(node: Node) -> str:
    """The canonical name of what a node calls, "" for nodes that call nothing.

    Overload, trailing underscore of in-place variants, and in-place operators are dropped.
    """
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = target._schema.name.split("::")[1]
        elif target is getattr and len(node.args) > 1:
            name = str(node.args[1])
        else:
            name = getattr(target, "__name__", str(target))
    else:
        return ""
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _ALIASES.get(name, name)


def shape_of(node: Node) -> tuple[Any, ...] | None:
    """The node's shape from its captured example, or None when the graph carries no examples."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return tuple(value.shape) if isinstance(value, Tensor) else None


def dtype_of(node: Node) -> torch.dtype | None:
    """The node's dtype from its captured example, or None."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value.dtype if isinstance(value, Tensor) else None


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are equal without guarding on a symbolic one."""
    return statically_known_true(left == right)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """The argument of a call at `position`, or by keyword `name`."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b: W [d_out, d_in], or [d_in, d_out] when transposed; b [d_out] or None."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    transposed: bool
    d_in: int
    d_out: int


class View:
    """The canonical view of one captured graph."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.mutations: list[tuple[Node, Node]] | None = None  # in-place calls, see inplace.py
        self.refused: dict[Node, Miss] = {}  # what no walk gets past, see region.py

    @cached_property
    def linears(self) -> dict[Node, Linear]:
        """Every linear layer whose weight is a plain floating-point 2-D parameter."""
        found: dict[Node, Linear] = {}
        for node in self.captured.gm.graph.nodes:
            linear = self._linear(node)
            if linear is not None:
                found[node] = linear
        return found

    @cached_property
    def order(self) -> dict[Node, int]:
        """The position of every node in execution order."""
        return {node: index for index, node in enumerate(self.captured.gm.graph.nodes)}

    @cached_property
    def nodes_of(self) -> dict[int, list[Node]]:
        """The nodes that stand for each parameter, by the parameter's identity."""
        found: dict[int, list[Node]] = {}
        for node, tensor in self.captured.tensors.items():
            found.setdefault(id(tensor), []).append(node)
        return found

    @cached_property
    def autocast(self) -> bool:
        """Whether any of the graph runs under autocast, entered inside of it or around the capture."""
        inside = any("enter_autocast" in op_name(node) for node in self.captured.gm.graph.nodes)
        return inside or any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))

    def parameter(self, node: Any) -> Tensor | None:
        """The parameter behind a placeholder or get_attr node, or None; a buffer is none."""
        tensor = self.captured.tensors.get(node) if isinstance(node, Node) else None
        return tensor if isinstance(tensor, torch.nn.Parameter) else None

    def constant(self, node: Node) -> float | None:
        """The number behind `torch.tensor(0.5)` or a symbolic float in the traced code, or None.

        dynamic=True makes symbols of floats such as math.pi: asking for the number adds a guard.
        """
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymFloat) and value.node.has_hint():
            return float(value)
        if op_name(node) == "tensor" and not node.kwargs and len(node.args) == 1:
            number = node.args[0]
            return number if isinstance(number, (int, float)) else None
        tensor = self.captured.tensors.get(node)
        if tensor is None or tensor.dim() or not str(node.target).startswith(_CONSTANTS):
            return None
        return float(tensor)

    def users(self, node: Node) -> Iterator[Node]:
        """Users of a node that read its values, not only its shape, dtype or number of chunks."""
        for user in node.users:
            name = op_name(user)
            if name not in SHAPE_ONLY and (name != "getitem" or user.users):
                yield user

    def _linear(self, node: Node) -> Linear | None:
        match op_name(node):
            case "linear":
                return self._make(
                    node,
                    argument(node, 0, "input"),
                    argument(node, 1, "weight"),
                    argument(node, 2, "bias"),
                    stored_in_out=False,
                )
            case "addmm" if node.op == "call_function" and _unscaled(node):
                bias, x, weight = (
                    argument(node, 0, "input"),
                    argument(node, 1, "mat1"),
                    argument(node, 2, "mat2"),
                )
                return self._make(node, x, weight, bias, stored_in_out=True)
            case "matmul" | "mm":
                x = argument(node, 0, "input")
                weight = argument(node, 1, "other", node.kwargs.get("mat2"))
                return self._make(node, x, weight, None, stored_in_out=True)
        return None

    def _make(
        self, node: Node, x: Any, weight: Any, bias: Any, *, stored_in_out: bool
    ) -> Linear | None:
        transposed = stored_in_out
        while isinstance(weight, Node) and _is_matrix_transpose(weight):
            weight, transposed = weight.args[0], not transposed
        tensor = self.parameter(weight)
        if not isinstance(x, Node) or tensor is None or not _plain_matrix(tensor):
            return None
        if bias is not None and self.parameter(bias) is None:
            return None
        d_out, d_in = reversed(tensor.shape) if transposed else tensor.shape
        return Linear(node, x, weight, bias, transposed, d_in, d_out)


def _unscaled(node: Node) -> bool:
    return all(node.kwargs.get(name, 1) == 1 for name in ("alpha", "beta"))


def _is_matrix_transpose(node: Node) -> bool:
    """Whether a call swaps both axes of a matrix; `permute(0, 1)` does not."""
    if op_name(node) not in TRANSPOSES or node.kwargs:
        return False
    dims = [d for d in node.args[1:] if not isinstance(d, str)]  # getattr(w, "T") has a name there
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = list(dims[0])
    if op_name(node) == "permute":
        return [d % 2 if isinstance(d, int) else d for d in dims] == [1, 0]
    return not dims or {d % 2 if isinstance(d, int) else d for d in dims} == {0, 1}


def _plain_matrix(tensor: Tensor) -> bool:
    """Whether a linear's weight can be permuted in place: no subclass, no quantised storage."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.dim() == 2 and tensor.is_floating_point() and not tensor.is_sparse
