// The packed copy of a block: its experts, or one block or panel of them.
#pragma once
#include "site.h"

namespace {

// Asks for large pages, before memory is touched: packed copies are read 1 to 5 % faster from them where memory is
// the limit, int8 copies 5 to 13 % (Zen 4).
void on_large_pages(void* start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 4096;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / PAGE * PAGE;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

// VL rows of a row-major matrix as [step][VL] at a distance of `apart` lanes; rows from `rows` on are zero.
void pack_rows(const element* w, int64_t stride, int64_t rows, int64_t size, lane* to, int64_t apart) {
    const int64_t steps = lanes_of(size), whole = size / PER_LANE;
    for (int64_t k = 0; k < steps; ++k) {
        lane* out = to + k * apart;
        for (int64_t i = 0; i < VL; ++i) {
            if (i >= rows) out[i] = 0;
            else if (k < whole) std::memcpy(out + i, w + i * stride + k * PER_LANE, sizeof(lane));
            else out[i] = lane_at(w + i * stride, k, size);
        }
    }
}

void pack_bias(const element* bias, int64_t rows, lane* to) {
    for (int64_t i = 0; i < VL; ++i) {
        const float value = bias && i < rows ? to_float(bias[i]) : 0.0f;
        std::memcpy(to + i, &value, sizeof value);
    }
}

// Neurons of block b of expert e: [2][VL] biases, then [step][2][VL].
void pack_block(const Site& site, int64_t e, int64_t b, lane* to) {
    for (int half = 0; half < 2; ++half) {
        const int64_t first = b * BLOCK + (GATED ? 0 : half * VL);
        const int64_t rows = std::clamp<int64_t>(S - first, 0, VL), neuron = e * S + first;
        const bool is_gate = GATED && half == 0;
        const element* w = is_gate ? site.gate : site.up;
        const element* bias = is_gate ? site.b_gate : site.b_up;
        const int64_t stride = is_gate ? site.gate_stride : site.up_stride;
        pack_bias(bias ? bias + neuron : nullptr, rows, to + half * VL);
        pack_rows(w + neuron * stride, stride, rows, D, to + (2 + half) * VL, 2 * VL);
    }
}

// Output columns of panel p of expert e, [step][PANEL], neurons along the steps.
void pack_panel(const Site& site, int64_t e, int64_t p, lane* to) {
    const int64_t first = p * PANEL, width = std::min<int64_t>(PANEL, OUT - first);
    for (int64_t s = 0; s < SS; ++s) {
        element pair[PANEL][PER_LANE] = {};
        for (int64_t i = 0; i < PER_LANE && s * PER_LANE + i < S; ++i) {
            const element* row = site.down + (e * S + s * PER_LANE + i) * site.down_stride + first;
            for (int64_t c = 0; c < width; ++c) pair[c][i] = row[c];
        }
        std::memcpy(to + s * PANEL, pair, sizeof pair);
    }
}

void pack_expert(const Site& site, int64_t e, lane* to) {
    for (int64_t b = 0; b < NB; ++b) pack_block(site, e, b, to + b * BLOCK_LANES);
    for (int64_t p = 0; p < NP; ++p) pack_panel(site, e, p, to + UP_LANES + p * PANEL_LANES);
}

}  // namespace
