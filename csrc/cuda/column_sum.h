// Weight gradients: rows are shared out in blocks by their number alone, each block leaves one row of partial sums in
// scratch, and the partial rows are added in a fixed order. The same bits on any device, whatever it runs beside.
#pragma once

#include "cuda/device/reduce.h"
#include "cuda/launch.h"

namespace qemb::cuda {

// At most 512 blocks (four on every SM of an H100), of a multiple of `step` rows.
struct RowBlocks {
    int64_t block_rows;
    int64_t blocks;

    RowBlocks(int64_t rows, int64_t step) : block_rows(step * max(int64_t(1), ceil_div(rows, 512 * step))) {
        blocks = ceil_div(rows, block_rows);
    }
    int64_t scratch(int64_t size) const { return blocks * size * static_cast<int64_t>(sizeof(float)); }
};

// A block adds 32 columns: each warp every 32nd row, then a warp the sums of one column.
static __global__ void __launch_bounds__(1024)
    column_sum_kernel(const float* partial, int64_t rows, int64_t size, float* sum) {
    float (*sums)[33] = reinterpret_cast<float (*)[33]>(shared_bytes());
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * 32;
    float x = 0;
    if (first + lane < size) {
#pragma unroll 8
        for (int64_t row = warp; row < rows; row += 32) x += partial[row * size + first + lane];
    }
    sums[warp][lane] = x;
    sync_block();
    x = warp_sum(sums[lane][warp]);
    if (lane == 0 && first + warp < size) sum[first + warp] = x;
}

// sum[size] over partial[rows, size]; zeros where there are no rows.
inline void column_sum(const char* op, const void* partial, int64_t rows, int64_t size, void* sum, void* stream) {
    launch(op, column_sum_kernel, static_cast<unsigned>(ceil_div(size, 32)), 1024, 32 * 33 * sizeof(float), stream,
           static_cast<const float*>(partial), rows, size, static_cast<float*>(sum));
}

}  // namespace qemb::cuda
