// The last token of each packed sequence -> (RMSNorm) -> first `dim` features (Matryoshka) -> (L2 norm), in one pass.
#pragma once

#include "common/types.h"

namespace qemb {

// What both passes take. A sequence without tokens gives a row of zeros and no gradient; on CUDA, one that does not
// lie among the tokens gives a row of NaN and no gradient.
struct LastTokenPool {
    const void* hidden;         // [T, embed], rows contiguous, row stride in elements below
    const void* norm_weight;    // [embed] or null: no RMSNorm
    const int32_t* cu_seqlens;  // [num_seqs + 1], on the host for the CPU
    int64_t num_tokens;         // T
    int64_t num_seqs;
    int64_t embed;
    int64_t dim;
    int64_t hidden_stride;
    double eps;
    bool normalize;
    DType dtype;
};

struct LastTokenPoolForward : LastTokenPool {
    void* out = nullptr;  // [num_seqs, dim]
    void* stream = nullptr;
};

struct LastTokenPoolBackward : LastTokenPool {
    const void* dout = nullptr;    // [num_seqs, dim], contiguous
    void* dhidden = nullptr;       // [T, embed], contiguous, zero on entry; only the last tokens are written
    void* dnorm_weight = nullptr;  // [embed] in the arithmetic type, written whole, or null
    void* scratch = nullptr;       // cuda: last_token_pool_backward_scratch(p) bytes
    void* stream = nullptr;
};

namespace cpu {
void last_token_pool_forward(const LastTokenPoolForward& p);
void last_token_pool_backward(const LastTokenPoolBackward& p);
}  // namespace cpu

namespace cuda {
int64_t last_token_pool_backward_scratch(const LastTokenPoolBackward& p);
void last_token_pool_forward(const LastTokenPoolForward& p);
void last_token_pool_backward(const LastTokenPoolBackward& p);
}  // namespace cuda

}  // namespace qemb
