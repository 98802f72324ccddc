// InfoNCE with the five groups of Qwen3 Embedding's equation 1 and its false-negative masks, loss and gradients in one sweep.
// Row panels: a block of queries meets all columns, so no [num_queries, num_documents] matrix ever exists.
#pragma once

#include "common/types.h"

namespace qemb {

// Which similarity the margin looks at in the document-document group.
enum class DocMask : int { kQueryDocument, kOwnScore, kNone };

// Row i: anchor q_i with positive p = d[positive[i]]. Candidates in one softmax with the positive:
//   hard        q_i . d_j  for owner[j] == i            query_query  q_i . q_j  for j != i
//   in_batch    q_i . d_j  for owner[j] != i            doc_doc      p . d_j    for owner[j] != i
// A candidate is dropped when its score exceeds q_i . p + margin, or when its text equals p (document_ids; for query_query
// the text of q_j's positive). Logits are float32 (float64 for float64 input); the positive never enters the panel.
struct InfoNce {
    const void* queries;          // [num_queries, dim], contiguous
    const void* documents;        // [num_documents, dim], contiguous
    const int64_t* positive;      // [num_queries]
    const int64_t* owner;         // [num_documents] or null (no document is owned)
    const int64_t* document_ids;  // [num_documents] or null (all texts differ)
    void* loss;                   // [num_queries] double
    void* d_queries;              // [num_queries, dim] float (double for float64), of the mean loss
    void* d_documents;            // [num_documents, dim], or null: loss only
    double* stats;                // [5]: sum of positive scores; sum and count of kept q-d scores; kept and dropped candidates
    int64_t num_queries;
    int64_t num_documents;
    int64_t dim;
    bool hard, in_batch, query_query, doc_doc;
    double margin;  // +inf: off
    DocMask doc_mask;
    double temperature;
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
