"""What the machine can do at best: bytes a second from memory, floating-point operations a second.

Each figure is the best of two ways to get it: a loop in C++ written for nothing else, and what torch
reaches (a sum over a large tensor, one hot oneDNN GEMM). They are timed in turns with the candidates.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from cpu_cases import DTYPES

BYTES = 1 << 29  # 512 MiB: an L3 keeps nothing of it between two passes
GEMM = (1152, 1024, 1024)  # rows, columns, depth: 4 MiB of fp32 weights stay in an L3
STEPS = 1 << 20  # steps of an arithmetic loop: some 5 ms
LANES = 16  # floats in 64 bytes; compilers split the vectors where registers are narrower
CHAINS = 12  # independent accumulators: more than latency times ports of any FMA unit
SOURCE = """
#include <cstdint>
#include <cstddef>
typedef float v __attribute__((vector_size(64), aligned(64)));
typedef int64_t w __attribute__((vector_size(64), aligned(64)));
extern "C" int64_t read_all(const w* p, int64_t n) {  // n vectors
    int64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(^ : sum)
    for (int64_t block = 0; block < n / 64; block++) {
        const w* q = p + block * 64;
        w a[8] = {};
        for (int i = 0; i < 64; i += 8)
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                __builtin_prefetch(q + i + j + 64);
                a[j] ^= q[i + j];
            }
        for (int j = 1; j < 8; j++) a[0] ^= a[j];
        for (int j = 0; j < 8; j++) sum ^= a[0][j];
    }
    return sum;
}
#define EACH(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
#define ZERO(I) v a##I = {};
#define SUM(I) +a##I[0]
#define KEEP(I) asm volatile("" : "+v"(a##I));
#define LOOP(NAME, STEP)                                     \\
    extern "C" float NAME(int64_t steps) {                   \\
        float sum = 0;                                       \\
        _Pragma("omp parallel reduction(+ : sum)") {         \\
            EACH(ZERO)                                       \\
            for (int64_t s = 0; s < steps; s++) { EACH(STEP) EACH(KEEP) } \\
            sum += EACH(SUM);                                \\
        }                                                    \\
        return sum;                                          \\
    }
const v one = v{} + 1.0f, half = v{} + 0.5f;
#define FMA(I) a##I = a##I * half + one;
LOOP(fma_fp32, FMA)
#ifdef __AVX512BF16__
#include <immintrin.h>
const __m512i pair = _mm512_set1_epi32(0x3f803f80);
#define DOT(I) a##I = (v)_mm512_dpbf16_ps((__m512)a##I, (__m512bh)pair, (__m512bh)pair);
LOOP(fma_bf16, DOT)
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
// Four products of tile registers a step; 0 where the system does not allow them.
extern "C" int64_t tiles_bf16(int64_t steps) {
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    struct alignas(64) {
        uint8_t palette = 1, rest[15] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
#pragma omp parallel
    {
        _tile_loadconfig(&config);
        for (int64_t s = 0; s < steps; s++) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_release();
    }
    return 1;
}
#endif
"""


def ceilings(dtype: str, threads: int) -> dict[str, tuple[Callable[[], object], float]]:
    """{name: (call, bytes or operations a call)}; names start with "read " or "peak "."""
    memory = torch.ones(BYTES // 4)
    rows, columns, depth = GEMM
    kind = DTYPES[dtype]
    left, right = torch.randn(rows, depth).to(kind), torch.randn(columns, depth).to(kind)
    packed = torch.ops.mkldnn._reorder_linear_weight(right, rows)
    gemm = torch.ops.mkldnn._linear_pointwise
    found: dict[str, tuple[Callable[[], object], float]] = {
        "read torch.sum": (memory.sum, BYTES),
        "peak oneDNN": (
            lambda: gemm(left, packed, None, "none", [], ""),
            2.0 * rows * columns * depth,
        ),
    }
    library = _library()
    if library is None:
        return found
    pointer = ctypes.c_void_p(memory.data_ptr())
    vectors = ctypes.c_int64(BYTES // 64)
    # the closure keeps the memory alive
    found["read loop"] = (lambda: (library.read_all(pointer, vectors), memory), BYTES)
    loop = getattr(library, "fma_fp32" if dtype == "fp32" else "fma_bf16", None)
    if loop is not None:
        operations = 2.0 * LANES * CHAINS * STEPS * threads * (1 if dtype == "fp32" else 2)
        found["peak loop"] = (lambda: loop(ctypes.c_int64(STEPS)), operations)
    tiles = getattr(library, "tiles_bf16", None)
    if dtype != "fp32" and tiles is not None and tiles(ctypes.c_int64(1)):
        steps = STEPS // 16  # each some 64 cycles
        found["peak tiles"] = (
            lambda: tiles(ctypes.c_int64(steps)),
            2.0 * 4 * 16 * 16 * 32 * steps * threads,
        )
    return found


def _library() -> ctypes.CDLL | None:
    """SOURCE compiled for this machine; None without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "ceilings.cpp"), Path(folder, "ceilings.so")
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        try:
            subprocess.run(["g++", *flags, source, "-o", library], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return ctypes.CDLL(str(library))
