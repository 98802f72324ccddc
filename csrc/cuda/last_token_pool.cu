// Last-token pooling: a block takes a sequence and reads its row again from the first cache for each of the few passes.
// Nothing but the last tokens is touched.
#include "cuda/column_sum.h"
#include "cuda/device/vector.h"
#include "ops/last_token_pool.h"

namespace qemb::cuda {
namespace {

constexpr const char* kOp = "last_token_pool";
constexpr int kWarps = 8, kThreads = 32 * kWarps;

QEMB_DEVICE float sum_over_block(float x) { return block_sum<kWarps>(x, reinterpret_cast<float*>(shared_bytes())); }

// body(at) for every `at` below size that is this thread's: the same in each pass.
template <int kLanes, class Body>
QEMB_DEVICE void for_each(int64_t size, Body body) {
    for (int64_t at = static_cast<int64_t>(threadIdx.x) * kLanes; at < size; at += kThreads * kLanes) body(at);
}

// A row that is pooled: y = x * rstd * weight, cut to dim; z = y / |y|. Kept are y * unit and, as scale, one over its
// norm, so that a row of any magnitude has a direction. The scale of a row of zeros is zero, and with it its z and its
// gradient.
template <class T, int kLanes>
struct Pooled {
    const T* x;
    const T* weight;
    float rstd = 1, unit = 1, scale = 1;

    template <class Params>
    QEMB_DEVICE Pooled(const Params& p, int64_t row)
        : x(static_cast<const T*>(p.hidden) + row * p.hidden_stride), weight(static_cast<const T*>(p.norm_weight)) {
        if (weight) {
            const float squares = sum_of_squares(p.embed, [&](int64_t at, float (&v)[kLanes]) {
                const auto loaded = load<kLanes>(x + at);
#pragma unroll
                for (int i = 0; i < kLanes; ++i) v[i] = loaded[i];
            });
            rstd = inverse_rms(squares / static_cast<float>(p.embed), unit, p.eps);
            unit = 1;
        }
        if (p.normalize) {
            const float squares = sum_of_squares(p.dim, [&](int64_t at, float (&y)[kLanes]) { read(at, y); });
            scale = squares == 0 ? 0.0f : 1.0f / sqrtf(squares);
        }
    }
    // Of values times `unit`, which is found here.
    template <class Read>
    QEMB_DEVICE float sum_of_squares(int64_t size, Read read_at) {
        const auto of_scaled = [&] {
            float squares = 0;
            for_each<kLanes>(size, [&](int64_t at) {
                float v[kLanes];
                read_at(at, v);
#pragma unroll
                for (int i = 0; i < kLanes; ++i) squares = fmaf(v[i] * unit, v[i] * unit, squares);
            });
            return sum_over_block(squares);
        };
        const float squares = of_scaled();
        unit = unit_for(squares);
        return unit == 1 ? squares : of_scaled();
    }
    QEMB_DEVICE void read(int64_t at, float (&y)[kLanes]) const {
        const auto v = load<kLanes>(x + at);
        if (weight) {
            const auto w = load<kLanes>(weight + at);
#pragma unroll
            for (int i = 0; i < kLanes; ++i) y[i] = v[i] * rstd * w[i];
        } else {
#pragma unroll
            for (int i = 0; i < kLanes; ++i) y[i] = v[i];
        }
    }
};

constexpr int64_t kNoToken = -1, kWrong = -2;

// The last token of a sequence; kWrong where its lengths do not lie among the tokens.
QEMB_DEVICE int64_t pooled_row(const LastTokenPool& p, int64_t seq) {
    const int64_t begin = p.cu_seqlens[seq], end = p.cu_seqlens[seq + 1];
    if (begin < 0 || end < begin || end > p.num_tokens) return kWrong;
    return end == begin ? kNoToken : end - 1;
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 3) last_token_pool_kernel(LastTokenPoolForward p) {
    const int64_t seq = blockIdx.x;
    T* out = static_cast<T*>(p.out) + seq * p.dim;
    const int64_t row = pooled_row(p, seq);
    if (row < 0) {
        float y[kLanes];
        for (float& value : y) value = row == kNoToken ? 0.0f : NAN;
        for_each<kLanes>(p.dim, [&](int64_t at) { store(out + at, y); });
        return;
    }
    const Pooled<T, kLanes> pooled(p, row);
    for_each<kLanes>(p.dim, [&](int64_t at) {
        float y[kLanes];
        pooled.read(at, y);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) y[i] = y[i] * pooled.unit * pooled.scale;
        store(out + at, y);
    });
}

// The gradients of one sequence; adds to this block's weight gradient where there is one.
template <class T, int kLanes>
QEMB_DEVICE void backward_row(const LastTokenPoolBackward& p, int64_t seq, float* dweight) {
    const int64_t row = pooled_row(p, seq);
    if (row < 0) return;
    const Pooled<T, kLanes> pooled(p, row);
    const T* dout = static_cast<const T*>(p.dout) + seq * p.dim;
    T* dhidden = static_cast<T*>(p.dhidden) + row * p.embed;

    // z = y / |y|: dy = (dz - z (z . dz)) / |y|
    float radial_grad = 0;
    if (p.normalize) {
        for_each<kLanes>(p.dim, [&](int64_t at) {
            const auto dz = load<kLanes>(dout + at);
            float y[kLanes];
            pooled.read(at, y);
#pragma unroll
            for (int i = 0; i < kLanes; ++i) radial_grad = fmaf(y[i] * pooled.unit, dz[i], radial_grad);
        });
        radial_grad = sum_over_block(radial_grad) * pooled.scale * pooled.scale;
    }
    const auto dy_at = [&](int64_t at, float (&dy)[kLanes]) {
        const auto dz = load<kLanes>(dout + at);
        float y[kLanes];
        pooled.read(at, y);
#pragma unroll
        for (int i = 0; i < kLanes; ++i)
            dy[i] = (dz[i] - y[i] * pooled.unit * radial_grad) * pooled.scale * pooled.unit;
    };

    // RMSNorm: dx = rstd (w dy - n mean(w dy n)) with n = x rstd
    float back = 0;
    if (pooled.weight) {
        for_each<kLanes>(p.dim, [&](int64_t at) {
            const auto x = load<kLanes>(pooled.x + at), w = load<kLanes>(pooled.weight + at);
            float dy[kLanes];
            dy_at(at, dy);
#pragma unroll
            for (int i = 0; i < kLanes; ++i) back = fmaf(dy[i] * w[i], x[i] * pooled.rstd, back);
            if (!dweight) return;
            const auto before = load<kLanes>(dweight + at);
            float sum[kLanes];
#pragma unroll
            for (int i = 0; i < kLanes; ++i) sum[i] = before[i] + dy[i] * (x[i] * pooled.rstd);
            store(dweight + at, sum);
        });
        back = sum_over_block(back) / static_cast<float>(p.embed);
    }
    for_each<kLanes>(p.embed, [&](int64_t at) {
        float dx[kLanes] = {};
        if (at < p.dim) dy_at(at, dx);
        if (pooled.weight) {
            const auto x = load<kLanes>(pooled.x + at), w = load<kLanes>(pooled.weight + at);
#pragma unroll
            for (int i = 0; i < kLanes; ++i) dx[i] = (dx[i] * w[i] - x[i] * pooled.rstd * back) * pooled.rstd;
        }
        store(dhidden + at, dx);
    });
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 3)
    last_token_pool_backward_kernel(LastTokenPoolBackward p, int64_t block_seqs) {
    const int64_t begin = blockIdx.x * block_seqs, end = min(begin + block_seqs, p.num_seqs);
    float* dweight = nullptr;
    if (p.dnorm_weight) {
        dweight = static_cast<float*>(p.scratch) + blockIdx.x * p.embed;
        for_each<kLanes>(p.embed, [&](int64_t at) { store(dweight + at, Packed<float, kLanes>{}); });
    }
    for (int64_t seq = begin; seq < end; ++seq) backward_row<T, kLanes>(p, seq, dweight);
}

// body<T, kLanes>(): whole vectors where every row allows them.
template <class Params, class Body>
void visit_lanes(const Params& p, bool aligned, Body body) {
    visit_dtype(p.dtype, [&]<class T>() {
        constexpr int kLanes = kVectorLanes<T>;
        if (aligned && p.embed % kLanes == 0 && p.dim % kLanes == 0 && p.hidden_stride % kLanes == 0)
            body.template operator()<T, kLanes>();
        else
            body.template operator()<T, 1>();
    });
}

RowBlocks sequence_blocks(int64_t num_seqs) { return {num_seqs, 1}; }

}  // namespace

void last_token_pool_forward(const LastTokenPoolForward& p) {
    visit_lanes(p, aligned16(p.hidden, p.norm_weight, p.out), [&]<class T, int kLanes>() {
        launch(kOp, last_token_pool_kernel<T, kLanes>, static_cast<unsigned>(p.num_seqs), kThreads,
               kWarps * sizeof(float), p.stream, p);
    });
}

int64_t last_token_pool_backward_scratch(const LastTokenPoolBackward& p) {
    return p.dnorm_weight ? sequence_blocks(p.num_seqs).scratch(p.embed) : 0;
}

void last_token_pool_backward(const LastTokenPoolBackward& p) {
    const RowBlocks blocks = sequence_blocks(p.num_seqs);
    visit_lanes(p, aligned16(p.hidden, p.norm_weight, p.dout, p.dhidden, p.scratch), [&]<class T, int kLanes>() {
        launch(kOp, last_token_pool_backward_kernel<T, kLanes>, static_cast<unsigned>(blocks.blocks), kThreads,
               kWarps * sizeof(float), p.stream, p, blocks.block_rows);
    });
    if (p.dnorm_weight) column_sum(kOp, p.scratch, blocks.blocks, p.embed, p.dnorm_weight, p.stream);
}

}  // namespace qemb::cuda
