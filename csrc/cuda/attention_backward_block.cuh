// Gradients of long sequences, in one pass with five products. A block of threads owns kTile keys and sums dK and dV of
// all query heads of their group in registers; P and dS go through shared memory, so that each warp multiplies 32 rows
// and uses every fragment of the other operand twice.
//
// dQ is a sum over blocks of keys. It is added up in scratch memory in one fixed order, from the last keys of the
// sequence to the first: a block waits until the one before it has added its part. Blocks take their keys by ticket, so
// whoever waits, waits for a block that is running. The last keys come first because, under a causal mask, they begin
// with the first queries that see them and need not wait.
#pragma once

#include "cuda/attention_backward.cuh"
#include "cuda/launch.h"

namespace qemb::cuda {

constexpr int kBlockBackwardThreads = 256, kWarpRows = 2 * kSlot;

// kTile keys of a sequence and a key head. Steps are kStep queries of one head, head after head, of those queries that
// see any of these keys.
struct KeyBlock {
    Span span;
    int first, count, kv_head, slot, from;
    int to_raise = -1, raised = 0;  // of the step before: its flag, which says how many blocks have added

    // `step`: queries of a step.
    QEMB_DEVICE KeyBlock(const AttentionBackward& p, int unit, int step)
        : KeyBlock(p,
                   p.plan.data + 4 + 2 * (p.plan.tiles + p.plan.blocks) + 3 * (unit / static_cast<int>(p.num_kv_heads)),
                   unit % static_cast<int>(p.num_kv_heads), step) {}
    QEMB_DEVICE static int units(const AttentionBackward& p) {
        return p.plan.data[2] * static_cast<int>(p.num_kv_heads);
    }
    // How many blocks add to dQ of `step` queries from `query` on before this one.
    QEMB_DEVICE int before(int query, int step, bool causal) const {
        const int last = (span.num_k - 1) / kTile, seen = span.num_k - span.num_q + query + step;
        return (causal ? max(0, min(last, (seen - 1) / kTile)) : last) - first / kTile;
    }
    QEMB_DEVICE void raise(int* flags) const {
        if (to_raise >= 0) raise_flag(flags + to_raise, raised);
    }

  private:
    QEMB_DEVICE KeyBlock(const AttentionBackward& p, const int32_t* item, int kv_head, int step)
        : span(p.cu_seqlens_q, p.cu_seqlens_k, item[0]),
          first(((span.num_k - 1) / kTile - item[1]) * kTile),
          count(min(kTile, span.num_k - first)),
          kv_head(kv_head),
          slot(item[2] * (kTile / step)),
          // The first keys' block also stores the zeros of queries that see nothing.
          from(p.causal && first > 0 ? max(0, first - span.num_k + span.num_q) / step * step : 0) {}
};

// Queries of a step, and stages of shared memory for them.
template <int kStep, int kStages, int D>
struct BackwardLayout {
    static constexpr int kKeyBytes = kTile * D * 2, kStepBytes = kStep * D * 2;
    static constexpr int kK = 0, kV = kKeyBytes, kQ = 2 * kKeyBytes, kDout = kQ + kStages * kStepBytes,
                         kWeights = kDout + kStages * kStepBytes,  // [keys, 2 kStep]: P^T, then dS^T
        kRows = kWeights + kTile * 2 * kStep * 2, kBlock = kRows + static_cast<int>(sizeof(QueryRows<kStep>)),
                         kBytes = kBlock + static_cast<int>(sizeof(KeyBlock));
};

// What the blocks leave each other in the scratch memory.
struct BlockScratch {
    int64_t slots;  // of a head: steps of queries whose dQ is a sum over blocks of keys
    float* delta;   // [T, num_heads] sum of out * dout over a row
    int* ticket;
    int* added;     // [num_heads, slots] blocks of keys that have added to dQ of a step
    float* sums;    // [num_heads, slots, step * head_dim] dQ so far, each thread's part as it holds it
    int64_t bytes;  // of all

    BlockScratch(const AttentionBackward& p, int step) : slots(p.plan.summed * (kTile / step)) {
        const int64_t numbers = ceil_div(p.num_tokens * p.num_heads, 4) * 4;
        const int64_t flags = ceil_div(1 + p.num_heads * slots, 4) * 4;
        delta = static_cast<float*>(p.scratch);
        ticket = reinterpret_cast<int*>(delta + numbers);
        added = ticket + 1;
        sums = delta + numbers + flags;
        bytes = (numbers + flags + p.num_heads * slots * step * p.head_dim) * static_cast<int64_t>(sizeof(float));
    }
    int64_t flag_bytes() const { return reinterpret_cast<char*>(sums) - reinterpret_cast<char*>(ticket); }
};

// delta of kTile queries of a long sequence, or zeros for their dQ if there are no keys. Their rows of all heads are
// neighbors; blockIdx.y takes a part of them.
template <class T, int D>
__global__ void __launch_bounds__(256) attention_backward_delta(const AttentionBackward p, const BlockScratch scratch) {
    if (static_cast<int>(blockIdx.x) >= p.plan.data[1]) return;
    const int32_t* item = p.plan.data + 4 + 2 * (p.plan.tiles + blockIdx.x);
    const Span span(p.cu_seqlens_q, p.cu_seqlens_k, item[0]);
    constexpr int kLanes = D / 8, kAtOnce = 256 / kLanes;
    const int count = min(kTile, span.num_q - item[1] * kTile);
    const int64_t first = (span.q + static_cast<int64_t>(item[1]) * kTile) * p.num_heads + blockIdx.y * count;
    for (int start = 0; start < count; start += kAtOnce) {
        const int row = start + static_cast<int>(threadIdx.x) / kLanes;
        const int64_t at = (first + min(row, count - 1)) * D + threadIdx.x % kLanes * 8;
        if (span.num_k == 0) {
            if (row < count) store16(static_cast<T*>(p.dq) + at, {});
            continue;
        }
        const float x =
            row_dot<D>(load<8>(static_cast<const T*>(p.out) + at), load<8>(static_cast<const T*>(p.dout) + at));
        if (row < count && threadIdx.x % kLanes == 0) scratch.delta[first + row] = x;
    }
}

// d += A B: 32 rows, 16 kPairs columns, kDepth deep. left(a, m, k) loads 16 rows of A, right(b, j, k) 16 columns of B.
template <class T, int kPairs, int kDepth, class Left, class Right>
QEMB_DEVICE void multiply_two_slots(float (&d)[2][2 * kPairs][4], const Left& left, const Right& right) {
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
        uint32_t a[2][4];
        left(a[0], 0, k);
        left(a[1], 1, k);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
            uint32_t b[4];
            right(b, j, k);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                mma<T>(d[m][2 * j], a[m], b[0], b[1]);
                mma<T>(d[m][2 * j + 1], a[m], b[2], b[3]);
            }
        }
    }
}

template <int kTiles>
QEMB_DEVICE void clear(float (&x)[2][kTiles][4]) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) x[m][n][i] = 0;
}

// 32 rows of accumulators to rows [0, count) of `to`. Lanes exchange halves of two n-tiles, so that each has 8 bytes
// and a quad writes 32 that are neighbors.
template <class T, int kTiles>
QEMB_DEVICE void store_two_slots(T* to, int64_t stride, int count, const float (&x)[2][kTiles][4], int lane) {
    const bool odd = lane % 2;
    to += lane / 4 * stride + (odd ? 8 : 0) + lane % 4 / 2 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int m = i / 2, half = i % 2 * 2;
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            const uint32_t low = pack<T>(x[m][n][half], x[m][n][half + 1]);
            const uint32_t high = pack<T>(x[m][n + 1][half], x[m][n + 1][half + 1]);
            const uint32_t other = shuffle_xor(odd ? low : high, 1);
            const uint64_t both = static_cast<uint64_t>(odd ? high : other) << 32 | (odd ? other : low);
            if (i * 8 + lane / 4 < count) *reinterpret_cast<uint64_t*>(to + i * 8 * stride + n * 8) = both;
        }
    }
}

template <class T, int D, int kStep, int kStages>
__global__ void __launch_bounds__(kBlockBackwardThreads, 1)
    attention_backward_block(const AttentionBackward p, const BlockScratch scratch) {
    using L = BackwardLayout<kStep, kStages, D>;
    constexpr int kThreads = kBlockBackwardThreads, kWarps = kThreads / 32;
    const int thread = threadIdx.x, warp = thread / 32;
    char* const memory = shared_bytes();
    auto& block = *reinterpret_cast<KeyBlock*>(memory + L::kBlock);  // registers are scarce
    if (thread == 0) {
        const int unit = next_ticket(scratch.ticket);
        if (unit < KeyBlock::units(p))
            block = KeyBlock(p, unit, kStep);
        else
            block.count = 0;
    }
    sync_block();
    if (block.count == 0) return;
    const Span& span = block.span;

    // Load the keys and values, and the first queries.
    const uint32_t shared = shared_address(memory);
    auto& rows = *reinterpret_cast<QueryRows<kStep>*>(memory + L::kRows);
    const int64_t key = span.k + block.first;
    load_rows<T, D, kTile, kThreads>(
        shared + L::kK, static_cast<const T*>(p.k) + key * p.k_token_stride + block.kv_head * p.k_head_stride,
        p.k_token_stride, block.count, thread);
    load_rows<T, D, kTile, kThreads>(
        shared + L::kV, static_cast<const T*>(p.v) + key * p.v_token_stride + block.kv_head * p.v_head_stride,
        p.v_token_stride, block.count, thread);
    const auto load_step = [&](int head, int query, int stage) {
        const int64_t token = span.q + query;
        load_rows<T, D, kStep, kThreads>(shared + L::kQ + stage * L::kStepBytes,
                                         static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride,
                                         p.q_token_stride, span.num_q - query, thread);
        load_rows<T, D, kStep, kThreads>(shared + L::kDout + stage * L::kStepBytes,
                                         static_cast<const T*>(p.dout) + (token * p.num_heads + head) * D,
                                         p.num_heads * D, span.num_q - query, thread);
    };
    // What belongs to a query comes through registers: loaded early, stored when the step before has been read.
    float row_lse = 0, row_delta = 0;
    const auto load_row = [&](int head, int query) {
        if (thread >= kStep) return;
        const bool valid = query + thread < span.num_q;
        const int64_t at = (span.q + query + (valid ? thread : 0)) * p.num_heads + head;
        row_lse = static_cast<const float*>(p.lse)[at];
        row_delta = scratch.delta[at];
    };
    const auto store_row = [&](int query) {
        const bool valid = query + thread < span.num_q;
        if (thread < kStep)
            rows.set(thread, row_lse, row_delta,
                     valid ? visible_keys(query + thread, span.num_q, span.num_k, p.causal) : 0);
    };
    const int group = static_cast<int>(p.num_heads / p.num_kv_heads),
              steps = group * max(0, (span.num_q - block.from + kStep - 1) / kStep);
    int head = block.kv_head * group, query = block.from;
    if (steps > 0) {
        load_step(head, query, 0);
        load_row(head, query);
        store_row(query);
    }
    cp_async_commit();

    // A warp's parts of the products: 32 keys, half of the queries of a step or of the columns; for dQ 32 queries and
    // some columns.
    constexpr int kColumnWarps = kWarps / (kStep / kWarpRows), kQueryTiles = D / kColumnWarps / 8;
    const int my_keys = warp / 2 * kWarpRows, half = warp % 2;
    const uint32_t weights = shared + L::kWeights;
    const float scale = scale_of(p);
    float dk[2][D / 16][4], dv[2][D / 16][4];
    clear(dk);
    clear(dv);

    for (int step = 0; step < steps; ++step) {
        cp_async_wait<0>();
        sync_block();  // the step is here for everyone, and everyone is done with the step before
        if (thread == 0) block.raise(scratch.added);
        const int slot = head * static_cast<int>(scratch.slots) + block.slot + query / kStep;
        const int before = block.before(query, kStep, p.causal);
        if (thread == kThreads - 32 && before > 0) wait_for_flag(scratch.added + slot, before);

        // Load the next step.
        const bool is_last = step + 1 == steps;
        int next_head = head, next_query = query + kStep;
        if (next_query >= span.num_q) {
            next_query = block.from;
            ++next_head;
        }
        if (kStages == 2 && !is_last) load_step(next_head, next_query, (step + 1) % 2);
        if (kStages == 2) cp_async_commit();
        const int stage = kStages == 2 ? step % 2 * L::kStepBytes : 0;
        const uint32_t q_tile = shared + L::kQ + stage, do_tile = shared + L::kDout + stage;

        // P^T and dS^T.
        {
            const int lane = opaque(thread) % 32;  // addresses kept from step to step would not fit the registers
            const uint32_t my_weights =
                weights + swizzled<2 * kStep>(my_keys + lane / 4, half * (kStep / 16)) + lane % 4 * 4;
            float s[2][kStep / 16][4], dp[2][kStep / 16][4];
            clear(s);
            clear(dp);
            const auto product = [&](float (&d)[2][kStep / 16][4], uint32_t left, uint32_t right) {
                multiply_two_slots<T, kStep / 32, D>(
                    d, [&](uint32_t (&a)[4], int m, int k) { ldmatrix_x4(a, left_address<D>(left, 16 * m, k, lane)); },
                    [&](uint32_t (&b)[4], int j, int k) { ldmatrix_x4(b, right_address<D>(right, 16 * j, k, lane)); });
            };
            product(s, shared + L::kK + my_keys * D * 2, q_tile + half * (kStep / 2) * D * 2);
            product(dp, shared + L::kV + my_keys * D * 2, do_tile + half * (kStep / 2) * D * 2);
#pragma unroll
            for (int n = 0; n < kStep / 16; ++n) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int row = half * (kStep / 2) + n * 8 + lane % 4 * 2 + j;
                    const float lse = rows.lse[row], delta = rows.delta[row];
                    const int seen = rows.seen[row] - block.first - my_keys - lane / 4;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const bool visible = i * 8 < seen;
                        float &weight = s[i / 2][n][i % 2 * 2 + j], &x = dp[i / 2][n][i % 2 * 2 + j];
                        weight = visible ? exp2_approx(weight * (scale * kLog2E) - lse) : 0;
                        x = visible ? weight * (x - delta) * scale : 0;
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t at = (my_weights ^ (n << 4)) + i * 8 * 2 * kStep * 2;
                    const float *weight = s[i / 2][n] + i % 2 * 2, *x = dp[i / 2][n] + i % 2 * 2;
                    shared_store4(at, pack<T>(weight[0], weight[1]));
                    shared_store4(at ^ (kStep / 8 << 4), pack<T>(x[0], x[1]));
                }
            }
        }
        sync_block();  // P and dS are here for everyone; so is dQ so far, in memory

        if (!is_last) load_row(next_head, next_query);

        // dQ so far, if this block is not the first to add.
        float dq[2][kQueryTiles][4];
        clear(dq);
        float* const sums = scratch.sums + slot * int64_t(kStep * D) + thread * 4;
        if (before > 0) {
#pragma unroll
            for (int i = 0; i < 2 * kQueryTiles; ++i) {
                const auto so_far = load<4>(static_cast<const float*>(sums + i * 4 * kThreads));
#pragma unroll
                for (int j = 0; j < 4; ++j) dq[i / kQueryTiles][i % kQueryTiles][j] = so_far[j];
            }
        }

        // dV and dK.
        const int lane = opaque(thread) % 32;
        const uint32_t crossed = swizzled<D>(lane % 16, lane / 16);  // of this lane, where rows are the depth
        const auto add_keys = [&](float (&d)[2][D / 16][4], int first_k, uint32_t tile) {
            const uint32_t right = (tile + crossed) ^ (half * (D / 32) << 5);
            multiply_two_slots<T, D / 32, kStep>(
                d,
                [&](uint32_t (&a)[4], int m, int k) {
                    ldmatrix_x4(a,
                                left_address<2 * kStep>(weights + my_keys * 2 * kStep * 2, 16 * m, first_k + k, lane));
                },
                [&](uint32_t (&b)[4], int j, int k) { ldmatrix_x4_trans(b, (right ^ (j << 5)) + k * 16 * D * 2); });
        };
        add_keys(dv, 0, do_tile);
        add_keys(dk, kStep / 16, q_tile);
        if (kStages == 1) {
            sync_block();  // Q and dO are read
            if (!is_last) load_step(next_head, next_query, 0);
            cp_async_commit();
        }
        store_row(next_query);

        // dQ.
        const int my_queries = warp / kColumnWarps * kWarpRows, my_columns = warp % kColumnWarps * (D / kColumnWarps);
        const uint32_t right = (shared + L::kK + crossed) ^ (my_columns / 16 << 5);
        multiply_two_slots<T, kQueryTiles / 2, kTile>(
            dq,
            [&](uint32_t (&a)[4], int m, int k) {
                ldmatrix_x4_trans(a, right_address<2 * kStep>(weights, 16 * k, kStep / 16 + my_queries / 16 + m, lane));
            },
            [&](uint32_t (&b)[4], int j, int k) { ldmatrix_x4_trans(b, (right ^ (j << 5)) + k * 16 * D * 2); });
        if (block.first > 0) {
#pragma unroll
            for (int i = 0; i < 2 * kQueryTiles; ++i)
                store<4>(sums + i * 4 * kThreads, dq[i / kQueryTiles][i % kQueryTiles]);
            if (thread == 0) block.to_raise = slot, block.raised = before + 1;
        } else {
            store_two_slots(static_cast<T*>(p.dq) +
                                ((static_cast<int64_t>(span.q) + query + my_queries) * p.num_heads + head) * D +
                                my_columns,
                            p.num_heads * D, span.num_q - query - my_queries, dq, lane);
        }
        head = next_head;
        query = next_query;
    }
    cp_async_wait<0>();
    sync_block();  // the last sums are stored
    if (thread == 0) block.raise(scratch.added);

    const int64_t at = ((key + my_keys) * p.num_kv_heads + block.kv_head) * D + half * (D / 2);
    store_two_slots(static_cast<T*>(p.dk) + at, p.num_kv_heads * D, block.count - my_keys, dk, thread % 32);
    store_two_slots(static_cast<T*>(p.dv) + at, p.num_kv_heads * D, block.count - my_keys, dv, thread % 32);
}

}  // namespace qemb::cuda
