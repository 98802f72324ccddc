// top_k on Hopper: a block sweeps a span of the documents by tiles of 128 queries x 256 documents; while its warps look
// through the scores of one tile, the copy engine fetches the next.
#include "cuda/sm90/top_k.h"

#include "cuda/device/vector.h"
#include "cuda/sm90/tile_product.h"

namespace qemb::cuda::sm90 {
namespace {

using namespace top_k_kernels;

constexpr uint32_t kScoresBarrier = 1;
constexpr int kStaged = kStages * kStageBytes<false>, kRows = kStaged + kTile * kStagedRow * 4,
              kBarriers = kRows + (static_cast<int>(sizeof(Rows)) + 7) / 8 * 8, kBytes = kBarriers + StageRing::kBytes;

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    search_spans(const TopK p, const List lists, int64_t query_tiles, int64_t span, int dim_steps,
                 const QEMB_GRID_CONSTANT TensorMap queries, const QEMB_GRID_CONSTANT TensorMap documents) {
    const int64_t row0 = blockIdx.x % query_tiles * kTile, part = blockIdx.x / query_tiles;
    const int64_t first = part * span, end = min(first + span, p.num_documents);
    const uint32_t stages = shared_address(shared_bytes());
    StageRing ring{stages + kBarriers};
    const auto produce = [&] {
        for (int64_t document = first; document < end; document += kColumns)
            fill_stages<false>(ring, stages, dim_steps, 0, [&](int64_t step, uint32_t stage, uint32_t barrier) {
                const int feature = static_cast<int>(step) * kStepDepth;
                tma_load(stage, queries, barrier, {feature, static_cast<int>(row0)});
                tma_load(stage + kLeftBytes, documents, barrier, {feature, static_cast<int>(document)});
            });
    };
    const auto consume = [&] {
        Rows& rows = *reinterpret_cast<Rows*>(shared_bytes() + kRows);
        float* const staged = reinterpret_cast<float*>(shared_bytes() + kStaged);
        const Lists mine{p, lists, row0, part};
        mine.clear(rows);
        barrier_sync(kScoresBarrier, kConsumers);
        for (int64_t document = first; document < end; document += kColumns) {
            HalfSums low, high;
            multiply<T>(low, high, ring, stages, dim_steps);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (document + half * kTile >= end) continue;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int row = first_row() + 8 * i;
                    bool hit = false;
#pragma unroll
                    for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            const float score = (half ? high : low)[4 * n + 2 * i + j];
                            staged[row * kStagedRow + pair_column(n) + j] = score;
                            hit |= rows.enters(row, score);
                        }
                    if (hit) rows.hit[row] = 1;
                }
                barrier_sync(kScoresBarrier, kConsumers);
                mine.enter(staged, document + half * kTile, end, rows);
                barrier_sync(kScoresBarrier, kConsumers);
            }
        }
    };
    by_role([&] { ring.init(2); }, produce, consume);
}

}  // namespace

bool search(const TopK& p, const top_k_kernels::Cut& cut, const top_k_kernels::List& lists) {
    bool taken = false;
    visit_dtype(p.dtype, [&]<class T>() {
        if constexpr (sizeof(T) == 2) {
            TensorMap queries, documents;
            if (!make_matrix_map<T>(queries, p.queries, p.num_queries, p.dim, kTile) ||
                !make_matrix_map<T>(documents, p.documents, p.num_documents, p.dim, kColumns))
                return;
            launch(kOp, search_spans<T>, dim3(static_cast<unsigned>(cut.query_tiles * cut.spans)), kThreads, kBytes,
                   p.stream, p, lists, cut.query_tiles, cut.span, static_cast<int>(ceil_div(p.dim, kStepDepth)),
                   queries, documents);
            taken = true;
        }
    });
    return taken;
}

}  // namespace qemb::cuda::sm90
