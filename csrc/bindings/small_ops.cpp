// Checks the arguments of rms_norm, qk_norm_rope and swiglu and fills their structs by name.
#include "bindings/tensor_view.h"
#include "ops/qk_norm_rope.h"
#include "ops/rms_norm.h"
#include "ops/swiglu.h"

namespace qemb {
namespace {

const Argument& same(const Argument& x, const Argument& like) {
    QEMB_CHECK(x->shape == like->shape, "[", x.op, "] ", x.name, " must have the shape of ", like.name, ", ",
               like->shape_text(), ", got ", x->shape_text());
    return x.like(like).contiguous();
}

void* optional_gradient(Call& call, py::handle gradient, int64_t size, const Argument& x) {
    if (gradient.is_none()) return nullptr;
    const Argument dweight(call, "dweight", gradient);
    return dweight.shape({size}).type(x.arithmetic(), "the arithmetic type").contiguous().view.data;
}

void check_eps(const char* op, double eps) { QEMB_CHECK(eps >= 0, "[", op, "] eps must not be negative, got ", eps); }

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
    return value.is_none() ? nullptr : same(Argument(call, name, value), x)->data;
}

void rms_norm_forward(py::handle x, py::handle residual, py::handle weight, py::handle sum, py::handle y, py::handle rstd,
                      double eps) {
    Norm in(x, weight, rstd);
    const Argument out(in.call, "y", y);
    same(out, in.x);
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
    same(d_y, in.x), same(d_x, in.x);
    RmsNormBackward p{.s = in.x->data,
                      .weight = in.weight->data,
                      .rstd = in.rstd->data,
                      .dy = d_y->data,
                      .dsum = optional_like(in.call, "dsum", dsum, in.x),
                      .dx = d_x->data,
                      .dweight = optional_gradient(in.call, dweight, in.x->size(1), in.x),
                      .rows = in.x->size(0),
                      .size = in.x->size(1),
                      .dtype = in.x->dtype()};
    in.call.run(p, cpu::rms_norm_backward, cuda::rms_norm_backward, cuda::rms_norm_backward_scratch);
}

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

void qk_norm_rope_forward(py::handle x, py::handle weight, py::handle cos, py::handle sin, py::handle y, py::handle rstd,
                          double eps) {
    Heads in(x, weight, cos, sin, rstd);
    const Argument out(in.call, "y", y);
    same(out, in.x);
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

void qk_norm_rope_backward(py::handle x, py::handle weight, py::handle cos, py::handle sin, py::handle rstd, py::handle dy,
                           py::handle dx, py::handle dweight) {
    Heads in(x, weight, cos, sin, rstd);
    const Argument d_y(in.call, "dy", dy), d_x(in.call, "dx", dx);
    same(d_y, in.x), same(d_x, in.x);
    QEMB_CHECK(in.weight || dweight.is_none(), "[", in.call.op, "] dweight needs a weight");
    QkNormRopeBackward p{.x = in.x->data,
                         .weight = in.weight,
                         .cos = in.cos->data,
                         .sin = in.sin->data,
                         .rstd = in.rstd->data,
                         .dy = d_y->data,
                         .dx = d_x->data,
                         .dweight = optional_gradient(in.call, dweight, in.x->size(2), in.x),
                         .tokens = in.x->size(0),
                         .heads = in.x->size(1),
                         .head_dim = in.x->size(2),
                         .dtype = in.x->dtype()};
    in.call.run(p, cpu::qk_norm_rope_backward, cuda::qk_norm_rope_backward, cuda::qk_norm_rope_backward_scratch);
}

int64_t count_of(const Argument& x) {
    int64_t count = 1;
    for (const int64_t extent : x->shape) count *= extent;
    return count;
}

void swiglu_forward(py::handle gate, py::handle up, py::handle y) {
    Call call("swiglu");
    const Argument g(call, "gate", gate), u(call, "up", up), out(call, "y", y);
    g.floating().contiguous();
    same(u, g), same(out, g);
    SwigluForward p{.gate = g->data, .up = u->data, .y = out->data, .count = count_of(g), .dtype = g->dtype()};
    call.run(p, cpu::swiglu_forward, cuda::swiglu_forward);
}

void swiglu_backward(py::handle gate, py::handle up, py::handle dy, py::handle dgate, py::handle dup) {
    Call call("swiglu");
    const Argument g(call, "gate", gate), u(call, "up", up), d_y(call, "dy", dy), d_g(call, "dgate", dgate),
        d_u(call, "dup", dup);
    g.floating().contiguous();
    for (const Argument* other : {&u, &d_y, &d_g, &d_u}) same(*other, g);
    SwigluBackward p{.gate = g->data,
                     .up = u->data,
                     .dy = d_y->data,
                     .dgate = d_g->data,
                     .dup = d_u->data,
                     .count = count_of(g),
                     .dtype = g->dtype()};
    call.run(p, cpu::swiglu_backward, cuda::swiglu_backward);
}

}  // namespace

void bind_small_ops(py::module_& m) {
    m.def("rms_norm_forward", &rms_norm_forward);
    m.def("rms_norm_backward", &rms_norm_backward);
    m.def("qk_norm_rope_forward", &qk_norm_rope_forward);
    m.def("qk_norm_rope_backward", &qk_norm_rope_backward);
    m.def("swiglu_forward", &swiglu_forward);
    m.def("swiglu_backward", &swiglu_backward);
}

}  // namespace qemb
