// What the kernels of InfoNCE share: one panel of rows against all columns, and where its parts lie in the scratch
// memory.
//
// Rows of a panel are its queries (anchor 0) and their positives (anchor 1). Dense candidates lie in tiles of columns,
// by kind; what a query owns never enters a tile: it is a short list of its own. A layer is a prefix of the vectors, or
// all of them.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/device/tile_product.h"
#include "cuda/launch.h"
#include "ops/info_nce.h"

namespace qemb::cuda::info_nce_kernels {

constexpr const char* kOp = "info_nce";
// Aims of a panel: bytes of its weights, rows (they amortise the sums over panels into d_documents), and blocks of the
// row gradients with so many columns each: two for each multiprocessor of an H100, or, of Hopper's kernels, one.
struct PanelSize {
    int64_t bytes, rows, blocks, columns;
};
constexpr PanelSize kPanel = {int64_t(192) << 20, 2048, 264, kTile};
constexpr PanelSize kHopperPanel = {int64_t(512) << 20, 4096, 132, 2 * kTile};
constexpr double kLog2E = LogUnits::kLog2E, kLn2 = LogUnits::kLn2;

constexpr int kMaxLayers = kMaxPrefixes;

// Sums over candidates, as in InfoNce::stats[1..4].
struct Tally {
    double kept_score, kept_query_document, kept, dropped;
};

// A document that a row owns, as a candidate of kOwnHard ([0]) and kDocOwn ([1]), in one layer.
constexpr double kNoScore = -INFINITY;
struct Own {
    double score[2];    // kNoScore: no candidate
    float weight[2];    // of the gradient
    float radial_grad;  // of prefixes, as in merge_rows
};

template <class T>
struct Panel : GroupRules {
    InfoNce p;
    Matrix<T> queries, documents;  // as columns: queries from first_column on
    Matrix<T> anchors[2];          // the panel's queries, and their positives
    bool prefixes;                 // vectors are cut and normalised again
    bool whole_cuts = true;        // between whole, aligned vectors of 16 bytes
    int layers;
    int64_t begins[kMaxLayers], ends[kMaxLayers];  // of the features that a layer adds
    double shares[kMaxLayers];                     // of the loss
    int num_parts = 0;                             // of the row gradients, a dense kind each
    Kind parts[kNumKinds];
    int64_t rows;  // of a full panel, a multiple of kTile
    int64_t first = 0, count = 0, row_tiles = 0;
    int64_t doc_tiles, query_tiles;     // of columns that are scored
    int64_t first_tile[kNumKinds + 1];  // of a layer's weights, by kind; then their number
    // logit_scale in two floats: the rounding of one would count as often as the exponent is large.
    float scale_high[kNumGroups], scale_low[kNumGroups];
    float unscale[kNumGroups];  // one over it

    // A tile's weights are 2^(score * scale - offset), offset an integer of its own for each row: whatever the largest
    // logit of the whole softmax turns out to be, a factor that is a power of two, and so exact, brings them to it.
    T* weights;                      // [rows, layers * tiles * kTile], zero where there is no candidate
    T* factors;                      // [layers * tiles, rows]
    float* tile_offset;              // [layers * tiles, rows]
    float* tile_sum;                 // [layers * tiles, rows]
    float* tile_weighted_score_sum;  // [layers * tiles, rows] sum of weight * score
    Tally* tallies;        // [doc_tiles + query_tiles, row_tiles], then [count] of what rows own; of the last layer
    Own* own;              // [layers, num_documents], as own_documents
    T* packed[kNumKinds];  // [rows, packed_dim] anchors times row_weight / *unit
    int64_t packed_dim;
    int64_t splits;          // of the columns of a part, in the row gradients
    float* partial;          // [num_parts, splits, rows, dim] E x columns
    float* doc_grad;         // [rows, dim] gradient of the positives as anchors
    double* positive_score;  // [layers, rows]
    double* d_tau;           // [rows]
    float* row_weight;       // [kMaxSoftmaxes, rows] of the candidates
    float* positive_weight;  // [layers, rows] of the positive
    float* unit;
    // What info_nce/inputs.h makes
    const int64_t* given_positive;
    int64_t* checked_positive;              // [num_queries]
    double* fault;                          // [num_queries] NaN where the positive given is no document, else 0
    int64_t *texts, *query_texts, *owners;  // in place of what the caller leaves out, or null
    uint8_t* roles;
    int64_t* next_same;  // [rows] the next row of the panel with the same positive, or -1
    int* is_first_same;  // [rows]
    // Prefixes alone
    float* layer_weight;           // [layers, kMaxSoftmaxes, rows]; row_weight is then the largest
    float *query_norm, *doc_norm;  // [layers, num_queries], [layers, num_documents] one over the norm
    double* row_radial_grad;       // [2, layers, rows] sum of weight * score of the anchors' candidates
    float* positive_radial_grad;   // [layers, rows] the same of the positive with its query, as in merge_rows
    float *query_radial_grad, *doc_radial_grad;  // [layers, columns] the same of the columns'
    float* radial_grad_parts;                    // [row_tiles, layers * tiles * kTile] of a panel
    uint64_t* over;  // [doc_tiles, row_tiles, layers, kTileThreads] as Kept::over; not of Hopper's kernels
    // Hopper's kernels alone
    bool same_groups[kNumKinds];  // the two groups of a kind's columns differ in name only
    int* plain;    // [doc_tiles + query_tiles, row_tiles] do limits alone decide about the scores of a tile?
    T* positives;  // [rows, dim] those of the panel
    int64_t scratch_bytes;

    Panel(const InfoNce& p, bool hopper)
        : GroupRules(rules_of(p.options)),
          p(p),
          queries(static_cast<const T*>(p.queries) + p.first_column * p.dim,
                  std::max<int64_t>(0, p.num_queries - p.first_column), p.dim),
          documents(p.documents, p.num_documents, p.dim),
          anchors{Matrix<T>(p.queries, 0, p.dim), documents},
          packed_dim(ceil_div(p.dim, 8) * 8) {
        prefixes = p.num_dims > 0;
        layers = prefixes ? static_cast<int>(p.num_dims) : 1;
        for (int layer = 0; layer < layers; ++layer) {
            begins[layer] = layer > 0 ? ends[layer - 1] : 0;
            ends[layer] = prefixes ? p.dims[layer] : p.dim;
            shares[layer] = prefixes ? p.dim_weights[layer] : 1;
            if (prefixes && ends[layer] % kVector<T>) whole_cuts = false;
        }
        for (Matrix<T>* matrix : {&queries, &documents, &anchors[0], &anchors[1]})
            matrix->vectors = matrix->vectors && whole_cuts;
        doc_tiles = dense[kQueryDocument] || dense[kDocDoc] ? ceil_div(p.num_documents, kTile) : 0;
        query_tiles = dense[kQueries] ? ceil_div(queries.rows, kTile) : 0;
        first_tile[0] = 0;
        for (const Kind kind : {kQueryDocument, kQueries, kDocDoc}) {
            first_tile[kind + 1] = first_tile[kind] + (!dense[kind] ? 0 : kind == kQueries ? query_tiles : doc_tiles);
            if (dense[kind]) parts[num_parts++] = kind;
        }
        const auto same = [&](InfoNceGroup first, InfoNceGroup second) {
            const Group &x = p.options.groups[first], &y = p.options.groups[second];
            return x.on == y.on && x.mask == y.mask && x.relative == y.relative && x.margin == y.margin &&
                   x.hardness == y.hardness;
        };
        same_groups[kQueryDocument] = same(kBatchPositive, kBatchHard);
        same_groups[kQueries] = true;
        same_groups[kDocDoc] = same(kDocPositive, kDocHard);
        for (int group = 0; group < kNumGroups; ++group) {
            scale_high[group] = static_cast<float>(logit_scale[group]);
            unscale[group] = static_cast<float>(1 / logit_scale[group]);
            scale_low[group] = static_cast<float>(logit_scale[group] - static_cast<double>(scale_high[group]));
        }

        const int64_t tiles = layers * first_tile[kNumKinds],
                      row_bytes = std::max<int64_t>(1, tiles) * kTile * int64_t(sizeof(T));
        const PanelSize& aim = hopper ? kHopperPanel : kPanel;
        rows =
            p.panel_rows ? p.panel_rows : std::clamp<int64_t>(aim.bytes / row_bytes / kTile * kTile, kTile, aim.rows);
        rows = std::max<int64_t>(1, ceil_div(std::min(rows, p.num_rows), kTile)) * kTile;
        const int64_t blocks = rows / kTile * std::max<int64_t>(1, ceil_div(p.dim, aim.columns) * num_parts);
        splits = std::clamp<int64_t>(aim.blocks / blocks, 1, std::max<int64_t>(1, std::max(doc_tiles, query_tiles)));

        owns = owns && p.owner;
        char* const start = static_cast<char*>(p.scratch);
        int64_t used = 0;
        const auto take = [&]<class U>(U*& where, int64_t number) {
            where = start && number > 0 ? reinterpret_cast<U*>(start + used) : nullptr;
            used += ceil_div(number * static_cast<int64_t>(sizeof(U)), 256) * 256;
        };
        take(weights, gradients() ? rows * tiles * kTile : 0);
        take(factors, tiles * rows);
        take(tile_offset, tiles * rows);
        take(tile_sum, tiles * rows);
        take(tile_weighted_score_sum, tiles * rows);
        take(tallies, (doc_tiles + query_tiles) * (rows / kTile) + rows);
        take(own, owns ? layers * p.num_documents : 0);
        for (int kind = 0; kind < kNumKinds; ++kind)
            take(packed[kind], gradients() && dense[kind] ? rows * packed_dim : 0);
        take(partial, gradients() ? num_parts * splits * rows * p.dim : 0);
        take(doc_grad, gradients() && sides == 2 ? rows * p.dim : 0);
        take(positive_score, layers * rows);
        take(d_tau, rows);
        take(row_weight, kMaxSoftmaxes * rows);
        take(positive_weight, layers * rows);
        take(unit, 1);
        take(next_same, rows);
        take(is_first_same, rows);
        const int64_t cut = prefixes ? layers : 0;
        take(layer_weight, cut * kMaxSoftmaxes * rows);
        take(query_norm, cut * p.num_queries);
        take(doc_norm, cut * p.num_documents);
        take(row_radial_grad, 2 * cut * rows);
        take(positive_radial_grad, cut * rows);
        take(query_radial_grad, gradients() ? cut * query_tiles * kTile : 0);
        take(doc_radial_grad, gradients() ? cut * doc_tiles * kTile : 0);
        take(radial_grad_parts, gradients() && prefixes ? rows / kTile * tiles * kTile : 0);
        take(over, by_query && !hopper ? cut * doc_tiles * (rows / kTile) * kTileThreads : 0);
        take(plain, hopper ? (doc_tiles + query_tiles) * (rows / kTile) : 0);
        take(positives, hopper && sides == 2 ? rows * p.dim : 0);
        take(checked_positive, p.num_queries);
        take(fault, p.num_queries);
        take(texts, p.document_text ? 0 : p.num_documents);
        take(query_texts, p.role ? 0 : p.num_queries);
        take(roles, p.role ? 0 : p.num_documents);
        take(owners, p.owner ? 0 : p.num_documents);
        scratch_bytes = used;
        given_positive = p.positive;
        this->p.positive = checked_positive;
        if (texts) this->p.document_text = texts;
        if (roles) this->p.role = roles, this->p.query_text = query_texts;
        if (owners) this->p.owner = owners;
    }

    void start_at(int64_t row) {
        first = row;
        count = std::min(rows, p.num_rows - row);
        row_tiles = ceil_div(count, kTile);
        anchors[0].data = static_cast<const T*>(p.queries) + (p.first_row + first) * p.dim;
        anchors[1].index = p.positive + p.first_row + first;
        anchors[0].rows = anchors[1].rows = count;
    }
    bool gradients() const { return p.d_documents; }

    QEMB_DEVICE int64_t query(int64_t row) const { return p.first_row + first + row; }
    QEMB_DEVICE int64_t positive(int64_t row) const { return p.positive[query(row)]; }
    QEMB_DEVICE int64_t num_tiles() const { return layers * first_tile[kNumKinds]; }
    QEMB_DEVICE int64_t tile_of(int layer, Kind kind, int64_t tile) const {
        return layer * first_tile[kNumKinds] + first_tile[kind] + tile;
    }
    // One over the norm of a query, a document, the anchor of a row.
    QEMB_DEVICE float of_query(int layer, int64_t query) const {
        return prefixes ? query_norm[layer * p.num_queries + query] : 1;
    }
    QEMB_DEVICE float of_document(int layer, int64_t document) const {
        return prefixes ? doc_norm[layer * p.num_documents + document] : 1;
    }
    QEMB_DEVICE float of_anchor(int layer, int side, int64_t row) const {
        return side ? of_document(layer, positive(row)) : of_query(layer, query(row));
    }
    QEMB_DEVICE Own& own_of(int layer, int64_t e) const { return own[layer * p.num_documents + e]; }
    // Where the list of what a row owns begins and ends, among all lists.
    QEMB_DEVICE int64_t own_begin(int64_t row) const { return owns ? p.own_starts[query(row)] : 0; }
    QEMB_DEVICE int64_t own_end(int64_t row) const { return owns ? p.own_starts[query(row) + 1] : 0; }
    // visit(own, side, group) for the candidates of a softmax among what a row owns, each `step`-th from `start` on.
    template <class Visit>
    QEMB_DEVICE void each_own(int layer, int64_t row, int softmax, int start, int step, const Visit& visit) const {
        if (row >= count) return;
        for (int64_t e = own_begin(row) + start; e < own_end(row); e += step) {
            Own& candidate = own_of(layer, e);
            for (int side = 0; side < 2; ++side)
                if (softmax_of_owned(side) == softmax && candidate.score[side] != kNoScore)
                    visit(candidate, side, group_of_owned(side));
        }
    }
};

}  // namespace qemb::cuda::info_nce_kernels
