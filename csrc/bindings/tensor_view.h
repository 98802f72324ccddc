// torch.Tensor -> plain view, by attribute reads: the only file that knows torch exists, and it includes none of its headers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/types.h"

namespace qemb {

namespace py = pybind11;

enum class ScalarType { kFloat32, kFloat64, kBFloat16, kFloat16, kInt32, kInt64, kOther };

struct TensorView {
    void* data = nullptr;
    std::vector<int64_t> shape;
    std::vector<int64_t> stride;  // in elements
    ScalarType type = ScalarType::kOther;
    std::string type_name;
    bool on_cpu = true;
    int device_index = -1;

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

// Throws TypeError unless `object` is a torch.Tensor.
TensorView view_of(const char* op, const char* name, py::handle object);

// The checks that every op makes at the door, in the user's words.
struct Argument {
    const char* op;
    const char* name;
    TensorView view;

    Argument(const char* op, const char* name, py::handle object) : op(op), name(name), view(view_of(op, name, object)) {}
    const TensorView* operator->() const { return &view; }

    const Argument& rank(int64_t wanted, const char* layout) const;
    const Argument& floating() const;
    const Argument& type(ScalarType wanted, const char* wanted_name) const;
    const Argument& like(const Argument& other) const;  // same dtype and device
    const Argument& contiguous() const;
    const Argument& last_contiguous() const;
    const Argument& shape(std::initializer_list<int64_t> wanted) const;
};

// cu_seqlens: int32, [num_seqs + 1], starts at 0, never decreases, ends at `total`.
const int32_t* checked_cu_seqlens(const Argument& cu_seqlens, int64_t total, const char* of);

void bind_attention(py::module_& m);
void bind_pooling(py::module_& m);
void bind_infonce(py::module_& m);
void bind_topk(py::module_& m);
void bind_small_ops(py::module_& m);
void bind_runtime(py::module_& m);

}  // namespace qemb
