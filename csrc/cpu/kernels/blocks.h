// Rows in blocks whose size depends on the problem alone; the blocks' weight gradients are added in order, so that
// results have the same bits on any number of threads.
#pragma once

#include "cpu/kernels/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd/vec.h"

namespace qemb::cpu::QEMB_ISA {

constexpr int64_t kBlockElements = 16384;
constexpr int64_t kShortSum = 32;  // rows added one after another

QEMB_INLINE int64_t rows_per_block(int64_t size) {
    return max_of<int64_t>(1, kBlockElements / max_of<int64_t>(1, size));
}

template <class T>
T* tile_of(int64_t count) {
    return static_cast<T*>(scratch_bytes(Slot::kTile, static_cast<size_t>(count) * sizeof(T)));
}

template <class T>
QEMB_INLINE T* target(DType dtype, void* to, int64_t offset, T* buffer) {
    return in_place<T>(dtype) ? static_cast<T*>(to) + offset : buffer;
}
template <class T>
QEMB_INLINE void write(DType dtype, const T* from, void* to, int64_t offset, int64_t count) {
    if (!in_place<T>(dtype)) store_row(dtype, from, to, offset, count);
}

// dx = rstd (w dy - n mean(w dy n)) with n = x rstd; dweight += dy n. May write over dy.
template <class T>
QEMB_INLINE void norm_backward(const T* x, const T* weight, T rstd, const T* dy, T* dx, T* dweight, int64_t size) {
    Vec<T> radial_grad{};
    int64_t i = 0;
    for (; i + kLanes<T> <= size; i += kLanes<T>) {
        const Vec<T> product = load(dy + i) * (load(x + i) * rstd);  // n first: dy x may overflow
        radial_grad += product * load(weight + i);
        store(dweight + i, load(dweight + i) + product);
    }
    T total = sum_lanes<T>(radial_grad);
    for (; i < size; ++i) {
        const T product = dy[i] * (x[i] * rstd);
        total += product * weight[i];
        dweight[i] += product;
    }
    const T back = total / static_cast<T>(size);
    for (i = 0; i < size; ++i) dx[i] = rstd * (weight[i] * dy[i] - x[i] * rstd * back);
}

// Runs body(begin, end, dweight) over blocks of rows. A block adds up the dweight of `short_rows` rows at a time: rows
// added one after another in float32 lose digits with their number. The blocks' dweight are added in order.
template <class T, class Body>
void with_weight_gradient(int64_t rows, int64_t block_rows, int64_t short_rows, int64_t size, void* dweight,
                          Body body) {
    const int64_t blocks = ceil_div(rows, block_rows);
    T* partial = static_cast<T*>(
        scratch_bytes(Slot::kPanel, static_cast<size_t>(max_of<int64_t>(blocks, 1) * 2 * size) * sizeof(T)));
    parallel_for(blocks, [&](int64_t block) {
        T *mine = partial + 2 * block * size, *few = mine + size;
        for (int64_t i = 0; i < size; ++i) mine[i] = 0;
        const int64_t end = min_of((block + 1) * block_rows, rows);
        if (block_rows <= short_rows) return body(block * block_rows, end, mine);
        for (int64_t row = block * block_rows; row < end; row += short_rows) {
            for (int64_t i = 0; i < size; ++i) few[i] = 0;
            body(row, min_of(row + short_rows, end), few);
            add_scaled(mine, few, T(1), size);
        }
    });
    if (!dweight) return;
    T* total = static_cast<T*>(dweight);
    for (int64_t i = 0; i < size; ++i) total[i] = 0;
    for (int64_t block = 0; block < blocks; ++block) add_scaled(total, partial + 2 * block * size, T(1), size);
}

}  // namespace qemb::cpu::QEMB_ISA

// An op for the arithmetic type of its storage.
#define QEMB_FOR_ARITHMETIC(op, Params, body) \
    void op(const Params& p) { p.dtype == DType::kFloat64 ? body<double>(p) : body<float>(p); }
