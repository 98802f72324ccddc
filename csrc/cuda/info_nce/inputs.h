// What the caller leaves out is derived, and positives that are no document are found: an index on the device is not
// known to the host.
#pragma once

#include "cuda/info_nce/panel.h"

namespace qemb::cuda::info_nce_kernels {

constexpr int kInputThreads = 256;

// A thread for each document.
template <class T>
__global__ void derive_documents(const Panel<T> a) {
    const int64_t document = blockIdx.x * int64_t(kInputThreads) + threadIdx.x;
    if (document >= a.p.num_documents) return;
    if (a.texts) a.texts[document] = document;
    if (a.roles) a.roles[document] = static_cast<uint8_t>(Role::kHard);
    if (a.owners) a.owners[document] = -1;
}

// A thread for each query. Where its positive is no document, another one stands in for it, and its score is NaN.
template <class T>
__global__ void check_positives(const Panel<T> a) {
    const int64_t query = blockIdx.x * int64_t(kInputThreads) + threadIdx.x;
    if (query >= a.p.num_queries) return;
    const int64_t given = a.given_positive[query];
    const bool right = given >= 0 && given < a.p.num_documents;
    const int64_t positive = right ? given : 0;
    a.checked_positive[query] = positive;
    a.fault[query] = right ? 0 : NAN;
    if (a.query_texts) a.query_texts[query] = a.p.document_text[positive];
    if (a.roles && right) a.roles[positive] = static_cast<uint8_t>(Role::kPositive);
}

}  // namespace qemb::cuda::info_nce_kernels
