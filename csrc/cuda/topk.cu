// Exact top-k search: 128 queries sweep a span of the documents tile by tile; a warp keeps the sorted list of each query, which
// few scores enter. A second kernel merges the lists of the spans. The order is total, so the cut into spans changes nothing.
#include "ops/topk.h"

#include <algorithm>
#include <cmath>

#include "cuda/device/tile_product.h"
#include "cuda/device/vector.h"
#include "cuda/launch.h"

namespace qemb::cuda {
namespace topk {

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
        const int64_t most = std::clamp<int64_t>(p.num_documents / std::max(kMinSpan, 4 * p.k), 1, kMaxSpans);
        span = std::max<int64_t>(1, ceil_div(ceil_div(p.num_documents, std::min(wanted, most)), kTile)) * kTile;
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

// A warp puts a document into a list; the last one drops out. Documents come in ascending order, so among equals it is the
// last.
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
constexpr int kSearchBytes = kProductBytes<false> + static_cast<int>(sizeof(Rows));

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

template <class T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 ? 2 : 1)
    search(const TopK p, const Matrix<T> queries, const Matrix<T> documents, const List lists, int64_t query_tiles,
           int64_t span, int64_t dim_steps) {
    Rows& rows = *reinterpret_cast<Rows*>(shared_bytes() + kProductBytes<false>);
    float* const staged = reinterpret_cast<float*>(shared_bytes());
    const int64_t row0 = blockIdx.x % query_tiles * kTile, part = blockIdx.x / query_tiles;
    const int64_t end = min((part + 1) * span, p.num_documents);
    const int first_row = static_cast<int>(threadIdx.x) / 32 * kRowsOfWarp;
    const auto list_of = [&](int row) {
        const int64_t at = (part * p.num_queries + row0 + row) * p.k;
        return List{lists.scores + at, lists.indices + at};
    };

    // Empty lists
    for (int row = first_row; row < first_row + kRowsOfWarp && row0 + row < p.num_queries; ++row)
        for (int64_t i = threadIdx.x % 32; i < p.k; i += 32) {
            list_of(row).scores[i] = -INFINITY;
            list_of(row).indices[i] = -1;
        }
    if (threadIdx.x < kTile) {
        const int row = threadIdx.x;
        rows.ceiling[row] = p.ceiling && row0 + row < p.num_queries ? p.ceiling[row0 + row] : INFINITY;
        rows.bar[row] = NAN;
        rows.hit[row] = 0;
    }

    for (int64_t document = part * span; document < end; document += kTile) {
        Sums scores;
        multiply<T, Depth::kAlong, Depth::kAlong, false>(scores, dim_steps, [&](int64_t step, char* stage) {
            load_operand<T, Depth::kAlong>(stage, queries, row0, step * kDepth<T>);
            load_operand<T, Depth::kAlong>(stage + kOperandBytes, documents, document, step * kDepth<T>);
        });
        each_element(scores, [&](int row, int column, float score) {
            staged[row * kStagedRow + column] = score;
            if (rows.enters(row, score)) rows.hit[row] = 1;
        });
        sync_block();
        for (int row = first_row; row < first_row + kRowsOfWarp && row0 + row < p.num_queries; ++row) {
            if (!rows.hit[row]) continue;
            enter_scores(p, row0 + row, staged + row * kStagedRow, row, document, end, list_of(row), rows);
            sync_warp();
            if (threadIdx.x % 32 == 0) rows.hit[row] = 0;
        }
        sync_block();
    }
}

// A warp for each query: the heads of up to 256 lists, eight to a lane.
QEMB_DEVICE bool is_before(float a_score, int64_t a, float b_score, int64_t b) {
    return a >= 0 && (b < 0 || a_score > b_score || (a_score == b_score && a < b));
}

__global__ void merge(const TopK p, const List lists, int64_t spans) {
    const int lane = threadIdx.x % 32;
    const int64_t query = blockIdx.x * int64_t(4) + threadIdx.x / 32;
    if (query >= p.num_queries) return;
    float scores[kSpansOfLane];
    int64_t indices[kSpansOfLane], next[kSpansOfLane] = {};
    const auto advance = [&](int i) {
        const int64_t span = lane + 32 * i, at = (span * p.num_queries + query) * p.k + next[i];
        const bool more = span < spans && next[i] < p.k;
        scores[i] = more ? lists.scores[at] : -INFINITY;
        indices[i] = more ? lists.indices[at] : -1;
        ++next[i];
    };
#pragma unroll
    for (int i = 0; i < kSpansOfLane; ++i) advance(i);
    for (int64_t rank = 0; rank < p.k; ++rank) {
        float best = -INFINITY;
        int64_t index = -1;
#pragma unroll
        for (int i = 0; i < kSpansOfLane; ++i)
            if (is_before(scores[i], indices[i], best, index)) best = scores[i], index = indices[i];
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) {
            const float other = shuffle_xor(best, mask);
            const int64_t other_index = shuffle_xor(index, mask);
            if (is_before(other, other_index, best, index)) best = other, index = other_index;
        }
#pragma unroll
        for (int i = 0; i < kSpansOfLane; ++i)
            if (index >= 0 && indices[i] == index) advance(i);
        if (lane == 0) {
            p.scores[query * p.k + rank] = best;
            p.indices[query * p.k + rank] = index;
        }
    }
}

template <class T>
void run(const TopK& p) {
    const Cut cut(p);
    const Matrix<T> queries(p.queries, p.num_queries, p.dim), documents(p.documents, p.num_documents, p.dim);
    int64_t* const indices = static_cast<int64_t*>(p.scratch);
    const List result{p.scores, p.indices};
    const List lists = cut.spans > 1 ? List{reinterpret_cast<float*>(indices + cut.list_values(p)), indices} : result;
    launch(kOp, search<T>, dim3(static_cast<unsigned>(cut.query_tiles * cut.spans)), kTileThreads, kSearchBytes, p.stream, p,
           queries, documents, lists, cut.query_tiles, cut.span, ceil_div(p.dim, kDepth<T>));
    if (cut.spans > 1)
        launch(kOp, merge, dim3(static_cast<unsigned>(ceil_div(p.num_queries, 4))), 128, 0, p.stream, p, lists, cut.spans);
}

}  // namespace topk

int64_t top_k_scratch(const TopK& p) {
    return topk::Cut(p).list_values(p) * static_cast<int64_t>(sizeof(float) + sizeof(int64_t));
}

void top_k(const TopK& p) {
    if (p.k == 0) return;
    visit_dtype(p.dtype, [&]<class T>() { topk::run<T>(p); });
}

}  // namespace qemb::cuda
