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

// The factors of a product: 16 rows of A, `lda` lanes apart, from a[0] on and 16 more from a[1] on; steps of B `ldb` lanes
// apart; `steps` of both in each of `parts`, which lie `a_apart` and `b_apart` lanes apart.
struct Factors {
    const lane* a[2];
    int64_t lda;
    const lane* b;
    int64_t ldb, steps, parts = 1, a_apart = 0, b_apart = 0;
};

// c[16 M][32] = the product over whole chunks of 16 steps. Calls meanwhile() with the first row of each.
template <int M, class F>
INLINE void tile_product(const Factors& of, Ahead ahead, float* c, F meanwhile) {
    const int64_t lda = of.lda, ldb = of.ldb, chunks = of.steps / TILE;
    asm volatile("" ::: "memory");  // the instructions below do not say what they read and write
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (M == 2) {
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    for (int64_t part = 0; part < of.parts; ++part) {
        const lane *a0 = of.a[0] + part * of.a_apart, *a1 = of.a[1] + part * of.a_apart;
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
            meanwhile(a0 - TILE);
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

// c += the products of the steps after the last whole chunk.
template <int M>
__attribute__((noinline)) void last_steps(const Factors& of, float* c) {
    for (int64_t i = 0; i < M * TILE; ++i, c += WIDE) {
        const lane* a = of.a[i / TILE] + i % TILE * of.lda;
        vf sum[2] = {load(c), load(c + VL)};
        for (int64_t part = 0; part < of.parts; ++part) {
            const lane *from = a + part * of.a_apart, *b = of.b + part * of.b_apart;
            for (int64_t k = of.steps / TILE * TILE; k < of.steps; ++k) {
                UNROLL for (int n = 0; n < 2; ++n) sum[n] = mac(sum[n], from + k, load_lanes(b + k * of.ldb + n * VL));
            }
        }
        store(c, sum[0]);
        store(c + VL, sum[1]);
    }
}

// Tiles that pass over weights together: rows from tile[0] and from tile[1] on, of which [from, until) are wanted.
struct Pass {
    int64_t from, until, tile[2];
};

// Passes over `rows` rows, of two tiles each; the last one of one tile where that is enough. From 16 rows on none
// reaches beyond the last: tiles overlap instead.
struct Passes {
    int64_t rows;
    int64_t pairs() const { return (rows + TILE - 1) / PASS; }
    INLINED Pass at(int64_t i) const {
        const int64_t last = std::max<int64_t>(0, rows - TILE), r = i * PASS;
        const int64_t first = std::min(r, last), second = i < pairs() ? std::min(r + TILE, last) : first;
        return {r, std::min(rows, second + TILE), {first, second}};
    }
    // Calls f(m, i, count) for the passes of m tiles, `count` of them from pass i on.
    template <class F>
    INLINED void each(F f) const {
        if (pairs()) f(std::integral_constant<int, 2>(), int64_t(0), pairs());
        if (pairs() * PASS < rows) f(std::integral_constant<int, 1>(), pairs(), int64_t(1));
    }
};

// What one product takes, the rows that it is for, and what to fetch on the way.
struct Step {
    Factors of;
    Pass pass;
    Ahead ahead;
};

// The products step(i), 32 columns wide, for i in [0, count); each row is given to the function that write(i) makes,
// with its sums. While tile registers compute one product, vector registers write the one before, and also(i, a) is
// called with the place in A. What they do has to be short, as a core looks some hundred instructions ahead: all
// functions are inlined, and keep what they know in registers.
template <int M, class S, class W, class F>
INLINE void tile_products(int64_t count, S step, W write, F also) {
    if (count == 0) return;  // a thread without blocks
    alignas(64) float sums[2][2 * TILE * WIDE];
    const auto finish = [](auto writer, const float* sum, const Pass& pass, int64_t from, int64_t to) INLINED {
        const int64_t middle = M == 1 ? pass.until : pass.tile[0] + TILE;
        for (int64_t row = from; row < to; ++row) {
            const float* at = sum + (row < middle ? row - pass.tile[0] : TILE + row - pass.tile[1]) * WIDE;
            writer(row, load(at), load(at + VL));
        }
    };
    Pass before{};
    for (int64_t i = 0; i < count; ++i) {
        const Step now = step(i);
        const int64_t chunks = now.of.parts * (now.of.steps / TILE);
        const int64_t some = chunks ? ceil_div(before.until - before.from, chunks) : 0;
        const auto writer = write(std::max<int64_t>(i - 1, 0));
        const float* sum = sums[(i + 1) % 2];
        int64_t done = before.from;
        tile_product<M>(now.of, now.ahead, sums[i % 2], [&](const lane* a) INLINED {
            const int64_t to = std::min(before.until, done + some);
            finish(writer, sum, before, done, to);
            done = to;
            also(i, a);
        });
        finish(writer, sum, before, done, before.until);  // where there is no whole chunk
        if (now.of.steps % TILE) last_steps<M>(now.of, sums[i % 2]);
        before = now.pass;
    }
    finish(write(count - 1), sums[(count - 1) % 2], before, before.from, before.until);
}

}  // namespace
#endif
