// Per-head RMSNorm and rotary embedding: a warp takes a token, a few of its lanes a head. A lane holds the same places
// of both halves of the head, which rotation mixes, and reads the token's angles and the weight once for all heads.
#include "cuda/column_sum.h"
#include "cuda/device/vector.h"
#include "ops/qk_norm_rope.h"

namespace qemb::cuda {
namespace {

constexpr const char* kOp = "qk_norm_rope";
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kMaxHeadDim = 256;

// kWidth lanes share a head, kLanes values of each half at a time, kSlots times. kHalf: half of head_dim, 0 where it is
// not known when compiling.
template <class T_, int kLanes_, int kWidth_, int kSlots_, int kHalf_>
struct Shape {
    using T = T_;
    static constexpr int kLanes = kLanes_, kWidth = kWidth_, kSlots = kSlots_, kHalf = kHalf_;
    static constexpr int kTeams = 32 / kWidth;  // heads of a warp at a time

    int half, lane;

    QEMB_DEVICE explicit Shape(int64_t head_dim)
        : half(kHalf ? kHalf : static_cast<int>(head_dim) / 2), lane(threadIdx.x % kWidth) {}
    QEMB_DEVICE int at(int slot) const { return (slot * kWidth + lane) * kLanes; }
    QEMB_DEVICE bool inside(int slot) const { return kHalf || at(slot) < half; }
    static QEMB_DEVICE float sum(float x) { return lanes_sum<kWidth>(x); }
};

// What a lane holds of a row of two halves, zeros past its end.
template <class S, class T>
struct Halves {
    Packed<T, S::kLanes> value[S::kSlots][2];

    QEMB_DEVICE void read(const S& shape, const T* row, bool valid = true) {
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                value[slot][h] = valid && shape.inside(slot) ? load<S::kLanes>(row + h * shape.half + shape.at(slot))
                                                             : Packed<T, S::kLanes>{};
    }
    QEMB_DEVICE void read_or_ones(const S& shape, const T* row) {
        if (row) return read(shape, row);
        float ones[S::kLanes];
#pragma unroll
        for (int i = 0; i < S::kLanes; ++i) ones[i] = 1.0f;
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot)
#pragma unroll
            for (int h = 0; h < 2; ++h) value[slot][h] = packed<T>(ones);
    }
};

// The cosines and sines of a token.
template <class S>
struct Angles {
    Packed<float, S::kLanes> cos[S::kSlots], sin[S::kSlots];

    QEMB_DEVICE Angles(const S& shape, const void* cosines, const void* sines, int64_t token) {
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) {
            const int64_t at = token * shape.half + shape.at(slot);
            cos[slot] = shape.inside(slot) ? load<S::kLanes>(static_cast<const float*>(cosines) + at)
                                           : Packed<float, S::kLanes>{};
            sin[slot] = shape.inside(slot) ? load<S::kLanes>(static_cast<const float*>(sines) + at)
                                           : Packed<float, S::kLanes>{};
        }
    }
};

template <class S>
__global__ void __launch_bounds__(kThreads) qk_norm_rope_kernel(QkNormRopeForward p) {
    using T = typename S::T;
    constexpr int kLanes = S::kLanes;
    const S shape(p.head_dim);
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (token >= p.tokens) return;
    Halves<S, T> weight;
    weight.read_or_ones(shape, static_cast<const T*>(p.weight));
    const Angles<S> angles(shape, p.cos, p.sin, token);

    for (int64_t first = 0; first < p.heads; first += S::kTeams) {
        const int64_t head = first + threadIdx.x % 32 / S::kWidth, row = token * p.heads + head;
        const bool valid = head < p.heads;
        Halves<S, T> x;
        x.read(shape, static_cast<const T*>(p.x) + row * p.head_dim, valid);

        // Norm
        float unit = 1;
        const auto sum_of_squares = [&] {
            float squares = 0;
#pragma unroll
            for (int slot = 0; slot < S::kSlots; ++slot)
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int i = 0; i < kLanes; ++i)
                        squares = fmaf(x.value[slot][h][i] * unit, x.value[slot][h][i] * unit, squares);
            return S::sum(squares);
        };
        float squares = sum_of_squares();
        unit = unit_for(squares);
        if (any_lane(unit != 1)) squares = sum_of_squares();
        const float rstd = p.weight ? inverse_rms(squares / static_cast<float>(2 * shape.half), unit, p.eps) : 1.0f;
        if (valid && shape.lane == 0) static_cast<float*>(p.rstd)[row] = rstd;

        // Rotation
        T* y = static_cast<T*>(p.y) + row * p.head_dim;
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) {
            if (!valid || !shape.inside(slot)) continue;
            float low[kLanes], high[kLanes];
#pragma unroll
            for (int i = 0; i < kLanes; ++i) {
                const float a = x.value[slot][0][i] * rstd * weight.value[slot][0][i];
                const float b = x.value[slot][1][i] * rstd * weight.value[slot][1][i];
                low[i] = a * angles.cos[slot][i] - b * angles.sin[slot][i];
                high[i] = b * angles.cos[slot][i] + a * angles.sin[slot][i];
            }
            store(y + shape.at(slot), low);
            store(y + shape.half + shape.at(slot), high);
        }
    }
}

// With dn = dy turned back and n = x rstd: dx = rstd (w dn - n mean(w dn n)); the block's sum of dn n goes to its row
// of scratch.
template <class S>
__global__ void __launch_bounds__(kThreads) qk_norm_rope_backward_kernel(QkNormRopeBackward p, int64_t block_tokens) {
    using T = typename S::T;
    constexpr int kLanes = S::kLanes;
    const S shape(p.head_dim);
    const int warp = threadIdx.x / 32, team = threadIdx.x % 32 / S::kWidth;
    const int64_t begin = blockIdx.x * block_tokens, end = min(begin + block_tokens, p.tokens);
    Halves<S, T> weight;
    weight.read_or_ones(shape, static_cast<const T*>(p.weight));
    float dweight[S::kSlots][2][kLanes] = {};

    for (int64_t token = begin + warp; token < end; token += kWarps) {
        const Angles<S> angles(shape, p.cos, p.sin, token);
        for (int64_t first = 0; first < p.heads; first += S::kTeams) {
            const int64_t head = first + team, row = token * p.heads + head;
            const bool valid = head < p.heads;
            Halves<S, T> x, dy;
            x.read(shape, static_cast<const T*>(p.x) + row * p.head_dim, valid);
            dy.read(shape, static_cast<const T*>(p.dy) + row * p.head_dim, valid);
            const float rstd = valid ? static_cast<const float*>(p.rstd)[row] : 0.0f;

            // dy turned back, and how much of w dn lies along x
            float dn[S::kSlots][2][kLanes], radial_grad = 0;
#pragma unroll
            for (int slot = 0; slot < S::kSlots; ++slot)
#pragma unroll
                for (int i = 0; i < kLanes; ++i) {
                    const float a = dy.value[slot][0][i], b = dy.value[slot][1][i];
                    const float cos = angles.cos[slot][i], sin = angles.sin[slot][i];
                    dn[slot][0][i] = a * cos + b * sin;
                    dn[slot][1][i] = b * cos - a * sin;
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float product =
                            dn[slot][h][i] * (x.value[slot][h][i] * rstd);  // n first: dn x may overflow
                        radial_grad = fmaf(product, weight.value[slot][h][i], radial_grad);
                        dweight[slot][h][i] += product;
                    }
                }
            const float mean = S::sum(radial_grad) / static_cast<float>(2 * shape.half);
            const float back = p.weight ? mean : 0.0f;

            // Result
            T* dx = static_cast<T*>(p.dx) + row * p.head_dim;
#pragma unroll
            for (int slot = 0; slot < S::kSlots; ++slot)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (!valid || !shape.inside(slot)) continue;
                    float out[kLanes];
#pragma unroll
                    for (int i = 0; i < kLanes; ++i)
                        out[i] = rstd * (weight.value[slot][h][i] * dn[slot][h][i] - x.value[slot][h][i] * rstd * back);
                    store(dx + h * shape.half + shape.at(slot), out);
                }
        }
    }
    if (!p.dweight) return;

    // Weight gradient: over the heads of a warp, then over the warps
    float* sums = reinterpret_cast<float*>(shared_bytes());
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < kLanes; ++i)
#pragma unroll
                for (int mask = S::kWidth; mask < 32; mask *= 2)
                    dweight[slot][h][i] += shuffle_xor(dweight[slot][h][i], mask);
            if (team == 0 && shape.inside(slot))
                store(sums + warp * 2 * shape.half + h * shape.half + shape.at(slot), dweight[slot][h]);
        }
    sync_block();
    for (int i = threadIdx.x; i < 2 * shape.half; i += kThreads) {
        float total = sums[i];
        for (int w = 1; w < kWarps; ++w) total += sums[w * 2 * shape.half + i];
        static_cast<float*>(p.scratch)[blockIdx.x * p.head_dim + i] = total;
    }
}

// body<Shape>(): whole vectors for the head sizes of the models, any other value by value.
template <class Body>
void visit_shape(DType dtype, int64_t head_dim, bool aligned, Body body) {
    visit_dtype(dtype, [&]<class T>() {
        constexpr int kLanes = kVectorLanes<T>;
        if (aligned && head_dim == 128) return body.template operator()<Shape<T, kLanes, 64 / kLanes, 1, 64>>();
        if (aligned && head_dim == 64) return body.template operator()<Shape<T, kLanes, 32 / kLanes, 1, 32>>();
        QEMB_CHECK(head_dim <= kMaxHeadDim && head_dim % 2 == 0, "[", kOp, "] head_dim must be even and at most ",
                   kMaxHeadDim, " on CUDA, got ", head_dim);
        body.template operator()<Shape<T, 1, 32, kMaxHeadDim / 64, 0>>();
    });
}

RowBlocks token_blocks(int64_t tokens) { return {tokens, kWarps}; }

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& p) {
    visit_shape(p.dtype, p.head_dim, aligned16(p.x, p.weight, p.cos, p.sin, p.y), [&]<class S>() {
        launch(kOp, qk_norm_rope_kernel<S>, static_cast<unsigned>(ceil_div(p.tokens, kWarps)), kThreads, 0, p.stream,
               p);
    });
}

int64_t qk_norm_rope_backward_scratch(const QkNormRopeBackward& p) {
    return p.dweight ? token_blocks(p.tokens).scratch(p.head_dim) : 0;
}

void qk_norm_rope_backward(const QkNormRopeBackward& p) {
    const RowBlocks blocks = token_blocks(p.tokens);
    visit_shape(p.dtype, p.head_dim, aligned16(p.x, p.weight, p.cos, p.sin, p.dy, p.dx), [&]<class S>() {
        launch(kOp, qk_norm_rope_backward_kernel<S>, static_cast<unsigned>(blocks.blocks), kThreads,
               static_cast<size_t>(kWarps * p.head_dim) * sizeof(float), p.stream, p, blocks.block_rows);
    });
    if (p.dweight) column_sum(kOp, p.scratch, blocks.blocks, p.head_dim, p.dweight, p.stream);
}

}  // namespace qemb::cuda
