// C[M, N] (+)= A[M, K] B[K, N] with B packed in panels of whole vectors, the last one as narrow as N allows.
//
// A is read through any strides, or packed in tiles where it is read often or its rows lie so that they evict each
// other. Each element of C is summed over K in the same order whatever the tile, so results do not depend on how the
// work was cut.
#pragma once

#include <utility>

#include "cpu/simd/vec.h"

namespace qemb::cpu::QEMB_ISA {

// The register tile: rows x vectors of C, and what is left for a row of B and one broadcast of A.
inline constexpr int kTileRows = QEMB_VECTOR_BYTES == 64 ? 8 : QEMB_VECTOR_BYTES == 32 ? 6 : 4;
inline constexpr int kTileVectors = QEMB_VECTOR_BYTES == 64 ? 3 : 2;
template <class T>
inline constexpr int kPanel = kTileVectors * kLanes<T>;

template <class T>
QEMB_INLINE int64_t panel_size(int64_t depth, int64_t columns) {
    return depth * round_up(columns, kLanes<T>);
}
// Columns of the panel that starts at `start`. The last two share what is left where one of a single vector would
// remain: that tile waits for its own sums.
template <class T>
QEMB_INLINE int64_t panel_width(int64_t start, int64_t columns) {
    const int64_t left = round_up(columns - start, kLanes<T>);
    if (kTileVectors > 2 && left == kPanel<T> + kLanes<T>) return kPanel<T> - kLanes<T>;
    return min_of<int64_t>(kPanel<T>, left);
}

// A as the tile reads it: element (m, k) at data[m / kTileRows * tile + m % kTileRows * row + k * column].
template <class T>
struct Left {
    const T* data;
    int64_t row, column, tile;
};
template <class T>
QEMB_INLINE Left<T> by_rows(const T* a, int64_t stride) {
    return {a, stride, 1, kTileRows * stride};
}
template <class T>
QEMB_INLINE Left<T> by_columns(const T* a, int64_t stride) {
    return {a, 1, stride, kTileRows};
}
template <class T>
QEMB_INLINE Left<T> by_tiles(const T* packed, int64_t depth) {
    return {packed, 1, kTileRows, kTileRows * depth};
}
template <class T>
QEMB_INLINE int64_t left_size(int64_t rows, int64_t depth) {
    return round_up(rows, kTileRows) * depth;
}
// To what by_tiles() reads. Missing rows are zero.
template <class T>
inline void pack_left(const Left<T>& from, int64_t rows, int64_t depth, T* packed) {
    for (int64_t start = 0; start < rows; start += kTileRows, packed += kTileRows * depth) {
        const T* tile = from.data + start / kTileRows * from.tile;
        const int64_t count = min_of<int64_t>(kTileRows, rows - start);
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t m = 0; m < kTileRows; ++m)
                packed[k * kTileRows + m] = m < count ? tile[m * from.row + k * from.column] : T(0);
    }
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
    for (int64_t first = 0; first < columns; first += panel_width<T>(first, columns)) {
        const int64_t stride = panel_width<T>(first, columns);
        for (int64_t start = first; start < first + stride; start += kSide) {
            T* panel = panels + first * depth + start - first;
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
                    for (int i = 0; i < kSide; ++i) store(panel + (k + i) * stride, square[i]);
                }
            }
            for (; k < depth; ++k)
                for (int64_t n = 0; n < kSide; ++n)
                    panel[k * stride + n] = n < width ? source[n * row_stride + k] : T(0);
        }
    }
}

// B[k][n] = rows[k * row_stride + n] * (scale ? scale[k] : 1)
template <class T>
inline void pack_rows(const T* rows, int64_t row_stride, int64_t depth, int64_t columns, T* panels,
                      const T* scale = nullptr) {
    for (int64_t start = 0; start < columns; start += panel_width<T>(start, columns)) {
        const int64_t stride = panel_width<T>(start, columns), width = min_of<int64_t>(stride, columns - start);
        for (int64_t k = 0; k < depth; ++k) {
            const T* source = rows + k * row_stride + start;
            const T factor = scale ? scale[k] : T(1);
            T* target = panels + k * stride;
            if (width == kPanel<T>) {
                for (int n = 0; n < kPanel<T>; ++n) target[n] = source[n] * factor;
            } else {
                for (int64_t n = 0; n < width; ++n) target[n] = source[n] * factor;
                for (int64_t n = width; n < stride; ++n) target[n] = 0;
            }
        }
        panels += depth * stride;
    }
}

// Rows of C are written up to round_up(N, kLanes): c_row must leave that room. Defined in cpu/kernels/gemm.cpp.
template <class T>
void gemm(int64_t M, int64_t N, int64_t K, Left<T> a, const T* panels, T* c, int64_t c_row, bool accumulate);

}  // namespace qemb::cpu::QEMB_ISA
