// The one hot inner tile: kTileRows x kTileVectors vectors of C in registers; each step of K loads a row of the panel
// of B and broadcasts a column of A.
#include "cpu/simd/gemm.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

// Depth after which C is written back, so that a panel of B and a tile of A stay in the first cache.
constexpr int64_t kDepth = 256;

template <class T, int kRows, int kVectors>
QEMB_INLINE void register_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* panel, T* c,
                               int64_t c_row, bool accumulate) {
    Vec<T> sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) sums[m][n] = Vec<T>{};
    for (int64_t k = 0; k < depth; ++k) {
        Vec<T> right[kVectors];
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) right[n] = load(panel + (k * kVectors + n) * kLanes<T>);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
            const T value = a[m * a_row + k * a_column];
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) sums[m][n] = multiply_add<T>(sums[m][n], value, right[n]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) {
            T* to = c + m * c_row + n * kLanes<T>;
            store(to, accumulate ? load(to) + sums[m][n] : sums[m][n]);
        }
    }
}

template <class T, int kVectors, int kRows = kTileRows - 1>
QEMB_INLINE void rest_tile(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* panel,
                           T* c, int64_t c_row, bool accumulate) {
    if constexpr (kRows > 0) {
        if (rows == kRows)
            register_tile<T, kRows, kVectors>(depth, a, a_row, a_column, panel, c, c_row, accumulate);
        else
            rest_tile<T, kVectors, kRows - 1>(rows, depth, a, a_row, a_column, panel, c, c_row, accumulate);
    }
}

// One panel of B against all rows of A.
template <class T, int kVectors>
void column_of_tiles(int64_t M, int64_t depth, const Left<T>& a, const T* panel, T* c, int64_t c_row, bool accumulate) {
    const T* tile = a.data;
    int64_t m = 0;
    for (; m + kTileRows <= M; m += kTileRows, tile += a.tile, c += kTileRows * c_row)
        register_tile<T, kTileRows, kVectors>(depth, tile, a.row, a.column, panel, c, c_row, accumulate);
    if (m < M) rest_tile<T, kVectors>(M - m, depth, tile, a.row, a.column, panel, c, c_row, accumulate);
}

template <class T, int kVectors = kTileVectors>
QEMB_INLINE void choose_width(int64_t width, int64_t M, int64_t depth, const Left<T>& a, const T* panel, T* c,
                              int64_t c_row, bool accumulate) {
    if constexpr (kVectors > 0) {
        if (width == kVectors * kLanes<T>)
            column_of_tiles<T, kVectors>(M, depth, a, panel, c, c_row, accumulate);
        else
            choose_width<T, kVectors - 1>(width, M, depth, a, panel, c, c_row, accumulate);
    }
}

}  // namespace

template <class T>
void gemm(int64_t M, int64_t N, int64_t K, Left<T> a, const T* panels, T* c, int64_t c_row, bool accumulate) {
    if (K == 0 && !accumulate) {
        for (int64_t m = 0; m < M; ++m)
            for (int64_t n = 0; n < round_up(N, kLanes<T>); ++n) c[m * c_row + n] = 0;
        return;
    }
    for (int64_t k = 0; k < K; k += kDepth, a.data += kDepth * a.column) {
        const int64_t depth = min_of(kDepth, K - k);
        for (int64_t n = 0; n < N; n += panel_width<T>(n, N)) {
            const int64_t width = panel_width<T>(n, N);
            choose_width<T>(width, M, depth, a, panels + n * K + k * width, c + n, c_row, accumulate || k > 0);
        }
    }
}

template void gemm(int64_t, int64_t, int64_t, Left<float>, const float*, float*, int64_t, bool);
template void gemm(int64_t, int64_t, int64_t, Left<double>, const double*, double*, int64_t, bool);
template void gemm(int64_t, int64_t, int64_t, Left<int32_t>, const int32_t*, int32_t*, int64_t, bool);

}  // namespace qemb::cpu::QEMB_ISA
