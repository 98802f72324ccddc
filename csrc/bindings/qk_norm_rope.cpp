// Checks the arguments of qk_norm_rope and fills its structs by name.
#include "ops/qk_norm_rope.h"

#include "bindings/module.h"

namespace qemb {
namespace {

// x [tokens, heads, head_dim] with its weight (None: no norm), angles and the saved 1 / rms.
struct Heads {
    Call call;
    Argument x, cos, sin, rstd;
    const void* weight = nullptr;

    Heads(py::handle x_, py::handle weight_, py::handle cos_, py::handle sin_, py::handle rstd_)
        : call(weight_.is_none() ? "rope" : "qk_norm_rope"),
          x(call, "x", x_),
          cos(call, "cos", cos_),
          sin(call, "sin", sin_),
          rstd(call, "rstd", rstd_) {
        x.rank(3, "[tokens, heads, head_dim]").floating().contiguous();
        QEMB_CHECK(x->size(2) % 2 == 0, "[", call.op, "] x must have an even head_dim, got ", x->size(2));
        if (!weight_.is_none()) {
            const Argument given(call, "norm_weight", weight_);
            weight = given.shape({x->size(2)}, " (the head_dim of x)").like(x).contiguous()->data;
        }
        for (const Argument* angle : {&cos, &sin})
            angle->shape({x->size(0), x->size(2) / 2}, " (tokens and half the head_dim of x)")
                .type(x.arithmetic(), "float32, or float64 where x is")
                .contiguous();
        rstd.shape({x->size(0), x->size(1)}).type(x.arithmetic(), "the arithmetic type").contiguous();
    }
};

void qk_norm_rope_forward(py::handle x, py::handle weight, py::handle cos, py::handle sin, py::handle y,
                          py::handle rstd, double eps) {
    Heads in(x, weight, cos, sin, rstd);
    const Argument out(in.call, "y", y);
    out.same(in.x);
    check_eps(in.call.op, eps);
    QkNormRopeForward p{.x = in.x->data,
                        .weight = in.weight,
                        .cos = in.cos->data,
                        .sin = in.sin->data,
                        .y = out->data,
                        .rstd = in.rstd->data,
                        .tokens = in.x->size(0),
                        .heads = in.x->size(1),
                        .head_dim = in.x->size(2),
                        .eps = eps,
                        .dtype = in.x->dtype()};
    in.call.run(p, cpu::qk_norm_rope_forward, cuda::qk_norm_rope_forward);
}

void qk_norm_rope_backward(py::handle x, py::handle weight, py::handle cos, py::handle sin, py::handle rstd,
                           py::handle dy, py::handle dx, py::handle dweight) {
    Heads in(x, weight, cos, sin, rstd);
    const Argument d_y(in.call, "dy", dy), d_x(in.call, "dx", dx);
    d_y.same(in.x), d_x.same(in.x);
    QEMB_CHECK(in.weight || dweight.is_none(), "[", in.call.op, "] dweight needs a weight");
    QkNormRopeBackward p{.x = in.x->data,
                         .weight = in.weight,
                         .cos = in.cos->data,
                         .sin = in.sin->data,
                         .rstd = in.rstd->data,
                         .dy = d_y->data,
                         .dx = d_x->data,
                         .dweight = optional_gradient(in.call, "dweight", dweight, {in.x->size(2)}, in.x),
                         .tokens = in.x->size(0),
                         .heads = in.x->size(1),
                         .head_dim = in.x->size(2),
                         .dtype = in.x->dtype()};
    in.call.run(p, cpu::qk_norm_rope_backward, cuda::qk_norm_rope_backward, cuda::qk_norm_rope_backward_scratch);
}

}  // namespace

void bind_qk_norm_rope(py::module_& m) {
    m.def("qk_norm_rope_forward", &qk_norm_rope_forward);
    m.def("qk_norm_rope_backward", &qk_norm_rope_backward);
}

}  // namespace qemb
