// InfoNCE by row panels: R queries meet all columns, scores become weights as they leave the tensor cores, and both gradients
// are plain products with those weights. Three products a group, nothing recomputed; no [num_queries, num_documents] matrix.
#include "ops/infonce.h"

#include "cuda/device/vector.h"
#include "cuda/infonce_gradients.h"
#include "cuda/infonce_scores.h"

namespace qemb::cuda {
namespace infonce {

// A warp for each row: the positive's score and the limit, as on the CPU in double, and the chain of rows with its positive.
template <class T>
__global__ void start_rows(const Panel<T> a) {
    const int lane = threadIdx.x % 32;
    const int64_t row = blockIdx.x * int64_t(4) + threadIdx.x / 32;
    if (row >= a.count) return;
    const int64_t* const positive = a.p.positive + a.first;
    const T* const query = a.anchors[0].data + row * a.p.dim;
    const T* const document = a.documents.data + positive[row] * a.p.dim;
    double score = 0;
    for (int64_t d = lane; d < a.p.dim; d += 32)
        score += static_cast<double>(to_float(query[d])) * static_cast<double>(to_float(document[d]));
    score = warp_sum(score);

    int64_t next = a.count;
    int earlier = 0;
    for (int64_t other = lane; other < a.count; other += 32)
        if (positive[other] == positive[row]) {
            if (other < row) ++earlier;
            if (other > row && other < next) next = other;
        }
    earlier = warp_sum(earlier);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) next = min(next, shuffle_xor(next, mask));
    if (lane > 0) return;
    a.positive_score[row] = static_cast<float>(score);
    a.limit[row] = static_cast<float>(score + a.p.margin);
    a.next_same[row] = next < a.count ? next : -1;
    a.is_first_same[row] = earlier == 0;
}

// 32 rows a block, 8 threads a row: its offset, the factors that bring its tiles to it, the loss and the weights of the
// gradient. The positive's weight is -(Z_neg / Z), never P - 1: that would cancel.
template <class T>
__global__ void finish_rows(const Panel<T> a) {
    const int lane = threadIdx.x / 32, in_block = threadIdx.x % 32;
    const int64_t row = blockIdx.x * int64_t(32) + in_block;
    float* const maxima = reinterpret_cast<float*>(shared_bytes());         // [8, 32]
    double* const sums = reinterpret_cast<double*>(shared_bytes() + 1024);  // [8, 32]

    float offset = -INFINITY;
    for (int64_t tile = lane; tile < a.num_tiles; tile += 8) offset = fmaxf(offset, a.tile_offset[tile * a.rows + row]);
    maxima[threadIdx.x] = offset;
    sync_block();
    for (int i = 0; i < 8; ++i) offset = fmaxf(offset, maxima[i * 32 + in_block]);

    double negatives = 0;
    for (int64_t tile = lane; tile < a.num_tiles; tile += 8) {
        const int64_t at = tile * a.rows + row;
        const float shift = a.tile_offset[at] - offset;  // NaN where the tile has no candidate, nor has the row
        const float factor = shift > -150.0f ? ldexpf(1.0f, static_cast<int>(shift)) : 0.0f;
        a.factors[at] = from_float<T>(factor);
        negatives += static_cast<double>(factor) * static_cast<double>(a.tile_sum[at]);
    }
    sums[threadIdx.x] = negatives;
    sync_block();
    if (lane > 0) return;
    for (int i = 1; i < 8; ++i) negatives += sums[i * 32 + in_block];
    if (row >= a.count) {
        a.row_weight[row] = 0;
        return;
    }
    if (offset == -INFINITY) {  // no candidate: all are zero, or all NaN
        static_cast<double*>(a.p.loss)[a.first + row] = negatives;
        a.row_weight[row] = a.positive_weight[row] = static_cast<float>(negatives);
        return;
    }
    const double gap = static_cast<double>(a.positive_score[row]) * a.inverse - static_cast<double>(offset);
    const double total = negatives + exp2(gap);
    const double mean = 1.0 / (a.p.temperature * static_cast<double>(a.p.num_queries));
    static_cast<double*>(a.p.loss)[a.first + row] =
        gap > 0 ? log1p(negatives * exp2(-gap)) : log(total) - gap * 0.6931471805599453;
    a.row_weight[row] = static_cast<float>(mean / total);
    a.positive_weight[row] = static_cast<float>(-mean * negatives / total);
}

// One block: the panel's part of the stats, and the unit of the packed anchors.
template <class T>
__global__ void finish_panel(const Panel<T> a) {
    constexpr int kWarps = 32;
    double* const scratch = reinterpret_cast<double*>(shared_bytes());
    double sums[5] = {};
    float largest = 0;
    for (int64_t row = threadIdx.x; row < a.count; row += kWarps * 32) {
        sums[0] += static_cast<double>(a.positive_score[row]);
        largest = fmaxf(largest, a.row_weight[row]);
    }
    for (int64_t i = threadIdx.x; i < (a.doc_tiles + a.query_tiles) * a.row_tiles; i += kWarps * 32) {
        const Tally& tally = a.tallies[i];
        sums[1] += tally.kept_score;
        sums[2] += tally.kept_query_document;
        sums[3] += tally.kept;
        sums[4] += tally.dropped;
    }
    for (int i = 0; i < 5; ++i) {
        const double sum = block_sum<kWarps>(sums[i], scratch);
        if (threadIdx.x == 0) a.p.stats[i] += sum;
    }
    float* const maxima = reinterpret_cast<float*>(shared_bytes());
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = largest;
    sync_block();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < kWarps; ++warp) largest = fmaxf(largest, maxima[warp]);
    *a.unit = largest / 1024;  // uses the upper range of half floats too; elements of unit vectors are at most 1
}

template <class T>
void run(const InfoNce& p) {
    Panel<T> a(p);
    zero(kOp, p.stats, 5 * sizeof(double), p.stream);
    if (p.d_queries) zero(kOp, p.d_queries, static_cast<size_t>(p.num_queries * p.dim) * sizeof(float), p.stream);
    // Asked of its own pointer: without queries theirs may be null.
    if (p.d_documents) zero(kOp, p.d_documents, static_cast<size_t>(p.num_documents * p.dim) * sizeof(float), p.stream);
    const auto blocks = [](int64_t count) { return dim3(static_cast<unsigned>(count)); };
    for (int64_t row = 0; row < p.num_queries; row += a.rows) {
        a.start_at(row);
        const int64_t padded = a.row_tiles * kTile, dims = a.dim_tiles();
        launch(kOp, start_rows<T>, blocks(ceil_div(a.count, 4)), 128, 0, p.stream, a);
        launch(kOp, score<T>, blocks(a.row_tiles * a.doc_tiles), kTileThreads, kScoreBytes, p.stream, a, true, a.documents,
               a.dim_steps());
        launch(kOp, score<T>, blocks(a.row_tiles * a.query_tiles), kTileThreads, kScoreBytes, p.stream, a, false, a.queries,
               a.dim_steps());
        launch(kOp, finish_rows<T>, blocks(padded / 32), 256, 3072, p.stream, a);
        launch(kOp, finish_panel<T>, 1, 1024, 256, p.stream, a);
        if (!p.d_queries) continue;
        launch(kOp, pack_anchors<T>, blocks(padded * a.sides()), 128, 0, p.stream, a, padded);
        launch(kOp, row_gradients<T>, blocks(a.sides() * a.splits * a.row_tiles * dims), kTileThreads, kProductBytes<true>,
               p.stream, a, dims);
        launch(kOp, finish_row_gradients<T>, blocks(a.sides() * a.count), 128, 0, p.stream, a);
        launch(kOp, column_gradients<T>, blocks(a.doc_tiles * dims), kTileThreads, kProductBytes<true>, p.stream, a, true,
               dims);
        launch(kOp, column_gradients<T>, blocks(a.query_tiles * dims), kTileThreads, kProductBytes<true>, p.stream, a, false,
               dims);
        launch(kOp, positive_gradients<T>, blocks(a.count), 128, 0, p.stream, a);
    }
}

}  // namespace infonce

int64_t info_nce_scratch(const InfoNce& p) {
    int64_t bytes = 0;
    visit_dtype(p.dtype, [&]<class T>() { bytes = infonce::Panel<T>(p).scratch_bytes; });
    return bytes;
}

void info_nce(const InfoNce& p) {
    visit_dtype(p.dtype, [&]<class T>() { infonce::run<T>(p); });
}

}  // namespace qemb::cuda
