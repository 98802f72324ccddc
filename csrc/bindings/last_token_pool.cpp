// Checks the arguments of last-token pooling and fills its structs by name.
#include "ops/last_token_pool.h"

#include "bindings/module.h"

namespace qemb {
namespace {

constexpr const char* kOp = "last_token_pool";

// What forward and backward share. `rows` is what has one row for each sequence: its width is how many features are
// kept.
struct Inputs {
    Call call{kOp};
    Argument hidden, cu, rows;
    LastTokenPool problem;

    Inputs(py::handle hidden_, py::handle cu_, py::handle weight_, const char* rows_name, py::handle rows_, double eps,
           bool normalize)
        : hidden(call, "hidden", hidden_), cu(call, "cu_seqlens", cu_), rows(call, rows_name, rows_) {
        rows.rank(2, "[num_sequences, dim]").contiguous();
        hidden.rank(2, "[tokens, embed]").floating().last_contiguous();
        const int64_t dim = rows->size(1);
        QEMB_CHECK(dim >= 1 && dim <= hidden->size(1), "[", kOp, "] dim must be from 1 to ", hidden->size(1), ", got ",
                   dim);
        check_eps(kOp, eps);
        const void* weight = nullptr;
        if (!weight_.is_none()) {
            const Argument given(call, "norm_weight", weight_);
            weight =
                given.shape({hidden->size(1)}, " (one for each feature of hidden)").like(hidden).contiguous()->data;
        }
        const int32_t* const cu_seqlens = checked_cu_seqlens(cu, hidden->size(0), "hidden");
        rows.shape({cu->size(0) - 1, dim}).like(hidden);
        problem = {
            .hidden = hidden->data,
            .norm_weight = weight,
            .cu_seqlens = cu_seqlens,
            .num_tokens = hidden->size(0),
            .num_seqs = rows->size(0),
            .embed = hidden->size(1),
            .dim = dim,
            .hidden_stride = hidden->stride[0],
            .eps = eps,
            .normalize = normalize,
            .dtype = hidden->dtype(),
        };
    }
};

void forward(py::handle hidden, py::handle cu_seqlens, py::handle norm_weight, py::handle out, double eps,
             bool normalize) {
    Inputs in(hidden, cu_seqlens, norm_weight, "out", out, eps, normalize);
    LastTokenPoolForward p{in.problem};
    p.out = in.rows->data;
    in.call.run(p, cpu::last_token_pool_forward, cuda::last_token_pool_forward);
}

void backward(py::handle hidden, py::handle cu_seqlens, py::handle norm_weight, py::handle dout, py::handle dhidden,
              py::handle dnorm_weight, double eps, bool normalize) {
    Inputs in(hidden, cu_seqlens, norm_weight, "dout", dout, eps, normalize);
    LastTokenPoolBackward p{in.problem};
    p.dout = in.rows->data;
    p.dhidden = Argument(in.call, "dhidden", dhidden).same(in.hidden)->data;
    p.dnorm_weight = optional_gradient(in.call, "dnorm_weight", dnorm_weight, {in.hidden->size(1)}, in.hidden);
    in.call.run(p, cpu::last_token_pool_backward, cuda::last_token_pool_backward,
                cuda::last_token_pool_backward_scratch);
}

}  // namespace

void bind_last_token_pool(py::module_& m) {
    m.def("last_token_pool_forward", &forward);
    m.def("last_token_pool_backward", &backward);
}

}  // namespace qemb
