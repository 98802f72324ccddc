// C[M, N] (+)= A[M, K] B[K, N] with B packed in panels.
//
// A is read in place with any row and column stride (a transposed operand costs nothing). Each element of C is summed over K in
// the same order whatever the tile, so results do not depend on how the work was cut.
#pragma once

#include "cpu/simd/vec.h"

namespace qemb::cpu::QEMB_ISA {

// Columns of a panel: two vectors. Rows of the register tile: what leaves room for them and the broadcast.
template <class T>
inline constexpr int kPanel = 2 * kLanes<T>;
inline constexpr int kTileRows = QEMB_VECTOR_BYTES == 64 ? 12 : QEMB_VECTOR_BYTES == 32 ? 6 : 4;

template <class T>
QEMB_INLINE int64_t panel_size(int64_t depth, int64_t columns) {
    return depth * round_up(columns, kPanel<T>);
}

// B[k][n] = rows[n * row_stride + k]: the transpose of contiguous rows. Missing columns are zero.
template <class T>
inline void pack_transposed(const T* rows, int64_t row_stride, int64_t columns, int64_t depth, T* panels) {
    for (int64_t start = 0; start < columns; start += kPanel<T>) {
        const int64_t width = min_of<int64_t>(kPanel<T>, columns - start);
        // Eight depths at a time: each source row gives one short run, each target line is written whole while it is warm.
        for (int64_t k0 = 0; k0 < depth; k0 += 8) {
            const int64_t k1 = min_of<int64_t>(k0 + 8, depth);
            for (int64_t n = 0; n < width; ++n) {
                const T* source = rows + (start + n) * row_stride;
                for (int64_t k = k0; k < k1; ++k) panels[k * kPanel<T> + n] = source[k];
            }
            for (int64_t k = k0; k < k1; ++k)
                for (int64_t n = width; n < kPanel<T>; ++n) panels[k * kPanel<T> + n] = 0;
        }
        panels += depth * kPanel<T>;
    }
}

// B[k][n] = rows[k * row_stride + n] * (scale ? scale[k] : 1)
template <class T>
inline void pack_rows(const T* rows, int64_t row_stride, int64_t depth, int64_t columns, T* panels, const T* scale = nullptr) {
    for (int64_t start = 0; start < columns; start += kPanel<T>) {
        const int64_t width = min_of<int64_t>(kPanel<T>, columns - start);
        for (int64_t k = 0; k < depth; ++k) {
            const T* source = rows + k * row_stride + start;
            const T factor = scale ? scale[k] : T(1);
            T* target = panels + k * kPanel<T>;
            if (width == kPanel<T>) {
                for (int n = 0; n < kPanel<T>; ++n) target[n] = source[n] * factor;
            } else {
                for (int64_t n = 0; n < width; ++n) target[n] = source[n] * factor;
                for (int64_t n = width; n < kPanel<T>; ++n) target[n] = 0;
            }
        }
        panels += depth * kPanel<T>;
    }
}

// Rows of C are written up to round_up(N, kPanel): c_row must leave that room. Defined in cpu/kernels/gemm.cpp.
template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* panels, T* c, int64_t c_row,
          bool accumulate);

}  // namespace qemb::cpu::QEMB_ISA
