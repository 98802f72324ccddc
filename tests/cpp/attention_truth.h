// Attention straight from the definition, in double: softmax row by row, gradients by the chain rule.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops/attention.h"

namespace qemb::testing {

struct AttentionCase {
    std::vector<int32_t> cu_q, cu_k;
    int64_t heads, kv_heads, dim;
    bool causal;
};

struct AttentionResult {
    std::vector<double> out, dq, dk, dv, lse;
};

// Fills in what follows from the case, for contiguous q, k and v, in either direction's arguments.
template <class Params>
void set_shape(Params& p, const AttentionCase& c, DType dtype) {
    p.num_tokens = c.cu_q.back();
    p.num_keys = c.cu_k.back();
    p.num_seqs = static_cast<int64_t>(c.cu_q.size()) - 1;
    p.num_heads = c.heads;
    p.num_kv_heads = c.kv_heads;
    p.head_dim = c.dim;
    p.q_token_stride = c.heads * c.dim;
    p.k_token_stride = p.v_token_stride = c.kv_heads * c.dim;
    p.q_head_stride = p.k_head_stride = p.v_head_stride = c.dim;
    p.scale = 1 / std::sqrt(static_cast<double>(c.dim));
    p.causal = c.causal;
    p.dtype = dtype;
}

// `round` is applied to all that a dense implementation stores: scores, weights, outputs and their gradients.
template <class Round>
AttentionResult attention_truth(const AttentionCase& c, const std::vector<double>& q, const std::vector<double>& k,
                                const std::vector<double>& v, const std::vector<double>& dout, Round round) {
    AttentionResult r{std::vector<double>(q.size()), std::vector<double>(q.size()), std::vector<double>(k.size()),
                      std::vector<double>(k.size()),
                      std::vector<double>(q.size() / static_cast<size_t>(c.dim), -INFINITY)};
    const double scale = 1 / std::sqrt(static_cast<double>(c.dim));
    for (size_t s = 0; s + 1 < c.cu_q.size(); ++s) {
        const int64_t nq = c.cu_q[s + 1] - c.cu_q[s], nk = c.cu_k[s + 1] - c.cu_k[s];
        for (int64_t h = 0; h < c.heads; ++h) {
            for (int64_t i = 0; i < nq; ++i) {
                const int64_t row = ((c.cu_q[s] + i) * c.heads + h) * c.dim;
                const int64_t seen = c.causal ? std::max<int64_t>(0, std::min(nk, i + nk - nq + 1)) : nk;
                const auto column = [&](int64_t j) {
                    return ((c.cu_k[s] + j) * c.kv_heads + h / (c.heads / c.kv_heads)) * c.dim;
                };
                std::vector<double> p(static_cast<size_t>(seen)), dp(p.size());
                double row_max = -INFINITY, sum = 0, delta = 0;
                for (int64_t j = 0; j < seen; ++j) {
                    for (int64_t d = 0; d < c.dim; ++d) p[j] += scale * q[row + d] * k[column(j) + d];
                    p[j] = round(p[j]);
                    row_max = std::max(row_max, p[j]);
                }
                for (double& x : p) sum += (x = std::exp(x - row_max));
                if (seen > 0) r.lse[static_cast<size_t>(row / c.dim)] = row_max + std::log(sum);
                for (int64_t j = 0; j < seen; ++j) {
                    p[j] = round(p[j] / sum);
                    for (int64_t d = 0; d < c.dim; ++d) {
                        r.out[row + d] += p[j] * v[column(j) + d];
                        r.dv[column(j) + d] += p[j] * dout[row + d];
                        dp[j] += dout[row + d] * v[column(j) + d];
                    }
                    dp[j] = round(dp[j]);
                    delta += p[j] * dp[j];
                }
                for (int64_t j = 0; j < seen; ++j) {
                    const double ds = scale * round(p[j] * (dp[j] - delta));
                    for (int64_t d = 0; d < c.dim; ++d) {
                        r.dq[row + d] += ds * k[column(j) + d];
                        r.dk[column(j) + d] += ds * q[row + d];
                    }
                }
            }
        }
    }
    for (auto* values : {&r.out, &r.dq, &r.dk, &r.dv})
        for (double& x : *values) x = round(x);
    return r;
}

}  // namespace qemb::testing
