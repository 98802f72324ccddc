// Checks the arguments of attention and fills its structs by name.
#include "ops/attention.h"

#include <array>
#include <cmath>

#include "bindings/module.h"

namespace qemb {
namespace {

constexpr const char* kOp = "varlen_attention";

// What the CUDA kernels want of q, k and v beyond what the CPU's do.
void check_for_cuda(const Argument& x) {
    QEMB_CHECK(x->dtype() == DType::kBFloat16 || x->dtype() == DType::kFloat16, "[", kOp, "] ", x.name,
               " must be bfloat16 or float16 on CUDA, got ", x.type_name());
    QEMB_CHECK(x->size(2) == 64 || x->size(2) == 128, "[", kOp, "] ", x.name,
               ": head_dim must be 64 or 128 on CUDA, got ", x->size(2));
    QEMB_CHECK(x->size(1) <= 65535, "[", kOp, "] ", x.name, " must have at most 65535 heads on CUDA, got ", x->size(1));
    const int64_t elements = 16 / size_of(x->dtype());
    bool fits = reinterpret_cast<uintptr_t>(x->data) % 16 == 0;
    for (size_t i = 0; i + 1 < x->shape.size(); ++i) fits = fits && (x->shape[i] <= 1 || x->stride[i] % elements == 0);
    QEMB_CHECK(fits, "[", kOp, "] ", x.name, " must start at a multiple of 16 bytes for each token and head on CUDA");
}

// Of a plan: tiles, blocks, key blocks and summed blocks; 1 where no sequence has more than one query.
using Sizes = std::array<int64_t, 5>;

Sizes sizes_of(const AttentionPlan& plan) {
    return {plan.tiles, plan.blocks, plan.key_blocks, plan.summed, plan.single};
}

AttentionPlan plan_of(const Sizes& sizes) {
    return {.tiles = sizes[0], .blocks = sizes[1], .key_blocks = sizes[2], .summed = sizes[3], .single = sizes[4] != 0};
}

// The CPU needs none.
AttentionPlan checked_plan(Call& call, py::handle data, const Sizes& sizes) {
    if (!call.cuda()) return {};
    AttentionPlan plan = plan_of(sizes);
    plan.data = static_cast<const int32_t*>(
        Argument(call, "plan", data).type(ScalarType::kInt32, "int32").shape({plan.size()}).contiguous()->data);
    return plan;
}

// What forward and backward share: q, k, v, the lengths, and everything that follows from them.
struct Inputs {
    Call call{kOp};
    Argument q, k, v, cu_q, cu_k;
    Attention problem;

    Inputs(py::handle q_, py::handle k_, py::handle v_, py::handle cu_q_, py::handle cu_k_, double scale, bool causal,
           py::handle plan, const Sizes& sizes)
        : q(call, "q", q_),
          k(call, "k", k_),
          v(call, "v", v_),
          cu_q(call, "cu_seqlens", cu_q_),
          cu_k(cu_k_.is(cu_q_) ? cu_q : Argument(call, "cu_seqlens_k", cu_k_)) {
        cu_k.name = "cu_seqlens_k";
        q.rank(3, "[tokens, heads, head_dim]").floating().last_contiguous();
        k.rank(3, "[tokens, kv_heads, head_dim]").floating().like(q).last_contiguous();
        v.rank(3, "[tokens, kv_heads, head_dim]").floating().like(q).last_contiguous();
        QEMB_CHECK(q->size(2) == k->size(2), "[", kOp, "] q and k must share head_dim, got ", q->size(2), " and ",
                   k->size(2));
        QEMB_CHECK(k->shape == v->shape, "[", kOp, "] k and v must have the same shape, got ", k->shape_text(), " and ",
                   v->shape_text());
        const int64_t dim = q->size(2);
        QEMB_CHECK(dim >= 8 && dim <= 256 && dim % 8 == 0, "[", kOp,
                   "] q: head_dim must be a multiple of 8 up to 256, got ", dim);
        if (call.cuda())
            for (const Argument* x : {&q, &k, &v}) check_for_cuda(*x);
        QEMB_CHECK(k->size(1) > 0 && q->size(1) > 0 && q->size(1) % k->size(1) == 0, "[", kOp,
                   "] the heads of q must be a multiple of the heads of k, got ", q->size(1), " and ", k->size(1));
        QEMB_CHECK(std::isfinite(scale), "[", kOp, "] scale must be finite, got ", scale);
        const int32_t* const cu_seqlens_q = checked_cu_seqlens(cu_q, q->size(0), "q");
        const int32_t* const cu_seqlens_k = checked_cu_seqlens(cu_k, k->size(0), "k");
        QEMB_CHECK(cu_q->size(0) == cu_k->size(0), "[", kOp,
                   "] cu_seqlens and cu_seqlens_k must have as many entries, got ", cu_q->size(0), " and ",
                   cu_k->size(0));
        problem = {
            .q = q->data,
            .k = k->data,
            .v = v->data,
            .cu_seqlens_q = cu_seqlens_q,
            .cu_seqlens_k = cu_seqlens_k,
            .num_tokens = q->size(0),
            .num_keys = k->size(0),
            .num_seqs = cu_q->size(0) - 1,
            .num_heads = q->size(1),
            .num_kv_heads = k->size(1),
            .head_dim = dim,
            .q_token_stride = q->stride[0],
            .q_head_stride = q->stride[1],
            .k_token_stride = k->stride[0],
            .k_head_stride = k->stride[1],
            .v_token_stride = v->stride[0],
            .v_head_stride = v->stride[1],
            .scale = scale,
            .causal = causal,
            .dtype = q->dtype(),
            .plan = checked_plan(call, plan, sizes),
        };
    }

    // A tensor of the shape and dtype of q, or of k and v.
    void* like_q(const char* name, py::handle x) { return Argument(call, name, x).same(q)->data; }
    void* like_k(const char* name, py::handle x) { return Argument(call, name, x).same(k)->data; }
    void* row_of_q(const char* name, py::handle x) {
        const Argument rows(call, name, x);
        return rows.shape({q->size(0), q->size(1)}).type(q.arithmetic(), "the arithmetic type").contiguous()->data;
    }
};

void forward(py::handle q, py::handle k, py::handle v, py::handle cu_seqlens, py::handle cu_seqlens_k, py::handle out,
             py::handle lse, double scale, bool causal, py::handle plan, const Sizes& sizes) {
    Inputs in(q, k, v, cu_seqlens, cu_seqlens_k, scale, causal, plan, sizes);
    AttentionForward p{in.problem};
    p.out = in.like_q("out", out);
    p.lse = in.row_of_q("lse", lse);
    in.call.run(p, cpu::attention_forward, cuda::attention_forward, cuda::attention_forward_scratch);
}

void backward(py::handle q, py::handle k, py::handle v, py::handle cu_seqlens, py::handle cu_seqlens_k, py::handle out,
              py::handle lse, py::handle dout, py::handle dq, py::handle dk, py::handle dv, double scale, bool causal,
              py::handle plan, const Sizes& sizes) {
    Inputs in(q, k, v, cu_seqlens, cu_seqlens_k, scale, causal, plan, sizes);
    AttentionBackward p{in.problem};
    p.out = in.like_q("out", out);
    p.dout = in.like_q("dout", dout);
    p.lse = in.row_of_q("lse", lse);
    p.dq = in.like_q("dq", dq);
    p.dk = in.like_k("dk", dk);
    p.dv = in.like_k("dv", dv);
    in.call.run(p, cpu::attention_backward, cuda::attention_backward, cuda::attention_backward_scratch);
}

// cu_seqlens of a plan: on the host they are checked.
struct Lengths {
    Call call{"attention_plan"};
    Argument q, k;
    const int32_t *cu_q, *cu_k;
    int64_t num_seqs;

    Lengths(py::handle q_, py::handle k_) : q(call, "cu_seqlens", q_), k(call, "cu_seqlens_k", k_) {
        cu_q = checked_cu_seqlens(q);
        cu_k = checked_cu_seqlens(k);
        QEMB_CHECK(q->shape == k->shape, "[", call.op, "] cu_seqlens and cu_seqlens_k must have as many entries, got ",
                   q->size(0), " and ", k->size(0));
        num_seqs = q->size(0) - 1;
    }
};

int32_t* integers(Call& call, const char* name, py::handle object, int64_t count) {
    const Argument x(call, name, object);
    return static_cast<int32_t*>(x.type(ScalarType::kInt32, "int32").shape({count}).contiguous()->data);
}

// The plan of lengths on the host, for the GPU `device`.
Sizes size(py::handle cu_seqlens, py::handle cu_seqlens_k, int device) {
    const Lengths in(cu_seqlens, cu_seqlens_k);
    const cuda::DeviceGuard guard(device);
    return sizes_of(size_plan(in.cu_q, in.cu_k, in.num_seqs));
}

void fill(py::handle cu_seqlens, py::handle cu_seqlens_k, int device, const Sizes& sizes, py::handle data) {
    Lengths in(cu_seqlens, cu_seqlens_k);
    const AttentionPlan plan = plan_of(sizes);
    const cuda::DeviceGuard guard(device);
    fill_plan(in.cu_q, in.cu_k, in.num_seqs, plan, integers(in.call, "data", data, plan.size()));
}

// The plan of lengths that are on a GPU, and in `checked` and `checked_k` the lengths that the kernels may read.
Sizes largest(int64_t num_seqs, int64_t tokens_q, int64_t tokens_k, int device) {
    const cuda::DeviceGuard guard(device);
    return sizes_of(cuda::largest_plan(num_seqs, tokens_q, tokens_k));
}

void fill_on_device(py::handle cu_seqlens, py::handle cu_seqlens_k, int64_t tokens_q, int64_t tokens_k,
                    const Sizes& sizes, py::handle data, py::handle checked, py::handle checked_k) {
    Lengths in(cu_seqlens, cu_seqlens_k);
    const AttentionPlan plan = plan_of(sizes);
    QEMB_CHECK(in.num_seqs > 0 || tokens_q + tokens_k == 0, "[", in.call.op, "] cu_seqlens have no sequence for ",
               tokens_q, " and ", tokens_k, " tokens");
    const cuda::DeviceLengths q{in.cu_q, integers(in.call, "checked", checked, in.num_seqs + 1), tokens_q};
    const cuda::DeviceLengths k{in.cu_k, integers(in.call, "checked_k", checked_k, in.num_seqs + 1), tokens_k};
    int32_t* const to = integers(in.call, "data", data, plan.size());
    const cuda::DeviceGuard guard(in.call.device());
    cuda::fill_plan(q, k, in.num_seqs, plan, to, in.call.stream());
}

}  // namespace

void bind_attention(py::module_& m) {
    using py::arg;
    m.def("attention_forward", &forward, arg("q"), arg("k"), arg("v"), arg("cu_seqlens"), arg("cu_seqlens_k"),
          py::kw_only(), arg("out"), arg("lse"), arg("scale"), arg("causal"), arg("plan"), arg("sizes"));
    m.def("attention_backward", &backward, arg("q"), arg("k"), arg("v"), arg("cu_seqlens"), arg("cu_seqlens_k"),
          py::kw_only(), arg("out"), arg("lse"), arg("dout"), arg("dq"), arg("dk"), arg("dv"), arg("scale"),
          arg("causal"), arg("plan"), arg("sizes"));
    m.def("size_plan", &size);
    m.def("fill_plan", &fill);
    m.def("largest_plan", &largest);
    m.def("fill_plan_on_device", &fill_on_device);
}

}  // namespace qemb
