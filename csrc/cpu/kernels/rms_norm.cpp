// RMSNorm, one pass over memory each way.
#include "ops/rms_norm.h"

#include "cpu/kernels/blocks.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

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
    with_weight_gradient<T>(
        p.rows, rows_per_block(p.size), kShortSum, p.size, p.dweight, [&](int64_t begin, int64_t end, T* dweight) {
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

}  // namespace

QEMB_FOR_ARITHMETIC(rms_norm_forward, RmsNormForward, rms_norm)
QEMB_FOR_ARITHMETIC(rms_norm_backward, RmsNormBackward, rms_norm_gradients)

}  // namespace qemb::cpu::QEMB_ISA
