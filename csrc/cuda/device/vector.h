// Neighbouring values of a row as they lie in memory, 16 bytes at a time, or one by one where a row is not aligned to
// that.
#pragma once

#include "common/types.h"
#include "cuda/device/arch.h"

namespace qemb::cuda {

template <class T>
constexpr int kVectorLanes = 16 / static_cast<int>(sizeof(T));

// Stays packed until it is used: half the registers of floats.
template <class T, int kLanes>
struct Packed {
    static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
    static_assert(kLanes % kVectorLanes<T> == 0);
    Vector16 vectors[kLanes / kVectorLanes<T>];

    QEMB_DEVICE float operator[](int i) const {
        const uint32_t word = vectors[i / kVectorLanes<T>].word[i % kVectorLanes<T> / kPerWord];
        if constexpr (kPerWord == 1)
            return __builtin_bit_cast(float, word);
        else
            return unpack<T>(word, i % 2);
    }
};
template <class T>
struct Packed<T, 1> {
    T value;

    QEMB_DEVICE float operator[](int) const { return to_float(value); }
};

template <int kLanes, class T>
QEMB_DEVICE Packed<T, kLanes> load(const T* from) {
    Packed<T, kLanes> values;
    if constexpr (kLanes == 1) {
        values.value = *from;
    } else {
#pragma unroll
        for (int v = 0; v < kLanes / kVectorLanes<T>; ++v) values.vectors[v] = load16(from + v * kVectorLanes<T>);
    }
    return values;
}

template <int kLanes, class T>
QEMB_DEVICE void store(T* to, const Packed<T, kLanes>& packed) {
    if constexpr (kLanes == 1) {
        *to = packed.value;
    } else {
#pragma unroll
        for (int v = 0; v < kLanes / kVectorLanes<T>; ++v) store16(to + v * kVectorLanes<T>, packed.vectors[v]);
    }
}

template <class T, int kLanes>
QEMB_DEVICE Packed<T, kLanes> packed(const float (&values)[kLanes]) {
    Packed<T, kLanes> result;
    if constexpr (kLanes == 1) {
        result.value = from_float<T>(values[0]);
    } else {
#pragma unroll
        for (int i = 0; i < kLanes; i += Packed<T, kLanes>::kPerWord) {
            uint32_t& word =
                result.vectors[i / kVectorLanes<T>].word[i % kVectorLanes<T> / Packed<T, kLanes>::kPerWord];
            if constexpr (sizeof(T) == 4)
                word = __builtin_bit_cast(uint32_t, values[i]);
            else
                word = pack<T>(values[i], values[i + 1]);
        }
    }
    return result;
}

template <int kLanes, class T>
QEMB_DEVICE void store(T* to, const float (&values)[kLanes]) {
    store<kLanes>(to, packed<T>(values));
}

// Can whole vectors be read and written at all of these?
template <class... Pointers>
bool aligned16(const Pointers*... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// body<T>() with the device's name of the dtype.
template <class Body>
void visit_dtype(DType dtype, Body body) {
    switch (dtype) {
        case DType::kBFloat16: return body.template operator()<BFloat16>();
        case DType::kFloat16: return body.template operator()<Float16>();
        default: return body.template operator()<float>();
    }
}

}  // namespace qemb::cuda
