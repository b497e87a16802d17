// Products on Intel's tile registers (AMX): bf16, 16 rows of A at a time against 32 columns of B.
//
// A tile register holds 16 rows of 64 bytes. One multiplication takes 16 steps (32 values) of 16 rows and of 16
// columns in as many cycles as 16 vector instructions, which do a sixteenth of it. B is packed as it is for
// vectors: a step of 16 lanes is a row of a tile.
#pragma once
#include "site.h"

namespace {

constexpr int TILE = 16;  // rows of a tile, and its steps

}  // namespace

#if !AMX
namespace {

bool tiles_allowed() { return false; }
struct Tiles {
    explicit Tiles(bool) {}
};

}  // namespace
#else
#if !defined(EMULATED_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#define TILE_ZERO _tile_zero
#define TILE_LOAD _tile_loadd
#define TILE_STORE _tile_stored
#define TILE_PRODUCT _tile_dpbf16ps
#endif

namespace {

static_assert(VL == 16, "a row of a tile is one vector");
constexpr int64_t WIDE = 2 * VL;  // columns of one product

#if defined(EMULATED_TILES)
bool tiles_allowed() { return true; }
struct Tiles {
    explicit Tiles(bool) {}
};
#else
// Whether the system lets this process use tile registers, which it has to ask for once.
bool tiles_allowed() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return allowed;
}

// Eight tiles of 16 rows of 64 bytes for this thread, while it lives.
class Tiles {
    const bool used;

public:
    explicit Tiles(bool used) : used(used) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = TILE;
        asm volatile("" : : "r"(&config) : "memory");  // all of it, of which the instruction names a part
        if (used) _tile_loadconfig(&config);
    }
    Tiles(const Tiles&) = delete;
    ~Tiles() {
        if (used) _tile_release();
    }
};
#endif

// The factors of a product: rows of A `lda` lanes apart, steps of B `ldb` lanes apart, `steps` of both in each of
// `parts`, which lie `a_apart` and `b_apart` lanes apart.
struct Factors {
    const lane* a;
    int64_t lda;
    const lane* b;
    int64_t ldb, steps, parts = 1, a_apart = 0, b_apart = 0;
};

// c[16 M][32] = the product over whole chunks of 16 steps, for rows of A from r0 on and 16 more from r1 on. Calls
// meanwhile() after each.
template <int M, class F>
INLINE void tile_product(const Factors& of, int64_t r0, int64_t r1, Ahead ahead, float* c, F meanwhile) {
    const int64_t lda = of.lda, ldb = of.ldb, chunks = of.steps / TILE;
    asm volatile("" ::: "memory");  // the instructions below do not say what they read and write
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (M == 2) {
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    for (int64_t part = 0; part < of.parts; ++part) {
        const lane *a0 = of.a + part * of.a_apart + r0 * lda, *a1 = a0 + (r1 - r0) * lda;
        const lane* b = of.b + part * of.b_apart;
        for (int64_t k = 0; k < chunks; ++k) {
            TILE_LOAD(6, b, ldb * 4);
            TILE_LOAD(4, a0, lda * 4);
            TILE_PRODUCT(0, 4, 6);
            TILE_LOAD(7, b + VL, ldb * 4);
            TILE_PRODUCT(1, 4, 7);
            if (M == 2) {
                TILE_LOAD(5, a1, lda * 4);
                TILE_PRODUCT(2, 5, 6);
                TILE_PRODUCT(3, 5, 7);
            }
            for (int64_t i = 0; i < TILE * ahead.pace; i += 64) __builtin_prefetch(ahead.from + i, 0, 2);
            ahead.from += TILE * ahead.pace;
            a0 += TILE;
            a1 += TILE;
            b += TILE * ldb;
            meanwhile();
        }
    }
    TILE_STORE(0, c, WIDE * 4);
    TILE_STORE(1, c + VL, WIDE * 4);
    if (M == 2) {
        TILE_STORE(2, c + TILE * WIDE, WIDE * 4);
        TILE_STORE(3, c + TILE * WIDE + VL, WIDE * 4);
    }
    asm volatile("" ::: "memory");
}

// Calls f(m, r, r0, r1) for the tiles of `rows` rows: one of 16 rows from r0 on, or two from r0 and from r1 on; those
// below r have been before. From 16 rows on none reaches beyond the last: tiles overlap instead.
template <class F>
INLINE void each_tile(int64_t rows, F f) {
    const int64_t last = std::max<int64_t>(0, rows - TILE);
    for (int64_t r = 0; r < rows; r += PASS) {
        const int64_t r0 = std::min(r, last);
        if (rows - r > TILE) f(std::integral_constant<int, 2>(), r, r0, std::min(r + TILE, last));
        else f(std::integral_constant<int, 1>(), r, r0, r0);
    }
}

// sum + the products of a row of A and the steps after the last whole chunk.
__attribute__((noinline)) void last_steps(const Factors& of, int64_t row, vf (&c)[2]) {
    for (int64_t part = 0; part < of.parts; ++part) {
        const lane *a = of.a + part * of.a_apart + row * of.lda, *b = of.b + part * of.b_apart;
        for (int64_t k = of.steps / TILE * TILE; k < of.steps; ++k) {
            UNROLL for (int n = 0; n < 2; ++n) c[n] = mac(c[n], a + k, load_lanes(b + k * of.ldb + n * VL));
        }
    }
}

// For j in [0, count): the product of factors(j), 32 columns wide, for those of rows [r, rows) that these tiles have;
// each row is given to write(j, row, sums). ahead(j) is fetched on the way. While tile registers compute one product,
// vector registers write the one before.
template <int M, class F, class P, class W>
INLINE void tile_products(int64_t rows, int64_t r, int64_t r0, int64_t r1, int64_t count, F factors, P ahead,
                          W write) {
    if (count == 0) return;  // a thread without blocks
    alignas(64) float sums[2][2 * TILE * WIDE];
    const int64_t until = std::min(rows, r1 + TILE), middle = M == 1 ? until : r0 + TILE;
    const auto finish = [&](int64_t j, const Factors& of, int64_t from, int64_t to) {
        const bool more = of.steps % TILE != 0;
        for (int half = 0; half < M; ++half) {
            const int64_t first = half ? std::max(from, middle) : from, stop = half ? to : std::min(to, middle);
            const float* sum = sums[j % 2] + (half ? TILE + first - r1 : first - r0) * WIDE;
            for (int64_t row = first; row < stop; ++row, sum += WIDE) {
                vf c[2] = {load(sum), load(sum + VL)};
                if (more) last_steps(of, row, c);
                write(j, row, c);
            }
        }
    };
    Factors before{};
    for (int64_t j = 0; j < count; ++j) {
        const Factors of = factors(j);
        const int64_t chunks = of.parts * (of.steps / TILE);
        const int64_t some = j && chunks ? ceil_div(until - r, chunks) : 0;
        int64_t done = r;
        tile_product<M>(of, r0, r1, ahead(j), sums[j % 2], [&] {
            const int64_t to = std::min(until, done + some);
            if (done < to) finish(j - 1, before, done, to);
            done = to;
        });
        if (j && !chunks) finish(j - 1, before, r, until);
        before = of;
    }
    finish(count - 1, before, r, until);
}

}  // namespace
#endif
