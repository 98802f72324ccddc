// Exact top-k search: 128 queries sweep a span of the documents tile by tile, the copies of the next tile under way
// while the scores of one are looked through. A second kernel merges the lists of the spans. The order is total, so the
// cut into spans changes nothing.
#include "ops/top_k.h"

#include "cuda/architecture.h"
#include "cuda/device/vector.h"
#include "cuda/sm90/top_k.h"

namespace qemb::cuda {
namespace top_k_kernels {

constexpr int kSearchBytes = kProductBytes<false> + static_cast<int>(sizeof(Rows));
static_assert(kSearchBytes <= kSmallShared);
template <class T>
constexpr int kMostBlocks = sizeof(T) == 2 ? 2 : 1;  // of a multiprocessor, by registers

template <class T>
__global__ void __launch_bounds__(kTileThreads, kMostBlocks<T>)
    search(const TopK p, const Cut cut, const Memory memory, const Matrix<T> queries, const Matrix<T> documents,
           int dim_steps, int first_unit) {
    Rows& rows = *reinterpret_cast<Rows*>(shared_bytes() + kProductBytes<false>);
    const Unit unit(p, cut, memory, first_unit + static_cast<int>(blockIdx.x));
    unit.begin(rows);

    int stage = 0;  // the one that is filled next
    const auto prefetch = [&](int tile, int step) {
        for (; step >= dim_steps; step -= dim_steps) ++tile;
        if (tile < unit.end_tile) {
            char* const to = shared_bytes() + stage * kStageBytes<false>;
            load_operand<T, Depth::kAlong>(to, queries, static_cast<int64_t>(opaque(unit.query_tile)) * kTile,
                                           step * kDepth<T>);
            load_operand<T, Depth::kAlong>(to + kOperandBytes, documents, static_cast<int64_t>(tile) * kTile,
                                           step * kDepth<T>);
        }
        cp_async_commit();
        stage = stage + 1 == kStages ? 0 : stage + 1;
    };
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) prefetch(unit.tile, i);

    for (int tile = unit.tile; tile < unit.end_tile; ++tile) {
        Sums scores;
        each_element(scores, [](int, int, float& sum) { sum = 0; });
#pragma unroll 1
        for (int step = 0; step < dim_steps; ++step) {
            cp_async_wait<kStages - 2>();
            sync_block();  // the stage is here for everyone, and everyone is done with the one that is filled next
            prefetch(tile, step + kStages - 1);
            multiply_stage<T, Depth::kAlong, Depth::kAlong, false>(scores, shared_bytes() + stage * kStageBytes<false>);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float of_row[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) of_row[i] = scores[m][i / 2][2 * half + i % 2];
                unit.offer(rows, element_row(m, 2 * half), of_row, tile, element_column(0, 0));
            }
        sync_block();  // all candidates are there; the next ones come after a step of the product
        unit.insert(rows, tile + 1, kBatch);
    }
    cp_async_wait<0>();
    unit.insert(rows, unit.end_tile, 1);
}

// A warp for each query: the heads of up to 256 lists, eight to a lane.
__global__ void merge(const TopK p, const Key* lists, int64_t spans) {
    const int lane = threadIdx.x % 32;
    const int64_t query = blockIdx.x * int64_t(4) + threadIdx.x / 32;
    if (query >= p.num_queries) return;
    Key heads[kSpansOfLane];
    int64_t next[kSpansOfLane] = {};
    const auto advance = [&](int i) {
        const int64_t span = lane + 32 * i;
        heads[i] = span < spans && next[i] < p.k ? lists[(span * p.num_queries + query) * p.k + next[i]] : 0;
        ++next[i];
    };
#pragma unroll
    for (int i = 0; i < kSpansOfLane; ++i) advance(i);
    for (int64_t rank = 0; rank < p.k; ++rank) {
        Key best = heads[0];
#pragma unroll
        for (int i = 1; i < kSpansOfLane; ++i) best = max(best, heads[i]);
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) best = max(best, shuffle_xor(best, mask));
#pragma unroll
        for (int i = 0; i < kSpansOfLane; ++i)
            if (best && heads[i] == best) advance(i);
        if (lane == 0) {
            p.scores[query * p.k + rank] = best ? score_of(best) : -INFINITY;
            p.indices[query * p.k + rank] = best ? document_of(best) : -1;
        }
    }
}

// Of a single span, in place.
__global__ void unpack(const TopK p) {
    const int64_t at = blockIdx.x * int64_t(256) + threadIdx.x;
    if (at >= p.num_queries * p.k) return;
    const Key key = static_cast<Key>(p.indices[at]);
    p.scores[at] = key ? score_of(key) : -INFINITY;
    p.indices[at] = key ? document_of(key) : -1;
}

template <class T>
Cut cut_for(const TopK& p) {
    const int64_t fit = multiprocessor_shared() / (kSearchBytes + kReservedShared);
    const int64_t blocks = on_hopper() && sizeof(T) == 2 ? 1 : std::clamp<int64_t>(fit, 1, kMostBlocks<T>);
    return Cut(p, multiprocessors() * blocks);
}

template <class T>
void run(const TopK& p) {
    const Cut cut = cut_for<T>(p);
    const Memory memory(p, cut);
    const Matrix<T> queries(p.queries, p.num_queries, p.dim), documents(p.documents, p.num_documents, p.dim);
    const bool shares = cut.spans > 1;
    if (shares) zero(kOp, memory.bars, static_cast<size_t>(memory.lists - memory.bars) * sizeof(Key), p.stream);
    if (!on_hopper() || !sm90::search(p, cut, memory)) {
        const int dim_steps = static_cast<int>(std::max<int64_t>(1, ceil_div(p.dim, kDepth<T>)));
        // A wave after another, because blocks that took several units in a loop would spill registers.
        for (int64_t unit = 0; unit < cut.query_tiles * cut.spans; unit += cut.blocks)
            launch(kOp, search<T>,
                   dim3(static_cast<unsigned>(std::min(cut.blocks, cut.query_tiles * cut.spans - unit))), kTileThreads,
                   kSearchBytes, p.stream, p, cut, memory, queries, documents, dim_steps, static_cast<int>(unit));
    }
    if (shares)
        launch(kOp, merge, dim3(static_cast<unsigned>(ceil_div(p.num_queries, 4))), 128, 0, p.stream, p, memory.lists,
               cut.spans);
    else
        launch(kOp, unpack, dim3(static_cast<unsigned>(ceil_div(p.num_queries * p.k, 256))), 256, 0, p.stream, p);
}

}  // namespace top_k_kernels

int64_t top_k_scratch(const TopK& p) {
    int64_t bytes = 0;
    visit_dtype(p.dtype, [&]<class T>() {
        const top_k_kernels::Cut cut = top_k_kernels::cut_for<T>(p);
        bytes = top_k_kernels::Memory(p, cut).bytes(cut);
    });
    return bytes;
}

void top_k(const TopK& p) {
    if (p.k == 0) return;
    visit_dtype(p.dtype, [&]<class T>() { top_k_kernels::run<T>(p); });
}

}  // namespace qemb::cuda
