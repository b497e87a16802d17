"""Halves of a fused projection: chunk(u, 2), split(u, H), u[..., :H] and glu(u) of a linear u."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..ir import Miss
from .canonicalize import IDENTITIES, Linear, View, argument, op_name, shape_of

SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split")
_UNEVEN = "the fused projection is not split into two equal halves"


@dataclass(frozen=True)
class Leaf:
    """A variable of a region: a whole linear (half None) or its first or second half (0 or 1)."""

    linear: Linear
    half: int | None = None


class Refuse(Exception):
    """Raised inside a walk with the Miss that explains where it had to stop."""

    def __init__(self, node: Any, reason: str) -> None:
        super().__init__(reason)
        self.miss = Miss(node, reason)


def half_of(view: View, node: Node) -> tuple[Leaf, list[Node]] | None:
    """The half of a linear that `node` is, and the calls that take it; None if it is none."""
    if op_name(node) == "slice":
        parent, dim, start, stop, step = (*node.args, *[None] * (5 - len(node.args)))[:5]
        return _slice(view, node, parent, dim, start, stop, step)
    if op_name(node) != "getitem":
        return None
    parent, index = node.args
    if isinstance(parent, Node) and op_name(parent) in SPLITS and isinstance(index, int):
        return _chunk(view, node, parent, index)
    keys = index if isinstance(index, tuple) else (index,)
    if keys and isinstance(keys[-1], slice) and all(k in (..., slice(None)) for k in keys[:-1]):
        return _slice(view, node, parent, -1, keys[-1].start, keys[-1].stop, keys[-1].step)
    return None


def both_halves(view: View, node: Node) -> tuple[Leaf, Leaf]:
    """The halves that glu(u) multiplies."""
    linear, passed = _linear_behind(view, argument(node, 0, "input"))
    dim = argument(node, 1, "dim", -1)
    if linear is None or passed or linear.d_out % 2 or dim not in (-1, _rank(linear) - 1):
        raise Refuse(node, "glu of something else than a linear's features")
    return Leaf(linear, 0), Leaf(linear, 1)


def _linear_behind(view: View, node: Any) -> tuple[Linear | None, list[Node]]:
    """The linear that a node carries, and the copies between them."""
    passed = []
    while isinstance(node, Node) and op_name(node) in IDENTITIES:
        passed.append(node)
        node = node.args[0]
    return view.linears.get(node), passed


def _rank(linear: Linear) -> int:
    return len(shape_of(linear.node) or ())


def _chunk(view: View, node: Node, split: Node, index: int) -> tuple[Leaf, list[Node]] | None:
    linear, passed = _linear_behind(view, argument(split, 0, "input"))
    if linear is None:
        return None
    size = argument(split, 1, "chunks", argument(split, 1, "split_size_or_sections"))
    if size is None:
        size = split.kwargs.get("split_size")
    dim = argument(split, 2, "dim", 0)
    if dim not in (-1, _rank(linear) - 1):
        raise Refuse(node, f"the fused projection is split along axis {dim}, not its features")
    half = linear.d_out // 2
    if isinstance(size, (tuple, list)):
        even = list(size) == [half, half]
    else:
        even = size == (2 if op_name(split) in ("chunk", "tensor_split") else half)
    if not even or linear.d_out % 2 or index not in (0, 1, -1, -2):
        raise Refuse(node, _UNEVEN)
    return Leaf(linear, index % 2), [*passed, split, node]


def _slice(
    view: View, node: Node, parent: Any, dim: Any, start: Any, stop: Any, step: Any
) -> tuple[Leaf, list[Node]] | None:
    linear, passed = _linear_behind(view, parent)
    if linear is None or dim not in (-1, _rank(linear) - 1):
        return None
    if any(isinstance(v, Node) for v in (start, stop, step)):
        return None
    span = range(linear.d_out)[slice(start, stop, step)]
    half = linear.d_out // 2
    if linear.d_out % 2 or span not in (range(half), range(half, linear.d_out)):
        raise Refuse(node, _UNEVEN)
    return Leaf(linear, 0 if span.start == 0 else 1), [*passed, node]
