// What happens to the scores of a tile while they are in registers: masks, weights and their sums, for 128 columns at a time. A row's
// scores lie in four neighbouring lanes, so that nothing is shared between warps but the tile's description.
#pragma once

#include "cuda/device/reduce.h"
#include "cuda/infonce_scores.h"
#include "cuda/sm90/tile_product.h"

namespace qemb::cuda::sm90 {

using namespace infonce;

constexpr uint32_t kMasksBarrier = 1, kGroupBarrier = 2;  // the latter and the next: of a warpgroup
constexpr int kStagedBytes = kTile * kTile * 2;

struct ScoreMemory {
    Masks masks;
    uint64_t over[2][kConsumers];  // by half of the columns: which of a thread's query-document scores exceed the limit, a bit each
    Tally tally[2][kConsumers / 32];
};

// A thread's 2 x 32 scores of a tile, and what its columns are.
struct Part {
    Sums& sums;
    int half;
    uint32_t on = 0, second = 0;  // of column (n, j): bit 2 n + j

    QEMB_DEVICE float& operator()(int i, int n, int j) const { return sums[64 * half + 4 * n + 2 * i + j]; }
    static QEMB_DEVICE int bit(int n, int j) { return 2 * n + j; }
};

// Masks the scores; -> the largest logit of each of the two rows. kPlain: the limit alone decides, the same for all columns.
template <class T, bool kPlain>
QEMB_DEVICE void mask_scores(const Panel<T>& a, Kind kind, int rows, const Part& part, const ScoreMemory& memory, const float (&high)[2],
                             uint64_t over, Tally& tally, float (&best)[2]) {
    const Masks& masks = memory.masks;
    float kept_score = 0;
    int num_kept = 0, num_dropped = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row() + 8 * i, self = masks.self[row];
        const float limit[2] = {masks.limit[0][row], masks.limit[1][row]};
        const int64_t text = masks.row_text[row];
        const auto over_here = static_cast<uint32_t>(over >> 32 * i);
        best[i] = kNone;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int column = pair_column(n) + j;
                const uint32_t bit = 1u << Part::bit(n, j);
                const bool is_second = !kPlain && (part.second & bit);
                float& score = part(i, n, j);
                const bool candidate =
                    row < rows && (kPlain || ((part.on & bit) && column != self && masks.owner[column] != row));
                const bool masked = (over_here & bit) || score > (is_second ? limit[1] : limit[0]) ||
                                    (!kPlain && masks.column_text[column] == text);
                num_dropped += candidate && masked;
                if (candidate && !masked) {
                    ++num_kept;
                    kept_score += score;
                    best[i] = fmaxf(best[i], score * (is_second ? high[1] : high[0]));
                } else {
                    score = kNone;
                }
            }
        best[i] = lanes_max<4>(best[i]);
    }
    const double score = warp_sum(static_cast<double>(kept_score));
    num_kept = warp_sum(num_kept);
    num_dropped = warp_sum(num_dropped);
    if (threadIdx.x % 32 != 0) return;
    if (kind == kQueryDocument) tally.kept_score = score, tally.kept_query_document = num_kept;
    tally.kept += num_kept;
    tally.dropped += num_dropped;
}

// One half of the tile: 128 rows, and columns of the kind from column_tile on. `staging`: where its weights are laid for the copy
// engine, whose last copy from there has been waited for by the thread that signals.
template <class T>
QEMB_DEVICE void finish_half(const Panel<T>& a, Kind kind, int64_t row0, int64_t column_tile, Sums& sums, int half, ScoreMemory& memory,
                             uint32_t staging, const TensorMap& weights) {
    const int rows = static_cast<int>(min(a.count - row0, int64_t(kTile))), group = threadIdx.x / 128;
    const bool by_query = a.by_query;
    Masks& masks = memory.masks;
    barrier_sync(kMasksBarrier, kConsumers);  // nobody reads the masks of the tile before
    load_masks(a, kind, row0, column_tile * kTile, masks);
    barrier_sync(kMasksBarrier, kConsumers);

    Part part{sums, half};
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t what = masks.group[pair_column(n) + j];
            part.on |= (what & kOn) << Part::bit(n, j);
            part.second |= (what / kSecond & 1) << Part::bit(n, j);
        }
    uint64_t& over = memory.over[half][threadIdx.x];
    if (kind == kQueryDocument && by_query) {  // what masks p . d later
        uint64_t bits = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row() + 8 * i;
            const float limit[2] = {masks.by_query[0][row], masks.by_query[1][row]};
#pragma unroll
            for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const bool is_second = part.second >> Part::bit(n, j) & 1;
                    bits |= static_cast<uint64_t>(part(i, n, j) > (is_second ? limit[1] : limit[0])) << (32 * i + Part::bit(n, j));
                }
        }
        over = bits;
    }
    const double scale[2] = {a.scale[first_group(kind)], a.scale[first_group(kind) + (kind != kQueries)]};  // of a logit, log2
    const float high[2] = {static_cast<float>(scale[0]), static_cast<float>(scale[1])};
    const uint64_t over_before = kind == kDocDoc && by_query ? over : 0;
    const int64_t tile_of_all = kind == kQueries ? a.doc_tiles + column_tile : column_tile;
    const bool plain = a.plain[tile_of_all * a.row_tiles + row0 / kTile] & 1 << kind;
    Tally& tally = memory.tally[half][threadIdx.x / 32];
    float best[2];
    if (plain)
        mask_scores<T, true>(a, kind, rows, part, memory, high, over_before, tally, best);
    else
        mask_scores<T, false>(a, kind, rows, part, memory, high, over_before, tally, best);
    if (!a.dense[kind]) return;

    // Weights. A scale in two floats: the rounding of one would count as often as the exponent is large.
    const float low[2] = {static_cast<float>(scale[0] - static_cast<double>(high[0])),
                          static_cast<float>(scale[1] - static_cast<double>(high[1]))};
    const int64_t tile = a.first_tile[kind] + column_tile;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row() + 8 * i;
        const float offset = best[i] > kNone ? ceilf(best[i]) : -INFINITY, shift = best[i] > kNone ? -offset : 0.0f;
        float sum = 0, moment = 0;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
            float weight[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float score = part(i, n, j);
                const bool is_second = part.second >> Part::bit(n, j) & 1;
                weight[j] = exp2_approx(fmaf(score, is_second ? low[1] : low[0], fmaf(score, is_second ? high[1] : high[0], shift)));
                sum += weight[j];
                moment = fmaf(weight[j], score, moment);
            }
            const uint32_t panel = staging + n / 8 * (kStagedBytes / 2);
            shared_store4(panel + row * 128 + ((n % 8 ^ row % 8) << 4) + threadIdx.x % 4 * 4, pack<T>(weight[0], weight[1]));
        }
        sum = lanes_sum<4>(sum);
        moment = lanes_sum<4>(moment);
        if (threadIdx.x % 4 == 0) {
            const int64_t at = tile * a.rows + row0 + row;
            a.tile_offset[at] = offset;
            a.tile_sum[at] = sum;
            a.tile_moment[at] = moment;
        }
    }

    // Write the tile, each warpgroup its 64 rows
    if (!a.p.d_documents) return;
    fence_async();
    barrier_sync(kGroupBarrier + group, 128);
    if (threadIdx.x % 128 > 0) return;
#pragma unroll
    for (int panel = 0; panel < 2; ++panel)
        tma_store(weights, staging + panel * (kStagedBytes / 2) + group * 64 * 128,
                  {static_cast<int>(tile * kTile) + panel * 64, static_cast<int>(row0) + group * 64});
    bulk_commit();
}

}  // namespace qemb::cuda::sm90
