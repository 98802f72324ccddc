// y = silu(gate) * up, element by element.
#pragma once

#include "common/types.h"

namespace qemb {

struct SwigluForward {
    const void* gate;  // [count]
    const void* up;    // [count]
    void* y;           // [count]
    int64_t count;
    DType dtype;
    void* stream = nullptr;
};

struct SwigluBackward {
    const void* gate;
    const void* up;
    const void* dy;  // [count]
    void* dgate;     // [count]
    void* dup;       // [count]
    int64_t count;
    DType dtype;
    void* stream = nullptr;
};

namespace cpu {
void swiglu_forward(const SwigluForward& p);
void swiglu_backward(const SwigluBackward& p);
}  // namespace cpu

namespace cuda {
void swiglu_forward(const SwigluForward& p);
void swiglu_backward(const SwigluBackward& p);
}  // namespace cuda

}  // namespace qemb
