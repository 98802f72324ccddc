// A call of attention on the emulator: its memory, its plan, and the check against the definition in double.
#pragma once

#include "attention_truth.h"
#include "cuda/runtime.h"
#include "ops/attention.h"
#include "tensor.h"

namespace qemb::testing {

using Case = AttentionCase;

inline Case self(std::vector<int32_t> lengths, int64_t heads, int64_t kv_heads, int64_t dim, bool causal) {
    std::vector<int32_t> cu{0};
    for (const int32_t length : lengths) cu.push_back(cu.back() + length);
    return {cu, cu, heads, kv_heads, dim, causal};
}

// Memory of one call, and its plan on the host.
template <class T>
struct Call {
    const Case& c;
    Tensor<T> q, k, v, dout, out, dq, dk, dv;
    emulator::DeviceMemory<float> lse;
    emulator::DeviceMemory<int32_t> cu_q, cu_k;
    AttentionPlan plan;
    std::vector<int32_t> host_plan;
    double scale;

    Call(const Case& c, const Wide& q_, const Wide& k_, const Wide& v_, const Wide& dout_)
        : c(c),
          q(q_),
          k(k_),
          v(v_),
          dout(dout_),
          out(q.size()),
          dq(q.size()),
          dk(k.size()),
          dv(k.size()),
          lse(q_.size() / static_cast<size_t>(c.dim)),
          cu_q(c.cu_q),
          cu_k(c.cu_k),
          plan(size_plan(c.cu_q.data(), c.cu_k.data(), seqs())),
          host_plan(static_cast<size_t>(plan.size())),
          scale(1 / std::sqrt(static_cast<double>(c.dim))) {
        fill_plan(c.cu_q.data(), c.cu_k.data(), seqs(), plan, host_plan.data());
    }
    int64_t seqs() const { return static_cast<int64_t>(c.cu_q.size()) - 1; }

    // With the plan of the host, or with one made on the device.
    void run(bool device_plan = false) {
        AttentionPlan used = device_plan ? cuda::largest_plan(seqs(), c.cu_q.back(), c.cu_k.back()) : plan;
        emulator::DeviceMemory<int32_t> data(static_cast<size_t>(used.size()));
        emulator::DeviceMemory<int32_t> checked_q(c.cu_q), checked_k(c.cu_k);
        if (device_plan)
            cuda::fill_plan({cu_q.data(), checked_q.data(), c.cu_q.back()},
                            {cu_k.data(), checked_k.data(), c.cu_k.back()}, seqs(), used, data.data(), nullptr);
        else
            std::copy(host_plan.begin(), host_plan.end(), data.data());
        used.data = data.data();
        Attention problem{.q = q.data(),
                          .k = k.data(),
                          .v = v.data(),
                          .cu_seqlens_q = checked_q.data(),
                          .cu_seqlens_k = checked_k.data(),
                          .plan = used};
        set_shape(problem, c, dtype_of<T>);
        problem.scale = scale;
        AttentionForward forward{problem, out.data(), lse.data()};
        emulator::DeviceMemory<char> counters(static_cast<size_t>(cuda::attention_forward_scratch(forward)));
        std::fill_n(counters.data(), counters.size(), char{1});  // as memory is that was used before
        if (counters.size() > 0) forward.scratch = counters.data();
        cuda::attention_forward(forward);
        AttentionBackward backward{problem, out.data(), dout.data(), lse.data(), dq.data(), dk.data(), dv.data()};
        emulator::DeviceMemory<char> scratch(static_cast<size_t>(cuda::attention_backward_scratch(backward)));
        backward.scratch = scratch.data();
        cuda::attention_backward(backward);
    }
};

struct Inputs {
    Wide q, k, v, dout;
};
template <class T>
Inputs random_inputs(const Case& c) {
    const int64_t q = c.cu_q.back() * c.heads * c.dim, k = c.cu_k.back() * c.kv_heads * c.dim;
    return {random_wide<T>(q, 1), random_wide<T>(k, 2), random_wide<T>(k, 3), random_wide<T>(q, 4)};
}

template <class T>
void check(const std::string& name, const Case& c, bool device_plan = false) {
    const Inputs x = random_inputs<T>(c);
    const AttentionResult truth = attention_truth(c, x.q, x.k, x.v, x.dout, [](double value) { return value; });
    const AttentionResult low = attention_truth(c, x.q, x.k, x.v, x.dout, rounded<T>);
    Call<T> call(c, x.q, x.k, x.v, x.dout);
    call.run(device_plan);
    check_rounded<T>(name + " out", call.out.wide(), low.out, truth.out);
    check_rounded<T>(name + " dq", call.dq.wide(), low.dq, truth.dq);
    check_rounded<T>(name + " dk", call.dk.wide(), low.dk, truth.dk);
    check_rounded<T>(name + " dv", call.dv.wide(), low.dv, truth.dv);
    for (size_t i = 0; i < truth.lse.size(); ++i) {
        const bool right = std::isinf(truth.lse[i]) ? call.lse[i] == static_cast<float>(truth.lse[i])
                                                    : std::abs(call.lse[i] - truth.lse[i]) < 2e-5;
        if (!right)
            std::printf("  %s: lse %zu is %g, not %g\n", name.c_str(), i, call.lse[i], truth.lse[i]), ++g_failures;
        if (!right) break;
    }
}

inline std::string describe(const Case& c) {
    std::string text = std::to_string(c.heads) + "/" + std::to_string(c.kv_heads) + " x " + std::to_string(c.dim) +
                       (c.causal ? " causal" : " full");
    for (size_t i = 1; i < c.cu_q.size() && i < 8; ++i) text += " " + std::to_string(c.cu_q[i] - c.cu_q[i - 1]);
    return text;
}

}  // namespace qemb::testing
