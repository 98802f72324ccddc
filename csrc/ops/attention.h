// Attention over packed sequences with grouped-query heads: out = softmax(scale * q k^T) v within each sequence.
// The score matrix exists only as tiles. Storage in `dtype`, arithmetic in float (double for float64).
#pragma once

#include "common/types.h"

namespace qemb {

// Query head h reads key head h / (num_heads / num_kv_heads). Causal masks are aligned to the bottom right: query i of
// num_q sees key j of num_k when j <= i + num_k - num_q. A query that sees no key gets zeros and lse = -inf.
struct AttentionForward {
    const void* q;                // [T, num_heads, head_dim]
    const void* k;                // [S, num_kv_heads, head_dim]
    const void* v;                // [S, num_kv_heads, head_dim]
    void* out;                    // [T, num_heads, head_dim], contiguous
    void* lse;                    // [T, num_heads] natural log, float (double for float64)
    const int32_t* cu_seqlens_q;  // [num_seqs + 1], on the host for the CPU
    const int32_t* cu_seqlens_k;  // [num_seqs + 1]
    int64_t num_seqs;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t q_token_stride, q_head_stride;  // in elements; the last dimension is contiguous
    int64_t k_token_stride, k_head_stride;
    int64_t v_token_stride, v_head_stride;
    double scale;
    bool causal;
    DType dtype;
    void* stream = nullptr;
};

struct AttentionBackward {
    const void* q;
    const void* k;
    const void* v;
    const void* out;   // [T, num_heads, head_dim], contiguous
    const void* dout;  // [T, num_heads, head_dim], contiguous
    const void* lse;   // [T, num_heads]
    void* dq;          // [T, num_heads, head_dim], contiguous, written whole
    void* dk;          // [S, num_kv_heads, head_dim], contiguous, written whole
    void* dv;          // [S, num_kv_heads, head_dim], contiguous, written whole
    const int32_t* cu_seqlens_q;
    const int32_t* cu_seqlens_k;
    int64_t num_seqs;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t q_token_stride, q_head_stride;
    int64_t k_token_stride, k_head_stride;
    int64_t v_token_stride, v_head_stride;
    double scale;
    bool causal;
    DType dtype;
    void* stream = nullptr;
};

namespace cpu {
void attention_forward(const AttentionForward& p);
void attention_backward(const AttentionBackward& p);
}  // namespace cpu

}  // namespace qemb
