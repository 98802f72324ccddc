// torch.Tensor -> plain view, by attribute reads; the device, stream and memory of a call. The only file that knows
// torch exists, and it includes none of its headers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/types.h"
#include "cuda/runtime.h"

namespace qemb {

namespace py = pybind11;

enum class ScalarType { kFloat32, kFloat64, kBFloat16, kFloat16, kInt32, kInt64, kUInt8, kOther };

struct TensorView {
    void* data = nullptr;
    std::vector<int64_t> shape;
    std::vector<int64_t> stride;  // in elements
    ScalarType type = ScalarType::kOther;
    int device = -1;  // index of a CUDA device; -1: the CPU

    int64_t rank() const { return static_cast<int64_t>(shape.size()); }
    int64_t size(int64_t dim) const { return shape[static_cast<size_t>(dim)]; }
    bool contiguous() const {
        int64_t expected = 1;
        for (const int64_t extent : shape)
            if (extent == 0) return true;
        for (size_t i = shape.size(); i-- > 0;) {
            if (shape[i] != 1 && stride[i] != expected) return false;
            expected *= shape[i];
        }
        return true;
    }
    std::string shape_text() const {
        std::string text = "[";
        for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
        return text + "]";
    }
    DType dtype() const { return static_cast<DType>(type); }  // after a check that it is a floating type
};

// One call of an op. All its tensors are on one device: that of the first, which decides between the backends.
class Call {
  public:
    explicit Call(const char* op) : op(op) {}

    // The twin of that device; on CUDA on torch's current stream, with scratch from torch's allocator where the kernel
    // wants some.
    template <class Struct>
    void run(Struct& p, void (*on_cpu)(const Struct&), void (*on_cuda)(const Struct&),
             int64_t (*scratch_bytes)(const Struct&) = nullptr) const {
        if (!cuda()) {
            const py::gil_scoped_release unlocked;
            on_cpu(p);
            return;
        }
        const cuda::DeviceGuard guard(device_);
        p.stream = stream();
        py::object scratch;
        if constexpr (requires { p.scratch; })
            if (scratch_bytes) scratch = memory(scratch_bytes(p), &p.scratch);
        const py::gil_scoped_release unlocked;
        on_cuda(p);
    }
    bool cuda() const { return device_ >= 0; }
    int device() const { return device_; }
    void* stream() const;

    const char* const op;

  private:
    friend struct Argument;
    py::object memory(int64_t bytes, void** data) const;

    const char* first_ = nullptr;  // the argument that decided
    int device_ = -1;
};

// The checks that every op makes at the door, in the user's words. Throws TypeError unless `object` is a torch.Tensor.
struct Argument {
    const char* op;
    const char* name;
    TensorView view;
    py::handle object;

    Argument(Call& call, const char* name, py::handle object);
    const TensorView* operator->() const { return &view; }

    const Argument& rank(int64_t wanted, const char* layout) const;
    const Argument& floating() const;
    const Argument& type(ScalarType wanted, const char* wanted_name) const;
    const Argument& like(const Argument& other) const;  // same dtype
    const Argument& same(const Argument& other) const;  // same shape and dtype, contiguous
    const Argument& contiguous() const;
    const Argument& last_contiguous() const;
    const Argument& shape(std::initializer_list<int64_t> wanted, const char* why = "") const;  // why: ends the message
    std::string type_name() const;
    ScalarType arithmetic() const;  // what the kernels compute in

  private:
    void read(Call& call);
};

// cu_seqlens: int32, [num_seqs + 1], starts at 0, never decreases, ends at `total` where that is known (not -1). On a
// GPU the values are not looked at: the host would have to wait.
const int32_t* checked_cu_seqlens(const Argument& cu_seqlens, int64_t total = -1, const char* of = "");

// A gradient that may not be wanted (None): of that shape, in the arithmetic type of x.
void* optional_gradient(Call& call, const char* name, py::handle gradient, std::initializer_list<int64_t> shape,
                        const Argument& x);

void check_eps(const char* op, double eps);

}  // namespace qemb
