// The one hot inner tile: kTileRows x two vectors of C in registers, one broadcast of A and two loads of B for each step of K.
#include "cpu/simd/gemm.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

// Depth after which C is written back, so that a panel of B stays in the first cache.
constexpr int64_t kDepth = 256;

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

template <class T, int kRows = kTileRows - 1>
QEMB_INLINE void rest_tile(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* panel, T* c,
                           int64_t c_row, bool accumulate) {
    if constexpr (kRows > 0) {
        if (rows == kRows)
            register_tile<T, kRows>(depth, a, a_row, a_col, panel, c, c_row, accumulate);
        else
            rest_tile<T, kRows - 1>(rows, depth, a, a_row, a_col, panel, c, c_row, accumulate);
    }
}

}  // namespace

template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* panels, T* c, int64_t c_row,
          bool accumulate) {
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
                register_tile<T, kTileRows>(depth, a + m * a_row + k0 * a_col, a_row, a_col, panel, c + m * c_row + n, c_row,
                                            add);
            if (m < M)
                rest_tile<T>(M - m, depth, a + m * a_row + k0 * a_col, a_row, a_col, panel, c + m * c_row + n, c_row, add);
        }
    }
}

template void gemm(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, const float*, float*, int64_t, bool);
template void gemm(int64_t, int64_t, int64_t, const double*, int64_t, int64_t, const double*, double*, int64_t, bool);

}  // namespace qemb::cpu::QEMB_ISA
