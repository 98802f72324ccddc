// Checks the arguments of swiglu and fills its structs by name.
#include "ops/swiglu.h"

#include "bindings/module.h"

namespace qemb {
namespace {

int64_t count_of(const Argument& x) {
    int64_t count = 1;
    for (const int64_t extent : x->shape) count *= extent;
    return count;
}

void swiglu_forward(py::handle gate, py::handle up, py::handle y) {
    Call call("swiglu");
    const Argument g(call, "gate", gate), u(call, "up", up), out(call, "y", y);
    g.floating().contiguous();
    u.same(g), out.same(g);
    SwigluForward p{.gate = g->data, .up = u->data, .y = out->data, .count = count_of(g), .dtype = g->dtype()};
    call.run(p, cpu::swiglu_forward, cuda::swiglu_forward);
}

void swiglu_backward(py::handle gate, py::handle up, py::handle dy, py::handle dgate, py::handle dup) {
    Call call("swiglu");
    const Argument g(call, "gate", gate), u(call, "up", up), d_y(call, "dy", dy), d_g(call, "dgate", dgate),
        d_u(call, "dup", dup);
    g.floating().contiguous();
    for (const Argument* other : {&u, &d_y, &d_g, &d_u}) other->same(g);
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

void bind_swiglu(py::module_& m) {
    m.def("swiglu_forward", &swiglu_forward);
    m.def("swiglu_backward", &swiglu_backward);
}

}  // namespace qemb
