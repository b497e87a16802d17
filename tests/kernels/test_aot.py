"""Ahead-of-time compilation: what is read from compiled kernels, jobs that fail, caches filled for later."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_jobs import work

from d2dcompile.errors import KernelError
from d2dcompile.gpus import A100, H200, MI300X
from d2dcompile.kernels import absent, aot, sass, workers
from d2dcompile.kernels.aot import Job, Launch
from d2dcompile.kernels.resources import NAME
from d2dcompile.tiles import Gemm, Tile

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
GPUS = {gpu.target: gpu for gpu in (H200, A100, MI300X)}
TILES = (
    *(Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 2), Tile(64, 64, 64, 4, 4)),
    *(Tile(64, 128, 64, 8, 3), Tile(16, 64, 64, 4, 5)),
)
VALUES = {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32"}


def product(tile: Tile, target: str, add: bool = False) -> Job:
    from toy_kernels import product

    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32" if add else "*bf16"}
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return Job(
        product,
        {**signature, "k": "i32", "n": "i32"},
        sizes | ({"ADD": True} if add else {}),
        target,
        tile.warps,
        tile.stages,
        ("k", "n"),
    )


def scale(target: str, **others) -> Job:
    from toy_kernels import relu, scale

    constants = {"bias_ptr": None, "factor": 2.0, "ACT": relu, "BLOCK": 1024}
    return Job(scale, VALUES, constants | others, target, aligned=("n",))


def launched(target: str) -> Launch:
    from toy_kernels import relu, scale

    options = {"factor": 2.0, "ACT": relu, "BLOCK": 1024, "num_warps": 4, "num_stages": 3}
    args = (torch.bfloat16, torch.bfloat16, None, 4096)
    return Launch(scale, args, target, options | {"enable_fp_fusion": True})


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory):
    """All kernels of these tests, by name, and the cache that they fill. Compiled in processes of their own
    where kernels would be interpreted in this one."""
    cache = tmp_path_factory.mktemp("triton")
    jobs: dict[object, Job | Launch] = {
        (target, tile): product(tile, target) for target in GPUS for tile in TILES
    }
    jobs |= {(target, "add"): product(TILES[0], target, add=True) for target in GPUS}
    for target in (*GPUS, "sm_100"):
        jobs |= {(target, "scale"): scale(target), (target, "launch"): launched(target)}
    jobs |= {"blackwell": product(TILES[0], "sm_100"), "unknown": scale("sm_1")}
    jobs["unaligned"] = Job(scale("sm_90").fn, VALUES, scale("sm_90").constants, "sm_90")
    jobs["wrong"] = scale("sm_90", ACT=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        patch.setenv(workers.INTERPRET, "1")
        found = aot.compile_all(jobs.values(), 2)
    return dict(zip(jobs, found, strict=True)) | {"cache": cache}


@needs_triton
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("tile", TILES)
def test_shared_memory_is_foretold_and_registers_are_near(compiled, target, tile) -> None:
    found, gpu, gemm = compiled[target, tile], GPUS[target], Gemm(128, 8, 768, 768)
    assert found.shared == tile.shared(gpu, gemm)
    assert found.spill == found.stack == 0
    assert not found.serialized
    assert found.num_warps == tile.warps
    assert tile.accumulators(gpu, gemm) < found.registers <= 255
    assert abs(found.resident() - tile.resident(gpu, gemm)) <= 3
    assert found.resident() == found.resident(gpu) >= 1
    assert bool(found.count("HGMMA")) is tile.wgmma(gpu)


@needs_triton
def test_instructions_are_those_of_the_target(compiled) -> None:
    hopper, ampere = compiled["sm_90", TILES[0]], compiled["sm_80", TILES[0]]
    assert hopper.count("HMMA") == 0 < hopper.count("LDGSTS.128", "STG.128")
    assert ampere.count("HMMA") == 64
    assert compiled["sm_80", "add"].instructions["RED.F32"] == 64
    assert compiled["sm_90", "add"].instructions["RED.F32x4"] == 16
    assert compiled["blackwell"].count("UTCHMMA") > 0
    with pytest.raises(KernelError, match="sm_100"):
        compiled["blackwell"].resident()
    amd = compiled["gfx942", TILES[0]]
    assert amd.count("v_mfma") > 0
    assert amd.instructions["buffer_load.128"] > 0
    assert compiled["gfx942", "add"].count("atomic") > 0
    assert all(compiled[name].instructions["total"] > 100 for name in ("blackwell", "unaligned"))


@needs_triton
def test_loads_are_wide_only_where_sizes_are_known_to_be_aligned(compiled) -> None:
    assert compiled["sm_90", "scale"].count("LDG.128") == 1
    assert compiled["unaligned"].count("LDG.128") == 0 < compiled["unaligned"].count("LDG")


@needs_triton
def test_a_kernel_that_does_not_compile_is_a_reason(compiled) -> None:
    assert "'scale' does not compile for sm_90" in compiled["wrong"]
    assert "sm_1" in compiled["unknown"]


@needs_triton
@pytest.mark.parametrize("target", [*GPUS, "sm_100"])
def test_a_job_compiles_what_a_launch_looks_for(compiled, target: str) -> None:
    import triton

    job, launch = compiled[target, "scale"], compiled[target, "launch"]
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        assert job == launch
    assert job.instructions == launch.instructions
    assert (job.registers, job.shared) == (launch.registers, launch.shared)


@needs_triton
def test_another_process_finds_the_cache_filled(compiled, tmp_path: Path) -> None:
    """A launch there compiles nothing, where the cache was moved too, and figures lost from it are read
    again."""
    cache = tmp_path / "moved"
    shutil.copytree(compiled["cache"], cache)
    assert absent.relocate(cache) > 0
    for held in cache.rglob(NAME):
        if '"sm_80"' in held.read_text():
            held.unlink()
    code = """
import torch, triton
from toy_kernels import relu, scale
from d2dcompile.kernels import absent, aot
hits = []
triton.knobs.compilation.listener = lambda **said: hits.append(said["cache_hit"])
options = {"factor": 2.0, "ACT": relu, "BLOCK": 1024, "num_warps": 4, "num_stages": 3}
for target in ("sm_90", "gfx942"):
    with absent.pretend(target):
        scale.warmup(torch.bfloat16, torch.bfloat16, None, 4096, grid=(4,), enable_fp_fusion=True, **options)
args = (torch.bfloat16, torch.bfloat16, None, 4096)
found = aot.precompile(scale, *args, target="sm_80", enable_fp_fusion=True, **options)
print(hits, found.hash, found.registers, found.instructions["total"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if name != workers.INTERPRET},
            "TRITON_CACHE_DIR": str(cache),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before = compiled["sm_80", "launch"]
    total = before.instructions["total"]
    assert done.stdout.split("\n")[0] == (
        f"[True, True, True] {before.hash} {before.registers} {total}"
    )


@needs_triton
@pytest.mark.parametrize(
    ("signature", "constants", "named"),
    [
        ({}, {"factor": 1.0}, "ACT, BLOCK, bias_ptr, n, x_ptr, y_ptr"),
        (VALUES, {"factor": 1.0, "ACT": 0, "BLOCK": 8, "bias_ptr": None, "more": 1}, "more"),
        (VALUES, {"factor": 1.0, "ACT": 0, "BLOCK": 8, "bias_ptr": None, "n": 1}, "n"),
    ],
)
def test_arguments_have_to_fit_the_kernel(signature, constants, named, monkeypatch) -> None:
    monkeypatch.setattr(aot, "_jitted", lambda fn: fn)
    names = ["x_ptr", "y_ptr", "bias_ptr", "n", "factor", "ACT", "BLOCK"]
    kernel = SimpleNamespace(arg_names=names, params=[], __name__="scale")
    with pytest.raises(KernelError, match=f"corrected: {named}\\."):
        aot.compile_kernel(kernel, signature, constants, target="sm_90")


@needs_triton
def test_what_is_no_jitted_kernel_is_refused() -> None:
    with pytest.raises(KernelError, match="not a jitted Triton kernel"):
        aot.compile_kernel(len, {}, {}, target="sm_90")


def test_without_triton_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime.jit", None)
    with pytest.raises(KernelError, match=r"d2dcompile\[triton\]"):
        aot.compile_kernel(len, {}, {}, target="sm_90")


def test_a_job_that_crashes_or_hangs_costs_only_itself(monkeypatch) -> None:
    monkeypatch.setenv(workers.INTERPRET, "1")
    jobs = ["one", "crash", "raise", "hang", "leave", "two"]
    found = workers.run(work, jobs, workers=2, seconds=2)
    assert found[0] == "one compiles"
    assert found[5] == "two compiles"
    assert "SIGSEGV" in found[1]
    assert "last words" in found[1]
    assert found[2] == "failed: ValueError: no such thing"
    assert found[3] == "took longer than 2 seconds"
    assert "exit status 3" in found[4]
    assert workers.run(work, []) == []


def test_opcodes_are_counted_by_family() -> None:
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.U16.CONSTANT R2, desc[UR4][R2.64] ;
        /*0020*/              @UP1 LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64], P0 ;
        /*0030*/                   LDG.E.LTC128B R2, [R2.64] ;
        /*0040*/                   ATOMG.E.CAS.STRONG.GPU PT, R2, [R2], R4, R5 ;
        /*0050*/                   REDG.E.ADD.BF16x8.STRONG.GPU [R2], R4 ;
        /*0060*/                   STL [R1], R0 ;
    """
    assert sass.sass_counts(text) == {
        **{"total": 7, "LDG.16": 1, "LDGSTS.128": 1, "LDG.32": 1, "ATOM.CAS": 1},
        **{"RED.BF16x8": 1, "STL": 1},
    }


def test_serialized_and_spilling_kernels_are_seen_in_the_log() -> None:
    log = """ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due
to insufficient register resources for the wgmma pipeline crossing function boundary
    16 bytes stack frame, 1672 bytes spill stores, 1600 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers"""
    figures = {"registers": 255, "stack": 16, "spill": 1672, "serialized": 1}
    assert sass.ptxas_figures(log) == figures
    with pytest.raises(ValueError, match="no registers"):
        sass.ptxas_figures("killed")
    with pytest.raises(ValueError, match="vgpr_count"):
        sass.gcn_figures("s_endpgm")
