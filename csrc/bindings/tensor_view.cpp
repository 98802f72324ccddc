#include "bindings/tensor_view.h"

namespace qemb {
namespace {

// torch's dtype objects are singletons: compared by identity. Never freed, they outlive the interpreter's modules.
struct Torch {
    py::object tensor;
    py::object empty, bytes, stream;
    std::vector<std::pair<py::object, ScalarType>> types;
    // Names of attributes as Python keeps them: from a C string, each read would make a new str.
    const py::object dtype = interned("dtype"), shape = interned("shape"), stride = interned("stride"),
                     get_device = interned("get_device"), is_cpu = interned("is_cpu"), is_cuda = interned("is_cuda"),
                     data_ptr = interned("data_ptr");

    Torch() {
        const py::module_ torch = py::module_::import("torch");
        tensor = torch.attr("Tensor");
        empty = torch.attr("empty");
        bytes = torch.attr("uint8");
        // What compiled graphs ask too; torch.cuda.current_stream(device) would first make an object, on every call.
        stream = py::getattr(torch.attr("_C"), "_cuda_getCurrentRawStream", py::none());
        const std::pair<const char*, ScalarType> names[] = {
            {"float32", ScalarType::kFloat32}, {"float64", ScalarType::kFloat64}, {"bfloat16", ScalarType::kBFloat16},
            {"float16", ScalarType::kFloat16}, {"int32", ScalarType::kInt32},     {"int64", ScalarType::kInt64},
            {"uint8", ScalarType::kUInt8},
        };
        for (const auto& [name, type] : names) types.emplace_back(torch.attr(name), type);
    }

    static py::object interned(const char* name) {
        return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
    }
};

const Torch& torch() {
    static const Torch* const instance = new Torch;
    return *instance;
}

py::object owned(PyObject* result) {
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}
py::object get(py::handle object, const py::object& name) { return owned(PyObject_GetAttr(object.ptr(), name.ptr())); }
py::object call_method(py::handle object, const py::object& name) {
    return owned(PyObject_CallMethodNoArgs(object.ptr(), name.ptr()));
}

int64_t integer(py::handle object) {
    const int64_t value = PyLong_AsLongLong(object.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

std::vector<int64_t> integers(const py::tuple& items) {
    std::vector<int64_t> values(items.size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = integer(PyTuple_GET_ITEM(items.ptr(), i));
    return values;
}

void* memory_of(py::handle tensor) {
    return reinterpret_cast<void*>(static_cast<uintptr_t>(integer(call_method(tensor, torch().data_ptr))));
}

}  // namespace

void* Call::stream() const { return reinterpret_cast<void*>(torch().stream(device_).cast<uintptr_t>()); }

// Freed to torch's allocator at the end of the call: it hands the memory out again in the order of the stream.
py::object Call::memory(int64_t bytes, void** data) const {
    if (bytes == 0) return py::none();
    py::object block = torch().empty(bytes, py::arg("dtype") = torch().bytes, py::arg("device") = device_);
    *data = memory_of(block);
    return block;
}

Argument::Argument(Call& call, const char* name, py::handle object) : op(call.op), name(name), object(object) {
    if (!PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(torch().tensor.ptr())))
        throw py::type_error(concat("[", op, "] ", name, " must be a torch.Tensor, got ",
                                    py::str(py::type::of(object).attr("__name__")).cast<std::string>()));
    try {
        read(call);
    } catch (const py::error_already_set&) {  // sparse, or a wrapper of another tensor
        throw py::type_error(concat("[", op, "] ", name, " must be a dense torch.Tensor with memory of its own, got ",
                                    py::str(py::type::of(object).attr("__name__")).cast<std::string>(), " of layout ",
                                    py::str(object.attr("layout")).cast<std::string>()));
    }
}

void Argument::read(Call& call) {
    const Torch& names = torch();
    const py::object dtype = get(object, names.dtype);
    for (const auto& [known, type] : names.types)
        if (dtype.is(known)) view.type = type;
    view.shape = integers(get(object, names.shape));
    view.stride = integers(call_method(object, names.stride));
    view.device = static_cast<int>(integer(call_method(object, names.get_device)));
    const auto device = [&] { return py::str(object.attr("device")).cast<std::string>(); };
    QEMB_CHECK(get(object, view.device < 0 ? names.is_cpu : names.is_cuda).ptr() == Py_True, "[", op, "] ", name,
               " must be on the CPU or on a CUDA device, got ", device());
    if (!call.first_) call.first_ = name, call.device_ = view.device;
    QEMB_CHECK(view.device == call.device_, "[", op, "] ", name, " must be on the device of ", call.first_, ", ",
               call.cuda() ? concat("cuda:", call.device_) : "cpu", ", got ", device());
    view.data = memory_of(object);
}

std::string Argument::type_name() const { return py::str(object.attr("dtype")).cast<std::string>(); }

ScalarType Argument::arithmetic() const {
    return view.type == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
}

const Argument& Argument::rank(int64_t wanted, const char* layout) const {
    QEMB_CHECK(view.rank() == wanted, "[", op, "] ", name, " must have shape ", layout, ", got ", view.shape_text());
    return *this;
}

const Argument& Argument::floating() const {
    if (view.type > ScalarType::kFloat16)
        throw py::type_error(
            concat("[", op, "] ", name, " must be float32, bfloat16, float16 or float64, got ", type_name()));
    if (view.device >= 0 && view.type == ScalarType::kFloat64)
        throw py::type_error(
            concat("[", op, "] ", name, " must be float32, bfloat16 or float16 on CUDA: float64 is for the CPU"));
    return *this;
}

const Argument& Argument::type(ScalarType wanted, const char* wanted_name) const {
    if (view.type != wanted)
        throw py::type_error(concat("[", op, "] ", name, " must be ", wanted_name, ", got ", type_name()));
    return *this;
}

const Argument& Argument::like(const Argument& other) const {
    if (view.type != other->type)
        throw py::type_error(concat("[", op, "] ", name, " must have the dtype of ", other.name, ", ",
                                    other.type_name(), ", got ", type_name()));
    return *this;
}

const Argument& Argument::same(const Argument& other) const {
    QEMB_CHECK(view.shape == other->shape, "[", op, "] ", name, " must have the shape of ", other.name, ", ",
               other->shape_text(), ", got ", view.shape_text());
    return like(other).contiguous();
}

const Argument& Argument::contiguous() const {
    QEMB_CHECK(view.contiguous(), "[", op, "] ", name, " must be contiguous");
    return *this;
}

const Argument& Argument::last_contiguous() const {
    QEMB_CHECK(view.stride.back() == 1 || view.shape.back() <= 1, "[", op, "] ", name,
               " must be contiguous in its last dimension, got stride ", view.stride.back());
    return *this;
}

const Argument& Argument::shape(std::initializer_list<int64_t> wanted, const char* why) const {
    if (view.shape != std::vector<int64_t>(wanted)) {
        TensorView expected;
        expected.shape = wanted;
        QEMB_CHECK(false, "[", op, "] ", name, " must have shape ", expected.shape_text(), ", got ", view.shape_text(),
                   why);
    }
    return *this;
}

void* optional_gradient(Call& call, const char* name, py::handle gradient, std::initializer_list<int64_t> shape,
                        const Argument& x) {
    if (gradient.is_none()) return nullptr;
    return Argument(call, name, gradient).shape(shape).type(x.arithmetic(), "the arithmetic type").contiguous()->data;
}

void check_eps(const char* op, double eps) { QEMB_CHECK(eps >= 0, "[", op, "] eps must not be negative, got ", eps); }

const int32_t* checked_cu_seqlens(const Argument& cu_seqlens, int64_t total, const char* of) {
    cu_seqlens.type(ScalarType::kInt32, "int32").rank(1, "[num_sequences + 1]").contiguous();
    const char* op = cu_seqlens.op;
    const char* name = cu_seqlens.name;
    const int64_t count = cu_seqlens->size(0);
    QEMB_CHECK(count >= 1, "[", op, "] ", name, " must have at least one entry, got none");
    const auto* values = static_cast<const int32_t*>(cu_seqlens->data);
    if (cu_seqlens->device >= 0) return values;
    QEMB_CHECK(values[0] == 0, "[", op, "] ", name, " must start at 0, got ", values[0]);
    for (int64_t i = 1; i < count; ++i)
        QEMB_CHECK(values[i] >= values[i - 1], "[", op, "] ", name, " must not decrease, got ", values[i - 1], " then ",
                   values[i], " at ", i);
    QEMB_CHECK(total < 0 || values[count - 1] == total, "[", op, "] ", name, " must end at the number of tokens of ",
               of, ", ", total, ", got ", values[count - 1]);
    return values;
}

}  // namespace qemb
