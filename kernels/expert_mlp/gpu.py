"""expert_mlp in Triton: generated kernels for many tokens (kernels/gpu/experts.py) and few (decode.py).

Four ways to the same sums. `decode`: the weights of the union of chosen experts are read once by the
whole device; for few tokens. `pairs`: tokens grouped per expert, each pair's product stored and the
products of a token added in the order of its experts; the default for many. `atomic`: the same, added
with atomics, so that the last bits vary. `dense`: every expert through the device's own matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from ...expr import parse
from .. import device, emit, native, render
from ..device import padded, programs
from . import expert_mlp

FEW = 64  # tokens up to which the union of chosen experts is streamed
ROWS_BYTES = 256 << 20  # of the buffer of pairs' products, whose columns are worked off in chunks
MOST_EXPERTS = 1024
MOST_COLUMNS = 1024  # of a program that adds up pairs
SHARE = 0.2  # executed share that the closed form expects where nothing is known


@dataclass(frozen=True)
class Tile:
    """One program's part of a product: rows (pairs or tokens), neurons or columns, summed features."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Schedule:
    """How a block runs for one number of tokens.

    Attributes:
        strategy: "decode", "pairs", "atomic" or "dense".
        up, down: tiles of the two products.
        swap: whether weights are the first operand, for few rows an expert.
        tma: whether weights are read through descriptors (Hopper and later).
        splits: programs that share the chosen experts for the same columns of the output (decode).
        per_multiprocessor: programs of the persistent kernels.
    """

    strategy: str
    up: Tile
    down: Tile
    swap: bool = False
    tma: bool = False
    splits: int = 8
    per_multiprocessor: int = 2


@dataclass(frozen=True)
class Spec:
    """What generated kernels depend on: sizes, the activation and its scalars, how fp32 is multiplied."""

    d: int
    out: int
    experts: int
    size: int
    gated: bool
    activation: str
    precision: str = "ieee"

    def __str__(self) -> str:
        kind = "gated" if self.gated else "plain"
        return f"{kind} {self.d} -> {self.experts} x {self.size} -> {self.out}, {self.activation}"


def source(spec: Spec) -> str:
    """The source of a block's kernels. Raises KernelError for an activation without Triton spelling."""
    constants: dict[str, bool | int | str] = {
        "D": spec.d, "D_PADDED": padded(spec.d), "OUT": spec.out, "E": spec.experts,
        "E_PADDED": padded(spec.experts), "F": spec.size, "GATED": spec.gated,
        "PRECISION": spec.precision,
    }  # fmt: skip
    title = f"Experts of a block: {spec}."
    return render.render(title, ["experts.py", "decode.py"], constants, _functions(spec.activation))


def _functions(text: str) -> str:
    """Triton functions of an activation text: `activation`, which loads its scalars, and what it calls."""
    count = 1 + max(
        (int(name[1:]) for name in parse(text).variables() if name[0] == "p"), default=-1
    )
    loads = "".join(f"tl.load(p_ptr + {i}), " for i in range(count))
    wrapper = (
        f"@triton.jit\ndef activation(up, gate, p_ptr):\n    return value(up, gate, ({loads}))"
    )
    value = emit.activation_source(text, "value", "triton")
    return "\n\n\n".join(
        part for part in (emit.library_source(text).strip(), value, wrapper) if part
    )


@lru_cache(maxsize=256)
def _source(spec: Spec) -> str | None:
    try:
        return source(spec)
    except KernelError:
        return None


def spec_of(
    x: Tensor, offsets: Tensor, w_up: Tensor, w_gate: Tensor | None, w_down: Tensor, activation: str
) -> Spec:
    experts = offsets.numel() - 1
    return Spec(
        d=x.shape[-1],
        out=w_down.shape[1],
        experts=experts,
        size=w_up.shape[0] // experts,
        gated=w_gate is not None,
        activation=activation,
        precision=device.precision(x.dtype),
    )


def default(spec: Spec, rows: int, itemsize: int, share: float = SHARE) -> Schedule:
    """The closed-form schedule for T rows and an expected executed share, of elements of itemsize bytes."""
    deep = 128 // itemsize  # features of one line of 128 bytes
    if rows == 1:
        whole = max(1, min(8, (1 << 15) // padded(spec.d)))
        return Schedule("decode", Tile(1, whole, 0, 8, 1), Tile(1, 128, padded(spec.size), 8, 1))
    if rows <= FEW:
        few = Tile(padded(rows), 16, min(4 * deep, padded(spec.d)), 4, 4)
        return Schedule("decode", few, Tile(padded(rows), 128, 32, 4, 4))
    per_expert = min(128, padded(round(share * rows)))
    wide = min(128 if itemsize == 2 else 64, padded(spec.size))
    gated_wide = min(64, wide) if spec.gated else wide
    warps = 8 if per_expert == 128 else 4
    up = Tile(per_expert, gated_wide, deep, warps, 3)
    down = Tile(per_expert, min(128 if itemsize == 2 else 64, padded(spec.out)), deep, warps, 3)
    return Schedule("pairs", up, down, swap=per_expert < 64)


def accepts(x: Tensor, tokens: Tensor, offsets: Tensor, slots: Tensor, *others: Any) -> bool:
    """Whether all is on one device in one supported dtype, and nothing but plain experts is asked for."""
    *slabs, noise, scalars, activation = others
    given = [t for t in (x, *slabs) if t is not None]
    if noise is not None or x.dtype not in device.DTYPES or any(t.dtype != x.dtype for t in given):
        return False
    if any(s.numel() != 1 for s in scalars) or offsets.numel() - 1 > MOST_EXPERTS:
        return False
    if not device.takes((*given, tokens, offsets, slots, *scalars), x.device):
        return False
    w_up, w_gate, w_down = slabs[:3]
    return _source(spec_of(x, offsets, w_up, w_gate, w_down, activation)) is not None


def run(
    x: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    slots: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    noise: Tensor | None,
    scalars: list[Tensor],
    activation: str,
) -> Tensor:
    """The block's output from the chosen experts, [..., D]."""
    spec = spec_of(x, offsets, w_up, w_gate, w_down, activation)
    rows = x.reshape(-1, spec.d).contiguous()
    y = rows.new_empty(*x.shape[:-1], spec.out)
    if len(rows):
        weights = dict(zip(native.SLABS, (w_up, w_gate, w_down, b_up, b_gate, b_down), strict=True))
        chosen = default(spec, len(rows), x.element_size())
        call = Call(spec, rows, (tokens, offsets, slots), weights, scalars, y.view(-1, spec.out))
        with device.on(x.device):
            call.run(chosen)
    return y


class Call:
    """One call of a block's kernels: rows [T, D], lists, slabs and biases by name, output y [T, OUT]."""

    def __init__(
        self,
        spec: Spec,
        rows: Tensor,
        lists: tuple[Tensor, Tensor, Tensor],
        weights: dict[str, Tensor | None],
        scalars: list[Tensor],
        y: Tensor,
    ) -> None:
        text = _source(spec)
        assert text is not None
        self.kernels: ModuleType = render.module(text)
        self.spec, self.rows, self.y = spec, rows, y
        self.tokens, self.offsets, self.slots = lists
        slabs = {
            n: w if w is None or w.stride(-1) == 1 else w.contiguous() for n, w in weights.items()
        }
        self.up, self.gate, self.down = (slabs[n] for n in ("w_up", "w_gate", "w_down"))
        self.b_up, self.b_gate, self.b_down = (slabs[n] for n in ("b_up", "b_gate", "b_down"))
        self.p = torch.stack([s.reshape(()).float() for s in scalars]) if scalars else None

    def run(self, schedule: Schedule) -> None:
        """Fill y. Raises KernelError for a strategy that does not exist."""
        ways = {
            "decode": self._decode,
            "pairs": self._pairs,
            "atomic": self._atomic,
            "dense": self._dense,
        }
        if schedule.strategy not in ways:
            raise KernelError(
                f"A schedule names the strategy {schedule.strategy!r}; expected one of {', '.join(ways)}."
            )
        ways[schedule.strategy](schedule)

    def _strides(self) -> tuple[int, int]:
        assert self.up is not None
        return self.up.stride(0), 0 if self.gate is None else self.gate.stride(0)

    def _up(self, schedule: Schedule) -> Tensor:
        """Hidden values of all pairs, [T * E, F], through the grouped product."""
        tile, spec = schedule.up, self.spec
        hidden = self.rows.new_empty(len(self.rows) * spec.experts, spec.size)
        box = [tile.block_n, tile.block_k]
        self.kernels.up[(programs(self.rows.device, schedule.per_multiprocessor),)](
            self.rows, self.tokens, self.offsets,
            _weight(self.up, schedule.tma, box), _weight(self.gate, schedule.tma, box),
            self.b_up, self.b_gate, self.p, hidden, *self._strides(),
            SWAP=schedule.swap, TMA=schedule.tma, **_options(tile),
        )  # fmt: skip
        return hidden

    def _down(
        self, schedule: Schedule, hidden: Tensor, to: Tensor, column: int, chunk: int
    ) -> None:
        """Products of pairs for `chunk` columns, into rows [pairs, chunk] or sums [T, OUT]."""
        tile = schedule.down
        assert self.down is not None
        self.kernels.down[(programs(self.rows.device, schedule.per_multiprocessor),)](
            hidden, self.tokens, self.offsets,
            _weight(self.down, schedule.tma, [tile.block_k, tile.block_n]),
            to, self.down.stride(0), column, CHUNK=chunk,
            SWAP=schedule.swap, TMA=schedule.tma, ATOMIC=schedule.strategy == "atomic",
            **_options(tile),
        )  # fmt: skip

    def _pairs(self, schedule: Schedule) -> None:
        hidden, spec = self._up(schedule), self.spec
        chunk = chunk_of(spec, len(self.rows), schedule.down.block_n, hidden.element_size())
        products = hidden.new_empty(len(hidden), chunk)
        block = min(padded(chunk), MOST_COLUMNS)
        for column in range(0, spec.out, chunk):
            self._down(schedule, hidden, products, column, chunk)
            self.kernels.combine[(len(self.rows), -(-chunk // block))](
                products, self.slots, self.b_down, self.y, column,
                CHUNK=chunk, BLOCK_N=block, BLOCK_J=4, num_warps=4,
            )  # fmt: skip

    def summed(self, products: Tensor) -> Tensor:
        """The sum of its pairs' rows for each token, [T, C] of rows [N, C], C as wide as x."""
        width = products.shape[1]
        total = products.new_empty(len(self.rows), width)
        if len(total):
            block = min(padded(width), MOST_COLUMNS)
            self.kernels.sum_pairs[(len(total), -(-width // block))](
                products, self.slots, total, WIDTH=width, BLOCK_N=block, BLOCK_J=4, num_warps=4
            )
        return total

    def _atomic(self, schedule: Schedule) -> None:
        hidden, spec = self._up(schedule), self.spec
        sums = hidden.new_zeros(len(self.rows), spec.out, dtype=torch.float32)
        self._down(schedule, hidden, sums, 0, spec.out)
        block = min(padded(spec.out), MOST_COLUMNS)
        self.kernels.finish[(len(self.rows), -(-spec.out // block))](
            sums, self.b_down, self.y, BLOCK_N=block, num_warps=4
        )

    def _decode(self, schedule: Schedule) -> None:
        spec, rows = self.spec, len(self.rows)
        one = rows == 1
        columns = -(-spec.out // schedule.down.block_n)
        new = self.rows.new_empty
        dtype = torch.float32 if one else self.rows.dtype
        hidden = new(spec.experts, rows, spec.size, dtype=dtype)
        counters = new(columns, dtype=torch.int32)
        parts = new(schedule.splits, rows, spec.out, dtype=torch.float32)
        grid = (programs(self.rows.device, schedule.per_multiprocessor),)
        biases, tile = (self.b_up, self.b_gate, self.p), schedule.up
        if one:
            self.kernels.decode_up_one[grid](
                self.rows, self.offsets, self.up, self.gate, *biases, hidden, counters, columns,
                *self._strides(), BLOCK_N=tile.block_n, num_warps=tile.warps,
            )  # fmt: skip
        else:
            self.kernels.decode_up[grid](
                self.rows, self.tokens, self.offsets, self.up, self.gate, *biases, hidden, counters,
                columns, *self._strides(), rows, BLOCK_T=tile.block_m, BLOCK_N=tile.block_n,
                BLOCK_K=tile.block_k, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        tile = schedule.down
        assert self.down is not None
        self.kernels.decode_down[(columns, schedule.splits)](
            hidden, self.offsets, self.down, self.b_down, parts, counters, self.y,
            self.down.stride(0), rows, ONE=one, BLOCK_T=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, SPLITS=schedule.splits,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def _dense(self, schedule: Schedule) -> None:
        assert self.up is not None and self.down is not None
        up = F.linear(self.rows, self.up, self.b_up)
        gate = up if self.gate is None else F.linear(self.rows, self.gate, self.b_gate)
        block = 1024
        self.kernels.pointwise[(-(-up.numel() // block),)](
            up, gate, self.p, up, up.numel(), BLOCK=block, num_warps=4
        )
        if self.b_down is None:
            torch.mm(up, self.down, out=self.y)
        else:
            torch.addmm(self.b_down, up, self.down, out=self.y)


def chunk_of(spec: Spec, rows: int, block_n: int, itemsize: int) -> int:
    """Columns of the output that are worked off at once, so that pairs' products stay below ROWS_BYTES."""
    pairs, chunk = rows * spec.experts, -(-spec.out // block_n) * block_n
    while chunk > block_n and pairs * chunk * itemsize > ROWS_BYTES:
        chunk = -(-chunk // 2 // block_n) * block_n
    return chunk


def _options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _weight(weight: Tensor | None, tma: bool, box: list[int]) -> Any:
    """A weight as a kernel takes it: itself, or a descriptor of its tiles."""
    if weight is None or not tma:
        return weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(weight, box)


device.register(expert_mlp, run, accepts)
