// InfoNCE by row panels: R queries meet all columns, scores become weights as they leave the tensor cores, and both
// gradients are plain products with those weights. Three products a kind of columns, nothing recomputed; no
// [num_queries, num_documents] matrix. What queries own never enters a panel: warps score it, one by one.
#include "ops/info_nce.h"

#include "cuda/architecture.h"
#include "cuda/device/vector.h"
#include "cuda/info_nce/gradients.h"
#include "cuda/info_nce/inputs.h"
#include "cuda/info_nce/prefixes.h"
#include "cuda/info_nce/scores.h"
#include "cuda/info_nce/softmax.h"
#include "cuda/sm90/info_nce.h"

namespace qemb::cuda {
namespace info_nce_kernels {

template <class T>
void run(const InfoNce& p) {
    const bool hopper = on_hopper() && sm90::takes<T>(p);
    Panel<T> a(p, hopper);
    const auto zero_out = [&](void* to, int64_t bytes) {
        if (to) zero(kOp, to, static_cast<size_t>(bytes), p.stream);
    };
    zero_out(p.stats, 5 * sizeof(double));
    zero_out(p.d_temperature, sizeof(double));
    zero_out(p.d_queries, p.num_queries * p.dim * int64_t(sizeof(float)));
    zero_out(p.d_documents, p.num_documents * p.dim * int64_t(sizeof(float)));
    const auto start = [&](auto kernel, int64_t blocks, int threads, int shared, const auto&... arguments) {
        launch(kOp, kernel, dim3(static_cast<unsigned>(blocks)), threads, static_cast<size_t>(shared), p.stream, a,
               arguments...);
    };
    if (a.texts || a.roles || a.owners)
        start(derive_documents<T>, ceil_div(p.num_documents, kInputThreads), kInputThreads, 0);
    start(check_positives<T>, ceil_div(p.num_queries, kInputThreads), kInputThreads, 0);
    if (a.prefixes) {
        start(find_norms<T>, ceil_div(p.num_queries, 4), 128, 0, static_cast<const T*>(p.queries), p.num_queries,
              a.query_norm);
        start(find_norms<T>, ceil_div(p.num_documents, 4), 128, 0, static_cast<const T*>(p.documents), p.num_documents,
              a.doc_norm);
        const int64_t bytes = a.gradients() ? a.layers * kTile * int64_t(sizeof(float)) : 0;
        zero_out(a.query_radial_grad, a.query_tiles * bytes);
        zero_out(a.doc_radial_grad, a.doc_tiles * bytes);
    }
    const auto score_tiles = [&](bool of_documents) {
        const int64_t tiles = a.row_tiles * (of_documents ? a.doc_tiles : a.query_tiles);
        const Matrix<T>& columns = of_documents ? a.documents : a.queries;
        const int64_t dim_steps = ceil_div(p.dim, kDepth<T>);
        if (a.prefixes)
            start(score<true, T>, tiles, kTileThreads, kScoreBytes, of_documents, columns, dim_steps);
        else
            start(score<false, T>, tiles, kTileThreads, kScoreBytes, of_documents, columns, dim_steps);
    };
    const auto each_layer = [&](const auto& visit) {  // visit(layer, tiles of its own features)
        for (int layer = 0; layer < a.layers; ++layer) visit(layer, ceil_div(a.ends[layer] - a.begins[layer], kTile));
    };
    for (int64_t row = 0; row < p.num_rows; row += a.rows) {
        a.start_at(row);
        const int64_t padded = a.row_tiles * kTile;
        start(start_rows<T>, ceil_div(a.count, 4), 128, 0);
        if (hopper) {
            sm90::scores(a);
        } else {
            score_tiles(true);
            score_tiles(false);
        }
        start(finish_rows<T>, padded / 32, kRowThreads * 32, kRowThreads * 32 * int(sizeof(double)));
        start(finish_panel<T>, 1, 1024, 256);
        if (!a.gradients()) continue;
        if (a.prefixes) {
            start(merge_rows<T>, ceil_div(a.count, kMergeThreads), kMergeThreads, 0);
            start(merge_layers<T>, a.first_tile[kNumKinds] * a.row_tiles, kMergeThreads, merge_bytes<T>(a.layers));
            start(add_radial_grads<T>, a.layers * (a.doc_tiles + a.query_tiles), kTile, 0);
        }
        start(pack_anchors<T>, a.num_parts * padded, 128, 0, padded);
        if (hopper)
            sm90::row_gradients(a);
        else
            each_layer([&](int layer, int64_t dims) {
                start(row_gradients<T>, a.num_parts * a.splits * a.row_tiles * dims, kTileThreads, kProductBytes<true>,
                      layer, dims);
            });
        start(finish_row_gradients<T>, a.sides * a.count, 128, 0);
        if (hopper) {
            sm90::column_gradients(a);
        } else {
            each_layer([&](int layer, int64_t dims) {
                start(column_gradients<T>, a.doc_tiles * dims, kTileThreads, kProductBytes<true>, layer, true, dims);
                start(column_gradients<T>, a.query_tiles * dims, kTileThreads, kProductBytes<true>, layer, false, dims);
            });
        }
        start(own_gradients<T>, a.owns ? a.count : 0, 128, 0);
        start(positive_gradients<T>, a.count, 128, 0);
    }
    if (a.prefixes && a.gradients())
        start(finish_columns<T>, (a.doc_tiles > 0 ? p.num_documents : 0) + (a.query_tiles > 0 ? a.queries.rows : 0),
              128, 0);
}

}  // namespace info_nce_kernels

int64_t info_nce_scratch(const InfoNce& p) {
    int64_t bytes = 0;
    visit_dtype(p.dtype, [&]<class T>() {
        bytes = info_nce_kernels::Panel<T>(p, on_hopper() && sm90::takes<T>(p)).scratch_bytes;
    });
    return bytes;
}

void info_nce(const InfoNce& p) {
    visit_dtype(p.dtype, [&]<class T>() { info_nce_kernels::run<T>(p); });
}

}  // namespace qemb::cuda
