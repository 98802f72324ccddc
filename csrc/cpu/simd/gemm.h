// C[M, N] (+)= A[M, K] B[K, N] with B packed in panels.
//
// A is read in place with any row and column stride (a transposed operand costs nothing). Each element of C is summed over K in
// the same order whatever the tile, so results do not depend on how the work was cut.
#pragma once

#include <utility>

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

// One butterfly of a transpose: afterwards a holds what both had at lanes without bit kBit, b the rest.
template <int kBit, class V, int... kLane>
QEMB_INLINE void exchange(V& a, V& b, std::integer_sequence<int, kLane...>) {
    constexpr int kCount = sizeof...(kLane);
#if defined(__clang__) || __GNUC__ >= 12
    const V low = __builtin_shufflevector(a, b, ((kLane & kBit) ? kCount + kLane - kBit : kLane)...);
    const V high = __builtin_shufflevector(a, b, ((kLane & kBit) ? kCount + kLane : kLane + kBit)...);
#else
    V low, high;
    ((low[kLane] = (kLane & kBit) ? b[kLane & kBit ? kLane - kBit : 0] : a[kLane]), ...);
    ((high[kLane] = (kLane & kBit) ? b[kLane] : a[kLane & kBit ? 0 : kLane + kBit]), ...);
#endif
    a = low;
    b = high;
}

template <class T, int kBit = kLanes<T> / 2>
QEMB_INLINE void transpose(Vec<T>* rows) {
    if constexpr (kBit > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<T>; ++i)
            if (!(i & kBit)) exchange<kBit>(rows[i], rows[i + kBit], std::make_integer_sequence<int, kLanes<T>>());
        transpose<T, kBit / 2>(rows);
    }
}

// B[k][n] = rows[n * row_stride + k]: the transpose of contiguous rows. Missing columns are zero.
template <class T>
inline void pack_transposed(const T* rows, int64_t row_stride, int64_t columns, int64_t depth, T* panels) {
    constexpr int kSide = kLanes<T>;
    for (int64_t start = 0; start < columns; start += kSide) {
        T* panel = panels + start / kPanel<T> * depth * kPanel<T> + start % kPanel<T>;
        const T* source = rows + start * row_stride;
        const int64_t width = min_of<int64_t>(kSide, columns - start);
        int64_t k = 0;
        if (width == kSide) {
            for (; k + kSide <= depth; k += kSide) {
                Vec<T> square[kSide];
#pragma GCC unroll 16
                for (int i = 0; i < kSide; ++i) square[i] = load(source + i * row_stride + k);
                transpose<T>(square);
#pragma GCC unroll 16
                for (int i = 0; i < kSide; ++i) store(panel + (k + i) * kPanel<T>, square[i]);
            }
        }
        for (; k < depth; ++k)
            for (int64_t n = 0; n < kSide; ++n) panel[k * kPanel<T> + n] = n < width ? source[n * row_stride + k] : T(0);
    }
    if (columns % kPanel<T> != 0 && columns % kPanel<T> <= kSide) {  // the second vector of the last panel
        T* panel = panels + columns / kPanel<T> * depth * kPanel<T> + kSide;
        for (int64_t k = 0; k < depth; ++k) store(panel + k * kPanel<T>, Vec<T>{});
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
