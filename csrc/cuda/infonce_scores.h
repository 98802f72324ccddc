// Scores of a panel by tiles; masks, the tile's row maxima, weights and row sums while the tile is in registers.
#pragma once

#include "cuda/device/reduce.h"
#include "cuda/infonce_panel.h"

namespace qemb::cuda::infonce {

// What a tile needs to know of its rows and columns; lies where the product's stages were.
struct Masks {
    int64_t row_text[kTile], column_text[kTile];
    int self[kTile];   // the column that is no candidate of the row, or -1
    int owner[kTile];  // the row that owns the column, or -1
    float limit[kTile];
    float offset[kTile];
    float part[2][kTile][4];  // maxima, then sums, of the four warps that share a row
};

// What outlives a product; lies behind its stages.
struct Kept {
    uint64_t over[kTileThreads];  // which of a thread's query-document scores exceed the limit, a bit each
    Tally tally[kTileThreads / 32];
};
constexpr int kScoreBytes = kProductBytes<false> + static_cast<int>(sizeof(Kept));

template <class T>
constexpr int kStagedRow = kTile * static_cast<int>(sizeof(T)) + 16;  // bytes; the rest spreads rows over the banks

constexpr float kNone = -3e38f;  // the score of what is no candidate: its weight is zero, and it stays finite

enum class Group { kQueryDocument, kQueryQuery, kDocDoc };

QEMB_DEVICE int within_tile(int64_t at) { return at >= 0 && at < kTile ? static_cast<int>(at) : -1; }

template <class T>
QEMB_DEVICE void load_masks(const Panel<T>& a, Group group, int64_t row0, int64_t column0, Masks& masks) {
    const InfoNce& p = a.p;
    const auto text = [&](int64_t document) { return p.document_ids ? p.document_ids[document] : document; };
    const int at = threadIdx.x % kTile;
    if (threadIdx.x < kTile) {
        if (row0 + at >= a.count) return;
        const int64_t query = a.first + row0 + at, positive = p.positive[query];
        masks.row_text[at] = text(positive);
        masks.self[at] = within_tile((group == Group::kQueryQuery ? query : positive) - column0);
        masks.limit[at] = a.limit[row0 + at];
    } else {
        const int64_t column = column0 + at;
        if (column >= (group == Group::kQueryQuery ? p.num_queries : p.num_documents)) return;
        masks.column_text[at] = text(group == Group::kQueryQuery ? p.positive[column] : column);
        masks.owner[at] = group == Group::kQueryQuery || !p.owner ? -1 : within_tile(p.owner[column] - a.first - row0);
    }
}

QEMB_DEVICE void count_tile(Group group, float kept_score, int num_kept, int num_dropped, Kept& kept) {
    const double score = warp_sum(static_cast<double>(kept_score));
    num_kept = warp_sum(num_kept);
    num_dropped = warp_sum(num_dropped);
    if (threadIdx.x % 32 != 0) return;
    Tally& tally = kept.tally[threadIdx.x / 32];
    if (group != Group::kDocDoc) tally = {};
    if (group == Group::kQueryDocument) tally = {score, static_cast<double>(num_kept), 0, 0};
    tally.kept += num_kept;
    tally.dropped += num_dropped;
}

template <class T>
QEMB_DEVICE void finish_tile(const Panel<T>& a, Group group, int64_t row0, int64_t column0, int64_t tile, Sums& scores) {
    const InfoNce& p = a.p;
    Masks& masks = *reinterpret_cast<Masks*>(shared_bytes());
    Kept& kept = *reinterpret_cast<Kept*>(shared_bytes() + kProductBytes<false>);
    char* const staged = shared_bytes() + sizeof(Masks);
    const int64_t num_columns = group == Group::kQueryQuery ? p.num_queries : p.num_documents;
    const int rows = static_cast<int>(min(a.count - row0, int64_t(kTile)));
    const int columns = static_cast<int>(min(num_columns - column0, int64_t(kTile)));
    const bool hard = group == Group::kQueryDocument && p.hard;
    const bool others = group != Group::kQueryDocument || p.in_batch;
    const bool by_score = group != Group::kDocDoc || p.doc_mask == DocMask::kOwnScore;
    const bool by_query_score = group == Group::kDocDoc && p.doc_mask == DocMask::kQueryDocument;
    const int quad_lane = threadIdx.x % 4, warp_column = threadIdx.x / 32 % 4;

    load_masks(a, group, row0, column0, masks);
    sync_block();

    // Masks, and the largest score of each row
    uint64_t over = by_query_score ? kept.over[threadIdx.x] : 0;
    float kept_score = 0;
    int num_kept = 0, num_dropped = 0;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = element_row(m, half * 2);
            const float limit = masks.limit[row];
            const int self = masks.self[row];
            const int64_t text = masks.row_text[row];
            float best = kNone;
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    const int column = element_column(n, i);
                    const uint64_t bit = uint64_t(1) << (m * 16 + n * 4 + i);
                    float& score = scores[m][n][i];
                    if (by_score && score > limit) over |= bit;
                    const bool candidate =
                        row < rows && column < columns && column != self && (masks.owner[column] == row ? hard : others);
                    const bool masked = (over & bit) || masks.column_text[column] == text;
                    num_dropped += candidate && masked;
                    if (candidate && !masked) {
                        ++num_kept;
                        kept_score += score;
                        best = fmaxf(best, score);
                    } else {
                        score = kNone;
                    }
                }
            best = lanes_max<4>(best);
            if (quad_lane == 0) masks.part[0][row][warp_column] = best;
        }
    if (group == Group::kQueryDocument) kept.over[threadIdx.x] = over;
    count_tile(group, kept_score, num_kept, num_dropped, kept);
    sync_block();

    // Weights. `inverse` in two floats: its rounding would count as often as the exponent is large.
    const float high = static_cast<float>(a.inverse), low = static_cast<float>(a.inverse - static_cast<double>(high));
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = element_row(m, half * 2);
            const float* part = masks.part[0][row];
            const float best = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
            const float offset = best > kNone ? ceilf(best * high) : -INFINITY;
            const float shift = best > kNone ? -offset : 0.0f;
            float sum = 0;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                float weight[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int i = half * 2 + j;
                    weight[j] = exp2_approx(fmaf(scores[m][n][i], low, fmaf(scores[m][n][i], high, shift)));
                    sum += weight[j];
                }
                T* const to = reinterpret_cast<T*>(staged + row * kStagedRow<T>) + element_column(n, 0);
                if constexpr (sizeof(T) == 2)
                    *reinterpret_cast<uint32_t*>(to) = pack<T>(weight[0], weight[1]);
                else
                    to[0] = weight[0], to[1] = weight[1];
            }
            sum = lanes_sum<4>(sum);
            if (quad_lane == 0) {
                masks.part[1][row][warp_column] = sum;
                if (warp_column == 0) masks.offset[row] = offset;
            }
        }
    sync_block();

    // Write the tile
    if (threadIdx.x < kTile) {
        const int64_t at = tile * a.rows + row0 + threadIdx.x;
        const float* part = masks.part[1][threadIdx.x];
        a.tile_offset[at] = masks.offset[threadIdx.x];
        a.tile_sum[at] = part[0] + part[1] + part[2] + part[3];
    }
    if (p.d_queries) {
        constexpr int kVectors = kTile / kVector<T>;
        for (int at = threadIdx.x; at < kTile * kVectors; at += kTileThreads) {
            const int row = at / kVectors, column = at % kVectors * kVector<T>;
            store16(a.weights + (row0 + row) * a.num_tiles * kTile + tile * kTile + column,
                    load16(staged + row * kStagedRow<T> + column * static_cast<int>(sizeof(T))));
        }
    }
    sync_block();
}

// A block: 128 queries against 128 documents, and then their positives against the same; or against 128 queries.
template <class T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 ? 2 : 1)
    score(const Panel<T> a, bool of_documents, const Matrix<T> columns, int64_t dim_steps) {
    const int64_t row0 = blockIdx.x % a.row_tiles * kTile, column_tile = blockIdx.x / a.row_tiles;
    const int64_t tile = column_tile + (of_documents ? 0 : a.doc_tiles), column0 = column_tile * kTile;
    Sums scores;
    const auto product = [&](const Matrix<T>& anchors) {
        multiply<T, Depth::kAlong, Depth::kAlong, false>(scores, dim_steps, [&](int64_t step, char* stage) {
            load_operand<T, Depth::kAlong>(stage, anchors, row0, step * kDepth<T>);
            load_operand<T, Depth::kAlong>(stage + kOperandBytes, columns, column0, step * kDepth<T>);
        });
    };
    product(a.anchors[0]);
    finish_tile(a, of_documents ? Group::kQueryDocument : Group::kQueryQuery, row0, column0, tile, scores);
    if (of_documents && a.p.doc_doc) {
        product(a.anchors[1]);
        finish_tile(a, Group::kDocDoc, row0, column0, a.doc_tiles + a.query_tiles + tile, scores);
    }
    if (threadIdx.x > 0) return;
    const Kept& kept = *reinterpret_cast<const Kept*>(shared_bytes() + kProductBytes<false>);
    Tally total = kept.tally[0];
    for (int warp = 1; warp < kTileThreads / 32; ++warp) {
        total.kept_score += kept.tally[warp].kept_score;
        total.kept_query_document += kept.tally[warp].kept_query_document;
        total.kept += kept.tally[warp].kept;
        total.dropped += kept.tally[warp].dropped;
    }
    a.tallies[tile * a.row_tiles + row0 / kTile] = total;
}

}  // namespace qemb::cuda::infonce
