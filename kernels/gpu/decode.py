"""Skeleton: the chosen experts of few tokens, bound by the weights of the union of chosen experts.

    hidden[u, t] = f(gate, up) of token t and the u-th chosen expert, 0 if t did not choose it
    y[t] = b_down + sum over u of hidden[u, t] W_down[e(u)]

Every weight of the union is read once, by all streaming multiprocessors together; sums over experts
stay in fp32 and are added in a fixed order. Goes behind experts.py in a generated file.

With scales the weights are int8 copies (kernels/expert_mlp_int8). They become values of x's dtype in
registers, exactly, as |q| <= 127; scales of up and gate multiply fp32 sums, those of down hidden values.
"""

import triton
import triton.language as tl

from .experts import load_tile  # which a generated file holds itself

D = tl.constexpr(64)
D_PADDED = tl.constexpr(64)
OUT = tl.constexpr(64)
E = tl.constexpr(4)
E_PADDED = tl.constexpr(16)
F = tl.constexpr(16)
GATED = tl.constexpr(False)
PRECISION = tl.constexpr("ieee")


@triton.jit
def activation(up, gate, p):
    return tl.maximum(up, 0.0)


@triton.jit
def union(offsets_ptr):
    """First pair, pair behind the last, and the number of chosen experts up to each, all [E_PADDED]."""
    e = tl.arange(0, E_PADDED)
    starts = tl.load(offsets_ptr + e, mask=e < E, other=0)
    ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    return starts, ends, tl.cumsum((ends > starts).to(tl.int32), 0)


@triton.jit
def chosen(starts, ends, upto, u):
    """(expert, its first pair, the pair behind its last one) of the u-th chosen expert."""
    e = tl.arange(0, E_PADDED)
    expert = tl.sum((upto <= u).to(tl.int32), 0)
    own = e == expert
    return expert, tl.sum(tl.where(own, starts, 0), 0), tl.sum(tl.where(own, ends, 0), 0)


@triton.jit
def scale(scales_ptr, MATRIX: tl.constexpr, offs_n, inside):
    """Scales of neurons' rows in matrix number MATRIX of an int8 copy."""
    return tl.load(scales_ptr + MATRIX * E * F + offs_n, mask=inside, other=0.0)


@triton.jit
def dot_one(x_ptr, w_ptr, stride: tl.constexpr, offs_n, inside, BLOCK_N: tl.constexpr):
    """w x of one token for some rows of a weight [H, D], each read whole: [BLOCK_N] fp32."""
    offs_k = tl.arange(0, D_PADDED)
    x = tl.load(x_ptr + offs_k, mask=offs_k < D, other=0.0).to(tl.float32)
    ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * stride + offs_k[None, :]
    even: tl.constexpr = F % BLOCK_N == 0
    w = load_tile(ptrs, inside, offs_k < D, even, D == D_PADDED, "evict_first")
    return tl.sum(w.to(tl.float32) * x[None, :], 1)


@triton.jit
def decode_up_one(
    x_ptr,  # [D]
    offsets_ptr,
    up_ptr,
    gate_ptr,
    b_up_ptr,
    b_gate_ptr,
    p_ptr,
    scales_ptr,  # [2 or 3, E * F] fp32 of up, gate and down where these are int8; else None
    hidden_ptr,  # [E, F] fp32, row u belongs to the u-th chosen expert
    counters_ptr,  # [columns] int32, set to 0 for decode_down
    columns,
    stride_up: tl.constexpr,
    stride_gate: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """hidden of one token, BLOCK_N neurons a program at a time."""
    blocks: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    if tl.program_id(0) == 0:
        for c in range(columns):
            tl.store(counters_ptr + c, 0)
    starts, ends, upto = union(offsets_ptr)
    for work in range(tl.program_id(0), tl.max(upto, 0) * blocks, tl.num_programs(0)):
        u = work // blocks
        expert, _first, _last = chosen(starts, ends, upto, u)
        offs_f = (work - work // blocks * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = offs_f < F
        offs_n = expert * F + offs_f
        value = dot_one(x_ptr, up_ptr, stride_up, offs_n, inside, BLOCK_N)
        if scales_ptr is not None:
            value *= scale(scales_ptr, 0, offs_n, inside)
        if b_up_ptr is not None:
            value += tl.load(b_up_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            g = dot_one(x_ptr, gate_ptr, stride_gate, offs_n, inside, BLOCK_N)
            if scales_ptr is not None:
                g *= scale(scales_ptr, 1, offs_n, inside)
            if b_gate_ptr is not None:
                g += tl.load(b_gate_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)
            h = activation(value, g, p_ptr)
        else:
            h = activation(value, value, p_ptr)
        if scales_ptr is not None:
            h *= scale(scales_ptr, 2 if GATED else 1, offs_n, inside)
        tl.store(hidden_ptr + u * F + offs_f, h, mask=inside)


@triton.jit
def decode_up(
    x_ptr,  # [T, D]
    tokens_ptr,
    offsets_ptr,
    up_ptr,
    gate_ptr,
    b_up_ptr,
    b_gate_ptr,
    p_ptr,
    scales_ptr,
    hidden_ptr,  # [E, T, F], panel u belongs to the u-th chosen expert
    counters_ptr,
    columns,
    stride_up: tl.constexpr,
    stride_gate: tl.constexpr,
    rows,  # T
    BLOCK_T: tl.constexpr,  # >= T
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden of all tokens for the union of their experts; the weights are the first operand."""
    blocks: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    all_n: tl.constexpr = F % BLOCK_N == 0
    all_k: tl.constexpr = D % BLOCK_K == 0
    if tl.program_id(0) == 0:
        for c in range(columns):
            tl.store(counters_ptr + c, 0)
    starts, ends, upto = union(offsets_ptr)
    offs_t = tl.arange(0, BLOCK_T)
    for work in range(tl.program_id(0), tl.max(upto, 0) * blocks, tl.num_programs(0)):
        u = work // blocks
        expert, first, last = chosen(starts, ends, upto, u)
        offs_f = (work - work // blocks * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = offs_f < F
        offs_n = expert * F + offs_f
        value = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        g = value
        for k in range(0, D, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            ptrs = x_ptr + offs_t[None, :] * D + offs_k[:, None]
            x = load_tile(ptrs, offs_k < D, offs_t < rows, all_k, False, "")
            ptrs = up_ptr + offs_n.to(tl.int64)[:, None] * stride_up + offs_k[None, :]
            w = load_tile(ptrs, inside, offs_k < D, all_n, all_k, "evict_first")
            value = tl.dot(w.to(x.dtype), x, value, input_precision=PRECISION)
            if GATED:
                ptrs = gate_ptr + offs_n.to(tl.int64)[:, None] * stride_gate + offs_k[None, :]
                w = load_tile(ptrs, inside, offs_k < D, all_n, all_k, "evict_first")
                g = tl.dot(w.to(x.dtype), x, g, input_precision=PRECISION)
        if scales_ptr is not None:
            value *= scale(scales_ptr, 0, offs_n, inside)[:, None]
        if b_up_ptr is not None:
            value += tl.load(b_up_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATED:
            if scales_ptr is not None:
                g *= scale(scales_ptr, 1, offs_n, inside)[:, None]
            if b_gate_ptr is not None:
                g += tl.load(b_gate_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)[:, None]
            h = activation(value, g, p_ptr)
        else:
            h = activation(value, value, p_ptr)
        if scales_ptr is not None:
            h *= scale(scales_ptr, 2 if GATED else 1, offs_n, inside)[:, None]
        listed = first + offs_t
        token = tl.load(tokens_ptr + listed, mask=listed < last, other=-1)
        wanted = tl.max((token[:, None] == offs_t[None, :]).to(tl.int32), 0) > 0
        h = tl.where(wanted[None, :], h, 0.0)
        out = hidden_ptr + (u * rows + offs_t)[None, :] * F + offs_f[:, None]
        kept = inside[:, None] & (offs_t < rows)[None, :]
        tl.store(out, h.to(hidden_ptr.dtype.element_ty), mask=kept)


@triton.jit
def decode_down(
    hidden_ptr,  # [E, T, F], or [E, F] fp32 of one token
    offsets_ptr,
    down_ptr,  # [H, OUT], or with a unit [E, OUT, F] int8
    b_down_ptr,
    unit_ptr,  # what hidden values' scales are multiples of; None without
    partial_ptr,  # [SPLITS, T, OUT] fp32
    counters_ptr,
    y_ptr,  # [T, OUT]
    stride_down: tl.constexpr,
    rows,
    ONE: tl.constexpr,  # whether there is one token
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """y for BLOCK_N columns; SPLITS programs share the union, the last one to finish adds their parts."""
    blocks: tl.constexpr = (F + BLOCK_K - 1) // BLOCK_K
    all_k: tl.constexpr = F % BLOCK_K == 0
    all_n: tl.constexpr = OUT % BLOCK_N == 0
    column, split = tl.program_id(0), tl.program_id(1)
    starts, ends, upto = union(offsets_ptr)
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < OUT
    offs_t = tl.arange(0, BLOCK_T)
    if unit_ptr is not None:
        acc = tl.zeros((BLOCK_N, BLOCK_K if ONE else BLOCK_T), tl.float32)
    else:
        acc = tl.zeros((BLOCK_K if ONE else BLOCK_T, BLOCK_N), tl.float32)
    for work in range(split, tl.max(upto, 0) * blocks, SPLITS):
        u = work // blocks
        expert, _first, _last = chosen(starts, ends, upto, u)
        offs_k = (work - work // blocks * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        if unit_ptr is not None:
            ptrs = down_ptr + (expert.to(tl.int64) * OUT + offs_n)[:, None] * F + offs_k[None, :]
            w = load_tile(ptrs, inside, offs_k < F, all_n, all_k, "evict_first")
        else:
            ptrs = (
                down_ptr
                + (expert * F + offs_k).to(tl.int64)[:, None] * stride_down
                + offs_n[None, :]
            )
            w = load_tile(ptrs, offs_k < F, inside, all_k, all_n, "evict_first")
        if ONE:
            h = tl.load(hidden_ptr + u * F + offs_k, mask=offs_k < F, other=0.0)
            acc += w.to(tl.float32) * (h[None, :] if unit_ptr is not None else h[:, None])
        elif unit_ptr is not None:
            ptrs = hidden_ptr + (u * rows + offs_t)[None, :] * F + offs_k[:, None]
            h = load_tile(ptrs, offs_k < F, offs_t < rows, all_k, False, "")
            acc = tl.dot(w.to(h.dtype), h, acc, input_precision=PRECISION)
        else:
            ptrs = hidden_ptr + (u * rows + offs_t)[:, None] * F + offs_k[None, :]
            h = load_tile(ptrs, offs_t < rows, offs_k < F, False, all_k, "")
            acc = tl.dot(h, w, acc, input_precision=PRECISION)
    if ONE:
        acc = tl.sum(acc, 1 if unit_ptr is not None else 0)[None, :]
    elif unit_ptr is not None:
        acc = tl.trans(acc)
    if unit_ptr is not None:
        acc *= tl.load(unit_ptr)
    kept = (offs_t < rows)[:, None] & inside[None, :]
    out = offs_t[:, None] * OUT + offs_n[None, :]
    tl.store(partial_ptr + split * rows * OUT + out, acc, mask=kept)
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + column, 1, sem="acq_rel") == SPLITS - 1:
        tl.debug_barrier()
        total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for s in range(SPLITS):
            part = partial_ptr + s * rows * OUT + out
            total += tl.load(part, mask=kept, other=0.0, cache_modifier=".cg")
        if b_down_ptr is not None:
            total += tl.load(b_down_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + out, total.to(y_ptr.dtype.element_ty), mask=kept)
