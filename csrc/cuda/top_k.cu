// Exact top-k search: 128 queries sweep a span of the documents tile by tile; a warp keeps the sorted list of each
// query, which few scores enter. A second kernel merges the lists of the spans. The order is total, so the cut into
// spans changes nothing.
#include "ops/top_k.h"

#include "cuda/architecture.h"
#include "cuda/device/vector.h"
#include "cuda/sm90/top_k.h"

namespace qemb::cuda {
namespace top_k_kernels {

constexpr int kSearchBytes = kProductBytes<false> + static_cast<int>(sizeof(Rows));
static_assert(kSearchBytes <= kSmallShared);

template <class T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 ? 2 : 1)
    search(const TopK p, const Matrix<T> queries, const Matrix<T> documents, const List lists, int64_t query_tiles,
           int64_t span, int64_t dim_steps) {
    Rows& rows = *reinterpret_cast<Rows*>(shared_bytes() + kProductBytes<false>);
    float* const staged = reinterpret_cast<float*>(shared_bytes());
    const int64_t row0 = blockIdx.x % query_tiles * kTile, part = blockIdx.x / query_tiles;
    const int64_t end = min((part + 1) * span, p.num_documents);
    const Lists mine{p, lists, row0, part};
    mine.clear(rows);

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
        mine.enter(staged, document, end, rows);
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
    if (!on_hopper() || !sm90::search(p, cut, lists))
        launch(kOp, search<T>, dim3(static_cast<unsigned>(cut.query_tiles * cut.spans)), kTileThreads, kSearchBytes,
               p.stream, p, queries, documents, lists, cut.query_tiles, cut.span, ceil_div(p.dim, kDepth<T>));
    if (cut.spans > 1)
        launch(kOp, merge, dim3(static_cast<unsigned>(ceil_div(p.num_queries, 4))), 128, 0, p.stream, p, lists,
               cut.spans);
}

}  // namespace top_k_kernels

int64_t top_k_scratch(const TopK& p) {
    return top_k_kernels::Cut(p).list_values(p) * static_cast<int64_t>(sizeof(float) + sizeof(int64_t));
}

void top_k(const TopK& p) {
    if (p.k == 0) return;
    visit_dtype(p.dtype, [&]<class T>() { top_k_kernels::run<T>(p); });
}

}  // namespace qemb::cuda
