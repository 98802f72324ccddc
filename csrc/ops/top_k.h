// Exact search: the k documents with the largest dot product for each query, by tiles with a running heap.
#pragma once

#include "common/types.h"

namespace qemb {

// Best first; equal scores by lower index. Where fewer than k documents qualify: score -inf, index -1. NaN never
// qualifies.
struct TopK {
    const void* queries;     // [num_queries, dim], contiguous
    const void* documents;   // [num_documents, dim], contiguous
    const int64_t* exclude;  // [num_queries, num_exclude] document indices, -1 for none; or null
    const float* ceiling;    // [num_queries]: documents that score above are skipped; or null
    float* scores;           // [num_queries, k]
    int64_t* indices;        // [num_queries, k]
    int64_t num_queries;
    int64_t num_documents;
    int64_t num_exclude;
    int64_t dim;
    int64_t k;
    DType dtype;
    void* scratch = nullptr;  // cuda: top_k_scratch(p) bytes
    void* stream = nullptr;
};

namespace cpu {
void top_k(const TopK& p);
}

namespace cuda {
int64_t top_k_scratch(const TopK& p);
void top_k(const TopK& p);
}  // namespace cuda

}  // namespace qemb
