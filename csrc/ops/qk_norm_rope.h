// Per-head RMSNorm, then rotary embedding: what Qwen3 does to q and to k before attention, in one pass. Without a
// weight there is no norm: the rotary embedding alone, as in Llama and Qwen2; rstd is then all ones.
#pragma once

#include "common/types.h"

namespace qemb {

// With n = x / rms(x) * weight and h = head_dim / 2: y[i] = n[i] cos[i] - n[i + h] sin[i], y[i + h] = n[i + h] cos[i] +
// n[i] sin[i].
struct QkNormRopeForward {
    const void* x;       // [tokens, heads, head_dim], contiguous
    const void* weight;  // [head_dim], or null
    const void* cos;     // [tokens, head_dim / 2] in the arithmetic type
    const void* sin;     // [tokens, head_dim / 2]
    void* y;             // [tokens, heads, head_dim], contiguous
    void* rstd;          // [tokens, heads] in the arithmetic type
    int64_t tokens;
    int64_t heads;
    int64_t head_dim;
    double eps;
    DType dtype;
    void* stream = nullptr;
};

struct QkNormRopeBackward {
    const void* x;
    const void* weight;
    const void* cos;
    const void* sin;
    const void* rstd;
    const void* dy;  // [tokens, heads, head_dim], contiguous
    void* dx;        // [tokens, heads, head_dim], contiguous
    void* dweight;   // [head_dim] in the arithmetic type, or null
    int64_t tokens;
    int64_t heads;
    int64_t head_dim;
    DType dtype;
    void* scratch = nullptr;  // cuda: qk_norm_rope_backward_scratch(p) bytes
    void* stream = nullptr;
};

namespace cpu {
void qk_norm_rope_forward(const QkNormRopeForward& p);
void qk_norm_rope_backward(const QkNormRopeBackward& p);
}  // namespace cpu

namespace cuda {
int64_t qk_norm_rope_backward_scratch(const QkNormRopeBackward& p);
void qk_norm_rope_forward(const QkNormRopeForward& p);
void qk_norm_rope_backward(const QkNormRopeBackward& p);
}  // namespace cuda

}  // namespace qemb
