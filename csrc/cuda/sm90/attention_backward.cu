// Attention backward on Hopper, in one pass. A block of threads owns 128 keys and sums dK and dV of all query heads of
// their group in registers. dQ is a sum over blocks of keys: the only one stores it; several add to it in memory, from
// the last keys to the first, each after the one before it, so that the bits are always the same. Blocks stay on their
// multiprocessor and take tile after tile, in order: whoever waits, waits for a tile that somebody took earlier.
#include <type_traits>

#include "cuda/attention_dispatch.h"
#include "cuda/sm90/attention.h"
#include "cuda/sm90/attention_tile.h"

namespace qemb::cuda::sm90 {
namespace {

constexpr const char* kOp = "varlen_attention";
constexpr int kQueryStep = 64;
constexpr uint32_t kEndBarrier = 4, kSharedDsBarrier = 5;

// What lies in the scratch memory.
struct Scratch {
    int64_t row_tokens, slots;
    float* rows;  // [2, num_heads, row_tokens] of each query its lse in base 2 (+inf where it sees no key: all its
                  // weights are zero), and delta, the sum of out * dout, where its keys are several blocks
    int* ticket;
    int* added;     // [num_heads, slots] blocks of keys that have added to dQ of a step of queries
    float* sums;    // [num_heads, slots, kQueryStep * head_dim] dQ so far, each thread's part as it holds it
    int64_t bytes;  // of all

    explicit Scratch(const AttentionBackward& p)
        : row_tokens(ceil_div(p.num_tokens, 4) * 4), slots(p.plan.summed * (kTile / kQueryStep)) {
        const int64_t numbers = 2 * p.num_heads * row_tokens, flags = ceil_div(1 + p.num_heads * slots, 4) * 4;
        rows = static_cast<float*>(p.scratch);
        ticket = reinterpret_cast<int*>(rows + numbers);
        added = ticket + 1;
        sums = rows + numbers + flags;
        bytes = (numbers + flags + p.num_heads * slots * kQueryStep * p.head_dim) * int64_t(sizeof(float));
    }
    int64_t flag_bytes() const { return reinterpret_cast<char*>(sums) - reinterpret_cast<char*>(ticket); }
};

// A block: the rows of a few tokens, D / 8 threads each.
constexpr int kPreparedTokens = 8;
template <class T, int D>
__global__ void __launch_bounds__(256) prepare(const AttentionBackward p, const Scratch scratch) {
    constexpr int kLanes = D / 8;
    const int64_t first = blockIdx.x * int64_t(kPreparedTokens), end = min(first + kPreparedTokens, p.num_tokens);
    int64_t sequence = 0, high = p.num_seqs;  // cu_seqlens_q[sequence] <= first < cu_seqlens_q[high]
    while (high - sequence > 1) {
        const int64_t middle = (sequence + high) / 2;
        (p.cu_seqlens_q[middle] <= first ? sequence : high) = middle;
    }
    for (int64_t i = threadIdx.x / kLanes; any_lane(i < (end - first) * p.num_heads); i += 256 / kLanes) {
        const int64_t row = min(first * p.num_heads + i, end * p.num_heads - 1);  // the last one several times
        const int64_t token = row / p.num_heads, head = row % p.num_heads;
        while (p.cu_seqlens_q[sequence + 1] <= token) ++sequence;
        const Span span(p.cu_seqlens_q, p.cu_seqlens_k, sequence);
        float delta = 0;
        const int64_t at = row * D + threadIdx.x % kLanes * 8;
        if (any_lane(span.num_k == 0)) store16(static_cast<T*>(p.dq) + at, {});  // for others dQ comes later
        if (any_lane(span.num_k > kTile))
            delta = row_dot<D>(load<8>(static_cast<const T*>(p.out) + at), load<8>(static_cast<const T*>(p.dout) + at));
        if (threadIdx.x % kLanes > 0) continue;
        const float lse = static_cast<const float*>(p.lse)[row];
        float* const to = scratch.rows + head * scratch.row_tokens + token;
        to[0] = lse == -INFINITY ? INFINITY : lse * kLog2E;
        to[p.num_heads * scratch.row_tokens] = delta;
    }
}

constexpr int kDsBytes = kTile * kQueryStep * 2;  // of a step; those of two steps are kept
template <int D>
struct Layout {
    static constexpr int kStages = D == 128 ? 2 : 3;  // as shared memory allows
    static constexpr int kQ = 0, kDout = kTileBytes<kQueryStep, D>, kLse = 2 * kTileBytes<kQueryStep, D>,
                         kDelta = kLse + kQueryStep * 4;
    static constexpr int kLoaded = kDelta + kQueryStep * 4, kStageBytes = (kLoaded + 1023) / 1024 * 1024;
    static constexpr int kK = 0, kV = kTileBytes<kTile, D>, kDs = 2 * kTileBytes<kTile, D>, kParts = kDs + 2 * kDsBytes,
                         kRing = kParts + kConsumers / 32 * kQueryStep * 4, kSums = kRing + kStages * kStageBytes,
                         kSumBytes = kQueryStep * D * 4, kBarriers = kSums + kSumBytes,
                         kMessage = kBarriers + 2 * Ring<1>::kBytes + Ring<kStages>::kBytes,
                         kDelivery = kMessage + kMessageBytes, kBytes = kDelivery + 32;
};

// 128 keys of a sequence and a kv head, and the steps of queries that see some of them, head after head. The last keys
// of a sequence come first: under a causal mask nobody has to wait for those before it.
struct KeyTile {
    static constexpr int kEnd = -1, heads = 1;

    Span span;
    int slot, first, count, kv_head, group, from, per_head, steps;

    QEMB_DEVICE KeyTile(const AttentionBackward& p, int unit, int)
        : KeyTile(p,
                  p.plan.data + 4 + 2 * (p.plan.tiles + p.plan.blocks) + 3 * (unit / static_cast<int>(p.num_kv_heads)),
                  unit % static_cast<int>(p.num_kv_heads)) {}
    QEMB_DEVICE static int units(const AttentionBackward& p) {
        return p.plan.data[2] * static_cast<int>(p.num_kv_heads);
    }
    QEMB_DEVICE static int parts(const AttentionBackward&) { return 1; }
    QEMB_DEVICE int head(int step) const { return kv_head * group + step / per_head; }
    QEMB_DEVICE int query(int step) const { return (from + step % per_head) * kQueryStep; }
    QEMB_DEVICE bool has_all_keys() const { return span.num_k <= kTile; }
    // How many blocks add to dQ of a step before this one.
    QEMB_DEVICE int before(int step, bool causal) const {
        const int last = (span.num_k - 1) / kTile, seen = span.num_k - span.num_q + query(step) + kQueryStep;
        return (causal ? max(0, min(last, (seen - 1) / kTile)) : last) - first / kTile;
    }

  private:
    QEMB_DEVICE KeyTile(const AttentionBackward& p, const int32_t* item, int kv_head)
        : span(p.cu_seqlens_q, p.cu_seqlens_k, item[0]),
          slot(item[2] * (kTile / kQueryStep)),
          first(((span.num_k - 1) / kTile - item[1]) * kTile),
          count(min(kTile, span.num_k - first)),
          kv_head(kv_head),
          group(static_cast<int>(p.num_heads / p.num_kv_heads)),
          // The first block also stores the zeros of queries that see nothing
          from(p.causal && first > 0 ? max(0, first - span.num_k + span.num_q) / kQueryStep : 0),
          per_head(max(0, (span.num_q + kQueryStep - 1) / kQueryStep - from)),
          steps(group * per_head) {}
};

// What a thread adds to dQ in memory for those that compute.
struct Delivery {
    int slot;    // of all heads
    int before;  // KeyTile::kEnd: nothing will follow
};
template <int D>
QEMB_DEVICE Delivery& delivery() {
    return *reinterpret_cast<Delivery*>(shared_bytes() + Layout<D>::kDelivery);
}
template <int D>
QEMB_DEVICE void deliver(const Scratch& scratch, uint32_t shared, Ring<1> sums) {
    using L = Layout<D>;
    while (true) {
        sums.wait_full();
        const Delivery now = delivery<D>();
        if (now.before == KeyTile::kEnd) return;
        float* const to = scratch.sums + now.slot * int64_t(kQueryStep * D);
        if (now.before > 0) {
            wait_for(scratch.added + now.slot, now.before);
            bulk_add(to, shared + L::kSums, L::kSumBytes);
        } else {
            bulk_store(to, shared + L::kSums, L::kSumBytes);
        }
        bulk_commit();
        bulk_wait_read<0>();
        sums.release(true);
        bulk_wait<0>();
        publish(scratch.added + now.slot, now.before + 1);
    }
}

template <int D>
QEMB_DEVICE void produce_queries(const AttentionBackward& p, const TensorMap& q, const TensorMap& k, const TensorMap& v,
                                 const TensorMap& dout, const TensorMap& rows, uint32_t shared, int* ticket,
                                 Ring<1> keys, Ring<Layout<D>::kStages> ring) {
    using L = Layout<D>;
    const auto next = [&] { return next_ticket(ticket); };
    announce_tiles(p, message<KeyTile, L>(), keys, next(), next, [&](const KeyTile& tile) {
        mbarrier_expect(keys.full(), 2 * kTileBytes<kTile, D>);
        load_tile<kTile, D>(shared + L::kK, k, keys.full(), tile.kv_head, tile.span.k + tile.first);
        load_tile<kTile, D>(shared + L::kV, v, keys.full(), tile.kv_head, tile.span.k + tile.first);
#pragma unroll 1  // it has 24 registers
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

// delta of a step's queries, where all keys are here: the sum of weight * dP over them, so that out need not be read.
// Eight warps have 16 keys each.
template <int D>
QEMB_DEVICE void sum_delta(const float (&weights)[kQueryStep / 2], const float (&dp)[kQueryStep / 2], float* delta) {
    float* const parts = reinterpret_cast<float*>(shared_bytes() + Layout<D>::kParts);  // [warps, queries]
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

// dS^T of a step to shared memory, where both warpgroups multiply it. A barrier must follow.
QEMB_DEVICE void share_ds(const uint32_t (&ds)[kQueryStep / 16][4], uint32_t to) {
    const int lane = threadIdx.x % 32;
    const uint32_t row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int k = 0; k < kQueryStep / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            shared_store4(to + (row + i % 2 * 8) * 128 + ((2 * k + i / 2) ^ row % 8) * 16 + lane % 4 * 4, ds[k][i]);
    fence_async();
}

// Issues the products of dQ, of a step's queries and these keys: each warpgroup computes 64 columns. With head_dim 64
// both compute the same columns and one stores them: where warpgroups diverge, ptxas serializes every product.
template <class T, int D>
QEMB_DEVICE void multiply_ds(float (&dq)[8][4], uint32_t ds, uint32_t keys) {
    const int panel = min(static_cast<int>(threadIdx.x / 128), D / 64 - 1);
    const uint64_t left = matrix(ds), right = matrix(keys + panel * kPanelBytes<kTile>);
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k)
        wgmma<T, 64, Major::kMN, Major::kMN>(reinterpret_cast<float (&)[32]>(dq), moved(left, k * 2048),
                                             moved(right, k * 2048), k > 0);
}

// dQ of a step to memory, or to the thread that adds it there. `staging`: 16 rows of shared memory for this warp.
template <class T, int D>
QEMB_DEVICE void write_dq(const AttentionBackward& p, const Scratch& scratch, const KeyTile& tile, int step,
                          float (&dq)[8][4], uint32_t staging, Ring<1>& sums) {
    using L = Layout<D>;
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int panel = min(group, D / 64 - 1);
    const int before = tile.before(step, p.causal), thread = panel * 128 + threadIdx.x % 128, first = tile.query(step);
    const int slot = tile.head(step) * static_cast<int>(scratch.slots) + tile.slot + first / kQueryStep;
    if (tile.first > 0) {
        sums.wait_empty();
        float* const to = reinterpret_cast<float*>(shared_bytes() + L::kSums);
        if (group < D / 64)
#pragma unroll
            for (int i = 0; i < 8; ++i) store<4>(to + (i * 2 * D + thread) * 4, dq[i]);
        if (threadIdx.x == 0) delivery<D>() = {slot, before};
        fence_async();
        sync_warp();
        if (lane == 0) mbarrier_arrive(sums.full());
        sums.next();
        return;
    }
    if (before > 0) {
        wait_for(scratch.added + slot, before);
        const float* const so_far = scratch.sums + slot * int64_t(kQueryStep * D);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const auto others = load<4>(so_far + (i * 2 * D + thread) * 4);
#pragma unroll
            for (int j = 0; j < 4; ++j) dq[i][j] += others[j];
        }
    }
    const float factor = scale_of(p);
    store_rows<T, 64>(static_cast<T*>(p.dq) +
                          ((int64_t(tile.span.q) + first + warp * 16) * p.num_heads + tile.head(step)) * D + group * 64,
                      p.num_heads * D, group < D / 64 ? tile.span.num_q - first - warp * 16 : 0, dq, factor, factor,
                      staging, lane);
}

template <class T, int D>
QEMB_DEVICE void sum_key_gradients(const AttentionBackward& p, const Scratch& scratch, uint32_t shared, Ring<1> keys,
                                   Ring<Layout<D>::kStages> ring, Ring<1> sums) {
    using L = Layout<D>;
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const bool signals = threadIdx.x % 128 == 0;
    const int my_first = group * 64 + warp * 16;
    const float scale = scale_of(p) * kLog2E;
    const auto query_of = [&](int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; };  // of a score, in its step
    const auto ds_of = [&](int step) { return shared + L::kDs + step % 2 * kDsBytes; };
    const uint32_t my_k = shared + L::kK + group * 64 * 128, my_v = shared + L::kV + group * 64 * 128;
    while (true) {
        keys.wait_full();
        const KeyTile& tile = message<KeyTile, L>();  // registers are scarce
        if (tile.steps == KeyTile::kEnd) break;
        const int key = tile.first + my_first + lane / 4;
        float dk[D / 2], dv[D / 2], s[kQueryStep / 2], dp[kQueryStep / 2];
        uint32_t weights[kQueryStep / 16][4], ds[kQueryStep / 16][4];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;

        if (tile.count < kTile) {  // dQ sums over them
            clear_rows<kTile, D>(shared + L::kK, tile.count);
            barrier_sync(kTailBarrier, kConsumers);
        }
        // dQ runs one step late, together with the scores: the tensor cores wait neither until dS is stored nor until
        // dQ is written. The first step has no dQ before it, which is a type because ptxas serializes products in a
        // branch.
        const auto take_step = [&](int step, auto is_first) {
            float dq[8][4];
            if constexpr (!is_first.value) {
                wgmma_fence();
                multiply_ds<T, D>(dq, ds_of(step - 1), shared + L::kK);
                wgmma_commit();
            }
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
            if constexpr (!is_first.value) {
                wgmma_wait<1>();
                write_dq<T, D>(p, scratch, tile, step - 1, dq, ds_of(step) + my_first * 128, sums);
                wgmma_fence();
            }
            multiply_rows<T, D, kTile, kQueryStep>(dp, my_v, stage + L::kDout);
            wgmma_commit();
            wgmma_wait<1>();

            // Weights, queries along the columns
            const auto* lse = reinterpret_cast<const float*>(shared_bytes() + offset + L::kLse);
            auto* delta = reinterpret_cast<float*>(shared_bytes() + offset + L::kDelta);
            // Keys that the first query sees under the mask, if it is causal.
            const int sees = p.causal ? tile.span.num_k - tile.span.num_q + 1 + first_query : tile.span.num_k;
            const bool masked = left < kQueryStep || tile.count < kTile || sees < tile.first + group * 64 + 64;
#pragma unroll
            for (int i = 0; i < kQueryStep / 2; ++i) s[i] = exp2_approx(fmaf(s[i], scale, -lse[query_of(i)]));
            if (masked)
#pragma unroll
                for (int i = 0; i < kQueryStep / 2; ++i) {
                    const int row = key + i / 2 % 2 * 8;
                    const bool seen = (query_of(i) < left) & (row < tile.span.num_k) & (row < sees + query_of(i));
                    if (!seen) s[i] = 0;
                }
            as_left<T, kQueryStep>(s, weights);
            wgmma_fence();
            multiply_columns<T, D, kQueryStep>(dv, weights, stage + L::kDout);
            wgmma_commit();
            wgmma_wait<1>();
            if (tile.has_all_keys()) sum_delta<D>(s, dp, delta);
#pragma unroll
            for (int i = 0; i < kQueryStep / 2; ++i) dp[i] = weighted(s[i], dp[i] - delta[query_of(i)]);
            as_left<T, kQueryStep>(dp, ds);
            wgmma_fence();
            multiply_columns<T, D, kQueryStep>(dk, ds, stage + L::kQ);
            wgmma_commit();
            share_ds(ds, ds_of(step));
            barrier_sync(kSharedDsBarrier, kConsumers);  // dS is complete, the one before is read
            wgmma_wait<0>();
            ring.release(signals);
        };
        if (tile.steps > 0) {
            take_step(0, std::true_type{});
            for (int step = 1; step < tile.steps; ++step) take_step(step, std::false_type{});
            wgmma_fence();
            float dq[8][4];
            multiply_ds<T, D>(dq, ds_of(tile.steps - 1), shared + L::kK);
            wgmma_commit();
            wgmma_wait<0>();
            write_dq<T, D>(p, scratch, tile, tile.steps - 1, dq, ds_of(tile.steps) + my_first * 128, sums);
        }
        barrier_sync(kEndBarrier, kConsumers);  // nobody reads K and V any more: they are the staging
        const int64_t to = ((tile.span.k + tile.first + my_first) * p.num_kv_heads + tile.kv_head) * D;
        const float factor = scale_of(p);
        store_rows<T, D>(static_cast<T*>(p.dk) + to, p.num_kv_heads * D, tile.count - my_first,
                         reinterpret_cast<const float (&)[D / 8][4]>(dk), factor, factor,
                         shared + L::kK + my_first * D * 2, lane);
        store_rows<T, D>(static_cast<T*>(p.dv) + to, p.num_kv_heads * D, tile.count - my_first,
                         reinterpret_cast<const float (&)[D / 8][4]>(dv), 1, 1, shared + L::kV + my_first * D * 2,
                         lane);
        fence_async();  // before the copy engine writes there
        keys.release(lane == 0);
    }
    sums.wait_empty();
    if (threadIdx.x == 0) delivery<D>().before = KeyTile::kEnd;
    sync_warp();
    if (lane == 0) mbarrier_arrive(sums.full());
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    gradients(const AttentionBackward p, const Scratch scratch, const QEMB_GRID_CONSTANT TensorMap q,
              const QEMB_GRID_CONSTANT TensorMap k, const QEMB_GRID_CONSTANT TensorMap v,
              const QEMB_GRID_CONSTANT TensorMap dout, const QEMB_GRID_CONSTANT TensorMap rows) {
    using L = Layout<D>;
    const uint32_t shared = shared_address(shared_bytes());
    const Ring<1> keys{shared + L::kBarriers}, sums{keys.barriers + Ring<1>::kBytes};
    const Ring<L::kStages> ring{sums.barriers + Ring<1>::kBytes};
    by_role(
        [&] {
            keys.init(kConsumers / 32);
            sums.init(1, kConsumers / 32);
            ring.init(2);
        },
        [&] { produce_queries<D>(p, q, k, v, dout, rows, shared, scratch.ticket, keys, ring); },
        [&] { sum_key_gradients<T, D>(p, scratch, shared, keys, ring, sums); },
        [&] { deliver<D>(scratch, shared, sums); });
}

}  // namespace

int64_t attention_backward_scratch(const AttentionBackward& p) { return Scratch(p).bytes; }

bool attention_backward(const AttentionBackward& p) {
    if (p.num_tokens == 0 || p.num_keys == 0) return false;
    bool taken = false;
    visit_types(p, [&]<class T, int D>() {
        const int64_t tokens = p.num_tokens, keys = p.num_keys, heads = p.num_heads;
        const Scratch scratch(p);
        TensorMap q, k, v, dout, rows;
        const bool fits =
            make_token_map<T, D, kQueryStep>(q, p.q, tokens, heads, p.q_token_stride, p.q_head_stride) &&
            make_token_map<T, D, kTile>(k, p.k, keys, p.num_kv_heads, p.k_token_stride, p.k_head_stride) &&
            make_token_map<T, D, kTile>(v, p.v, keys, p.num_kv_heads, p.v_token_stride, p.v_head_stride) &&
            make_token_map<T, D, kQueryStep>(dout, p.dout, tokens, heads, heads * D, D) &&
            make_tensor_map<float>(rows, {.base = scratch.rows,
                                          .rank = 2,
                                          .size = {scratch.row_tokens, 2 * heads},
                                          .byte_stride = {0, scratch.row_tokens * 4},
                                          .box = {kQueryStep, 1},
                                          .swizzled = false});
        if (!fits) return;
        zero(kOp, scratch.ticket, static_cast<size_t>(scratch.flag_bytes()), p.stream);
        launch(kOp, prepare<T, D>, dim3(static_cast<unsigned>(ceil_div(tokens, kPreparedTokens))), 256, 0, p.stream, p,
               scratch);
        launch(kOp, gradients<T, D>, resident_blocks(p.plan.key_blocks * p.num_kv_heads), kThreads, Layout<D>::kBytes,
               p.stream, p, scratch, q, k, v, dout, rows);
        taken = true;
    });
    return taken;
}

}  // namespace qemb::cuda::sm90
