"""One canonical view of a captured graph, shared by all rules; the graph itself is not edited.

Leaving the graph as captured means that whatever no rule converts runs exactly as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..capture import Captured
from ..ir import Miss
from .inplace import changed_by, origin
from .linear import Linear, linears_of
from .names import SHAPE_ONLY, op_name

_CONSTANTS = ("_tensor_constant", "lifted_tensor_")  # named so by torch.fx and torch.export


class View:
    """The canonical view of one captured graph."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.mutations: list[tuple[Node, Node]] | None = None  # in-place calls, see inplace.py
        self.writes: dict[Node, list[Node]] | None = None  # see inplace.py
        self.refused: dict[Node, Miss] = {}  # what no walk gets past, see region.py
        self.around: dict[Node, set[str]] | None = None  # linears at attention, see around.py

    @cached_property
    def _linears(self) -> tuple[dict[Node, Linear], dict[Node, Miss]]:
        return linears_of(self.captured.gm.graph.nodes, self.parameter)

    @property
    def linears(self) -> dict[Node, Linear]:
        """Every linear layer whose weight is a plain floating-point parameter, by its last node."""
        return self._linears[0]

    @cached_property
    def calls(self) -> dict[Node, Linear]:
        """The linear layer that each of its calls belongs to, such as the product under a bias."""
        return {n: linear for linear in self.linears.values() for n in (*linear.parts, linear.node)}

    @property
    def unusable(self) -> dict[Node, Miss]:
        """Linear calls whose weight or bias is no parameter that could be permuted in place."""
        return self._linears[1]

    @cached_property
    def runtime(self) -> set[Node]:
        """The nodes whose values depend on what the model is called with, not only on its state.

        Memory into which such a value is written in place, a cache for one, is among them.
        """
        found: set[Node] = set()
        for node in self.captured.gm.graph.nodes:
            if node.op == "placeholder":
                if node not in self.captured.tensors and not is_buffer(node):
                    found.add(node)
            elif op_name(node) == "embedding":
                found.add(node)  # of tokens, the first of which a model may make itself
            elif op_name(node) not in SHAPE_ONLY and any(n in found for n in node.all_input_nodes):
                found.add(node)
                target = changed_by(node)
                if target is not None:
                    found.add(origin(target))
        return found

    @cached_property
    def order(self) -> dict[Node, int]:
        """The position of every node in execution order."""
        return {node: index for index, node in enumerate(self.captured.gm.graph.nodes)}

    @cached_property
    def grad_switches(self) -> list[int]:
        """The positions at which the graph turns gradients on or off."""
        return [i for node, i in self.order.items() if op_name(node) == "_set_grad_enabled"]

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

    def scalar(self, node: Node) -> bool:
        """Whether a node is one number for the whole call, such as a buffer that tunes an activation."""
        if node.op not in ("placeholder", "get_attr"):
            return False
        value = node.meta.get("example_value", node.meta.get("val"))
        tensor = value if isinstance(value, Tensor) else self.captured.tensors.get(node)
        return (
            tensor is not None and tuple(tensor.shape) in ((), (1,)) and tensor.is_floating_point()
        )

    def users(self, node: Node) -> Iterator[Node]:
        """Users of a node that read its values, not only its shape, dtype or number of chunks."""
        for user in node.users:
            name = op_name(user)
            if name not in SHAPE_ONLY and (name != "getitem" or user.users):
                yield user


def is_buffer(node: Node) -> bool:
    """Whether a placeholder of a Dynamo graph is a module's buffer, by its source."""
    source = getattr(node, "_dynamo_source", None)
    return "._buffers[" in str(getattr(source, "name", ""))
