// Many rows: each chosen expert is read once and multiplied with the rows of its list.
#pragma once
#include "pack.h"
#include "product.h"

namespace {

// A range of a call's tokens with the entries of the lists that are theirs.
struct Part {
    int64_t t0, rows;           // tokens [t0, t0 + rows)
    int32_t first[E], last[E];  // expert e's entries [first, last)
    int32_t place[E];           // where its hidden values begin, in rows
    int64_t count(int64_t e) const { return last[e] - first[e]; }
    bool everywhere(int64_t e) const { return count(e) == rows; }
};

// Tokens [t0, t1) of a call; lists are in the order of tokens.
Part part_of(const Call& call, int64_t t0, int64_t t1) {
    Part part{t0, t1 - t0};
    const bool whole = part.rows == call.rows;
    const int32_t* tokens = call.lists.tokens;
    int32_t place = 0;
    for (int64_t e = 0; e < E; ++e) {
        const int32_t *start = tokens + call.lists.offsets[e], *stop = tokens + call.lists.offsets[e + 1];
        const int32_t* from = whole ? start : std::lower_bound(start, stop, int32_t(t0));
        const int32_t* until = whole ? stop : std::lower_bound(from, stop, int32_t(t1));
        part.first[e] = int32_t(from - tokens);
        part.last[e] = int32_t(until - tokens);
        part.place[e] = place;
        place += int32_t(until - from);
    }
    return part;
}

// In how many parts two-phase takes its tokens. Rows of x that the second-level cache does not hold are fetched from
// farther away for every expert; in parts that it holds, each is fetched once, and the weights once a part. Those come
// from memory: at as many bytes, five parts were a tenth slower than one (fp32, 2048/5632, two cores of a Xeon). On tiles,
// which compute some ten times as fast, parts and short ranges (below) were slower together (bf16, 788 tokens).
int64_t parts_of(const Call& call) {
    if (call.tiles) return 1;
    static const int64_t room = cache_bytes() / 8 * 5;
    const int64_t parts = ceil_div(call.rows * KS * 4, room);
    int64_t used = 0;
    for (int64_t e = 0; e < E; ++e) used += call.lists.count(e) > 0;
    const int64_t pairs = call.lists.offsets[E] - call.lists.offsets[0];
    return pairs * KS > 2 * (parts - 1) * used * EXPERT_LANES ? parts : 1;
}

// Calls visit(e, b0, b1, next) for share `me` of `n` of the chosen experts' blocks, in order of experts; `next` is the
// chosen expert after e. Reading a block takes as long as computing STREAM rows with it. whole: shares of several experts
// each are of whole ones, since every share of an expert copies its rows.
template <class F>
void share_blocks(const Part& part, Team team, bool whole, F visit) {
    // 128 bytes a step at 19 GB/s a core, 2 products a row (Zen 4); tiles compute about ten times as fast.
    constexpr int64_t STREAM = AMX ? 128 : 12;
    int64_t total = 0, used = 0;
    for (int64_t e = 0; e < E; ++e) {
        if (const int64_t m = part.count(e)) total += std::max(STREAM, m) * NB, ++used;
    }
    whole = whole && used >= 3 * team.n;
    const int64_t from = total * team.me / team.n, to = total * (team.me + 1) / team.n;
    int64_t at = 0;
    for (int64_t e = 0; e < E && at < to; ++e) {
        const int64_t m = part.count(e);
        if (m == 0) continue;
        const int64_t cost = std::max(STREAM, m);
        int64_t b0 = std::clamp<int64_t>(ceil_div(from - at, cost), 0, NB);
        int64_t b1 = std::clamp<int64_t>(ceil_div(to - at, cost), 0, NB);
        if (whole) b0 = at < from ? NB : 0, b1 = NB;
        int64_t next = e + 1;
        while (next < E && part.count(next) == 0) ++next;
        if (b0 < b1) visit(e, b0, b1, next < E ? next : e);
        at += cost * NB;
    }
}

// Calls f(i) for i in [0, count), which threads share out among them: each takes its own part in order, then what is
// left of the others', as cores of shared machines differ in speed. taken: a counter of each thread, 0 at first.
template <class F>
void share_out(Taken* taken, Team team, int64_t count, F f) {
    for (int i = 0; i < team.n; ++i) {
        const int whose = (team.me + i) % team.n;
        const int64_t first = count * whose / team.n, size = count * (whose + 1) / team.n - first;
        for (int64_t next; (next = taken[whose].next.fetch_add(1, std::memory_order_relaxed)) < size;) f(first + next);
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

// Whether chosen rows of x are read where they lie, which took 14 to 30 % less of the up side's time than copying them
// did (fp32, 384/1536 to 2048/5632, executed .75, two cores of a Xeon).
bool in_place() {
    static const bool room = APART == KS || cache_ways() >= UP_M;
    return PLAIN && room;
}

// Row r of x as entry r of expert e's list, where it takes every row; else null.
const lane* plain_rows(const Call& call, const Part& part, int64_t e, int64_t r, int64_t m) {
    if (!PLAIN || !part.everywhere(e) || (call.tiles && m < TILE)) return nullptr;
    return as_lanes(call.x + (part.t0 + r - part.first[e]) * D);
}

// h = hidden values of `m` rows of expert e's list from entry r on, for blocks [b0, b1).
void up(const Call& call, const Part& part, int64_t e, int64_t r, int64_t m, const lane* packed, int64_t b0, int64_t b1,
        int64_t size, const lane* next, lane* gathered, element* h) {
    const int32_t* tokens = call.lists.tokens + r;
    const lane* plain = plain_rows(call, part, e, r, m);
#if AMX
    if (call.tiles) return up_tiles(call, plain, tokens, m, packed, b0, b1, size, next, gathered, h);
#endif
    const bool copied = !plain && !in_place();
    if (copied) gather_rows(call.x, tokens, m, gathered, APART);
    const auto row = [&](int64_t i) {
        return plain ? plain + i * KS : copied ? gathered + i * APART : as_lanes(call.x + tokens[i] * int64_t(D));
    };
    up_rows(call.site, row, m, packed, b0, b1, size, next, h, HL * PER_LANE);
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
    const Part part = part_of(call, 0, rows);
    share_blocks(part, team, false, [&](int64_t e, int64_t b0, int64_t b1, int64_t next) {
        const lane* packed = packed_blocks(call, e, b0, b1, own);
        const lane* after = packed + (call.site.packed ? (next - e) * EXPERT_LANES : 0);
        const int64_t s0 = b0 * BLOCK / PER_LANE, s1 = std::min<int64_t>(SS, b1 * BLOCK / PER_LANE);
        const int64_t start = part.first[e], stop = part.last[e];
        for (int64_t r = start; r < stop; r += GATHERED) {
            const int64_t m = std::min(GATHERED, stop - r);
            const int32_t* token = call.lists.tokens + r;
            up(call, part, e, r, m, packed, b0, b1, EXPERT_LANES * 4, after, gathered, h);
            for (int64_t p = 0; p < NP; ++p) {
                const lane* panel = packed_panel(call, e, p, own + UP_LANES);
                const char* from = later(call.site, packed, (UP_LANES + p * PANEL_LANES) * 4, EXPERT_LANES * 4,
                                         after, m);
                const Summed of{reinterpret_cast<lane*>(h) + s0, HL, panel + s0 * PANEL, s1 - s0};
                down_rows(call.tiles, of, m, from, sums + p * PANEL, token, WIDTH);
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

// sums += what expert e adds to panels [p0, p1) of tokens [t0, t1); the expert to go on with.
int64_t down(const Call& call, const Part& part, int64_t e, int64_t p0, int64_t p1, int64_t t0, int64_t t1, lane* own,
             float* sums) {
    const int32_t* start = call.lists.tokens + part.first[e];
    const int32_t* stop = call.lists.tokens + part.last[e];
    const bool whole = t1 - t0 == part.rows;
    const int32_t* from = whole ? start : std::lower_bound(start, stop, int32_t(t0));
    const int32_t* until = whole ? stop : std::lower_bound(from, stop, int32_t(t1));
    if (from == until) return e + 1;
    const int64_t ldy = (p1 - p0) * PANEL;
    const lane* h = call.pairs + (part.place[e] + (from - start)) * HL;
    int64_t next = e + 1;
#if AMX
    if (call.tiles && call.site.packed && SS >= TILE) {
        // Experts that all tokens run are summed on tiles, up to ALIKE of them, before their sums go to memory.
        constexpr int64_t ALIKE = 8;
        while (next < std::min(E, e + ALIKE) && part.everywhere(e) && part.everywhere(next)) ++next;
        const lane* panel = packed_panel(call, e, p0, nullptr);
        const lane* after = panel + (next < E ? (next - e) * EXPERT_LANES : 0);
        down_strip({{h, h}, HL, panel, PANEL, SS, next - e, part.rows * HL, EXPERT_LANES}, p1 - p0, until - from,
                   reinterpret_cast<const char*>(after), sums - t0 * ldy, from, ldy);
        return next;
    }
#endif
    // Experts that all tokens run are summed up in registers, as many as have panels that stay in the first-level cache.
    constexpr int64_t ALIKE = std::min<int64_t>(RUN, (24 << 10) / (4 * PANEL)) / SS;
    if (call.site.packed) {
        while (next < std::min(E, e + ALIKE) && part.everywhere(e) && part.everywhere(next)) ++next;
    }
    const int64_t experts = next - e;
    while (next < E && part.count(next) == 0) ++next;
    for (int64_t p = p0; p < p1; ++p) {
        const lane* panel = packed_panel(call, e, p, own);
        const lane* after = panel + (call.site.packed && next < E ? (next - e) * EXPERT_LANES : 0);
        down_rows(call.tiles, {h, HL, panel, SS, experts, part.rows * HL}, until - from,
                  reinterpret_cast<const char*>(after), sums - t0 * ldy + (p - p0) * PANEL, from, ldy);
    }
    return next;
}

constexpr int PIECES = 6;  // of each thread's share of the hidden values

// Hidden values of a part's pairs.
void hidden_values(const Call& call, const Part& part, Team team) {
    lane* gathered = call.gathered + team.me * call.own_lanes;
    lane* own = call.unpacked + team.me * (UP_LANES + PANEL_LANES);
    const auto visit = [&](int64_t e, int64_t b0, int64_t b1, int64_t next) {
        const lane* packed = packed_blocks(call, e, b0, b1, own);
        const lane* after = packed + (call.site.packed ? (next - e) * EXPERT_LANES : 0);
        const int64_t start = part.first[e], stop = part.last[e];
        const int64_t once = call.tiles ? stop - start : GATHERED;
        for (int64_t r = start; r < stop; r += once) {
            const int64_t m = std::min(once, stop - r);
            up(call, part, e, r, m, packed, b0, b1, UP_LANES * 4, after, gathered,
               reinterpret_cast<element*>(call.pairs + (part.place[e] + r - start) * HL));
        }
    };
    const int pieces = team.n == 1 ? 1 : PIECES * team.n;
    share_out(call.taken, team, pieces, [&](int64_t i) { share_blocks(part, Team{int(i), pieces}, true, visit); });
}

// Sums that a thread adds up in at once: what stays in the second-level cache beside weights and hidden values.
int64_t sums_at_once() {
    static const int64_t floats = cache_bytes() / 4 / 10 * 3;
    return floats;
}

constexpr int64_t TILED_PANELS = std::min<int64_t>(NP, 4);  // that tiles add up at once

// How the outputs of `rows` tokens are shared out: strips of panels, times ranges of tokens, as many for each thread.
struct Shares {
    int64_t strips, splits;
};

// Hidden values are read anew for each strip, from L3 or another core's cache where most experts run: short ranges let
// all columns of a token go into one strip. An expert's panels are read anew for each range, and multiplied with OFTEN
// of its rows or more.
Shares shares_of(const Call& call, const Part& part, int64_t threads) {
    constexpr int64_t OFTEN = 40, SHORTEST = 192;
    if (call.tiles) {  // a panel is soon computed: it is read rarely
        const int64_t strips = ceil_div(NP, std::clamp<int64_t>(NP / (3 * threads), 1, TILED_PANELS));
        return {strips, strips >= 2 * threads ? 1 : ceil_div(4 * threads, strips)};
    }
    int64_t pairs = 0;
    for (int64_t e = 0; e < E; ++e) pairs += part.count(e);
    const int64_t range = std::max(SHORTEST, OFTEN * E * part.rows / std::max<int64_t>(1, pairs));
    Shares shares{1, std::max<int64_t>(1, (part.rows + range / 2) / range)};
    const int64_t sums = ceil_div(part.rows, shares.splits) * PANEL;  // of one panel
    shares.strips = ceil_div(NP, std::clamp<int64_t>(sums_at_once() / sums, 1, NP));
    while (shares.strips * shares.splits % threads) ++shares.splits;
    return shares;
}

// Outputs of a part's tokens, each from the sums of one thread over the experts in order.
void outputs(const Call& call, const Part& part, Team team) {
    if (part.rows == 0) return;
    const auto [strips, splits] = shares_of(call, part, team.n);
    lane* own = call.unpacked + team.me * (UP_LANES + PANEL_LANES);
    float* sums = call.outputs + team.me * call.own_outputs;
    share_out(call.taken + team.n, team, strips * splits, [&, strips = strips, splits = splits](int64_t i) {
        const int64_t p0 = i / splits * NP / strips, p1 = (i / splits + 1) * NP / strips, split = i % splits;
        const int64_t t0 = part.t0 + part.rows * split / splits, t1 = part.t0 + part.rows * (split + 1) / splits;
        const int64_t first = p0 * PANEL, ldy = (p1 - p0) * PANEL;
        std::fill(sums, sums + (t1 - t0) * ldy, 0.0f);
        for (int64_t e = 0; e < E;) e = down(call, part, e, p0, p1, t0, t1, own + UP_LANES, sums);
        const int64_t width = std::min<int64_t>(ldy, OUT - first);
        for (int64_t t = t0; t < t1; ++t) write_row(call, t, first, width, sums + (t - t0) * ldy);
    });
}

void run_two_phase(Call& call, Team team) {
    const int64_t parts = parts_of(call);
    for (int64_t i = 0; i < parts; ++i) {
        const Part part = part_of(call, call.rows * i / parts, call.rows * (i + 1) / parts);
        if (i) call.barrier.wait(team.n);  // until the hidden values of the part before are read
        call.taken[team.n + team.me].next = 0;
        hidden_values(call, part, team);
        call.barrier.wait(team.n);
        call.taken[team.me].next = 0;
        outputs(call, part, team);
    }
}

}  // namespace
