// Gradients of a panel: plain products with its weights. Every element has one owner, panels follow each other on the stream.
#pragma once

#include "cuda/infonce_panel.h"

namespace qemb::cuda::infonce {

// The anchors times the weight of their row, right operands of the gradients of the columns. Relative to the panel's largest
// weight: half floats cannot hold the weights of a sure model, and lose only those some 2^-29 below the largest.
template <class T>
__global__ void pack_anchors(const Panel<T> a, int64_t padded_rows) {
    const int64_t row = blockIdx.x % padded_rows;
    const int side = static_cast<int>(blockIdx.x / padded_rows);
    const bool is_row = row < a.count;
    const float unit = *a.unit;
    const float weight = is_row ? a.row_weight[row] / (unit > 0 ? unit : 1.0f) : 0.0f;
    const Matrix<T>& from = a.anchors[side];
    const T* source = is_row ? from.data + (from.index ? from.index[row] : row) * a.p.dim : nullptr;
    for (int64_t d = threadIdx.x; d < a.packed_dim; d += 128)
        a.packed[side][row * a.packed_dim + d] = from_float<T>(is_row && d < a.p.dim ? weight * to_float(source[d]) : 0.0f);
}

template <class T>
QEMB_DEVICE Matrix<T> weights_of(const Panel<T>& a) {
    Matrix<T> weights = a.queries;
    weights.data = a.weights;
    weights.rows = a.row_tiles * kTile;
    weights.columns = a.num_tiles * kTile;
    weights.vectors = true;
    return weights;
}

// 128 anchors, 128 features, one of the splits of the columns: sum_j E[r, j] * column_j. Queries, then their positives.
template <class T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 ? 2 : 1) row_gradients(const Panel<T> a, int64_t dim_tiles) {
    constexpr int kSteps = kTile / kDepth<T>;  // of a tile of columns
    const int64_t row0 = blockIdx.x / dim_tiles % a.row_tiles * kTile, feature0 = blockIdx.x % dim_tiles * kTile;
    const int64_t part = blockIdx.x / dim_tiles / a.row_tiles;
    const int64_t side_tiles = a.doc_tiles + a.query_tiles;
    const int64_t first_of_side = part < a.splits ? 0 : side_tiles;
    const int64_t tiles = part < a.splits ? side_tiles : a.doc_tiles;
    const int64_t tiles_of_split = (tiles + a.splits - 1) / a.splits, first_tile = part % a.splits * tiles_of_split;
    const int64_t steps = min(tiles_of_split, tiles - first_tile) * kSteps;  // none, or fewer, in splits that are left over
    const Matrix<T> weights = weights_of(a);
    Sums sums;
    multiply<T, Depth::kAlong, Depth::kAcross, true>(sums, steps, [&](int64_t step, char* stage) {
        const int64_t tile = first_tile + step / kSteps, within = step % kSteps * kDepth<T>;
        load_operand<T, Depth::kAlong>(stage, weights, row0, (first_of_side + tile) * kTile + within);
        if (tile < a.doc_tiles)
            load_operand<T, Depth::kAcross>(stage + kOperandBytes, a.documents, tile * kTile + within, feature0);
        else
            load_operand<T, Depth::kAcross>(stage + kOperandBytes, a.queries, (tile - a.doc_tiles) * kTile + within, feature0);
        load_factors(stage, a.factors + (first_of_side + tile) * a.rows + row0, kTile);
    });
    float* const to = a.partial + (part * a.rows + row0) * a.p.dim;
    each_element(sums, [&](int row, int column, float sum) {
        const int64_t d = feature0 + column;
        if (d < a.p.dim) to[row * a.p.dim + d] = sum;
    });
}

// A block for each row: adds the splits in order. The queries' sum goes to d_queries, the positives' to doc_grad.
template <class T>
__global__ void finish_row_gradients(const Panel<T> a) {
    const int64_t row = blockIdx.x % a.count, side = blockIdx.x / a.count;
    const float weight = a.row_weight[row], positive_weight = a.positive_weight[row];
    const T* const positive = a.documents.data + a.p.positive[a.first + row] * a.p.dim;
    float* const d_query = static_cast<float*>(a.p.d_queries) + (a.first + row) * a.p.dim;
    for (int64_t d = threadIdx.x; d < a.p.dim; d += 128) {
        float sum = 0;
        for (int64_t split = 0; split < a.splits; ++split)
            sum += a.partial[((side * a.splits + split) * a.rows + row) * a.p.dim + d];
        if (side == 0)
            d_query[d] += weight * sum + positive_weight * to_float(positive[d]);
        else
            a.doc_grad[row * a.p.dim + d] = weight * sum;
    }
}

// 128 columns, 128 features: sum_r E[r, j] * weight_r * anchor_r, over the queries and, for documents, their positives.
template <class T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 ? 2 : 1)
    column_gradients(const Panel<T> a, bool of_documents, int64_t dim_tiles) {
    const int64_t tile = blockIdx.x / dim_tiles, feature0 = blockIdx.x % dim_tiles * kTile;
    const int64_t steps = a.row_tiles * (kTile / kDepth<T>);
    const Matrix<T> weights = weights_of(a);
    Matrix<T> packed = weights;
    packed.columns = a.packed_dim;
    Sums sums;
    const int64_t all_steps = of_documents && a.p.doc_doc ? 2 * steps : steps;
    multiply<T, Depth::kAcross, Depth::kAcross, true>(sums, all_steps, [&](int64_t step, char* stage) {
        const int side = step >= steps;
        const int64_t row = (side ? step - steps : step) * kDepth<T>;
        const int64_t at = tile + (!of_documents ? a.doc_tiles : side ? a.doc_tiles + a.query_tiles : 0);
        Matrix<T> right = packed;
        right.data = a.packed[side];
        load_operand<T, Depth::kAcross>(stage, weights, row, at * kTile);
        load_operand<T, Depth::kAcross>(stage + kOperandBytes, right, row, feature0);
        load_factors(stage, a.factors + at * a.rows + row, kDepth<T>);
    });
    const float unit = *a.unit;
    const int64_t num_columns = of_documents ? a.p.num_documents : a.p.num_queries;
    float* const gradient = static_cast<float*>(of_documents ? a.p.d_documents : a.p.d_queries);
    each_element(sums, [&](int row, int feature, float sum) {  // a row of the product is a column of the scores
        const int64_t column = tile * kTile + row, d = feature0 + feature;
        if (column < num_columns && d < a.p.dim) gradient[column * a.p.dim + d] += unit * sum;
    });
}

// A block for each row: the first one of those that share a positive adds for all of them, in order.
template <class T>
__global__ void positive_gradients(const Panel<T> a) {
    const int64_t first = blockIdx.x;
    if (!a.is_first_same[first]) return;
    float* const gradient = static_cast<float*>(a.p.d_documents) + a.p.positive[a.first + first] * a.p.dim;
    for (int64_t d = threadIdx.x; d < a.p.dim; d += 128) {
        float sum = 0;
        for (int64_t row = first; row >= 0; row = a.next_same[row]) {
            sum += a.positive_weight[row] * to_float(a.anchors[0].data[row * a.p.dim + d]);
            if (a.p.doc_doc) sum += a.doc_grad[row * a.p.dim + d];
        }
        gradient[d] += sum;
    }
}

}  // namespace qemb::cuda::infonce
