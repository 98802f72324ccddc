// The work plan of a batch: the same serial walk on the host and, where only the device knows the lengths, by one
// thread there.
#include <vector>

#include "cuda/architecture.h"
#include "ops/attention.h"

#ifdef __CUDACC__
#define QEMB_HOST_DEVICE __host__ __device__
#else
#define QEMB_HOST_DEVICE
#endif

namespace qemb {
namespace {

constexpr int kTile = AttentionPlan::kTile, kSlot = AttentionPlan::kSlot, kMostSlots = kTile / kSlot;
constexpr int kMaxPerTile = 32;  // sequences: a warp maps a tile with one lane for each
constexpr int kBuckets = 64;     // of length, for longest first

// Which sequences share tiles, and what a tile holds.
struct ShortLimits {
    int32_t tokens;  // of a short sequence, on either side, at most
    int32_t slots;   // of a tile
};

struct Counts {
    int64_t tiles, blocks, key_blocks, summed;
    bool single;
};

// The last value of a plan.
QEMB_HOST_DEVICE inline int32_t& is_wrong(const AttentionPlan& plan, int32_t* data) {
    return data[4 + 2 * (plan.tiles + plan.blocks) + 3 * plan.key_blocks];
}

QEMB_HOST_DEVICE inline int32_t parts(int32_t length, int32_t size) { return (length + size - 1) / size; }

// Where `data` is null, only counts. `buckets`: 2 * kBuckets values of working memory.
QEMB_HOST_DEVICE inline Counts walk(const int32_t* cu_q, const int32_t* cu_k, int64_t num_seqs,
                                    const AttentionPlan& plan, ShortLimits limits, int32_t* data, int32_t* buckets) {
    int32_t* const tiles = data + 4;
    int32_t* const blocks = tiles + 2 * plan.tiles;
    int32_t* const key_blocks = blocks + 2 * plan.blocks;
    Counts counts{0, 0, 0, 0, true};
    for (int i = 0; i < 2 * kBuckets; ++i) buckets[i] = 0;

    int64_t first = -1;  // of the open tile
    int32_t q_slots = 0, k_slots = 0;
    const auto close = [&](int64_t end) {
        if (first < 0) return;
        if (data) {
            tiles[2 * counts.tiles] = static_cast<int32_t>(first);
            tiles[2 * counts.tiles + 1] = static_cast<int32_t>(end - first);
        }
        ++counts.tiles;
        first = -1;
    };
    const auto bucket_of = [](int32_t q, int32_t k) {
        const int32_t size = parts(q > k ? q : k, kTile);
        return kBuckets - 1 - (size < kBuckets ? size : kBuckets - 1);
    };
    for (int64_t s = 0; s < num_seqs; ++s) {
        const int32_t q = cu_q[s + 1] - cu_q[s], k = cu_k[s + 1] - cu_k[s];
        if (q > 1) counts.single = false;
        if (q <= 0 && k <= 0) continue;
        if (q > limits.tokens || k > limits.tokens) {
            const int bucket = bucket_of(q, k);
            buckets[bucket] += parts(q, kTile);
            buckets[kBuckets + bucket] += parts(k, kTile);
            counts.blocks += parts(q, kTile);
            counts.key_blocks += parts(k, kTile);
            if (k > kTile) counts.summed += parts(q, kTile);
            continue;
        }
        const int32_t more_q = parts(q, kSlot), more_k = parts(k, kSlot);
        if (first >= 0 &&
            (q_slots + more_q > limits.slots || k_slots + more_k > limits.slots || s - first >= kMaxPerTile))
            close(s);
        if (first < 0) {
            first = s;
            q_slots = k_slots = 0;
        }
        q_slots += more_q;
        k_slots += more_k;
    }
    close(num_seqs < first + kMaxPerTile ? num_seqs : first + kMaxPerTile);
    if (!data) return counts;

    int32_t next_q = 0, next_k = 0, summed = 0;
    for (int i = 0; i < kBuckets; ++i) {
        const int32_t q = buckets[i], k = buckets[kBuckets + i];
        buckets[i] = next_q;
        buckets[kBuckets + i] = next_k;
        next_q += q;
        next_k += k;
    }
    for (int64_t s = 0; s < num_seqs; ++s) {
        const int32_t q = cu_q[s + 1] - cu_q[s], k = cu_k[s + 1] - cu_k[s];
        if (q <= limits.tokens && k <= limits.tokens) continue;
        const int bucket = bucket_of(q, k);
        for (int32_t b = parts(q, kTile); b-- > 0;) {  // a causal mask leaves most to the last queries
            int32_t* item = blocks + 2 * buckets[bucket]++;
            item[0] = static_cast<int32_t>(s);
            item[1] = b;
        }
        for (int32_t b = 0; b < parts(k, kTile); ++b) {
            int32_t* item = key_blocks + 3 * buckets[kBuckets + bucket]++;
            item[0] = static_cast<int32_t>(s);
            item[1] = b;
            item[2] = summed;
        }
        if (k > kTile) summed += parts(q, kTile);
    }
    data[0] = static_cast<int32_t>(counts.tiles);
    data[1] = static_cast<int32_t>(counts.blocks);
    data[2] = static_cast<int32_t>(counts.key_blocks);
    data[3] = limits.tokens;
    is_wrong(plan, data) = 0;
    return counts;
}

// On Hopper the kernels for blocks are ahead of the tiles from here on.
ShortLimits short_limits() {
    const int slots = cuda::has_large_shared() ? kMostSlots : kMostSlots / 2;
    return {cuda::on_hopper() ? kTile / 4 : slots * kSlot, slots};
}

}  // namespace

AttentionPlan size_plan(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int64_t num_seqs) {
    int32_t buckets[2 * kBuckets];
    const Counts counts = walk(cu_seqlens_q, cu_seqlens_k, num_seqs, {}, short_limits(), nullptr, buckets);
    return {nullptr, counts.tiles, counts.blocks, counts.key_blocks, counts.summed, counts.single};
}

void fill_plan(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int64_t num_seqs, const AttentionPlan& plan,
               int32_t* data) {
    int32_t buckets[2 * kBuckets];
    walk(cu_seqlens_q, cu_seqlens_k, num_seqs, plan, short_limits(), data, buckets);
}

namespace cuda {
namespace {

// Whether the lengths were right as given.
QEMB_DEVICE bool check_lengths(const DeviceLengths& lengths, int64_t num_seqs) {
    bool right = lengths.given[0] == 0;
    int64_t last = lengths.checked[0] = 0;
    for (int64_t s = 1; s <= num_seqs; ++s) {
        const int64_t end = lengths.given[s];
        const int64_t bounded = s == num_seqs ? lengths.tokens : min(max(end, last), lengths.tokens);
        right = right && end == bounded;
        lengths.checked[s] = static_cast<int32_t>(last = bounded);
    }
    return right;
}

__global__ void fill_plan_kernel(DeviceLengths q, DeviceLengths k, int64_t num_seqs, AttentionPlan plan,
                                 ShortLimits limits, int32_t* data) {
    if (threadIdx.x > 0) return;
    const bool q_right = check_lengths(q, num_seqs), k_right = check_lengths(k, num_seqs);
    walk(q.checked, k.checked, num_seqs, plan, limits, data, reinterpret_cast<int32_t*>(shared_bytes()));
    is_wrong(plan, data) = !q_right || !k_right;
}

}  // namespace

AttentionPlan largest_plan(int64_t num_seqs, int64_t tokens_q, int64_t tokens_k) {
    const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    const ShortLimits limits = short_limits();
    const int64_t slots = (tokens_q + tokens_k) / kSlot + 2 * num_seqs;
    const int64_t long_seqs = least(num_seqs, (tokens_q + tokens_k) / limits.tokens);
    AttentionPlan plan;
    // Two neighbouring tiles hold more than limits.slots slots of one kind, or one of them as many sequences as it
    // may.
    plan.tiles = least(num_seqs, 2 * slots / limits.slots + num_seqs / kMaxPerTile + 2);
    plan.blocks = tokens_q / kTile + long_seqs;
    plan.key_blocks = tokens_k / kTile + long_seqs;
    const int64_t many_keys = least(num_seqs, tokens_k / (kTile + 1));  // sequences
    plan.summed = many_keys > 0 ? tokens_q / kTile + many_keys : 0;
    return plan;
}

void fill_plan(const DeviceLengths& q, const DeviceLengths& k, int64_t num_seqs, const AttentionPlan& plan,
               int32_t* data, void* stream) {
    launch("attention_plan", fill_plan_kernel, dim3(1), 32, 2 * kBuckets * sizeof(int32_t), stream, q, k, num_seqs,
           plan, short_limits(), data);
}

}  // namespace cuda
}  // namespace qemb
