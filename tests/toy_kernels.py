"""Small Triton kernels for the tests of ahead-of-time compilation."""

import triton
import triton.language as tl


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0)


@triton.jit
def scale(x_ptr, y_ptr, bias_ptr, n, factor: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = ACT(factor x[i] + bias[i]); bias may be absent."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n).to(tl.float32) * factor
    if bias_ptr is not None:
        x += tl.load(bias_ptr + i, mask=i < n).to(tl.float32)
    tl.store(y_ptr + i, ACT(x).to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def product(
    a_ptr,
    b_ptr,
    c_ptr,
    k,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr = False,
):
    """c = a b^T, tile by tile; added atomically in fp32 with ADD. a [M, k]   b [n, k]   c [M, n]"""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * k + offs_k
    b_ptrs = b_ptr + offs_n[:, None] * k + offs_k
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, k, BLOCK_K):
        total = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs).T, total)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    c_ptrs = c_ptr + offs_m[:, None] * n + offs_n
    if ADD:
        tl.atomic_add(c_ptrs, total, sem="relaxed")
    else:
        tl.store(c_ptrs, total.to(c_ptr.dtype.element_ty))
