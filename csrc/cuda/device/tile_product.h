// A 128 x 128 tile of a matrix product on tensor cores: 8 warps, three stages of shared memory filled ahead by
// asynchronous copies. Half types by m16n8k16 with float32 sums; float32 by three tf32 products, so that its error is
// that of float32.
#pragma once

#include <cstring>

#include "cuda/device/arch.h"

namespace qemb::cuda {

constexpr int kTile = 128, kTileThreads = 256, kStages = 3;
constexpr int kOperandBytes = 128 * 128;  // of a stage; left, then right, then the factors of the left
template <bool kScaled>
constexpr int kStageBytes = 2 * kOperandBytes + (kScaled ? kTile * static_cast<int>(sizeof(float)) : 0);
template <bool kScaled>
constexpr int kProductBytes = kStages * kStageBytes<kScaled>;  // dynamic shared memory of a block

template <class T>
constexpr int kDepth = 128 / static_cast<int>(sizeof(T));  // of a stage
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// How an operand lies in memory, global and shared: the depth along its rows, or across them.
enum class Depth { kAlong, kAcross };

// Shared memory in vectors of 16 bytes, permuted within a row so that no reading order below meets a bank twice.
template <class T, Depth kLayout>
struct Operand {
    static constexpr int kRows = kLayout == Depth::kAlong ? kTile : kDepth<T>;
    static constexpr int kVectors = kOperandBytes / 16 / kRows;

    QEMB_DEVICE static uint32_t offset(int row, int vector) {
        const int key = kLayout == Depth::kAcross && sizeof(T) == 4 ? row % 4 * 2 : row % 8;
        return static_cast<uint32_t>((row * kVectors + (vector ^ key)) * 16);
    }
    QEMB_DEVICE static uint32_t word(const char* tile, int row, int column) {
        uint32_t bits;
        memcpy(&bits, tile + offset(row, column / 4) + column % 4 * 4, 4);
        return bits;
    }
};

// A matrix in global memory; row i is row index[i] where an index is given. Zeros past its end, or past the column
// `end`.
template <class T>
struct Matrix {
    const T* data;
    int64_t rows, columns, end;
    const int64_t* index;
    bool vectors;  // every row is whole, aligned vectors of 16 bytes

    Matrix(const void* data, int64_t rows, int64_t columns, const int64_t* index = nullptr)
        : data(static_cast<const T*>(data)),
          rows(rows),
          columns(columns),
          end(columns),
          index(index),
          vectors(columns % kVector<T> == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {}
};

template <class T>
QEMB_DEVICE Vector16 load_elements(const T* from, int64_t count) {
    alignas(16) T values[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) values[i] = i < count ? from[i] : T{};
    Vector16 v;
    memcpy(&v, values, 16);
    return v;
}

// The tile of `from` whose corner is (row, column), into one operand of a stage.
template <class T, Depth kLayout>
QEMB_DEVICE void load_operand(char* to, const Matrix<T>& from, int64_t row, int64_t column) {
    using Shape = Operand<T, kLayout>;
    constexpr int kStep = kTileThreads / Shape::kVectors;  // rows; a multiple of 8: the permutation is the same in each
    const int first = threadIdx.x / Shape::kVectors, vector = threadIdx.x % Shape::kVectors;
    row += first;
    column += vector * kVector<T>;
    const int64_t rows = column < from.end ? from.rows - row : 0;
    char* const slot = to + Shape::offset(first, vector);
    const T* source = from.data + row * from.columns + column;
#pragma unroll
    for (int i = 0; i < kOperandBytes / 16 / kTileThreads; ++i) {
        const bool valid = i * kStep < rows;
        const T* at = valid ? source : from.data;
        if (valid && from.index) at = from.data + from.index[row + i * kStep] * from.columns + column;
        char* const here = slot + i * kStep * Shape::kVectors * 16;
        if (from.vectors)
            cp_async16(shared_address(here), at, valid);
        else
            store16(here, load_elements(at, valid ? from.end - column : 0));
        source += kStep * from.columns;
    }
}

// One factor for each of the left operand's rows in memory, of which the tile has `count`, a multiple of 8.
template <class T>
QEMB_DEVICE void load_factors(char* stage, const T* from, int count) {
    const int at = static_cast<int>(threadIdx.x) * kVector<T>;
    if (at < count)
        cp_async16(shared_address(stage + 2 * kOperandBytes) + static_cast<uint32_t>(at * static_cast<int>(sizeof(T))),
                   from + at, true);
}

// Fragments of 32 bytes of depth: 16 rows of the left operand, 16 columns of the right.
template <class T, Depth kLayout>
QEMB_DEVICE void load_left(uint32_t (&words)[4], const char* tile, int row, int step) {
    using Shape = Operand<T, kLayout>;
    const int lane = threadIdx.x % 32;
    if constexpr (kLayout == Depth::kAlong) {
        ldmatrix_x4(words, shared_address(tile) + Shape::offset(row + lane % 16, 2 * step + lane / 16));
    } else if constexpr (sizeof(T) == 2) {
        const int vector = row / 8 + lane / 8 % 2;
        ldmatrix_x4_trans(words, shared_address(tile) + Shape::offset(16 * step + lane / 16 * 8 + lane % 8, vector));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            words[i] = Shape::word(tile, 8 * step + lane % 4 + i / 2 * 4, row + lane / 4 + i % 2 * 8);
    }
}
template <class T, Depth kLayout>
QEMB_DEVICE void load_right(uint32_t (&words)[4], const char* tile, int column, int step) {
    using Shape = Operand<T, kLayout>;
    const int lane = threadIdx.x % 32;
    if constexpr (kLayout == Depth::kAlong) {
        const int row = column + lane / 16 * 8 + lane % 8;
        ldmatrix_x4(words, shared_address(tile) + Shape::offset(row, 2 * step + lane / 8 % 2));
    } else if constexpr (sizeof(T) == 2) {
        const int row = 16 * step + lane / 8 % 2 * 8 + lane % 8;
        ldmatrix_x4_trans(words, shared_address(tile) + Shape::offset(row, column / 8 + lane / 16));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            words[i] = Shape::word(tile, 8 * step + lane % 4 + i % 2 * 4, column + lane / 4 + i / 2 * 8);
    }
}

QEMB_DEVICE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// Multiplies a fragment of the left operand by its factors.
template <class T, Depth kLayout>
QEMB_DEVICE void scale_left(uint32_t (&words)[4], const char* factors, int row, int step) {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    const T* const f = reinterpret_cast<const T*>(factors);
    if constexpr (sizeof(T) == 4) {
        const int at = kLayout == Depth::kAlong ? row + group : 8 * step + pair;
        const int far = at + (kLayout == Depth::kAlong ? 8 : 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool second = kLayout == Depth::kAlong ? i % 2 : i / 2;
            words[i] = __builtin_bit_cast(uint32_t, as_float(words[i]) * f[second ? far : at]);
        }
    } else if constexpr (kLayout == Depth::kAlong) {
        const uint32_t near = f[row + group].bits * 0x10001u, far = f[row + group + 8].bits * 0x10001u;
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = multiply_pair<T>(words[i], i % 2 ? far : near);
    } else {
        uint32_t two[2];
        memcpy(&two[0], f + 16 * step + 2 * pair, 4);
        memcpy(&two[1], f + 16 * step + 2 * pair + 8, 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = multiply_pair<T>(words[i], two[i / 2]);
    }
}

// Words of float32 as a tf32 number and the tf32 number that is its error.
QEMB_DEVICE void split(const uint32_t (&words)[4], uint32_t (&big)[4], uint32_t (&small)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        big[i] = to_tf32(as_float(words[i]));
        small[i] = to_tf32(as_float(words[i]) - as_float(big[i]));
    }
}

// A warp's part of the tile, 64 x 32, as tensor cores hold it; element_row and element_column say where it is.
using Sums = float[4][4][4];
QEMB_DEVICE int element_row(int m, int i) {
    return static_cast<int>(threadIdx.x / 128 * 64 + threadIdx.x % 32 / 4) + m * 16 + i / 2 * 8;
}
QEMB_DEVICE int element_column(int n, int i) {
    return static_cast<int>(threadIdx.x / 32 % 4 * 32 + threadIdx.x % 4 * 2) + n * 8 + i % 2;
}

// body(row, column, sum) for each element of the tile that this thread holds.
template <class Body>
QEMB_DEVICE void each_element(Sums& sums, const Body& body) {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) body(element_row(m, i), element_column(n, i), sums[m][n][i]);
}

// sums += left x right over one stage.
template <class T, Depth kLeft, Depth kRight, bool kScaled>
QEMB_DEVICE void multiply_stage(Sums& sums, const char* stage) {
    const char* const right = stage + kOperandBytes;
    const char* const factors = right + kOperandBytes;
    const int row = threadIdx.x / 128 * 64, column = threadIdx.x / 32 % 4 * 32;
    const auto left = [&](uint32_t (&words)[4], int m, int step) {
        load_left<T, kLeft>(words, stage, row + m * 16, step);
        if constexpr (kScaled) scale_left<T, kLeft>(words, factors, row + m * 16, step);
    };
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            uint32_t a[4], b[2][4];
            load_right<T, kRight>(b[0], right, column, step);
            load_right<T, kRight>(b[1], right, column + 16, step);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                left(a, m, step);
#pragma unroll
                for (int n = 0; n < 4; ++n) mma<T>(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
        }
    } else {
        // Tensor cores truncate as they add: sums of more than a stage are rounded in ordinary arithmetic.
#pragma unroll
        for (int m0 = 0; m0 < 4; m0 += 2) {
            float part[2][4][4] = {};
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                uint32_t words[4], b_big[2][4], b_small[2][4];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    load_right<T, kRight>(words, right, column + half * 16, step);
                    split(words, b_big[half], b_small[half]);
                }
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    uint32_t a_big[4], a_small[4];
                    left(words, m0 + m, step);
                    split(words, a_big, a_small);
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        const int half = n / 2, i = n % 2 * 2;
                        mma_tf32(part[m][n], a_small, b_big[half][i], b_big[half][i + 1]);
                        mma_tf32(part[m][n], a_big, b_small[half][i], b_small[half][i + 1]);
                        mma_tf32(part[m][n], a_big, b_big[half][i], b_big[half][i + 1]);
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[m0 + m][n][i] += part[m][n][i];
        }
    }
}

// sums += left x right over `steps` stages, filled by load(step, stage). Afterwards all of shared memory is free.
template <class T, Depth kLeft, Depth kRight, bool kScaled, class Load>
QEMB_DEVICE void multiply_add(Sums& sums, int64_t steps, const Load& load) {
    char* const shared = shared_bytes();
    const auto prefetch = [&](int64_t step) {
        if (step < steps) load(step, shared + step % kStages * kStageBytes<kScaled>);
        cp_async_commit();
    };
#pragma unroll 1  // fewer registers
    for (int step = 0; step < kStages - 1; ++step) prefetch(step);
    for (int64_t step = 0; step < steps; ++step) {
        cp_async_wait<kStages - 2>();
        sync_block();  // the stage is here for everyone, and everyone is done with the one that is filled next
        prefetch(step + kStages - 1);
        multiply_stage<T, kLeft, kRight, kScaled>(sums, shared + step % kStages * kStageBytes<kScaled>);
    }
    cp_async_wait<0>();
    sync_block();
}
template <class T, Depth kLeft, Depth kRight, bool kScaled, class Load>
QEMB_DEVICE void multiply(Sums& sums, int64_t steps, const Load& load) {
    each_element(sums, [](int, int, float& sum) { sum = 0; });
    multiply_add<T, kLeft, kRight, kScaled>(sums, steps, load);
}

}  // namespace qemb::cuda
