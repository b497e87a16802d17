// Elementwise functions of vectors of VL fp32 values: one for each operator of d2dcompile.operators.
//
// GCC and clang vector types, so that one text serves AVX-512, AVX2, plain x86-64 and aarch64. NaN and infinities
// come out as from torch. Errors are one to four units in the last place, except in gelu's negative tail: relative
// error up to about 1e-3 at -5.6, and 0 below (torch's own loses every digit from -5.5 on). Polynomials are minimax
// fits by Lawson's iteration in fp64, weighted by relative error, of the lowest degree that stays below 3e-8.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif
typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef double vd __attribute__((vector_size(8 * VL)));

INLINE vf splat(float x) { return x - vf{}; }

// ---- What differs between processors.

// a b + c, rounded once where the processor can.
INLINE vf muladd(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// The larger of a bound and x; NaN if x is NaN.
INLINE vf at_least(vf x, vf bound) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)bound, (__m256)x);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps((__m128)bound, (__m128)x);
#else
    return bound > x ? bound : x;
#endif
}

// The smaller of a bound and x; NaN if x is NaN.
INLINE vf at_most(vf x, vf bound) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)bound, (__m256)x);
#elif defined(__SSE2__)
    return (vf)_mm_min_ps((__m128)bound, (__m128)x);
#else
    return bound < x ? bound : x;
#endif
}

// The nearest integer, for |x| < 2^31.
INLINE vf nearest(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_roundscale_ps((__m512)x, 8);
#elif defined(__AVX2__)
    return (vf)_mm256_round_ps((__m256)x, 8);
#elif defined(__SSE2__)
    return (vf)_mm_cvtepi32_ps(_mm_cvtps_epi32((__m128)x));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vf)vrndnq_f32((float32x4_t)x);
#else
    return __builtin_convertvector(__builtin_convertvector(x + (x < 0 ? splat(-0.5f) : splat(0.5f)), vi), vf);
#endif
}

// x 2^n for whole n, |n| < 252.
INLINE vf scaled(vf x, vf n) {
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)x, (__m512)n);
#else  // in two steps, because 2^n alone may be no fp32 number
    const vi power = __builtin_convertvector(n, vi), half = power >> 1;
    return x * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
#endif
}

// f of each value, one after the other.
template <class F>
INLINE vf each(vf x, F f) {
    for (int i = 0; i < VL; ++i) x[i] = f(x[i]);
    return x;
}

INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (vf)_mm_sqrt_ps((__m128)x);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vf)vsqrtq_f32((float32x4_t)x);
#else
    return each(x, [](float v) { return std::sqrt(v); });
#endif
}

// ---- Masks (all bits of a lane set, or none), comparisons are spelt > >= < <=.

INLINE vi mask(bool b) { return vi{} - int(b); }
INLINE vi nonzero(vf x) { return x != vf{}; }
INLINE vf number(vi mask) { return (vf)(mask & (vi)splat(1)); }
INLINE vi is_nan(vf x) { return ((vu)x << 1) > 0xff000000u; }
template <class V>
INLINE V where(vi mask, V a, V b) {
    return mask ? a : b;
}

INLINE vf maximum(vf a, vf b) { return where(is_nan(a), a, at_least(b, a)); }
INLINE vf minimum(vf a, vf b) { return where(is_nan(a), a, at_most(b, a)); }

// ---- Arithmetic.

INLINE vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
INLINE vf with_sign(vf size, vf x) { return (vf)((vi)size | ((vi)x & INT32_MIN)); }
INLINE vf sign(vf x) { return number(x > 0) - number(x < 0); }
INLINE vf square(vf x) { return x * x; }
INLINE vf cube(vf x) { return x * x * x; }
INLINE vf fourth(vf x) {  // in fp64, to be rounded once
    const vd wide = __builtin_convertvector(x, vd), squared = wide * wide;
    return __builtin_convertvector(squared * squared, vf);
}
INLINE vf reciprocal(vf x) { return 1 / x; }
INLINE vf rsqrt(vf x) { return 1 / sqrt(x); }
INLINE vf pow(vf x, vf y) {
    for (int i = 0; i < VL; ++i) x[i] = std::pow(x[i], y[i]);
    return x;
}
INLINE vf log(vf x) { return each(x, [](float v) { return std::log(v); }); }
INLINE vf log1p(vf x) { return each(x, [](float v) { return std::log1p(v); }); }
INLINE vf sin(vf x) { return each(x, [](float v) { return std::sin(v); }); }
INLINE vf cos(vf x) { return each(x, [](float v) { return std::cos(v); }); }

// c[0] + c[1] x + ... by Horner's rule.
template <size_t N>
INLINE vf polynomial(vf x, const float (&c)[N]) {
    vf sum = splat(c[N - 1]);
#pragma GCC unroll 16
    for (int i = int(N) - 2; i >= 0; --i) sum = muladd(sum, x, splat(c[i]));
    return sum;
}

// ---- Exponentials.

// e^x = 2^n (1 + rest): rest = e^r - 1 with r = x - n ln 2, |r| <= ln 2 / 2.
struct Exponential {
    vf n, rest;
};
INLINE Exponential exponential(vf x) {
    const vf n = nearest(x * 1.44269504f);
    // ln 2 in two parts, the first short enough for its product with n to be exact.
    const vf r = muladd(n, splat(2.12194440e-4f), muladd(n, splat(-0.693359375f), x));
    const vf q = polynomial(r, {0.49999997f, 0.166665435f, 0.0416672006f, 0.00836658012f, 0.00138825073f});
    return {n, muladd(r * r, q, r)};
}

INLINE vf exp(vf x) {  // 0 below -104, infinite above 89
    const Exponential e = exponential(at_most(at_least(x, splat(-105)), splat(90)));
    return scaled(1 + e.rest, e.n);
}
INLINE vf expm1(vf x) {
    const Exponential e = exponential(at_most(at_least(x, splat(-30)), splat(88.9f)));
    const vf half = scaled(splat(0.5f), e.n);  // 2^n itself may overflow where the result does not
    return where(abs(x) < 1e-7f, x, 2 * muladd(half, e.rest, half - 0.5f));
}
INLINE vf sigmoid(vf x) { return 1 / (1 + exp(-x)); }
INLINE vf silu(vf x) { return x / (1 + exp(-x)); }
INLINE vf mish(vf x) {  // tanh(ln(1 + e)) = e (e + 2) / (e (e + 2) + 2), which is 1 from e^20 on
    const vf e = exp(at_most(x, splat(20))), n = e * (e + 2);
    return x * (n / (n + 2));
}
INLINE vf tanh(vf x) {
    const vf t = abs(x), s = x * x;
    const vf p = polynomial(s, {-0.333332777f, 0.133313313f, -0.0537300073f, 0.0206061807f, -0.00566698052f});
    return where(t < 0.625f, muladd(x * s, p, x), with_sign(1 - 2 / (1 + exp(2 * t)), x));
}

// ln(1 + e^-|x|) = 2 artanh(s) with s = e / (2 + e) <= 1/3.
INLINE vf softness(vf x) {
    const vf e = exp(-abs(x)), s = e / (2 + e), z = s * s;
    const vf p = polynomial(z, {0.666664183f, 0.400215268f, 0.280018121f, 0.280119598f});
    return muladd(s * z, p, s + s);
}
INLINE vf softplus(vf x, float beta, float threshold) {
    const vf z = x * beta;
    return where(z > threshold, x, (at_least(z, splat(0)) + softness(z)) / beta);
}
INLINE vf logsigmoid(vf x) { return at_most(x, splat(0)) - softness(x); }

// ---- The normal distribution.

// 1 - erf(t) for t >= 0, as a power of two: log2 of it is nearly a parabola. 0 from t = 4 on (1.5e-8).
INLINE vf erfc(vf t) {
    const vf w = polynomial(t, {-1.62790775f, -0.91843462f, -0.148359179f, 0.0278721005f, -0.000142126752f,
                                -0.00207820581f, 0.000752537395f, -0.000128657892f, 9.10965809e-06f});
    const vf n = nearest(at_least(t * w, splat(-30))), r = muladd(t, w, -n);
    const vf p = polynomial(r, {0.693147182f, 0.240226477f, 0.0555033199f, 0.00961843971f, 0.00133991335f,
                                0.000153531524f});
    return where(t > 4, splat(0), scaled(muladd(r, p, splat(1)), n));
}
INLINE vf erf(vf x) {
    const vf t = abs(x), s = x * x;
    const vf p = polynomial(s, {0.128379166f, -0.376126319f, 0.112836644f, -0.0268577076f, 0.00519695692f,
                                -0.000809774443f, 8.18523113e-05f});
    return where(t < 0.95f, muladd(x, p, x), with_sign(1 - erfc(t), x));
}

// x (1 - tail) for x >= 0 and x tail below: x times a distribution function whose tail is that of |x|.
INLINE vf weighted(vf x, vf tail) { return x * where((vi)x < 0, tail, 1 - tail); }

#if defined(__AVX512F__)
// Tails for t >= 0: polynomials in t - k STEP for the nearest k, relative error 1e-8 (t < 1) to 4e-5 (t > 5).
constexpr float STEP = 0.390625f;
constexpr float TAIL_NONE[6][16] = {
    {0.5f, 0.348037213f, 0.217327744f, 0.120623626f, 0.0590851232f, 0.0254023913f, 0.0095454799f, 0.00312494091f,
     0.000889025512f, 0.000219360329f, 4.6869889e-05f, 8.66118808e-06f, 1.38282701e-06f, 1.90592004e-07f, 2.26615811e-08f, 0.f},
    {-0.398942262f, -0.36963746f, -0.294017971f, -0.200772256f, -0.11769703f, -0.0592323914f, -0.0255908612f, -0.00949166063f,
     -0.00302225281f, -0.00082613324f, -0.000193864907f, -3.90550267e-05f, -6.75431966e-06f, -1.0027926e-06f, -1.27809443e-07f, 0.f},
    {-3.79626414e-07f, 0.0721926466f, 0.114848398f, 0.117639162f, 0.0919514745f, 0.0578451864f, 0.0299899057f, 0.0129769892f,
     0.00472215703f, 0.00145206728f, 0.000378576806f, 8.38820779e-05f, 1.58230341e-05f, 2.54443125e-06f, 3.49155187e-07f, 0.f},
    {0.0664985701f, 0.0522022173f, 0.0190910492f, -0.0124911778f, -0.0282724854f, -0.0277840961f, -0.019162504f, -0.010245882f,
     -0.00441591162f, -0.00156466023f, -0.00046103893f, -0.000113806498f, -2.36532887e-05f, -4.1541075e-06f, -6.18149159e-07f, 0.f},
    {-7.34883579e-05f, -0.0169771686f, -0.0227032751f, -0.0158884265f, -0.0043294942f, 0.0038496526f, 0.00618504733f, 0.00483328477f,
     0.00267151534f, 0.00114241242f, 0.000392275251f, 0.000110290603f, 2.56892508e-05f, 4.99526141e-06f, 8.15218357e-07f, 0.f},
    {-0.00971977692f, -0.00639082352f, 0.000753728964f, 0.00557980593f, 0.00550995953f, 0.00257847132f, -6.61315353e-05f, -0.00110444752f,
     -0.000987556996f, -0.000550809666f, -0.00022739821f, -7.36469592e-05f, -1.92398202e-05f, -4.11941392e-06f, -7.30217607e-07f, 0.f},
};
constexpr float TAIL_TANH[6][16] = {
    {0.5f, 0.348054856f, 0.21742782f, 0.120800115f, 0.0592124052f, 0.0253729448f, 0.00938931759f, 0.00295223203f,
     0.000773080101f, 0.000164799072f, 2.79086107e-05f, 3.66141694e-06f, 3.62782146e-07f, 2.64638711e-08f, 1.38543055e-09f, 0.f},
    {-0.398942262f, -0.369511992f, -0.293756068f, -0.200704664f, -0.118007541f, -0.0596556664f, -0.0257796701f, -0.00940832868f,
     -0.00284755253f, -0.000698877324f, -0.000135687034f, -2.03117543e-05f, -2.28472481e-06f, -1.88209412e-07f, -1.10674474e-08f, 0.f},
    {-3.97546955e-07f, 0.0724527985f, 0.114847317f, 0.117179357f, 0.0915589258f, 0.0579658821f, 0.0303893853f, 0.013224273f,
     0.0047234362f, 0.00135755236f, 0.000306444708f, 5.29535464e-05f, 6.82647897e-06f, 6.4002603e-07f, 4.25565645e-08f, 0.f},
    {0.0668280497f, 0.0522277318f, 0.0186722688f, -0.0127278306f, -0.0279370267f, -0.0273617208f, -0.0191361308f, -0.0104720732f,
     -0.00457275286f, -0.0015800806f, -0.00042349982f, -8.59711072e-05f, -1.29002683e-05f, -1.39695203e-06f, -1.06628562e-07f, 0.f},
    {-7.69536346e-05f, -0.0173024777f, -0.0228332933f, -0.0155591005f, -0.00405673822f, 0.00369442231f, 0.00592514779f, 0.00478947628f,
     0.0027664497f, 0.00120851572f, 0.000399173732f, 9.80586992e-05f, 1.75470741e-05f, 2.23802726e-06f, 1.98989966e-07f, 0.f},
    {-0.00993582048f, -0.00644585164f, 0.000991499517f, 0.00572398305f, 0.0053180065f, 0.00240634265f, -3.84887727e-07f, -0.000989420572f,
     -0.00097000302f, -0.000583660032f, -0.000245803501f, -7.36048241e-05f, -1.5540405e-05f, -2.27853911e-06f, -2.27860269e-07f, 0.f},
};
INLINE vf tail(vf x, const float (&table)[6][16]) {
    const vf t = at_most(abs(x), splat(15 * STEP));
    const vf shifted = muladd(t, splat(1 / STEP), splat(12582912));  // 1.5 2^23: k in the low bits
    const vf d = muladd(shifted - 12582912, splat(-STEP), t);
    vf sum = {};
#pragma GCC unroll 6
    for (int i = 5; i >= 0; --i) {
        const vf c = (vf)_mm512_permutexvar_ps((__m512i)shifted, _mm512_loadu_ps(table[i]));
        sum = i == 5 ? c : muladd(sum, d, c);
    }
    return sum;
}
INLINE vf gelu_none(vf x) { return weighted(x, tail(x, TAIL_NONE)); }
INLINE vf gelu_tanh(vf x) { return weighted(x, tail(x, TAIL_TANH)); }
#else
INLINE vf gelu_none(vf x) { return weighted(x, 0.5f * erfc(abs(x) * 0.707106781f)); }
INLINE vf gelu_tanh(vf x) {  // (1 + tanh(z)) / 2 = sigmoid(2 z), 2 z = sqrt(8 / pi) (x + 0.044715 x^3)
    return x * sigmoid(x * muladd(x * x, splat(0.0713548163f), splat(1.59576912f)));
}
#endif

// ---- Pieces of lines and exponentials.

INLINE vf clamp(vf x, float low, float high) { return at_most(at_least(x, splat(low)), splat(high)); }
INLINE vf clamp(vf x, float low, std::nullptr_t) { return at_least(x, splat(low)); }
INLINE vf clamp(vf x, std::nullptr_t, float high) { return at_most(x, splat(high)); }
INLINE vf relu(vf x) { return at_least(x, splat(0)); }
INLINE vf relu6(vf x) { return clamp(x, 0.0f, 6.0f); }
INLINE vf hardtanh(vf x, float low, float high) { return clamp(x, low, high); }
INLINE vf hardsigmoid(vf x) { return clamp(x + 3, 0.0f, 6.0f) / 6; }
INLINE vf hardswish(vf x) { return x * clamp(x + 3, 0.0f, 6.0f) / 6; }
INLINE vf hardshrink(vf x, float lambda) { return where((x >= -lambda) & (x <= lambda), splat(0), x); }
INLINE vf softshrink(vf x, float lambda) {
    return where(abs(x) <= lambda, splat(0), x - with_sign(splat(lambda), x));
}
INLINE vf softsign(vf x) { return x / (1 + abs(x)); }
INLINE vf tanhshrink(vf x) { return x - tanh(x); }
INLINE vf threshold(vf x, float threshold, float value) { return where(x <= threshold, splat(value), x); }
INLINE vf prelu(vf x, vf slope) { return where(x > 0, x, x * slope); }
INLINE vf leaky_relu(vf x, float slope) { return prelu(x, splat(slope)); }
INLINE vf elu(vf x, float alpha) { return where(x > 0, x, alpha * expm1(x)); }
INLINE vf celu(vf x, float alpha) { return where(x > 0, x, alpha * expm1(x / alpha)); }
INLINE vf selu(vf x) { return where(x > 0, 1.05070099f * x, 1.75809934f * expm1(x)); }

}  // namespace
