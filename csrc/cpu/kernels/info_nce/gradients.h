// Gradients of a panel: plain products with its weights, segment by segment of the features. What a row owns is added
// by itself.
#pragma once

#include "cpu/kernels/info_nce/softmax.h"

namespace qemb::cpu::QEMB_ISA::info_nce_kernels {

// Weights of a tile become coefficients of the raw vectors: for each segment the sum over the layers that contain it.
// Normalising a prefix takes from the gradient what lies along it: columns need the sum of coefficient * score, the
// score out of its weight.
template <class T>
void to_coefficients(const Panel<T>& a, int64_t tile) {
    const Kind kind = a.kind_of(tile);
    if (!a.dense[kind]) return;
    const int64_t start = (tile - a.first_tile[kind]) * kTile, count = a.columns_in(kind, tile - a.first_tile[kind]);
    const int s = a.softmax_of(kind), side = side_of(kind);
    T* const norms = static_cast<T*>(scratch_bytes(Slot::kTile, static_cast<size_t>(a.layers * kTile) * sizeof(T)));
    for (int64_t k = 0; k < a.layers; ++k)
        for (int64_t j = 0; j < kTile; ++j)
            norms[k * kTile + j] =
                !a.prefixes || j >= count ? T(1) : a.column_norm[kind == kQueries][(start + j) * a.layers + k];
    Scales<T> scales;
    fill_scales(a, tile, scales);
    for (T& scale : scales.high) scale = 1 / scale;
    T* const radial_grad = a.column_radial_grad + tile * a.layers * kTile;
    for (int64_t i = 0; a.prefixes && i < a.layers * kTile; ++i) radial_grad[i] = 0;
    for (int64_t r = 0; r < a.count; ++r)
        for (int64_t j = 0; j < kTile; j += kLanes<T>) {
            Vec<T> total{};
            for (int64_t k = a.layers - 1; k >= 0; --k) {
                T* const values = a.weights(tile, k) + r * kTile + j;
                const Softmax& softmax = a.softmax(r, k, s);
                const Vec<T> weight = load(values), coefficient = weight * static_cast<T>(softmax.weight);
                if (a.prefixes) {
                    const Vec<T> score = (log2<T>(weight) + static_cast<T>(softmax.offset)) * load(scales.high + j);
                    T* const sum = radial_grad + k * kTile + j;
                    store(sum, load(sum) + (weight > T(0) ? coefficient * score : Vec<T>{}));
                }
                total += coefficient * (load(norms + k * kTile + j) * a.anchor_norm[side][r * a.layers + k]);
                store(values, total);
            }
        }
    if (!a.prefixes) return;
    for (int64_t j = 0; j < kTile; ++j) {
        T total = 0;
        for (int64_t k = a.layers - 1; k >= 0; --k) {
            total += radial_grad[k * kTile + j] * norms[k * kTile + j] * norms[k * kTile + j];
            radial_grad[k * kTile + j] = total;
        }
    }
}

// The anchors as right operands, by segments.
template <class T>
void pack_anchors(const Panel<T>& a, int side) {
    T* weights = static_cast<T*>(scratch_bytes(Slot::kTile, static_cast<size_t>(a.rows) * sizeof(T)));
    for (int64_t r = 0; r < a.count; ++r) weights[r] = static_cast<T>(a.softmax(r, 0, 0).weight);
    for (int64_t k = 0; k < a.layers; ++k)
        pack_rows(a.anchor[side] + a.segments[k].begin, a.dim, a.count, a.segments[k].width,
                  a.packed[side] + a.segments[k].padded * a.rows, a.scaled ? nullptr : weights);
}

// y[segment] += scale * x[segment] for all segments, x and y rows of raw features; scale(k) by segment.
template <class T, class Scale>
QEMB_INLINE void add_segments(const Panel<T>& a, T* y, const T* x, Scale scale) {
    for (int64_t k = 0; k < a.layers; ++k)
        add_scaled(y + a.segments[k].begin, x + a.segments[k].begin, static_cast<T>(scale(k)), a.segments[k].width);
}

// Rows [row, row + count), features [from, from + width) of segment k: sums over the dense columns, for both anchors.
template <class T>
void row_gradients(const Panel<T>& a, int64_t row, int64_t count, int64_t k, int64_t from, int64_t width) {
    const int64_t feature = a.segments[k].begin + from, at = a.segments[k].padded + from;
    T* block = static_cast<T*>(scratch_bytes(
        Slot::kTile, static_cast<size_t>(kTile * kFeatures + panel_size<T>(kTile, kFeatures)) * sizeof(T)));
    T* panels = block + kTile * kFeatures;
    bool more[2] = {};
    const auto add = [&](Kind kind, int64_t i, int64_t depth) {
        if (!a.dense[kind]) return;
        const int side = side_of(kind);
        gemm(count, width, depth, by_rows(a.weights(a.first_tile[kind] + i, k) + row * kTile, kTile), panels,
             a.row_grad[side] + row * a.padded + at, a.padded, more[side]);
        more[side] = true;
    };
    for (const Kind kind : {kQueryDocument, kQueries}) {
        const bool both = kind == kQueryDocument && a.dense[kDocDoc];
        if (!a.dense[kind] && !both) continue;
        for (int64_t i = 0; i < ceil_div(a.num_columns(kind), kTile); ++i) {
            const int64_t depth = a.columns_in(kind, i);
            for (int64_t j = 0; j < depth; ++j)
                load_row(a.p.dtype, a.columns_of(kind), (i * kTile + j) * a.dim + feature, block + j * kFeatures,
                         width);
            pack_rows(block, kFeatures, depth, width, panels);
            add(kind, i, depth);
            if (both) add(kDocDoc, i, depth);
        }
    }
    for (int side = 0; side < a.sides; ++side)
        for (int64_t r = row; r < row + count && !more[side]; ++r)
            for (int64_t f = 0; f < width; ++f) a.row_grad[side][r * a.padded + at + f] = 0;
}

// What is left of the gradients of a row: weights, the documents it owns, its positive, the normalisation. Queries are
// done then; row_grad[1] is that of the positive as an anchor.
template <class T>
void finish_row_gradients(const Panel<T>& a, int64_t r) {
    const T weight = a.scaled ? T(1) : static_cast<T>(a.softmax(r, 0, 0).weight);
    T* const d_query = static_cast<T*>(a.p.d_queries) + a.query(r) * a.dim;
    T* const buffer = static_cast<T*>(scratch_bytes(Slot::kTile, static_cast<size_t>(a.dim + a.padded) * sizeof(T)));
    T* const sums = a.row_grad[1] + r * a.padded;
    for (int64_t i = 0; a.sides == 2 && i < a.padded; ++i) sums[i] *= weight;
    for (int64_t k = 0; k < a.layers; ++k)
        add_scaled(d_query + a.segments[k].begin, a.row_grad[0] + r * a.padded + a.segments[k].padded, weight,
                   a.segments[k].width);
    add_segments(a, d_query, a.anchor[1] + r * a.dim,
                 [&](int64_t k) { return a.d_positive_score_sum[r * a.layers + k]; });
    if (a.prefixes)
        add_segments(a, d_query, a.anchor[0] + r * a.dim,
                     [&](int64_t k) { return -a.radial_grad[0][r * a.layers + k]; });
    for (int64_t e = a.own_end(a.first + r); e < a.own_end(a.first + r + 1); ++e) {
        const Own* own = a.own + (e - a.entries_first) * a.layers;
        const T* document = read(a.p.dtype, a.p.documents, a.p.own_documents[e] * a.dim, a.dim, buffer);
        add_segments(a, d_query, document, [&](int64_t k) { return own[k].weight[0]; });
        for (int64_t k = 0; a.p.options.groups[kDocOwn].on && k < a.layers; ++k)
            add_scaled(sums + a.segments[k].padded, document + a.segments[k].begin, static_cast<T>(own[k].weight[1]),
                       a.segments[k].width);
    }
}

// grad[start + j, :] += sum_r coefficient[r, j] * anchor[r], a tile of columns, segment by segment
template <class T>
void column_gradients(const Panel<T>& a, Kind kind, int64_t i) {
    const int64_t tile = a.first_tile[kind] + i, count = a.columns_in(kind, i);
    T* const grad = static_cast<T*>(kind == kQueries ? a.p.d_queries : a.p.d_documents) + i * kTile * a.dim;
    T* const product = static_cast<T*>(scratch_bytes(
        Slot::kTile,
        static_cast<size_t>(kTile * a.padded + left_size<T>(kTile + kTileRows, a.rows) + a.dim) * sizeof(T)));
    T* const lefts = product + kTile * a.padded;
    T* const buffer = lefts + left_size<T>(kTile + kTileRows, a.rows);
    for (int64_t k = 0; k < a.layers; ++k) {
        const Segment& segment = a.segments[k];
        const bool is_narrow =
            segment.width <= 2 * kPanel<T>;  // packed, it would be read no more often than packing reads
        const Left<T> coefficients = by_columns(a.weights(tile, k), kTile);
        if (!is_narrow) pack_left(coefficients, count, a.count, lefts);
        gemm(count, segment.width, a.count, is_narrow ? coefficients : by_tiles(lefts, a.count),
             a.packed[side_of(kind)] + segment.padded * a.rows, product + segment.padded, a.padded, false);
        for (int64_t j = 0; j < count; ++j)
            add_scaled(grad + j * a.dim + segment.begin, product + j * a.padded + segment.padded, T(1), segment.width);
    }
    const T* const radial_grad = a.column_radial_grad + tile * a.layers * kTile;
    for (int64_t j = 0; a.prefixes && j < count; ++j)
        add_segments(a, grad + j * a.dim, read(a.p.dtype, a.columns_of(kind), (i * kTile + j) * a.dim, a.dim, buffer),
                     [&](int64_t k) { return -radial_grad[k * kTile + j]; });
}

// A tile of documents: as positives of the panel's rows, as what they own, as everybody's candidates.
template <class T>
void document_gradients(const Panel<T>& a, int64_t i) {
    T* const grads = static_cast<T*>(a.p.d_documents);
    for (int64_t r = 0; r < a.count; ++r) {
        if (a.positive(r) / kTile != i) continue;
        T* const grad = grads + a.positive(r) * a.dim;
        add_segments(a, grad, a.anchor[0] + r * a.dim,
                     [&](int64_t k) { return a.d_positive_score_sum[r * a.layers + k]; });
        if (a.prefixes)
            add_segments(a, grad, a.anchor[1] + r * a.dim,
                         [&](int64_t k) { return -a.radial_grad[1][r * a.layers + k]; });
        for (int64_t k = 0; a.sides == 2 && k < a.layers; ++k)
            add_scaled(grad + a.segments[k].begin, a.row_grad[1] + r * a.padded + a.segments[k].padded, T(1),
                       a.segments[k].width);
    }
    T* const buffer = static_cast<T*>(scratch_bytes(Slot::kTile, static_cast<size_t>(a.dim) * sizeof(T)));
    for (int64_t r = 0; r < a.count; ++r)
        for (int64_t e = a.own_end(a.first + r); e < a.own_end(a.first + r + 1); ++e) {
            const int64_t document = a.p.own_documents[e];
            if (document / kTile != i) continue;
            const Own* own = a.own + (e - a.entries_first) * a.layers;
            T* const grad = grads + document * a.dim;
            for (int side = 0; side < a.sides; ++side)
                add_segments(a, grad, a.anchor[side] + r * a.dim, [&](int64_t k) { return own[k].weight[side]; });
            if (a.prefixes)
                add_segments(a, grad, read(a.p.dtype, a.p.documents, document * a.dim, a.dim, buffer),
                             [&](int64_t k) { return -own[k].radial_grad; });
        }
    for (const Kind kind : {kQueryDocument, kDocDoc})
        if (a.dense[kind]) column_gradients(a, kind, i);
}

}  // namespace qemb::cpu::QEMB_ISA::info_nce_kernels
