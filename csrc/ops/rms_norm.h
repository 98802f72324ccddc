// y = s / rms(s) * weight over the last dimension, s = x, or x + residual where one is given.
#pragma once

#include "common/types.h"

namespace qemb {

struct RmsNormForward {
    const void* x;         // [rows, size], contiguous
    const void* residual;  // [rows, size], contiguous, or null
    const void* weight;    // [size]
    void* sum;             // [rows, size] s, contiguous; null without a residual
    void* y;               // [rows, size], contiguous
    void* rstd;            // [rows] 1 / rms, in the arithmetic type
    int64_t rows;
    int64_t size;
    double eps;
    DType dtype;
    void* stream = nullptr;
};

struct RmsNormBackward {
    const void* s;  // [rows, size], contiguous
    const void* weight;
    const void* rstd;
    const void* dy;    // [rows, size], contiguous
    const void* dsum;  // [rows, size], contiguous: what else flows into s; or null
    void* dx;          // [rows, size], contiguous: the gradient of x, and of the residual
    void* dweight;     // [size] in the arithmetic type, or null
    int64_t rows;
    int64_t size;
    DType dtype;
    void* scratch = nullptr;  // cuda: rms_norm_backward_scratch(p) bytes
    void* stream = nullptr;
};

namespace cpu {
void rms_norm_forward(const RmsNormForward& p);
void rms_norm_backward(const RmsNormBackward& p);
}  // namespace cpu

namespace cuda {
int64_t rms_norm_backward_scratch(const RmsNormBackward& p);
void rms_norm_forward(const RmsNormForward& p);
void rms_norm_backward(const RmsNormBackward& p);
}  // namespace cuda

}  // namespace qemb
