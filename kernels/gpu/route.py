"""Skeleton: from tokens to the lists of the experts they run, without a look from the host.

    scores = |relu(x W1^T) W2^T|      token t runs e unless scores[t, e] < tau * max_j scores[t, j]

tokens, offsets, slots: see kernels.dispatch. No atomics: lists are in token order, the same bits every
time. Few tokens: `hidden_few` spreads W1 over the device, `route_few` does the rest in one program. Many:
`route_many` per block of tokens, then `write_lists`, which needs the counts of the blocks before its own: it
adds them up itself, or where they are many finds the sums that `add_up` made of them. Sites that share W1
read one result of `hidden_few`, or of `hidden_many` in `route_given`, to the bits of their own.
"""

import triton
import triton.language as tl

D = tl.constexpr(64)
R = tl.constexpr(16)
R_PADDED = tl.constexpr(16)
E = tl.constexpr(4)
E_PADDED = tl.constexpr(16)
PRECISION = tl.constexpr("ieee")


@triton.jit
def gated(scores, offs_t, rows, tau_ptr):
    """[BLOCK_T, E_PADDED] int32: 1 where a token runs an expert. NaN is not compared and keeps its own."""
    offs_e = tl.arange(0, E_PADDED)
    real = (offs_t < rows)[:, None] & (offs_e < E)[None, :]
    known = tl.where(scores != scores, 0.0, scores)  # scores are no less than 0
    limit = tl.load(tau_ptr).to(tl.float32, bitcast=True) * tl.max(known, 1)
    return (real & ((scores < limit[:, None]) == 0)).to(tl.int32)


@triton.jit
def scores_of(hidden, w2_ptr):
    """|hidden W2^T| of hidden [BLOCK_T, R_PADDED] in W2's dtype, [BLOCK_T, E_PADDED] fp32."""
    offs_e, offs_r = tl.arange(0, E_PADDED), tl.arange(0, R_PADDED)
    w2 = tl.load(
        w2_ptr + offs_e[:, None] * R + offs_r[None, :],
        mask=(offs_e < E)[:, None] & (offs_r < R)[None, :],
        other=0.0,
    )
    return tl.abs(tl.dot(hidden, tl.trans(w2), input_precision=PRECISION))


@triton.jit
def write(mask, base, offs_t, tokens_ptr, slots_ptr, rows):
    """Enter a block of tokens into the lists; base [E_PADDED]: where its first pair of each expert goes."""
    pair = base[None, :] + tl.cumsum(mask, 0) - 1
    place = tl.cumsum(mask, 1)  # within the token's own list, from 1 on
    token = offs_t[:, None] + tl.zeros_like(mask)
    tl.store(tokens_ptr + pair, token, mask=mask > 0)
    own = slots_ptr + offs_t.to(tl.int64)[:, None] * (E + 1)
    tl.store(own + place, pair, mask=mask > 0)
    counts = slots_ptr + offs_t.to(tl.int64) * (E + 1)
    tl.store(counts, tl.sum(mask, 1), mask=offs_t < rows)


@triton.jit
def write_offsets(offsets_ptr, counts):
    """offsets [E + 1] of the experts' counts [E_PADDED]; returns each expert's first pair."""
    offs_e = tl.arange(0, E_PADDED)
    upto = tl.cumsum(counts, 0)
    tl.store(offsets_ptr + 1 + offs_e, upto, mask=offs_e < E)
    tl.store(offsets_ptr + offs_e, upto - counts, mask=offs_e == 0)


@triton.jit
def hidden_few(
    x_ptr,  # [T, D]
    w1_ptr,  # [R, D]
    parts_ptr,  # [SPLITS, T, R] fp32
    rows,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """parts[s] = x W1^T over every SPLITS-th block of features from block s on."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    offs_t = tl.arange(0, BLOCK_T)
    acc = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    for k in range(split * BLOCK_K, D, SPLITS * BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        w = tl.load(
            w1_ptr + offs_r[:, None] * D + offs_k[None, :],
            mask=(offs_r < R)[:, None] & (offs_k < D)[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + offs_t[None, :] * D + offs_k[:, None],
            mask=(offs_t < rows)[None, :] & (offs_k < D)[:, None],
            other=0.0,
        )
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    out = parts_ptr + (split * rows + offs_t)[None, :] * R + offs_r[:, None]
    tl.store(out, acc, mask=(offs_r < R)[:, None] & (offs_t < rows)[None, :])


@triton.jit
def route_few(
    parts_ptr,  # [SPLITS, T, R] fp32
    w2_ptr,  # [E, R]
    tau_ptr,
    tokens_ptr,
    offsets_ptr,
    slots_ptr,
    rows,
    BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """All lists of at most BLOCK_T tokens, in one program."""
    offs_t, offs_r = tl.arange(0, BLOCK_T), tl.arange(0, R_PADDED)
    inside = (offs_t < rows)[:, None] & (offs_r < R)[None, :]
    hidden = tl.zeros((BLOCK_T, R_PADDED), tl.float32)
    for s in tl.range(0, SPLITS, num_stages=3):  # on their way together, yet not in registers
        part = parts_ptr + (s * rows + offs_t)[:, None] * R + offs_r[None, :]
        hidden += tl.load(part, mask=inside, other=0.0)
    hidden = tl.where(hidden < 0, 0.0, hidden)  # relu that lets NaN pass
    scores = scores_of(hidden.to(w2_ptr.dtype.element_ty), w2_ptr)
    mask = gated(scores, offs_t, rows, tau_ptr)
    counts = tl.sum(mask, 0)
    write_offsets(offsets_ptr, counts)
    write(mask, tl.cumsum(counts, 0) - counts, offs_t, tokens_ptr, slots_ptr, rows)


@triton.jit
def hidden_of(x_ptr, w1_ptr, offs_t, rows, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """relu(x W1^T) of a block of tokens, [BLOCK_T, R_PADDED] fp32."""
    offs_r = tl.arange(0, R_PADDED)
    x_rows = x_ptr + offs_t.to(tl.int64)[:, None] * D
    acc = tl.zeros((BLOCK_T, R_PADDED), tl.float32)
    for k in range(0, D, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_rows + offs_k[None, :],
            mask=(offs_t < rows)[:, None] & (offs_k < D)[None, :],
            other=0.0,
        )
        w1 = tl.load(
            w1_ptr + offs_r[:, None] * D + offs_k[None, :],
            mask=(offs_r < R)[:, None] & (offs_k < D)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, tl.trans(w1), acc, input_precision=PRECISION)
    return tl.where(acc < 0, 0.0, acc)


@triton.jit
def choose(hidden, w2_ptr, tau_ptr, mask_ptr, counts_ptr, block, offs_t, rows):
    """Store the mask of a block of tokens, and how often it chose each expert."""
    offs_e = tl.arange(0, E_PADDED)
    scores = scores_of(hidden, w2_ptr)
    mask = gated(scores, offs_t, rows, tau_ptr)
    real = (offs_t < rows)[:, None] & (offs_e < E)[None, :]
    out = mask_ptr + offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
    tl.store(out, mask.to(tl.int8), mask=real)
    tl.store(counts_ptr + block * E + offs_e, tl.sum(mask, 0), mask=offs_e < E)


@triton.jit
def route_many(
    x_ptr,
    w1_ptr,
    w2_ptr,
    tau_ptr,
    mask_ptr,  # [T, E] int8
    counts_ptr,  # [blocks, E]
    rows,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The mask of a block of tokens, and how often it chose each expert."""
    block = tl.program_id(0)
    offs_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    hidden = hidden_of(x_ptr, w1_ptr, offs_t, rows, BLOCK_T, BLOCK_K)
    hidden = hidden.to(w2_ptr.dtype.element_ty)
    choose(hidden, w2_ptr, tau_ptr, mask_ptr, counts_ptr, block, offs_t, rows)


@triton.jit
def hidden_many(
    x_ptr,
    w1_ptr,
    hidden_ptr,  # [T, R]
    rows,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """relu(x W1^T) of a block of tokens, for the sites that share W1."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_r = tl.arange(0, R_PADDED)
    hidden = hidden_of(x_ptr, w1_ptr, offs_t, rows, BLOCK_T, BLOCK_K)
    out = hidden_ptr + offs_t.to(tl.int64)[:, None] * R + offs_r[None, :]
    inside = (offs_t < rows)[:, None] & (offs_r < R)[None, :]
    tl.store(out, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def route_given(
    hidden_ptr,  # [T, R]
    w2_ptr,
    tau_ptr,
    mask_ptr,  # [T, E] int8
    counts_ptr,  # [blocks, E]
    rows,
    BLOCK_T: tl.constexpr,
):
    """What `route_many` makes, of given hidden values."""
    block = tl.program_id(0)
    offs_t, offs_r = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, R_PADDED)
    hidden = tl.load(
        hidden_ptr + offs_t.to(tl.int64)[:, None] * R + offs_r[None, :],
        mask=(offs_t < rows)[:, None] & (offs_r < R)[None, :],
        other=0.0,
    )
    choose(hidden, w2_ptr, tau_ptr, mask_ptr, counts_ptr, block, offs_t, rows)


@triton.jit
def load_mask(mask_ptr, offs_t, rows):
    """A block of a mask [T, E] int8 as int32, 0 outside."""
    offs_e = tl.arange(0, E_PADDED)
    return tl.load(
        mask_ptr + offs_t.to(tl.int64)[:, None] * E + offs_e[None, :],
        mask=(offs_t < rows)[:, None] & (offs_e < E)[None, :],
        other=0,
    ).to(tl.int32)


@triton.jit
def count(mask_ptr, counts_ptr, rows, BLOCK_T: tl.constexpr):
    """How often a block of tokens chose each expert, of a given mask."""
    block = tl.program_id(0)
    offs_e = tl.arange(0, E_PADDED)
    mask = load_mask(mask_ptr, block * BLOCK_T + tl.arange(0, BLOCK_T), rows)
    tl.store(counts_ptr + block * E + offs_e, tl.sum(mask, 0), mask=offs_e < E)


@triton.jit
def add_up(counts_ptr, blocks, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr):
    """counts[b] = sum of counts[:b] for b = 0 .. blocks, in place, of BLOCK_E experts a program."""
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for b in range(0, blocks, BLOCK_B):
        offs_b = b + tl.arange(0, BLOCK_B)
        place = counts_ptr + offs_b[:, None] * E + offs_e[None, :]
        inside = (offs_b < blocks)[:, None] & (offs_e < E)[None, :]
        counts = tl.load(place, mask=inside, other=0)
        tl.store(place, total[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        total += tl.sum(counts, 0)
    tl.store(counts_ptr + blocks * E + offs_e, total, mask=offs_e < E)


@triton.jit
def write_lists(
    mask_ptr,  # [T, E] int8
    counts_ptr,  # [blocks, E], or with ADDED [blocks + 1, E] of `add_up`
    tokens_ptr,
    offsets_ptr,
    slots_ptr,
    rows,
    blocks,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ADDED: tl.constexpr,
):
    """The lists of one block of tokens, behind those of the blocks before it."""
    block = tl.program_id(0)
    offs_e = tl.arange(0, E_PADDED)
    total = tl.zeros((E_PADDED,), tl.int32)
    before = tl.zeros((E_PADDED,), tl.int32)
    if ADDED:
        total = tl.load(counts_ptr + blocks * E + offs_e, mask=offs_e < E, other=0)
        before = tl.load(counts_ptr + block * E + offs_e, mask=offs_e < E, other=0)
    else:
        for b in range(0, blocks, BLOCK_B):
            offs_b = b + tl.arange(0, BLOCK_B)
            counts = tl.load(
                counts_ptr + offs_b[:, None] * E + offs_e[None, :],
                mask=(offs_b < blocks)[:, None] & (offs_e < E)[None, :],
                other=0,
            )
            total += tl.sum(counts, 0)
            before += tl.sum(tl.where((offs_b < block)[:, None], counts, 0), 0)
    if block == 0:
        write_offsets(offsets_ptr, total)
    offs_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    base = tl.cumsum(total, 0) - total + before
    write(load_mask(mask_ptr, offs_t, rows), base, offs_t, tokens_ptr, slots_ptr, rows)
