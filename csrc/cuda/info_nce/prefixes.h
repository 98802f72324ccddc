// Matryoshka: what lies between the weights of the layers and the products with them. With w the weight of a pair in a
// layer, s its score there and n one over a norm, the gradient of x is sum w n_x n_y y - x n_x^2 sum w s, over the
// layers that have the feature: so a layer's weights become sums over the layers from it on, and the second part is one
// number for each vector and layer.
#pragma once

#include "cuda/device/vector.h"
#include "cuda/info_nce/owned.h"

namespace qemb::cuda::info_nce_kernels {

constexpr int kMergeThreads = kTile;

// A warp for each vector: one over the norm of each of its prefixes, [layers, rows]; as torch.nn.functional.normalize
// has it, but for a prefix of zeros 0: its scores and its gradient are zero.
template <class T>
__global__ void find_norms(const Panel<T> a, const T* vectors, int64_t rows, float* norms) {
    const int64_t row = blockIdx.x * int64_t(4) + threadIdx.x / 32;
    if (row >= rows) return;
    double squares = 0;
    for (int layer = 0; layer < a.layers; ++layer) {
        squares += warp_dot(vectors + row * a.p.dim, vectors + row * a.p.dim, a.begins[layer], a.ends[layer]);
        const double norm = sqrt(squares);  // NaN stays
        const double inverse = norm == 0 ? 0 : 1 / (norm < 1e-12 ? 1e-12 : norm);
        if (threadIdx.x % 32 == 0) norms[layer * rows + row] = static_cast<float>(inverse);
    }
}

// A thread for each row: the weights of its pairs that are in no tile become what the features that a layer adds are
// multiplied by, and the sums of weight * score what is taken away along the vectors: both are sums over the layers
// from it on.
template <class T>
__global__ void merge_rows(const Panel<T> a) {
    const int64_t row = blockIdx.x * int64_t(kMergeThreads) + threadIdx.x;
    if (row >= a.count) return;
    for (int64_t e = a.own_begin(row); e < a.own_end(row); ++e) {
        float across[2] = {}, radial_grad = 0;
        for (int layer = a.layers - 1; layer >= 0; --layer) {
            Own& own = a.own_of(layer, e);
            const float norm = a.of_document(layer, a.p.own_documents[e]);
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                if (own.score[side] != kNoScore) {
                    across[side] += own.weight[side] * a.of_anchor(layer, side, row) * norm;
                    radial_grad += own.weight[side] * static_cast<float>(own.score[side]) * norm * norm;
                }
                own.weight[side] = across[side];
            }
            own.radial_grad = radial_grad;
        }
    }
    float across = 0, radial_grad = 0;
    double anchor_radial_grad[2] = {};
    for (int layer = a.layers - 1; layer >= 0; --layer) {
        const int64_t at = layer * a.rows + row;
        const float norm[2] = {a.of_anchor(layer, 0, row), a.of_anchor(layer, 1, row)};
        const float weight = a.positive_weight[at];
        across += weight * norm[0] * norm[1];
        radial_grad += weight * static_cast<float>(a.positive_score[at]) * norm[1] * norm[1];
        a.positive_weight[at] = across;
        a.positive_radial_grad[at] = radial_grad;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            double& of_anchor = a.row_radial_grad[side * a.layers * a.rows + at];
            anchor_radial_grad[side] += of_anchor * static_cast<double>(norm[side]) * static_cast<double>(norm[side]);
            of_anchor = anchor_radial_grad[side];
        }
    }
}

template <class T>
constexpr int kRowParts = kTile / kVector<T>;  // threads that share a row of a tile
template <class T>
int merge_bytes(int layers) {
    return kMergeThreads / kRowParts<T> * layers * kTile * static_cast<int>(sizeof(float));
}

// A block: 128 rows, a tile of columns, all layers; weights relative to row_weight, so that the factors of the products
// are one.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_layers(const Panel<T> a) {
    constexpr int kColumns = kVector<T>, kRows = kMergeThreads / kRowParts<T>;
    const InfoNce& p = a.p;
    const int64_t tile = blockIdx.x / a.row_tiles, row0 = blockIdx.x % a.row_tiles * kTile;
    const Kind kind = tile < a.first_tile[kQueries]  ? kQueryDocument
                      : tile < a.first_tile[kDocDoc] ? kQueries
                                                     : kDocDoc;
    const int softmax = a.softmax_of(kind), column = threadIdx.x % kRowParts<T> * kColumns;
    const int64_t first = (tile - a.first_tile[kind]) * kTile + column;  // of the thread's columns
    const int64_t columns = kind == kQueries ? a.queries.rows : a.documents.rows;
    float unscale[kColumns], radial_grad[kMaxLayers][kColumns] = {};
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const bool has_role = kind != kQueries && first + i < columns;
        unscale[i] = a.unscale[group_of(kind, has_role ? static_cast<Role>(p.role[first + i]) : Role::kPositive)];
    }
#pragma unroll 1
    for (int64_t row = row0 + threadIdx.x / kRowParts<T>; row < min(row0 + kTile, a.count); row += kRows) {
        const float relative = reciprocal_approx(fmaxf(a.row_weight[softmax * a.rows + row], 1e-37f));  // finite
        float sums[kColumns] = {};
#pragma unroll
        for (int layer = kMaxLayers - 1; layer >= 0; --layer) {
            if (layer >= a.layers) continue;
            const int64_t of_layer = a.tile_of(layer, kind, tile - a.first_tile[kind]), at = of_layer * a.rows + row;
            const float weight =
                a.layer_weight[(layer * kMaxSoftmaxes + softmax) * a.rows + row] * to_float(a.factors[at]);
            const float share = weight * relative * a.of_anchor(layer, kind == kDocDoc, row);
            const float offset = a.tile_offset[at];
            T* const weights = a.weights + row * a.num_tiles() * kTile + of_layer * kTile + column;
            const auto packed = load<kColumns>(static_cast<const T*>(weights));
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const float e = packed[i];
                if (e == 0) continue;
                radial_grad[layer][i] += weight * e * (log2f(e) + offset) * unscale[i];
                sums[i] += share * e *
                           (kind == kQueries ? a.of_query(layer, p.first_column + first + i)
                                             : a.of_document(layer, first + i));
            }
            store<kColumns>(weights, sums);
        }
    }

    // The rows' parts of a column, in order
    float* const parts = reinterpret_cast<float*>(shared_bytes());  // [kRows, layers, kTile]
    for (int layer = 0; layer < kMaxLayers; ++layer)
        for (int i = 0; i < kColumns && layer < a.layers; ++i)
            parts[(threadIdx.x / kRowParts<T> * a.layers + layer) * kTile + column + i] = radial_grad[layer][i];
    sync_block();
    for (int layer = 0; layer < a.layers; ++layer) {
        const int64_t of_layer = a.tile_of(layer, kind, tile - a.first_tile[kind]);
        float sum = 0;
        for (int i = 0; i < kRows; ++i) sum += parts[(i * a.layers + layer) * kTile + threadIdx.x];
        a.radial_grad_parts[(row0 / kTile * a.num_tiles() + of_layer) * kTile + threadIdx.x] = sum;
        a.factors[of_layer * a.rows + row0 + threadIdx.x] = from_float<T>(1.0f);
    }
}

// A block for each layer and tile of columns, those of the documents first: adds the panel's sums, in order.
template <class T>
__global__ void add_radial_grads(const Panel<T> a) {
    const int64_t tiles = a.doc_tiles + a.query_tiles, tile = blockIdx.x % tiles;
    const int layer = static_cast<int>(blockIdx.x / tiles);
    const bool of_queries = tile >= a.doc_tiles;
    float sum = 0;
    for (const Kind kind : {kQueryDocument, kQueries, kDocDoc}) {
        if (!a.dense[kind] || of_queries != (kind == kQueries)) continue;
        const int64_t at = a.tile_of(layer, kind, of_queries ? tile - a.doc_tiles : tile);
        for (int64_t row_tile = 0; row_tile < a.row_tiles; ++row_tile)
            sum += a.radial_grad_parts[(row_tile * a.num_tiles() + at) * kTile + threadIdx.x];
    }
    if (of_queries)
        a.query_radial_grad[(layer * a.query_tiles + tile - a.doc_tiles) * kTile + threadIdx.x] += sum;
    else
        a.doc_radial_grad[(layer * a.doc_tiles + tile) * kTile + threadIdx.x] += sum;
}

// After all panels, a block for each document, then for each query that is a column.
template <class T>
__global__ void finish_columns(const Panel<T> a) {
    const int64_t dim = a.p.dim, documents = a.doc_tiles > 0 ? a.documents.rows : 0;
    const bool of_query = blockIdx.x >= documents;
    const int64_t column = of_query ? blockIdx.x - documents : blockIdx.x, query = a.p.first_column + column;
    const T* const vector = (of_query ? a.queries : a.documents).data + column * dim;
    float* const gradient = of_query ? static_cast<float*>(a.p.d_queries) + query * dim
                                     : static_cast<float*>(a.p.d_documents) + column * dim;
    float radial_grad = 0;
    for (int layer = a.layers - 1; layer >= 0; --layer) {
        const float norm = of_query ? a.of_query(layer, query) : a.of_document(layer, column);
        radial_grad += norm * norm *
                       (of_query ? a.query_radial_grad[layer * a.query_tiles * kTile + column]
                                 : a.doc_radial_grad[layer * a.doc_tiles * kTile + column]);
        for (int64_t d = a.begins[layer] + threadIdx.x; d < a.ends[layer]; d += 128)
            gradient[d] -= radial_grad * to_float(vector[d]);
    }
}

}  // namespace qemb::cuda::info_nce_kernels
