"""The generated source for other instruction sets than this processor's best, and for aarch64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from d2dcompile import testing
from d2dcompile.kernels import build, native
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.dynamic_mlp import Prepared
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.gate import tau_bits

FLAGS = ("-O2", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-Wall", "-ffp-contract=off")
SPECS = (
    native.Spec(64, 35, 6, 24, 30, False, False, "gelu(up)"),
    native.Spec(97, 35, 7, 5, 30, True, True, "silu(gate) * up"),
)
# Widths of whole chunks of 32 values, of which a row is copied in two pieces, with rests, and of whole
# vectors of lanes of which the last holds one value.
TILED = (
    native.Spec(1056, 70, 5, 64, 32, False, True, "gelu(up)"),
    native.Spec(97, 130, 4, 48, 70, True, True, "silu(gate) * up"),
    native.Spec(63, 40, 3, 35, 10, False, True, "gelu(up)"),
)
AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma")
EMULATED = ("-include", str(Path(__file__).with_name("tiles.h")), "-D__AMX_BF16__")


def has(*flags: str) -> bool:
    """Whether this processor has these instruction sets, by their names in Linux."""
    return set(flags) <= set(build.processor().split())


PARTS = "parts = parts_of(call)"  # of the tokens of a call, as large as the cache holds
ROOM = "room = APART == KS || cache_ways() >= UP_M"  # for rows that are read where they lie


def built(
    compiler: str,
    spec: native.Spec,
    folder: Path,
    *flags: str,
    parts: int = 0,
    room: bool | None = None,
) -> Path:
    """The shared library of a spec; the source must compile without a warning of its own.

    parts: in how many parts it takes the tokens of a call, 0 for as many as it finds best.
    room: whether chosen rows are read where they lie, else copied; None for what this processor's
        cache allows.
    """
    source, library = folder / "block.cpp", folder / "block.so"
    text = native.source(spec)
    assert text.count(PARTS) == text.count(ROOM) == 1
    if parts:
        text = text.replace(PARTS, f"parts = {parts}")
    if room is not None:
        text = text.replace(ROOM, f"room = {str(room).lower()}")
    source.write_text(text)
    command = [compiler, *FLAGS, *flags, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return library


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("flags", [("-mavx2", "-mfma"), ()], ids=["avx2", "no-avx"])
@pytest.mark.parametrize("spec", SPECS, ids=["fp32", "bf16"])
def test_runs_without_avx512(spec: native.Spec, flags: tuple[str, ...], tmp_path: Path) -> None:
    check(spec, built("g++", spec, tmp_path, *flags, parts=3))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("room", [True, False], ids=["in_place", "copied"])
def test_rows_that_share_a_set_of_the_cache(room: bool, tmp_path: Path) -> None:
    spec = native.Spec(512, 70, 5, 24, 30, True, False, "silu(gate) * up")
    check(spec, built("g++", spec, tmp_path, "-mavx2", "-mfma", room=room))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("spec", TILED, ids=["plain", "gated", "odd"])
@pytest.mark.parametrize("kind", ["emulated", "real"])
def test_tile_registers(spec: native.Spec, kind: str, tmp_path: Path) -> None:
    flags = EMULATED if kind == "emulated" else ("-mamx-tile", "-mamx-bf16")
    parts = 3 if kind == "emulated" else 0
    library = built("g++", spec, tmp_path, *AVX512, *flags, parts=parts)
    if has("avx512f" if kind == "emulated" else "amx_bf16"):  # elsewhere it compiles
        check(spec, library)
    if has("avx512f") and kind == "emulated" and spec == TILED[0]:
        check_router(spec, library)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_avx512_without_tile_registers(tmp_path: Path) -> None:
    library = built("g++", TILED[1], tmp_path, *AVX512)
    if has("avx512f"):
        check(TILED[1], library)


def check_router(spec: native.Spec, library: Path) -> None:
    """Of more threads than the router has blocks, those without one write nothing."""
    found, guard = ctypes.CDLL(str(library)), 64
    found.d2d_lanes.restype = ctypes.c_int64
    router1 = torch.randn(spec.router, spec.d).bfloat16()
    router2 = torch.randn(spec.experts, spec.router).bfloat16()
    router = torch.empty(found.d2d_lanes(1), dtype=torch.int32)
    found.d2d_pack_router(*map(native.address, (router1, router2, router)))
    record, tau = native.table(), tau_bits(0.5)
    sharers = torch.tensor([record.data_ptr()])
    native.write(record, router=router, tau=tau, sharers=sharers, sharer_count=1)
    for threads in (1, 2, 3):
        found.omp_set_num_threads(threads)
        for rows in (15, 16, 24, 31, 32, 47, 48):
            x = torch.randn(rows, spec.d).bfloat16()
            out = torch.full((guard + rows * spec.router,), 7.0, dtype=torch.bfloat16)
            to = ctypes.c_void_p(out[guard:].data_ptr())
            found.d2d_hidden(*map(native.address, (record, x, None)), to, native.count(x.numel()))
            exact = (x.double() @ router1.double().t()).relu()
            assert (out[:guard] == 7).all()
            error = out[guard:].view_as(exact).double() - exact
            assert testing.rms(error) < 1e-2 * testing.rms(exact)


def check(spec: native.Spec, library: Path) -> None:
    """Every schedule of a built library gives what the block means."""
    found = ctypes.CDLL(str(library))
    found.d2d_lanes.restype = ctypes.c_int64
    found.d2d_run.restype = found.d2d_run_lists.restype = ctypes.c_int64
    dtype, hidden = torch.bfloat16 if spec.bf16 else torch.float32, spec.experts * spec.size
    weights = {"w_up": torch.randn(hidden, spec.d), "w_down": torch.randn(hidden, spec.out)}
    weights["w_gate"] = torch.randn(hidden, spec.d)
    slabs = {name: (w * w.shape[1] ** -0.5).to(dtype) for name, w in weights.items()}
    block = Prepared(
        router1=torch.randn(spec.router, spec.d).to(dtype),
        router2=torch.randn(spec.experts, spec.router).to(dtype),
        tau=tau_bits(0.0),
        **{**slabs, "w_gate": slabs["w_gate"] if spec.gated else None},
        b_up=None,
        b_gate=None,
        b_down=None,
        activation=spec.activation,
    )
    router = torch.empty(found.d2d_lanes(1), dtype=torch.int32)
    found.d2d_pack_router(*map(native.address, (block.router1, block.router2, router)))
    native.write_weights(block.record, block.weights())
    native.write(block.record, router=router, tau=block.tau)
    packed = torch.empty(found.d2d_lanes(0), dtype=torch.int32)
    found.d2d_pack(native.address(block.record), native.address(packed))
    for rows in (1, 9, 40, 200):
        x = torch.randn(rows, spec.d).to(dtype)
        mask = testing.routing_masks(rows, spec.experts, 0.5)
        if rows == 200:
            mask[:, 1:3] = True  # every token runs these
        forced = mask.contiguous()
        native.write(block.record, forced=forced, forced_rows=rows)
        wide = [None if w is None else w.double() for w in block.weights().values()]
        lists = dispatch(mask)
        exact = expert_mlp.meaning(x.double(), *lists, *wide, None, [], spec.activation)
        limit = 1e-2 if spec.bf16 else 2e-6
        for copy in (None, packed):
            native.write(block.record, packed=copy)
            out = torch.full((rows, spec.out), torch.nan, dtype=dtype)
            operands = map(native.address, (block.record, x, out))
            assert found.d2d_run(*operands, native.count(x.numel())) == native.RAN
            assert testing.rms(out.double() - exact) <= limit * testing.rms(exact)
            broken, others = x.clone(), torch.full_like(out, torch.nan)
            broken[rows // 2] = torch.inf
            operands = map(native.address, (block.record, broken, others))
            assert found.d2d_run(*operands, native.count(x.numel())) == native.RAN
            kept = torch.arange(rows) != rows // 2
            assert torch.equal(others[kept], out[kept])
    assert_same_int8(found, block, spec)


def assert_same_int8(found: ctypes.CDLL, block: Prepared, spec: native.Spec) -> None:
    """The int8 copy has the bytes that this machine's own build makes, and gives the same output."""
    own = native.library(spec)
    assert own is not None
    x, made = torch.randn(1, spec.d).to(block.w_up.dtype), []
    lists = dispatch(testing.routing_masks(1, spec.experts, 0.5))  # addresses do not keep it alive
    for library in (found, own):
        copy = torch.empty(own.d2d_lanes(2), dtype=torch.int32)
        out = torch.full((1, spec.out), torch.nan, dtype=x.dtype)
        assert library.d2d_lanes(2) == len(copy)
        library.d2d_pack_int8(native.address(block.record), native.address(copy))
        native.write(block.record, quantised=copy)
        operands = map(native.address, (block.record, x, out))
        assert (
            library.d2d_run_lists(*operands, native.count(1), *map(native.address, lists))
            == native.RAN
        )
        made.append((copy, out))
    assert torch.equal(made[0][0], made[1][0])
    limit = 1e-2 if spec.bf16 else 1e-3  # a hidden value near a half may be rounded either way
    assert testing.rms(made[0][1] - made[1][1]) <= limit * testing.rms(made[1][1])


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="needs Debian's g++-aarch64-linux-gnu"
)
@pytest.mark.parametrize("spec", SPECS, ids=["fp32", "bf16"])
def test_compiles_for_aarch64(spec: native.Spec, tmp_path: Path) -> None:
    library = built("aarch64-linux-gnu-g++", spec, tmp_path)
    assert library.read_bytes()[18:20] == b"\xb7\x00"  # EM_AARCH64 in the ELF header
