// Intel's tile registers in plain C++, for processors without them: what the kernels ask of them, and no more.
#pragma once
#include <cstdint>
#include <cstring>

#define EMULATED_TILES 1
#define TILE_ZERO tile_zero
#define TILE_LOAD tile_load
#define TILE_STORE tile_store
#define TILE_PRODUCT tile_multiply

namespace {

thread_local uint32_t registers[8][16][16];

inline void tile_zero(int i) { std::memset(registers[i], 0, sizeof registers[i]); }
inline void tile_load(int i, const void* from, long apart) {
    for (int r = 0; r < 16; ++r) std::memcpy(registers[i][r], static_cast<const char*>(from) + r * apart, 64);
}
inline void tile_store(int i, void* to, long apart) {
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * apart, registers[i][r], 64);
}
inline float half_of_pair(uint32_t pair, int half) {
    const uint32_t bits = half ? pair & 0xffff0000u : pair << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline void tile_multiply(int c, int a, int b) {
    for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 16; ++n) {
                float sum;
                std::memcpy(&sum, &registers[c][m][n], sizeof sum);
                for (int half = 0; half < 2; ++half) {
                    sum += half_of_pair(registers[a][m][k], half) * half_of_pair(registers[b][k][n], half);
                }
                std::memcpy(&registers[c][m][n], &sum, sizeof sum);
            }
        }
    }
}

}  // namespace
