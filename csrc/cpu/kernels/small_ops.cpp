// RMSNorm, per-head norm with rotary embedding, SwiGLU: one pass over memory each way. Rows are shared out in blocks whose size
// depends on the problem alone, and the blocks' weight gradients are added in order, so results have the same bits on any
// number of threads.
#include "cpu/kernels/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd/vec.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

constexpr int64_t kBlockElements = 16384;

QEMB_INLINE int64_t rows_per_block(int64_t size) { return max_of<int64_t>(1, kBlockElements / max_of<int64_t>(1, size)); }

template <class T>
T* tile_of(int64_t count) {
    return static_cast<T*>(scratch_bytes(Slot::kTile, static_cast<size_t>(count) * sizeof(T)));
}

template <class T>
QEMB_INLINE T* target(DType dtype, void* to, int64_t offset, T* buffer) {
    return in_place<T>(dtype) ? static_cast<T*>(to) + offset : buffer;
}
template <class T>
QEMB_INLINE void write(DType dtype, const T* from, void* to, int64_t offset, int64_t count) {
    if (!in_place<T>(dtype)) store_row(dtype, from, to, offset, count);
}

// dx = rstd (w dy - n mean(w dy n)) with n = x rstd; dweight += dy n. May write over dy.
template <class T>
QEMB_INLINE void norm_backward(const T* x, const T* weight, T rstd, const T* dy, T* dx, T* dweight, int64_t size) {
    Vec<T> along{};
    int64_t i = 0;
    for (; i + kLanes<T> <= size; i += kLanes<T>) {
        const Vec<T> product = load(dy + i) * (load(x + i) * rstd);  // n first: dy x may overflow
        along += product * load(weight + i);
        store(dweight + i, load(dweight + i) + product);
    }
    T total = sum_lanes<T>(along);
    for (; i < size; ++i) {
        const T product = dy[i] * (x[i] * rstd);
        total += product * weight[i];
        dweight[i] += product;
    }
    const T back = total / static_cast<T>(size);
    for (i = 0; i < size; ++i) dx[i] = rstd * (weight[i] * dy[i] - x[i] * rstd * back);
}

// Runs body(block, dweight of the block) over blocks of rows and adds the blocks' dweight in order.
template <class T, class Body>
void with_weight_gradient(int64_t rows, int64_t block_rows, int64_t size, void* dweight, Body body) {
    const int64_t blocks = ceil_div(rows, block_rows);
    T* partial =
        static_cast<T*>(scratch_bytes(Slot::kPanel, static_cast<size_t>(max_of<int64_t>(blocks, 1) * size) * sizeof(T)));
    parallel_for(blocks, [&](int64_t block) {
        T* mine = partial + block * size;
        for (int64_t i = 0; i < size; ++i) mine[i] = 0;
        body(block * block_rows, min_of((block + 1) * block_rows, rows), mine);
    });
    if (!dweight) return;
    T* total = static_cast<T*>(dweight);
    for (int64_t i = 0; i < size; ++i) total[i] = 0;
    for (int64_t block = 0; block < blocks; ++block) add_scaled(total, partial + block * size, T(1), size);
}

template <class T>
void rms_norm(const RmsNormForward& p) {
    const int64_t block_rows = rows_per_block(p.size);
    parallel_for(ceil_div(p.rows, block_rows), [&](int64_t block) {
        T* buffer = tile_of<T>(3 * p.size);
        load_row(p.dtype, p.weight, 0, buffer, p.size);
        for (int64_t row = block * block_rows; row < min_of((block + 1) * block_rows, p.rows); ++row) {
            const int64_t at = row * p.size;
            const T* x = read(p.dtype, p.x, at, p.size, buffer + p.size);
            if (p.residual) {
                const T* residual = read(p.dtype, p.residual, at, p.size, buffer + 2 * p.size);
                T* sum = target(p.dtype, p.sum, at, buffer + p.size);
                for (int64_t i = 0; i < p.size; ++i) sum[i] = x[i] + residual[i];
                write(p.dtype, sum, p.sum, at, p.size);
                // What backward will read: the sum as it is stored.
                x = read(p.dtype, p.sum, at, p.size, buffer + p.size);
            }
            T* y = target(p.dtype, p.y, at, buffer + p.size);
            const T rstd = inverse_rms(x, p.size, p.eps);
            static_cast<T*>(p.rstd)[row] = rstd;
            for (int64_t i = 0; i < p.size; ++i) y[i] = x[i] * rstd * buffer[i];
            write(p.dtype, y, p.y, at, p.size);
        }
    });
}

template <class T>
void rms_norm_gradients(const RmsNormBackward& p) {
    with_weight_gradient<T>(p.rows, rows_per_block(p.size), p.size, p.dweight, [&](int64_t begin, int64_t end, T* dweight) {
        T* buffer = tile_of<T>(4 * p.size);
        load_row(p.dtype, p.weight, 0, buffer, p.size);
        for (int64_t row = begin; row < end; ++row) {
            const int64_t at = row * p.size;
            const T* s = read(p.dtype, p.s, at, p.size, buffer + p.size);
            const T* dy = read(p.dtype, p.dy, at, p.size, buffer + 2 * p.size);
            T* dx = target(p.dtype, p.dx, at, buffer + 3 * p.size);
            norm_backward(s, buffer, static_cast<const T*>(p.rstd)[row], dy, dx, dweight, p.size);
            if (p.dsum) add_scaled(dx, read(p.dtype, p.dsum, at, p.size, buffer + 2 * p.size), T(1), p.size);
            write(p.dtype, dx, p.dx, at, p.size);
        }
    });
}

template <class T>
void load_or_ones(DType dtype, const void* weight, T* to, int64_t size) {
    if (weight) return load_row(dtype, weight, 0, to, size);
    for (int64_t i = 0; i < size; ++i) to[i] = 1;
}

template <class T>
void qk_norm_rope(const QkNormRopeForward& p) {
    const int64_t dim = p.head_dim, half = dim / 2, block_tokens = rows_per_block(p.heads * dim);
    parallel_for(ceil_div(p.tokens, block_tokens), [&](int64_t block) {
        T* weight = tile_of<T>(3 * dim);
        T* n = weight + dim;
        load_or_ones(p.dtype, p.weight, weight, dim);
        for (int64_t token = block * block_tokens; token < min_of((block + 1) * block_tokens, p.tokens); ++token) {
            const T* cos = static_cast<const T*>(p.cos) + token * half;
            const T* sin = static_cast<const T*>(p.sin) + token * half;
            for (int64_t row = token * p.heads; row < (token + 1) * p.heads; ++row) {
                const T* x = read(p.dtype, p.x, row * dim, dim, n);
                T* y = target(p.dtype, p.y, row * dim, weight + 2 * dim);
                const T rstd = p.weight ? inverse_rms(x, dim, p.eps) : T(1);
                static_cast<T*>(p.rstd)[row] = rstd;
                for (int64_t i = 0; i < dim; ++i) n[i] = x[i] * rstd * weight[i];
                for (int64_t i = 0; i < half; ++i) {
                    y[i] = n[i] * cos[i] - n[i + half] * sin[i];
                    y[i + half] = n[i + half] * cos[i] + n[i] * sin[i];
                }
                write(p.dtype, y, p.y, row * dim, dim);
            }
        }
    });
}

template <class T>
void qk_norm_rope_gradients(const QkNormRopeBackward& p) {
    const int64_t dim = p.head_dim, half = dim / 2;
    with_weight_gradient<T>(p.tokens, rows_per_block(p.heads * dim), dim, p.dweight,
                            [&](int64_t begin, int64_t end, T* dweight) {
                                T* weight = tile_of<T>(5 * dim);
                                T *x_buffer = weight + dim, *dy_buffer = weight + 2 * dim, *dn = weight + 3 * dim;
                                if (p.weight) load_row(p.dtype, p.weight, 0, weight, dim);
                                for (int64_t token = begin; token < end; ++token) {
                                    const T* cos = static_cast<const T*>(p.cos) + token * half;
                                    const T* sin = static_cast<const T*>(p.sin) + token * half;
                                    for (int64_t row = token * p.heads; row < (token + 1) * p.heads; ++row) {
                                        const T* x = read(p.dtype, p.x, row * dim, dim, x_buffer);
                                        const T* dy = read(p.dtype, p.dy, row * dim, dim, dy_buffer);
                                        T* dx = target(p.dtype, p.dx, row * dim, weight + 4 * dim);
                                        for (int64_t i = 0; i < half; ++i) {
                                            dn[i] = dy[i] * cos[i] + dy[i + half] * sin[i];
                                            dn[i + half] = dy[i + half] * cos[i] - dy[i] * sin[i];
                                        }
                                        if (p.weight)
                                            norm_backward(x, weight, static_cast<const T*>(p.rstd)[row], dn, dx, dweight, dim);
                                        else
                                            for (int64_t i = 0; i < dim; ++i) dx[i] = dn[i];
                                        write(p.dtype, dx, p.dx, row * dim, dim);
                                    }
                                }
                            });
}

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

#define QEMB_FOR_ARITHMETIC(op, Params, body) \
    void op(const Params& p) { p.dtype == DType::kFloat64 ? body<double>(p) : body<float>(p); }

QEMB_FOR_ARITHMETIC(rms_norm_forward, RmsNormForward, rms_norm)
QEMB_FOR_ARITHMETIC(rms_norm_backward, RmsNormBackward, rms_norm_gradients)
QEMB_FOR_ARITHMETIC(qk_norm_rope_forward, QkNormRopeForward, qk_norm_rope)
QEMB_FOR_ARITHMETIC(qk_norm_rope_backward, QkNormRopeBackward, qk_norm_rope_gradients)
QEMB_FOR_ARITHMETIC(swiglu_forward, SwigluForward, swiglu)
QEMB_FOR_ARITHMETIC(swiglu_backward, SwigluBackward, swiglu_gradients)

}  // namespace qemb::cpu::QEMB_ISA
