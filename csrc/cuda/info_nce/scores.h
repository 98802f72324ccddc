// Scores of a panel by tiles; masks, the tile's row maxima, weights and row sums while the tile is in registers.
#pragma once

#include "cuda/architecture.h"
#include "cuda/device/reduce.h"
#include "cuda/info_nce/panel.h"

namespace qemb::cuda::info_nce_kernels {

// What a tile needs to know of its rows and columns.
struct Masks {
    int64_t row_text[kTile], column_text[kTile];
    int self[kTile];           // the column that is no candidate of the row, or -1
    int owner[kTile];          // the row that owns the column, or -1
    uint32_t group[kTile];     // of the column: kOn: it has candidates; kSecond: the second of the kind's groups
    float limit[2][kTile];     // by group: the largest score that a row lets pass
    float by_query[2][kTile];  // the same of the query's score, for what is masked in p . d
    float row_norm[kTile], column_norm[kTile];  // one over them
};
// Lies where the product's stages were.
struct TileMemory : Masks {
    float offset[kTile];
    float part[3][kTile][4];  // maxima, then sums and moments, of the four warps that share a row
};
constexpr uint32_t kOn = 1, kSecond = 1 << 8;

// What outlives a product; lies behind its stages.
struct Kept {
    Tally tally[kTileThreads / 32];
    uint64_t over[kTileThreads];  // which of a thread's query-document scores exceed the limit, a bit each
};
constexpr int kScoreBytes = kProductBytes<false> + static_cast<int>(sizeof(Kept));
static_assert(kScoreBytes <= kSmallShared);

template <class T>
constexpr int kStagedRow = kTile * static_cast<int>(sizeof(T)) + 16;  // bytes; the rest spreads rows over the banks

constexpr float kNone = -3e38f;  // the score of what is no candidate: its weight is zero, and it stays finite

QEMB_DEVICE int within_tile(int64_t at) { return at >= 0 && at < kTile ? static_cast<int>(at) : -1; }

template <bool kPrefixes, class T>
QEMB_DEVICE void load_masks(const Panel<T>& a, Kind kind, int layer, int64_t row0, int64_t column0, Masks& masks) {
    const InfoNce& p = a.p;
    const int at = threadIdx.x % kTile;
    if (threadIdx.x < kTile) {
        if (row0 + at >= a.count) return;
        const int64_t query = a.query(row0 + at);
        const double s = a.positive_score[layer * a.rows + row0 + at];
        if (kPrefixes) masks.row_norm[at] = a.of_anchor(layer, kind == kDocDoc, row0 + at);
        masks.row_text[at] = p.query_text[query];
        masks.self[at] = within_tile((kind == kQueries ? query - p.first_column : p.positive[query]) - column0);
        for (int i = 0; i < 2; ++i) {
            const Role role = i ? Role::kHard : Role::kPositive;
            const Group &group = p.options.groups[group_of(kind, role)],
                        &of_positive = p.options.groups[group_of(kDocDoc, role)];
            masks.limit[i][at] =
                kind == kDocDoc && is_by_query(group) ? INFINITY : static_cast<float>(limit_of(group, s));
            masks.by_query[i][at] = is_by_query(of_positive) ? static_cast<float>(limit_of(of_positive, s)) : INFINITY;
        }
    } else {
        const int64_t column = column0 + at;
        masks.group[at] = 0;
        if (column >= (kind == kQueries ? a.queries : a.documents).rows) return;
        if (kPrefixes)
            masks.column_norm[at] =
                kind == kQueries ? a.of_query(layer, p.first_column + column) : a.of_document(layer, column);
        masks.column_text[at] = kind == kQueries ? p.query_text[p.first_column + column] : p.document_text[column];
        masks.owner[at] = kind == kQueries ? -1 : within_tile(p.owner[column] - a.query(row0));
        const Role role = kind == kQueries ? Role::kPositive : static_cast<Role>(p.role[column]);
        const bool second = role == Role::kHard,
                   on = role != Role::kAbsent && p.options.groups[group_of(kind, role)].on;
        // Which group is said of those that are off too: p . d may be masked by this score.
        masks.group[at] = (on ? kOn : 0) | (second ? kSecond : 0);
    }
}

// To the tally of this warp.
QEMB_DEVICE void count_tile(Kind kind, float kept_score, int num_kept, int num_dropped, Tally& tally) {
    const double score = warp_sum(static_cast<double>(kept_score));
    num_kept = warp_sum(num_kept);
    num_dropped = warp_sum(num_dropped);
    if (threadIdx.x % 32 != 0) return;
    if (kind == kQueryDocument) tally.kept_score = score, tally.kept_query_document = num_kept;
    tally.kept += num_kept;
    tally.dropped += num_dropped;
}

QEMB_DEVICE Tally sum_of(const Tally (&warps)[kTileThreads / 32]) {
    Tally total = warps[0];
    for (int warp = 1; warp < kTileThreads / 32; ++warp) {
        total.kept_score += warps[warp].kept_score;
        total.kept_query_document += warps[warp].kept_query_document;
        total.kept += warps[warp].kept;
        total.dropped += warps[warp].dropped;
    }
    return total;
}

// Masks; then, where the kind is dense, the weights of the tile. Of prefixes the scores stay as they are: the next
// layer is added to them.
template <bool kPrefixes, class T>
QEMB_DEVICE void finish_tile(const Panel<T>& a, Kind kind, int layer, int64_t row0, int64_t column_tile, Sums& scores) {
    TileMemory& masks = *reinterpret_cast<TileMemory*>(shared_bytes());
    Kept& kept = *reinterpret_cast<Kept*>(shared_bytes() + kProductBytes<false>);
    char* const staged = shared_bytes() + sizeof(TileMemory);
    const int rows = static_cast<int>(min(a.count - row0, int64_t(kTile)));
    const int quad_lane = threadIdx.x % 4, warp_column = threadIdx.x / 32 % 4;

    load_masks<kPrefixes>(a, kind, layer, row0, column_tile * kTile, masks);
    sync_block();

    uint32_t groups = 0;  // of the thread's columns, from the lowest bits of both on
#pragma unroll
    for (int i = 0; i < 8; ++i) groups |= masks.group[element_column(i / 2, i % 2)] << i;
    const auto score_at = [&](int m, int n, int i) {
        const float sum = scores[m][n][i];
        return kPrefixes ? sum * (masks.row_norm[element_row(m, i)] * masks.column_norm[element_column(n, i)]) : sum;
    };
    // The bits of several layers are too many for shared memory.
    const auto over_limit = [&]() -> uint64_t& {
        if (!kPrefixes) return kept.over[threadIdx.x];
        return a.over[((column_tile * a.row_tiles + row0 / kTile) * a.layers + layer) * kTileThreads + threadIdx.x];
    };
    if (kind == kQueryDocument && a.by_query) {  // what masks p . d later
        uint64_t over = 0;
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = element_row(m, i);
                const float limit[2] = {masks.by_query[0][row], masks.by_query[1][row]};
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const bool is_over =
                        score_at(m, n, i) > (groups & kSecond << (n * 2 + i % 2) ? limit[1] : limit[0]);
                    over |= static_cast<uint64_t>(is_over) << (m * 16 + n * 4 + i);
                }
            }
        over_limit() = over;
    }

    // Masks, and the largest logit of each row
    const double scale[2] = {a.logit_scale[group_of(kind, Role::kPositive)],
                             a.logit_scale[group_of(kind, Role::kHard)]};
    const float high[2] = {static_cast<float>(scale[0]), static_cast<float>(scale[1])};
    const uint64_t over = kind == kDocDoc && a.by_query ? over_limit() : 0;
    uint64_t keeps = 0;  // bits of candidates that pass, of prefixes
    float kept_score = 0;
    int num_kept = 0, num_dropped = 0;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = element_row(m, half * 2);
            const float limit[2] = {masks.limit[0][row], masks.limit[1][row]};
            const int self = masks.self[row];
            const int64_t text = masks.row_text[row];
            float best = kNone;
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    const int column = element_column(n, i), at = n * 2 + i % 2;
                    const bool is_second = groups & kSecond << at;
                    const uint64_t bit = uint64_t(1) << (m * 16 + n * 4 + i);
                    const float score = score_at(m, n, i);
                    const bool candidate =
                        row < rows && (groups & kOn << at) && column != self && masks.owner[column] != row;
                    const bool masked =
                        (over & bit) || score > (is_second ? limit[1] : limit[0]) || masks.column_text[column] == text;
                    num_dropped += candidate && masked;
                    if (candidate && !masked) {
                        ++num_kept;
                        kept_score += score;
                        best = fmaxf(best, score * (is_second ? high[1] : high[0]));
                        keeps |= bit;
                    } else if (!kPrefixes) {
                        scores[m][n][i] = kNone;
                    }
                }
            best = lanes_max<4>(best);
            if (quad_lane == 0) masks.part[0][row][warp_column] = best;
        }
    if (!kPrefixes || layer + 1 == a.layers)
        count_tile(kind, kept_score, num_kept, num_dropped, kept.tally[threadIdx.x / 32]);
    sync_block();
    if (!a.dense[kind]) return;

    // Weights. scale_low of the panel would be the same, but spills two registers here.
    const float low[2] = {static_cast<float>(scale[0] - static_cast<double>(high[0])),
                          static_cast<float>(scale[1] - static_cast<double>(high[1]))};
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = element_row(m, half * 2);
            const float* part = masks.part[0][row];
            const float best = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
            const float offset = best > kNone ? ceilf(best) : -INFINITY;
            const float shift = best > kNone ? -offset : 0.0f;
            float sum = 0, weighted_score_sum = 0;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                float weight[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int i = half * 2 + j;
                    const bool keep = !kPrefixes || (keeps & uint64_t(1) << (m * 16 + n * 4 + i));
                    const float score = keep ? score_at(m, n, i) : kNone;
                    const bool is_second = groups & kSecond << (n * 2 + j);
                    weight[j] = exp2_approx(
                        fmaf(score, is_second ? low[1] : low[0], fmaf(score, is_second ? high[1] : high[0], shift)));
                    sum += weight[j];
                    weighted_score_sum = fmaf(weight[j], score, weighted_score_sum);
                }
                T* const to = reinterpret_cast<T*>(staged + row * kStagedRow<T>) + element_column(n, 0);
                if constexpr (sizeof(T) == 2)
                    *reinterpret_cast<uint32_t*>(to) = pack<T>(weight[0], weight[1]);
                else
                    to[0] = weight[0], to[1] = weight[1];
            }
            sum = lanes_sum<4>(sum);
            weighted_score_sum = lanes_sum<4>(weighted_score_sum);
            if (quad_lane == 0) {
                masks.part[1][row][warp_column] = sum;
                masks.part[2][row][warp_column] = weighted_score_sum;
                if (warp_column == 0) masks.offset[row] = offset;
            }
        }
    sync_block();

    // Write the tile
    const int64_t tile = a.tile_of(layer, kind, column_tile);
    if (threadIdx.x < kTile) {
        const int64_t at = tile * a.rows + row0 + threadIdx.x;
        const auto total = [](const float* part) { return part[0] + part[1] + part[2] + part[3]; };
        a.tile_offset[at] = masks.offset[threadIdx.x];
        a.tile_sum[at] = total(masks.part[1][threadIdx.x]);
        a.tile_weighted_score_sum[at] = total(masks.part[2][threadIdx.x]);
    }
    if (a.p.d_documents) {
        constexpr int kVectors = kTile / kVector<T>;
        for (int at = threadIdx.x; at < kTile * kVectors; at += kTileThreads) {
            const int row = at / kVectors, column = at % kVectors * kVector<T>;
            store16(a.weights + (row0 + row) * a.num_tiles() * kTile + tile * kTile + column,
                    load16(staged + row * kStagedRow<T> + column * static_cast<int>(sizeof(T))));
        }
    }
    sync_block();
}

// A block: 128 rows against 128 documents, the queries and then their positives; or against 128 queries. Layer after
// layer, each the one before and some features more.
template <bool kPrefixes, class T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 && !kPrefixes ? 2 : 1)
    score(const Panel<T> a, bool of_documents, const Matrix<T> columns, int64_t dim_steps) {
    const int64_t row0 = blockIdx.x % a.row_tiles * kTile, column_tile = blockIdx.x / a.row_tiles;
    Kept& kept = *reinterpret_cast<Kept*>(shared_bytes() + kProductBytes<false>);
    if (threadIdx.x % 32 == 0) kept.tally[threadIdx.x / 32] = {};
    Sums scores;
    const auto multiply_from = [&](const Matrix<T>& left, const Matrix<T>& right, int64_t begin, int64_t steps) {
        multiply_add<T, Depth::kAlong, Depth::kAlong, false>(scores, steps, [&](int64_t step, char* stage) {
            load_operand<T, Depth::kAlong>(stage, left, row0, begin + step * kDepth<T>);
            load_operand<T, Depth::kAlong>(stage + kOperandBytes, right, column_tile * kTile, begin + step * kDepth<T>);
        });
    };
    const auto score_by = [&](const Matrix<T>& anchors, Kind kind) {
        each_element(scores, [](int, int, float& sum) { sum = 0; });
        if constexpr (kPrefixes) {
            for (int layer = 0; layer < a.layers; ++layer) {
                Matrix<T> left = anchors, right = columns;
                left.end = right.end = a.ends[layer];
                multiply_from(left, right, a.begins[layer], (left.end - a.begins[layer] + kDepth<T> - 1) / kDepth<T>);
                finish_tile<true>(a, kind, layer, row0, column_tile, scores);
            }
        } else {
            multiply_from(anchors, columns, 0, dim_steps);
            finish_tile<false>(a, kind, 0, row0, column_tile, scores);
        }
    };
    if (!of_documents || a.dense[kQueryDocument] || a.by_query)
        score_by(a.anchors[0], of_documents ? kQueryDocument : kQueries);
    if (of_documents && a.dense[kDocDoc]) score_by(a.anchors[1], kDocDoc);
    if (threadIdx.x > 0) return;
    a.tallies[(of_documents ? column_tile : a.doc_tiles + column_tile) * a.row_tiles + row0 / kTile] =
        sum_of(kept.tally);
}

}  // namespace qemb::cuda::info_nce_kernels
