// Which kernel a call gets: dtype, head_dim, and whether each sequence has one query.
#pragma once

#include "cuda/attention_tile.h"
#include "cuda/launch.h"

namespace qemb::cuda {

template <class Params>
void check_layout(const Params& p) {
    const auto aligned = [](const void* data, int64_t token_stride, int64_t head_stride) {
        return reinterpret_cast<uintptr_t>(data) % 16 == 0 && token_stride % 8 == 0 && head_stride % 8 == 0;
    };
    QEMB_CHECK(
        aligned(p.q, p.q_token_stride, p.q_head_stride) && aligned(p.k, p.k_token_stride, p.k_head_stride) &&
            aligned(p.v, p.v_token_stride, p.v_head_stride),
        "[varlen_attention] q, k and v must start at multiples of 16 bytes on a CUDA device, with strides of 8 elements");
    QEMB_CHECK(p.num_heads <= 65535, "[varlen_attention] q must have at most 65535 heads, got ", p.num_heads);
    QEMB_CHECK(p.plan.data, "[varlen_attention] needs a plan on a CUDA device");
}

// run.operator()<T, D>()
template <class Params, class Run>
void visit_types(const Params& p, Run&& run) {
    const auto with = [&]<class T>() {
        if (p.head_dim == 128)
            run.template operator()<T, 128>();
        else if (p.head_dim == 64)
            run.template operator()<T, 64>();
        else
            QEMB_CHECK(false, "[varlen_attention] head_dim must be 64 or 128 on a CUDA device, got ", p.head_dim);
    };
    if (p.dtype == DType::kBFloat16)
        with.template operator()<BFloat16>();
    else if (p.dtype == DType::kFloat16)
        with.template operator()<Float16>();
    else
        QEMB_CHECK(false, "[varlen_attention] q must be bfloat16 or float16 on a CUDA device, got ", name_of(p.dtype));
}

// run.operator()<group>(); false where the heads of a group are too many for one pass.
template <class Run>
bool visit_group(int64_t group, Run&& run) {
    if (group == 1)
        run.template operator()<1>();
    else if (group == 2)
        run.template operator()<2>();
    else if (group == 4)
        run.template operator()<4>();
    else
        return false;
    return true;
}

}  // namespace qemb::cuda
