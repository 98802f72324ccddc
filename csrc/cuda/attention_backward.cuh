// Gradients of attention. Weights are computed again from lse; delta is the sum of out * dout over a row. dK and dV of
// a group stay in registers until all its query heads are through: nothing is added in memory, so the order is always
// the same.
#pragma once

#include "cuda/attention_tile.h"

namespace qemb::cuda {

// What the gradients need to know of kRows queries, in shared memory.
template <int kRows>
struct QueryRows {
    float lse[kRows];  // base 2; +inf where there is no query, or none that sees a key: its weights are 0
    float delta[kRows];
    int seen[kRows];  // keys that it may see

    QEMB_DEVICE void set(int row, float natural_lse, float its_delta, int keys) {
        lse[row] = keys > 0 ? natural_lse * kLog2E : INFINITY;
        delta[row] = its_delta;
        seen[row] = keys;
    }
};

// Sixteen keys against sixteen queries: adds to dK and dV, leaves dS^T as the accumulators of two n-tiles.
template <class T, int D, class Rows>
QEMB_DEVICE void add_key_gradients(float (&dk)[D / 8][4], float (&dv)[D / 8][4], float (&ds)[2][4], uint32_t my_k,
                                   uint32_t my_v, uint32_t q, uint32_t dout, const Rows& rows, int first_row,
                                   int first_key, float scale, int lane) {
    float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, left_address<D>(my_k, 0, k, lane));
        multiply_rows<T, D, 1>(s, a, q, 0, k, lane);
        ldmatrix_x4(a, left_address<D>(my_v, 0, k, lane));
        multiply_rows<T, D, 1>(dp, a, dout, 0, k, lane);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = first_row + j * 8 + lane % 4 * 2 + e % 2, key = first_key + lane / 4 + e / 2 * 8;
            const bool visible = key < rows.seen[row];
            s[j][e] = visible ? exp2_approx(s[j][e] * (scale * kLog2E) - rows.lse[row]) : 0;
            ds[j][e] = visible ? s[j][e] * (dp[j][e] - rows.delta[row]) * scale : 0;
        }
    }
    uint32_t a[4];
    as_left<T>(s[0], s[1], a);
    multiply_columns<T, D>(dv, a, dout, 0, lane);
    as_left<T>(ds[0], ds[1], a);
    multiply_columns<T, D>(dk, a, q, 0, lane);
}

template <int D>
QEMB_DEVICE void clear(float (&x)[D / 8][4]) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) x[i][j] = 0;
}

template <int D, int kSlots>
constexpr size_t tile_backward_shared() {
    constexpr int kRows = kSlots * kSlot;
    return 4 * kRows * D * 2 + kRows * kRows * 2 + sizeof(SlotMap<kSlots>) + sizeof(QueryRows<kRows>);
}

// One tile of short sequences and one kv head: all three gradients in one pass over memory. A warp owns a slot of keys
// for dK and dV, then a slot of queries for dQ; dS^T goes between them through shared memory.
template <class T, int D, int kSlots>
__global__ void __launch_bounds__(kSlots * 32) attention_backward_tile(const AttentionBackward p) {
    if (static_cast<int>(blockIdx.x) >= p.plan.data[0]) return;
    const int32_t* item = p.plan.data + 4 + 2 * blockIdx.x;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int kv_head = blockIdx.y, group = static_cast<int>(p.num_heads / p.num_kv_heads);
    constexpr int kRows = kSlots * kSlot, kBytes = kRows * D * 2;

    // Map the slots; load keys and values.
    char* const memory = shared_bytes();
    const uint32_t q_tile = shared_address(memory), do_tile = q_tile + kBytes, k_tile = do_tile + kBytes,
                   v_tile = k_tile + kBytes;
    const uint32_t ds_tile = v_tile + kBytes;  // [keys, queries]
    auto& map = *reinterpret_cast<SlotMap<kSlots>*>(memory + 4 * kBytes + kRows * kRows * 2);
    auto& rows = *reinterpret_cast<QueryRows<kRows>*>(&map + 1);
    if (warp == 0) map.fill(p.cu_seqlens_q, p.cu_seqlens_k, item[0], item[1], p.plan.data[3], lane);
    sync_block();
    load_slots<T, D>(k_tile, map.k, static_cast<const T*>(p.k) + kv_head * p.k_head_stride, p.k_token_stride, thread);
    load_slots<T, D>(v_tile, map.k, static_cast<const T*>(p.v) + kv_head * p.v_head_stride, p.v_token_stride, thread);
    cp_async_commit();

    const Slot mine = map.k[warp];
    const Slot& asked = map.q[warp];  // left in shared memory: the copies would spill on sm_90
    const float scale = scale_of(p);
    const uint32_t my_rows = warp * kSlot * D * 2;
    float dk[D / 8][4], dv[D / 8][4];
    clear<D>(dk);
    clear<D>(dv);

    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        // Load Q and dO, and what belongs to each query.
        sync_block();  // the tiles of the head before are read
        load_slots<T, D>(q_tile, map.q, static_cast<const T*>(p.q) + head * p.q_head_stride, p.q_token_stride, thread);
        load_slots<T, D>(do_tile, map.q, static_cast<const T*>(p.dout) + head * D, p.num_heads * D, thread);
        cp_async_commit();
#pragma unroll 2
        for (int row = lane / (D / 8); row < kSlot; row += 256 / D) {
            const bool valid = row < asked.count;
            const int64_t at = (static_cast<int64_t>(valid ? asked.token + row : 0) * p.num_heads + head);
            const int64_t value = at * D + lane % (D / 8) * 8;
            const float delta = row_dot<D>(load<8>(static_cast<const T*>(p.out) + value),
                                           load<8>(static_cast<const T*>(p.dout) + value));
            const int seen = valid ? visible_keys(asked.offset + row, asked.length, asked.other_length, p.causal) : 0;
            if (lane % (D / 8) == 0)
                rows.set(warp * kSlot + row, static_cast<const float*>(p.lse)[at], valid ? delta : 0, seen);
        }
        cp_async_wait<0>();
        sync_block();

        // dK and dV of this warp's keys.
        if (mine.count > 0) {
            for (int start = 0; start < mine.other_length; start += kSlot) {
                const int row = mine.other * kSlot + start;
                float ds[2][4];
                add_key_gradients<T, D>(dk, dv, ds, k_tile + my_rows, v_tile + my_rows, q_tile + row * D * 2,
                                        do_tile + row * D * 2, rows, row, mine.offset, scale, lane);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const uint32_t at = ds_tile + swizzled<kRows>(warp * kSlot + lane / 4, row / 8 + j) + lane % 4 * 4;
                    shared_store4(at, pack<T>(ds[j][0], ds[j][1]));
                    shared_store4(at + 8 * kRows * 2, pack<T>(ds[j][2], ds[j][3]));
                }
            }
        }
        sync_block();

        // dQ of this warp's queries.
        if (asked.count > 0) {
            float dq[D / 8][4];
            clear<D>(dq);
            for (int start = 0; start < asked.other_length; start += kSlot) {
                const int key = asked.other * kSlot + start;
                uint32_t a[4];
                ldmatrix_x4_trans(a, right_address<kRows>(ds_tile, key, warp, lane));
                multiply_columns<T, D>(dq, a, k_tile + key * D * 2, 0, lane);
            }
            store_rows<T, D>(static_cast<T*>(p.dq) + (static_cast<int64_t>(asked.token) * p.num_heads + head) * D,
                             p.num_heads * D, asked.count, dq, 1, 1, q_tile + my_rows, lane);
        }
    }

    if (mine.count == 0) return;
    const int64_t at = (static_cast<int64_t>(mine.token) * p.num_kv_heads + kv_head) * D;
    store_rows<T, D>(static_cast<T*>(p.dk) + at, p.num_kv_heads * D, mine.count, dk, 1, 1, q_tile + my_rows, lane);
    store_rows<T, D>(static_cast<T*>(p.dv) + at, p.num_kv_heads * D, mine.count, dv, 1, 1, q_tile + my_rows, lane);
}

}  // namespace qemb::cuda
