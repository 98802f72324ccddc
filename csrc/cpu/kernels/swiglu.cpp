// SwiGLU, one pass over memory each way; large results are written past the caches.
#include "ops/swiglu.h"

#include "cpu/kernels/blocks.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

constexpr int64_t kRun = 512;                        // elements that are widened at a time
constexpr int64_t kStreamBytes = int64_t(16) << 20;  // a larger result does not stay in a cache until it is read

template <class T>
bool streams(DType dtype, const void* to, int64_t count) {
    return in_place<T>(dtype) && count * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
           reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// Runs body(at, count, direct) over the elements; `direct` when whole lines can be read and written where they lie.
template <class T, class Body>
void for_each_run(DType dtype, int64_t total, Body body) {
    parallel_for(ceil_div(total, kBlockElements), [&](int64_t block) {
        for (int64_t at = block * kBlockElements; at < min_of((block + 1) * kBlockElements, total); at += kRun) {
            const int64_t count = min_of(kRun, total - at);
            body(at, count, in_place<T>(dtype) && count % (64 / sizeof(T)) == 0);
        }
        finish_streams();
    });
}

constexpr int kLine = 64 / QEMB_VECTOR_BYTES;  // vectors of a cache line

// A whole line at a time: a line that is streamed in parts may leave in parts, each a transfer of its own.
template <bool kStream, class T>
QEMB_INLINE void put_line(T* to, const Vec<T>* values) {
#pragma GCC unroll 4
    for (int i = 0; i < kLine; ++i) {
        if constexpr (kStream)
            stream(to + i * kLanes<T>, values[i]);
        else
            store(to + i * kLanes<T>, values[i]);
    }
}

template <class T>
QEMB_INLINE const T* run_of(DType dtype, const void* from, int64_t at, int64_t count, bool direct, T* buffer) {
    if (direct) return static_cast<const T*>(from) + at;
    load_row(dtype, from, at, buffer, count);
    return buffer;
}

template <bool kStream, class T>
QEMB_INLINE void swiglu_run(const T* gate, const T* up, T* y, int64_t count) {
    for (int64_t i = 0; i < count; i += kLine * kLanes<T>) {
        Vec<T> line[kLine];
#pragma GCC unroll 4
        for (int n = 0; n < kLine; ++n) {
            const int64_t at = i + n * kLanes<T>;
            const Vec<T> g = load(gate + at);
            line[n] = g / (T(1) + exp<T>(-g)) * load(up + at);
        }
        put_line<kStream>(y + i, line);
    }
}

template <class T>
void swiglu(const SwigluForward& p) {
    const bool past_caches = streams<T>(p.dtype, p.y, p.count);
    for_each_run<T>(p.dtype, p.count, [&](int64_t at, int64_t count, bool direct) {
        T* buffer = tile_of<T>(3 * kRun);
        const T* gate = run_of(p.dtype, p.gate, at, count, direct, buffer);
        const T* up = run_of(p.dtype, p.up, at, count, direct, buffer + kRun);
        T* y = direct ? static_cast<T*>(p.y) + at : buffer + 2 * kRun;
        if (direct && past_caches)
            swiglu_run<true>(gate, up, y, count);
        else
            swiglu_run<false>(gate, up, y, count);
        if (!direct) store_row(p.dtype, y, p.y, at, count);
    });
}

template <bool kStream, class T>
QEMB_INLINE void swiglu_gradient_run(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t count) {
    for (int64_t i = 0; i < count; i += kLine * kLanes<T>) {
        Vec<T> gate_line[kLine], up_line[kLine];
#pragma GCC unroll 4
        for (int n = 0; n < kLine; ++n) {
            const int64_t at = i + n * kLanes<T>;
            const Vec<T> g = load(gate + at), d = load(dy + at);
            const Vec<T> sigmoid = T(1) / (T(1) + exp<T>(-g)), silu = g * sigmoid;
            up_line[n] = d * silu;
            gate_line[n] = d * load(up + at) * (sigmoid + silu * (T(1) - sigmoid));
        }
        put_line<kStream>(dup + i, up_line);
        put_line<kStream>(dgate + i, gate_line);
    }
}

template <class T>
void swiglu_gradients(const SwigluBackward& p) {
    const bool past_caches = streams<T>(p.dtype, p.dgate, p.count) && streams<T>(p.dtype, p.dup, p.count);
    for_each_run<T>(p.dtype, p.count, [&](int64_t at, int64_t count, bool direct) {
        T* buffer = tile_of<T>(5 * kRun);
        const T* gate = run_of(p.dtype, p.gate, at, count, direct, buffer);
        const T* up = run_of(p.dtype, p.up, at, count, direct, buffer + kRun);
        const T* dy = run_of(p.dtype, p.dy, at, count, direct, buffer + 2 * kRun);
        T* dgate = direct ? static_cast<T*>(p.dgate) + at : buffer + 3 * kRun;
        T* dup = direct ? static_cast<T*>(p.dup) + at : buffer + 4 * kRun;
        if (direct && past_caches)
            swiglu_gradient_run<true>(gate, up, dy, dgate, dup, count);
        else
            swiglu_gradient_run<false>(gate, up, dy, dgate, dup, count);
        if (direct) return;
        store_row(p.dtype, dgate, p.dgate, at, count);
        store_row(p.dtype, dup, p.dup, at, count);
    });
}

}  // namespace

QEMB_FOR_ARITHMETIC(swiglu_forward, SwigluForward, swiglu)
QEMB_FOR_ARITHMETIC(swiglu_backward, SwigluBackward, swiglu_gradients)

}  // namespace qemb::cpu::QEMB_ISA
