// Attention backward on Hopper, in two passes: one owns 128 keys and sums dK and dV of all query heads of its group in
// registers; a sequence that is one block of keys and queries has its dQ there too, and is done. For the others the second pass
// owns 128 queries and sums dQ, with weights computed again: nothing is ever added in memory, so the bits are always the same,
// and in exchange two products of seven are done twice. Blocks stay on their multiprocessor and take tile after tile.
#include "cuda/attention_dispatch.h"
#include "cuda/sm90/attention.h"
#include "cuda/sm90/attention_tile.h"

namespace qemb::cuda::sm90 {
namespace {

constexpr const char* kOp = "varlen_attention";
constexpr int kQueryStep = 64, kKeyStep = 128;  // rows that the other pass walks by
constexpr uint32_t kEndBarrier = 4, kSharedDsBarrier = 5;

// Is the sequence one block of each? Then the first pass does it all.
QEMB_DEVICE bool is_whole(const Span& span) { return span.num_k > 0 && span.num_k <= kTile && span.num_q <= kTile; }

int64_t padded(int64_t tokens) { return ceil_div(tokens, 4) * 4; }

// What the passes know of each query: [2, num_heads, padded tokens] its lse in base 2 (+inf where it sees no key: all its
// weights are zero), and delta, the sum of out * dout, where the first pass does not find it itself.
template <class T, int D>
__global__ void __launch_bounds__(256) prepare(const AttentionBackward p, int64_t row_tokens) {
    constexpr int kLanes = D / 8;
    const int64_t rows = p.num_tokens * p.num_heads;
    const int64_t row = min(blockIdx.x * int64_t(256 / kLanes) + threadIdx.x / kLanes, rows - 1);  // the last one several times
    const int64_t token = row / p.num_heads, head = row % p.num_heads;
    int64_t low = 0, high = p.num_seqs;  // cu_seqlens_q[low] <= token < cu_seqlens_q[high]
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (p.cu_seqlens_q[middle] <= token ? low : high) = middle;
    }
    const Span span(p.cu_seqlens_q, p.cu_seqlens_k, low);
    float delta = 0;
    if (any_lane(span.num_q > kTile || span.num_k > kTile)) {
        const int64_t at = row * D + threadIdx.x % kLanes * 8;
        delta = row_dot<D>(load<8>(static_cast<const T*>(p.out) + at), load<8>(static_cast<const T*>(p.dout) + at));
    }
    if (threadIdx.x % kLanes > 0) return;
    const float lse = static_cast<const float*>(p.lse)[row];
    float* const to = static_cast<float*>(p.scratch) + head * row_tokens + token;
    to[0] = lse == -INFINITY ? INFINITY : lse * kLog2E;
    to[p.num_heads * row_tokens] = delta;
}

template <int D>
struct KeysLayout {
    static constexpr int kStages = 4;
    static constexpr int kQ = 0, kDout = kTileBytes<kQueryStep, D>, kLse = 2 * kTileBytes<kQueryStep, D>,
                         kDelta = kLse + kQueryStep * 4;
    static constexpr int kLoaded = kDelta + kQueryStep * 4, kStageBytes = (kLoaded + 1023) / 1024 * 1024;
    static constexpr int kK = 0, kV = kTileBytes<kTile, D>, kDs = 2 * kTileBytes<kTile, D>,
                         kParts = kDs + kTile * kQueryStep * 2, kRing = kParts + kConsumers / 32 * kQueryStep * 4,
                         kBarriers = kRing + kStages * kStageBytes,
                         kMessage = kBarriers + Ring<1>::kBytes + Ring<kStages>::kBytes, kBytes = kMessage + kMessageBytes;
};

// 128 keys of a sequence and a kv head, and the steps of queries that see some of them, head after head.
struct KeyTile {
    static constexpr int kEnd = -1;

    Span span;
    int first, count, kv_head, group, from, per_head, steps;

    QEMB_DEVICE KeyTile(const AttentionBackward& p, int unit, int)
        : KeyTile(p, p.plan.data + 4 + 2 * (p.plan.tiles + p.plan.blocks + unit / static_cast<int>(p.num_kv_heads)),
                  unit % static_cast<int>(p.num_kv_heads)) {}
    QEMB_DEVICE static int units(const AttentionBackward& p) { return p.plan.data[2] * static_cast<int>(p.num_kv_heads); }
    QEMB_DEVICE static int parts(const AttentionBackward&) { return 1; }
    QEMB_DEVICE int head(int step) const { return kv_head * group + step / per_head; }
    QEMB_DEVICE int query(int step) const { return (from + step % per_head) * kQueryStep; }

  private:
    QEMB_DEVICE KeyTile(const AttentionBackward& p, const int32_t* item, int kv_head)
        : span(p.cu_seqlens_q, p.cu_seqlens_k, item[0]),
          first(item[1] * kTile),
          count(min(kTile, span.num_k - first)),
          kv_head(kv_head),
          group(static_cast<int>(p.num_heads / p.num_kv_heads)),
          from(p.causal && !is_whole(span) ? max(0, first - span.num_k + span.num_q) / kQueryStep : 0),
          per_head(max(0, (span.num_q + kQueryStep - 1) / kQueryStep - from)),
          steps(group * per_head) {}
};

template <int D>
QEMB_DEVICE void produce_queries(const AttentionBackward& p, const TensorMap& q, const TensorMap& k, const TensorMap& v,
                                 const TensorMap& dout, const TensorMap& rows, uint32_t shared, Ring<1> keys,
                                 Ring<KeysLayout<D>::kStages> ring) {
    using L = KeysLayout<D>;
    const auto any = [](const KeyTile&) { return true; };
    announce_tiles(p, message<KeyTile, L>(), keys, any, [&](const KeyTile& tile) {
        mbarrier_expect(keys.full(), 2 * kTileBytes<kTile, D>);
        load_tile<kTile, D>(shared + L::kK, k, keys.full(), tile.kv_head, tile.span.k + tile.first);
        load_tile<kTile, D>(shared + L::kV, v, keys.full(), tile.kv_head, tile.span.k + tile.first);
        for (int step = 0; step < tile.steps; ++step) {
            const int head = tile.head(step), token = tile.span.q + tile.query(step);
            const uint32_t stage = shared + L::kRing + ring.stage * L::kStageBytes;
            ring.wait_empty();
            mbarrier_expect(ring.full(), L::kLoaded);
            load_tile<kQueryStep, D>(stage + L::kQ, q, ring.full(), head, token);
            load_tile<kQueryStep, D>(stage + L::kDout, dout, ring.full(), head, token);
            tma_load(stage + L::kLse, rows, ring.full(), {token, head});
            tma_load(stage + L::kDelta, rows, ring.full(), {token, static_cast<int>(p.num_heads) + head});
            ring.next();
        }
    });
}

// weight * x, but a weight of 0 stays 0 beside a neighbour's NaN.
QEMB_DEVICE float weighted(float weight, float x) { return weight > 0 ? weight * x : weight; }

// delta of a step's queries, where all keys are here: the sum of weight * dP over them, so that out need not be read. Eight
// warps have 16 keys each.
template <int D>
QEMB_DEVICE void sum_delta(const float (&weights)[kQueryStep / 2], const float (&dp)[kQueryStep / 2], float* delta) {
    float* const parts = reinterpret_cast<float*>(shared_bytes() + KeysLayout<D>::kParts);  // [warps, queries]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kQueryStep / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float part = 0;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                part += weighted(weights[4 * n + 2 * i + j], dp[4 * n + 2 * i + j]);
            }
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) part += shuffle_xor(part, mask);
            if (lane < 4) parts[warp * kQueryStep + n * 8 + lane * 2 + j] = part;
        }
    barrier_sync(kSharedDsBarrier, kConsumers);
    const int column = threadIdx.x / 4, first = threadIdx.x % 4 * 2;  // warps
    const float sum = lanes_sum<4>(parts[first * kQueryStep + column] + parts[(first + 1) * kQueryStep + column]);
    if (lane % 4 == 0) delta[column] = sum;
    fence_async();  // the copy engine writes there next
    barrier_sync(kSharedDsBarrier, kConsumers);
}

// dQ of a step's queries, where all keys are here: dS^T goes through shared memory, and each warpgroup takes 64 columns.
template <class T, int D>
QEMB_DEVICE void finish_queries(const AttentionBackward& p, const uint32_t (&ds)[kQueryStep / 16][4], uint32_t shared,
                                int64_t query, int head, int count) {
    using L = KeysLayout<D>;
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const uint32_t tile = shared + L::kDs, row = group * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int k = 0; k < kQueryStep / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            shared_store4(tile + (row + i % 2 * 8) * 128 + ((2 * k + i / 2) ^ row % 8) * 16 + lane % 4 * 4, ds[k][i]);
    fence_async();
    wgmma_wait<0>();  // dK and dV, whose operands occupy registers
    barrier_sync(kSharedDsBarrier, kConsumers);
    float dq[32];
    // Of one panel both compute the same, and one stores no rows: where warpgroups part, ptxas lets products run one by one.
    const int panel = min(group, D / 64 - 1);
    const uint64_t left = matrix(tile), right = matrix(shared + L::kK + panel * kPanelBytes<kTile>);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k)
        wgmma<T, 64, Major::kMN, Major::kMN>(dq, moved(left, k * 2048), moved(right, k * 2048), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    barrier_sync(kSharedDsBarrier, kConsumers);  // it is read: it is the staging
    const float factor = static_cast<float>(p.scale);
    store_rows<T, 64>(static_cast<T*>(p.dq) + ((query + warp * 16) * p.num_heads + head) * D + group * 64, p.num_heads * D,
                      group < D / 64 ? count - warp * 16 : 0, reinterpret_cast<const float (&)[8][4]>(dq), factor, factor,
                      tile + (group * 64 + warp * 16) * 128, lane);
}

template <class T, int D>
QEMB_DEVICE void sum_key_gradients(const AttentionBackward& p, uint32_t shared, Ring<1> keys,
                                   Ring<KeysLayout<D>::kStages> ring) {
    using L = KeysLayout<D>;
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const bool signals = threadIdx.x % 128 == 0;
    const int my_first = group * 64 + warp * 16;
    const float scale = static_cast<float>(p.scale) * kLog2E;
    const uint32_t my_k = shared + L::kK + group * 64 * 128, my_v = shared + L::kV + group * 64 * 128;
    while (true) {
        keys.wait_full();
        const KeyTile tile = message<KeyTile, L>();
        if (tile.steps == KeyTile::kEnd) return;
        const int key = tile.first + my_first + lane / 4;
        const bool whole = is_whole(tile.span);
        float dk[D / 2], dv[D / 2], s[kQueryStep / 2], dp[kQueryStep / 2];
        uint32_t weights[kQueryStep / 16][4], ds[kQueryStep / 16][4];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;

        if (whole && tile.count < kTile) {  // dQ sums over them
            clear_rows<kTile, D>(shared + L::kK, tile.count);
            barrier_sync(kTailBarrier, kConsumers);
        }
        Ring<L::kStages> before = ring;  // the stage of the step before
        for (int step = 0; step < tile.steps; ++step) {
            const int offset = L::kRing + ring.stage * L::kStageBytes;
            const uint32_t stage = shared + offset;
            const int first_query = tile.query(step), left = tile.span.num_q - first_query;
            ring.wait_full();
            if (left < kQueryStep) {
                clear_rows<kQueryStep, D>(stage + L::kQ, left);
                clear_rows<kQueryStep, D>(stage + L::kDout, left);
                barrier_sync(kTailBarrier, kConsumers);
            }
            wgmma_fence();
            multiply_rows<T, D, kTile, kQueryStep>(s, my_k, stage + L::kQ);
            wgmma_commit();
            wgmma_wait<1>();  // the gradients of the step before
            if (step > 0) before.release(signals);
            wgmma_fence();
            multiply_rows<T, D, kTile, kQueryStep>(dp, my_v, stage + L::kDout);
            wgmma_commit();
            wgmma_wait<1>();

            // Weights, queries along the columns
            const auto* lse = reinterpret_cast<const float*>(shared_bytes() + offset + L::kLse);
            auto* delta = reinterpret_cast<float*>(shared_bytes() + offset + L::kDelta);
            const int seen = tile.span.num_k - tile.span.num_q + 1;  // by query 0 under a causal mask
            const bool masked =
                left < kQueryStep || tile.count < kTile || (p.causal && first_query + seen < tile.first + group * 64 + 64);
#pragma unroll
            for (int n = 0; n < kQueryStep / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = n * 8 + lane % 4 * 2 + i % 2, row = key + i / 2 * 8;
                    const bool visible =
                        !masked || (column < left && row < tile.span.num_k && (!p.causal || row < first_query + column + seen));
                    s[4 * n + i] = visible ? exp2_approx(fmaf(s[4 * n + i], scale, -lse[column])) : 0;
                }
            as_left<T, kQueryStep>(s, weights);
            wgmma_fence();
            multiply_columns<T, D, kQueryStep>(dv, weights, stage + L::kDout);
            wgmma_commit();
            wgmma_wait<0>();  // dV as well: with its operand in registers ptxas would let the products run one by one
            if (whole) sum_delta<D>(s, dp, delta);
#pragma unroll
            for (int n = 0; n < kQueryStep / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = n * 8 + lane % 4 * 2 + i % 2;
                    dp[4 * n + i] = weighted(s[4 * n + i], dp[4 * n + i] - delta[column]);
                }
            as_left<T, kQueryStep>(dp, ds);
            wgmma_fence();
            multiply_columns<T, D, kQueryStep>(dk, ds, stage + L::kQ);
            wgmma_commit();
            if (whole) finish_queries<T, D>(p, ds, shared, tile.span.q + first_query, tile.head(step), left);
            before = ring;
            ring.next();
        }
        wgmma_wait<0>();
        if (tile.steps > 0) before.release(signals);
        barrier_sync(kEndBarrier, kConsumers);  // nobody reads K and V any more: they are the staging
        const int64_t to = ((tile.span.k + tile.first + my_first) * p.num_kv_heads + tile.kv_head) * D;
        const float factor = static_cast<float>(p.scale);
        store_rows<T, D>(static_cast<T*>(p.dk) + to, p.num_kv_heads * D, tile.count - my_first,
                         reinterpret_cast<const float (&)[D / 8][4]>(dk), factor, factor, shared + L::kK + my_first * D * 2,
                         lane);
        store_rows<T, D>(static_cast<T*>(p.dv) + to, p.num_kv_heads * D, tile.count - my_first,
                         reinterpret_cast<const float (&)[D / 8][4]>(dv), 1, 1, shared + L::kV + my_first * D * 2, lane);
        fence_async();  // before the copy engine writes there
        keys.release(lane == 0);
    }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    key_gradients(const AttentionBackward p, const QEMB_GRID_CONSTANT TensorMap q, const QEMB_GRID_CONSTANT TensorMap k,
                  const QEMB_GRID_CONSTANT TensorMap v, const QEMB_GRID_CONSTANT TensorMap dout,
                  const QEMB_GRID_CONSTANT TensorMap rows) {
    using L = KeysLayout<D>;
    const uint32_t shared = shared_address(shared_bytes());
    const Ring<1> keys{shared + L::kBarriers};
    const Ring<L::kStages> ring{keys.barriers + Ring<1>::kBytes};
    by_role(
        [&] {
            keys.init(kConsumers / 32);
            ring.init(2);
        },
        [&] { produce_queries<D>(p, q, k, v, dout, rows, shared, keys, ring); },
        [&] { sum_key_gradients<T, D>(p, shared, keys, ring); });
}

template <int D>
struct QueriesLayout {
    static constexpr int kQ = 0, kDout = kTileBytes<kTile, D>, kRing = 2 * kTileBytes<kTile, D>;
    static constexpr int kStageBytes = 2 * kTileBytes<kKeyStep, D>;  // keys, then values
    static constexpr int kStages = 2, kBarriers = kRing + kStages * kStageBytes,
                         kMessage = kBarriers + Ring<1>::kBytes + Ring<kStages>::kBytes, kBytes = kMessage + kMessageBytes;
};

template <int D>
QEMB_DEVICE void produce_keys(const AttentionBackward& p, const TensorMap& q, const TensorMap& k, const TensorMap& v,
                              const TensorMap& dout, uint32_t shared, Ring<1> queries, Ring<2> ring) {
    using L = QueriesLayout<D>;
    const auto is_left = [](const QueryTile& tile) { return !is_whole(tile.span); };
    announce_tiles(p, message<QueryTile, L>(), queries, is_left, [&](const QueryTile& tile) {
        mbarrier_expect(queries.full(), 2 * kTileBytes<kTile, D>);
        load_tile<kTile, D>(shared + L::kQ, q, queries.full(), tile.head, tile.span.q + tile.first);
        load_tile<kTile, D>(shared + L::kDout, dout, queries.full(), tile.head, tile.span.q + tile.first);
        for (int step = 0; step < tile.steps; ++step) {
            const uint32_t stage = shared + L::kRing + ring.stage * L::kStageBytes;
            const int key = tile.span.k + step * kKeyStep;
            ring.wait_empty();
            mbarrier_expect(ring.full(), L::kStageBytes);
            load_tile<kKeyStep, D>(stage, k, ring.full(), tile.kv_head, key);
            load_tile<kKeyStep, D>(stage + kTileBytes<kKeyStep, D>, v, ring.full(), tile.kv_head, key);
            ring.next();
        }
    });
}

template <class T, int D>
QEMB_DEVICE void sum_query_gradients(const AttentionBackward& p, int64_t row_tokens, uint32_t shared, Ring<1> queries,
                                     Ring<2> ring) {
    using L = QueriesLayout<D>;
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const bool signals = threadIdx.x % 128 == 0;
    const int my_first = group * 64 + warp * 16;
    const float scale = static_cast<float>(p.scale) * kLog2E;
    const uint32_t my_q = shared + L::kQ + group * 64 * 128, my_dout = shared + L::kDout + group * 64 * 128;
    while (true) {
        queries.wait_full();
        const QueryTile tile = message<QueryTile, L>();
        if (tile.steps == QueryTile::kEnd) return;
        const int all_see = visible_keys(tile.first + group * 64, tile.span.num_q, tile.span.num_k, p.causal);
        float dq[D / 2], s[kKeyStep / 2], dp[kKeyStep / 2], lse[2], delta[2];
        uint32_t ds[kKeyStep / 16][4];
        int sees[2];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dq[i] = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = my_first + lane / 4 + 8 * i;
            const float* from = static_cast<const float*>(p.scratch) + tile.head * row_tokens + tile.span.q + tile.first +
                                min(row, tile.count - 1);
            sees[i] = visible_keys(tile.first + row, tile.span.num_q, tile.span.num_k, p.causal);
            lse[i] = from[0];
            delta[i] = from[p.num_heads * row_tokens];
        }

        Ring<2> before = ring;
        for (int step = 0; step < tile.steps; ++step) {
            const uint32_t k_tile = shared + L::kRing + ring.stage * L::kStageBytes, v_tile = k_tile + kTileBytes<kKeyStep, D>;
            const int left = tile.span.num_k - step * kKeyStep;
            ring.wait_full();
            if (left < kKeyStep) {
                clear_rows<kKeyStep, D>(k_tile, left);
                barrier_sync(kTailBarrier, kConsumers);
            }
            wgmma_fence();
            multiply_rows<T, D, kTile, kKeyStep>(s, my_q, k_tile);
            wgmma_commit();
            wgmma_wait<1>();  // the gradient of the step before
            if (step > 0) before.release(signals);
            wgmma_fence();
            multiply_rows<T, D, kTile, kKeyStep>(dp, my_dout, v_tile);
            wgmma_commit();
            wgmma_wait<1>();
#pragma unroll
            for (int i = 0; i < kKeyStep / 2; ++i) s[i] = exp2_approx(fmaf(s[i], scale, -lse[i / 2 % 2]));
            wgmma_wait<0>();
            const bool masked = (step + 1) * kKeyStep > all_see;
#pragma unroll
            for (int i = 0; i < kKeyStep / 2; ++i) {
                const int key = step * kKeyStep + i / 4 * 8 + lane % 4 * 2 + i % 2;
                dp[i] = masked && key >= sees[i / 2 % 2] ? 0 : s[i] * (dp[i] - delta[i / 2 % 2]);
            }
            as_left<T, kKeyStep>(dp, ds);
            wgmma_fence();
            multiply_columns<T, D, kKeyStep>(dq, ds, k_tile);
            wgmma_commit();
            before = ring;
            ring.next();
        }
        wgmma_wait<0>();
        if (tile.steps > 0) before.release(signals);
        barrier_sync(kEndBarrier, kConsumers);  // nobody reads Q any more: it is the staging
        const float factor = static_cast<float>(p.scale);
        const int64_t token = tile.span.q + tile.first + my_first;
        store_rows<T, D>(static_cast<T*>(p.dq) + (token * p.num_heads + tile.head) * D, p.num_heads * D, tile.count - my_first,
                         reinterpret_cast<const float (&)[D / 8][4]>(dq), factor, factor, shared + L::kQ + my_first * D * 2,
                         lane);
        fence_async();  // before the copy engine writes there
        queries.release(lane == 0);
    }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    query_gradients(const AttentionBackward p, int64_t row_tokens, const QEMB_GRID_CONSTANT TensorMap q,
                    const QEMB_GRID_CONSTANT TensorMap k, const QEMB_GRID_CONSTANT TensorMap v,
                    const QEMB_GRID_CONSTANT TensorMap dout) {
    using L = QueriesLayout<D>;
    const uint32_t shared = shared_address(shared_bytes());
    const Ring<1> queries{shared + L::kBarriers};
    const Ring<2> ring{queries.barriers + Ring<1>::kBytes};
    by_role(
        [&] {
            queries.init(kConsumers / 32);
            ring.init(2);
        },
        [&] { produce_keys<D>(p, q, k, v, dout, shared, queries, ring); },
        [&] { sum_query_gradients<T, D>(p, row_tokens, shared, queries, ring); });
}

}  // namespace

int64_t attention_backward_scratch(const AttentionBackward& p) {
    return 2 * p.num_heads * padded(p.num_tokens) * static_cast<int64_t>(sizeof(float));
}

bool attention_backward(const AttentionBackward& p) {
    if (p.num_tokens == 0 || p.num_keys == 0) return false;
    bool taken = false;
    visit_types(p, [&]<class T, int D>() {
        const int64_t tokens = p.num_tokens, keys = p.num_keys, heads = p.num_heads, row_tokens = padded(tokens);
        TensorMap q_steps, q_tiles, k, v, dout_steps, dout_tiles, rows;
        const bool fits = make_token_map<T, D, kQueryStep>(q_steps, p.q, tokens, heads, p.q_token_stride, p.q_head_stride) &&
                          make_token_map<T, D, kTile>(q_tiles, p.q, tokens, heads, p.q_token_stride, p.q_head_stride) &&
                          make_token_map<T, D, kTile>(k, p.k, keys, p.num_kv_heads, p.k_token_stride, p.k_head_stride) &&
                          make_token_map<T, D, kTile>(v, p.v, keys, p.num_kv_heads, p.v_token_stride, p.v_head_stride) &&
                          make_token_map<T, D, kQueryStep>(dout_steps, p.dout, tokens, heads, heads * D, D) &&
                          make_token_map<T, D, kTile>(dout_tiles, p.dout, tokens, heads, heads * D, D) &&
                          make_tensor_map<float>(rows, {.base = p.scratch,
                                                        .rank = 2,
                                                        .size = {row_tokens, 2 * heads},
                                                        .byte_stride = {0, row_tokens * 4},
                                                        .box = {kQueryStep, 1},
                                                        .swizzled = false});
        if (!fits) return;
        launch(kOp, prepare<T, D>, dim3(static_cast<unsigned>(ceil_div(tokens * heads, 2048 / D))), 256, 0, p.stream, p,
               row_tokens);
        launch(kOp, key_gradients<T, D>, resident_blocks(p.plan.key_blocks * p.num_kv_heads), kThreads, KeysLayout<D>::kBytes,
               p.stream, p, q_steps, k, v, dout_steps, rows);
        launch(kOp, query_gradients<T, D>, resident_blocks(p.plan.blocks * p.num_kv_heads), kThreads, QueriesLayout<D>::kBytes,
               p.stream, p, row_tokens, q_tiles, k, v, dout_tiles);
        taken = true;
    });
    return taken;
}

}  // namespace qemb::cuda::sm90
