// ldmatrix and mma.sync: which lane holds which element, by the PTX manual.
#pragma once

#include "emulator/block.h"
#include "emulator/numbers.h"

namespace emulator {

using qemb::cuda::float_of;

// Lane i gives the address of row i % 8 of matrix i / 8; lane l receives elements (l / 4, l % 4 * 2 and + 1) of each
// matrix.
inline void ldmatrix(uint32_t (&r)[4], uint32_t address, bool transposed, const Place& place) {
    struct Lane {
        uint32_t address;
        uint32_t* to;
        const uint16_t* row;
    } self{address, r, nullptr};
    Block& block = *Block::current();
    self.row = static_cast<const uint16_t*>(block.shared(address, 16, place));
    block.touch(const_cast<uint16_t*>(self.row), 16, false);
    block.meet_warp(place, &self, [&](void** slots) {
        for (int m = 0; m < 4; ++m) {
            uint32_t addresses[8];
            uint16_t matrix[8][8];
            for (int row = 0; row < 8; ++row) {
                const auto& lane = *static_cast<Lane*>(slots[m * 8 + row]);
                addresses[row] = lane.address;
                std::memcpy(matrix[row], lane.row, 16);
            }
            ++counters().ldmatrix;
            counters().bank_conflicts += conflicts(addresses);
            for (int l = 0; l < 32; ++l) {
                const int row = l / 4, column = l % 4 * 2;
                const uint16_t low = transposed ? matrix[column][row] : matrix[row][column];
                const uint16_t high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
                static_cast<Lane*>(slots[l])->to[m] = low | static_cast<uint32_t>(high) << 16;
            }
        }
    });
}

struct MmaLane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

// d += left right over kDepth. Sums run in one fixed order with a rounding each; hardware is free to do otherwise.
template <int kDepth>
void multiply(void** slots, const float (&left)[16][kDepth], const float (&right)[kDepth][8]) {
    typedef float Row __attribute__((vector_size(32)));
    ++counters().mma;
    for (int g = 0; g < 16; ++g) {
        Row sums = {}, row;
        for (int k = 0; k < kDepth; ++k) {
            std::memcpy(&row, right[k], sizeof row);
            sums += left[g][k] * row;
        }
        for (int t = 0; t < 4; ++t) {
            float* d = static_cast<MmaLane*>(slots[g % 8 * 4 + t])->d + g / 8 * 2;
            d[0] += sums[2 * t];
            d[1] += sums[2 * t + 1];
        }
    }
}

// Lane l, with g = l / 4 and t = l % 4: a holds (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) and their right
// neighbours; b holds (k, n) = (2t, g), (2t + 8, g) and their lower neighbours; d holds (g, 2t), (g, 2t + 1), (g + 8,
// 2t), (g + 8, 2t + 1).
template <class T>
void mma_m16n8k16(void** slots) {
    float left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l) {
        const auto& lane = *static_cast<MmaLane*>(slots[l]);
        const int g = l / 4, t = l % 4 * 2;
        for (int h = 0; h < 2; ++h) {
            left[g][t + h] = qemb::cuda::unpack<T>(lane.a[0], h);
            left[g + 8][t + h] = qemb::cuda::unpack<T>(lane.a[1], h);
            left[g][t + 8 + h] = qemb::cuda::unpack<T>(lane.a[2], h);
            left[g + 8][t + 8 + h] = qemb::cuda::unpack<T>(lane.a[3], h);
            right[t + h][g] = qemb::cuda::unpack<T>(lane.b[0], h);
            right[t + 8 + h][g] = qemb::cuda::unpack<T>(lane.b[1], h);
        }
    }
    multiply(slots, left, right);
}

// Lane l, with g = l / 4 and t = l % 4: a holds (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b holds (k, n) = (t,
// g), (t + 4, g). Of each operand the lowest 13 bits are ignored.
inline void mma_m16n8k8(void** slots) {
    float left[16][8], right[8][8];
    const auto value = [](uint32_t word) { return float_of(word & ~0x1fffu); };
    for (int l = 0; l < 32; ++l) {
        const auto& lane = *static_cast<MmaLane*>(slots[l]);
        const int g = l / 4, t = l % 4;
        left[g][t] = value(lane.a[0]);
        left[g + 8][t] = value(lane.a[1]);
        left[g][t + 4] = value(lane.a[2]);
        left[g + 8][t + 4] = value(lane.a[3]);
        right[t][g] = value(lane.b[0]);
        right[t + 4][g] = value(lane.b[1]);
    }
    multiply(slots, left, right);
}

}  // namespace emulator
