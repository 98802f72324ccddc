// InfoNCE with named groups of candidates, loss and gradients in one sweep.
// Row panels: a block of queries meets all columns, so no [num_queries, num_documents] matrix ever exists.
#pragma once

#include "common/types.h"
#include "ops/info_nce_rules.h"

namespace qemb {

constexpr int kMaxPrefixes = 8;

// Row i: anchor q_i with positive p = d[positive[i]], s = q_i . p. Its candidates are those of the groups that are on,
// each in its softmax (info_nce_rules.h); the loss of the row is the sum over its softmaxes. Logits are float32
// (float64 for float64 input); the positive never enters a panel.
//
// With num_dims > 0 the loss is the sum over the prefixes of dim_weights[k] times the loss of the vectors cut to
// dims[k] and normalised again, masks included; gradients are those of the vectors as they came. On CUDA at most
// kMaxPrefixes.
struct InfoNce {
    const void* queries;           // [num_queries, dim], contiguous
    const void* documents;         // [num_documents, dim], contiguous
    const int64_t* positive;       // [num_queries]; cuda: the loss of a row whose positive is no document is NaN
    const int64_t* query_text;     // [num_queries] text id of the query's positive
    const int64_t* document_text;  // [num_documents] text ids
    const uint8_t* role;           // [num_documents] of type Role
    const int64_t* owner;          // [num_documents], -1: of nobody
    const int64_t* own_starts;     // [num_queries + 1]: query i owns own_documents[own_starts[i] .. own_starts[i + 1]),
    const int64_t* own_documents;  // in rising order; the same facts as in owner
    // May be null on CUDA: document_text (each document is a text of its own), role and query_text (positives are
    // kPositive, all other documents kHard), owner and its lists (nobody owns any).
    int64_t num_queries;
    int64_t num_documents;
    int64_t dim;
    int64_t first_row, num_rows;  // the queries that are anchors
    int64_t first_column;         // queries from here on are candidates of kQueryQuery
    InfoNceOptions options;
    const int64_t* dims;        // [num_dims] rising, the last at most dim
    const double* dim_weights;  // [num_dims]
    int64_t num_dims;

    double* loss;           // [num_rows], not scaled
    void* d_queries;        // [num_queries, dim] float (double for float64), times scale
    void* d_documents;      // [num_documents, dim], or null: loss only
    double* d_temperature;  // [1], times scale, or null
    double* stats;  // [5]: sum of positive scores; sum and count of kept q-d scores; kept and dropped candidates
                    // (of the last prefix)

    // log_negatives holds, for each row and softmax, the natural logarithm of the sum of exp(logit) over its candidates
    // (-inf: none). Written, unless log_negatives_given: then loss and gradients take it for the whole sum, of which
    // the documents here are a part, and `adds_positive` says whether the part of the positive's own logit is added
    // here. Not with num_dims > 0.
    double* log_negatives;  // [num_rows, kMaxSoftmaxes], or null
    bool log_negatives_given, adds_positive;

    DType dtype;
    int64_t panel_rows = 0;   // cuda: queries of a panel, 0: as many as a bounded scratch allows
    void* scratch = nullptr;  // cuda: info_nce_scratch(p) bytes
    void* stream = nullptr;
};

namespace cpu {
void info_nce(const InfoNce& p);
}

namespace cuda {
int64_t info_nce_scratch(const InfoNce& p);
void info_nce(const InfoNce& p);
}  // namespace cuda

}  // namespace qemb
