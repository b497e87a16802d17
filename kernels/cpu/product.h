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

// What is read some bytes after the weights at `offset` of a contiguous piece of `size` bytes: the rest of the
// piece, then the start of the `next` one. The distance hides memory's latency (near); it is longer where several
// tiles of rows pass over the same weights, so that arithmetic and reading overlap (far).
INLINE const char* later(const Site& site, const lane* piece, int64_t offset, int64_t size, const lane* next,
                         int64_t rows) {
    const int64_t at = offset + (rows <= PASS ? site.near : site.far);
    return reinterpret_cast<const char*>(at < size ? piece : next) + (at < size ? at : at - size);
}

// Of some bytes, the part that each of `tiles` tiles fetches while it takes `steps` steps.
struct Parts {
    int64_t each, pace;
    INLINED Parts(int64_t bytes, int64_t tiles, int64_t steps) : each(bytes / tiles), pace(bytes / (tiles * steps)) {}
    INLINED Ahead of(const char* from, int64_t tile) const { return {from + each * tile, pace}; }
};

#if AMX
// Rows of x one behind the other, for passes of tiles: each is copied while the one before is multiplied.
class Gatherer {
    static constexpr bool LINES = PLAIN && KS % VL == 0;  // else the last lane of a row is half of it
    const element* x;
    const int32_t* tokens;
    int64_t rows, row = 0, step = 0;  // copied so far: rows, and steps of the next one
    lane* ring;                       // of two passes

    lane* place(int64_t r) const { return ring + r % (2 * PASS) * APART; }

public:
    INLINED Gatherer(const Call& call, const int32_t* tokens, int64_t rows, lane* ring)
        : x(call.x), tokens(tokens), rows(rows), ring(ring) {}
    INLINED const lane* tile(int64_t r) const { return place(r); }
    // Copies the rows until `to`.
    INLINED void finish(int64_t to) {
        to = std::min(to, rows);
        if (LINES) while (row < to) some(KS, to);
        else if (row < to) gather_rows(x, tokens + row, to - row, place(row), APART), row = to;
    }
    // Copies up to `steps` of the next row before `to`.
    INLINED void some(int64_t steps, int64_t to) {
        if (!LINES || row >= std::min(to, rows)) return;
        const int64_t next = std::min(row + 1, rows - 1), until = std::min(KS, step + steps);
        const lane *from = as_lanes(x + tokens[row] * int64_t(D)), *ahead = as_lanes(x + tokens[next] * int64_t(D));
        lane* to_row = place(row);
        for (int64_t k = step; k < until; k += VL) {
            __builtin_prefetch(ahead + k);
            const vu line = load_lanes(from + k);
            std::memcpy(to_row + k, &line, sizeof line);
        }
        step = until < KS ? until : 0;
        row += until == KS;
    }
};

// As up_rows, on tiles, for rows of the list `tokens`: x itself from `plain` on, or copied into `ring` if that is null.
// Rows of A behind the last, of the ring or where x has fewer than 16, are read, and ignored.
void up_tiles(const Call& call, const lane* plain, const int32_t* tokens, int64_t rows, const lane* packed, int64_t b0,
              int64_t b1, int64_t size, const lane* next, lane* ring, element* h) {
    constexpr int64_t LDH = HL * PER_LANE;
    const Site& site = call.site;
    const float* scalars = site.scalars;
    const Passes passes{rows};
    const int64_t blocks = b1 - b0, all = ceil_div(rows, PASS);
    const Parts parts(BLOCK_LANES * 4, all, KS);
    Gatherer gatherer(call, tokens, plain ? 0 : rows, ring);
    const auto block = [=](int64_t i) INLINED { return packed + (b0 + i % blocks) * BLOCK_LANES; };
    const auto write = [=](int64_t i) INLINED {
        const lane* from = block(i);
        const int64_t first = (b0 + i % blocks) * BLOCK;
        const vf bias[2] = {(vf)load_lanes(from), (vf)load_lanes(from + VL)};
        return [=](int64_t row, vf one, vf other) INLINED {
            const vf c[2] = {one + bias[0], other + bias[1]};
            store_hidden(c, scalars, h + row * LDH + first, int(std::min<int64_t>(BLOCK, S - first)));
        };
    };
    passes.each([&](auto m, int64_t start, int64_t count) {
        int64_t until = 0;  // what is copied meanwhile
        const auto step = [&](int64_t i) INLINED {
            const int64_t p = start + i / blocks;
            const Pass pass = passes.at(p);
            gatherer.finish(pass.from + PASS);
            until = pass.from + 2 * PASS;
            const char* from = later(site, packed, (b0 + i % blocks) * BLOCK_LANES * 4, size, next, rows);
            const lane* a = plain ? plain + pass.tile[0] * KS : gatherer.tile(pass.from);
            const int64_t lda = plain ? KS : APART;
            const int64_t second = plain ? pass.tile[1] - pass.tile[0] : TILE;
            return Step{{{a, a + second * lda}, lda, block(i) + 2 * VL, 2 * VL, KS},
                        plain ? pass : Pass{pass.from, pass.until, {pass.from, pass.from + TILE}},
                        parts.of(from, p)};
        };
        const int64_t pieces = std::max<int64_t>(1, blocks * (KS / TILE) / PASS);  // of a row
        const int64_t steps = ceil_div(KS / VL, pieces) * VL;
        tile_products<m()>(count * blocks, step, write, [&](int64_t, const lane*) INLINED { gatherer.some(steps, until); });
    });
}
#endif

// h[r] = f(a[r] W_up^T + b) for `count` tiles of M rows from row r on, and one block of neurons. row(r): where row r of A
// begins; `to`: the block's place in row 0 of h; `ahead`: what the first tile fetches, each later one `parts.each` on.
template <int M, class F>
__attribute__((noinline)) void up_group(F row, int64_t r, int64_t count, const lane* block, Ahead ahead, Parts parts,
                                        const float* scalars, element* to, int64_t ldh, int valid) {
    for (const int64_t end = r + count * M; r < end; r += M, ahead.from += parts.each) {
        const lane* a[M];
        for (int m = 0; m < M; ++m) a[m] = row(r + m);
        vf c[M][2];
        UNROLL for (int m = 0; m < M; ++m) {
            UNROLL for (int n = 0; n < 2; ++n) c[m][n] = (vf)load_lanes(block + n * VL);
        }
        product<M, 2>(Scattered{a}, block + 2 * VL, KS, ahead, c);
        for (int m = 0; m < M; ++m) store_hidden(c[m], scalars, to + (r + m) * ldh, valid);
    }
}

// Hidden values of `rows` rows of A for blocks [b0, b1) of an expert; `next` is read after its `size` bytes.
template <class F>
void up_rows(const Site& site, F row, int64_t rows, const lane* packed, int64_t b0, int64_t b1, int64_t size,
             const lane* next, element* h, int64_t ldh) {
    const Parts parts(BLOCK_LANES * 4, ceil_div(rows, UP_M), KS);
    for (int64_t b = b0; b < b1; ++b) {
        const int valid = int(std::min<int64_t>(BLOCK, S - b * BLOCK));
        const char* from = later(site, packed, b * BLOCK_LANES * 4, size, next, rows);
        with_tiles<UP_M>(rows, [&](auto m, int64_t first, int64_t before, int64_t count) {
            up_group<m()>(row, first, count, packed + b * BLOCK_LANES, parts.of(from, before), parts, site.scalars,
                          h + b * BLOCK, ldh, valid);
        });
    }
}

// Hidden values and panels of one expert, or of several with the same rows.
struct Summed {
    const lane* h;
    int64_t ldh;
    const lane* panel;
    int64_t steps, experts = 1, next_h = 0;  // lanes from one expert's hidden values to the next one's
};

// y[token[r]] += h[r] W_down for `count` tiles of M rows; `ahead` and `parts` as of up_group.
template <int M>
__attribute__((noinline)) void down_group(Summed of, int64_t count, Ahead ahead, Parts parts, float* y,
                                          const int32_t* token, int64_t ldy) {
    for (; count > 0; --count, of.h += M * of.ldh, token += M) {
        vf c[M][DN] = {};
        if (of.steps > RUN) {
            product<M, DN>(Strided{of.h, of.ldh}, of.panel, of.steps, ahead, c);
        } else {  // sums stay in registers
            Ahead now = ahead;
            for (int64_t i = 0; i < of.experts; ++i, now.from += now.pace * of.steps) {
                tile<M, DN>(Strided{of.h + i * of.next_h, of.ldh}, of.panel + i * EXPERT_LANES, of.steps, now, c);
            }
        }
        ahead.from += parts.each;
        UNROLL for (int m = 0; m < M; ++m) {
            UNROLL for (int n = 0; n < DN; ++n) {
                float* to = y + token[m] * ldy + n * VL;
                store(to, load(to) + c[m][n]);
            }
        }
    }
}

#if AMX
// As down_rows, on tiles: y[token[r]] += h[r] W_down for `panels` panels, of.b being the first of them.
void down_strip(const Factors& of, int64_t panels, int64_t rows, const char* from, float* y, const int32_t* token,
                int64_t ldy) {
    const int64_t steps = of.parts * of.steps, bytes = steps * WIDE * 4, halves = 2 * panels;
    const Passes passes{rows};
    const Parts parts(bytes, ceil_div(rows, PASS), steps);
    passes.each([&](auto m, int64_t start, int64_t count) {
        const auto step = [=](int64_t i) INLINED {
            const int64_t p = start + i / halves, half = i % halves;
            Step step{of, passes.at(p), parts.of(from + half * bytes, p)};
            for (int t = 0; t < 2; ++t) step.of.a[t] = of.a[0] + step.pass.tile[t] * of.lda;
            step.of.b += half / 2 * PANEL_LANES + half % 2 * WIDE;
            return step;
        };
        const auto write = [=](int64_t i) INLINED {
            float* first = y + i % halves * WIDE;
            return [=](int64_t row, vf one, vf other) INLINED {
                float* to = first + token[row] * ldy;
                store(to, load(to) + one);
                store(to + VL, load(to + VL) + other);
            };
        };
        // Hidden values come from L3 or another core, farther than a core looks ahead: those of the next pass are fetched.
        const auto fetch = [=](int64_t i, const lane* a) INLINED {
            const int64_t half = i % halves;
            for (int64_t row = PASS * half / halves; row < PASS * (half + 1) / halves; ++row) {
                __builtin_prefetch(a + (PASS + row) * of.lda, 0, 2);
            }
        };
        tile_products<m()>(count * halves, step, write, fetch);
    });
}
#endif

// y[token[r]] += h[r] W_down over the steps of one panel; y points at the panel's columns.
void down_rows(bool on_tiles, const Summed& of, int64_t rows, const char* from, float* y, const int32_t* token,
               int64_t ldy) {
#if AMX
    if (on_tiles && of.steps >= TILE) {
        return down_strip({{of.h, of.h}, of.ldh, of.panel, PANEL, of.steps}, 1, rows, from, y, token, ldy);
    }
#endif
    const int64_t steps = of.experts * of.steps;
    const Parts parts(steps * PANEL * 4, ceil_div(rows, DN_M), steps);
    with_tiles<DN_M>(rows, [&](auto m, int64_t first, int64_t before, int64_t count) {
        Summed rest = of;
        rest.h += first * of.ldh;
        down_group<m()>(rest, count, parts.of(from, before), parts, y, token + first, ldy);
    });
}

}  // namespace
