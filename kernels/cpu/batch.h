// Many rows: each chosen expert is read once and multiplied with the rows of its list.
#pragma once
#include "pack.h"
#include "product.h"

namespace {

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
            up_rows(call.site, a, KS, m, packed, b0, b1, EXPERT_LANES * 4, after, h, HL * PER_LANE);
            for (int64_t p = 0; p < NP; ++p) {
                const lane* panel = packed_panel(call, e, p, own + UP_LANES);
                const char* from = later(call.site, packed, (UP_LANES + p * PANEL_LANES) * 4, EXPERT_LANES * 4,
                                         after, m);
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
            up_rows(call.site, a, KS, m, packed, b0, b1, UP_LANES * 4, after,
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

}  // namespace
