// InfoNCE on the CPU by row panels: R queries meet all columns, the panel of weights E = exp(logit - max) is written
// once and read twice, and both gradients are plain products with it. Per kind of columns: three products, nothing
// recomputed.
#include "ops/info_nce.h"
#include "cpu/kernels/info_nce/gradients.h"
#include "cpu/kernels/info_nce/scores.h"
#include "cpu/kernels/isa.h"

namespace qemb::cpu::QEMB_ISA {
namespace info_nce_kernels {

template <class T>
void zero(void* to, int64_t count) {
    constexpr int64_t kBlock = 1 << 16;
    T* const values = static_cast<T*>(to);
    parallel_for(ceil_div(count, kBlock), [&](int64_t item) {
        for (int64_t i = item * kBlock; i < min_of((item + 1) * kBlock, count); ++i) values[i] = 0;
    });
}

// Calls visit(row) for the rows of the panel, a few to a work item.
template <class T, class Visit>
void each_row(const Panel<T>& a, Visit visit) {
    constexpr int64_t kRows = 8;
    parallel_for(ceil_div(a.count, kRows), [&](int64_t item) {
        for (int64_t r = item * kRows; r < min_of((item + 1) * kRows, a.count); ++r) visit(r);
    });
}

template <class T>
void add_stats(const Panel<T>& a, const TileStats& stats) {
    a.p.stats[1] += stats.kept_score;
    a.p.stats[2] += static_cast<double>(stats.kept_query_document);
    a.p.stats[3] += static_cast<double>(stats.kept);
    a.p.stats[4] += static_cast<double>(stats.dropped);
}

template <class T>
void gradients(const Panel<T>& a) {
    if (a.scaled) parallel_for(a.num_tiles, [&](int64_t tile) { to_coefficients(a, tile); });
    parallel_for(a.sides, [&](int64_t side) { pack_anchors(a, static_cast<int>(side)); });
    int64_t blocks = 0;  // of features, each within a segment
    for (int64_t k = 0; k < a.layers; ++k) blocks += ceil_div(a.segments[k].width, kFeatures);
    const int64_t rows = round_up(ceil_div(a.count, ceil_div(num_threads(), blocks)), kTileRows);
    parallel_for(blocks * ceil_div(a.count, rows), [&](int64_t item) {
        int64_t block = item % blocks, k = 0;
        for (; block >= ceil_div(a.segments[k].width, kFeatures); ++k)
            block -= ceil_div(a.segments[k].width, kFeatures);
        const int64_t row = item / blocks * rows, from = block * kFeatures;
        row_gradients(a, row, min_of(rows, a.count - row), k, from, min_of(kFeatures, a.segments[k].width - from));
    });
    each_row(a, [&](int64_t r) { finish_row_gradients(a, r); });
    const int64_t doc_tiles = ceil_div(a.p.num_documents, kTile);
    parallel_for(doc_tiles + a.tiles[kQueries], [&](int64_t i) {
        if (i < doc_tiles)
            document_gradients(a, i);
        else
            column_gradients(a, kQueries, i - doc_tiles);
    });
}

template <class T>
void run(const InfoNce& p) {
    for (int i = 0; i < 5; ++i) p.stats[i] = 0;
    if (p.d_temperature) *p.d_temperature = 0;
    if (p.d_queries) zero<T>(p.d_queries, p.num_queries * p.dim);
    if (p.d_documents) zero<T>(p.d_documents, p.num_documents * p.dim);
    if (p.num_rows == 0) return;
    Panel<T> a(p);
    if (a.prefixes) {
        load_column_norms(a, kQueryDocument);
        if (a.scored[kQueries]) load_column_norms(a, kQueries);
    }
    const int64_t doc_tiles = max_of(a.tiles[kQueryDocument], a.tiles[kDocDoc]);
    const Kind of_queries = kQueries;
    for (int64_t row = 0; row < p.num_rows; row += a.rows) {
        a.start_at(row);
        parallel_for(ceil_div(a.count, kTileRows), [&](int64_t i) { load_anchors(a, i * kTileRows); });
        each_row(a, [&](int64_t r) { score_own(a, r); });
        parallel_for(doc_tiles + a.tiles[kQueries], [&](int64_t i) {
            if (i < doc_tiles)
                score_documents(a, i);
            else
                score_tile(a, &of_queries, 1, i - doc_tiles);
        });
        each_row(a, [&](int64_t r) { find_offsets(a, r); });
        parallel_for(a.num_tiles, [&](int64_t tile) { exponentiate(a, tile); });
        each_row(a, [&](int64_t r) { finish_row(a, r); });
        for (int64_t r = 0; r < a.count; ++r) {
            p.stats[0] += a.score[r * a.layers + a.layers - 1];
            if (p.d_temperature) *p.d_temperature += a.d_tau[r];
            add_stats(a, a.row_stats[r]);
        }
        for (int64_t tile = 0; tile < a.num_tiles; ++tile) add_stats(a, a.tile_stats[tile]);
        if (a.gradients()) gradients(a);
    }
}

}  // namespace info_nce_kernels

void info_nce(const InfoNce& p) {
    if (p.dtype == DType::kFloat64)
        info_nce_kernels::run<double>(p);
    else
        info_nce_kernels::run<float>(p);
}

}  // namespace qemb::cpu::QEMB_ISA
