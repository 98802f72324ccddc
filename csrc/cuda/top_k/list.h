// What the searches of top_k share: how the work is cut, and the sorted list of each query.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/device/tile_product.h"
#include "cuda/launch.h"
#include "ops/top_k.h"

namespace qemb::cuda::top_k_kernels {

constexpr const char* kOp = "top_k";
constexpr int64_t kBlocks = 264;    // aim for at least so many: two for each multiprocessor of an H100
constexpr int64_t kMinSpan = 1024;  // documents
constexpr int kMaxSpans = 256, kSpansOfLane = kMaxSpans / 32;
constexpr int kStagedRow = kTile + 4;  // floats
constexpr int kRowsOfWarp = kTile / (kTileThreads / 32);

// How the search is cut: every tile of queries meets `spans` spans of documents.
struct Cut {
    int64_t query_tiles, spans, span;

    explicit Cut(const TopK& p) : query_tiles(ceil_div(p.num_queries, kTile)) {
        const int64_t wanted = ceil_div(kBlocks, std::max<int64_t>(query_tiles, 1));
        const int64_t max_spans = std::clamp<int64_t>(p.num_documents / std::max(kMinSpan, 4 * p.k), 1, kMaxSpans);
        span = std::max<int64_t>(1, ceil_div(ceil_div(p.num_documents, std::min(wanted, max_spans)), kTile)) * kTile;
        spans = std::max<int64_t>(1, ceil_div(p.num_documents, span));
    }
    // One span writes the result itself.
    int64_t list_values(const TopK& p) const { return spans > 1 ? spans * p.num_queries * p.k : 0; }
};

// Best first. Free places have the index -1.
struct List {
    float* scores;
    int64_t* indices;

    QEMB_DEVICE bool stays(int64_t at, float score) const { return indices[at] >= 0 && scores[at] >= score; }
};

// A warp puts a document into a list; the last one drops out. Documents come in ascending order, so among equals it is
// the last.
QEMB_DEVICE void insert(const List& list, int64_t k, float score, int64_t index) {
    const int lane = threadIdx.x % 32;
    for (int64_t chunk = (k - 1) / 32 * 32; chunk >= 0; chunk -= 32) {
        const int64_t at = chunk + lane;
        const bool moves = at < k && !list.stays(at, score);
        const bool is_place = moves && (at == 0 || list.stays(at - 1, score));
        const float score_here = moves && !is_place ? list.scores[at - 1] : score;
        const int64_t index_here = moves && !is_place ? list.indices[at - 1] : index;
        sync_warp();
        if (moves) {
            list.scores[at] = score_here;
            list.indices[at] = index_here;
        }
        sync_warp();
        if (!shuffle(static_cast<int>(moves), 0)) return;
    }
}

// What a block knows of its queries; lies behind the stages of the product.
struct Rows {
    float ceiling[kTile];
    float bar[kTile];  // the last score of a full list; NaN before, which nothing is below
    int hit[kTile];    // may a score of this tile enter the list?

    QEMB_DEVICE bool enters(int row, float score) const { return !(score <= bar[row]); }
};
QEMB_DEVICE bool is_excluded(const TopK& p, int64_t query, int64_t document) {
    for (int64_t i = 0; i < p.num_exclude; ++i)
        if (p.exclude[query * p.num_exclude + i] == document) return true;
    return false;
}

// A warp enters the scores of documents [document, end) that belong into the list of a query, best first.
QEMB_DEVICE void enter_scores(const TopK& p, int64_t query, const float* scores, int row, int64_t document, int64_t end,
                              const List& list, Rows& rows) {
    const int lane = threadIdx.x % 32;
    float mine[4];
    bool waits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int64_t at = document + lane + 32 * i;
        mine[i] = scores[lane + 32 * i];
        waits[i] = at < end && mine[i] <= rows.ceiling[row] && rows.enters(row, mine[i]) && !is_excluded(p, query, at);
    }
    while (true) {
        float best = 0;
        int column = kTile;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (waits[i] && (column == kTile || mine[i] > best)) best = mine[i], column = lane + 32 * i;
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) {
            const float other = shuffle_xor(best, mask);
            const int other_column = shuffle_xor(column, mask);
            if (other_column < kTile && (column == kTile || other > best || (other == best && other_column < column)))
                best = other, column = other_column;
        }
        if (column == kTile) return;
        insert(list, p.k, best, document + column);
        if (lane == 0 && list.indices[p.k - 1] >= 0) rows.bar[row] = list.scores[p.k - 1];
        sync_warp();
#pragma unroll
        for (int i = 0; i < 4; ++i) waits[i] = waits[i] && lane + 32 * i != column && rows.enters(row, mine[i]);
    }
}

// The lists of a block's queries, for one span; the first kTileThreads threads of the block call.
struct Lists {
    const TopK& p;
    const List& all;
    int64_t row0, part;

    QEMB_DEVICE List operator[](int row) const {
        const int64_t at = (part * p.num_queries + row0 + row) * p.k;
        return {all.scores + at, all.indices + at};
    }
    QEMB_DEVICE void clear(Rows& rows) const {
        each_row([&](int row) {
            for (int64_t i = threadIdx.x % 32; i < p.k; i += 32) {
                (*this)[row].scores[i] = -INFINITY;
                (*this)[row].indices[i] = -1;
            }
        });
        if (threadIdx.x >= kTile) return;
        const int row = threadIdx.x;
        rows.ceiling[row] = p.ceiling && row0 + row < p.num_queries ? p.ceiling[row0 + row] : INFINITY;
        rows.bar[row] = NAN;
        rows.hit[row] = 0;
    }
    // Of 128 documents from `document` on, whose scores are staged.
    QEMB_DEVICE void enter(const float* staged, int64_t document, int64_t end, Rows& rows) const {
        each_row([&](int row) {
            if (!rows.hit[row]) return;
            enter_scores(p, row0 + row, staged + row * kStagedRow, row, document, end, (*this)[row], rows);
            sync_warp();
            if (threadIdx.x % 32 == 0) rows.hit[row] = 0;
        });
    }

  private:
    template <class Body>
    QEMB_DEVICE void each_row(const Body& body) const {
        const int first = static_cast<int>(threadIdx.x) / 32 * kRowsOfWarp;
        for (int row = first; row < first + kRowsOfWarp && row0 + row < p.num_queries; ++row) body(row);
    }
};

}  // namespace qemb::cuda::top_k_kernels
