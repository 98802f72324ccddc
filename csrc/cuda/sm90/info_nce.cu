// InfoNCE on Hopper: the three products of a panel by wgmma. Blocks of the scores stay on their multiprocessor and take
// tile after tile, so that the copy engine fetches the next while this one is masked and weighted.
#include "cuda/sm90/info_nce.h"

#include "cuda/sm90/info_nce/scores.h"

namespace qemb::cuda::sm90 {
namespace {

// The staging of weights: two copies, one is written while the copy engine reads the other; of prefixes one, which
// leaves room for the bits of their layers.
template <bool kPrefixes>
struct ScoreLayout {
    static constexpr int kLayers = kPrefixes ? kMaxLayers : 1, kCopies = kPrefixes ? 1 : 2;
    static constexpr int kStaging = kStages * kStageBytes<false>, kMemory = kStaging + kCopies * kStagedBytes,
                         kMemoryBytes =
                             static_cast<int>(sizeof(ScoreMemory) + (kLayers - 1) * sizeof(ScoreMemory::over)),
                         kBarriers = kMemory + (kMemoryBytes + 15) / 16 * 16, kBytes = kBarriers + StageRing::kBytes;
    static_assert(kBytes <= 227 * 1024);
};

// A block for each row: its positive, where the copy engine can fetch it.
template <class T>
__global__ void gather_positives(const Panel<T> a) {
    const int64_t row = blockIdx.x, from = a.positive(row);
    for (int64_t d = threadIdx.x; d < a.p.dim; d += 128)
        a.positives[row * a.p.dim + d] = a.documents.data[from * a.p.dim + d];
}

// A block of 128 threads for each tile: of which kinds of columns do limits alone decide, by bits? Not where a row
// meets its own positive or documents or a text of its own, nor where columns belong to none of the groups, or to
// groups that differ.
template <class T>
__global__ void __launch_bounds__(kTile) mark_plain_tiles(const Panel<T> a) {
    auto* const texts = reinterpret_cast<int64_t*>(shared_bytes());
    int* const found = reinterpret_cast<int*>(texts + kTile);
    const InfoNce& p = a.p;
    const int64_t row0 = blockIdx.x % a.row_tiles * kTile, tile = blockIdx.x / a.row_tiles;
    const bool of_queries = tile >= a.doc_tiles;
    const int64_t column = (of_queries ? tile - a.doc_tiles : tile) * kTile + threadIdx.x;
    const int rows = static_cast<int>(min(a.count - row0, int64_t(kTile)));
    if (static_cast<int>(threadIdx.x) < rows) texts[threadIdx.x] = p.query_text[a.query(row0 + threadIdx.x)];
    sync_block();
    int plain = 0;
    bool met = false;  // by a row that has its text, as the row of a positive does
    if (of_queries && column < a.queries.rows) {
        const int64_t query = p.first_column + column, row = query - a.query(row0);
        const int64_t text = p.query_text[query];
        for (int i = 0; i < rows; ++i) met |= texts[i] == text;
        plain = !met && (row < 0 || row >= rows) ? 1 << kQueries : 0;
    } else if (!of_queries && column < p.num_documents) {
        const int64_t owner = p.owner[column] - a.query(row0);
        const Role role = static_cast<Role>(p.role[column]);
        const bool alone = role != Role::kAbsent && (owner < 0 || owner >= rows);
        const int64_t text = p.document_text[column];
        for (int i = 0; i < rows; ++i) met |= texts[i] == text;
        for (const Kind kind : {kQueryDocument, kDocDoc}) {
            const bool second = role == Role::kHard;
            const bool one_group = a.same_groups[kind] || !second;
            if (alone && !met && one_group && p.options.groups[group_of(kind, role)].on) plain |= 1 << kind;
        }
    }
    for (int kind = 0; kind < kNumKinds; ++kind)
        if (any_lane(!(plain & 1 << kind))) plain &= ~(1 << kind);
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = plain;
    sync_block();
    if (threadIdx.x == 0) a.plain[tile * a.row_tiles + row0 / kTile] = found[0] & found[1] & found[2] & found[3];
}

// What the blocks of a sweep share: units of 128 rows and two tiles of columns, each scored by the queries, by their
// positives, or by both.
struct Sweep {
    int column_tiles, row_tiles, units;
    bool of_documents, by_queries, by_positives;

    template <class T>
    Sweep(const Panel<T>& a, bool of_documents)
        : column_tiles(static_cast<int>(of_documents ? a.doc_tiles : a.query_tiles)),
          row_tiles(static_cast<int>(a.row_tiles)),
          units((column_tiles + 1) / 2 * row_tiles),
          of_documents(of_documents),
          by_queries(!of_documents || a.dense[kQueryDocument] || a.by_query),
          by_positives(of_documents && a.dense[kDocDoc]) {}

    QEMB_DEVICE int row0(int unit) const { return unit % row_tiles * kTile; }
    QEMB_DEVICE int first_tile(int unit) const { return unit / row_tiles * 2; }
};

// Of the depth, in a layer's own features.
template <class T>
QEMB_DEVICE int steps_of(const Panel<T>& a, int layer) {
    return static_cast<int>((a.ends[layer] - a.begins[layer] + kStepDepth - 1) / kStepDepth);
}

template <bool kPrefixes, class T>
QEMB_DEVICE void consume_scores(const Panel<T>& a, const Sweep& sweep, StageRing ring, uint32_t stages,
                                const TensorMap& weights) {
    using L = ScoreLayout<kPrefixes>;
    ScoreMemory& memory = *reinterpret_cast<ScoreMemory*>(shared_bytes() + L::kMemory);
    const auto halves_of = [&](int unit) { return min(sweep.column_tiles - sweep.first_tile(unit), 2); };
    // By a thread for each half of a unit that all have finished.
    const auto write_tally = [&](int unit) {
        if (static_cast<int>(threadIdx.x) >= halves_of(unit)) return;
        const int64_t tile = sweep.first_tile(unit) + static_cast<int>(threadIdx.x);
        a.tallies[(sweep.of_documents ? tile : a.doc_tiles + tile) * a.row_tiles + sweep.row0(unit) / kTile] =
            sum_of(memory.tally[threadIdx.x]);
        for (int warp = 0; warp < kConsumers / 32; ++warp) memory.tally[threadIdx.x][warp] = {};
    };
    if (threadIdx.x % 32 < 2) memory.tally[threadIdx.x % 32][threadIdx.x / 32] = {};
    uint32_t turn = 0;  // of the staging
    int last = -1;      // the unit whose tally is not written
    for (int unit = blockIdx.x; unit < sweep.units; unit += gridDim.x) {
        const int row0 = sweep.row0(unit), first_tile = sweep.first_tile(unit), halves = halves_of(unit);
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
            if (!(pass ? sweep.by_positives : sweep.by_queries)) continue;
            const Kind kind = !sweep.of_documents ? kQueries : pass ? kDocDoc : kQueryDocument;
            HalfSums low, high;
#pragma unroll 1
            for (int layer = 0; layer < (kPrefixes ? a.layers : 1); ++layer) {
                const int steps = steps_of(a, layer);
                bool plain[2] = {};
                // Between two barriers, all have finished the tile before, and none has begun with this one.
                const auto describe_tile = [&] {
                    barrier_sync(kMasksBarrier, kConsumers);
                    if (last >= 0) write_tally(last);
                    last = -1;
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        if (half >= halves) continue;
                        const int64_t column_tile = first_tile + half,
                                      tile_of_all = kind == kQueries ? a.doc_tiles + column_tile : column_tile;
                        load_masks<kPrefixes>(a, kind, layer, row0, column_tile * kTile, memory.masks[half]);
                        plain[half] =
                            a.count - row0 >= kTile && (a.plain[tile_of_all * a.row_tiles + row0 / kTile] & 1 << kind);
                    }
                    barrier_sync(kMasksBarrier, kConsumers);
                };
                multiply<T>(low, high, ring, stages, steps, kPrefixes && layer > 0,
                            kPrefixes ? static_cast<int>(a.ends[layer] - a.begins[layer]) - (steps - 1) * kStepDepth
                                      : kStepDepth,
                            describe_tile);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (half >= halves) continue;
                    finish_half<kPrefixes>(a, kind, layer, row0, first_tile + half, plain[half], half ? high : low,
                                           half, memory, stages + L::kStaging + turn * kStagedBytes, weights);
                    if (L::kCopies > 1 && a.dense[kind] && a.p.d_documents) turn ^= 1;
                }
            }
        }
        last = unit;
    }
    barrier_sync(kMasksBarrier, kConsumers);
    write_tally(last);
    if (threadIdx.x % 128 == 0) bulk_wait_read<0>();
}

template <bool kPrefixes, class T>
__global__ void __launch_bounds__(kThreads, 1)
    score_tiles(const Panel<T> a, const Sweep sweep, const QEMB_GRID_CONSTANT TensorMap queries,
                const QEMB_GRID_CONSTANT TensorMap positives, const QEMB_GRID_CONSTANT TensorMap columns,
                const QEMB_GRID_CONSTANT TensorMap weights) {
    const uint32_t stages = shared_address(shared_bytes());
    StageRing ring{stages + ScoreLayout<kPrefixes>::kBarriers};
    const auto produce = [&] {
        for (int unit = blockIdx.x; unit < sweep.units; unit += gridDim.x) {
            const int row0 = sweep.row0(unit), column0 = sweep.first_tile(unit) * kTile;
            for (int pass = 0; pass < 2; ++pass) {
                if (!(pass ? sweep.by_positives : sweep.by_queries)) continue;
                for (int layer = 0; layer < (kPrefixes ? a.layers : 1); ++layer) {
                    const int begin = static_cast<int>(a.begins[layer]);
                    fill_stages<false>(ring, stages, steps_of(a, layer), 0,
                                       [&](int step, uint32_t stage, uint32_t barrier) {
                                           const int feature = begin + step * kStepDepth;
                                           tma_load(stage, pass ? positives : queries, barrier, {feature, row0});
                                           tma_load(stage + kLeftBytes, columns, barrier, {feature, column0});
                                       });
                }
            }
        }
    };
    by_role([&] { ring.init(2); }, produce, [&] { consume_scores<kPrefixes>(a, sweep, ring, stages, weights); });
}

constexpr int kProductBarriers = kStages * kStageBytes<true>, kProductBytes90 = kProductBarriers + StageRing::kBytes;

// 128 anchors, 256 features of a layer beyond those of the one before, one of the splits of a part's columns: sum_j
// E[r, j] * column_j.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    sum_rows(const Panel<T> a, int layer, int64_t dim_tiles, const QEMB_GRID_CONSTANT TensorMap weights,
             const QEMB_GRID_CONSTANT TensorMap queries, const QEMB_GRID_CONSTANT TensorMap documents) {
    constexpr int kSteps = kTile / kStepDepth;  // of a tile of columns
    const int64_t row0 = blockIdx.x / dim_tiles % a.row_tiles * kTile;
    const int feature0 = static_cast<int>(a.begins[layer] + blockIdx.x % dim_tiles * kColumns);
    const int64_t split = blockIdx.x / dim_tiles / a.row_tiles;  // of all parts
    const Kind kind = a.parts[split / a.splits];
    const int64_t first_of_kind = a.tile_of(layer, kind, 0), tiles = a.first_tile[kind + 1] - a.first_tile[kind];
    const int64_t tiles_of_split = (tiles + a.splits - 1) / a.splits, first_tile = split % a.splits * tiles_of_split;
    const int64_t steps = max(int64_t(0), min(tiles_of_split, tiles - first_tile)) * kSteps;
    const uint32_t stages = shared_address(shared_bytes());
    StageRing ring{stages + kProductBarriers};
    const auto produce = [&] {
        constexpr int kFactorBytes = kTile * sizeof(T);
        fill_stages<true>(ring, stages, steps, kFactorBytes, [&](int64_t step, uint32_t stage, uint32_t barrier) {
            const int64_t tile = first_tile + step / kSteps;
            const int column = static_cast<int>(tile * kTile + step % kSteps * kStepDepth);
            tma_load(stage, weights, barrier,
                     {static_cast<int>(first_of_kind) * kTile + column, static_cast<int>(row0)});
#pragma unroll
            for (int panel = 0; panel < kColumns / 64; ++panel)
                tma_load(stage + kLeftBytes + panel * kStepDepth * 128, kind == kQueries ? queries : documents, barrier,
                         {feature0 + panel * 64, column});
            bulk_load(stage + kLoadedBytes, a.factors + (first_of_kind + tile) * a.rows + row0, kFactorBytes, barrier);
        });
    };
    const auto consume = [&] {
        Sums sums;
        multiply_scaled<T, Depth::kAlong>(sums, ring, shared_bytes(), stages, steps);
        float* const to = a.partial + (split * a.rows + row0) * a.p.dim;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int64_t d = feature0 + pair_column(n);
                float* const pair = to + (first_row() + 8 * i) * a.p.dim + d;
                if (d < a.ends[layer]) {
                    pair[0] = steps > 0 ? sums[4 * n + 2 * i] : 0.0f;
                    pair[1] = steps > 0 ? sums[4 * n + 2 * i + 1] : 0.0f;
                }
            }
    };
    by_role([&] { ring.init(kConsumers / 32); }, produce, consume);
}

// 128 columns, 256 features of a layer: sum_r E[r, j] * weight_r * anchor_r, over the queries and, for documents, their
// positives; `first` is the first of the kinds. The copy engine adds them to the gradient: an element of it has one
// owner, so the order is always the same.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    sum_columns(const Panel<T> a, int layer, Kind first, int64_t dim_tiles, const QEMB_GRID_CONSTANT TensorMap weights,
                const QEMB_GRID_CONSTANT TensorMap first_packed, const QEMB_GRID_CONSTANT TensorMap second_packed,
                const QEMB_GRID_CONSTANT TensorMap gradient) {
    const int64_t tile = blockIdx.x / dim_tiles, steps = a.row_tiles * (kTile / kStepDepth);
    const int feature0 = static_cast<int>(a.begins[layer] + blockIdx.x % dim_tiles * kColumns);
    const bool both = first == kQueryDocument && a.dense[kDocDoc];
    const uint32_t stages = shared_address(shared_bytes());
    StageRing ring{stages + kProductBarriers};
    const auto produce = [&] {
        constexpr int kFactorBytes = kStepDepth * sizeof(T);
        fill_stages<true>(
            ring, stages, both ? 2 * steps : steps, kFactorBytes, [&](int64_t step, uint32_t stage, uint32_t barrier) {
                const bool is_first = step < steps;
                const int64_t row = (is_first ? step : step - steps) * kStepDepth,
                              at = a.tile_of(layer, is_first ? first : kDocDoc, tile);
#pragma unroll
                for (int panel = 0; panel < kTile / 64; ++panel)
                    tma_load(stage + panel * kStepDepth * 128, weights, barrier,
                             {static_cast<int>(at) * kTile + panel * 64, static_cast<int>(row)});
#pragma unroll
                for (int panel = 0; panel < kColumns / 64; ++panel)
                    tma_load(stage + kLeftBytes + panel * kStepDepth * 128, is_first ? first_packed : second_packed,
                             barrier, {feature0 + panel * 64, static_cast<int>(row)});
                bulk_load(stage + kLoadedBytes, a.factors + at * a.rows + row, kFactorBytes, barrier);
            });
    };
    const auto consume = [&] {
        Sums sums;
        multiply_scaled<T, Depth::kAcross>(sums, ring, shared_bytes(), stages, both ? 2 * steps : steps);

        // The stages are free: boxes of 32 features and this warpgroup's 64 columns
        const float unit = *a.unit;
        const int own = static_cast<int>(a.ends[layer]) - feature0;  // features; to others zero is added
        const int group = threadIdx.x / 128, row = first_row() % 64;
        const uint32_t staging = stages + group * (kColumns / 32) * 64 * 128;
        barrier_sync(kMasksBarrier, kConsumers);
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int at_row = row + 8 * i, word = n % 4 * 8 + threadIdx.x % 4 * 2 + j;
                    shared_store4(
                        staging + n / 4 * 64 * 128 + at_row * 128 + ((word / 4 ^ at_row % 8) << 4) + word % 4 * 4,
                        __builtin_bit_cast(uint32_t, pair_column(n) + j < own ? unit * sums[4 * n + 2 * i + j] : 0));
                }
        fence_async();
        barrier_sync(kGroupBarrier + group, 128);
        if (threadIdx.x % 128 > 0) return;
#pragma unroll
        for (int box = 0; box < kColumns / 32; ++box)
            if (box * 32 < own)
                tma_add(gradient, staging + box * 64 * 128,
                        {feature0 + box * 32, static_cast<int>(tile) * kTile + group * 64});
        bulk_commit();
        bulk_wait_read<0>();
    };
    by_role([&] { ring.init(kConsumers / 32); }, produce, consume);
}

template <class T, class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), const Panel<T>& a, int64_t blocks, int threads, int shared,
           const Arguments&... arguments) {
    launch(kOp, kernel, dim3(static_cast<unsigned>(blocks)), threads, static_cast<size_t>(shared), a.p.stream, a,
           arguments...);
}

// takes() has seen that the maps can be made.
template <class T>
TensorMap map_of(const void* data, int64_t rows, int64_t columns, int box_rows) {
    TensorMap map{};
    if (rows > 0 && columns > 0 && !make_matrix_map<T>(map, data, rows, columns, box_rows))
        throw std::runtime_error("[info_nce] the driver refuses a tensor map");
    return map;
}
template <class T>
TensorMap weights_map(const Panel<T>& a, int box_rows) {
    return a.gradients() ? map_of<T>(a.weights, a.row_tiles * kTile, a.num_tiles() * kTile, box_rows) : TensorMap{};
}

}  // namespace

template <class T>
bool takes(const InfoNce& p) {
    for (int64_t layer = 0; layer < p.num_dims; ++layer)
        if (p.dims[layer] % 2) return false;  // words of shared memory are cleared
    if (sizeof(T) != 2 || p.num_queries == 0 || p.num_documents == 0 || p.num_rows == 0) return false;
    TensorMap map;
    return make_matrix_map<T>(map, p.queries, p.num_queries, p.dim, kTile) &&
           make_matrix_map<T>(map, p.documents, p.num_documents, p.dim, kTile) &&
           (!p.d_documents || (reinterpret_cast<uintptr_t>(p.d_documents) % 16 == 0 &&
                               reinterpret_cast<uintptr_t>(p.d_queries) % 16 == 0));
}

template <class T>
void scores(const Panel<T>& a) {
    if (a.dense[kDocDoc]) start(gather_positives<T>, a, a.count, 128, 0);
    start(mark_plain_tiles<T>, a, (a.doc_tiles + a.query_tiles) * a.row_tiles, kTile, kTile * 8 + 16);
    const TensorMap queries = map_of<T>(a.anchors[0].data, a.count, a.p.dim, kTile), weights = weights_map(a, 64);
    const TensorMap positives = a.dense[kDocDoc] ? map_of<T>(a.positives, a.count, a.p.dim, kTile) : queries;
    for (const bool of_documents : {true, false}) {
        const Sweep sweep(a, of_documents);
        const Matrix<T>& columns = of_documents ? a.documents : a.queries;
        const auto run = [&](auto kernel, int bytes) {
            start(kernel, a, resident_blocks(sweep.units).x, kThreads, bytes, sweep, queries, positives,
                  map_of<T>(columns.data, columns.rows, a.p.dim, kColumns), weights);
        };
        if (a.prefixes)
            run(score_tiles<true, T>, ScoreLayout<true>::kBytes);
        else
            run(score_tiles<false, T>, ScoreLayout<false>::kBytes);
    }
}

template <class T>
void row_gradients(const Panel<T>& a) {
    for (int layer = 0; layer < a.layers; ++layer) {
        const int64_t dim_tiles = ceil_div(a.ends[layer] - a.begins[layer], kColumns);
        start(sum_rows<T>, a, a.num_parts * a.splits * a.row_tiles * dim_tiles, kThreads, kProductBytes90, layer,
              dim_tiles, weights_map(a, kTile), map_of<T>(a.queries.data, a.queries.rows, a.p.dim, kStepDepth),
              map_of<T>(a.documents.data, a.documents.rows, a.p.dim, kStepDepth));
    }
}

template <class T>
void column_gradients(const Panel<T>& a) {
    const auto packed = [&](Kind kind) {
        return a.dense[kind] ? map_of<T>(a.packed[kind], a.row_tiles * kTile, a.packed_dim, kStepDepth) : TensorMap{};
    };
    const auto sum = [&](Kind first, int64_t tiles, int64_t rows, void* to) {
        if (tiles == 0) return;
        TensorMap gradient;
        if (!make_tensor_map<float>(gradient, {.base = to,
                                               .rank = 2,
                                               .size = {a.p.dim, rows},
                                               .byte_stride = {0, a.p.dim * 4},
                                               .box = {32, 64},
                                               .swizzled = true}))
            throw std::runtime_error("[info_nce] the driver refuses a tensor map");
        for (int layer = 0; layer < a.layers; ++layer) {
            const int64_t dim_tiles = ceil_div(a.ends[layer] - a.begins[layer], kColumns);
            start(sum_columns<T>, a, tiles * dim_tiles, kThreads, kProductBytes90, layer, first, dim_tiles,
                  weights_map(a, kStepDepth), packed(first), packed(kDocDoc), gradient);
        }
    };
    sum(a.dense[kQueryDocument] ? kQueryDocument : kDocDoc, a.doc_tiles, a.documents.rows, a.p.d_documents);
    sum(kQueries, a.query_tiles, a.queries.rows, static_cast<float*>(a.p.d_queries) + a.p.first_column * a.p.dim);
}

template bool takes<BFloat16>(const InfoNce&);
template bool takes<Float16>(const InfoNce&);
template <>
bool takes<float>(const InfoNce&) {
    return false;
}
#define QEMB_INSTANTIATE(name) \
    template void name(const Panel<BFloat16>&); \
    template void name(const Panel<Float16>&); \
    template <> \
    void name(const Panel<float>&) {}
QEMB_INSTANTIATE(scores)
QEMB_INSTANTIATE(row_gradients)
QEMB_INSTANTIATE(column_gradients)
#undef QEMB_INSTANTIATE

}  // namespace qemb::cuda::sm90
