// pyqemb._C: numbers in, numbers out. Every function writes into tensors that Python allocated.
#include "bindings/tensor_view.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace qemb {

void bind_runtime(py::module_& m) {
    m.def("available_isas", &cpu::available_isas);
    m.def("current_isa", &cpu::current_isa);
    m.def("set_isa", &cpu::set_isa);
    m.def("num_threads", &cpu::num_threads);
}

}  // namespace qemb

PYBIND11_MODULE(_C, m) {
    qemb::bind_attention(m);
    qemb::bind_pooling(m);
    qemb::bind_infonce(m);
    qemb::bind_topk(m);
    qemb::bind_small_ops(m);
    qemb::bind_runtime(m);
}
