// pyqemb._C: numbers in, numbers out. Every function writes into tensors that Python allocated.
#include "bindings/module.h"

#include <utility>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cuda/runtime.h"

namespace qemb {
namespace {

// Memory for one large result, as a Python buffer.
struct Block {
    void* data;
    size_t size;

    explicit Block(size_t bytes) : data(cpu::take_block(bytes)), size(bytes) {}
    ~Block() { cpu::give_back_block(data); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
};

void bind_runtime(py::module_& m) {
    m.def("available_isas", &cpu::available_isas);
    m.def("current_isa", &cpu::current_isa);
    m.def("set_isa", &cpu::set_isa);
    m.def("cuda_is_built", &cuda::is_built);
    m.def("hopper_is_built", &cuda::hopper_is_built);
    m.def("cuda_device_count", &cuda::device_count);
    m.def("set_newest_kernels", [](int capability) { return std::exchange(cuda::newest_kernels(), capability); });
    m.def("check_cu_seqlens",
          [](const char* op, const char* name, py::handle cu_seqlens, int64_t total, const char* of) {
              Call call(op);
              checked_cu_seqlens(Argument(call, name, cu_seqlens), total, of);
          });
    m.def("num_threads", &cpu::num_threads);
    py::class_<Block>(m, "Block", py::buffer_protocol()).def(py::init<size_t>()).def_buffer([](const Block& block) {
        return py::buffer_info(static_cast<uint8_t*>(block.data), static_cast<py::ssize_t>(block.size));
    });
    m.def("kept_bytes", &cpu::kept_bytes);
    m.def("release_kept", &cpu::release_kept);
}

}  // namespace

}  // namespace qemb

PYBIND11_MODULE(_C, m) {
    qemb::bind_attention(m);
    qemb::bind_info_nce(m);
    qemb::bind_last_token_pool(m);
    qemb::bind_qk_norm_rope(m);
    qemb::bind_rms_norm(m);
    qemb::bind_shingles(m);
    qemb::bind_swiglu(m);
    qemb::bind_top_k(m);
    qemb::bind_runtime(m);
}
