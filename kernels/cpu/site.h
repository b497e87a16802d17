// Sizes of one kind of block, what a call is given, and what its threads share.
#pragma once
#include "tile.h"

#include <omp.h>
#include <sched.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <new>
#include <type_traits>

namespace {

#if BF16 && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define AMX 1
#else
#define AMX 0
#endif

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
constexpr int64_t PASS = AMX ? 32 : UP_M;  // rows that pass over weights at once
// Lanes from one gathered row to the next: where rows lie a multiple of 2 KB apart, their lanes of one step may drive
// each other out of the first-level cache.
constexpr int64_t APART = KS + (KS * 4 % 2048 == 0 ? VL : 0);
constexpr int64_t GATHERED = std::max<int64_t>(AMX ? 2 * PASS : PASS, (int64_t(1) << 20) / (4 * KS) / UP_M * UP_M);
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
    int64_t near, far;   // bytes to fetch ahead, see later()
    int64_t dense_rows;  // from how many rows on everything runs, 0 for never
    const lane* quantised;
    int64_t quantises;  // whether to ask for an int8 copy for one row where there is none
    const Site** sharers;  // of a shared first router layer: the sites that read it
    int64_t sharer_count;
};

enum Status : int64_t { RAN = 0, NO_MEMORY = 1, WANTS_PACKED = 2, WANTS_INT8 = 3 };

// Bytes of the second-level cache of a core; 1 MB where the system does not say.
inline int64_t cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (found > 0) return found;
#endif
    return int64_t(1) << 20;
}

// Ways of the first-level cache: lines that lie a multiple of 4 KB apart and fit at once. 8 where the system does not say.
inline int64_t cache_ways() {
#if defined(_SC_LEVEL1_DCACHE_ASSOC)
    const int64_t found = sysconf(_SC_LEVEL1_DCACHE_ASSOC);
    if (found > 0) return found;
#endif
    return 8;
}

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

// How much of a thread's share is taken, alone in its line of the cache.
struct alignas(64) Taken {
    std::atomic<int64_t> next;
};

// A thread's number, and how many there are.
struct Team {
    int me, n;
};

struct Lists {
    const int32_t *tokens, *offsets;
    int64_t count(int64_t e) const { return offsets[e + 1] - offsets[e]; }
};

float tau_of(const Site& site) {
    float tau = 0;
    if (site.tau) std::memcpy(&tau, site.tau, sizeof tau);
    return tau;
}

struct Call {
    const Site& site;
    const element* x;
    element* y;
    int64_t rows;
    bool fused;
    bool tiles;  // whether tile registers are used
    Barrier barrier;
    Lists lists;
    const element* given;  // relu(x router1^T) [rows, R] where it is shared, or null
    const float tau = tau_of(site);  // read once: threads that read another than their team's would wait for ever
    // scratch
    lane *hidden = nullptr, *pairs = nullptr;
    element *routed = nullptr, *scores = nullptr;
    uint8_t* mask = nullptr;
    int32_t *counts = nullptr, *tokens = nullptr, *offsets = nullptr;
    float* outputs = nullptr;
    lane *gathered = nullptr, *unpacked = nullptr;
    int64_t own_lanes = 0, own_outputs = 0;  // of each thread
    Taken* taken = nullptr;  // of hidden values by each thread, then of outputs
};

// The rows of x as lanes, `stride` lanes apart: x itself, or a padded copy of an odd bf16 width.
constexpr bool PLAIN = D % PER_LANE == 0;

void gather_rows(const element* x, const int32_t* token, int64_t rows, lane* to, int64_t apart) {
    for (int64_t r = 0; r < rows; ++r) {
        const element* from = x + token[r] * int64_t(D);
        const char* ahead = reinterpret_cast<const char*>(x + token[std::min(r + 2, rows - 1)] * int64_t(D));
        for (int64_t i = 0; i < D * int64_t(sizeof(element)); i += 64) __builtin_prefetch(ahead + i);
        if (!PLAIN) to[r * apart + KS - 1] = 0;
        std::memcpy(to + r * apart, from, D * sizeof(element));
    }
}

void write_row(const Call& call, int64_t t, int64_t first, int64_t width, const float* sum) {
    element* y = call.y + t * OUT + first;
    const element* bias = call.site.b_down ? call.site.b_down + first : nullptr;
    int64_t c = 0;
    for (; c + VL <= width; c += VL) {
        vf v = load(sum + c);
        if (bias) v += load_elements(bias + c);
        store_rounded(y + c, v);
    }
    for (; c < width; ++c) y[c] = rounded(sum[c] + (bias ? to_float(bias[c]) : 0.0f));
}

}  // namespace
