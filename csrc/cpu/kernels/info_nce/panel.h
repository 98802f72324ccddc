// What the parts of InfoNCE share: one panel of rows against all columns, and where its parts lie in the scratch
// memory.
//
// Rows r of a panel are its queries (anchor 0) and their positives (anchor 1). Dense candidates lie in tiles of kTile
// columns, by kind; what a query owns is a short list of its own. A layer is a prefix of the vectors, or all of them.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd/gemm.h"
#include "ops/info_nce.h"

namespace qemb::cpu::QEMB_ISA::info_nce_kernels {

constexpr int64_t kTile = 256;                      // columns of a tile of the panel
constexpr int64_t kFeatures = 256;                  // features of a work item of the row gradients, at most
constexpr int64_t kPanelBytes = int64_t(96) << 20;  // aim; bounded by the rows below
constexpr int64_t kMinRows = 96, kMaxRows = 384, kRowStep = 48;
constexpr double kShortest = 1e-12;  // norm of a prefix, as torch.nn.functional.normalize has it

// Partial results of a tile, kept until they are added in order, so that the thread count changes nothing.
struct TileStats {
    double kept_score;
    int64_t kept_query_document, kept, dropped;
};

// A layer's features [begin, end) beyond those of the layer before; `padded` is where they lie in rows of whole
// vectors.
struct Segment {
    int64_t begin, width, padded;
};

// What a row's softmax has come to, per row, layer and softmax.
struct Softmax {
    double offset;     // log2 of what the weights E are relative to
    double negatives;  // sum of the weights
    double weight;     // of the gradient with regard to a candidate's score, for E = 1
};

// The score of what is no candidate. (NaN is the score of a candidate that holds NaN, which must reach the loss.)
constexpr double kNoScore = -__builtin_inf();

// A document that a row owns, as a candidate of kOwnHard ([0]) and kDocOwn ([1]); per entry and layer.
struct Own {
    double score[2];     // kNoScore: no candidate
    double weight[2];    // E; later the coefficient of the raw vectors in the gradient
    double radial_grad;  // sum of coefficient * score, for the normalisation's part of the gradient
};

template <class T>
struct Panel : GroupRules {
    const InfoNce& p;
    const int64_t dim, layers;
    const bool prefixes,
        scaled;              // scaled: row weights are multiplied into the panel, else they are applied to its products
    bool scored[kNumKinds];  // kinds of columns whose scores are needed
    int64_t tiles[kNumKinds], first_tile[kNumKinds], num_tiles = 0;
    int64_t padded = 0;                  // features of a row of whole vectors by segments
    int64_t rows, first = 0, count = 0;  // of a full panel; of this one
    int64_t entries_first = 0, entries = 0;

    Segment* segments;           // [layers]
    T* panel;                    // [num_tiles, layers, rows, kTile] scores, weights, then coefficients
    T* tile_max;                 // [num_tiles, layers, rows] largest logit, log2
    T* tile_sum;                 // the same, of the weights
    T* tile_weighted_score_sum;  // the same, of weight * score
    T* column_radial_grad;       // [num_tiles, layers, kTile] sum over rows of coefficient * score
    TileStats* tile_stats;
    TileStats* row_stats;      // [rows] of what they own
    T* anchor[2];              // [rows, dim] queries and positives
    T* anchor_tiles[2];        // the same, packed as left operands
    T* packed[2];              // [rows * padded] the same, by segments, in panels; times the row weight unless scaled
    T* row_grad[2];            // [rows, padded] unscaled gradients of both
    T* anchor_norm[2];         // [rows, layers] one over the norm of the prefix
    T* column_norm[2];         // [num_documents, layers], [num_queries, layers]
    double* score;             // [rows, layers] of the positive
    Softmax* softmaxes;        // [rows, layers, kMaxSoftmaxes]
    double* d_positive_score;  // [rows, layers] gradient with regard to the positive's score
    double* d_positive_score_sum;  // [rows, layers] of the raw positive, suffix sums
    double* radial_grad[2];        // [rows, layers] sum of coefficient * score of the anchor's terms; later suffix sums
    double* d_tau;                 // [rows]
    Own* own;                      // [entries, layers]

    explicit Panel(const InfoNce& p)
        : GroupRules(rules_of(p.options)),
          p(p),
          dim(p.dim),
          layers(p.num_dims > 0 ? p.num_dims : 1),
          prefixes(p.num_dims > 0),
          scaled(p.num_dims > 0 || p.options.split) {
        // Tiles of columns
        for (int kind = 0; kind < kNumKinds; ++kind) scored[kind] = dense[kind];
        scored[kQueryDocument] |= by_query;
        for (int kind = 0; kind < kNumKinds; ++kind) {
            tiles[kind] = !scored[kind] ? 0 : ceil_div(num_columns(static_cast<Kind>(kind)), kTile);
            first_tile[kind] = num_tiles;
            num_tiles += tiles[kind];
        }
        for (int64_t k = 0; k < layers; ++k) padded += round_up(layer_end(k) - (k ? layer_end(k - 1) : 0), kLanes<T>);

        // Rows
        const int64_t row_bytes = num_tiles * layers * kTile * static_cast<int64_t>(sizeof(T));
        rows = kPanelBytes / max_of<int64_t>(1, row_bytes) / kRowStep * kRowStep;
        rows = min_of(min_of(max_of(rows, kMinRows), kMaxRows), round_up(max_of<int64_t>(1, p.num_rows), kRowStep));
        int64_t max_entries = 0;
        for (int64_t row = 0; row < p.num_rows; row += rows)
            max_entries = max_of(max_entries, own_end(min_of(row + rows, p.num_rows)) - own_end(row));

        // Scratch memory: once to count, once to place
        char* start = nullptr;
        int64_t used = 0;
        const auto take = [&]<class U>(U*& where, int64_t number) {
            where = reinterpret_cast<U*>(start + used);
            used += round_up(number * static_cast<int64_t>(sizeof(U)), 64);
        };
        const auto lay_out = [&] {
            used = 0;
            take(panel, num_tiles * layers * rows * kTile);
            take(tile_max, num_tiles * layers * rows);
            take(tile_sum, num_tiles * layers * rows);
            take(tile_weighted_score_sum, num_tiles * layers * rows);
            take(column_radial_grad, prefixes ? num_tiles * layers * kTile : 0);
            take(tile_stats, num_tiles);
            take(row_stats, rows);
            for (int side = 0; side < 2; ++side) {
                take(anchor[side], rows * dim);
                take(anchor_tiles[side], left_size<T>(rows, dim));
                take(packed[side], rows * padded);
                take(row_grad[side], rows * padded);
                take(anchor_norm[side], rows * layers);
                take(column_norm[side], prefixes ? (side ? p.num_queries : p.num_documents) * layers : 0);
                take(radial_grad[side], rows * layers);
            }
            take(segments, layers);
            take(score, rows * layers);
            take(softmaxes, rows * layers * kMaxSoftmaxes);
            take(d_positive_score, rows * layers);
            take(d_positive_score_sum, rows * layers);
            take(d_tau, rows);
            take(own, max_entries * layers);
        };
        lay_out();
        start = static_cast<char*>(scratch_bytes(Slot::kPanel, static_cast<size_t>(used)));
        lay_out();

        // Segments of the features
        int64_t at = 0;
        for (int64_t k = 0; k < layers; ++k) {
            const int64_t begin = k ? layer_end(k - 1) : 0;
            segments[k] = {begin, layer_end(k) - begin, at};
            at += round_up(segments[k].width, kLanes<T>);
        }
    }

    void start_at(int64_t row) {
        first = row;
        count = min_of(rows, p.num_rows - row);
        entries_first = own_end(row);
        entries = own_end(row + count) - entries_first;
    }

    int64_t layer_end(int64_t k) const { return prefixes ? p.dims[k] : dim; }
    int64_t own_end(int64_t row) const { return p.own_starts[p.first_row + row]; }  // where the list of a row begins
    int64_t query(int64_t r) const { return p.first_row + first + r; }
    int64_t positive(int64_t r) const { return p.positive[query(r)]; }
    int64_t num_columns(Kind kind) const { return kind == kQueries ? p.num_queries : p.num_documents; }
    int64_t columns_in(Kind kind, int64_t i) const { return min_of(kTile, num_columns(kind) - i * kTile); }
    const void* columns_of(Kind kind) const { return kind == kQueries ? p.queries : p.documents; }
    Kind kind_of(int64_t tile) const {
        return tile < first_tile[kQueries] ? kQueryDocument : tile < first_tile[kDocDoc] ? kQueries : kDocDoc;
    }
    T* weights(int64_t tile, int64_t layer) const { return panel + (tile * layers + layer) * rows * kTile; }
    int64_t of_tile(int64_t tile, int64_t layer) const { return (tile * layers + layer) * rows; }
    Softmax& softmax(int64_t r, int64_t layer, int s) const {
        return softmaxes[(r * layers + layer) * kMaxSoftmaxes + s];
    }
    // The group of a column's candidates; past the last column, as padding, that of the last.
    int group_at(Kind kind, int64_t column) const {
        if (kind == kQueries) return kQueryQuery;
        return group_of(kind, static_cast<Role>(p.role[min_of(column, p.num_documents - 1)]));
    }
    bool gradients() const { return p.d_documents; }
};

// a . b over [begin, end), in double. (Eight sums, so that it runs in vectors.)
template <class T>
inline double exact_dot(const T* a, const T* b, int64_t begin, int64_t end) {
    double sums[8] = {};
    int64_t i = begin;
    for (; i + 8 <= end; i += 8)
        for (int lane = 0; lane < 8; ++lane)
            sums[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
    for (; i < end; ++i) sums[0] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Of a prefix of zeros 0: its scores and its gradient are zero.
QEMB_INLINE double one_over_norm(double squares) {
    const double norm = __builtin_sqrt(squares);
    return norm == 0 ? 0 : 1 / (norm < kShortest ? kShortest : norm);
}

}  // namespace qemb::cpu::QEMB_ISA::info_nce_kernels
