// InfoNCE with named groups of candidates, loss and gradients in one sweep.
// Row panels: a block of queries meets all columns, so no [num_queries, num_documents] matrix ever exists.
#pragma once

#include "common/types.h"

namespace qemb {

// Row i: anchor q_i with positive p = d[positive[i]], s = q_i . p. Its candidates, by group:
//   kOwnHard        q_i . d_j  owner[j] = i                      kDocOwn        p . d_j  owner[j] = i
//   kBatchPositive  q_i . d_j  owner[j] != i, a positive         kDocPositive   p . d_j  owner[j] != i, a positive
//   kBatchHard      q_i . d_j  owner[j] != i, any other          kDocHard       p . d_j  owner[j] != i, any other
//   kQueryQuery     q_i . q_j  j != i
// The positive itself (j = positive[i]) is in none of them.
enum InfoNceGroup : int { kOwnHard, kBatchPositive, kBatchHard, kQueryQuery, kDocOwn, kDocPositive, kDocHard, kNumGroups };

// Which score is held against the row's limit: none, the candidate's own, or for p . d_j that of q_i . d_j.
enum class ScoreMask : int { kNone, kOwn, kQueryDocument };

// A candidate is dropped when that score exceeds s + margin (relative: s + margin * |s|), or when its text equals p's. Its
// logit is score / temperature + hardness * score, the second part a constant to the gradient.
struct Group {
    bool on;
    ScoreMask mask;
    bool relative;
    double margin;
    double hardness;
};

// What a document is to queries that do not own it. kAbsent: to none of them a candidate, nor to its owner.
enum class Role : uint8_t { kHard, kPositive, kAbsent };

// Softmaxes of a row, each over the positive and its own part of the groups. Joint: one, over all. Split: four, of kOwnHard;
// the kBatch groups; kQueryQuery; the kDoc groups. One without a group that is on adds nothing.
constexpr int kMaxSoftmaxes = 4;
constexpr int kMaxPrefixes = 8;

// The loss of a row is the sum over its softmaxes of (1 - P)^focal * -log P, P the share of the positive. Logits are float32
// (float64 for float64 input); the positive never enters a panel.
//
// With num_dims > 0 the loss is the sum over the prefixes of dim_weights[k] times the loss of the vectors cut to dims[k] and
// normalised again, masks included; gradients are those of the vectors as they came. On CUDA at most kMaxPrefixes.
struct InfoNce {
    const void* queries;           // [num_queries, dim], contiguous
    const void* documents;         // [num_documents, dim], contiguous
    const int64_t* positive;       // [num_queries]
    const int64_t* query_text;     // [num_queries] text id of the query's positive
    const int64_t* document_text;  // [num_documents] text ids
    const uint8_t* role;           // [num_documents] of type Role
    const int64_t* owner;          // [num_documents], -1: of nobody
    const int64_t* own_starts;     // [num_queries + 1]: query i owns own_documents[own_starts[i] .. own_starts[i + 1]),
    const int64_t* own_documents;  // in rising order; the same facts as in owner
    int64_t num_queries;
    int64_t num_documents;
    int64_t dim;
    int64_t first_row, num_rows;  // the queries that are anchors
    int64_t first_column;         // queries from here on are candidates of kQueryQuery
    Group groups[kNumGroups];
    bool split;
    double temperature;
    double focal;
    double scale;               // of the gradients: 1 / num_queries for the mean loss
    const int64_t* dims;        // [num_dims] rising, the last at most dim
    const double* dim_weights;  // [num_dims]
    int64_t num_dims;

    double* loss;           // [num_rows], not scaled
    void* d_queries;        // [num_queries, dim] float (double for float64), times scale
    void* d_documents;      // [num_documents, dim], or null: loss only
    double* d_temperature;  // [1], times scale, or null
    double* stats;          // [5]: sum of positive scores; sum and count of kept q-d scores; kept and dropped candidates
                            // (of the last prefix)

    // log_negatives holds, for each row and softmax, the natural logarithm of the sum of exp(logit) over its candidates (-inf:
    // none). Written, unless given: then loss and gradients take it for the whole sum, of which the documents here are a part,
    // and `pull` says whether the part of the positive's own logit is added here. Not with num_dims > 0.
    double* log_negatives;  // [num_rows, kMaxSoftmaxes], or null
    bool given, pull;

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
