// A 128 x 256 tile of a matrix product on Hopper: two warpgroups of 64 rows, stages of 64 of depth filled by the copy
// engine. The left operand lies along its depth in shared memory, or goes through registers, where each row, or each
// step of the depth, is multiplied by a factor. A block takes tile after tile; its producer is ahead of it by the
// stages.
#pragma once

#include "cuda/device/tile_product.h"
#include "cuda/sm90/ring.h"
#include "cuda/tensor_map.h"

namespace qemb::cuda::sm90 {

constexpr int kColumns = 256, kStepDepth = 64, kStages = 3;
constexpr uint32_t kMasksBarrier = 1, kGroupBarrier = 2;  // the latter and the next: of a warpgroup
constexpr int kLeftBytes = kTile * 128, kRightBytes = kColumns * 128, kLoadedBytes = kLeftBytes + kRightBytes;
constexpr int kFactors = 1024;  // bytes of a stage kept for them, so that stages stay aligned
template <bool kScaled>
constexpr int kStageBytes = kLoadedBytes + (kScaled ? kFactors : 0);

using Sums = float[kColumns / 2];
using HalfSums = float[kTile / 2];  // of 128 columns
using StageRing = Ring<kStages>;

// A row-major matrix by boxes of 64 columns, one swizzled row of 128 bytes each.
template <class T>
bool make_matrix_map(TensorMap& map, const void* data, int64_t rows, int64_t columns, int box_rows) {
    return make_tensor_map<T>(map, {.base = data,
                                    .rank = 2,
                                    .size = {columns, rows},
                                    .byte_stride = {0, columns * int64_t(sizeof(T))},
                                    .box = {64, box_rows},
                                    .swizzled = true});
}

// A thread's part of a tile: rows first_row() and 8 below, columns pair_column(n) and its right neighbour, n < 32; the
// sum of row i and column (n, j) is sums[4 n + 2 i + j].
QEMB_DEVICE int first_row() { return static_cast<int>(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4); }
QEMB_DEVICE int pair_column(int n) { return n * 8 + static_cast<int>(threadIdx.x) % 4 * 2; }

// One thread keeps the stages full: load(step, stage, barrier) starts copies of kLoadedBytes + `more`.
template <bool kScaled, class AnyRing, class Load>
QEMB_DEVICE void fill_stages(AnyRing& ring, uint32_t stages, int steps, int more, const Load& load) {
    for (int step = 0; step < steps; ++step) {
        ring.wait_empty();
        mbarrier_expect(ring.full(), kLoadedBytes + more);
        load(step, stages + ring.stage * kStageBytes<kScaled>, ring.full());
        ring.next();
    }
}

// Zeros to the depth of 64 rows of a left operand from `depth` on, an even number, by the warpgroup that multiplies
// them.
QEMB_DEVICE void clear_depth(uint32_t rows, int depth) {
    for (int i = threadIdx.x % 128; i < 64 * (kStepDepth - depth) / 2; i += 128) {
        const int row = i % 64, word = depth / 2 + i / 64;
        shared_store4(rows + row * 128 + ((word / 4 ^ row % 8) << 4) + word % 4 * 4, 0);
    }
    fence_async();
    barrier_sync(kGroupBarrier + threadIdx.x / 128, 128);
}

// low, high (+)= left right^T, the first and the last 128 columns: both operands along their depth, of which the last
// step has `last`. A thread of each warpgroup frees a stage. beside() is called once, while up to two steps are
// multiplied.
template <class T, class AnyRing, class Beside>
QEMB_DEVICE void multiply(HalfSums& low, HalfSums& high, AnyRing& ring, uint32_t stages, int steps, bool adds, int last,
                          const Beside& beside) {
    const bool signals = threadIdx.x % 128 == 0;
    AnyRing before = ring;
    for (int step = 0; step < steps; ++step) {
        const uint32_t stage = stages + ring.stage * kStageBytes<false>;
        const uint64_t left = matrix(stage + threadIdx.x / 128 * 64 * 128), right = matrix(stage + kLeftBytes);
        ring.wait_full();
        if (last < kStepDepth && step + 1 == steps) clear_depth(stage + threadIdx.x / 128 * 64 * 128, last);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStepDepth / 16; ++k) {
            wgmma<T, kTile>(low, left + 2 * k, right + 2 * k, adds || step > 0 || k > 0);
            wgmma<T, kTile>(high, left + 2 * k, right + 2 * k + (kTile * 128 >> 4), adds || step > 0 || k > 0);
        }
        wgmma_commit();
        if (step == 1 || steps == 1) beside();
        wgmma_wait<1>();
        if (step > 0) before.release(signals);
        before = ring;
        ring.next();
    }
    wgmma_wait<0>();
    before.release(signals);
}
template <class T, class AnyRing>
QEMB_DEVICE void multiply(HalfSums& low, HalfSums& high, AnyRing& ring, uint32_t stages, int steps) {
    multiply<T>(low, high, ring, stages, steps, false, kStepDepth, [] {});
}

// This thread's fragments of a stage's left operand, times the factors behind the stage. Along: rows of weights, a
// factor for each row. Across: rows of depth, a factor for each of them; the operand is then two panels of 64 columns.
template <class T, Depth kLayout>
QEMB_DEVICE void load_scaled_left(uint32_t (&words)[kStepDepth / 16][4], const char* memory, uint32_t stage) {
    const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16;
    const T* const factors = reinterpret_cast<const T*>(memory + kLoadedBytes);
    const auto doubled = [](T low, T high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; };
    if constexpr (kLayout == Depth::kAlong) {
        const T* const mine = factors + row0 + lane / 4;
        const uint32_t upper = doubled(mine[0], mine[0]), lower = doubled(mine[8], mine[8]);
        const int row = row0 + lane % 16;
#pragma unroll
        for (int k = 0; k < kStepDepth / 16; ++k) {
            ldmatrix_x4(words[k], stage + row * 128 + ((2 * k + lane / 16) ^ row % 8) * 16);
#pragma unroll
            for (int i = 0; i < 4; ++i) words[k][i] = multiply_pair<T>(words[k][i], i % 2 ? lower : upper);
        }
    } else {
        const uint32_t panel = stage + row0 / 64 * (kStepDepth * 128);
        const int chunk = row0 % 64 / 8 + lane / 8 % 2;
#pragma unroll
        for (int k = 0; k < kStepDepth / 16; ++k) {
            const int row = 16 * k + lane / 16 * 8 + lane % 8;
            ldmatrix_x4_trans(words[k], panel + row * 128 + (chunk ^ row % 8) * 16);
            const T* const mine = factors + 16 * k + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                words[k][i] = multiply_pair<T>(words[k][i], doubled(mine[i / 2 * 8], mine[i / 2 * 8 + 1]));
        }
    }
}

// sums = (left, scaled) right: the right operand across its depth, in four panels of 64 columns. Each warp frees a
// stage.
template <class T, Depth kLayout>
QEMB_DEVICE void multiply_scaled(Sums& sums, StageRing& ring, const char* memory, uint32_t stages, int steps) {
    const bool signals = threadIdx.x % 32 == 0;
    StageRing before = ring;
    uint32_t words[2][kStepDepth / 16][4];  // one is loaded while the other is multiplied
    const auto take_step = [&](int step, uint32_t (&left)[kStepDepth / 16][4]) {
        const int offset = ring.stage * kStageBytes<true>;
        const uint64_t right = matrix(stages + offset + kLeftBytes, kStepDepth * 128);
        ring.wait_full();
        load_scaled_left<T, kLayout>(left, memory + offset, stages + offset);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStepDepth / 16; ++k)
            wgmma<T, kColumns, Major::kMN>(sums, left[k], right + (k * 2048 >> 4), step > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) before.release(signals);
        before = ring;
        ring.next();
    };
    for (int step = 0; step < steps; step += 2) {
        take_step(step, words[0]);
        take_step(step + 1, words[1]);
    }
    wgmma_wait<0>();
    if (steps > 0) before.release(signals);
}

}  // namespace qemb::cuda::sm90
