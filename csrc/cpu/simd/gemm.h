// C[M, N] (+)= A[M, K] B[K, N] with B packed in panels: the one hot inner tile, held in registers.
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
// Depth after which C is written back, so that a panel of B stays in the first cache.
inline constexpr int64_t kDepth = 256;

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

template <class T, int kRows>
QEMB_INLINE void register_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* panel, T* c, int64_t c_row,
                               bool accumulate) {
    Vec<T> sums[kRows][2];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) sums[m][0] = sums[m][1] = Vec<T>{};
    for (int64_t k = 0; k < depth; ++k) {
        const Vec<T> left = load(panel + k * kPanel<T>);
        const Vec<T> right = load(panel + k * kPanel<T> + kLanes<T>);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
            const T value = a[m * a_row + k * a_col];
            sums[m][0] += value * left;
            sums[m][1] += value * right;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
        T* row = c + m * c_row;
        if (accumulate) {
            sums[m][0] += load(row);
            sums[m][1] += load(row + kLanes<T>);
        }
        store(row, sums[m][0]);
        store(row + kLanes<T>, sums[m][1]);
    }
}

template <class T, int kRows = kTileRows>
QEMB_INLINE void rest_tile(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* panel, T* c,
                           int64_t c_row, bool accumulate) {
    if constexpr (kRows > 0) {
        if (rows == kRows)
            register_tile<T, kRows>(depth, a, a_row, a_col, panel, c, c_row, accumulate);
        else
            rest_tile<T, kRows - 1>(rows, depth, a, a_row, a_col, panel, c, c_row, accumulate);
    }
}

// Rows of C are written up to round_up(N, kPanel): c_row must leave that room.
template <class T>
__attribute__((noinline)) static void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col,
                                           const T* panels, T* c, int64_t c_row, bool accumulate) {
    if (K == 0 && !accumulate) {
        for (int64_t m = 0; m < M; ++m)
            for (int64_t n = 0; n < round_up(N, kPanel<T>); ++n) c[m * c_row + n] = 0;
        return;
    }
    for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
        const int64_t depth = min_of(kDepth, K - k0);
        const bool add = accumulate || k0 > 0;
        for (int64_t n = 0; n < N; n += kPanel<T>) {
            const T* panel = panels + (n / kPanel<T> * K + k0) * kPanel<T>;
            int64_t m = 0;
            for (; m + kTileRows <= M; m += kTileRows)
                register_tile<T, kTileRows>(depth, a + m * a_row + k0 * a_col, a_row, a_col, panel, c + m * c_row + n, c_row, add);
            if (m < M) rest_tile<T, kTileRows - 1>(M - m, depth, a + m * a_row + k0 * a_col, a_row, a_col, panel, c + m * c_row + n, c_row, add);
        }
    }
}

}  // namespace qemb::cpu::QEMB_ISA
