"""Skeleton: the chosen experts of many tokens, as two grouped products and a sum per token.

    hidden[i] = f(gate, up) of pair i     rows[i] = hidden[i] W_down[e]     y[t] = b_down + sum of its rows

Pair i is (token tokens[i], expert e) with offsets[e] <= i < offsets[e + 1]. The constants and `activation`
below are replaced when a block's file is generated; all sizes in elements.
"""

import triton
import triton.language as tl

D = tl.constexpr(64)
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
def lists(offsets_ptr, BLOCK_M: tl.constexpr):
    """First pair of each expert and how many tiles of BLOCK_M pairs it has, both [E_PADDED]."""
    e = tl.arange(0, E_PADDED)
    starts = tl.load(offsets_ptr + e, mask=e < E, other=0)
    ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    return starts, ends, (ends - starts + BLOCK_M - 1) // BLOCK_M


@triton.jit
def find(starts, ends, tiles, tile, BLOCK_M: tl.constexpr):
    """(expert, its first pair in a tile, the pair behind its last one) of a tile of all experts' pairs."""
    e = tl.arange(0, E_PADDED)
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    own = e == expert
    before = tl.sum(tl.where(own, upto - tiles, 0), 0)
    first = tl.sum(tl.where(own, starts, 0), 0) + (tile - before) * BLOCK_M
    return expert, first, tl.sum(tl.where(own, ends, 0), 0)


@triton.jit
def product(acc, a, b, SWAP: tl.constexpr):
    """acc + a b^T of a [M, K] and b [N, K], or its transpose [N, M] where the weights go first."""
    if SWAP:
        return tl.dot(b, tl.trans(a), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)


@triton.jit
def load_tile(
    ptrs, rows, columns, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr, POLICY: tl.constexpr
):
    """A tile, 0 outside of the masks rows and columns, which are not looked at where all is inside."""
    if ALL_ROWS and ALL_COLUMNS:
        return tl.load(ptrs, eviction_policy=POLICY)
    elif ALL_ROWS:
        return tl.load(ptrs, mask=columns[None, :], other=0.0, eviction_policy=POLICY)
    elif ALL_COLUMNS:
        return tl.load(ptrs, mask=rows[:, None], other=0.0, eviction_policy=POLICY)
    else:
        inside = rows[:, None] & columns[None, :]
        return tl.load(ptrs, mask=inside, other=0.0, eviction_policy=POLICY)


@triton.jit
def weight_tile(
    w,
    stride: tl.constexpr,
    row,
    behind,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows from `row` on of a weight [H, D], from column k on; those >= behind may hold others'."""
    if TMA:
        return w.load([row, k])
    else:
        offs_n = row + tl.arange(0, BLOCK_N)
        offs_k = k + tl.arange(0, BLOCK_K)
        ptrs = w + offs_n.to(tl.int64)[:, None] * stride + offs_k[None, :]
        all_rows: tl.constexpr = F % BLOCK_N == 0
        return load_tile(ptrs, offs_n < behind, offs_k < D, all_rows, D % BLOCK_K == 0, "")


@triton.jit
def up(
    x_ptr,  # [T, D]
    tokens_ptr,
    offsets_ptr,
    up_ptr,  # [H, D], a pointer or with TMA a descriptor of tiles
    gate_ptr,
    b_up_ptr,  # [H] or None
    b_gate_ptr,
    p_ptr,
    hidden_ptr,  # [pairs, F]
    stride_up: tl.constexpr,
    stride_gate: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
):
    """hidden[i, n] = f(gate, up) for every pair i and neuron n of its expert."""
    columns: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    starts, ends, tiles = lists(offsets_ptr, BLOCK_M)
    for work in range(tl.program_id(0), tl.sum(tiles, 0) * columns, tl.num_programs(0)):
        expert, first, last = find(starts, ends, tiles, work // columns, BLOCK_M)
        offs_m = first + tl.arange(0, BLOCK_M)
        token = tl.load(tokens_ptr + offs_m, mask=offs_m < last, other=0)
        x_rows = x_ptr + token.to(tl.int64)[:, None] * D
        row, behind = expert * F + (work - work // columns * columns) * BLOCK_N, (expert + 1) * F
        if SWAP:
            u = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        g = u
        for k in range(0, D, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = load_tile(x_rows + offs_k[None, :], None, offs_k < D, True, D % BLOCK_K == 0, "")
            w = weight_tile(up_ptr, stride_up, row, behind, k, BLOCK_N, BLOCK_K, TMA)
            u = product(u, x, w, SWAP)
            if GATED:
                w = weight_tile(gate_ptr, stride_gate, row, behind, k, BLOCK_N, BLOCK_K, TMA)
                g = product(g, x, w, SWAP)
        if SWAP:
            u, g = tl.trans(u), tl.trans(g)
        offs_n = row + tl.arange(0, BLOCK_N)
        inside = offs_n < behind
        if b_up_ptr is not None:
            u += tl.load(b_up_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            if b_gate_ptr is not None:
                g += tl.load(b_gate_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)[None, :]
            h = activation(u, g, p_ptr)
        else:
            h = activation(u, u, p_ptr)
        out = hidden_ptr + offs_m.to(tl.int64)[:, None] * F + (offs_n - expert * F)[None, :]
        kept = (offs_m < last)[:, None] & inside[None, :]
        tl.store(out, h.to(hidden_ptr.dtype.element_ty), mask=kept)


@triton.jit
def down(
    hidden_ptr,  # [pairs, F]
    tokens_ptr,
    offsets_ptr,
    down_ptr,  # [H, OUT], a pointer or with TMA a descriptor of tiles
    rows_ptr,  # [pairs, CHUNK], or with ATOMIC the sums [T, OUT] fp32
    stride_down: tl.constexpr,
    column,  # the first of CHUNK output columns
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """rows[i] = hidden[i] W_down[e] for CHUNK columns from `column` on, or that added to its token."""
    columns: tl.constexpr = (CHUNK + BLOCK_N - 1) // BLOCK_N
    even: tl.constexpr = F % BLOCK_K == 0
    whole: tl.constexpr = OUT % CHUNK == 0 and CHUNK % BLOCK_N == 0
    starts, ends, tiles = lists(offsets_ptr, BLOCK_M)
    for work in range(tl.program_id(0), tl.sum(tiles, 0) * columns, tl.num_programs(0)):
        expert, first, last = find(starts, ends, tiles, work // columns, BLOCK_M)
        offs_m = first + tl.arange(0, BLOCK_M)
        # Rows behind the last pair are copies of it, and not stored.
        hidden_rows = hidden_ptr + tl.minimum(offs_m, last - 1).to(tl.int64)[:, None] * F
        n = (work - work // columns * columns) * BLOCK_N
        offs_n = n + tl.arange(0, BLOCK_N)
        inside = (offs_n < CHUNK) & (column + offs_n < OUT)
        w_rows = expert.to(tl.int64) * F * stride_down + column
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, F, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            h = load_tile(hidden_rows + offs_k[None, :], None, offs_k < F, True, even, "")
            if TMA:
                w = down_ptr.load([expert * F + k, column + n])
            else:
                ptrs = (
                    down_ptr + w_rows + offs_k.to(tl.int64)[:, None] * stride_down + offs_n[None, :]
                )
                w = load_tile(ptrs, offs_k < F, inside, even, whole, "")
            acc = product(acc, h, tl.trans(w), SWAP)
        if SWAP:
            acc = tl.trans(acc)
        kept = (offs_m < last)[:, None] & inside[None, :]
        if ATOMIC:
            token = tl.load(tokens_ptr + offs_m, mask=offs_m < last, other=0)
            out = rows_ptr + token.to(tl.int64)[:, None] * OUT + (column + offs_n)[None, :]
            tl.atomic_add(out, acc, mask=kept, sem="relaxed")
        else:
            out = rows_ptr + offs_m.to(tl.int64)[:, None] * CHUNK + offs_n[None, :]
            tl.store(out, acc.to(rows_ptr.dtype.element_ty), mask=kept)


@triton.jit
def sum_of(
    rows_ptr, slots_ptr, token, width, offs_n, inside, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr
):
    """The sum of a token's rows [pairs, width] in the columns offs_n, BLOCK_J at a time in expert order."""
    slots = slots_ptr + token * (E + 1)
    chosen = tl.load(slots)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for j in range(0, chosen, BLOCK_J):
        offs_j = j + tl.arange(0, BLOCK_J)
        own = offs_j < chosen
        pair = tl.load(slots + 1 + offs_j, mask=own, other=0)
        rows = tl.load(
            rows_ptr + pair.to(tl.int64)[:, None] * width + offs_n[None, :],
            mask=own[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(rows.to(tl.float32), 0)
    return total


@triton.jit
def sum_pairs(
    rows_ptr,  # [pairs, WIDTH]
    slots_ptr,
    total_ptr,  # [T, WIDTH]
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """total[t] = sum of its pairs' rows."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < WIDTH
    total = sum_of(rows_ptr, slots_ptr, token, WIDTH, offs_n, inside, BLOCK_N, BLOCK_J)
    tl.store(total_ptr + token * WIDTH + offs_n, total.to(total_ptr.dtype.element_ty), mask=inside)


@triton.jit
def combine(
    rows_ptr,  # [pairs, CHUNK]
    slots_ptr,  # [T, E + 1]
    b_down_ptr,  # [OUT] or None
    y_ptr,  # [T, OUT]
    column,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """y[t, n] = b_down[n] + sum of its pairs' rows, BLOCK_J at a time in the order of the experts."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (offs_n < CHUNK) & (column + offs_n < OUT)
    total = sum_of(rows_ptr, slots_ptr, token, CHUNK, offs_n, inside, BLOCK_N, BLOCK_J)
    if b_down_ptr is not None:
        total += tl.load(b_down_ptr + column + offs_n, mask=inside, other=0.0).to(tl.float32)
    out = y_ptr + token * OUT + column + offs_n
    tl.store(out, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def finish(
    sums_ptr,  # [T, OUT] fp32
    b_down_ptr,
    y_ptr,
    BLOCK_N: tl.constexpr,
):
    """y = sums + b_down, in y's dtype: the end of the atomic strategy."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < OUT
    total = tl.load(sums_ptr + token * OUT + offs_n, mask=inside, other=0.0)
    if b_down_ptr is not None:
        total += tl.load(b_down_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * OUT + offs_n, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def pointwise(up_ptr, gate_ptr, p_ptr, hidden_ptr, size, BLOCK: tl.constexpr):
    """hidden = f(gate, up), element by element: the middle of a block whose experts all run."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(up_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    h = activation(u, g, p_ptr)
    tl.store(hidden_ptr + offs, h.to(hidden_ptr.dtype.element_ty), mask=offs < size)
