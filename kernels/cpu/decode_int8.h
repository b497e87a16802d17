// One row on int8 copies of the experts: integers times scales on both sides, exact sums of integers between.
//
//     u_n = s_n sum over groups G of x of t_G (sum over i in G of q_ni p_Gi) + b_n      x_i ~ t_G p_Gi
//     y_c = sum over units U of r_U (sum over n in U of q_nc k_Un)       f(g_n, u_n) s'_n ~ r_U k_Un
//
// Weights are whole numbers q in -127..127 with one scale a neuron for its row of each matrix, s and s' above. x
// has one scale a GROUP of 32 features, so that an outlier costs its own group only (128 are as fast, but 1.5
// times as far off in MiniLM); hidden values have one a unit. A scale is the largest absolute value over 127.
// The copy holds q + 128, since processors multiply unsigned by signed bytes: sums start at -128 times the sum
// of the other factor instead of 0. Sums of integers stay below 2^21; they, and the bytes of the copy, are the
// same for every width of vectors.
#pragma once
#include "decode.h"
#include "pack.h"

#include <memory>

namespace {

constexpr int LINE = 16;  // neurons of a unit, and lanes of 4 bytes: a line of the cache
constexpr int PARTS = LINE / VL, CHAINS = VL / 4;  // vectors of a line, sums side by side: 4 in all
constexpr int SIDES = GATED ? 2 : 1;               // matrices above the activation
constexpr int64_t GROUP = 8;                       // quads of features with one scale
constexpr int64_t QUADS = ceil_div(D, 16) * 4;     // of features of a row, padded to whole chains
constexpr int64_t XG = ceil_div(QUADS, GROUP);
constexpr int64_t COLUMNS = ceil_div(OUT, LINE);        // lines of output columns
constexpr int64_t HEAD = (2 * SIDES + 1) * LINE;        // scales and biases of the sides, scales of down
constexpr int64_t ABOVE = QUADS * SIDES * LINE;         // lanes [quad][side][neuron]
constexpr int64_t BELOW = COLUMNS * (LINE / 4) * LINE;  // lanes [line of columns][quad of neurons][column]
constexpr int64_t LINE_LANES = HEAD + ABOVE + BELOW;    // of a unit
constexpr int64_t LINE_UNITS = ceil_div(S, LINE);       // of an expert
constexpr int64_t QUANTISED_LANES = LINE_UNITS * LINE_LANES;
constexpr int64_t PADDED_OUT = COLUMNS * LINE;

// ---- Products of bytes.

typedef int16_t vh __attribute__((vector_size(4 * VL)));
typedef int8_t vb __attribute__((vector_size(VL)));

// Sums of the two products of 16-bit integers in each lane.
INLINE vu pairs(vu a, vu b) {
#if defined(__AVX512BW__)
    return (vu)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && VL == 8
    return (vu)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && VL == 4
    return (vu)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const vi low = ((vi)(a << 16) >> 16) * ((vi)(b << 16) >> 16), high = ((vi)a >> 16) * ((vi)b >> 16);
    return (vu)(low + high);
#endif
}

// acc[l] + the products of the 4 unsigned bytes of weights[l] and the 4 signed ones of x.
INLINE vu quad(vu acc, vu weights, lane x) {
    const vu b = x - vu{};
#if defined(__AVX512VNNI__)
    return (vu)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, (__m512i)b);
#elif defined(__AVXVNNI__) && VL == 8
    return (vu)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)weights, (__m256i)b);
#else
    const vu even = pairs(weights & 0x00ff00ffu, (vu)((vh)(b << 8) >> 8));
    return acc + even + pairs(weights >> 8 & 0x00ff00ffu, (vu)((vh)b >> 8));
#endif
}

INLINE vf as_floats(vu integers) { return __builtin_convertvector((vi)integers, vf); }

// ---- Quantising.

// `size` values (whole vectors) as integers in -127..127; returns their scale, NaN unless all are finite.
INLINE float quantise(const float* values, int64_t size, int8_t* to) {
    vi most = {};  // bits of absolute values are ordered as they are, NaN above infinity
    for (int64_t i = 0; i < size; i += VL) {
        const vi bits = (vi)abs(load(values + i));
        most = where(bits > most, bits, most);
    }
    int32_t bits = 0;
    for (int i = 0; i < VL; ++i) bits = std::max(bits, most[i]);
    if (bits >= 0x7f800000) {
        std::fill(to, to + size, int8_t(0));
        return std::numeric_limits<float>::quiet_NaN();
    }
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    largest = std::max(largest, 1e-30f);  // 127 / largest is finite
    const vf inverse = splat(127 / largest);
    for (int64_t i = 0; i < size; i += VL) {
        const vi whole = __builtin_convertvector(nearest(load(values + i) * inverse), vi);
        const vb bytes = __builtin_convertvector(whole, vb);
        std::memcpy(to + i, &bytes, sizeof bytes);
    }
    return largest / 127;
}

// What takes the weights' + 128 away from a sum of products with these quads, in every lane.
INLINE vu shift_of(const lane* quads, int64_t count) {
    vu sum = {};
    for (int64_t q = 0; q < count; ++q) sum = quad(sum, vu{} + 0x80808080u, quads[q]);
    return -sum;
}

// A row as floats, zero behind its `count` elements up to `size` (whole vectors).
INLINE void widen(const element* from, int64_t count, int64_t size, float* to) {
    const int64_t whole = count / VL * VL;
    for (int64_t i = 0; i < whole; i += VL) store(to + i, load_elements(from + i));
    for (int64_t i = whole; i < size; ++i) to[i] = i < count ? to_float(from[i]) : 0.0f;
}

// ---- The copy.

// Neurons of a unit as bytes [LINE][WIDTH], zero behind `count` rows of `size` elements; their scales.
template <int64_t WIDTH>
void quantise_rows(const element* w, int64_t stride, int64_t count, int64_t size, float* wide,
                   int8_t (*rows)[WIDTH], float* scales) {
    for (int64_t i = 0; i < LINE; ++i) {
        widen(i < count ? w + i * stride : w, i < count ? size : 0, WIDTH, wide);
        scales[i] = quantise(wide, WIDTH, rows[i]);
    }
}

INLINE lane biased(int8_t a, int8_t b, int8_t c, int8_t d) {
    const auto one = [](int8_t q) { return lane(q + 128); };
    return one(a) | one(b) << 8 | one(c) << 16 | one(d) << 24;
}

void pack_unit_int8(const Site& site, int64_t e, int64_t unit, lane* to) {
    const int64_t first = e * S + unit * LINE, count = std::min<int64_t>(LINE, S - unit * LINE);
    constexpr int64_t ROW = QUADS * 4, MOST = std::max(ROW, PADDED_OUT);
    const std::unique_ptr<float[]> wide(new float[MOST]);
    const std::unique_ptr<int8_t[]> bytes(new int8_t[LINE * MOST]);
    float head[HEAD] = {};
    lane *above = to + HEAD, *below = above + ABOVE;
    for (int side = 0; side < SIDES; ++side) {
        const int64_t stride = side ? site.gate_stride : site.up_stride;
        const element* bias = side ? site.b_gate : site.b_up;
        const auto rows = reinterpret_cast<int8_t(*)[ROW]>(bytes.get());
        quantise_rows<ROW>((side ? site.gate : site.up) + first * stride, stride, count, D, wide.get(), rows,
                           head + side * LINE);
        if (bias) widen(bias + first, count, LINE, head + (SIDES + side) * LINE);
        for (int64_t q = 0; q < QUADS; ++q) {
            for (int64_t i = 0; i < LINE; ++i) {
                const int8_t* four = rows[i] + 4 * q;
                above[(q * SIDES + side) * LINE + i] = biased(four[0], four[1], four[2], four[3]);
            }
        }
    }
    const auto rows = reinterpret_cast<int8_t(*)[PADDED_OUT]>(bytes.get());
    quantise_rows<PADDED_OUT>(site.down + first * site.down_stride, site.down_stride, count, OUT, wide.get(),
                              rows, head + 2 * SIDES * LINE);
    for (int64_t c = 0; c < PADDED_OUT; ++c) {
        for (int64_t q = 0; q < LINE / 4; ++q) {
            const auto four = rows + 4 * q;
            below[(c / LINE * (LINE / 4) + q) * LINE + c % LINE] =
                biased(four[0][c], four[1][c], four[2][c], four[3][c]);
        }
    }
    std::memcpy(to, head, sizeof head);
}

// ---- The kernel.

struct Integers {  // x, and what the sums of each group start from and are multiplied with
    lane quads[XG * GROUP];
    float scale[XG];
    lane shift[XG];
};

// Whether all of x is finite; if not, nothing is to be computed with it.
bool quantise_row(const element* x, Integers& to) {
    for (int64_t g = 0; g < XG; ++g) {
        constexpr int64_t SIZE = 4 * GROUP;
        float wide[SIZE];
        int8_t bytes[SIZE];
        widen(x + g * SIZE, std::min<int64_t>(SIZE, D - g * SIZE), SIZE, wide);
        to.scale[g] = quantise(wide, SIZE, bytes);
        if (to.scale[g] != to.scale[g]) return false;
        std::memcpy(to.quads + g * GROUP, bytes, sizeof bytes);
        to.shift[g] = shift_of(to.quads + g * GROUP, GROUP)[0];
    }
    return true;
}

// What is read AHEAD lanes after those at `at` of a unit: further on, or in the next one. A short distance, since
// the processor's own prefetching does most: 8 KB is a fifth slower than none, 2 KB is 5 % faster (Zen 4).
struct Coming {
    static constexpr int64_t AHEAD = 2048 / 4;
    const lane *unit, *next;
    inline __attribute__((always_inline)) const char* after(int64_t at) const {
        at += AHEAD;
        return reinterpret_cast<const char*>(at < LINE_LANES ? unit + at : next + (at - LINE_LANES));
    }
};

// values[side] = the products of x and the unit's neurons, without scales and biases of neurons.
__attribute__((noinline)) void unit_values(const Integers& x, Coming coming, vf (&values)[SIDES][PARTS]) {
    const lane* w = coming.unit + HEAD;
    for (int64_t g = 0; g < XG; ++g) {
        const int64_t first = g * GROUP, size = std::min(GROUP, QUADS - first);
        const char* later = coming.after(HEAD + first * SIDES * LINE);
        vu sums[CHAINS][SIDES][PARTS] = {};
        UNROLL for (int s = 0; s < SIDES; ++s) {
            UNROLL for (int p = 0; p < PARTS; ++p) sums[0][s][p] += x.shift[g];
        }
        for (int64_t q = first; q < first + size; q += CHAINS) {
            UNROLL for (int c = 0; c < CHAINS; ++c) {
                UNROLL for (int s = 0; s < SIDES; ++s) {
                    __builtin_prefetch(later, 0, 2);
                    later += 64;
                    UNROLL for (int p = 0; p < PARTS; ++p) {
                        sums[c][s][p] = quad(sums[c][s][p], load_lanes(w + p * VL), x.quads[q + c]);
                    }
                    w += LINE;
                }
            }
        }
        UNROLL for (int s = 0; s < SIDES; ++s) {
            UNROLL for (int p = 0; p < PARTS; ++p) {
                vu sum = sums[0][s][p];
                UNROLL for (int c = 1; c < CHAINS; ++c) sum += sums[c][s][p];
                values[s][p] = muladd(splat(x.scale[g]), as_floats(sum), values[s][p]);
            }
        }
    }
}

// y += scale times the products of the unit's hidden values and its rows of down.
__attribute__((noinline)) void add_columns(const int8_t* hidden, float scale, Coming coming, float* y) {
    constexpr int64_t BURST = 16;  // lines of columns
    const lane* w = coming.unit + HEAD + ABOVE;
    lane h[LINE / 4];
    std::memcpy(h, hidden, sizeof h);
    const vu shift = shift_of(h, LINE / 4);
    for (int64_t c = 0; c < COLUMNS; c += BURST) {
        const char* later = coming.after(w - coming.unit);
        for (int64_t i = c; i < std::min(COLUMNS, c + BURST); ++i) {
            UNROLL for (int p = 0; p < PARTS; ++p) {
                vu sum = shift;
                UNROLL for (int q = 0; q < LINE / 4; ++q) {
                    sum = quad(sum, load_lanes(w + q * LINE + p * VL), h[q]);
                }
                float* out = y + i * LINE + p * VL;
                store(out, muladd(splat(scale), as_floats(sum), load(out)));
            }
            UNROLL for (int q = 0; q < LINE / 4; ++q) __builtin_prefetch(later + q * 64, 0, 2);
            later += LINE / 4 * 64;
            w += LINE / 4 * LINE;
        }
    }
}

// Adds the `count` neurons of a unit to y.
void add_unit_int8(const Site& site, const Integers& x, int64_t count, Coming coming, float* y) {
    vf sums[SIDES][PARTS] = {};
    unit_values(x, coming, sums);
    const float* head = reinterpret_cast<const float*>(coming.unit);
    float h[LINE];
    for (int p = 0; p < PARTS; ++p) {
        vf values[SIDES];
        for (int s = 0; s < SIDES; ++s) {
            const float* scale = head + s * LINE + p * VL;
            values[s] = muladd(load(scale), sums[s][p], load(scale + SIDES * LINE));
        }
        const vf active = activation(values[0], values[GATED], site.scalars);
        store(h + p * VL, active * load(head + 2 * SIDES * LINE + p * VL));
    }
    if (S % LINE) std::fill(h + count, h + LINE, 0.0f);  // not 0 for every f
    int8_t hidden[LINE];
    const float scale = quantise(h, LINE, hidden);
    add_columns(hidden, scale, coming, y);
}

// As run_decode, which it leaves rows to that are not finite.
void run_int8(Call& call, Team team) {
    const auto [me, n] = team;
    Integers x;
    if (!quantise_row(call.x, x)) return run_decode(call, team);
    float* y = call.outputs + me * PADDED_OUT;
    std::fill(y, y + PADDED_OUT, 0.0f);
    const auto place = [&](int64_t e, int64_t unit) {
        return call.site.quantised + e * QUANTISED_LANES + unit * LINE_LANES;
    };
    share_units(call, team, LINE_UNITS, [&](int64_t e, int64_t unit, int64_t next_e, int64_t next_unit) {
        const int64_t count = std::min<int64_t>(LINE, S - unit * LINE);
        add_unit_int8(call.site, x, count, {place(e, unit), place(next_e, next_unit)}, y);
    });
    call.barrier.wait(n);
    for (int64_t c = COLUMNS * me / n; c < COLUMNS * (me + 1) / n; ++c) {
        float* sum = call.outputs + c * LINE;
        for (int l = 0; l < LINE; ++l) {
            for (int i = 1; i < n; ++i) sum[l] += sum[i * PADDED_OUT + l];
        }
        write_row(call, 0, c * LINE, std::min<int64_t>(LINE, OUT - c * LINE), sum);
    }
}

}  // namespace
