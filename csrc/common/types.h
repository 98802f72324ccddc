// The storage types that every op accepts. float64 exists for gradient checks; the others compute in float.
#pragma once

#include <cstdint>

namespace qemb {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

inline int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::kFloat64: return 8;
        case DType::kFloat32: return 4;
        default: return 2;
    }
}

inline const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return "float32";
        case DType::kFloat64: return "float64";
        case DType::kBFloat16: return "bfloat16";
        default: return "float16";
    }
}

}  // namespace qemb
