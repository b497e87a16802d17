"""Generated C++ of converted blocks: spec -> source -> library, and the records that the kernels read.

The text is constants, the activation, and the skeletons of kernels/cpu. One
library serves dynamic_mlp, which routes, and expert_mlp, whose lists are given. Records are int64 tables of
addresses and strides: a call's cost grows with its arguments, about 0.4 us each, where a whole block of
one token takes 15 us.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..dumping import dump_text
from ..errors import ExpressionError, KernelError
from ..ir import Experts, Schedule
from . import build
from .emit import activation_source

FIELDS = (  # of struct Site in kernels/cpu/site.h, in order
    *("run", "id", "up", "gate", "down", "up_stride", "gate_stride", "down_stride"),
    *("b_up", "b_gate", "b_down", "router", "packed", "tau", "forced", "forced_rows"),
    *("scalars", "decode", "packs", "fused_rows", "near", "far", "dense_rows"),
    *("quantised", "quantises", "sharers", "sharer_count"),
)
RAN, NO_MEMORY, WANTS_PACKED, WANTS_INT8 = range(4)  # enum Status of kernels/cpu/site.h
SLABS = ("w_up", "w_gate", "w_down", "b_up", "b_gate", "b_down")  # slabs and biases
DTYPES = (torch.float32, torch.bfloat16)
SMALLEST = 1 << 16  # weights of a matrix: smaller ones are not worth seconds of compiling
SKELETONS = Path(__file__).parent / "cpu"
BODY = (
    *("tile.h", "site.h", "amx.h", "pack.h", "product.h", "route.h"),
    *("decode.h", "decode_int8.h", "batch.h", "mlp.cpp"),
)


@dataclass(frozen=True)
class Spec:
    """What the generated text depends on: sizes, gating, dtype, activation.

    Attributes:
        d, out: features of x and of y; experts, size: E experts of S neurons; router: its hidden width.
        gated: whether a gate matrix multiplies the up matrix; bf16: bfloat16 instead of float32.
        activation: the expression between the matrices (d2dcompile.expr).
    """

    d: int
    out: int
    experts: int
    size: int
    router: int
    gated: bool
    bf16: bool
    activation: str

    def __str__(self) -> str:
        kind = "gated " if self.gated else ""
        dtype = "bf16" if self.bf16 else "fp32"
        return f"{kind}{self.d} x {self.experts * self.size} ({self.experts} experts) {dtype}"


@lru_cache(maxsize=128)
def source(spec: Spec) -> str:
    """The C++ text of one kind of block, the same for the same spec.

    Raises KernelError or ExpressionError for an activation without a C++ spelling.
    """
    sizes = {"D": spec.d, "OUT": spec.out, "S": spec.size, "E": spec.experts, "R": spec.router}
    constants = "".join(f"constexpr int64_t {name} = {value};\n" for name, value in sizes.items())
    return "\n".join(
        [
            f"// {spec}: {spec.activation}",
            f"#define GATED {int(spec.gated)}",
            f"#define BF16 {int(spec.bf16)}",
            _skeleton("vec.h"),
            f"namespace {{\n{constants}}}  // namespace",
            activation_source(spec.activation),
            *map(_skeleton, BODY),
        ]
    )


@lru_cache(maxsize=8)
def _skeleton(name: str) -> str:
    """A file of kernels/cpu without the lines that only make it stand alone."""
    lines = (SKELETONS / name).read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith(("#pragma once", '#include "')))


def spec_of(experts: Experts, dtype: torch.dtype) -> Spec:
    """The kind of block that a converted site is when its weights have this dtype."""
    site, plan = experts.site, experts.plan
    shape = experts.hashes["down"]["shape"]
    return Spec(
        d=site.d_model,
        out=shape[1 if "down" in site.transposed else 0],
        experts=plan.experts,
        size=plan.expert_size,
        router=plan.router_width,
        gated=site.kind == "glu",
        bf16=dtype == torch.bfloat16,
        activation=site.activation,
    )


def refusal(spec: Spec, weights: Mapping[str, Tensor | None]) -> str | None:
    """Why a block with these slabs and biases cannot run as C++, or None if it can."""
    present = [t for t in weights.values() if t is not None]
    dtype = present[0].dtype
    if any(t.device.type != "cpu" for t in present):
        return "its weights are not on a CPU"
    if dtype not in DTYPES or any(t.dtype != dtype for t in present):
        return "its weights are not all float32 or all bfloat16"
    if any(t.stride(-1) != 1 for t in present):
        return "its weights are not neuron-major"
    return unfit(spec) or build.compiler()


def unfit(spec: Spec) -> str | None:
    """Why there is no kernel for this kind of block on any machine, or None if there is."""
    if spec.d * spec.experts * spec.size < SMALLEST:
        return f"its matrices have fewer than {SMALLEST} weights, too few to compile a kernel for"
    try:
        source(spec)
    except (KernelError, ExpressionError) as error:
        return str(error)
    return None


@lru_cache(maxsize=128)
def library(spec: Spec) -> ctypes.CDLL | None:
    """The compiled kernels of a spec, or None where they cannot be built (a warning says why)."""
    text = source(spec)
    dump_text("kernel.cpp", text)
    found = build.load(text)
    if found is not None:
        found.d2d_lanes.restype = ctypes.c_int64
        found.d2d_run.restype = found.d2d_run_lists.restype = ctypes.c_int64
        found.d2d_shareable.restype = ctypes.c_int64
    return found


def table() -> Tensor:
    """An empty record."""
    with torch.inference_mode(False):
        return torch.zeros(len(FIELDS), dtype=torch.int64)


def write(record: Tensor, **fields: Tensor | int | None) -> None:
    """Set fields of a record: integers, and addresses of tensors, which must be kept alive.

    In its memory, not by an op: blocks die when garbage is collected, under a FakeTensorMode too.
    """
    places = (ctypes.c_int64 * len(FIELDS)).from_address(record.data_ptr())
    for name, value in fields.items():
        number = value.data_ptr() if isinstance(value, Tensor) else value or 0
        places[FIELDS.index(name)] = number


def read(record: Tensor, name: str) -> int:
    """A field of a record."""
    return int(record[FIELDS.index(name)])


def write_weights(record: Tensor, weights: Mapping[str, Tensor | None]) -> None:
    """Set the fields of slabs w_up, w_gate, w_down [H, D] and biases b_up, b_gate, b_down."""
    for role in ("up", "gate", "down"):
        slab = weights[f"w_{role}"]
        stride = 0 if slab is None else slab.stride(0)
        write(record, **{role: slab, f"{role}_stride": stride, f"b_{role}": weights[f"b_{role}"]})
    write_schedule(record, Schedule())


def write_schedule(record: Tensor, chosen: Schedule) -> None:
    """Set the fields of a schedule, all but the number of rows from which everything runs."""
    names = ("decode", "fused_rows", "near", "far")
    write(record, **{name: int(getattr(chosen, name)) for name in names})


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """A tensor's memory as C takes it."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def count(number: int) -> ctypes.c_int64:
    """A size as C takes it."""
    return ctypes.c_int64(number)


def no_memory(rows: int) -> KernelError:
    """The error of a call whose scratch space could not be had."""
    return KernelError(
        f"No memory for the scratch space of a block of {rows} tokens. Call the model with fewer tokens "
        "at a time."
    )
