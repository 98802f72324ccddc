// Last-token pooling on the CPU: gather, RMSNorm, Matryoshka cut and L2 norm while the row is in the first cache.
#include "ops/last_token_pool.h"
#include "cpu/kernels/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd/vec.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

// y = x * rstd * weight, cut to dim; z = y / |y|. Kept are y * unit and its norm, so that a row of any magnitude has a
// direction. The norm of a row of zeros counts as infinite: its z and its gradient are zero.
template <class T>
struct Pooled {
    T* x;
    T* weight;
    T* y;
    T rstd = 1;
    T unit = 1;
    T norm = 1;

    template <class Params>
    Pooled(const Params& p, int64_t row, T* scratch) : x(scratch), weight(scratch + p.embed), y(scratch + 2 * p.embed) {
        load_row(p.dtype, p.hidden, row * p.hidden_stride, x, p.embed);
        if (p.norm_weight) {
            load_row(p.dtype, p.norm_weight, 0, weight, p.embed);
            rstd = inverse_rms(x, p.embed, p.eps);
            for (int64_t i = 0; i < p.dim; ++i) y[i] = x[i] * rstd * weight[i];
        } else {
            for (int64_t i = 0; i < p.dim; ++i) y[i] = x[i];
        }
        if (!p.normalize) return;
        T squares = dot(y, y, p.dim);
        unit = unit_for(squares);
        if (unit != 1) {
            for (int64_t i = 0; i < p.dim; ++i) y[i] *= unit;
            squares = dot(y, y, p.dim);
        }
        norm = squares == 0 ? kInfinity<T> : static_cast<T>(__builtin_sqrt(static_cast<double>(squares)));
    }
};

template <class T, class Params>
T* rows_of_scratch(const Params& p, int64_t rows) {
    return static_cast<T*>(scratch_bytes(Slot::kTile, static_cast<size_t>(rows * p.embed) * sizeof(T)));
}

template <class T>
void forward_row(const LastTokenPoolForward& p, int64_t seq) {
    T* scratch = rows_of_scratch<T>(p, 3);
    if (p.cu_seqlens[seq + 1] == p.cu_seqlens[seq]) {
        for (int64_t i = 0; i < p.dim; ++i) scratch[i] = 0;
        store_row(p.dtype, scratch, p.out, seq * p.dim, p.dim);
        return;
    }
    const Pooled<T> pooled(p, p.cu_seqlens[seq + 1] - 1, scratch);
    for (int64_t i = 0; i < p.dim; ++i) pooled.y[i] /= pooled.norm;
    store_row(p.dtype, pooled.y, p.out, seq * p.dim, p.dim);
}

// Adds this row's share of the weight gradient to dweight (in the caller's order of rows).
template <class T>
void backward_row(const LastTokenPoolBackward& p, int64_t seq, T* dweight) {
    if (p.cu_seqlens[seq + 1] == p.cu_seqlens[seq]) return;
    T* scratch = rows_of_scratch<T>(p, 5);
    const int64_t row = p.cu_seqlens[seq + 1] - 1;
    const Pooled<T> pooled(p, row, scratch);
    T* dy = scratch + 3 * p.embed;
    T* dx = scratch + 4 * p.embed;
    load_row(p.dtype, p.dout, seq * p.dim, dy, p.dim);
    if (p.normalize) {
        // z = y / norm: dy = (dz - z (z . dz)) / norm
        const T radial_grad = dot(pooled.y, dy, p.dim) / (pooled.norm * pooled.norm);
        for (int64_t i = 0; i < p.dim; ++i) dy[i] = (dy[i] - pooled.y[i] * radial_grad) / pooled.norm * pooled.unit;
    }
    for (int64_t i = p.dim; i < p.embed; ++i) dx[i] = 0;
    if (p.norm_weight) {
        for (int64_t i = 0; i < p.dim; ++i) {
            if (dweight) dweight[i] += dy[i] * (pooled.x[i] * pooled.rstd);
            dx[i] = dy[i] * pooled.weight[i];
        }
        for (int64_t i = 0; i < p.embed; ++i) pooled.x[i] *= pooled.rstd;
        const T radial_grad = dot(dx, pooled.x, p.dim) / static_cast<T>(p.embed);
        for (int64_t i = 0; i < p.embed; ++i) dx[i] = (dx[i] - pooled.x[i] * radial_grad) * pooled.rstd;
    } else {
        for (int64_t i = 0; i < p.dim; ++i) dx[i] = dy[i];
    }
    store_row(p.dtype, dx, p.dhidden, row * p.embed, p.embed);
}

template <class T>
void backward(const LastTokenPoolBackward& p) {
    T* dweight = static_cast<T*>(p.dnorm_weight);
    if (dweight) {
        for (int64_t i = 0; i < p.embed; ++i) dweight[i] = 0;
        for (int64_t seq = 0; seq < p.num_seqs; ++seq)
            backward_row<T>(p, seq, dweight);  // one order for any thread count
    } else {
        parallel_for(p.num_seqs, [&](int64_t seq) { backward_row<T>(p, seq, nullptr); });
    }
}

}  // namespace

void last_token_pool_forward(const LastTokenPoolForward& p) {
    parallel_for(p.num_seqs, [&](int64_t seq) {
        if (p.dtype == DType::kFloat64)
            forward_row<double>(p, seq);
        else
            forward_row<float>(p, seq);
    });
}

void last_token_pool_backward(const LastTokenPoolBackward& p) {
    if (p.dtype == DType::kFloat64)
        backward<double>(p);
    else
        backward<float>(p);
}

}  // namespace qemb::cpu::QEMB_ISA
