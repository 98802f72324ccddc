// One query a sequence (the last layer under last-token pooling): keys and values are read once, by parts of warps that
// each take every kKeysAtOnce-th key, for all query heads of the group.
#pragma once

#include "cuda/attention_tile.h"

namespace qemb::cuda {

constexpr int kSingleWarps = 4;

// D values of a row lie over D / 8 lanes; so many keys are in work at once.
template <int D>
constexpr int kKeysAtOnce = kSingleWarps * 32 / (D / 8);
template <int D, int kGroup>
constexpr size_t single_shared() {
    return kKeysAtOnce<D> * kGroup * (D + 2) * sizeof(float);
}

template <class T, int D, int kGroup>
__global__ void __launch_bounds__(kSingleWarps * 32) attention_forward_single(const AttentionForward p) {
    constexpr int kKeys = kKeysAtOnce<D>, kWidth = D / 8;
    const Span span(p.cu_seqlens_q, p.cu_seqlens_k, blockIdx.x);
    if (span.num_q <= 0) return;
    const int thread = threadIdx.x, worker = thread / kWidth, column = thread % kWidth * 8;
    const int64_t kv_head = blockIdx.y, head = kv_head * kGroup;
    const float scale = scale_of(p) * kLog2E;

    Packed<T, 8> q[kGroup];
    float out[kGroup][8], row_max[kGroup], sum[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
        q[g] = load<8>(static_cast<const T*>(p.q) + span.q * p.q_token_stride + (head + g) * p.q_head_stride + column);
        row_max[g] = -INFINITY;
        sum[g] = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) out[g][i] = 0;
    }

    // Each worker's keys, with a softmax of its own. All lanes take every step: they shuffle together.
    for (int start = 0; start < span.num_k; start += kKeys) {
        const int key = start + worker;
        const bool valid = key < span.num_k;
        const int64_t token = span.k + (valid ? key : 0);
        const auto k =
            load<8>(static_cast<const T*>(p.k) + token * p.k_token_stride + kv_head * p.k_head_stride + column);
        const auto v =
            load<8>(static_cast<const T*>(p.v) + token * p.v_token_stride + kv_head * p.v_head_stride + column);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
            const float score = row_dot<D>(q[g], k) * scale;
            if (!valid) continue;
            const float best = fmaxf(row_max[g], score), base = best == -INFINITY ? 0 : best;
            const float factor = exp2_approx(row_max[g] - base), weight = exp2_approx(score - base);
            row_max[g] = best;
            sum[g] = sum[g] * factor + weight;
#pragma unroll
            for (int i = 0; i < 8; ++i) out[g][i] = out[g][i] * factor + weight * v[i];
        }
    }

    // Join the workers, in their order.
    float* const parts = reinterpret_cast<float*>(shared_bytes());  // [kKeys, kGroup, D + 2]
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
        float* part = parts + (worker * kGroup + g) * (D + 2);
#pragma unroll
        for (int i = 0; i < 8; ++i) part[column + i] = out[g][i];
        if (column == 0) {
            part[D] = row_max[g];
            part[D + 1] = sum[g];
        }
    }
    sync_block();
    for (int i = thread; i < kGroup * D; i += kSingleWarps * 32) {
        const int g = i / D, d = i % D;
        float best = -INFINITY, total = 0, x = 0;
        for (int w = 0; w < kKeys; ++w) best = fmaxf(best, parts[(w * kGroup + g) * (D + 2) + D]);
        const float base = best == -INFINITY ? 0 : best;
        for (int w = 0; w < kKeys; ++w) {
            const float* part = parts + (w * kGroup + g) * (D + 2);
            const float factor = exp2_approx(part[D] - base);
            total += part[D + 1] * factor;
            x += part[d] * factor;
        }
        static_cast<T*>(p.out)[(span.q * p.num_heads + head + g) * D + d] = from_float<T>(total > 0 ? x / total : 0);
        if (d == 0) static_cast<float*>(p.lse)[span.q * p.num_heads + head + g] = best * kLn2 + logf(total);
    }
}

template <class T, int D, int kGroup>
__global__ void __launch_bounds__(kSingleWarps * 32) attention_backward_single(const AttentionBackward p) {
    constexpr int kKeys = kKeysAtOnce<D>, kWidth = D / 8;
    const Span span(p.cu_seqlens_q, p.cu_seqlens_k, blockIdx.x);
    const int thread = threadIdx.x, worker = thread / kWidth, column = thread % kWidth * 8;
    const int64_t kv_head = blockIdx.y, head = kv_head * kGroup;
    const float scale = scale_of(p) * kLog2E;
    const bool asked = span.num_q > 0;  // a sequence without a query leaves zeros to its keys

    Packed<T, 8> q[kGroup], dout[kGroup];
    float dq[kGroup][8], lse[kGroup], delta[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
        lse[g] = delta[g] = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) dq[g][i] = 0;
        q[g] = dout[g] = Packed<T, 8>{};
        if (!asked) continue;
        const int64_t row = (span.q * p.num_heads + head + g) * D + column;
        q[g] = load<8>(static_cast<const T*>(p.q) + span.q * p.q_token_stride + (head + g) * p.q_head_stride + column);
        dout[g] = load<8>(static_cast<const T*>(p.dout) + row);
        delta[g] = row_dot<D>(load<8>(static_cast<const T*>(p.out) + row), dout[g]);
        lse[g] = static_cast<const float*>(p.lse)[span.q * p.num_heads + head + g] * kLog2E;
    }

    for (int start = 0; start < span.num_k; start += kKeys) {
        const int key = start + worker;
        const bool valid = key < span.num_k;
        const int64_t token = span.k + (valid ? key : 0);
        const auto k =
            load<8>(static_cast<const T*>(p.k) + token * p.k_token_stride + kv_head * p.k_head_stride + column);
        const auto v =
            load<8>(static_cast<const T*>(p.v) + token * p.v_token_stride + kv_head * p.v_head_stride + column);
        float dk[8] = {}, dv[8] = {};
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
            const float score = row_dot<D>(q[g], k) * scale, dp = row_dot<D>(dout[g], v);
            const float weight = asked && valid ? exp2_approx(score - lse[g]) : 0;
            const float ds = weight * (dp - delta[g]) * scale_of(p);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                dv[i] += weight * dout[g][i];
                dk[i] += ds * q[g][i];
                if (valid) dq[g][i] += ds * k[i];
            }
        }
        if (valid) {
            const int64_t row = (token * p.num_kv_heads + kv_head) * D + column;
            store<8>(static_cast<T*>(p.dk) + row, dk);
            store<8>(static_cast<T*>(p.dv) + row, dv);
        }
    }
    if (!asked) return;

    float* const parts = reinterpret_cast<float*>(shared_bytes());  // [kKeys, kGroup, D]
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
#pragma unroll
        for (int i = 0; i < 8; ++i) parts[(worker * kGroup + g) * D + column + i] = dq[g][i];
    sync_block();
    for (int i = thread; i < kGroup * D; i += kSingleWarps * 32) {
        float x = 0;
        for (int w = 0; w < kKeys; ++w) x += parts[w * kGroup * D + i];
        static_cast<T*>(p.dq)[(span.q * p.num_heads + head) * D + i] = from_float<T>(x);
    }
}

}  // namespace qemb::cuda
