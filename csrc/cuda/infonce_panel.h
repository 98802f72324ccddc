// What the kernels of InfoNCE share: one panel of queries against all columns, and where its parts lie in the scratch memory.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/device/tile_product.h"
#include "cuda/launch.h"
#include "ops/infonce.h"

namespace qemb::cuda::infonce {

constexpr const char* kOp = "info_nce";
constexpr int64_t kPanelBytes = int64_t(192) << 20;  // aim for the weights of a panel
constexpr int64_t kMaxRows = 2048;                   // amortises the sums over panels into d_documents
constexpr int64_t kBlocks = 264;                     // aim for the row gradients: two for each multiprocessor of an H100

// Sums over a tile of scores, as in InfoNce::stats[1..4].
struct Tally {
    double kept_score, kept_query_document, kept, dropped;
};

template <class T>
struct Panel {
    InfoNce p;
    Matrix<T> queries, documents;
    Matrix<T> anchors[2];  // the panel's queries, and their positives
    int64_t rows;          // of a full panel, a multiple of kTile
    int64_t first = 0, count = 0, row_tiles = 0;
    int64_t doc_tiles, query_tiles, num_tiles;  // of columns: query-document, then query-query, then document-document
    double inverse;                             // log2(e) / temperature

    // A tile's weights are 2^(score * inverse - offset), offset an integer of its own for each row: whatever the largest score
    // of the whole row turns out to be, a factor that is a power of two, and so exact, brings them to it.
    T* weights;          // [rows, num_tiles * kTile], zero where there is no candidate
    T* factors;          // [num_tiles, rows]
    float* tile_offset;  // [num_tiles, rows]
    float* tile_sum;     // [num_tiles, rows]
    Tally* tallies;      // [doc_tiles + query_tiles, row_tiles]
    T* packed[2];        // [rows, packed_dim] anchors times row_weight / *unit
    int64_t packed_dim;
    int64_t splits;          // of the columns, in the row gradients
    float* partial;          // [sides, splits, rows, dim] E x columns
    float* doc_grad;         // [rows, dim] gradient of the positives as anchors
    float* positive_score;   // [rows]
    float* limit;            // [rows]
    float* row_weight;       // [rows] of the candidates
    float* positive_weight;  // [rows] of the positive
    float* unit;
    int64_t* next_same;  // [rows] the next row of the panel with the same positive, or -1
    int* is_first_same;  // [rows]
    int64_t scratch_bytes;

    explicit Panel(const InfoNce& p)
        : p(p),
          queries(p.queries, p.num_queries, p.dim),
          documents(p.documents, p.num_documents, p.dim),
          anchors{queries, documents},
          doc_tiles(ceil_div(p.num_documents, kTile)),
          query_tiles(p.query_query ? ceil_div(p.num_queries, kTile) : 0),
          num_tiles(doc_tiles * sides() + query_tiles),
          inverse(1.4426950408889634 / p.temperature),
          packed_dim(ceil_div(p.dim, 8) * 8) {
        const int64_t row_bytes = std::max<int64_t>(1, num_tiles) * kTile * static_cast<int64_t>(sizeof(T));
        rows = p.panel_rows ? p.panel_rows : std::clamp<int64_t>(kPanelBytes / row_bytes / kTile * kTile, kTile, kMaxRows);
        rows = std::max<int64_t>(1, ceil_div(std::min(rows, p.num_queries), kTile)) * kTile;
        splits = std::clamp<int64_t>(kBlocks / (rows / kTile * std::max<int64_t>(1, dim_tiles()) * sides()), 1,
                                     std::max<int64_t>(1, doc_tiles + query_tiles));

        char* const start = static_cast<char*>(p.scratch);
        int64_t used = 0;
        const auto take = [&]<class U>(U*& where, int64_t count) {
            where = start ? reinterpret_cast<U*>(start + used) : nullptr;
            used += ceil_div(count * static_cast<int64_t>(sizeof(U)), 256) * 256;
        };
        const bool gradients = p.d_queries;
        take(weights, gradients ? rows * num_tiles * kTile : 0);
        take(factors, num_tiles * rows);
        take(tile_offset, num_tiles * rows);
        take(tile_sum, num_tiles * rows);
        take(tallies, (doc_tiles + query_tiles) * (rows / kTile));
        for (int side = 0; side < 2; ++side) take(packed[side], gradients && side < sides() ? rows * packed_dim : 0);
        take(partial, gradients ? sides() * splits * rows * p.dim : 0);
        take(doc_grad, gradients && p.doc_doc ? rows * p.dim : 0);
        take(positive_score, rows);
        take(limit, rows);
        take(row_weight, rows);
        take(positive_weight, rows);
        take(unit, 1);
        take(next_same, rows);
        take(is_first_same, rows);
        scratch_bytes = used;
    }

    void start_at(int64_t row) {
        first = row;
        count = std::min(rows, p.num_queries - row);
        row_tiles = ceil_div(count, kTile);
        anchors[0].data = queries.data + first * p.dim;
        anchors[1].index = p.positive + first;
        anchors[0].rows = anchors[1].rows = count;
    }
    int64_t dim_tiles() const { return ceil_div(p.dim, kTile); }
    int64_t dim_steps() const { return ceil_div(p.dim, kDepth<T>); }
    int sides() const { return p.doc_doc ? 2 : 1; }
};

}  // namespace qemb::cuda::infonce
