"""Halves of a fused projection u [..., 2 H], whatever way they are taken.

chunk(u, 2), split(u, H), u[..., :H], glu(u), u.view(..., 2, H).unbind(-2)    one after the other
u[..., ::2], u.view(..., H, 2)[..., 0]                                        interleaved
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..ir import Miss
from .linear import Linear
from .names import IDENTITIES, VIEWS, argument, op_name, shape_of

SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
_UNEVEN = "the fused projection is not split into two equal halves"


@dataclass(frozen=True)
class Leaf:
    """A variable of a region: a whole linear (half None) or one half of it, 0 or 1.

    interleaved: whether the halves alternate, even features being half 0.
    """

    linear: Linear
    half: int | None = None
    interleaved: bool = False


Half = tuple[Leaf, list[Node]]


class Refuse(Exception):
    """Raised inside a walk with the Miss that explains where it had to stop."""

    def __init__(self, node: Any, reason: str) -> None:
        super().__init__(reason)
        self.miss = Miss(node, reason)


def half_of(linears: dict[Node, Linear], node: Node) -> Half | None:
    """The half of a linear that `node` is, and the calls that take it; None if it is none."""
    return _Halves(linears).of(node)


def both_halves(linears: dict[Node, Linear], node: Node) -> tuple[Leaf, Leaf]:
    """The halves that glu(u) multiplies."""
    linear, passed = _Halves(linears).behind(argument(node, 0, "input"))
    if linear is None or passed or linear.d_out % 2:
        raise Refuse(node, "glu of something else than a linear's features")
    if not _is_axis(linear, argument(node, 1, "dim", -1)):
        raise Refuse(node, "glu of something else than a linear's features")
    return Leaf(linear, 0), Leaf(linear, 1)


class _Halves:
    def __init__(self, linears: dict[Node, Linear]) -> None:
        self.linears = linears

    def of(self, node: Node) -> Half | None:
        name = op_name(node)
        if name == "slice":
            parent, dim, start, stop, step = (*node.args, *[None] * (5 - len(node.args)))[:5]
            return self._slice(node, parent, dim or 0, slice(start, stop, step))
        if name == "narrow":
            parent, dim, start, length = (
                argument(node, i, n) for i, n in enumerate(("input", "dim", "start", "length"))
            )
            if isinstance(start, int) and isinstance(length, int):
                return self._slice(node, parent, dim, slice(start, start + length))
        if name in ("select", "squeeze") and isinstance(node.args[0], Node):
            if name == "squeeze":
                return self._squeezed(node)
            index = argument(node, 2, "index")
            return self._pair(node, node.args[0], argument(node, 1, "dim"), index)
        if name != "getitem" or not isinstance(node.args[0], Node):
            return None
        parent, index = node.args
        assert isinstance(parent, Node)
        if op_name(parent) in SPLITS:
            return self._piece(node, parent, index) if isinstance(index, int) else None
        keys = index if isinstance(index, tuple) else (index,)
        return self._keys(node, parent, keys)

    def behind(self, node: Any) -> tuple[Linear | None, list[Node]]:
        """The linear that a node carries, and the copies between them."""
        passed = []
        while isinstance(node, Node) and op_name(node) in IDENTITIES and node not in self.linears:
            passed.append(node)
            node = node.args[0]
        linear = self.linears.get(node)
        return (linear if linear is not None and linear.axis is not None else None), passed

    def _keys(self, node: Node, parent: Node, keys: tuple[Any, ...]) -> Half | None:
        """u[..., a:b:c] of a linear, or u[..., 0, :] of a pair of halves."""
        picked = [i for i, k in enumerate(keys) if k is not ... and k != slice(None)]
        if len(picked) != 1 or any(k is None for k in keys):
            return None
        place = picked[0]
        shape = shape_of(parent)
        if ... in keys[:place]:
            axis = place - len(keys)
        elif shape is not None:
            axis = place - len(shape)
        elif place == len(keys) - 1:
            axis = -1  # of another axis, the features would be too many for what reads them
        else:
            return None
        key = keys[place]
        if isinstance(key, slice):
            return self._slice(node, parent, axis, key)
        return self._pair(node, parent, axis, key) if isinstance(key, int) else None

    def _piece(self, node: Node, split: Node, index: int) -> Half | None:
        source = argument(split, 0, "input")
        if op_name(split) == "unbind":
            found = self._pair(node, source, argument(split, 1, "dim", 0), index)
            return (found[0], [*found[1][:-1], split, node]) if found else None
        linear, passed = self.behind(source)
        if linear is None:
            return None
        size = argument(split, 1, "chunks", argument(split, 1, "split_size_or_sections"))
        if size is None:
            size = split.kwargs.get("split_size")
        dim = argument(split, 2, "dim", 0)
        if not _is_axis(linear, dim):
            raise Refuse(node, f"the fused projection is split along axis {dim}, not its features")
        half = linear.d_out // 2
        if isinstance(size, (tuple, list)):
            even = list(size) == [half, half]
        else:
            even = size == (2 if op_name(split) in ("chunk", "tensor_split") else half)
        if not even or linear.d_out % 2 or index not in (0, 1, -1, -2):
            raise Refuse(node, _UNEVEN)
        return Leaf(linear, index % 2), [*passed, split, node]

    def _slice(self, node: Node, parent: Any, dim: Any, key: slice) -> Half | None:
        linear, passed = self.behind(parent)
        if linear is None or not _is_axis(linear, dim):
            return None
        if any(isinstance(v, Node) for v in (key.start, key.stop, key.step)):
            return None
        span, half = range(linear.d_out)[key], linear.d_out // 2
        halves = {
            range(half): (0, False),
            range(half, linear.d_out): (1, False),
            range(0, linear.d_out, 2): (0, True),
            range(1, linear.d_out, 2): (1, True),
        }
        if linear.d_out % 2 or span not in halves:
            raise Refuse(node, _UNEVEN)
        return Leaf(linear, *halves[span]), [*passed, node]

    def _pair(self, node: Node, view: Any, dim: Any, index: Any) -> Half | None:
        """Half `index` of view(u, ..., 2, H) along axis -2, or of view(u, ..., H, 2) along -1."""
        if not isinstance(view, Node) or op_name(view) not in VIEWS or not isinstance(dim, int):
            return None
        linear, passed = self.behind(view.args[0])
        if linear is None or linear.axis != -1 or linear.d_out % 2 or index not in (0, 1, -1, -2):
            return None
        sizes = _last_sizes(view, linear.d_out)
        shape = shape_of(view)
        if dim >= 0:
            if shape is None:
                return None
            dim -= len(shape)
        pairs = {(2, linear.d_out // 2): -2, (linear.d_out // 2, 2): -1}
        if pairs.get(sizes) != dim:
            return None
        return Leaf(linear, index % 2, dim == -1), [*passed, view, node]

    def _squeezed(self, node: Node) -> Half | None:
        """A half cut out of a pair by chunk(2), which leaves an axis of one behind."""
        piece = node.args[0]
        if not isinstance(piece, Node) or op_name(piece) != "getitem":
            return None
        split, index = piece.args
        if not isinstance(split, Node) or op_name(split) not in ("chunk", "tensor_split"):
            return None
        dim = argument(split, 2, "dim", 0)
        if argument(split, 1, "chunks") != 2 or argument(node, 1, "dim") != dim:
            return None
        found = self._pair(piece, argument(split, 0, "input"), dim, index)
        return (found[0], [*found[1][:-1], split, piece, node]) if found else None


def _last_sizes(view: Node, d_out: int) -> tuple[Any, ...]:
    """The last two sizes of a reshape of d_out features, or () if they are not in the graph."""
    shape = shape_of(view)
    if shape is not None:
        return tuple(s if isinstance(s, int) else None for s in shape[-2:])
    sizes: list[Any] = []
    for value in view.args[1:]:
        sizes += list(value) if isinstance(value, (tuple, list)) else [value]
    last = sizes[-2:]
    if len(last) < 2 or not all(isinstance(size, int) for size in last):
        return ()
    known = [size for size in last if size != -1]
    return tuple(d_out // known[0] if size == -1 else size for size in last) if known else ()


def _is_axis(linear: Linear, dim: Any) -> bool:
    """Whether a dimension given by the caller is the linear's feature axis."""
    shape = shape_of(linear.node)
    if dim == linear.axis:
        return True
    return shape is not None and linear.axis is not None and dim == len(shape) + linear.axis
