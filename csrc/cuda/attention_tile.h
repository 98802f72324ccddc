// What the attention kernels share: swizzled rows in shared memory, fragments, masks, and the map of a tile of short
// sequences.
//
// A row of D values lies in chunks of 16 bytes; chunk c of row r is stored at c ^ (r % 8), so that the eight rows that
// one ldmatrix phase reads lie in different banks.
#pragma once

#include "cuda/device/reduce.h"
#include "cuda/device/vector.h"
#include "ops/attention.h"

namespace qemb::cuda {

constexpr int kTile = AttentionPlan::kTile, kSlot = AttentionPlan::kSlot, kMostSlots = kTile / kSlot;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <int D>
QEMB_DEVICE uint32_t swizzled(int row, int chunk) {
    return static_cast<uint32_t>(row * D * 2 + ((chunk ^ (row & 7)) << 4));
}

// ldmatrix addresses of this lane; `row`, `n` and `k` along rows are multiples of 8. `left`: A (16 x 16) at (row, 16
// k), k contiguous. `right`: two n-tiles of B from rows of n, k contiguous. `crossed`: two n-tiles of B, or A^T, from
// rows of k, n contiguous. Chunks are a power of two to a row, so stepping along the row is an exclusive or, and along
// rows a constant.
template <int D>
QEMB_DEVICE uint32_t left_address(uint32_t tile, int row, int k, int lane) {
    return ((tile + swizzled<D>(lane % 16, lane / 16)) ^ (k << 5)) + row * D * 2;
}
template <int D>
QEMB_DEVICE uint32_t right_address(uint32_t tile, int n, int k, int lane) {
    return ((tile + swizzled<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2)) ^ (k << 5)) + n * D * 2;
}
template <int D>
QEMB_DEVICE uint32_t crossed_address(uint32_t tile, int k, int n, int lane) {
    return ((tile + swizzled<D>(lane % 16, lane / 16)) ^ (n << 5)) + k * D * 2;
}

// Accumulators of two neighbouring n-tiles as the operand A of the next product.
template <class T>
QEMB_DEVICE void as_left(const float (&low)[4], const float (&high)[4], uint32_t (&a)[4]) {
    a[0] = pack<T>(low[0], low[1]);
    a[1] = pack<T>(low[2], low[3]);
    a[2] = pack<T>(high[0], high[1]);
    a[3] = pack<T>(high[2], high[3]);
}

// Online softmax of a thread's kScores scores of one row, in base 2: with `scale` they become weights, relative to the
// largest score of the row so far. A quad of lanes shares the row. -> what the sums so far are multiplied by
template <int kScores, class Score>
QEMB_DEVICE float online_softmax(float& row_max, float& sum, float scale, const Score& score) {
    float best = row_max;
#pragma unroll
    for (int i = 0; i < kScores; ++i) best = fmaxf(best, score(i));
    best = lanes_max<4>(best);
    const float base = best == -INFINITY ? 0 : best * scale, factor = exp2_approx(row_max * scale - base);
    row_max = best;
    float total = 0;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
        float& x = score(i);
        x = exp2_approx(fmaf(x, scale, -base));
        total += x;
    }
    sum = sum * factor + total;
    return factor;
}

// d[2j], d[2j + 1] (+)= a B, B's columns 16 j, j < kPairs, from rows of n (scores) or rows of k (outputs).
template <class T, int D, int kPairs>
QEMB_DEVICE void multiply_rows(float (*d)[4], const uint32_t (&a)[4], uint32_t tile, int n, int k, int lane) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        uint32_t b[4];
        ldmatrix_x4(b, right_address<D>(tile, n + 16 * j, k, lane));
        mma<T>(d[2 * j], a, b[0], b[1]);
        mma<T>(d[2 * j + 1], a, b[2], b[3]);
    }
}
template <class T, int D>
QEMB_DEVICE void multiply_columns(float (&d)[D / 8][4], const uint32_t (&a)[4], uint32_t tile, int k, int lane) {
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, crossed_address<D>(tile, k, j, lane));
        mma<T>(d[2 * j], a, b[0], b[1]);
        mma<T>(d[2 * j + 1], a, b[2], b[3]);
    }
}

// Rows [0, count) of `from`, and zeros up to kRows, to shared memory by kThreads threads. The caller commits and waits.
template <class T, int D, int kRows, int kThreads>
QEMB_DEVICE void load_rows(uint32_t tile, const T* from, int64_t stride, int count, int thread) {
    constexpr int kChunks = D / 8, kStep = kThreads / kChunks;
    int row = thread / kChunks;
    const int chunk = thread % kChunks;
    const T* at = from + row * stride + chunk * 8;
#pragma unroll 2  // addresses kept for all rows would crowd the registers
    for (int i = 0; i < kRows / kStep; ++i) {
        const bool valid = row < count;
        cp_async16(tile + swizzled<D>(row, chunk), valid ? at : from, valid);
        row += kStep;
        at += kStep * stride;
    }
}

// Sixteen rows of accumulators, times factor, to rows [0, count) of `to`, through `staging`: this warp's 16 rows of
// shared memory.
template <class T, int D>
QEMB_DEVICE void store_rows(T* to, int64_t stride, int count, const float (&x)[D / 8][4], float factor0, float factor1,
                            uint32_t staging, int lane) {
    sync_warp();
    const uint32_t start = staging + swizzled<D>(lane / 4, 0) + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
        shared_store4(start ^ (j << 4), pack<T>(x[j][0] * factor0, x[j][1] * factor0));
        shared_store4((start ^ (j << 4)) + 8 * D * 2, pack<T>(x[j][2] * factor1, x[j][3] * factor1));
    }
    sync_warp();
    constexpr int kChunks = D / 8;
#pragma unroll 2
    for (int i = lane; i < kSlot * kChunks; i += 32) {
        const int row = i / kChunks, chunk = i % kChunks;
        if (row < count) store16(to + row * stride + chunk * 8, shared_load16(staging + swizzled<D>(row, chunk)));
    }
    sync_warp();
}

// The dot product of two rows of D values, 8 to a lane.
template <int D, class A, class B>
QEMB_DEVICE float row_dot(const A& a, const B& b) {
    float x = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) x += a[i] * b[i];
    return lanes_sum<D / 8>(x);
}

// How many keys query i of num_q may see, of num_k.
QEMB_DEVICE int visible_keys(int i, int num_q, int num_k, bool causal) {
    return causal ? max(0, min(num_k, i + num_k - num_q + 1)) : num_k;
}

// The factor of the scores: NaN, and so is every result, where the plan's kernel found lengths that are none.
QEMB_DEVICE float scale_of(const Attention& p) {
    const AttentionPlan& plan = p.plan;
    return plan.data[4 + 2 * (plan.tiles + plan.blocks) + 3 * plan.key_blocks] ? NAN : static_cast<float>(p.scale);
}

// The lengths of one sequence.
struct Span {
    int q, num_q, k, num_k;

    QEMB_DEVICE Span(const int32_t* cu_q, const int32_t* cu_k, int64_t s)
        : q(cu_q[s]), num_q(cu_q[s + 1] - cu_q[s]), k(cu_k[s]), num_k(cu_k[s + 1] - cu_k[s]) {}
};

struct Slot {
    int token;   // of the first row
    int count;   // rows in use; 0: empty slot
    int offset;  // of the first row in its sequence
    int length;  // of its sequence, on this side
    int other;   // first slot of its sequence on the other side
    int other_length;
};

// Where the slots of a tile of short sequences come from. A sequence's slots are neighbours, so the keys of a query
// slot are the slots [other, other + ceil(length / kSlot)), and the queries of a key slot likewise.
template <int kSlots>
struct SlotMap {
    Slot q[kSlots], k[kSlots];

    // By the first warp; a barrier of the block must follow.
    QEMB_DEVICE void fill(const int32_t* cu_q, const int32_t* cu_k, int first, int count, int most_short, int lane) {
        if (lane < kSlots) q[lane].count = k[lane].count = 0;
        sync_warp();
        int num_q = 0, num_k = 0;
        if (lane < count) {
            num_q = cu_q[first + lane + 1] - cu_q[first + lane];
            num_k = cu_k[first + lane + 1] - cu_k[first + lane];
            if (num_q > most_short || num_k > most_short) num_q = num_k = 0;  // a long one between them, cut elsewhere
        }
        const int q_slots = (num_q + kSlot - 1) / kSlot, k_slots = (num_k + kSlot - 1) / kSlot;
        int q_slot = q_slots, k_slot = k_slots;  // running sums
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int before_q = shuffle(q_slot, (lane - step) & 31), before_k = shuffle(k_slot, (lane - step) & 31);
            if (lane >= step) {
                q_slot += before_q;
                k_slot += before_k;
            }
        }
        q_slot -= q_slots;
        k_slot -= k_slots;
        for (int i = 0; i < q_slots; ++i)
            q[q_slot + i] = {
                cu_q[first + lane] + i * kSlot, min(kSlot, num_q - i * kSlot), i * kSlot, num_q, k_slot, num_k};
        for (int i = 0; i < k_slots; ++i)
            k[k_slot + i] = {
                cu_k[first + lane] + i * kSlot, min(kSlot, num_k - i * kSlot), i * kSlot, num_k, q_slot, num_q};
    }
};

// A whole tile, slot by slot, by as many warps.
template <class T, int D, int kSlots>
QEMB_DEVICE void load_slots(uint32_t tile, const Slot (&slots)[kSlots], const T* from, int64_t stride, int thread) {
    constexpr int kChunks = D / 8;
    for (int i = thread; i < kSlots * kSlot * kChunks; i += kSlots * 32) {
        const int row = i / kChunks, chunk = i % kChunks;
        const Slot& slot = slots[row / kSlot];
        const bool valid = row % kSlot < slot.count;
        const int64_t token = valid ? slot.token + row % kSlot : 0;
        cp_async16(tile + swizzled<D>(row, chunk), from + token * stride + chunk * 8, valid);
    }
}

}  // namespace qemb::cuda
