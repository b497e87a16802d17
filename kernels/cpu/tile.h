// Register tiles of a matrix product over 32-bit lanes, and the vector primitives below them.
//
// A lane holds one fp32 value, or two neighbouring bf16 values: what one multiply-accumulate consumes along
// the summed dimension. Rows of A are plain rows of the tensor, read as lanes; B is packed [steps][N][VL].
#pragma once
#include <algorithm>
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "vec.h"

namespace {

typedef uint32_t lane;
typedef uint16_t bf16;

#define UNROLL _Pragma("GCC unroll 16")
#define INLINED __attribute__((always_inline))  // of a lambda or a member

INLINE vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
INLINE vu load_lanes(const lane* p) { vu v; std::memcpy(&v, p, sizeof v); return v; }

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Round to nearest even; a NaN stays a NaN.
INLINE bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if BF16
typedef bf16 element;
constexpr int PER_LANE = 2;
#if defined(__AVX512BF16__)
// acc[l] + a0 b0[l] + a1 b1[l] for the two halves of each lane.
INLINE vf mac(vf acc, const lane* a, vu b) {
    int bits;
    std::memcpy(&bits, a, sizeof bits);
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)b);
}
#else
INLINE vf mac(vf acc, const lane* a, vu b) {
    lane pair;
    std::memcpy(&pair, a, sizeof pair);
    const vf low = (vf)(b << 16), high = (vf)(b & 0xffff0000u);
    acc = muladd(splat(to_float(bf16(pair & 0xffff))), low, acc);
    return muladd(splat(to_float(bf16(pair >> 16))), high, acc);
}
#endif
// acc[l] + the products of the halves of lane l of a and b.
INLINE vf dot(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc = muladd((vf)(a << 16), (vf)(b << 16), acc);
    return muladd((vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u), acc);
#endif
}
// Half `half` of each lane as fp32: elements 2 l + half.
INLINE vf half_of(vu lanes, int half) { return half ? (vf)(lanes & 0xffff0000u) : (vf)(lanes << 16); }
INLINE void store_rounded(element* p, vf v) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &half, sizeof half);
#else
    UNROLL for (int i = 0; i < VL; ++i) p[i] = to_bf16(v[i]);
#endif
}
INLINE element rounded(float x) { return to_bf16(x); }
INLINE vf load_elements(const element* p) {
    typedef bf16 half __attribute__((vector_size(2 * VL)));
    half v;
    std::memcpy(&v, p, sizeof v);
    return (vf)(__builtin_convertvector(v, vu) << 16);
}
#else
typedef float element;
constexpr int PER_LANE = 1;
INLINE vf mac(vf acc, const lane* a, vu b) {
    float x;
    std::memcpy(&x, a, sizeof x);
    return muladd(splat(x), (vf)b, acc);
}
INLINE vf dot(vf acc, vu a, vu b) { return muladd((vf)a, (vf)b, acc); }
INLINE vf half_of(vu lanes, int) { return (vf)lanes; }
INLINE void store_rounded(element* p, vf v) { store(p, v); }
INLINE element rounded(float x) { return x; }
INLINE vf load_elements(const element* p) { return load(p); }
#endif

constexpr int64_t lanes_of(int64_t elements) { return (elements + PER_LANE - 1) / PER_LANE; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a tile fetches into the second-level cache while it computes: `pace` bytes a step from `from` on.
struct Ahead {
    const char* from;
    int64_t pace;
};

// Rows of A, `lda` lanes from one to the next.
struct Strided {
    static constexpr int AT_ONCE = 1;  // steps
    const lane* first;
    int64_t lda;
    INLINED const lane* row(int64_t m) const { return first + m * lda; }
    INLINED Strided from(int64_t k) const { return {first + k, lda}; }
};

// Rows of A wherever they lie. AVX-512 has more rows in a tile than registers for addresses: each is loaded once for
// two steps. Elsewhere two steps of B would need more vector registers than there are.
struct Scattered {
#if defined(__AVX512F__)
    static constexpr int AT_ONCE = 2;
#else
    static constexpr int AT_ONCE = 1;
#endif
    const lane* const* rows;
    int64_t k = 0;
    INLINED const lane* row(int m) const { return rows[m] + k; }
    INLINED Scattered from(int64_t step) const { return {rows, k + step}; }
};

// c[M][N] += AT_ONCE steps of the product below.
template <int M, int N, int AT_ONCE, class Rows>
INLINE void steps_of(Rows a, const lane* b, int64_t k, Ahead& ahead, vf (&c)[M][N]) {
    constexpr int LINES = std::max<int>(1, N * VL * 4 / 64);
    vu w[AT_ONCE][N];
    UNROLL for (int i = 0; i < AT_ONCE; ++i) {
        UNROLL for (int n = 0; n < N; ++n) w[i][n] = load_lanes(b + ((k + i) * N + n) * VL);
        UNROLL for (int n = 0; n < LINES; ++n) __builtin_prefetch(ahead.from + n * 64, 0, 2);
        ahead.from += ahead.pace;
    }
    UNROLL for (int m = 0; m < M; ++m) {
        const lane* row = a.row(m) + k;
        UNROLL for (int i = 0; i < AT_ONCE; ++i) {
            UNROLL for (int n = 0; n < N; ++n) c[m][n] = mac(c[m][n], row + i, w[i][n]);
        }
    }
}

// c[M][N] += sum over steps of a[m][step] b[step][n], M rows of A against N vectors a step.
template <int M, int N, class Rows>
INLINE void tile(Rows a, const lane* b, int64_t steps, Ahead ahead, vf (&c)[M][N]) {
    int64_t k = 0;
    for (; k + Rows::AT_ONCE <= steps; k += Rows::AT_ONCE) steps_of<M, N, Rows::AT_ONCE>(a, b, k, ahead, c);
    for (; k < steps; ++k) steps_of<M, N, 1>(a, b, k, ahead, c);
}

// Steps whose products are summed in one go. Summed in order, a long fp32 row loses more bits than in libraries, which
// sum it in blocks too. Runs end in memory, as registers hold one set of sums: those of 32 steps lose the fewest bits
// (rms 2.4e-7 of a block of 768/3072) and cost up to a tenth of the time, those of 256 lose 3.6e-7, eager's 5.3e-7.
constexpr int64_t RUN = PER_LANE == 1 ? 256 : INT64_MAX;

// c[m][n] += the product, in sums of RUN steps.
template <int M, int N, class Rows>
INLINE void product(Rows a, const lane* b, int64_t steps, Ahead ahead, vf (&c)[M][N]) {
    for (int64_t k = 0; k < steps;) {
        const int64_t run = std::min(RUN, steps - k);
        vf sums[M][N] = {};
        tile<M, N>(a.from(k), b + k * N * VL, run, {ahead.from + ahead.pace * k, ahead.pace}, sums);
        for (int m = 0; m < M; ++m) {
            UNROLL for (int n = 0; n < N; ++n) c[m][n] += sums[m][n];
        }
        k += run;
    }
}

// Calls f(std::integral_constant<int, m>) for the m in 1..Most that equals `rows`.
template <int Most, class F>
INLINE void with_rows(int64_t rows, F f) {
    if constexpr (Most > 0) {
        if (rows == Most) f(std::integral_constant<int, Most>());
        else with_rows<Most - 1>(rows, f);
    }
}

// Calls f(std::integral_constant<int, m>, first, before, count) for `rows` rows in tiles of at most Most, of even heights,
// 13 = 7 + 6: `count` tiles of m rows each from row `first` on, with so many tiles before them.
template <int Most, class F>
INLINE void with_tiles(int64_t rows, F f) {
    if (rows == 0) return;
    const int64_t tiles = ceil_div(rows, Most), height = rows / tiles, higher = rows % tiles;
    if (higher) with_rows<Most>(height + 1, [&](auto m) { f(m, int64_t(0), int64_t(0), higher); });
    with_rows<Most>(height, [&](auto m) { f(m, higher * (height + 1), higher, tiles - higher); });
}

}  // namespace
