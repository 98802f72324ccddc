// RMSNorm with residual: a row stays in the registers of its warps between the sum of squares and the result, so that
// every value is read once and written once. Backward keeps the weight gradient of its rows in registers too.
#include "cuda/column_sum.h"
#include "cuda/device/vector.h"
#include "ops/rms_norm.h"

namespace qemb::cuda {
namespace {

constexpr const char* kOp = "rms_norm";

// kWarps warps share a row, kLanes values at a time. kHold > 0: at most that many times, held in registers; 0: a row of
// any length, read again for each pass.
template <class T_, int kLanes_, int kWarps_, int kHold_>
struct Shape {
    using T = T_;
    static constexpr int kLanes = kLanes_, kWarps = kWarps_, kHold = kHold_;
    static constexpr int kTeam = 32 * kWarps;           // threads of a row
    static constexpr int kTeams = kWarps == 1 ? 4 : 1;  // rows of a block at a time
    static constexpr int kThreads = kTeam * kTeams;
    static constexpr int kSlots = kHold > 0 ? kHold : 1;
    using Values = Packed<T, kLanes>;

    // body(slot, at) for every `at` of the row that is this thread's.
    template <class Body>
    static QEMB_DEVICE void for_each(int64_t size, Body body) {
        const int64_t first = static_cast<int64_t>(threadIdx.x % kTeam) * kLanes;
        if constexpr (kHold > 0) {
#pragma unroll
            for (int slot = 0; slot < kHold; ++slot)
                if (first + slot * kTeam * kLanes < size) body(slot, first + slot * kTeam * kLanes);
        } else {
            for (int64_t at = first; at < size; at += kTeam * kLanes) body(0, at);
        }
    }
    static QEMB_DEVICE float sum(float x) {
        if constexpr (kWarps == 1)
            return warp_sum(x);
        else
            return block_sum<kWarps>(x, reinterpret_cast<float*>(shared_bytes()));
    }
    // What sum() and, in the end, the teams' weight gradients need.
    static size_t shared(int64_t size) {
        return max(kWarps * sizeof(float), kTeams > 1 ? kTeams * static_cast<size_t>(size) * sizeof(float) : 0);
    }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, 512 / S::kThreads) rms_norm_kernel(RmsNormForward p) {
    using T = typename S::T;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * S::kTeams + threadIdx.x / S::kTeam;
    if (row >= p.rows) return;
    const T* x = static_cast<const T*>(p.x) + row * p.size;
    const T* residual = static_cast<const T*>(p.residual) + (p.residual ? row * p.size : 0);
    const T* weight = static_cast<const T*>(p.weight);
    T* sum = static_cast<T*>(p.sum) + (p.sum ? row * p.size : 0);
    T* y = static_cast<T*>(p.y) + row * p.size;

    // Load: all of it before the first store, which the compiler must not move loads across.
    typename S::Values held[S::kSlots], held_residual[S::kSlots];
    const auto load_at = [&](int slot, int64_t at) {
        held[slot] = load<S::kLanes>(x + at);
        if (residual) held_residual[slot] = load<S::kLanes>(residual + at);
    };
    // s as it is stored, which is also what backward will read.
    const auto s_at = [&](int slot, int64_t at) {
        if (S::kHold == 0) load_at(slot, at);
        if (!residual) return held[slot];
        float s[S::kLanes];
#pragma unroll
        for (int i = 0; i < S::kLanes; ++i) s[i] = held[slot][i] + held_residual[slot][i];
        return packed<T>(s);
    };
    if (S::kHold > 0) S::for_each(p.size, load_at);

    // Sum of squares
    float squares = 0;
    S::for_each(p.size, [&](int slot, int64_t at) {
        const auto s = s_at(slot, at);
        if (residual) store(sum + at, s);
#pragma unroll
        for (int i = 0; i < S::kLanes; ++i) squares = fmaf(s[i], s[i], squares);
    });
    squares = S::sum(squares);
    const float unit = unit_for(squares);
    if (unit != 1) {  // for all threads of the row
        squares = 0;
        S::for_each(p.size, [&](int slot, int64_t at) {
            const auto s = s_at(slot, at);
#pragma unroll
            for (int i = 0; i < S::kLanes; ++i) squares = fmaf(s[i] * unit, s[i] * unit, squares);
        });
        squares = S::sum(squares);
    }
    const float rstd = inverse_rms(squares / static_cast<float>(p.size), unit, p.eps);
    if (threadIdx.x % S::kTeam == 0) static_cast<float*>(p.rstd)[row] = rstd;

    // Result
    S::for_each(p.size, [&](int slot, int64_t at) {
        const auto s = s_at(slot, at);
        const auto w = load<S::kLanes>(weight + at);
        float out[S::kLanes];
#pragma unroll
        for (int i = 0; i < S::kLanes; ++i) out[i] = s[i] * rstd * w[i];
        store(y + at, out);
    });
}

// dx = rstd (w dy - n mean(w dy n)) + dsum with n = s rstd; the block's sum of dy n goes to its row of scratch.
template <class S>
__global__ void __launch_bounds__(S::kThreads, 512 / S::kThreads)
    rms_norm_backward_kernel(RmsNormBackward p, int64_t block_rows) {
    using T = typename S::T;
    constexpr int kLanes = S::kLanes;
    const int64_t size = p.size, begin = blockIdx.x * block_rows, end = min(begin + block_rows, p.rows);
    const T* weight = static_cast<const T*>(p.weight);
    float* partial = static_cast<float*>(p.scratch) + (p.dweight ? blockIdx.x * size : 0);
    float dweight[S::kSlots][kLanes] = {};
    if (S::kHold == 0 && p.dweight)
        S::for_each(size, [&](int, int64_t at) { store<kLanes>(partial + at, dweight[0]); });

    for (int64_t row = begin + threadIdx.x / S::kTeam; row < end; row += S::kTeams) {
        const T* s_row = static_cast<const T*>(p.s) + row * size;
        const T* dy_row = static_cast<const T*>(p.dy) + row * size;
        const T* dsum_row = static_cast<const T*>(p.dsum) + (p.dsum ? row * size : 0);
        T* dx = static_cast<T*>(p.dx) + row * size;
        const float rstd = static_cast<const float*>(p.rstd)[row];

        // Load
        typename S::Values s[S::kSlots], dy[S::kSlots], dsum[S::kSlots];
        const auto load_at = [&](int slot, int64_t at) {
            s[slot] = load<kLanes>(s_row + at);
            dy[slot] = load<kLanes>(dy_row + at);
            if (dsum_row) dsum[slot] = load<kLanes>(dsum_row + at);
        };
        if (S::kHold > 0) S::for_each(size, load_at);

        // How much of w dy lies along s
        float radial_grad = 0;
        S::for_each(size, [&](int slot, int64_t at) {
            if (S::kHold == 0) load_at(slot, at);
            const auto w = load<kLanes>(weight + at);
#pragma unroll
            for (int i = 0; i < kLanes; ++i) {
                const float product = dy[slot][i] * (s[slot][i] * rstd);  // n first: dy s may overflow
                radial_grad = fmaf(product, w[i], radial_grad);
                if (S::kHold > 0) dweight[slot][i] += product;
            }
        });
        const float back = S::sum(radial_grad) / static_cast<float>(size);

        // Result
        S::for_each(size, [&](int slot, int64_t at) {
            if (S::kHold == 0) load_at(slot, at);
            const auto w = load<kLanes>(weight + at);
            float out[kLanes];
#pragma unroll
            for (int i = 0; i < kLanes; ++i) {
                out[i] = rstd * (w[i] * dy[slot][i] - s[slot][i] * rstd * back);
                if (dsum_row) out[i] += dsum[slot][i];
                if (S::kHold == 0 && p.dweight) partial[at + i] += dy[slot][i] * (s[slot][i] * rstd);
            }
            store(dx + at, out);
        });
    }

    // Weight gradient
    if (S::kHold == 0 || !p.dweight) return;
    if constexpr (S::kTeams == 1) {
        S::for_each(size, [&](int slot, int64_t at) { store(partial + at, dweight[slot]); });
    } else {
        float* sums = reinterpret_cast<float*>(shared_bytes());
        float* mine = sums + threadIdx.x / S::kTeam * size;
        S::for_each(size, [&](int slot, int64_t at) { store(mine + at, dweight[slot]); });
        sync_block();
        for (int64_t at = threadIdx.x; at < size; at += S::kThreads) {
            float total = sums[at];
            for (int team = 1; team < S::kTeams; ++team) total += sums[team * size + at];
            partial[at] = total;
        }
    }
}

// body<Shape>() with the fewest warps that hold a row.
template <class Body>
void visit_shape(DType dtype, int64_t size, bool aligned, Body body) {
    visit_dtype(dtype, [&]<class T>() {
        constexpr int kLanes = kVectorLanes<T>;
        const int64_t slots = aligned && size % kLanes == 0 ? ceil_div(size, 32 * kLanes) : INT64_MAX;
        if (slots <= 4) return body.template operator()<Shape<T, kLanes, 1, 4>>();
        if (slots <= 16) return body.template operator()<Shape<T, kLanes, 4, 4>>();
        if (slots <= 32) return body.template operator()<Shape<T, kLanes, 8, 4>>();
        body.template operator()<Shape<T, 1, 8, 0>>();
    });
}

// A multiple of the rows that a block works on at a time, whatever the shape.
RowBlocks row_blocks(int64_t rows) { return {rows, 4}; }

}  // namespace

void rms_norm_forward(const RmsNormForward& p) {
    visit_shape(p.dtype, p.size, aligned16(p.x, p.residual, p.weight, p.sum, p.y), [&]<class S>() {
        launch(kOp, rms_norm_kernel<S>, static_cast<unsigned>(ceil_div(p.rows, S::kTeams)), S::kThreads,
               S::kWarps * sizeof(float), p.stream, p);
    });
}

int64_t rms_norm_backward_scratch(const RmsNormBackward& p) {
    return p.dweight ? row_blocks(p.rows).scratch(p.size) : 0;
}

void rms_norm_backward(const RmsNormBackward& p) {
    const RowBlocks blocks = row_blocks(p.rows);
    visit_shape(p.dtype, p.size, aligned16(p.s, p.weight, p.dy, p.dsum, p.dx, p.scratch), [&]<class S>() {
        launch(kOp, rms_norm_backward_kernel<S>, static_cast<unsigned>(blocks.blocks), S::kThreads, S::shared(p.size),
               p.stream, p, blocks.block_rows);
    });
    if (p.dweight) column_sum(kOp, p.scratch, blocks.blocks, p.size, p.dweight, p.stream);
}

}  // namespace qemb::cuda
