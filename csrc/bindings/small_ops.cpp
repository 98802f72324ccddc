// Checks the arguments of rms_norm, qk_norm_rope and swiglu and fills their structs by name.
#include "bindings/tensor_view.h"
#include "ops/qk_norm_rope.h"
#include "ops/rms_norm.h"
#include "ops/swiglu.h"

namespace qemb {
namespace {

ScalarType arithmetic(const Argument& x) {
    return x->type == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
}

const Argument& same(const Argument& x, const Argument& like) {
    QEMB_CHECK(x->shape == like->shape, "[", x.op, "] ", x.name, " must have the shape of ", like.name, ", ",
               like->shape_text(), ", got ", x->shape_text());
    return x.like(like).contiguous();
}

void* optional_gradient(const char* op, py::handle gradient, int64_t size, const Argument& x) {
    if (gradient.is_none()) return nullptr;
    const Argument dweight(op, "dweight", gradient);
    return dweight.shape({size}).type(arithmetic(x), "the arithmetic type").contiguous().view.data;
}

void check_eps(const char* op, double eps) { QEMB_CHECK(eps >= 0, "[", op, "] eps must not be negative, got ", eps); }

// x [rows, size] with its weight [size] and the saved 1 / rms [rows].
struct Norm {
    Argument x, weight, rstd;

    Norm(py::handle x_, py::handle weight_, py::handle rstd_)
        : x("rms_norm", "x", x_), weight("rms_norm", "weight", weight_), rstd("rms_norm", "rstd", rstd_) {
        x.rank(2, "[rows, size]").floating().contiguous();
        weight.shape({x->size(1)}).like(x).contiguous();
        rstd.shape({x->size(0)}).type(arithmetic(x), "the arithmetic type").contiguous();
    }
};

void* optional_like(const char* name, py::handle value, const Argument& x) {
    return value.is_none() ? nullptr : same(Argument("rms_norm", name, value), x)->data;
}

void rms_norm_forward(py::handle x, py::handle residual, py::handle weight, py::handle sum, py::handle y, py::handle rstd,
                      double eps) {
    const Norm in(x, weight, rstd);
    const Argument out("rms_norm", "y", y);
    same(out, in.x);
    check_eps("rms_norm", eps);
    const RmsNormForward p{.x = in.x->data,
                           .residual = optional_like("residual", residual, in.x),
                           .weight = in.weight->data,
                           .sum = optional_like("sum", sum, in.x),
                           .y = out->data,
                           .rstd = in.rstd->data,
                           .rows = in.x->size(0),
                           .size = in.x->size(1),
                           .eps = eps,
                           .dtype = in.x->dtype()};
    QEMB_CHECK(!p.residual == !p.sum, "[rms_norm] residual and sum come together");
    const py::gil_scoped_release unlocked;
    cpu::rms_norm_forward(p);
}

void rms_norm_backward(py::handle s, py::handle weight, py::handle rstd, py::handle dy, py::handle dsum, py::handle dx,
                       py::handle dweight) {
    const Norm in(s, weight, rstd);
    const Argument d_y("rms_norm", "dy", dy), d_x("rms_norm", "dx", dx);
    same(d_y, in.x), same(d_x, in.x);
    const RmsNormBackward p{.s = in.x->data,
                            .weight = in.weight->data,
                            .rstd = in.rstd->data,
                            .dy = d_y->data,
                            .dsum = optional_like("dsum", dsum, in.x),
                            .dx = d_x->data,
                            .dweight = optional_gradient("rms_norm", dweight, in.x->size(1), in.x),
                            .rows = in.x->size(0),
                            .size = in.x->size(1),
                            .dtype = in.x->dtype()};
    const py::gil_scoped_release unlocked;
    cpu::rms_norm_backward(p);
}

constexpr const char* kRope = "qk_norm_rope";

// x [tokens, heads, head_dim] with its weight, angles and the saved 1 / rms.
struct Heads {
    Argument x, weight, cos, sin, rstd;

    Heads(py::handle x_, py::handle weight_, py::handle cos_, py::handle sin_, py::handle rstd_)
        : x(kRope, "x", x_),
          weight(kRope, "weight", weight_),
          cos(kRope, "cos", cos_),
          sin(kRope, "sin", sin_),
          rstd(kRope, "rstd", rstd_) {
        x.rank(3, "[tokens, heads, head_dim]").floating().contiguous();
        QEMB_CHECK(x->size(2) % 2 == 0, "[", kRope, "] head_dim must be even, got ", x->size(2));
        weight.shape({x->size(2)}).like(x).contiguous();
        for (const Argument* angle : {&cos, &sin})
            angle->shape({x->size(0), x->size(2) / 2}).type(arithmetic(x), "the arithmetic type").contiguous();
        rstd.shape({x->size(0), x->size(1)}).type(arithmetic(x), "the arithmetic type").contiguous();
    }
};

void qk_norm_rope_forward(py::handle x, py::handle weight, py::handle cos, py::handle sin, py::handle y, py::handle rstd,
                          double eps) {
    const Heads in(x, weight, cos, sin, rstd);
    const Argument out(kRope, "y", y);
    same(out, in.x);
    check_eps(kRope, eps);
    const QkNormRopeForward p{.x = in.x->data,
                              .weight = in.weight->data,
                              .cos = in.cos->data,
                              .sin = in.sin->data,
                              .y = out->data,
                              .rstd = in.rstd->data,
                              .tokens = in.x->size(0),
                              .heads = in.x->size(1),
                              .head_dim = in.x->size(2),
                              .eps = eps,
                              .dtype = in.x->dtype()};
    const py::gil_scoped_release unlocked;
    cpu::qk_norm_rope_forward(p);
}

void qk_norm_rope_backward(py::handle x, py::handle weight, py::handle cos, py::handle sin, py::handle rstd, py::handle dy,
                           py::handle dx, py::handle dweight) {
    const Heads in(x, weight, cos, sin, rstd);
    const Argument d_y(kRope, "dy", dy), d_x(kRope, "dx", dx);
    same(d_y, in.x), same(d_x, in.x);
    const QkNormRopeBackward p{.x = in.x->data,
                               .weight = in.weight->data,
                               .cos = in.cos->data,
                               .sin = in.sin->data,
                               .rstd = in.rstd->data,
                               .dy = d_y->data,
                               .dx = d_x->data,
                               .dweight = optional_gradient(kRope, dweight, in.x->size(2), in.x),
                               .tokens = in.x->size(0),
                               .heads = in.x->size(1),
                               .head_dim = in.x->size(2),
                               .dtype = in.x->dtype()};
    const py::gil_scoped_release unlocked;
    cpu::qk_norm_rope_backward(p);
}

int64_t count_of(const Argument& x) {
    int64_t count = 1;
    for (const int64_t extent : x->shape) count *= extent;
    return count;
}

void swiglu_forward(py::handle gate, py::handle up, py::handle y) {
    const Argument g("swiglu", "gate", gate), u("swiglu", "up", up), out("swiglu", "y", y);
    g.floating().contiguous();
    same(u, g), same(out, g);
    const SwigluForward p{.gate = g->data, .up = u->data, .y = out->data, .count = count_of(g), .dtype = g->dtype()};
    const py::gil_scoped_release unlocked;
    cpu::swiglu_forward(p);
}

void swiglu_backward(py::handle gate, py::handle up, py::handle dy, py::handle dgate, py::handle dup) {
    const Argument g("swiglu", "gate", gate), u("swiglu", "up", up), d_y("swiglu", "dy", dy), d_g("swiglu", "dgate", dgate),
        d_u("swiglu", "dup", dup);
    g.floating().contiguous();
    for (const Argument* other : {&u, &d_y, &d_g, &d_u}) same(*other, g);
    const SwigluBackward p{.gate = g->data,
                           .up = u->data,
                           .dy = d_y->data,
                           .dgate = d_g->data,
                           .dup = d_u->data,
                           .count = count_of(g),
                           .dtype = g->dtype()};
    const py::gil_scoped_release unlocked;
    cpu::swiglu_backward(p);
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
