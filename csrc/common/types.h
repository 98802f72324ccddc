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

// Sums of squares between these bounds are exact to rounding; others have overflowed or lost what is small. They are
// taken again of the values times a power of two: kShrink or kGrow. (NaN is outside.)
template <class T>
struct SquareRange {
    static constexpr bool kIsFloat = sizeof(T) == 4;
    static constexpr T kLow = static_cast<T>(kIsFloat ? 0x1p-80 : 0x1p-900),
                       kHigh = static_cast<T>(kIsFloat ? 0x1p120 : 0x1p1000);
    static constexpr T kShrink = static_cast<T>(kIsFloat ? 0x1p-100 : 0x1p-600),
                       kGrow = static_cast<T>(kIsFloat ? 0x1p100 : 0x1p600);
};

}  // namespace qemb
