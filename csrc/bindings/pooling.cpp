// Checks the arguments of last-token pooling and fills its structs by name.
#include "ops/pooling.h"

#include "bindings/tensor_view.h"

namespace qemb {
namespace {

constexpr const char* kOp = "last_token_pool";

struct Inputs {
    Argument hidden, cu;
    std::optional<Argument> weight;
    const int32_t* cu_seqlens;

    Inputs(py::handle hidden_, py::handle cu_, py::handle weight_, int64_t dim, double eps)
        : hidden(kOp, "hidden", hidden_), cu(kOp, "cu_seqlens", cu_) {
        hidden.rank(2, "[tokens, embed]").floating().last_contiguous();
        QEMB_CHECK(dim >= 1 && dim <= hidden->size(1), "[", kOp, "] dim must be from 1 to ", hidden->size(1), ", got ", dim);
        QEMB_CHECK(eps >= 0, "[", kOp, "] eps must not be negative, got ", eps);
        if (!weight_.is_none()) {
            weight.emplace(kOp, "norm_weight", weight_);
            weight->shape({hidden->size(1)}).like(hidden).contiguous();
        }
        cu_seqlens = checked_cu_seqlens(cu, hidden->size(0), "hidden");
    }
};

void forward(py::handle hidden, py::handle cu_seqlens, py::handle norm_weight, py::handle out, double eps, bool normalize) {
    const Argument o(kOp, "out", out);
    o.rank(2, "[num_sequences, dim]").contiguous();
    const Inputs in(hidden, cu_seqlens, norm_weight, o->size(1), eps);
    o.shape({in.cu->size(0) - 1, o->size(1)}).like(in.hidden);
    const PoolForward p{
        .hidden = in.hidden->data,
        .norm_weight = in.weight ? (*in.weight)->data : nullptr,
        .out = o->data,
        .cu_seqlens = in.cu_seqlens,
        .num_seqs = o->size(0),
        .embed = in.hidden->size(1),
        .dim = o->size(1),
        .hidden_stride = in.hidden->stride[0],
        .eps = eps,
        .normalize = normalize,
        .dtype = in.hidden->dtype(),
    };
    const py::gil_scoped_release unlocked;
    cpu::pool_forward(p);
}

void backward(py::handle hidden, py::handle cu_seqlens, py::handle norm_weight, py::handle dout, py::handle dhidden,
              py::handle dnorm_weight, double eps, bool normalize) {
    const Argument d_o(kOp, "dout", dout), d_h(kOp, "dhidden", dhidden);
    d_o.rank(2, "[num_sequences, dim]").contiguous();
    const Inputs in(hidden, cu_seqlens, norm_weight, d_o->size(1), eps);
    d_o.shape({in.cu->size(0) - 1, d_o->size(1)}).like(in.hidden);
    d_h.shape({in.hidden->size(0), in.hidden->size(1)}).like(in.hidden).contiguous();
    void* d_weight = nullptr;
    if (!dnorm_weight.is_none()) {
        const Argument d_w(kOp, "dnorm_weight", dnorm_weight);
        const bool wide = in.hidden->type == ScalarType::kFloat64;
        d_w.shape({in.hidden->size(1)})
            .type(wide ? ScalarType::kFloat64 : ScalarType::kFloat32, "the arithmetic type")
            .contiguous();
        d_weight = d_w->data;
    }
    const PoolBackward p{
        .hidden = in.hidden->data,
        .norm_weight = in.weight ? (*in.weight)->data : nullptr,
        .dout = d_o->data,
        .dhidden = d_h->data,
        .dnorm_weight = d_weight,
        .cu_seqlens = in.cu_seqlens,
        .num_seqs = d_o->size(0),
        .embed = in.hidden->size(1),
        .dim = d_o->size(1),
        .hidden_stride = in.hidden->stride[0],
        .eps = eps,
        .normalize = normalize,
        .dtype = in.hidden->dtype(),
    };
    const py::gil_scoped_release unlocked;
    cpu::pool_backward(p);
}

}  // namespace

void bind_pooling(py::module_& m) {
    m.def("pool_forward", &forward);
    m.def("pool_backward", &backward);
}

}  // namespace qemb
