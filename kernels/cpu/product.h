// Rows of tokens times blocks of neurons, and rows of hidden values times panels of columns.
#pragma once
#include "site.h"

namespace {

// h[m] = f(a[m] W_up^T + b) for one block of neurons; `to` is the block's place in the first row.
template <int M>
__attribute__((noinline)) void up_tile(
    const lane* a, int64_t lda, const lane* block, Ahead ahead, const float* scalars, element* to,
    int64_t ldh, int valid) {
    vf c[M][2];
    UNROLL for (int m = 0; m < M; ++m) {
        UNROLL for (int n = 0; n < 2; ++n) c[m][n] = (vf)load_lanes(block + n * VL);
    }
    product<M, 2>(a, lda, block + 2 * VL, KS, ahead, c);
    for (int m = 0; m < M; ++m) {
        element* h = to + m * ldh;
        if (GATED) {
            store_rounded(h, activation(c[m][1], c[m][0], scalars));
        } else {
            for (int n = 0; n < 2; ++n) store_rounded(h + n * VL, activation(c[m][n], c[m][n], scalars));
        }
        if (S % BLOCK) std::fill(h + valid, h + BLOCK, element(0));  // not 0 for every f
    }
}

// What is read some bytes after the weights at `offset` of a contiguous piece of `size` bytes: the rest of the
// piece, then the start of the `next` one. The distance hides memory's latency (near); it is longer where several
// tiles of rows pass over the same weights, so that arithmetic and reading overlap (far).
INLINE const char* later(const Site& site, const lane* piece, int64_t offset, int64_t size, const lane* next,
                         int64_t rows) {
    const int64_t at = offset + (rows <= UP_M ? site.near : site.far);
    return reinterpret_cast<const char*>(at < size ? piece : next) + (at < size ? at : at - size);
}

// The part of `bytes` ahead that tile i of `tiles` fetches while it takes `steps` steps.
INLINE Ahead part(const char* from, int64_t bytes, int64_t i, int64_t tiles, int64_t steps) {
    return {from + bytes * i / tiles, bytes / (tiles * steps)};
}

// Hidden values of `rows` rows of A for blocks [b0, b1) of an expert; `next` is read after its `size` bytes.
void up_rows(const Site& site, const lane* a, int64_t lda, int64_t rows, const lane* packed, int64_t b0,
             int64_t b1, int64_t size, const lane* next, element* h, int64_t ldh) {
    const int64_t tiles = ceil_div(rows, UP_M);
    for (int64_t b = b0; b < b1; ++b) {
        const int valid = int(std::min<int64_t>(BLOCK, S - b * BLOCK));
        const char* from = later(site, packed, b * BLOCK_LANES * 4, size, next, rows);
        for (int64_t i = 0, r = 0; i < tiles; ++i) {
            const int64_t next = rows * (i + 1) / tiles;  // even heights: 13 = 7 + 6
            with_rows<UP_M>(int(next - r), [&](auto m) {
                up_tile<m()>(a + r * lda, lda, packed + b * BLOCK_LANES,
                             part(from, BLOCK_LANES * 4, i, tiles, KS), site.scalars,
                             h + r * ldh + b * BLOCK, ldh, valid);
            });
            r = next;
        }
    }
}

template <int M>
__attribute__((noinline)) void down_tile(
    const lane* h, int64_t ldh, const lane* panel, int64_t steps, Ahead ahead, float* y,
    const int32_t* token, int64_t ldy) {
    vf c[M][DN] = {};
    product<M, DN>(h, ldh, panel, steps, ahead, c);
    UNROLL for (int m = 0; m < M; ++m) {
        UNROLL for (int n = 0; n < DN; ++n) {
            float* to = y + token[m] * ldy + n * VL;
            store(to, load(to) + c[m][n]);
        }
    }
}

// y[token[r]] += h[r] W_down over `steps` steps of one panel; y points at the panel's columns.
void down_rows(const lane* h, int64_t ldh, int64_t rows, const lane* panel, int64_t steps,
               const char* from, float* y, const int32_t* token, int64_t ldy) {
    const int64_t tiles = ceil_div(rows, DN_M);
    for (int64_t i = 0, r = 0; i < tiles; ++i) {
        const int64_t next = rows * (i + 1) / tiles;
        with_rows<DN_M>(int(next - r), [&](auto m) {
            down_tile<m()>(h + r * ldh, ldh, panel, steps, part(from, steps * PANEL * 4, i, tiles, steps), y,
                           token + r, ldy);
        });
        r = next;
    }
}

}  // namespace
