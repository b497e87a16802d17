"""Triton's interpreter made to round as devices do, and to run programs in another order.

The interpreter multiplies the bits of bf16 as integers and cuts fp32 off instead of rounding it (Triton 3.6
to 3.9; its maintainers do not support bf16 there). Import after TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """fp32 of bf16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """bf16 bits of fp32, to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    near = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), near)


def use_right_bf16() -> None:
    """Let products, casts and loads of bf16 in the interpreter mean what they mean on a device."""
    dot, cast = Builder.create_dot, Builder.cast_impl

    def create_dot(self, a, b, d, *rest):
        wide = [
            Handle(widened(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t
            for t in (a, b)
        ]
        return dot(self, *wide, d, *rest)

    def cast_impl(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return Handle(widened(src.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return Handle(rounded(src.data), tl.bfloat16)
        if kinds[1] == tl.bfloat16 and kinds[0].is_int():
            return Handle(rounded(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst_type)

    Builder.create_dot, Builder.cast_impl = create_dot, cast_impl


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Run the programs of every launch in a random order instead of the grid's."""
    set_grid_idx, orders = Builder.set_grid_idx, {}
    draw = random.Random(seed)

    def moved(self, *place):
        size = tuple(self.grid_dim)
        if place == (0,) * len(place):
            every = [tuple(int(i) for i in idx) for idx in np.ndindex(size)]
            orders[size] = dict(zip(every, draw.sample(every, len(every)), strict=True))
        set_grid_idx(self, *orders[size][place])

    Builder.set_grid_idx = moved
    try:
        yield
    finally:
        Builder.set_grid_idx = set_grid_idx
