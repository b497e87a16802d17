"""What a node calls, under one name for all spellings, and what is known of its value.

op_name  "relu"    from F.relu, torch.relu, x.relu(), x.relu_(), aten.relu.default
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

_ALIASES = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div",
    "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "ipow": "pow",
    "__pow__": "pow", "negative": "neg", "clip": "clamp", "max": "maximum", "min": "minimum",
    "float_power": "pow", "greater": "gt", "less": "lt", "absolute": "abs", "imatmul": "matmul",
    "clamp_min": "clamp", "special_erf": "erf", "special_expit": "sigmoid", "swish": "silu",
    "where_self": "where", "_threshold": "threshold", "_to_copy": "to", "type": "to", "expand_as": "expand",
}  # fmt: skip
IDENTITIES = ("contiguous", "clone", "identity", "alias", "lift_fresh_copy")
VIEWS = (
    "view", "reshape", "flatten", "unsqueeze", "squeeze", "_unsafe_view", "unflatten", "reshape_as",
    "view_as",
)  # fmt: skip
CASTS = ("to", "float", "half", "bfloat16", "double", "type_as")
TRANSPOSES = ("t", "transpose", "permute", "adjoint", "numpy_T", "mT", "T", "swapaxes", "swapdims")
NORMS = (
    "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "normalize", "norm",
    "linalg_vector_norm", "vector_norm", "mean", "var", "native_layer_norm", "_native_batch_norm",
    "sum",
)  # fmt: skip
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
