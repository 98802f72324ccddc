// What happens to the scores of a tile while they are in registers: masks, weights and their sums, for 128 columns at a
// time. A row's scores lie in four neighbouring lanes, so that nothing is shared between warps but the tile's
// description.
#pragma once

#include "cuda/device/reduce.h"
#include "cuda/info_nce/scores.h"
#include "cuda/sm90/tile_product.h"

namespace qemb::cuda::sm90 {

using namespace info_nce_kernels;

constexpr int kStagedBytes = kTile * kTile * 2;

struct ScoreMemory {
    Masks masks[2];  // of the halves of a tile
    Tally tally[2][kConsumers / 32];
    // By layer, half and row: which of a thread's query-document scores exceed the limit, as in Part.
    uint32_t over[1][2][2][kConsumers];
};

// A thread's 2 x 32 scores of a tile, and what is known of them: of column (n, j) bit 2 n + j. Those of a prefix are
// scaled as they are read, and stay as they are: the next layer is added to them.
template <bool kPrefixes>
struct Part {
    HalfSums& sums;
    const Masks& masks;
    uint32_t second = 0;                          // columns of the second group
    uint32_t candidates[2] = {}, masked[2] = {};  // by row; masked: by other things than the score's own limit
    uint32_t dropped[2] = {};                     // by row, of prefixes: no candidate, or masked

    QEMB_DEVICE float score(int i, int n, int j) const {
        const float sum = sums[4 * n + 2 * i + j];
        return kPrefixes ? sum * (masks.row_norm[first_row() + 8 * i] * masks.column_norm[pair_column(n) + j]) : sum;
    }
    QEMB_DEVICE void drop(int i, int n, int j) {
        if (kPrefixes)
            dropped[i] |= bit(n, j);
        else
            sums[4 * n + 2 * i + j] = kNone;
    }
    QEMB_DEVICE float kept_score(int i, int n, int j) const {
        return kPrefixes && (dropped[i] & bit(n, j)) ? kNone : score(i, n, j);
    }
    static QEMB_DEVICE uint32_t bit(int n, int j) { return 1u << (2 * n + j); }
};

// Who is a candidate, and who has the positive's text.
template <bool kPrefixes>
QEMB_DEVICE void look_up(const Masks& masks, int rows, Part<kPrefixes>& part) {
    int self[2];
    int64_t text[2];
    uint32_t is_row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row() + 8 * i;
        self[i] = masks.self[row];
        text[i] = masks.row_text[row];
        is_row[i] = row < rows;
    }
#pragma unroll 1
    for (int at = 0; at < kTile / 4; ++at) {
        const int column = pair_column(at / 2) + at % 2, owner = masks.owner[column];
        const uint32_t group = masks.group[column], on = group & kOn;
        const int64_t column_text = masks.column_text[column];
        part.second |= (group / kSecond & 1) << at;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t other = column != self[i] && owner != first_row() + 8 * i;
            part.candidates[i] |= (on & is_row[i] & other) << at;
            part.masked[i] |= static_cast<uint32_t>(column_text == text[i]) << at;
        }
    }
}

// Does a score of this warp exceed its row's limit, or is `any` true for one of its lanes?
template <bool kPrefixes>
QEMB_DEVICE bool any_exceeds(const Part<kPrefixes>& part, const float (&limits)[kTile], bool any) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float limit = limits[first_row() + 8 * i];
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) any |= part.score(i, n, j) > limit;
    }
    return any_lane(any);
}

// All scores are candidates and none is masked: the sum and the maxima of mask_scores, to the bit, by a fifth of its
// instructions. The scale is positive, so the largest score gives the largest logit.
template <bool kPrefixes>
QEMB_DEVICE void keep_scores(Kind kind, const Part<kPrefixes>& part, float high, bool counts, Tally& tally,
                             float (&best)[2]) {
    float kept_score = 0;
    best[0] = best[1] = -INFINITY;
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float score = part.score(i, n, j);
                kept_score += score;
                best[i] = fmaxf(best[i], score);
            }
#pragma unroll
    for (int i = 0; i < 2; ++i) best[i] = lanes_max<4>(best[i]) * high;
    if (counts) count_tile(kind, kept_score, kTile / 2, 0, tally);
}

// Masks the scores; -> the largest logit of each of the two rows. kPlain: the limit alone decides, the same for all
// columns.
template <bool kPlain, bool kPrefixes>
QEMB_DEVICE void mask_scores(Kind kind, Part<kPrefixes>& part, const Masks& masks, const float (&high)[2], bool counts,
                             Tally& tally, float (&best)[2]) {
    float kept_score = 0;
    int num_kept = 0, num_dropped = 0;
    float limit[2][2];  // by row and group
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        for (int group = 0; group < 2; ++group) limit[i][group] = masks.limit[group][first_row() + 8 * i];
        best[i] = kNone;
    }
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t bit = Part<kPrefixes>::bit(n, j);
            const bool is_second = !kPlain && (part.second & bit);
            const float high_here = is_second ? high[1] : high[0];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float score = part.score(i, n, j);
                const bool candidate = kPlain || (part.candidates[i] & bit);
                const bool masked = (part.masked[i] & bit) || score > (is_second ? limit[i][1] : limit[i][0]);
                num_dropped += candidate && masked;
                if (candidate && !masked) {
                    ++num_kept;
                    kept_score += score;
                    best[i] = fmaxf(best[i], score * high_here);
                } else {
                    part.drop(i, n, j);
                }
            }
        }
#pragma unroll
    for (int i = 0; i < 2; ++i) best[i] = lanes_max<4>(best[i]);
    if (counts) count_tile(kind, kept_score, num_kept, num_dropped, tally);
}

// The weights of the scores into the staging; their sums. kAll: every score is kept, and of the first group.
template <bool kAll, class T, bool kPrefixes>
QEMB_DEVICE void weigh(const Part<kPrefixes>& part, const float (&best)[2], const float (&high)[2],
                       const float (&low)[2], uint32_t staging, float (&offset)[2], float (&sum)[2],
                       float (&weighted_score_sum)[2]) {
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        offset[i] = best[i] > kNone ? ceilf(best[i]) : -INFINITY;
        shift[i] = best[i] > kNone ? -offset[i] : 0.0f;
    }
    const uint32_t at_row = staging + first_row() * 128 + threadIdx.x % 4 * 4, key = first_row() % 8;
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
        float weight[2][2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // both rows of a column: what is chosen by column is not kept
            const bool is_second = !kAll && (part.second & Part<kPrefixes>::bit(n, j));
            const float high_here = is_second ? high[1] : high[0], low_here = is_second ? low[1] : low[0];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float score = kAll ? part.score(i, n, j) : part.kept_score(i, n, j);
                weight[i][j] = exp2_approx(fmaf(score, low_here, fmaf(score, high_here, shift[i])));
                sum[i] += weight[i][j];
                weighted_score_sum[i] = fmaf(weight[i][j], score, weighted_score_sum[i]);
            }
        }
        const uint32_t to = at_row + n / 8 * (kStagedBytes / 2) + ((n % 8 ^ key) << 4);
        shared_store4(to, pack<T>(weight[0][0], weight[0][1]));
        shared_store4(to + 8 * 128, pack<T>(weight[1][0], weight[1][1]));
    }
}

// One half of the tile: 128 rows, and columns of the kind from column_tile on. `plain`: limits alone decide. `staging`:
// where its weights are laid for the copy engine. With two of them, the copy before the last has been waited for when
// the last was issued; with one, the thread that signals waits here.
template <bool kPrefixes, class T>
QEMB_DEVICE void finish_half(const Panel<T>& a, Kind kind, int layer, int row0, int column_tile, bool plain,
                             HalfSums& sums, int half, ScoreMemory& memory, uint32_t staging,
                             const TensorMap& weights) {
    row0 = opaque(row0);
    const int rows = static_cast<int>(min(a.count - row0, int64_t{kTile})), group = threadIdx.x / 128;
    const bool signals = threadIdx.x % 128 == 0;
    const Masks& masks = memory.masks[half];
    Part<kPrefixes> part{sums, masks};
    if (!plain) look_up(masks, rows, part);
    if (kind == kQueryDocument && a.by_query) {  // what masks p . d later
        uint32_t bits[2] = {};
        if (!plain || any_exceeds(part, masks.by_query[0], false)) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = first_row() + 8 * i;
                const float limit[2] = {masks.by_query[0][row], masks.by_query[1][row]};
#pragma unroll
                for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const uint32_t bit = Part<kPrefixes>::bit(n, j);
                        if (part.score(i, n, j) > (part.second & bit ? limit[1] : limit[0])) bits[i] |= bit;
                    }
            }
        }
        for (int i = 0; i < 2; ++i) memory.over[layer][half][i][threadIdx.x] = bits[i];
    } else if (kind == kDocDoc && a.by_query) {
        for (int i = 0; i < 2; ++i) part.masked[i] |= memory.over[layer][half][i][threadIdx.x];
    }
    const int first_here = group_of(kind, Role::kPositive), second_here = group_of(kind, Role::kHard);
    const float high[2] = {a.scale_high[first_here], a.scale_high[second_here]};
    Tally& tally = memory.tally[half][threadIdx.x / 32];
    const bool counts = !kPrefixes || layer + 1 == a.layers;
    float best[2];
    const bool keeps_all = plain && !any_exceeds(part, masks.limit[0], part.masked[0] | part.masked[1]);
    if (keeps_all)
        keep_scores(kind, part, high[0], counts, tally, best);
    else if (plain)
        mask_scores<true>(kind, part, masks, high, counts, tally, best);
    else
        mask_scores<false>(kind, part, masks, high, counts, tally, best);
    if (!a.dense[kind]) return;

    const float low[2] = {a.scale_low[first_here], a.scale_low[second_here]};
    if (kPrefixes && a.p.d_documents) {
        if (signals) bulk_wait_read<0>();
        barrier_sync(kGroupBarrier + group, 128);
    }
    float offset[2], sum[2] = {}, weighted_score_sum[2] = {};
    if (keeps_all)
        weigh<true, T>(part, best, high, low, staging, offset, sum, weighted_score_sum);
    else
        weigh<false, T>(part, best, high, low, staging, offset, sum, weighted_score_sum);
    const int64_t tile = a.tile_of(layer, kind, column_tile);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sum[i] = lanes_sum<4>(sum[i]);
        weighted_score_sum[i] = lanes_sum<4>(weighted_score_sum[i]);
        if (threadIdx.x % 4 > 0) continue;
        const int64_t at = tile * a.rows + row0 + first_row() + 8 * i;
        a.tile_offset[at] = offset[i];
        a.tile_sum[at] = sum[i];
        a.tile_weighted_score_sum[at] = weighted_score_sum[i];
    }

    // Write the tile, each warpgroup its 64 rows
    if (!a.p.d_documents) return;
    fence_async();
    if (!kPrefixes && signals) bulk_wait_read<0>();  // the next weights go where the last ones were
    barrier_sync(kGroupBarrier + group, 128);
    if (!signals) return;
#pragma unroll
    for (int panel = 0; panel < 2; ++panel)
        tma_store(weights, staging + panel * (kStagedBytes / 2) + group * 64 * 128,
                  {static_cast<int>(tile) * kTile + panel * 64, row0 + group * 64});
    bulk_commit();
}

}  // namespace qemb::cuda::sm90
