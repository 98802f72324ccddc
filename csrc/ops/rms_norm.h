// y = x / rms(x) * weight over the last dimension.
#pragma once

#include "common/types.h"

namespace qemb {

struct RmsNormForward {
    const void* x;       // [rows, size], contiguous
    const void* weight;  // [size]
    void* y;             // [rows, size], contiguous
    void* rstd;          // [rows] 1 / rms, in the arithmetic type
    int64_t rows;
    int64_t size;
    double eps;
    DType dtype;
    void* stream = nullptr;
};

struct RmsNormBackward {
    const void* x;
    const void* weight;
    const void* rstd;
    const void* dy;  // [rows, size], contiguous
    void* dx;        // [rows, size], contiguous
    void* dweight;   // [size] in the arithmetic type, or null
    int64_t rows;
    int64_t size;
    DType dtype;
    void* stream = nullptr;
};

namespace cpu {
void rms_norm_forward(const RmsNormForward& p);
void rms_norm_backward(const RmsNormBackward& p);
}  // namespace cpu

}  // namespace qemb
