// top_k on Hopper: a block sweeps a span of the documents by tiles of 128 queries x 256 documents. A warp holds all
// scores of its 16 queries, so the warps look through them without waiting for each other; the copy engine fetches the
// next tile meanwhile.
#include "cuda/sm90/top_k.h"

#include "cuda/device/vector.h"
#include "cuda/sm90/tile_product.h"

namespace qemb::cuda::sm90 {
namespace {

using namespace top_k_kernels;

using SearchRing = Ring<4>;  // the scores take no shared memory, so there is room for one more than kStages
constexpr int kRows = SearchRing::kCount * kStageBytes<false>,
              kBarriers = kRows + (static_cast<int>(sizeof(Rows)) + 7) / 8 * 8, kBytes = kBarriers + SearchRing::kBytes;
static_assert(kBytes <= 227 * 1024);

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    search_spans(const TopK p, const Cut cut, const Memory memory, int dim_steps,
                 const QEMB_GRID_CONSTANT TensorMap queries, const QEMB_GRID_CONSTANT TensorMap documents) {
    const uint32_t stages = shared_address(shared_bytes());
    SearchRing ring{stages + kBarriers};
    const auto each_unit = [&](const auto& body) {
        for (int number = static_cast<int>(blockIdx.x); number < cut.query_tiles * cut.spans;
             number += static_cast<int>(gridDim.x))
            body(Unit(p, cut, memory, number));
    };
    const auto produce = [&] {
        each_unit([&](const Unit& unit) {
            for (int tile = unit.tile; tile < unit.end_tile; tile += 2)
                fill_stages<false>(ring, stages, dim_steps, 0, [&](int64_t step, uint32_t stage, uint32_t barrier) {
                    const int feature = static_cast<int>(step) * kStepDepth;
                    tma_load(stage, queries, barrier, {feature, unit.query_tile * kTile});
                    tma_load(stage + kLeftBytes, documents, barrier, {feature, tile * kTile});
                });
        });
    };
    const auto consume = [&] {
        Rows& rows = *reinterpret_cast<Rows*>(shared_bytes() + kRows);
        each_unit([&](const Unit& unit) {
            unit.begin(rows);
            for (int tile = unit.tile; tile < unit.end_tile; tile += 2) {
                HalfSums low, high;
                multiply<T>(low, high, ring, stages, dim_steps);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (tile + half >= unit.end_tile) continue;
#pragma unroll
                    for (int i = 0; i < 2; ++i)
#pragma unroll
                        for (int n = 0; n < kTile / 8; n += 4) {
                            float of_row[8];
#pragma unroll
                            for (int j = 0; j < 8; ++j)
                                of_row[j] = (half ? high : low)[4 * (n + j / 2) + 2 * i + j % 2];
                            unit.offer(rows, first_row() + 8 * i, of_row, tile + half, pair_column(n));
                        }
                    sync_warp();  // all candidates are there
                    unit.insert(rows, tile + half + 1, kBatch);
                }
            }
            unit.insert(rows, unit.end_tile, 1);
        });
    };
    by_role([&] { ring.init(2); }, produce, consume);
}

}  // namespace

bool search(const TopK& p, const Cut& cut, const Memory& memory) {
    bool taken = false;
    visit_dtype(p.dtype, [&]<class T>() {
        if constexpr (sizeof(T) == 2) {
            TensorMap queries, documents;
            if (!make_matrix_map<T>(queries, p.queries, p.num_queries, p.dim, kTile) ||
                !make_matrix_map<T>(documents, p.documents, p.num_documents, p.dim, kColumns))
                return;
            launch(kOp, search_spans<T>, dim3(static_cast<unsigned>(cut.blocks)), kThreads, kBytes, p.stream, p, cut,
                   memory, static_cast<int>(ceil_div(p.dim, kStepDepth)), queries, documents);
            taken = true;
        }
    });
    return taken;
}

}  // namespace qemb::cuda::sm90
