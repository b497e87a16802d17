// One row: experts are read where they lie in the model's own weights.
#pragma once
#include "site.h"

namespace {

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
        vf sums[PER_LANE] = {};
        UNROLL for (int i = 0; i < ROWS; ++i) {
            const vu lanes = row_vector(w.row + i * w.stride, v, OUT);
            UNROLL for (int half = 0; half < PER_LANE; ++half) {
                sums[half] = muladd(scale[i], half_of(lanes, half), sums[half]);
            }
        }
        later.fetch(v);
        UNROLL for (int half = 0; half < PER_LANE; ++half) {
            store(out + half * VL, load(out + half * VL) + sums[half]);
        }
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

// Calls visit(e, unit, next_e, next_unit) for this thread's share of the chosen experts' units, `units` each; the
// next one is read after it.
template <class F>
void share_units(const Call& call, Team team, int64_t units, F visit) {
    int32_t experts[E + 1];
    int64_t chosen = 0;
    for (int64_t e = 0; e < E; ++e) {
        experts[chosen] = int32_t(e);
        chosen += call.lists.count(e) != 0;
    }
    const int64_t to = chosen * units * (team.me + 1) / team.n;
    for (int64_t i = chosen * units * team.me / team.n; i < to; ++i) {
        const int64_t next = i + 1 < to ? i + 1 : i;
        visit(experts[i / units], i % units, experts[next / units], next % units);
    }
}

void run_decode(Call& call, Team team) {
    const auto [me, n] = team;
    constexpr int64_t WIDTH = OV * LANE_VECTOR;
    float* y = call.outputs + me * WIDTH;
    std::fill(y, y + WIDTH, 0.0f);
    vu x[DV];
    for (int64_t v = 0; v < DV; ++v) x[v] = row_vector(call.x, v, D);
    share_units(call, team, UNITS, [&](int64_t e, int64_t unit, int64_t next_e, int64_t next_unit) {
        add_unit(call.site, x, e, unit, next_e, next_unit, y);
    });
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

}  // namespace
