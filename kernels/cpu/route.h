// Scores, gate and lists: which rows each expert runs.
#pragma once
#include "amx.h"

namespace {

// Which layer of the router is computed is known at run time only: tiles of it are compiled once for both.
enum Layer { FIRST, SECOND };

INLINE void store_scores(Layer layer, const vf (&c)[2], element* to) {
    for (int n = 0; n < 2; ++n) store_rounded(to + n * VL, layer == SECOND ? abs(c[n]) : relu(c[n]));
}

template <int M>
__attribute__((noinline)) void router_group(
    Layer layer, const lane* a, int64_t lda, int64_t count, const lane* b, int64_t steps, element* to, int64_t ld) {
    for (; count > 0; --count, a += M * lda, to += M * ld) {
        vf c[M][2] = {};
        product<M, 2>(Strided{a, lda}, b, steps, {reinterpret_cast<const char*>(b) + 4096, 2 * VL * 4}, c);
        for (int m = 0; m < M; ++m) store_scores(layer, c[m], to + m * ld);
    }
}

// to = relu(A B) of the first layer or |A B| of the second, for rows [r0, r1) and blocks [b0, b1) of 2 VL columns.
void router_product(Layer layer, bool on_tiles, const lane* a, int64_t lda, int64_t r0, int64_t r1, const lane* b,
                    int64_t steps, int64_t b0, int64_t b1, element* to, int64_t ld) {
    const int64_t rows = r1 - r0;
#if AMX
    if (on_tiles && rows >= TILE) {
        const Passes passes{rows};
        const int64_t blocks = b1 - b0;
        passes.each([&](auto m, int64_t start, int64_t count) {
            const auto step = [=](int64_t i) INLINED {
                const int64_t p = start + i / blocks;
                const Pass pass = passes.at(p);
                const lane *first = a + (r0 + pass.tile[0]) * lda, *second = a + (r0 + pass.tile[1]) * lda;
                const lane* weights = b + (b0 + i % blocks) * steps * 2 * VL;
                // read once, kept for all rows
                const Ahead ahead{reinterpret_cast<const char*>(weights) + 4096, p ? 0 : 2 * VL * 4};
                return Step{{{first, second}, lda, weights, 2 * VL, steps}, pass, ahead};
            };
            const auto write = [=](int64_t i) INLINED {
                return [=](int64_t row, vf one, vf other) INLINED {
                    const vf c[2] = {one, other};
                    store_scores(layer, c, to + (r0 + row) * ld + (b0 + i % blocks) * 2 * VL);
                };
            };
            tile_products<m()>(count * blocks, step, write, [](int64_t, const lane*) INLINED {});
        });
        return;
    }
#endif
    for (int64_t j = b0; j < b1; ++j) {
        with_tiles<UP_M>(rows, [&](auto m, int64_t first, int64_t, int64_t count) {
            router_group<m()>(layer, a + (r0 + first) * lda, lda, count, b + j * steps * 2 * VL, steps,
                              to + (r0 + first) * ld + j * 2 * VL, ld);
        });
    }
}

typedef uint8_t bytes __attribute__((vector_size(VL)));

// mask[e] = not (scores[e] < tau max_j scores[j]), 0 from E on: a NaN is not compared and keeps its expert.
void gate_row(const element* scores, float tau, uint8_t* mask) {
    vf larger = splat(-1);  // of nothing but NaN
    for (int64_t e = 0; e < EP; e += VL) larger = at_least(larger, load_elements(scores + e));
    float most = larger[0];
    for (int i = 1; i < VL; ++i) most = std::max(most, larger[i]);
    const vf limit = splat(tau * most);
    for (int64_t e = 0; e < EP; e += VL) {
        const bytes kept = __builtin_convertvector(~(load_elements(scores + e) < limit), bytes) & 1;
        std::memcpy(mask + e, &kept, sizeof kept);
    }
    std::fill(mask + E, mask + EP, uint8_t(0));
}

// Calls f(e) for the experts of a mask.
template <class F>
INLINE void each_kept(const uint8_t* mask, F f) {
    for (int64_t first = 0; first < EP; first += 8) {
        uint64_t kept;
        for (std::memcpy(&kept, mask + first, sizeof kept); kept; kept &= kept - 1) f(first + __builtin_ctzll(kept) / 8);
    }
}

// Where tau is 0 everything runs, whatever the scores are: not (s < 0 max) holds for all s >= 0 and for NaN. So it
// does where nearly everything would, and the router costs more than it saves.
void list_all(Call& call, Team team) {
    const int64_t rows = call.rows;
    for (int64_t e = E * team.me / team.n; e < E * (team.me + 1) / team.n; ++e) {
        for (int64_t r = 0; r < rows; ++r) call.tokens[e * rows + r] = int32_t(r);
    }
    if (team.me == 0) {
        for (int64_t e = 0; e <= E; ++e) call.offsets[e] = int32_t(e * rows);
    }
    call.barrier.wait(team.n);
}

// Whether a call of so many rows reads scores.
bool routes(const Site& site, int64_t rows, float tau) {
    const bool dense = site.dense_rows && rows >= site.dense_rows;
    return !dense && (tau != 0 || site.forced);
}

// call.routed = relu(x router1^T); a thread may read its own rows [r0, r1) afterwards.
void route_hidden(Call& call, Team team, int64_t r0, int64_t r1) {
    const auto [me, n] = team;
    const int64_t rows = call.rows;
    const lane* first = call.site.router;
    const lane* a = as_lanes(call.x);
    if (!PLAIN) {
        a = call.hidden;  // free until the experts run; room for rows x KS is reserved
        if (me == 0) {
            for (int64_t r = 0; r < rows; ++r) {
                const int32_t t = int32_t(r);
                gather_rows(call.x, &t, 1, call.hidden + r * KS, KS);
            }
        }
        call.barrier.wait(n);
    }
    if (rows >= int64_t(n) * (call.tiles ? TILE : UP_M)) {
        router_product(FIRST, call.tiles, a, KS, r0, r1, first, KS, 0, RB, call.routed, RL * PER_LANE);
    } else {
        router_product(FIRST, call.tiles, a, KS, 0, rows, first, KS, RB * me / n, RB * (me + 1) / n, call.routed,
                       RL * PER_LANE);
        call.barrier.wait(n);
    }
}

void route(Call& call, Team team) {
    const Site& site = call.site;
    const auto [me, n] = team;
    const int64_t rows = call.rows, r0 = rows * me / n, r1 = rows * (me + 1) / n;
    if (!routes(site, rows, call.tau)) return list_all(call, team);
    if (!call.given) route_hidden(call, team, r0, r1);
    const lane* hidden = as_lanes(call.given ? call.given : call.routed);
    const lane* second = site.router + RB * KS * 2 * VL;
    router_product(SECOND, call.tiles, hidden, RL, r0, r1, second, RS, 0, EB, call.scores, EP);
    int32_t* counts = call.counts + me * E;
    std::fill(counts, counts + E, 0);
    for (int64_t r = r0; r < r1; ++r) {
        uint8_t* mask = call.mask + r * EP;
        gate_row(call.scores + r * EP, call.tau, mask);
        if (site.forced) std::memcpy(mask, site.forced + r % site.forced_rows * E, E);
        for (int64_t e = 0; e < E; ++e) counts[e] += mask[e];
    }
    call.barrier.wait(n);
    // Every thread finds the same offsets; it writes the tokens of its own rows behind those of earlier ones.
    int32_t place[E], total = 0;
    for (int64_t e = 0; e < E; ++e) {
        if (me == 0) call.offsets[e] = total;
        place[e] = total;
        for (int i = 0; i < n; ++i) {
            if (i < me) place[e] += call.counts[i * E + e];
            total += call.counts[i * E + e];
        }
    }
    if (me == 0) call.offsets[E] = total;
    for (int64_t r = r0; r < r1; ++r) {
        each_kept(call.mask + r * EP, [&](int64_t e) { call.tokens[place[e]++] = int32_t(r); });
    }
    call.barrier.wait(n);
}

}  // namespace
