// Checks the arguments of rms_norm and fills its structs by name.
#include "ops/rms_norm.h"

#include "bindings/module.h"

namespace qemb {
namespace {

// x [rows, size] with its weight [size] and the saved 1 / rms [rows].
struct Norm {
    Call call{"rms_norm"};
    Argument x, weight, rstd;

    Norm(py::handle x_, py::handle weight_, py::handle rstd_)
        : x(call, "x", x_), weight(call, "weight", weight_), rstd(call, "rstd", rstd_) {
        x.rank(2, "[rows, size]").floating().contiguous();
        weight.shape({x->size(1)}, " (one for each feature of x)").like(x).contiguous();
        rstd.shape({x->size(0)}).type(x.arithmetic(), "the arithmetic type").contiguous();
    }
};

void* optional_like(Call& call, const char* name, py::handle value, const Argument& x) {
    return value.is_none() ? nullptr : Argument(call, name, value).same(x)->data;
}

void rms_norm_forward(py::handle x, py::handle residual, py::handle weight, py::handle sum, py::handle y,
                      py::handle rstd, double eps) {
    Norm in(x, weight, rstd);
    const Argument out(in.call, "y", y);
    out.same(in.x);
    check_eps("rms_norm", eps);
    RmsNormForward p{.x = in.x->data,
                     .residual = optional_like(in.call, "residual", residual, in.x),
                     .weight = in.weight->data,
                     .sum = optional_like(in.call, "sum", sum, in.x),
                     .y = out->data,
                     .rstd = in.rstd->data,
                     .rows = in.x->size(0),
                     .size = in.x->size(1),
                     .eps = eps,
                     .dtype = in.x->dtype()};
    QEMB_CHECK(!p.residual == !p.sum, "[rms_norm] residual and sum come together");
    in.call.run(p, cpu::rms_norm_forward, cuda::rms_norm_forward);
}

void rms_norm_backward(py::handle s, py::handle weight, py::handle rstd, py::handle dy, py::handle dsum, py::handle dx,
                       py::handle dweight) {
    Norm in(s, weight, rstd);
    const Argument d_y(in.call, "dy", dy), d_x(in.call, "dx", dx);
    d_y.same(in.x), d_x.same(in.x);
    RmsNormBackward p{.s = in.x->data,
                      .weight = in.weight->data,
                      .rstd = in.rstd->data,
                      .dy = d_y->data,
                      .dsum = optional_like(in.call, "dsum", dsum, in.x),
                      .dx = d_x->data,
                      .dweight = optional_gradient(in.call, "dweight", dweight, {in.x->size(1)}, in.x),
                      .rows = in.x->size(0),
                      .size = in.x->size(1),
                      .dtype = in.x->dtype()};
    in.call.run(p, cpu::rms_norm_backward, cuda::rms_norm_backward, cuda::rms_norm_backward_scratch);
}

}  // namespace

void bind_rms_norm(py::module_& m) {
    m.def("rms_norm_forward", &rms_norm_forward);
    m.def("rms_norm_backward", &rms_norm_backward);
}

}  // namespace qemb
