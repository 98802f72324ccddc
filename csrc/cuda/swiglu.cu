// SwiGLU, element by element: 16 bytes of each operand a thread, read once and written once.
#include "cuda/device/vector.h"
#include "cuda/launch.h"
#include "ops/swiglu.h"

namespace qemb::cuda {
namespace {

constexpr int kThreads = 256;

QEMB_DEVICE float sigmoid(float x) { return reciprocal_approx(1.0f + expf(-x)); }

template <class T, int kLanes>
QEMB_DEVICE void swiglu_at(const SwigluForward& p, int64_t at) {
    const auto gate = load<kLanes>(static_cast<const T*>(p.gate) + at),
               up = load<kLanes>(static_cast<const T*>(p.up) + at);
    float y[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
    store(static_cast<T*>(p.y) + at, y);
}

template <class T, int kLanes>
QEMB_DEVICE void swiglu_at(const SwigluBackward& p, int64_t at) {
    const auto gate = load<kLanes>(static_cast<const T*>(p.gate) + at),
               up = load<kLanes>(static_cast<const T*>(p.up) + at), dy = load<kLanes>(static_cast<const T*>(p.dy) + at);
    float dgate[kLanes], dup[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
        const float s = sigmoid(gate[i]), silu = gate[i] * s;
        dup[i] = dy[i] * silu;
        dgate[i] = dy[i] * up[i] * fmaf(silu, 1.0f - s, s);
    }
    store(static_cast<T*>(p.dgate) + at, dgate);
    store(static_cast<T*>(p.dup) + at, dup);
}

// Whole vectors as one; what is left at the end one by one.
template <class T, int kLanes, class Params>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(Params p) {
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kLanes;
    if (at + kLanes <= p.count) {
        swiglu_at<T, kLanes>(p, at);
    } else {
        for (int64_t i = at; i < p.count; ++i) swiglu_at<T, 1>(p, i);
    }
}

template <class Params>
void launch_swiglu(const Params& p, bool aligned) {
    visit_dtype(p.dtype, [&]<class T>() {
        const int lanes = aligned ? kVectorLanes<T> : 1;
        const auto kernel = aligned ? swiglu_kernel<T, kVectorLanes<T>, Params> : swiglu_kernel<T, 1, Params>;
        launch("swiglu", kernel, static_cast<unsigned>(ceil_div(p.count, kThreads * lanes)), kThreads, 0, p.stream, p);
    });
}

}  // namespace

void swiglu_forward(const SwigluForward& p) { launch_swiglu(p, aligned16(p.gate, p.up, p.y)); }
void swiglu_backward(const SwigluBackward& p) { launch_swiglu(p, aligned16(p.gate, p.up, p.dy, p.dgate, p.dup)); }

}  // namespace qemb::cuda
