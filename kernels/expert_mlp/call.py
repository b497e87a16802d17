"""One call of a block's generated Triton kernels: their source, and what each strategy launches."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from ...expr import parse
from ...gpu_blocks import GpuSchedule, GpuSpec, padded
from ...gpu_blocks import chunk as columns_at_once
from ...tiles import Tile
from .. import device, emit, render
from ..device import programs
from ..dispatch import buffers
from ..int8 import Copy
from ..launching import Launched, launch, noting
from ..native import Spec

MOST_COLUMNS = 1024  # of a program that adds up pairs
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def source(spec: GpuSpec) -> str:
    """The source of a block's kernels, the same with and without int8 copies.

    Raises KernelError for an activation without Triton spelling.
    """
    spec = replace(spec, int8=False)
    constants: dict[str, bool | int | str] = {
        "D": spec.d, "D_PADDED": padded(spec.d), "OUT": spec.out, "E": spec.experts,
        "E_PADDED": padded(spec.experts), "F": spec.size, "GATED": spec.gated,
        "PRECISION": spec.precision,
    }  # fmt: skip
    title = f"Experts of a block: {spec}, {spec.activation}."
    return render.render(title, ["experts.py", "decode.py"], constants, _functions(spec.activation))


def scalar_count(text: str) -> int:
    """How many scalars p0, p1, ... an activation text reads, those between included."""
    return 1 + max(
        (int(name[1:]) for name in parse(text).variables() if name[0] == "p"), default=-1
    )


def _functions(text: str) -> str:
    """Triton functions of an activation text: `activation`, which loads its scalars, and what it calls."""
    loads = "".join(f"tl.load(p_ptr + {i}), " for i in range(scalar_count(text)))
    wrapper = (
        f"@triton.jit\ndef activation(up, gate, p_ptr):\n    return value(up, gate, ({loads}))"
    )
    value = emit.activation_source(text, "value", "triton")
    return "\n\n\n".join(
        part for part in (emit.library_source(text).strip(), value, wrapper) if part
    )


@lru_cache(maxsize=256)
def source_or_none(spec: GpuSpec) -> str | None:
    """The source of a block's kernels, or None for an activation without Triton spelling."""
    try:
        return source(spec)
    except KernelError:
        return None


def spec_of(
    x: Tensor,
    offsets: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    activation: str,
    int8: bool = False,
) -> GpuSpec:
    """What the kernels of a call depend on, from its operands."""
    experts = offsets.numel() - 1
    return GpuSpec(
        d=x.shape[-1],
        out=w_down.shape[1],
        experts=experts,
        size=w_up.shape[0] // experts,
        gated=w_gate is not None,
        activation=activation,
        precision=device.precision(x.dtype),
        dtype=NAMES[x.dtype],
        int8=int8,
    )


def of_native(spec: Spec, dtype: torch.dtype, int8: bool = False) -> GpuSpec:
    """A kind of block as its Triton kernels see it, in a dtype."""
    return GpuSpec(
        d=spec.d,
        out=spec.out,
        experts=spec.experts,
        size=spec.size,
        gated=spec.gated,
        activation=spec.activation,
        precision=device.precision(dtype),
        dtype=NAMES[dtype],
        int8=int8,
    )


class Call:
    """One call of a block's kernels: rows [T, D], lists, slabs and biases by name, output y [T, OUT].

    copy: the slabs as int8, which the strategy "decode" then reads; the others never do.
    """

    def __init__(
        self,
        spec: GpuSpec,
        rows: Tensor,
        lists: tuple[Tensor, Tensor, Tensor],
        weights: dict[str, Tensor | None],
        scalars: list[Tensor],
        y: Tensor,
        copy: Copy | None = None,
    ) -> None:
        text = source_or_none(spec)
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
        self.copy = copy

    def run(self, schedule: GpuSchedule) -> None:
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

    def _up(self, schedule: GpuSchedule) -> Tensor:
        """Hidden values of all pairs, [T * E, F], through the grouped product."""
        tile, spec = schedule.up, self.spec
        hidden = self.rows.new_empty(len(self.rows) * spec.experts, spec.size)
        box = [tile.block_n, tile.block_k]
        launch(
            self.kernels.up, (programs(self.rows.device, schedule.per_multiprocessor),),
            self.rows, self.tokens, self.offsets,
            _weight(self.up, schedule.tma, box), _weight(self.gate, schedule.tma, box),
            self.b_up, self.b_gate, self.p, hidden, *self._strides(),
            SWAP=schedule.swap, TMA=schedule.tma, **_options(tile),
        )  # fmt: skip
        return hidden

    def _down(
        self, schedule: GpuSchedule, hidden: Tensor, to: Tensor, column: int, chunk: int
    ) -> None:
        """Products of pairs for `chunk` columns, into rows [pairs, chunk] or sums [T, OUT]."""
        tile = schedule.down
        assert self.down is not None
        launch(
            self.kernels.down, (programs(self.rows.device, schedule.per_multiprocessor),),
            hidden, self.tokens, self.offsets,
            _weight(self.down, schedule.tma, [tile.block_k, tile.block_n]),
            to, self.down.stride(0), column, CHUNK=chunk,
            SWAP=schedule.swap, TMA=schedule.tma, ATOMIC=schedule.strategy == "atomic",
            **_options(tile),
        )  # fmt: skip

    def _pairs(self, schedule: GpuSchedule) -> None:
        hidden, spec = self._up(schedule), self.spec
        chunk = columns_at_once(spec, len(self.rows), schedule.down.block_n)
        products = hidden.new_empty(len(hidden), chunk)
        for column in range(0, spec.out, chunk):
            self._down(schedule, hidden, products, column, chunk)
            launch(
                self.kernels.combine, (len(self.rows), -(-chunk // _columns(chunk))),
                products, self.slots, self.b_down, self.y, column,
                CHUNK=chunk, **_sums(products),
            )  # fmt: skip

    def summed(self, products: Tensor) -> Tensor:
        """The sum of its pairs' rows for each token, [T, C] of rows [N, C], C as wide as x."""
        width = products.shape[1]
        total = products.new_empty(len(self.rows), width)
        if len(total):
            launch(
                self.kernels.sum_pairs, (len(total), -(-width // _columns(width))),
                products, self.slots, total, WIDTH=width, **_sums(products),
            )  # fmt: skip
        return total

    def _atomic(self, schedule: GpuSchedule) -> None:
        hidden, spec = self._up(schedule), self.spec
        sums = hidden.new_zeros(len(self.rows), spec.out, dtype=torch.float32)
        self._down(schedule, hidden, sums, 0, spec.out)
        block = _columns(spec.out)
        launch(
            self.kernels.finish, (len(self.rows), -(-spec.out // block)),
            sums, self.b_down, self.y, BLOCK_N=block, warps=4,
        )  # fmt: skip

    def _decode(self, schedule: GpuSchedule) -> None:
        spec, rows = self.spec, len(self.rows)
        one = rows == 1
        columns = -(-spec.out // schedule.down.block_n)
        new = self.rows.new_empty
        dtype = torch.float32 if one else self.rows.dtype
        hidden = new(spec.experts, rows, spec.size, dtype=dtype)
        counters = new(columns, dtype=torch.int32)
        parts = new(schedule.splits, rows, spec.out, dtype=torch.float32)
        assert self.up is not None and self.down is not None
        up, gate, down, scales, unit = self.up, self.gate, self.down, None, None
        if self.copy is not None:
            up, gate, down, scales, unit = self.copy
        strides = up.stride(0), 0 if gate is None else gate.stride(0)
        others, tile = (self.b_up, self.b_gate, self.p, scales), schedule.up
        units = spec.experts * -(-spec.size // tile.block_n)
        grid = (min(units, programs(self.rows.device, schedule.per_multiprocessor)),)
        if one:
            launch(
                self.kernels.decode_up_one, grid,
                self.rows, self.offsets, up, gate, *others, hidden, counters, columns,
                *strides, BLOCK_N=tile.block_n, warps=tile.warps,
            )  # fmt: skip
        else:
            launch(
                self.kernels.decode_up, grid,
                self.rows, self.tokens, self.offsets, up, gate, *others, hidden, counters,
                columns, *strides, rows, BLOCK_T=tile.block_m, BLOCK_N=tile.block_n,
                BLOCK_K=tile.block_k, warps=tile.warps, stages=tile.stages,
            )  # fmt: skip
        tile = schedule.down
        launch(
            self.kernels.decode_down, (columns, schedule.splits),
            hidden, self.offsets, down, self.b_down, unit, parts, counters, self.y,
            down.stride(0), rows, ONE=one, BLOCK_T=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, SPLITS=schedule.splits,
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip

    def _dense(self, schedule: GpuSchedule) -> None:
        assert self.up is not None and self.down is not None
        up = F.linear(self.rows, self.up, self.b_up)
        gate = up if self.gate is None else F.linear(self.rows, self.gate, self.b_gate)
        block = 1024
        launch(
            self.kernels.pointwise, (-(-up.numel() // block),),
            up, gate, self.p, up, up.numel(), BLOCK=block, warps=4,
        )  # fmt: skip
        if self.b_down is None:
            torch.mm(up, self.down, out=self.y)
        else:
            torch.addmm(self.b_down, up, self.down, out=self.y)


def launches(
    spec: GpuSpec, tokens: int, schedule: GpuSchedule, bias: bool = True
) -> list[Launched]:
    """What a call of so many tokens launches, without data and without a device."""
    dtype = next(dtype for dtype, name in NAMES.items() if name == spec.dtype)
    hidden = spec.experts * spec.size

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    shapes = {
        "w_up": (hidden, spec.d), "w_gate": (hidden, spec.d), "w_down": (hidden, spec.out),
        "b_up": (hidden,), "b_gate": (hidden,), "b_down": (spec.out,),
    }  # fmt: skip
    absent = [] if spec.gated else ["w_gate", "b_gate"]
    absent += [] if bias else ["b_up", "b_gate", "b_down"]
    weights = {name: None if name in absent else new(*shape) for name, shape in shapes.items()}
    scalars = [new(1) for _ in range(scalar_count(spec.activation))]
    rows, lists = new(tokens, spec.d), buffers(new(1), tokens, spec.experts)
    with noting() as noted:
        copy = _copy(spec) if spec.int8 else None
        Call(spec, rows, lists, weights, scalars, new(tokens, spec.out), copy).run(schedule)
    return noted


def _copy(spec: GpuSpec) -> Copy:
    """An int8 copy of a block without data."""
    hidden = spec.experts * spec.size

    def new(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    up, gate = (new(hidden, spec.d) if wanted else None for wanted in (True, spec.gated))
    assert up is not None
    scales = new(3 if spec.gated else 2, hidden, dtype=torch.float32)
    down, unit = new(spec.experts, spec.out, spec.size), new(1, dtype=torch.float32)
    return Copy(up, gate, down, scales, unit)


def _options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "warps": tile.warps, "stages": tile.stages,
    }  # fmt: skip


def _columns(width: int) -> int:
    """Columns of a program that adds up pairs."""
    return min(padded(width), MOST_COLUMNS)


def _sums(products: Tensor) -> dict[str, int]:
    """How products [pairs, C] are added up: 16 bytes of a row a lane, so that no sum crosses warps.

    Eight rows at once are 4 KB a warp under way (with 16, registers let fewer warps run).
    """
    columns = _columns(products.shape[1])
    warps = max(1, columns * products.element_size() // 512)
    return {"BLOCK_N": columns, "BLOCK_J": 8, "warps": warps}


def _weight(weight: Tensor | None, tma: bool, box: list[int]) -> Any:
    """A weight as a kernel takes it: itself, or a descriptor of its tiles."""
    if weight is None or not tma:
        return weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(weight, box)
