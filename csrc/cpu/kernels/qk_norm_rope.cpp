// RMSNorm of each head with rotary embedding, one pass over memory each way.
#include "ops/qk_norm_rope.h"

#include "cpu/kernels/blocks.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

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
    with_weight_gradient<T>(p.tokens, rows_per_block(p.heads * dim), max_of<int64_t>(1, kShortSum / p.heads), dim,
                            p.dweight, [&](int64_t begin, int64_t end, T* dweight) {
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
                                            norm_backward(x, weight, static_cast<const T*>(p.rstd)[row], dn, dx,
                                                          dweight, dim);
                                        else
                                            for (int64_t i = 0; i < dim; ++i) dx[i] = dn[i];
                                        write(p.dtype, dx, p.dx, row * dim, dim);
                                    }
                                }
                            });
}

}  // namespace

QEMB_FOR_ARITHMETIC(qk_norm_rope_forward, QkNormRopeForward, qk_norm_rope)
QEMB_FOR_ARITHMETIC(qk_norm_rope_backward, QkNormRopeBackward, qk_norm_rope_gradients)

}  // namespace qemb::cpu::QEMB_ISA
