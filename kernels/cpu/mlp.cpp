// y[t] = b_down + sum over e in S(t) of f(g_e, u_e) W_down[e]: router, gate, lists and experts in one call.
//
// The generator puts the constants D, OUT, S, E, R, GATED, BF16 and the function `activation` above this text;
// d2dcompile.kernels.native does that; dynamic_mlp and expert_mlp there are the meanings.
//
// Weights are packed per expert: blocks of neurons for the up side, [bias][step][2][VL] (two vectors of
// neurons, or the gate and the up rows of one), then panels of output columns, [panel][step][DN][VL].
// Three schedules, each bit-reproducible for a number of threads (no atomics, fixed order of sums):
//   decode     one row: neurons of the chosen experts shared out evenly, read where the model keeps them.
//   fused      few rows: every thread streams its share of the chosen experts' blocks once, up and down,
//              into an output of its own; one reduction.
//   two-phase  many rows: hidden values of all (token, expert) pairs first; then every thread owns columns.

#include "tile.h"

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <type_traits>

namespace {

#if defined(__AVX512F__) || defined(__ARM_NEON)  // 32 registers of a vector
constexpr int UP_M = 12, DN_M = 6, DN = 4;
#else  // 16
constexpr int UP_M = 6, DN_M = 6, DN = 2;
#endif
constexpr int BLOCK = GATED ? VL : 2 * VL;  // neurons of one block
constexpr int64_t KS = lanes_of(D);         // steps of the up product
constexpr int64_t SS = lanes_of(S);         // steps of the down product of one expert
constexpr int64_t NB = ceil_div(S, BLOCK);
constexpr int64_t HL = NB * BLOCK / PER_LANE;  // lanes of one row of hidden values
constexpr int64_t BLOCK_LANES = 2 * VL + KS * 2 * VL;
constexpr int PANEL = DN * VL;  // output columns of one panel
constexpr int64_t NP = ceil_div(OUT, PANEL);
constexpr int64_t PANEL_LANES = SS * PANEL;
constexpr int64_t UP_LANES = NB * BLOCK_LANES;
constexpr int64_t EXPERT_LANES = UP_LANES + NP * PANEL_LANES;
constexpr int64_t RB = ceil_div(R, 2 * VL), RS = lanes_of(R);
constexpr int64_t RL = RB * 2 * VL / PER_LANE;
constexpr int64_t EB = ceil_div(E, 2 * VL);
constexpr int64_t EP = EB * 2 * VL;
constexpr int64_t ROUTER_LANES = RB * KS * 2 * VL + EB * RS * 2 * VL;
constexpr int64_t GATHERED = std::max<int64_t>(UP_M, (int64_t(1) << 20) / (4 * KS) / UP_M * UP_M);
constexpr int64_t CHUNK = 2048;  // rows taken at once by two-phase

// What a call needs beside x, as 64-bit integers: addresses, strides in elements. The same as FIELDS in
// d2dcompile.kernels.native.
struct Site {
    int64_t run, id;
    const element *up, *gate, *down;
    int64_t up_stride, gate_stride, down_stride;
    const element *b_up, *b_gate, *b_down;
    const lane *router, *packed;
    const int32_t* tau;
    const uint8_t* forced;
    int64_t forced_rows;
    const float* scalars;
    int64_t decode;      // whether one row is read from the model's own weights
    int64_t packs;       // whether to ask for a packed copy where there is none
    int64_t fused_rows;  // up to how many rows the fused schedule runs
    int64_t dense_rows;  // from how many rows on everything runs, 0 for never
};

enum Status : int64_t { RAN = 0, NO_MEMORY = 1, WANTS_PACKED = 2 };

struct Barrier {
    std::atomic<int> arrived{0}, turn{0};
    void wait(int threads) {
        if (threads == 1) return;
        const int mine = turn.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            turn.store(mine + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn.load(std::memory_order_acquire) == mine; ++spins) {
            if (spins > 4096) sched_yield();
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
};

// Memory that grows and is kept, one a calling thread: fresh pages cost more than small calls do.
class Scratch {
    char* memory = nullptr;
    size_t size = 0, used = 0;

public:
    ~Scratch() { std::free(memory); }
    bool reserve(size_t bytes) {
        used = 0;
        if (bytes <= size) return true;
        std::free(memory);
        size = (bytes + 4095) / 4096 * 4096;
        memory = static_cast<char*>(std::aligned_alloc(4096, size));
        if (!memory) size = 0;
        return memory != nullptr;
    }
    template <class T>
    T* take(size_t count) {
        T* start = reinterpret_cast<T*>(memory + used);
        used += (count * sizeof(T) + 127) / 128 * 128;
        return start;
    }
};
thread_local Scratch scratch;

INLINE const lane* as_lanes(const element* p) { return reinterpret_cast<const lane*>(p); }

// The lane with elements k and k + 1 (bf16) or k (fp32) of a row of `size` elements.
INLINE lane lane_at(const element* row, int64_t step, int64_t size) {
    lane bits = 0;
    const int64_t k = step * PER_LANE, count = std::min<int64_t>(PER_LANE, size - k);
    std::memcpy(&bits, row + k, size_t(count) * sizeof(element));
    return bits;
}

// ---- packing ---------------------------------------------------------------------------------------

// VL rows of a row-major matrix as [step][VL] at a distance of `apart` lanes; rows from `rows` on are zero.
void pack_rows(const element* w, int64_t stride, int64_t rows, int64_t size, lane* to, int64_t apart) {
    const int64_t steps = lanes_of(size), whole = size / PER_LANE;
    for (int64_t k = 0; k < steps; ++k) {
        lane* out = to + k * apart;
        for (int64_t i = 0; i < VL; ++i) {
            if (i >= rows) out[i] = 0;
            else if (k < whole) std::memcpy(out + i, w + i * stride + k * PER_LANE, sizeof(lane));
            else out[i] = lane_at(w + i * stride, k, size);
        }
    }
}

void pack_bias(const element* bias, int64_t rows, lane* to) {
    for (int64_t i = 0; i < VL; ++i) {
        const float value = bias && i < rows ? to_float(bias[i]) : 0.0f;
        std::memcpy(to + i, &value, sizeof value);
    }
}

// Neurons of block b of expert e: [2][VL] biases, then [step][2][VL].
void pack_block(const Site& site, int64_t e, int64_t b, lane* to) {
    for (int half = 0; half < 2; ++half) {
        const int64_t first = b * BLOCK + (GATED ? 0 : half * VL);
        const int64_t rows = std::clamp<int64_t>(S - first, 0, VL), neuron = e * S + first;
        const bool is_gate = GATED && half == 0;
        const element* w = is_gate ? site.gate : site.up;
        const element* bias = is_gate ? site.b_gate : site.b_up;
        const int64_t stride = is_gate ? site.gate_stride : site.up_stride;
        pack_bias(bias ? bias + neuron : nullptr, rows, to + half * VL);
        pack_rows(w + neuron * stride, stride, rows, D, to + (2 + half) * VL, 2 * VL);
    }
}

// Output columns of panel p of expert e, [step][PANEL], neurons along the steps.
void pack_panel(const Site& site, int64_t e, int64_t p, lane* to) {
    const int64_t first = p * PANEL, width = std::min<int64_t>(PANEL, OUT - first);
    for (int64_t s = 0; s < SS; ++s) {
        element pair[PANEL][PER_LANE] = {};
        for (int64_t i = 0; i < PER_LANE && s * PER_LANE + i < S; ++i) {
            const element* row = site.down + (e * S + s * PER_LANE + i) * site.down_stride + first;
            for (int64_t c = 0; c < width; ++c) pair[c][i] = row[c];
        }
        std::memcpy(to + s * PANEL, pair, sizeof pair);
    }
}

void pack_expert(const Site& site, int64_t e, lane* to) {
    for (int64_t b = 0; b < NB; ++b) pack_block(site, e, b, to + b * BLOCK_LANES);
    for (int64_t p = 0; p < NP; ++p) pack_panel(site, e, p, to + UP_LANES + p * PANEL_LANES);
}

// ---- products --------------------------------------------------------------------------------------

// h[m] = f(a[m] W_up^T + b) for one block of neurons; `to` is the block's place in the first row.
template <int M>
__attribute__((noinline)) void up_tile(
    const lane* a, int64_t lda, const lane* block, Ahead ahead, const float* scalars, element* to,
    int64_t ldh, int valid) {
    vf c[M][2];
    UNROLL for (int m = 0; m < M; ++m) {
        UNROLL for (int n = 0; n < 2; ++n) c[m][n] = (vf)load_lanes(block + n * VL);
    }
    tile<M, 2>(a, lda, block + 2 * VL, KS, ahead, c);
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
// piece, then the start of the `next` one. The distance hides memory's latency; it is longer where several
// tiles of rows pass over the same weights, so that arithmetic and reading overlap (measured on Zen 4).
INLINE const char* later(const lane* piece, int64_t offset, int64_t size, const lane* next, int64_t rows) {
    const int64_t at = offset + (rows <= UP_M ? 8192 : 65536);
    return reinterpret_cast<const char*>(at < size ? piece : next) + (at < size ? at : at - size);
}

// The part of `bytes` ahead that tile i of `tiles` fetches while it takes `steps` steps.
INLINE Ahead part(const char* from, int64_t bytes, int64_t i, int64_t tiles, int64_t steps) {
    return {from + bytes * i / tiles, bytes / (tiles * steps)};
}

// Hidden values of `rows` rows of A for blocks [b0, b1) of an expert; `next` is read after its `size` bytes.
void up_rows(const lane* a, int64_t lda, int64_t rows, const lane* packed, int64_t b0, int64_t b1,
             int64_t size, const lane* next, const float* scalars, element* h, int64_t ldh) {
    const int64_t tiles = ceil_div(rows, UP_M);
    for (int64_t b = b0; b < b1; ++b) {
        const int valid = int(std::min<int64_t>(BLOCK, S - b * BLOCK));
        const char* from = later(packed, b * BLOCK_LANES * 4, size, next, rows);
        for (int64_t i = 0, r = 0; i < tiles; ++i) {
            const int64_t next = rows * (i + 1) / tiles;  // even heights: 13 = 7 + 6
            with_rows<UP_M>(int(next - r), [&](auto m) {
                up_tile<m()>(a + r * lda, lda, packed + b * BLOCK_LANES,
                             part(from, BLOCK_LANES * 4, i, tiles, KS), scalars,
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
    vf c[M][DN];
    UNROLL for (int m = 0; m < M; ++m) {
        UNROLL for (int n = 0; n < DN; ++n) c[m][n] = load(y + token[m] * ldy + n * VL);
    }
    tile<M, DN>(h, ldh, panel, steps, ahead, c);
    UNROLL for (int m = 0; m < M; ++m) {
        UNROLL for (int n = 0; n < DN; ++n) store(y + token[m] * ldy + n * VL, c[m][n]);
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

// ---- routing ---------------------------------------------------------------------------------------

template <int M, bool ABS>
__attribute__((noinline)) void router_tile(
    const lane* a, int64_t lda, const lane* b, int64_t steps, element* to, int64_t ld) {
    vf c[M][2] = {};
    tile<M, 2>(a, lda, b, steps, {reinterpret_cast<const char*>(b) + 4096, 2 * VL * 4}, c);
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < 2; ++n) {
            for (int i = 0; i < VL; ++i) {
                const float v = c[m][n][i];
                to[m * ld + n * VL + i] = rounded(ABS ? std::fabs(v) : v < 0 ? 0.0f : v);
            }
        }
    }
}

// to = |A B| or relu(A B) for rows [r0, r1) and blocks [b0, b1) of 2 VL columns.
template <bool ABS>
void router_product(const lane* a, int64_t lda, int64_t r0, int64_t r1, const lane* b, int64_t steps,
                    int64_t b0, int64_t b1, element* to, int64_t ld) {
    const int64_t rows = r1 - r0, tiles = ceil_div(rows, UP_M);
    for (int64_t j = b0; j < b1; ++j) {
        for (int64_t i = 0, r = 0; i < tiles; ++i) {
            const int64_t next = rows * (i + 1) / tiles;
            with_rows<UP_M>(int(next - r), [&](auto m) {
                router_tile<m(), ABS>(a + (r0 + r) * lda, lda, b + j * steps * 2 * VL, steps,
                                      to + (r0 + r) * ld + j * 2 * VL, ld);
            });
            r = next;
        }
    }
}

// mask[e] = not (scores[e] < tau max_j scores[j]): a NaN keeps every expert.
void gate_row(const element* scores, float tau, uint8_t* mask) {
    float most = to_float(scores[0]);
    for (int64_t e = 1; e < E; ++e) {
        const float s = to_float(scores[e]);
        most = s != s || s > most ? s : most;
        if (most != most) break;
    }
    const float limit = tau * most;
    for (int64_t e = 0; e < E; ++e) mask[e] = !(to_float(scores[e]) < limit);
}

// ---- one call --------------------------------------------------------------------------------------

// A thread's number, and how many there are.
struct Team {
    int me, n;
};

struct Lists {
    const int32_t *tokens, *offsets;
    int64_t count(int64_t e) const { return offsets[e + 1] - offsets[e]; }
};

struct Call {
    const Site& site;
    const element* x;
    element* y;
    int64_t rows;
    bool fused;
    Barrier barrier;
    Lists lists;
    // scratch
    lane *hidden = nullptr, *pairs = nullptr;
    element *routed = nullptr, *scores = nullptr;
    uint8_t* mask = nullptr;
    int32_t *counts = nullptr, *tokens = nullptr, *offsets = nullptr;
    float* outputs = nullptr;
    lane *gathered = nullptr, *unpacked = nullptr;
    int64_t own_lanes = 0;
};

// The rows of x as lanes, `stride` lanes apart: x itself, or a padded copy of an odd bf16 width.
constexpr bool PLAIN = D % PER_LANE == 0;

void gather(const Call& call, const int32_t* token, int64_t rows, lane* to) {
    for (int64_t r = 0; r < rows; ++r) {
        const element* from = call.x + token[r] * int64_t(D);
        if (!PLAIN) to[r * KS + KS - 1] = 0;
        std::memcpy(to + r * KS, from, D * sizeof(element));
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

void route(Call& call, Team team) {
    const Site& site = call.site;
    const auto [me, n] = team;
    const int64_t rows = call.rows;
    const bool dense = site.dense_rows && rows >= site.dense_rows;
    if (dense || (*site.tau == 0 && !site.forced)) return list_all(call, team);
    const lane *first = site.router, *second = site.router + RB * KS * 2 * VL;
    const lane* a = as_lanes(call.x);
    if (!PLAIN) {
        a = call.hidden;  // free until the experts run; room for rows x KS is reserved
        if (me == 0) {
            for (int64_t r = 0; r < rows; ++r) {
                const int32_t t = int32_t(r);
                gather(call, &t, 1, call.hidden + r * KS);
            }
        }
        call.barrier.wait(n);
    }
    const bool by_rows = rows >= int64_t(n) * UP_M;
    const int64_t r0 = rows * me / n, r1 = rows * (me + 1) / n;
    if (by_rows) {
        router_product<false>(a, KS, r0, r1, first, KS, 0, RB, call.routed, RL * PER_LANE);
    } else {
        router_product<false>(a, KS, 0, rows, first, KS, RB * me / n, RB * (me + 1) / n, call.routed,
                              RL * PER_LANE);
        call.barrier.wait(n);
    }
    router_product<true>(reinterpret_cast<const lane*>(call.routed), RL, r0, r1, second, RS, 0, EB,
                         call.scores, EP);
    float tau;
    std::memcpy(&tau, site.tau, sizeof tau);
    int32_t* counts = call.counts + me * E;
    std::fill(counts, counts + E, 0);
    for (int64_t r = r0; r < r1; ++r) {
        uint8_t* mask = call.mask + r * E;
        gate_row(call.scores + r * EP, tau, mask);
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
        const uint8_t* mask = call.mask + r * E;
        for (int64_t e = 0; e < E; ++e) {
            if (mask[e]) call.tokens[place[e]++] = int32_t(r);
        }
    }
    call.barrier.wait(n);
}

// Calls visit(e, b0, b1, next) for this thread's share of the chosen experts' blocks, in order of experts; `next`
// is the chosen expert after e. Reading a block takes as long as computing STREAM rows with it.
template <class F>
void share_blocks(const Call& call, Team team, F visit) {
    constexpr int64_t STREAM = 12;  // 128 bytes a step at 19 GB/s a core, 2 products a row (Zen 4)
    int64_t total = 0;
    for (int64_t e = 0; e < E; ++e) {
        if (const int64_t m = call.lists.count(e)) total += std::max(STREAM, m) * NB;
    }
    const int64_t from = total * team.me / team.n, to = total * (team.me + 1) / team.n;
    int64_t at = 0;
    for (int64_t e = 0; e < E && at < to; ++e) {
        const int64_t m = call.lists.count(e);
        if (m == 0) continue;
        const int64_t cost = std::max(STREAM, m);
        const int64_t b0 = std::clamp<int64_t>(ceil_div(from - at, cost), 0, NB);
        const int64_t b1 = std::clamp<int64_t>(ceil_div(to - at, cost), 0, NB);
        int64_t next = e + 1;
        while (next < E && call.lists.count(next) == 0) ++next;
        if (b0 < b1) visit(e, b0, b1, next < E ? next : e);
        at += cost * NB;
    }
}

// Blocks [b0, b1) of an expert packed: from the packed copy, or packed now into the thread's own memory.
const lane* packed_blocks(const Call& call, int64_t e, int64_t b0, int64_t b1, lane* own) {
    if (call.site.packed) return call.site.packed + e * EXPERT_LANES;
    for (int64_t b = b0; b < b1; ++b) pack_block(call.site, e, b, own + b * BLOCK_LANES);
    return own;
}

const lane* packed_panel(const Call& call, int64_t e, int64_t p, lane* own) {
    if (call.site.packed) return call.site.packed + e * EXPERT_LANES + UP_LANES + p * PANEL_LANES;
    pack_panel(call.site, e, p, own);
    return own;
}

// `m` rows of expert e's list from entry r on: x itself where the expert takes every row, else a copy.
const lane* rows_for(const Call& call, int64_t e, int64_t r, int64_t m, lane* own) {
    if (PLAIN && call.lists.count(e) == call.rows) {
        return as_lanes(call.x + (r - call.lists.offsets[e]) * D);
    }
    gather(call, call.lists.tokens + r, m, own);
    return own;
}

void write_row(const Call& call, int64_t t, int64_t first, int64_t width, const float* sum) {
    element* y = call.y + t * OUT + first;
    const element* bias = call.site.b_down ? call.site.b_down + first : nullptr;
    int64_t c = 0;
    for (; c + VL <= width; c += VL) {
        vf v = load(sum + c);
        if (bias) {
            vf b = {};
            for (int i = 0; i < VL; ++i) b[i] = to_float(bias[c + i]);
            v += b;
        }
        store_rounded(y + c, v);
    }
    for (; c < width; ++c) y[c] = rounded(sum[c] + (bias ? to_float(bias[c]) : 0.0f));
}

void run_fused(Call& call, Team team) {
    const auto [me, n] = team;
    constexpr int64_t WIDTH = NP * PANEL;
    const int64_t rows = call.rows;
    float* sums = call.outputs + me * rows * WIDTH;
    lane* gathered = call.gathered + me * call.own_lanes;
    lane* own = call.unpacked + me * (UP_LANES + PANEL_LANES);
    element* h = reinterpret_cast<element*>(call.hidden + me * GATHERED * HL);
    std::fill(sums, sums + rows * WIDTH, 0.0f);
    share_blocks(call, team, [&](int64_t e, int64_t b0, int64_t b1, int64_t next) {
        const lane* packed = packed_blocks(call, e, b0, b1, own);
        const lane* after = packed + (call.site.packed ? (next - e) * EXPERT_LANES : 0);
        const int64_t s0 = b0 * BLOCK / PER_LANE, s1 = std::min<int64_t>(SS, b1 * BLOCK / PER_LANE);
        for (int64_t r = call.lists.offsets[e]; r < call.lists.offsets[e + 1]; r += GATHERED) {
            const int64_t m = std::min<int64_t>(GATHERED, call.lists.offsets[e + 1] - r);
            const int32_t* token = call.lists.tokens + r;
            const lane* a = rows_for(call, e, r, m, gathered);
            up_rows(a, KS, m, packed, b0, b1, EXPERT_LANES * 4, after, call.site.scalars, h,
                    HL * PER_LANE);
            for (int64_t p = 0; p < NP; ++p) {
                const lane* panel = packed_panel(call, e, p, own + UP_LANES);
                const char* from = later(packed, (UP_LANES + p * PANEL_LANES) * 4, EXPERT_LANES * 4, after, m);
                down_rows(reinterpret_cast<lane*>(h) + s0, HL, m, panel + s0 * PANEL, s1 - s0, from,
                          sums + p * PANEL, token, WIDTH);
            }
        }
    });
    call.barrier.wait(n);
    const int64_t parts = rows * NP;
    for (int64_t j = parts * me / n; j < parts * (me + 1) / n; ++j) {
        const int64_t t = j / NP, first = j % NP * PANEL;
        float* sum = call.outputs + t * WIDTH + first;
        for (int i = 1; i < n; ++i) {
            const float* other = sum + i * rows * WIDTH;
            for (int c = 0; c < PANEL; c += VL) store(sum + c, load(sum + c) + load(other + c));
        }
        write_row(call, t, first, std::min<int64_t>(PANEL, OUT - first), sum);
    }
}

void run_two_phase(Call& call, Team team) {
    const auto [me, n] = team;
    lane* gathered = call.gathered + me * call.own_lanes;
    lane* own = call.unpacked + me * (UP_LANES + PANEL_LANES);
    share_blocks(call, team, [&](int64_t e, int64_t b0, int64_t b1, int64_t next) {
        const lane* packed = packed_blocks(call, e, b0, b1, own);
        const lane* after = packed + (call.site.packed ? (next - e) * EXPERT_LANES : 0);
        for (int64_t r = call.lists.offsets[e]; r < call.lists.offsets[e + 1]; r += GATHERED) {
            const int64_t m = std::min<int64_t>(GATHERED, call.lists.offsets[e + 1] - r);
            const lane* a = rows_for(call, e, r, m, gathered);
            up_rows(a, KS, m, packed, b0, b1, UP_LANES * 4, after, call.site.scalars,
                    reinterpret_cast<element*>(call.pairs + r * HL), HL * PER_LANE);
        }
    });
    call.barrier.wait(n);
    // Parts: a panel of columns and a range of tokens, so that many threads find work.
    const int64_t splits = NP >= 4 * n ? 1 : ceil_div(4 * n, NP);
    float* sums = call.outputs + me * call.rows * PANEL;
    for (int64_t i = NP * splits * me / n; i < NP * splits * (me + 1) / n; ++i) {
        const int64_t p = i / splits, first = p * PANEL, part = i % splits;
        const int64_t t0 = call.rows * part / splits, t1 = call.rows * (part + 1) / splits;
        std::fill(sums, sums + (t1 - t0) * PANEL, 0.0f);
        for (int64_t e = 0; e < E; ++e) {
            const int32_t* start = call.lists.tokens + call.lists.offsets[e];
            const int32_t* stop = call.lists.tokens + call.lists.offsets[e + 1];
            const int32_t* from = splits == 1 ? start : std::lower_bound(start, stop, int32_t(t0));
            const int32_t* until = splits == 1 ? stop : std::lower_bound(from, stop, int32_t(t1));
            if (from == until) continue;
            const lane* panel = packed_panel(call, e, p, own + UP_LANES);
            int64_t next = e + 1;
            while (next < E && call.lists.count(next) == 0) ++next;
            const lane* after = panel + (call.site.packed && next < E ? (next - e) * EXPERT_LANES : 0);
            down_rows(call.pairs + (from - call.lists.tokens) * HL, HL, until - from, panel, SS,
                      reinterpret_cast<const char*>(after), sums - t0 * PANEL, from, PANEL);
        }
        const int64_t width = std::min<int64_t>(PANEL, OUT - first);
        for (int64_t t = t0; t < t1; ++t) write_row(call, t, first, width, sums + (t - t0) * PANEL);
    }
}

// ---- one row: experts where they lie in the model's own weights -------------------------------------------

constexpr int LANE_VECTOR = VL * PER_LANE;  // elements of one vector of lanes
constexpr int64_t DV = ceil_div(D, LANE_VECTOR), OV = ceil_div(OUT, LANE_VECTOR);
constexpr int ROWS = 4;  // weight rows read side by side

// Vector v of a row of `size` elements, zero behind its end.
INLINE vu row_vector(const element* row, int64_t v, int64_t size) {
    if ((v + 1) * LANE_VECTOR <= size) return load_lanes(as_lanes(row + v * LANE_VECTOR));
    vu lanes = {};
    std::memcpy(&lanes, row + v * LANE_VECTOR, size_t(size - v * LANE_VECTOR) * sizeof(element));
    return lanes;
}

// ROWS rows of a weight, `stride` elements apart.
struct RowGroup {
    const element* row;
    int64_t stride;
    inline __attribute__((always_inline)) void fetch(int64_t v) const {
        UNROLL for (int i = 0; i < ROWS; ++i) {
            __builtin_prefetch(row + i * stride + v * LANE_VECTOR, 0, 2);
        }
    }
};

INLINE float total(vf v) {
    float sums[VL];
    store(sums, v);
    for (int width = VL / 2; width; width /= 2) {
        for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    return sums[0];
}

// values[i] = x . w[i] for the rows of a group, fetching those of a later one meanwhile.
__attribute__((noinline)) void dot_rows(const vu* x, RowGroup w, RowGroup later, float* values) {
    vf sums[ROWS][2] = {};
    int64_t v = 0;
    for (; v + 2 <= D / LANE_VECTOR; v += 2) {
        UNROLL for (int i = 0; i < ROWS; ++i) {
            const lane* row = as_lanes(w.row + i * w.stride + v * LANE_VECTOR);
            sums[i][0] = dot(sums[i][0], x[v], load_lanes(row));
            sums[i][1] = dot(sums[i][1], x[v + 1], load_lanes(row + VL));
        }
        later.fetch(v);
        if (VL * 4 >= 64) later.fetch(v + 1);
    }
    for (; v < DV; ++v) {
        UNROLL for (int i = 0; i < ROWS; ++i) {
            sums[i][0] = dot(sums[i][0], x[v], row_vector(w.row + i * w.stride, v, D));
        }
    }
    UNROLL for (int i = 0; i < ROWS; ++i) values[i] = total(sums[i][0] + sums[i][1]);
}

// y += sum over the group's rows of h[i] w[i]; y holds the halves of each vector of lanes one behind the other.
__attribute__((noinline)) void add_rows(const float* h, RowGroup w, RowGroup later, float* y) {
    vf scale[ROWS];
    UNROLL for (int i = 0; i < ROWS; ++i) scale[i] = splat(h[i]);
    for (int64_t v = 0; v < OV; ++v) {
        float* out = y + v * LANE_VECTOR;
        vf sums[PER_LANE];
        UNROLL for (int half = 0; half < PER_LANE; ++half) sums[half] = load(out + half * VL);
        UNROLL for (int i = 0; i < ROWS; ++i) {
            const vu lanes = row_vector(w.row + i * w.stride, v, OUT);
            UNROLL for (int half = 0; half < PER_LANE; ++half) {
                sums[half] = fma(scale[i], half_of(lanes, half), sums[half]);
            }
        }
        later.fetch(v);
        UNROLL for (int half = 0; half < PER_LANE; ++half) store(out + half * VL, sums[half]);
    }
}

constexpr int UNIT = VL;                      // neurons taken at once
constexpr int GROUPS = UNIT / ROWS;           // row groups of one unit and matrix
constexpr int64_t UNITS = ceil_div(S, UNIT);  // of one expert

// Row group i of a unit of neurons, in the order in which they are read: up, gate, down. The rows of a last,
// shorter unit are read again rather than those behind them.
INLINE RowGroup group_of(const Site& site, int64_t e, int64_t unit, int i) {
    const int64_t most = S >= ROWS ? S - ROWS : 0;
    const int64_t n = e * S + std::min<int64_t>(unit * UNIT + i % GROUPS * ROWS, most);
    const bool side_by_side = S >= ROWS;
    switch (i / GROUPS + (!GATED && i >= GROUPS)) {
        case 0: return {site.up + n * site.up_stride, side_by_side * site.up_stride};
        case 1: return {site.gate + n * site.gate_stride, side_by_side * site.gate_stride};
        default: return {site.down + n * site.down_stride, side_by_side * site.down_stride};
    }
}

// Adds one unit of neurons of expert e to y; (next_e, next_unit) is read after it.
void add_unit(const Site& site, const vu* x, int64_t e, int64_t unit, int64_t next_e, int64_t next_unit, float* y) {
    constexpr int ALL = GROUPS * (GATED ? 3 : 2), ABOVE = GROUPS * (GATED ? 2 : 1), LATER = 2;
    const int64_t first = unit * UNIT, count = std::min<int64_t>(UNIT, S - first);
    float values[2][UNIT] = {}, h[UNIT] = {};
    const auto later = [&](int i) {
        return i + LATER < ALL ? group_of(site, e, unit, i + LATER)
                               : group_of(site, next_e, next_unit, i + LATER - ALL);
    };
    for (int i = 0; i < ABOVE; ++i) {
        const int64_t row = i % GROUPS * ROWS;
        if (row >= count) continue;
        float four[ROWS];
        if (S >= ROWS) {
            dot_rows(x, group_of(site, e, unit, i), later(i), four);
            const int64_t moved = std::max<int64_t>(0, first + row + ROWS - S);  // rows read again
            for (int64_t j = moved; j < ROWS; ++j) values[i / GROUPS][row + j - moved] = four[j];
        } else {
            for (int64_t j = 0; j < S; ++j) {
                RowGroup one = group_of(site, e, unit, i);
                one.row += j * (i < GROUPS ? site.up_stride : site.gate_stride);
                dot_rows(x, one, one, four);
                values[i / GROUPS][j] = four[0];
            }
        }
    }
    for (int64_t j = 0; j < count; ++j) {
        if (site.b_up) values[0][j] += to_float(site.b_up[e * S + first + j]);
        if (GATED && site.b_gate) values[1][j] += to_float(site.b_gate[e * S + first + j]);
    }
    store(h, activation(load(values[0]), load(values[GATED]), site.scalars));
    std::fill(h + count, h + UNIT, 0.0f);
    for (int i = ABOVE; i < ALL; ++i) {
        const int64_t row = i % GROUPS * ROWS;
        if (row >= count) continue;
        float four[ROWS] = {};
        if (S >= ROWS) {
            const int64_t moved = std::max<int64_t>(0, first + row + ROWS - S);
            for (int64_t j = moved; j < ROWS; ++j) four[j] = h[row + j - moved];
            add_rows(four, group_of(site, e, unit, i), later(i), y);
        } else {
            for (int64_t j = 0; j < S; ++j) {
                RowGroup one = group_of(site, e, unit, i);
                one.row += j * site.down_stride;
                four[0] = h[j];
                add_rows(four, one, one, y);
            }
        }
    }
}

void run_decode(Call& call, Team team) {
    const auto [me, n] = team;
    constexpr int64_t WIDTH = OV * LANE_VECTOR;
    float* y = call.outputs + me * WIDTH;
    std::fill(y, y + WIDTH, 0.0f);
    vu x[DV];
    for (int64_t v = 0; v < DV; ++v) x[v] = row_vector(call.x, v, D);
    int32_t experts[E + 1];
    int64_t chosen = 0;
    for (int64_t e = 0; e < E; ++e) {
        experts[chosen] = int32_t(e);
        chosen += call.lists.count(e) != 0;
    }
    const int64_t to = chosen * UNITS * (me + 1) / n;
    for (int64_t i = chosen * UNITS * me / n; i < to; ++i) {
        const int64_t next = i + 1 < to ? i + 1 : i;
        add_unit(call.site, x, experts[i / UNITS], i % UNITS, experts[next / UNITS], next % UNITS, y);
    }
    call.barrier.wait(n);
    for (int64_t v = OV * me / n; v < OV * (me + 1) / n; ++v) {
        float* sum = call.outputs + v * LANE_VECTOR;
        float straight[LANE_VECTOR];
        for (int l = 0; l < LANE_VECTOR; ++l) {
            for (int i = 1; i < n; ++i) sum[l] += sum[i * WIDTH + l];
            straight[l % VL * PER_LANE + l / VL] = sum[l];
        }
        write_row(call, 0, v * LANE_VECTOR, std::min<int64_t>(LANE_VECTOR, OUT - v * LANE_VECTOR), straight);
    }
}

// Runs rows whose lists are given, or up to CHUNK of them with those that the router makes.
Status run_rows(const Site& site, const element* x, element* y, int64_t rows, Lists lists) {
    const int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
    const bool routes = lists.tokens == nullptr, decode = rows == 1 && site.decode;
    Call call{site, x, y, rows, rows <= site.fused_rows, {}, lists};
    const int64_t own = GATHERED * KS, unpacked = site.packed ? 0 : UP_LANES + PANEL_LANES;
    const int64_t hidden = std::max<int64_t>(threads * GATHERED * HL, PLAIN ? 0 : rows * KS);
    const int64_t outputs = std::max(call.fused ? rows * NP * PANEL : rows * PANEL, OV * LANE_VECTOR);
    const int64_t pairs = call.fused ? 0 : (routes ? rows * E : lists.offsets[E]) * HL;
    const int64_t lanes = threads * (own + unpacked + outputs) + hidden + pairs + rows * (RL + EP);
    const int64_t ints = threads * E + rows * E + E + 1;
    if (!scratch.reserve(size_t(4 * (lanes + ints) + rows * E + 128 * 16))) return NO_MEMORY;
    call.own_lanes = own;
    call.gathered = scratch.take<lane>(threads * own);
    call.unpacked = scratch.take<lane>(threads * unpacked);
    call.hidden = scratch.take<lane>(hidden);
    call.outputs = scratch.take<float>(threads * outputs);
    call.routed = scratch.take<element>(rows * RL * PER_LANE);
    call.scores = scratch.take<element>(rows * EP);
    call.mask = scratch.take<uint8_t>(rows * E);
    call.counts = scratch.take<int32_t>(threads * E);
    call.tokens = scratch.take<int32_t>(rows * E);
    call.offsets = scratch.take<int32_t>(E + 1);
    call.pairs = scratch.take<lane>(pairs);
    if (routes) call.lists = {call.tokens, call.offsets};
#pragma omp parallel num_threads(threads)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads()};
        if (routes) route(call, team);
        if (decode) run_decode(call, team);
        else if (call.fused) run_fused(call, team);
        else run_two_phase(call, team);
    }
    return RAN;
}

bool wants_packed(const Site& site, int64_t rows) {
    return site.packs && !site.packed && (rows > 1 || (rows == 1 && !site.decode));
}

}  // namespace

extern "C" {

// 0: lanes of the packed experts; 1: lanes of the packed router.
int64_t d2d_lanes(int64_t which) { return which ? ROUTER_LANES : E * EXPERT_LANES; }

void d2d_pack(const void* record, void* to) {
    const Site& site = *static_cast<const Site*>(record);
#pragma omp parallel for schedule(static)
    for (int64_t e = 0; e < E; ++e) pack_expert(site, e, static_cast<lane*>(to) + e * EXPERT_LANES);
}

// router1 [R, D] and router2 [E, R], contiguous.
void d2d_pack_router(const void* router1, const void* router2, void* to) {
    lane* out = static_cast<lane*>(to);
    for (int64_t b = 0; b < 2 * RB; ++b) {
        const int64_t rows = std::clamp<int64_t>(R - b * VL, 0, VL);
        lane* block = out + b / 2 * KS * 2 * VL + b % 2 * VL;
        pack_rows(static_cast<const element*>(router1) + b * VL * D, D, rows, D, block, 2 * VL);
    }
    out += RB * KS * 2 * VL;
    for (int64_t b = 0; b < 2 * EB; ++b) {
        const int64_t rows = std::clamp<int64_t>(E - b * VL, 0, VL);
        lane* block = out + b / 2 * RS * 2 * VL + b % 2 * VL;
        pack_rows(static_cast<const element*>(router2) + b * VL * R, R, rows, R, block, 2 * VL);
    }
}

// The whole block for the rows of x, `elements` in all; a Status.
int64_t d2d_run(const void* record, const void* x, void* y, int64_t elements) {
    const Site& site = *static_cast<const Site*>(record);
    const int64_t rows = elements / D;
    if (wants_packed(site, rows)) return WANTS_PACKED;
    for (int64_t r = 0; r < rows; r += CHUNK) {
        const element* from = static_cast<const element*>(x) + r * D;
        element* to = static_cast<element*>(y) + r * OUT;
        const Status status = run_rows(site, from, to, std::min<int64_t>(CHUNK, rows - r), {});
        if (status != RAN) return status;
    }
    return RAN;
}

// The experts alone, for given lists; a Status.
int64_t d2d_run_lists(const void* record, const void* x, void* y, int64_t rows, const void* tokens,
                      const void* offsets) {
    const Lists lists{static_cast<const int32_t*>(tokens), static_cast<const int32_t*>(offsets)};
    return rows ? run_rows(*static_cast<const Site*>(record), static_cast<const element*>(x),
                           static_cast<element*>(y), rows, lists) : RAN;
}
}
