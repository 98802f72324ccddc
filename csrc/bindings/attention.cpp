// Checks the arguments of attention and fills its structs by name.
#include "ops/attention.h"

#include <cmath>

#include "bindings/tensor_view.h"

namespace qemb {
namespace {

constexpr const char* kOp = "varlen_attention";

// What forward and backward share: q, k, v, the lengths, and everything that follows from them.
struct Inputs {
    Argument q, k, v, cu_q, cu_k;
    const int32_t *cu_seqlens_q, *cu_seqlens_k;

    Inputs(py::handle q_, py::handle k_, py::handle v_, py::handle cu_q_, py::handle cu_k_, double scale)
        : q(kOp, "q", q_), k(kOp, "k", k_), v(kOp, "v", v_), cu_q(kOp, "cu_seqlens", cu_q_), cu_k(kOp, "cu_seqlens_k", cu_k_) {
        q.rank(3, "[tokens, heads, head_dim]").floating().last_contiguous();
        k.rank(3, "[tokens, kv_heads, head_dim]").floating().like(q).last_contiguous();
        v.rank(3, "[tokens, kv_heads, head_dim]").floating().like(q).last_contiguous();
        QEMB_CHECK(q->size(2) == k->size(2), "[", kOp, "] q and k must share head_dim, got ", q->size(2), " and ", k->size(2));
        QEMB_CHECK(k->shape == v->shape, "[", kOp, "] k and v must have the same shape, got ", k->shape_text(), " and ",
                   v->shape_text());
        const int64_t dim = q->size(2);
        QEMB_CHECK(dim >= 8 && dim <= 256 && dim % 8 == 0, "[", kOp, "] head_dim must be a multiple of 8 up to 256, got ", dim);
        QEMB_CHECK(k->size(1) > 0 && q->size(1) > 0 && q->size(1) % k->size(1) == 0, "[", kOp,
                   "] the heads of q must be a multiple of the heads of k, got ", q->size(1), " and ", k->size(1));
        QEMB_CHECK(std::isfinite(scale), "[", kOp, "] scale must be finite, got ", scale);
        cu_seqlens_q = checked_cu_seqlens(cu_q, q->size(0), "q");
        cu_seqlens_k = checked_cu_seqlens(cu_k, k->size(0), "k");
        QEMB_CHECK(cu_q->size(0) == cu_k->size(0), "[", kOp, "] cu_seqlens and cu_seqlens_k must have as many entries, got ",
                   cu_q->size(0), " and ", cu_k->size(0));
    }
};

// The statistics that forward hands to backward are in the arithmetic type.
ScalarType arithmetic(const Argument& x) {
    return x->type == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
}

void forward(py::handle q, py::handle k, py::handle v, py::handle cu_seqlens, py::handle cu_seqlens_k, py::handle out,
             py::handle lse, double scale, bool causal) {
    const Inputs in(q, k, v, cu_seqlens, cu_seqlens_k, scale);
    const Argument o(kOp, "out", out), l(kOp, "lse", lse);
    o.shape({in.q->size(0), in.q->size(1), in.q->size(2)}).like(in.q).contiguous();
    l.shape({in.q->size(0), in.q->size(1)}).type(arithmetic(in.q), "the arithmetic type").contiguous();
    const AttentionForward p{
        .q = in.q->data,
        .k = in.k->data,
        .v = in.v->data,
        .out = o->data,
        .lse = l->data,
        .cu_seqlens_q = in.cu_seqlens_q,
        .cu_seqlens_k = in.cu_seqlens_k,
        .num_seqs = in.cu_q->size(0) - 1,
        .num_heads = in.q->size(1),
        .num_kv_heads = in.k->size(1),
        .head_dim = in.q->size(2),
        .q_token_stride = in.q->stride[0],
        .q_head_stride = in.q->stride[1],
        .k_token_stride = in.k->stride[0],
        .k_head_stride = in.k->stride[1],
        .v_token_stride = in.v->stride[0],
        .v_head_stride = in.v->stride[1],
        .scale = scale,
        .causal = causal,
        .dtype = in.q->dtype(),
    };
    const py::gil_scoped_release unlocked;
    cpu::attention_forward(p);
}

void backward(py::handle q, py::handle k, py::handle v, py::handle cu_seqlens, py::handle cu_seqlens_k, py::handle out,
              py::handle lse, py::handle dout, py::handle dq, py::handle dk, py::handle dv, double scale, bool causal) {
    const Inputs in(q, k, v, cu_seqlens, cu_seqlens_k, scale);
    const Argument o(kOp, "out", out), l(kOp, "lse", lse), d_o(kOp, "dout", dout), d_q(kOp, "dq", dq), d_k(kOp, "dk", dk),
        d_v(kOp, "dv", dv);
    for (const Argument* like_q : {&o, &d_o, &d_q})
        like_q->shape({in.q->size(0), in.q->size(1), in.q->size(2)}).like(in.q).contiguous();
    for (const Argument* like_k : {&d_k, &d_v})
        like_k->shape({in.k->size(0), in.k->size(1), in.k->size(2)}).like(in.q).contiguous();
    l.shape({in.q->size(0), in.q->size(1)}).type(arithmetic(in.q), "the arithmetic type").contiguous();
    const AttentionBackward p{
        .q = in.q->data,
        .k = in.k->data,
        .v = in.v->data,
        .out = o->data,
        .dout = d_o->data,
        .lse = l->data,
        .dq = d_q->data,
        .dk = d_k->data,
        .dv = d_v->data,
        .cu_seqlens_q = in.cu_seqlens_q,
        .cu_seqlens_k = in.cu_seqlens_k,
        .num_seqs = in.cu_q->size(0) - 1,
        .num_heads = in.q->size(1),
        .num_kv_heads = in.k->size(1),
        .head_dim = in.q->size(2),
        .q_token_stride = in.q->stride[0],
        .q_head_stride = in.q->stride[1],
        .k_token_stride = in.k->stride[0],
        .k_head_stride = in.k->stride[1],
        .v_token_stride = in.v->stride[0],
        .v_head_stride = in.v->stride[1],
        .scale = scale,
        .causal = causal,
        .dtype = in.q->dtype(),
    };
    const py::gil_scoped_release unlocked;
    cpu::attention_backward(p);
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention_forward", &forward);
    m.def("attention_backward", &backward);
}

}  // namespace qemb
