// Attention forward of long sequences on Hopper. A block stays on its multiprocessor and takes tile after tile (128
// queries, one head); one thread keeps the copy engine ahead; two warpgroups of 64 queries each take turns at the
// tensor cores, so that one computes its softmax while the other multiplies, and within a warpgroup the scores of the
// next keys and the output of these are in flight together (the schedule of FlashAttention-3, Shah et al. 2024,
// sections 3.1 and 3.2).
#include "cuda/sm90/attention.h"

#include "cuda/attention_dispatch.h"
#include "cuda/sm90/attention_tile.h"

namespace qemb::cuda::sm90 {
namespace {

constexpr const char* kOp = "varlen_attention";
constexpr int kKeys = 128;  // of a step

template <int D>
struct Layout {
    static constexpr int kQ = 0, kK = kQ + kTileBytes<kTile, D>, kV = kK + 2 * kTileBytes<kKeys, D>,
                         kStaging = kV + 2 * kTileBytes<kKeys, D>, kBarriers = kStaging + kTileBytes<kTile, D>,
                         kMessage = kBarriers + Ring<1>::kBytes + 2 * Ring<2>::kBytes,
                         kBytes = kMessage + kMessageBytes;
};

// Keys from the last step to the first: the masks of the sequence's end and of causality come first, and then no more.
template <int D>
QEMB_DEVICE void produce(const AttentionForward& p, const TensorMap& q, const TensorMap& k, const TensorMap& v,
                         uint32_t shared, Ring<1> q_ring, Ring<2> k_ring, Ring<2> v_ring) {
    using L = Layout<D>;
    // After the first one, blocks take their units from a counter, as units take different times. Without scratch each
    // block has one unit.
    const auto next = [&] {
        return p.scratch ? static_cast<int>(gridDim.x) + next_ticket(static_cast<int*>(p.scratch))
                         : QueryTile::units(p);
    };
    announce_tiles(p, message<QueryTile, L>(), q_ring, blockIdx.x, next, [&](const QueryTile& tile) {
        const int halves = tile.steps > 0 ? tile.halves() : 0;
        mbarrier_expect(q_ring.full(), halves * kTileBytes<kHalf, D>);
        for (int half = 0; half < halves; ++half)
#pragma unroll
            for (int panel = 0; panel < D / 64; ++panel)
                tma_load(shared + L::kQ + panel * kPanelBytes<kTile> + half * kPanelBytes<kHalf>, q, q_ring.full(),
                         {panel * 64, tile.head_of(half), tile.span.q + tile.first + tile.first_of(half)});
        for (int step = tile.is_kept ? 0 : tile.steps; step-- > 0;) {
            const int key = tile.span.k + step * kKeys;
            k_ring.wait_empty();
            mbarrier_expect(k_ring.full(), kTileBytes<kKeys, D>);
            load_tile<kKeys, D>(shared + L::kK + k_ring.stage * kTileBytes<kKeys, D>, k, k_ring.full(), tile.kv_head,
                                key);
            k_ring.next();
            v_ring.wait_empty();
            mbarrier_expect(v_ring.full(), kTileBytes<kKeys, D>);
            load_tile<kKeys, D>(shared + L::kV + v_ring.stage * kTileBytes<kKeys, D>, v, v_ring.full(), tile.kv_head,
                                key);
            v_ring.next();
        }
    });
}

// The softmax of this thread's parts of two rows: scores become weights. -> what earlier sums are multiplied by
struct Softmax {
    float row_max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of the unscaled scores; of this thread's weights

    // Row i sees keys [0, seen[i]) of those from `key` on; only then is it masked.
    QEMB_DEVICE void update(float (&s)[kKeys / 2], float scale, bool masked, const int (&seen)[2], float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    if (masked && n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + j >= seen[i])
                        s[4 * n + 2 * i + j] = -INFINITY;
            factor[i] = online_softmax<kKeys / 4>(row_max[i], sum[i], scale,
                                                  [&](int at) -> float& { return s[at / 2 * 4 + 2 * i + at % 2]; });
        }
    }
};

template <class T, int D>
QEMB_DEVICE void consume(const AttentionForward& p, uint32_t shared, Ring<1> q_ring, Ring<2> k_ring, Ring<2> v_ring) {
    using L = Layout<D>;
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const float scale = scale_of(p) * kLog2E;
    const uint32_t my_q = shared + L::kQ + group * kPanelBytes<kHalf>,
                   staging = shared + L::kStaging + (group * kHalf + warp * 16) * D * 2;
    const auto take_turn = [&] { barrier_sync(kTurnBarrier + group, kConsumers); };
    const auto pass_turn = [&] { barrier_arrive(kTurnBarrier + (group ^ 1), kConsumers); };
    if (group == 1) pass_turn();  // the other begins

    while (true) {
        q_ring.wait_full();
        const QueryTile tile = message<QueryTile, L>();
        if (tile.steps == QueryTile::kEnd) return;
        if (tile.is_kept) {  // the same stages again
            k_ring.rewind(tile.steps);
            v_ring.rewind(tile.steps);
        }
        const bool frees = threadIdx.x % 128 == 0 && !tile.keeps;  // for both of its rings
        const int my_first = tile.first_of(group) + warp * 16, head = tile.head_of(group), count = tile.count_of(group);
        const int row = tile.first + my_first + lane / 4;
        const int all_see = visible_keys(tile.first + tile.first_of(group), tile.span.num_q, tile.span.num_k, p.causal);
        const int sees[2] = {visible_keys(row, tile.span.num_q, tile.span.num_k, p.causal),
                             visible_keys(row + 8, tile.span.num_q, tile.span.num_k, p.causal)};
        float out[D / 2], s[kKeys / 2], factor[2];
        uint32_t weights[kKeys / 16][4];
        Softmax softmax;
        const auto k_tile = [&] { return shared + L::kK + k_ring.stage * kTileBytes<kKeys, D>; };
        const auto v_tile = [&] { return shared + L::kV + v_ring.stage * kTileBytes<kKeys, D>; };
        const auto update = [&](int step) {
            const int key = step * kKeys, seen[2] = {sees[0] - key, sees[1] - key};
            softmax.update(s, scale, key + kKeys > all_see, seen, factor);
        };

#pragma unroll
        for (int i = 0; i < D / 2; ++i) out[i] = 0;
        int step = tile.steps - 1;
        if (step >= 0) {
            // The last keys
            k_ring.wait_full();
            take_turn();
            wgmma_fence();
            multiply_rows<T, D, kTile, kKeys>(s, my_q, k_tile());
            wgmma_commit();
            pass_turn();
            wgmma_wait<0>();
            k_ring.release(frees);
            update(step);
            as_left<T, kKeys>(s, weights);
            v_ring.wait_full();
            if (tile.span.num_k < tile.steps * kKeys && !tile.is_kept) {
                clear_rows<kKeys, D>(v_tile(), tile.span.num_k - step * kKeys);
                barrier_sync(kTailBarrier, kConsumers);
            }

            // The scores of these keys beside the output of those before
            while (--step >= 0) {
                k_ring.wait_full();
                take_turn();
                wgmma_fence();
                multiply_rows<T, D, kTile, kKeys>(s, my_q, k_tile());
                wgmma_commit();
                v_ring.wait_full();
                multiply_columns<T, D, kKeys>(out, weights, v_tile());
                wgmma_commit();
                pass_turn();
                wgmma_wait<1>();
                k_ring.release(frees);
                update(step);
                wgmma_wait<0>();
                v_ring.release(frees);
                as_left<T, kKeys>(s, weights);
#pragma unroll
                for (int i = 0; i < D / 2; ++i) out[i] *= factor[i / 2 % 2];
            }
            q_ring.release(lane == 0);
            v_ring.wait_full();
            wgmma_fence();
            multiply_columns<T, D, kKeys>(out, weights, v_tile());
            wgmma_commit();
            wgmma_wait<0>();
            v_ring.release(frees);
        } else {
            sync_warp();  // all of it has read the message
            q_ring.release(lane == 0);
        }

        // Write the output and lse
        const float sum[2] = {lanes_sum<4>(softmax.sum[0]), lanes_sum<4>(softmax.sum[1])};
        const int64_t token = tile.span.q + tile.first + my_first;
        store_rows<T, D>(static_cast<T*>(p.out) + (token * p.num_heads + head) * D, p.num_heads * D, count - my_first,
                         reinterpret_cast<const float (&)[D / 8][4]>(out), sum[0] > 0 ? 1 / sum[0] : 0,
                         sum[1] > 0 ? 1 / sum[1] : 0, staging, lane);
        float* lse = static_cast<float*>(p.lse) + (token + lane / 4) * p.num_heads + head;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (lane % 4 == 0 && row + 8 * i < tile.first + count)
                lse[8 * i * p.num_heads] = softmax.row_max[i] * (scale * kLn2) + logf(sum[i]);
    }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_forward(const AttentionForward p, const QEMB_GRID_CONSTANT TensorMap q,
                      const QEMB_GRID_CONSTANT TensorMap k, const QEMB_GRID_CONSTANT TensorMap v) {
    using L = Layout<D>;
    const uint32_t shared = shared_address(shared_bytes());
    const Ring<1> q_ring{shared + L::kBarriers};
    const Ring<2> k_ring{q_ring.barriers + Ring<1>::kBytes}, v_ring{k_ring.barriers + Ring<2>::kBytes};
    by_role<40>(  // the counter does not fit in 24 registers
        [&] {
            q_ring.init(kConsumers / 32);
            k_ring.init(2);
            v_ring.init(2);
        },
        [&] { produce<D>(p, q, k, v, shared, q_ring, k_ring, v_ring); },
        [&] { consume<T, D>(p, shared, q_ring, k_ring, v_ring); });
}

}  // namespace

int64_t attention_forward_scratch(const AttentionForward& p) {
    if (p.plan.single) return 0;
    return p.plan.blocks * p.num_kv_heads > multiprocessors() ? static_cast<int64_t>(sizeof(int)) : 0;
}

bool attention_forward(const AttentionForward& p) {
    if (!(p.scale > 0)) return false;  // maxima are taken before scores are scaled
    bool taken = false;
    visit_types(p, [&]<class T, int D>() {
        const int64_t tokens = p.num_tokens, keys = p.num_keys;
        TensorMap q, k, v;
        if (!make_token_map<T, D, kHalf>(q, p.q, tokens, p.num_heads, p.q_token_stride, p.q_head_stride) ||
            !make_token_map<T, D, kKeys>(k, p.k, keys, p.num_kv_heads, p.k_token_stride, p.k_head_stride) ||
            !make_token_map<T, D, kKeys>(v, p.v, keys, p.num_kv_heads, p.v_token_stride, p.v_head_stride))
            return;
        const int64_t units = p.plan.blocks * p.num_kv_heads;
        if (p.scratch) zero(kOp, p.scratch, sizeof(int), p.stream);
        launch(kOp, attention_forward<T, D>, p.scratch ? resident_blocks(units) : dim3(static_cast<unsigned>(units)),
               kThreads, Layout<D>::kBytes, p.stream, p, q, k, v);
        taken = true;
    });
    return taken;
}

}  // namespace qemb::cuda::sm90
