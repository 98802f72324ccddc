// Gradients of a panel: plain products with its weights, and what rows own by itself. Every element has one owner,
// launches follow each other on the stream.
#pragma once

#include "cuda/info_nce/panel.h"

namespace qemb::cuda::info_nce_kernels {

// The anchors times the weight of their row, right operands of the gradients of the columns, for each part. Relative to
// the panel's largest weight: half floats cannot hold the weights of a sure model, and lose only those some 2^-29 below
// the largest.
template <class T>
__global__ void pack_anchors(const Panel<T> a, int64_t padded_rows) {
    const int64_t row = blockIdx.x % padded_rows;
    const Kind kind = a.parts[blockIdx.x / padded_rows];
    const bool is_row = row < a.count;
    const float unit = *a.unit;
    const float weight = is_row ? a.row_weight[a.softmax_of(kind) * a.rows + row] / (unit > 0 ? unit : 1.0f) : 0.0f;
    const T* source = nullptr;
    if (is_row)
        source = kind == kDocDoc ? a.documents.data + a.positive(row) * a.p.dim : a.anchors[0].data + row * a.p.dim;
    for (int64_t d = threadIdx.x; d < a.packed_dim; d += 128)
        a.packed[kind][row * a.packed_dim + d] =
            from_float<T>(is_row && d < a.p.dim ? weight * to_float(source[d]) : 0.0f);
}

template <class T>
QEMB_DEVICE Matrix<T> weights_of(const Panel<T>& a) {
    Matrix<T> weights = a.documents;
    weights.data = a.weights;
    weights.rows = a.row_tiles * kTile;
    weights.columns = weights.end = a.num_tiles() * kTile;
    weights.vectors = true;
    return weights;
}

// 128 anchors, 128 features of a layer beyond those of the one before, one of the splits of a part's columns: sum_j
// E[r, j] * column_j.
template <class T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 ? 2 : 1)
    row_gradients(const Panel<T> a, int layer, int64_t dim_tiles) {
    constexpr int kSteps = kTile / kDepth<T>;  // of a tile of columns
    const int64_t row0 = blockIdx.x / dim_tiles % a.row_tiles * kTile,
                  feature0 = a.begins[layer] + blockIdx.x % dim_tiles * kTile;
    const int64_t split = blockIdx.x / dim_tiles / a.row_tiles;  // of all parts
    const Kind kind = a.parts[split / a.splits];
    const int64_t first_of_kind = a.tile_of(layer, kind, 0), tiles = a.first_tile[kind + 1] - a.first_tile[kind];
    const int64_t tiles_of_split = (tiles + a.splits - 1) / a.splits, first_tile = split % a.splits * tiles_of_split;
    const int64_t steps =
        min(tiles_of_split, tiles - first_tile) * kSteps;  // none, or fewer, in splits that are left over
    const Matrix<T> weights = weights_of(a);
    Matrix<T> columns = kind == kQueries ? a.queries : a.documents;
    columns.end = a.ends[layer];
    Sums sums;
    multiply<T, Depth::kAlong, Depth::kAcross, true>(sums, steps, [&](int64_t step, char* stage) {
        const int64_t tile = first_tile + step / kSteps, within = step % kSteps * kDepth<T>;
        load_operand<T, Depth::kAlong>(stage, weights, row0, (first_of_kind + tile) * kTile + within);
        load_operand<T, Depth::kAcross>(stage + kOperandBytes, columns, tile * kTile + within, feature0);
        load_factors(stage, a.factors + (first_of_kind + tile) * a.rows + row0, kTile);
    });
    float* const to = a.partial + (split * a.rows + row0) * a.p.dim;
    each_element(sums, [&](int row, int column, float sum) {
        const int64_t d = feature0 + column;
        if (d < a.ends[layer]) to[row * a.p.dim + d] = sum;
    });
}

// A block for each row and anchor: adds the splits in order, what the row owns, and the positive. The queries' sum goes
// to d_queries, the positives' to doc_grad. Twelve blocks on a multiprocessor, 40 registers: it waits for memory alone.
template <class T>
__global__ void __launch_bounds__(128, 12) finish_row_gradients(const Panel<T> a) {
    const int side = blockIdx.x < a.count ? 0 : 1;
    const int64_t row = blockIdx.x - side * a.count, dim = a.p.dim;
    const int64_t query = a.query(row);
    const T* const positive = a.documents.data + a.p.positive[query] * dim;
    const T* const anchor = side == 0 ? a.anchors[0].data + row * dim : positive;
    float* const d_query = static_cast<float*>(a.p.d_queries) + query * dim;
    for (int layer = 0; layer < a.layers; ++layer) {
        const float positive_weight = a.positive_weight[layer * a.rows + row];
        const auto radial_grad =
            static_cast<float>(a.prefixes ? a.row_radial_grad[(side * a.layers + layer) * a.rows + row] : 0);
        for (int64_t d = a.begins[layer] + threadIdx.x; d < a.ends[layer]; d += 128) {
            float total = side == 0 ? positive_weight * to_float(positive[d]) : 0.0f;
            for (int64_t part = 0; part < a.num_parts; ++part) {
                const Kind kind = a.parts[part];
                if (side_of(kind) != side) continue;
                float sum = 0;
                for (int64_t split = 0; split < a.splits; ++split)
                    sum += a.partial[((part * a.splits + split) * a.rows + row) * dim + d];
                total += a.row_weight[a.softmax_of(kind) * a.rows + row] * sum;
            }
            if (a.owns)
                for (int64_t e = a.own_begin(row); e < a.own_end(row); ++e)
                    total +=
                        a.own_of(layer, e).weight[side] * to_float(a.documents.data[a.p.own_documents[e] * dim + d]);
            if (a.prefixes) total -= radial_grad * to_float(anchor[d]);
            if (side == 0)
                d_query[d] += total;
            else
                a.doc_grad[row * dim + d] = total;
        }
    }
}

// A block for each row: the gradients of what it owns.
template <class T>
__global__ void own_gradients(const Panel<T> a) {
    const int64_t row = blockIdx.x, dim = a.p.dim;
    const T* const query = a.anchors[0].data + row * dim;
    const T* const positive = a.documents.data + a.positive(row) * dim;
    for (int64_t e = a.own_begin(row); e < a.own_end(row); ++e) {
        const T* const document = a.documents.data + a.p.own_documents[e] * dim;
        float* const gradient = static_cast<float*>(a.p.d_documents) + a.p.own_documents[e] * dim;
        for (int layer = 0; layer < a.layers; ++layer) {
            const Own& own = a.own_of(layer, e);
            const float of_query = own.weight[0], of_positive = own.weight[1];
            for (int64_t d = a.begins[layer] + threadIdx.x; d < a.ends[layer]; d += 128) {
                float sum = of_query * to_float(query[d]) + of_positive * to_float(positive[d]);
                if (a.prefixes) sum -= own.radial_grad * to_float(document[d]);
                gradient[d] += sum;
            }
        }
    }
}

// 128 columns, 128 features of a layer as above: sum_r E[r, j] * weight_r * anchor_r, over the queries and, for
// documents, their positives.
template <class T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 ? 2 : 1)
    column_gradients(const Panel<T> a, int layer, bool of_documents, int64_t dim_tiles) {
    const int64_t tile = blockIdx.x / dim_tiles, feature0 = a.begins[layer] + blockIdx.x % dim_tiles * kTile;
    const int64_t steps = a.row_tiles * (kTile / kDepth<T>);
    const Kind first = !of_documents ? kQueries : a.dense[kQueryDocument] ? kQueryDocument : kDocDoc;
    const bool both = first == kQueryDocument && a.dense[kDocDoc];
    const Matrix<T> weights = weights_of(a);
    Matrix<T> packed = weights;
    packed.columns = a.packed_dim;
    packed.end = a.ends[layer];
    packed.vectors = a.whole_cuts;
    Sums sums;
    multiply<T, Depth::kAcross, Depth::kAcross, true>(sums, both ? 2 * steps : steps, [&](int64_t step, char* stage) {
        const Kind kind = step < steps ? first : kDocDoc;
        const int64_t row = (step < steps ? step : step - steps) * kDepth<T>, at = a.tile_of(layer, kind, tile);
        Matrix<T> right = packed;
        right.data = a.packed[kind];
        load_operand<T, Depth::kAcross>(stage, weights, row, at * kTile);
        load_operand<T, Depth::kAcross>(stage + kOperandBytes, right, row, feature0);
        load_factors(stage, a.factors + at * a.rows + row, kDepth<T>);
    });
    const float unit = *a.unit;
    const int64_t num_columns = of_documents ? a.documents.rows : a.queries.rows, dim = a.p.dim;
    float* const gradient = of_documents ? static_cast<float*>(a.p.d_documents)
                                         : static_cast<float*>(a.p.d_queries) + a.p.first_column * dim;
    each_element(sums, [&](int row, int feature, float sum) {  // a row of the product is a column of the scores
        const int64_t column = tile * kTile + row, d = feature0 + feature;
        if (column < num_columns && d < a.ends[layer]) gradient[column * dim + d] += unit * sum;
    });
}

// A block for each row: the first one of those that share a positive adds for all of them, in order.
template <class T>
__global__ void positive_gradients(const Panel<T> a) {
    const int64_t first = blockIdx.x;
    if (!a.is_first_same[first]) return;
    const T* const positive = a.documents.data + a.positive(first) * a.p.dim;
    float* const gradient = static_cast<float*>(a.p.d_documents) + a.positive(first) * a.p.dim;
    for (int layer = 0; layer < a.layers; ++layer)
        for (int64_t d = a.begins[layer] + threadIdx.x; d < a.ends[layer]; d += 128) {
            float sum = 0;
            for (int64_t row = first; row >= 0; row = a.next_same[row]) {
                sum += a.positive_weight[layer * a.rows + row] * to_float(a.anchors[0].data[row * a.p.dim + d]);
                if (a.prefixes) sum -= a.positive_radial_grad[layer * a.rows + row] * to_float(positive[d]);
                if (a.sides == 2) sum += a.doc_grad[row * a.p.dim + d];
            }
            gradient[d] += sum;
        }
}

}  // namespace qemb::cuda::info_nce_kernels
