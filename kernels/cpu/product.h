// Rows of tokens times blocks of neurons, and rows of hidden values times panels of columns.
#pragma once
#include "amx.h"

namespace {

// Hidden values of one row from its sums for a block of neurons.
INLINE void store_hidden(const vf (&c)[2], const float* scalars, element* h, int valid) {
    if (GATED) {
        store_rounded(h, activation(c[1], c[0], scalars));
    } else {
        for (int n = 0; n < 2; ++n) store_rounded(h + n * VL, activation(c[n], c[n], scalars));
    }
    if (S % BLOCK) std::fill(h + valid, h + BLOCK, element(0));  // not 0 for every f
}

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
    for (int m = 0; m < M; ++m) store_hidden(c[m], scalars, to + m * ldh, valid);
}

// What is read some bytes after the weights at `offset` of a contiguous piece of `size` bytes: the rest of the
// piece, then the start of the `next` one. The distance hides memory's latency (near); it is longer where several
// tiles of rows pass over the same weights, so that arithmetic and reading overlap (far).
INLINE const char* later(const Site& site, const lane* piece, int64_t offset, int64_t size, const lane* next,
                         int64_t rows) {
    const int64_t at = offset + (rows <= PASS ? site.near : site.far);
    return reinterpret_cast<const char*>(at < size ? piece : next) + (at < size ? at : at - size);
}

// The part of `bytes` ahead that tile i of `tiles` fetches while it takes `steps` steps.
INLINE Ahead part(const char* from, int64_t bytes, int64_t i, int64_t tiles, int64_t steps) {
    return {from + bytes * i / tiles, bytes / (tiles * steps)};
}

#if AMX
// As up_rows, on tiles: `done` of all `total` rows of these weights have been before. Where there are fewer than 16,
// rows of A behind the last are read, and ignored.
void up_chunk(const Site& site, const lane* a, int64_t lda, int64_t rows, const lane* packed, int64_t b0, int64_t b1,
              int64_t size, const lane* next, element* h, int64_t ldh, int64_t done, int64_t total) {
    const int64_t passes = ceil_div(total, PASS);
    const auto block = [&](int64_t j) { return packed + (b0 + j) * BLOCK_LANES; };
    const auto factors = [&](int64_t j) { return Factors{a, lda, block(j) + 2 * VL, 2 * VL, KS}; };
    each_tile(rows, [&](auto m, int64_t r, int64_t r0, int64_t r1) {
        const auto ahead = [&](int64_t j) {
            const char* from = later(site, packed, (b0 + j) * BLOCK_LANES * 4, size, next, total);
            return part(from, BLOCK_LANES * 4, (done + r) / PASS, passes, KS);
        };
        tile_products<m()>(rows, r, r0, r1, b1 - b0, factors, ahead, [&](int64_t j, int64_t row, vf (&c)[2]) {
            UNROLL for (int n = 0; n < 2; ++n) c[n] += (vf)load_lanes(block(j) + n * VL);
            const int64_t b = b0 + j;
            store_hidden(c, site.scalars, h + row * ldh + b * BLOCK, int(std::min<int64_t>(BLOCK, S - b * BLOCK)));
        });
    });
}
#endif

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

#if AMX
// As down_rows, on tiles: y[token[r]] += h[r] W_down for `panels` panels, of.b being the first of them.
void down_strip(const Factors& of, int64_t panels, int64_t rows, const char* from, float* y, const int32_t* token,
                int64_t ldy) {
    const int64_t passes = ceil_div(rows, PASS), steps = of.parts * of.steps, bytes = steps * WIDE * 4;
    const auto factors = [&](int64_t half) {
        Factors one = of;
        one.b += half / 2 * PANEL_LANES + half % 2 * WIDE;
        return one;
    };
    each_tile(rows, [&](auto m, int64_t r, int64_t r0, int64_t r1) {
        const auto ahead = [&](int64_t half) { return part(from + half * bytes, bytes, r / PASS, passes, steps); };
        tile_products<m()>(rows, r, r0, r1, 2 * panels, factors, ahead, [&](int64_t half, int64_t row, vf (&c)[2]) {
            float* to = y + token[row] * ldy + half * WIDE;
            UNROLL for (int n = 0; n < 2; ++n) store(to + n * VL, load(to + n * VL) + c[n]);
        });
    });
}
#endif

// y[token[r]] += h[r] W_down over `steps` steps of one panel; y points at the panel's columns.
void down_rows(bool on_tiles, const lane* h, int64_t ldh, int64_t rows, const lane* panel, int64_t steps,
               const char* from, float* y, const int32_t* token, int64_t ldy) {
#if AMX
    if (on_tiles && steps >= TILE) return down_strip({h, ldh, panel, PANEL, steps}, 1, rows, from, y, token, ldy);
#endif
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
