// softmax(scale q k^T) v: tiles of short sequences, and blocks of long ones. Scores and probabilities live in
// registers.
#pragma once

#include "cuda/attention_tile.h"

namespace qemb::cuda {

template <int D>
constexpr int kSlotsAtOnce = D == 128 ? 2 : 4;  // of keys: what the registers hold, for two blocks on a processor

template <int D, int kSlots>
constexpr size_t tile_forward_shared() {
    return 3 * kSlots * kSlot * D * 2 + sizeof(SlotMap<kSlots>);
}

// One tile and one kv head: keys and values are read once for all query heads of the group; each warp owns a slot of
// queries and works alone once the keys are there.
template <class T, int D, int kSlots>
__global__ void __launch_bounds__(kSlots * 32, 2 * kMostSlots / kSlots)
    attention_forward_tile(const AttentionForward p) {
    if (static_cast<int>(blockIdx.x) >= p.plan.data[0]) return;
    const int32_t* item = p.plan.data + 4 + 2 * blockIdx.x;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    constexpr int kAtOnce = kSlotsAtOnce<D>, kBytes = kSlots * kSlot * D * 2;
    const int kv_head = blockIdx.y, group = static_cast<int>(p.num_heads / p.num_kv_heads);

    // Map the slots; load keys and values.
    char* const q_tile = shared_bytes();
    const uint32_t k_tile = shared_address(q_tile + kBytes), v_tile = k_tile + kBytes;
    auto& map = *reinterpret_cast<SlotMap<kSlots>*>(q_tile + 3 * kBytes);
    if (warp == 0) map.fill(p.cu_seqlens_q, p.cu_seqlens_k, item[0], item[1], p.plan.data[3], lane);
    sync_block();
    load_slots<T, D>(k_tile, map.k, static_cast<const T*>(p.k) + kv_head * p.k_head_stride, p.k_token_stride, thread);
    load_slots<T, D>(v_tile, map.k, static_cast<const T*>(p.v) + kv_head * p.v_head_stride, p.v_token_stride, thread);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();

    const Slot mine = map.q[warp];
    if (mine.count == 0) return;
    const int num_keys = mine.other_length, row = lane / 4;
    const int seen[2] = {visible_keys(mine.offset + row, mine.length, num_keys, p.causal),
                         visible_keys(mine.offset + row + 8, mine.length, num_keys, p.causal)};
    const float scale = scale_of(p) * kLog2E;
    const uint32_t my_q = shared_address(q_tile) + warp * kSlot * D * 2;
    const uint32_t my_k = k_tile + mine.other * kSlot * D * 2, my_v = v_tile + mine.other * kSlot * D * 2;

    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        // Load Q, this warp's rows.
        load_rows<T, D, kSlot, 32>(my_q,
                                   static_cast<const T*>(p.q) + mine.token * p.q_token_stride + head * p.q_head_stride,
                                   p.q_token_stride, mine.count, lane);
        cp_async_commit();
        cp_async_wait<0>();
        sync_warp();

        float out[D / 8][4], row_max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) out[i][j] = 0;

        // Some slots of its own sequence's keys at a time, counted from that sequence's first: the sums do not depend
        // on what else the tile holds.
        for (int start = 0; start < num_keys; start += kAtOnce * kSlot) {
            float s[2 * kAtOnce][4];
#pragma unroll
            for (int i = 0; i < 2 * kAtOnce; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) s[i][j] = 0;
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                uint32_t a[4];
                ldmatrix_x4(a, left_address<D>(my_q, 0, k, lane));
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i)
                    if (start + i * kSlot < num_keys)
                        multiply_rows<T, D, 1>(&s[2 * i], a, my_k + start * D * 2, i * kSlot, k, lane);
            }

            // Weights.
#pragma unroll
            for (int i = 0; i < 2 * kAtOnce; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int key = start + i * 8 + lane % 4 * 2 + j;
                    s[i][j] = key < seen[0] ? s[i][j] * scale : -INFINITY;
                    s[i][j + 2] = key < seen[1] ? s[i][j + 2] * scale : -INFINITY;
                }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float factor = online_softmax<4 * kAtOnce>(
                    row_max[half], sum[half], 1, [&](int i) -> float& { return s[i / 2][2 * half + i % 2]; });
#pragma unroll
                for (int i = 0; i < D / 8; ++i) {
                    out[i][2 * half] *= factor;
                    out[i][2 * half + 1] *= factor;
                }
            }

            // Output.
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                uint32_t a[4];
                as_left<T>(s[2 * i], s[2 * i + 1], a);
                if (start + i * kSlot < num_keys) multiply_columns<T, D>(out, a, my_v + start * D * 2, i * kSlot, lane);
            }
        }

        // Write the output and lse.
        const float sum0 = lanes_sum<4>(sum[0]), sum1 = lanes_sum<4>(sum[1]);
        store_rows<T, D>(static_cast<T*>(p.out) + (static_cast<int64_t>(mine.token) * p.num_heads + head) * D,
                         p.num_heads * D, mine.count, out, sum0 > 0 ? 1 / sum0 : 0, sum1 > 0 ? 1 / sum1 : 0, my_q,
                         lane);
        float* lse = static_cast<float*>(p.lse) + static_cast<int64_t>(mine.token) * p.num_heads + head;
        if (lane % 4 == 0 && row < mine.count) lse[row * p.num_heads] = row_max[0] * kLn2 + logf(sum0);
        if (lane % 4 == 0 && row + 8 < mine.count) lse[(row + 8) * p.num_heads] = row_max[1] * kLn2 + logf(sum1);
    }
}

constexpr int kBlockWarps = 4;
template <int D>
constexpr int kBlockKeys = D == 128 ? 32 : 64;  // what the registers hold

template <int D>
constexpr size_t block_forward_shared() {
    return (kTile + 4 * kBlockKeys<D>)*D * 2;
}

// One block of kTile queries of a long sequence and one head; a warp owns 32 rows. Keys and values come in blocks, the
// next one while this one is multiplied.
template <class T, int D>
__global__ void __launch_bounds__(kBlockWarps * 32) attention_forward_block(const AttentionForward p) {
    if (static_cast<int>(blockIdx.x) >= p.plan.data[1]) return;
    const int32_t* item = p.plan.data + 4 + 2 * (p.plan.tiles + blockIdx.x);
    const Span span(p.cu_seqlens_q, p.cu_seqlens_k, item[0]);
    const int first = item[1] * kTile, count = min(kTile, span.num_q - first);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, row = lane / 4;
    const int head = blockIdx.y;
    const int64_t kv_head = head / (p.num_heads / p.num_kv_heads);
    const float scale = scale_of(p) * kLog2E;

    // Load Q and the first block of keys and values.
    const uint32_t q_tile = shared_address(shared_bytes()), k_tiles = q_tile + kTile * D * 2,
                   v_tiles = k_tiles + 2 * kBlockKeys<D> * D * 2;
    const T* keys = static_cast<const T*>(p.k) + span.k * p.k_token_stride + kv_head * p.k_head_stride;
    const T* values = static_cast<const T*>(p.v) + span.k * p.v_token_stride + kv_head * p.v_head_stride;
    const int num_blocks =
        (visible_keys(first + count - 1, span.num_q, span.num_k, p.causal) + kBlockKeys<D> - 1) / kBlockKeys<D>;
    const auto load_block = [&](int block) {
        const int start = block * kBlockKeys<D>, stage = block % 2 * kBlockKeys<D> * D * 2;
        if (block < num_blocks) {
            load_rows<T, D, kBlockKeys<D>, kBlockWarps * 32>(k_tiles + stage, keys + start * p.k_token_stride,
                                                             p.k_token_stride, span.num_k - start, thread);
            load_rows<T, D, kBlockKeys<D>, kBlockWarps * 32>(v_tiles + stage, values + start * p.v_token_stride,
                                                             p.v_token_stride, span.num_k - start, thread);
        }
        cp_async_commit();
    };
    load_rows<T, D, kTile, kBlockWarps * 32>(
        q_tile, static_cast<const T*>(p.q) + (span.q + first) * p.q_token_stride + head * p.q_head_stride,
        p.q_token_stride, count, thread);
    load_block(0);

    float out[2][D / 8][4], row_max[4], sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        row_max[i] = -INFINITY;
        sum[i] = 0;
    }
    const int seen_by_all = visible_keys(first + warp * 32, span.num_q, span.num_k, p.causal);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) out[m][i][j] = 0;

    for (int block = 0; block < num_blocks; ++block) {
        load_block(block + 1);
        cp_async_wait<1>();
        sync_block();
        const uint32_t k_tile = k_tiles + block % 2 * kBlockKeys<D> * D * 2,
                       v_tile = v_tiles + block % 2 * kBlockKeys<D> * D * 2;

        // Scores: a block of keys in registers serves both halves of the warp's rows.
        float s[2][kBlockKeys<D> / 8][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int i = 0; i < kBlockKeys<D> / 8; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) s[m][i][j] = 0;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            uint32_t a[2][4];
            ldmatrix_x4(a[0], left_address<D>(q_tile, warp * 32, k, lane));
            ldmatrix_x4(a[1], left_address<D>(q_tile, warp * 32 + 16, k, lane));
#pragma unroll
            for (int j = 0; j < kBlockKeys<D> / 16; ++j) {
                uint32_t b[4];
                ldmatrix_x4(b, right_address<D>(k_tile, 16 * j, k, lane));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    mma<T>(s[m][2 * j], a[m], b[0], b[1]);
                    mma<T>(s[m][2 * j + 1], a[m], b[2], b[3]);
                }
            }
        }

        // Weights. Only blocks that some row does not see whole are masked.
        const int start = block * kBlockKeys<D>;
        const bool edge = start + kBlockKeys<D> > seen_by_all;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int m = i / 2, half = i % 2 * 2;
            const int seen = visible_keys(first + warp * 32 + i * 8 + row, span.num_q, span.num_k, p.causal);
#pragma unroll
            for (int n = 0; n < kBlockKeys<D> / 8; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& x = s[m][n][half + j];
                    x = edge && start + n * 8 + lane % 4 * 2 + j >= seen ? -INFINITY : x * scale;
                }
            const float earlier_max = row_max[i];
            const float factor = online_softmax<kBlockKeys<D> / 4>(
                row_max[i], sum[i], 1, [&](int at) -> float& { return s[m][at / 2][half + at % 2]; });
            const bool rescale = any_lane(row_max[i] > earlier_max);  // seldom, once the first blocks are done
            if (!rescale) continue;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                out[m][n][half] *= factor;
                out[m][n][half + 1] *= factor;
            }
        }

        // Output.
        uint32_t a[2][kBlockKeys<D> / 16][4];
#pragma unroll
        for (int k = 0; k < kBlockKeys<D> / 16; ++k)
#pragma unroll
            for (int m = 0; m < 2; ++m) as_left<T>(s[m][2 * k], s[m][2 * k + 1], a[m][k]);
#pragma unroll
        for (int k = 0; k < kBlockKeys<D> / 16; ++k) {
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, crossed_address<D>(v_tile, k * 16, j, lane));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    mma<T>(out[m][2 * j], a[m][k], b[0], b[1]);
                    mma<T>(out[m][2 * j + 1], a[m][k], b[2], b[3]);
                }
            }
        }
        sync_block();  // before the block after the next overwrites this one
    }
    cp_async_wait<0>();
    sync_block();

    // Write the output and lse; a warp's rows of Q are its staging.
    T* to = static_cast<T*>(p.out) + (static_cast<int64_t>(span.q + first) * p.num_heads + head) * D;
    float* lse = static_cast<float*>(p.lse) + static_cast<int64_t>(span.q + first) * p.num_heads + head;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const int start = warp * 32 + m * 16;
        const float sum0 = lanes_sum<4>(sum[2 * m]), sum1 = lanes_sum<4>(sum[2 * m + 1]);
        store_rows<T, D>(to + start * p.num_heads * D, p.num_heads * D, count - start, out[m], sum0 > 0 ? 1 / sum0 : 0,
                         sum1 > 0 ? 1 / sum1 : 0, q_tile + start * D * 2, lane);
        if (lane % 4 == 0 && start + row < count) lse[(start + row) * p.num_heads] = row_max[2 * m] * kLn2 + logf(sum0);
        if (lane % 4 == 0 && start + row + 8 < count)
            lse[(start + row + 8) * p.num_heads] = row_max[2 * m + 1] * kLn2 + logf(sum1);
    }
}

}  // namespace qemb::cuda
