// y[t] = b_down + sum over e in S(t) of f(g_e, u_e) W_down[e]: router, gate, lists and experts in one call.
//
// The generator puts the constants D, OUT, S, E, R, GATED, BF16 and the function `activation` above this text;
// d2dcompile.kernels.native does that; dynamic_mlp and expert_mlp there are the meanings.
//
// Weights are packed per expert: blocks of neurons for the up side, [bias][step][2][VL] (two vectors of
// neurons, or the gate and the up rows of one), then panels of output columns, [panel][step][DN][VL].
// Three schedules, each bit-reproducible for a number of threads (sums in a fixed order, whoever computes them):
//   decode     one row: neurons of the chosen experts shared out evenly, read where the model keeps them, or
//              from an int8 copy where that is wanted.
//   fused      few rows: every thread streams its share of the chosen experts' blocks once, up and down,
//              into an output of its own; one reduction.
//   two-phase  many rows: hidden values of all (token, expert) pairs first; then columns of ranges of tokens, each
//              summed by one thread, whichever is free.

#include "batch.h"
#include "decode_int8.h"
#include "route.h"

namespace {

// Runs rows whose lists are given, or up to CHUNK of them with those that the router makes.
Status run_rows(const Site& site, const element* x, element* y, int64_t rows, Lists lists,
                const element* given = nullptr) {
    const int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
    const bool routes = lists.offsets == nullptr,  // lists without pairs have no tokens
                int8 = rows == 1 && site.quantised;
    const bool decode = rows == 1 && site.decode;
    const bool tiles = rows > 1 && tiles_allowed();
    Call call{site, x, y, rows, rows <= site.fused_rows, tiles, {}, lists, given};
    const int64_t own = GATHERED * APART, unpacked = site.packed ? 0 : UP_LANES + PANEL_LANES;
    const int64_t hidden = std::max<int64_t>(threads * GATHERED * HL, PLAIN ? 0 : rows * KS);
    const int64_t width = std::max(OV * LANE_VECTOR, PADDED_OUT);
    const int64_t sums = rows * PANEL * (call.fused ? NP : tiles ? TILED_PANELS : 1);
    const int64_t outputs = std::max({sums, call.fused ? 0 : sums_at_once(), width});
    const int64_t pairs = call.fused ? 0 : (AMX * TILE + (routes ? rows * E : lists.offsets[E])) * HL;
    const int64_t lanes = threads * (own + unpacked + outputs) + hidden + pairs + rows * (RL + EP);
    const int64_t ints = threads * E + rows * E + E + 1;
    const size_t shared = 2 * size_t(threads) * sizeof(Taken);
    if (!scratch.reserve(size_t(4 * (lanes + ints) + rows * EP + 128 * 16) + shared)) return NO_MEMORY;
    call.taken = scratch.take<Taken>(2 * threads);
    for (int i = 0; i < 2 * threads; ++i) new (call.taken + i) Taken{};
    call.own_lanes = own;
    call.own_outputs = outputs;
    call.gathered = scratch.take<lane>(threads * own);
    call.unpacked = scratch.take<lane>(threads * unpacked);
    call.hidden = scratch.take<lane>(hidden);
    call.outputs = scratch.take<float>(threads * outputs);
    call.routed = scratch.take<element>(rows * RL * PER_LANE);
    call.scores = scratch.take<element>(rows * EP);
    call.mask = scratch.take<uint8_t>(rows * EP);
    call.counts = scratch.take<int32_t>(threads * E);
    call.tokens = scratch.take<int32_t>(rows * E);
    call.offsets = scratch.take<int32_t>(E + 1);
    call.pairs = scratch.take<lane>(pairs);
    if (routes) call.lists = {call.tokens, call.offsets};
#pragma omp parallel num_threads(threads)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads()};
        const Tiles configured(tiles);
        if (routes) route(call, team);
        if (int8) run_int8(call, team);
        else if (decode) run_decode(call, team);
        else if (call.fused) run_fused(call, team);
        else run_two_phase(call, team);
    }
    return RAN;
}

bool wants_packed(const Site& site, int64_t rows) {
    return site.packs && !site.packed && (rows > 1 || (rows == 1 && !site.decode && !site.quantised));
}

}  // namespace

extern "C" {

// Whether d2d_hidden works for this kind of block.
int64_t d2d_shareable() { return PLAIN && R == RL * PER_LANE; }

// 0: lanes of the packed experts; 1: of the packed router; 2: of the int8 copy.
int64_t d2d_lanes(int64_t which) {
    constexpr int64_t lanes[] = {E * EXPERT_LANES, ROUTER_LANES, E * QUANTISED_LANES};
    return lanes[which];
}

void d2d_pack(const void* record, void* to) {
    const Site& site = *static_cast<const Site*>(record);
    on_large_pages(to, E * EXPERT_LANES * 4);
#pragma omp parallel for schedule(static)
    for (int64_t e = 0; e < E; ++e) pack_expert(site, e, static_cast<lane*>(to) + e * EXPERT_LANES);
}

void d2d_pack_int8(const void* record, void* to) {
    const Site& site = *static_cast<const Site*>(record);
    on_large_pages(to, E * QUANTISED_LANES * 4);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < E * LINE_UNITS; ++i) {
        pack_unit_int8(site, i / LINE_UNITS, i % LINE_UNITS, static_cast<lane*>(to) + i * LINE_LANES);
    }
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

// The whole block for the rows of x, `elements` in all; a Status. hidden: what d2d_hidden wrote, or null.
int64_t d2d_run_shared(const void* record, const void* x, const void* hidden, void* y, int64_t elements) {
    const Site& site = *static_cast<const Site*>(record);
    const int64_t rows = elements / D;
    if (rows == 1 && site.quantises && !site.quantised) return WANTS_INT8;
    if (wants_packed(site, rows)) return WANTS_PACKED;
    for (int64_t r = 0; r < rows; r += CHUNK) {
        const element* from = static_cast<const element*>(x) + r * D;
        element* to = static_cast<element*>(y) + r * OUT;
        const element* given = hidden ? static_cast<const element*>(hidden) + r * R : nullptr;
        const Status status = run_rows(site, from, to, std::min<int64_t>(CHUNK, rows - r), {}, given);
        if (status != RAN) return status;
    }
    return RAN;
}

int64_t d2d_run(const void* record, const void* x, void* y, int64_t elements) {
    return d2d_run_shared(record, x, nullptr, y, elements);
}

// relu(x router1^T) [rows, R], once for the sites that share it; where d2d_shareable says so. NaN where none of them
// reads it: should tau change in between, NaN keeps every expert.
int64_t d2d_hidden(const void* record, const void* x, const void*, void* y, int64_t elements) {
    const Site& site = *static_cast<const Site*>(record);
    const int64_t rows = elements / D, last = rows ? (rows - 1) % CHUNK + 1 : 0;  // rows of the smallest part
    bool wanted = false;
    for (int64_t i = 0; i < site.sharer_count; ++i) wanted |= routes(*site.sharers[i], last, tau_of(*site.sharers[i]));
    if (!wanted) {
        std::memset(y, 0xff, size_t(rows * R) * sizeof(element));
        return RAN;
    }
    const int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
    const bool tiles = rows > 1 && tiles_allowed();
    Call call{site, static_cast<const element*>(x), nullptr, rows, false, tiles, {}, {}, nullptr};
    call.routed = static_cast<element*>(y);
#pragma omp parallel num_threads(threads)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads()};
        const Tiles configured(tiles);
        route_hidden(call, team, rows * team.me / team.n, rows * (team.me + 1) / team.n);
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
