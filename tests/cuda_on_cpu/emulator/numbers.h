// Number formats of the device and their rounding, by the PTX manual.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/device/types.h"

namespace qemb::cuda {

inline uint32_t word_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t word) { return __builtin_bit_cast(float, word); }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = static_cast<uint32_t>(x.bits & 0x7fff)
                                                                               << 13;
    if (rest >= 0x0f800000) return float_of(sign | 0x7f800000 | rest);  // infinite or NaN
    return float_of(sign | word_of(float_of(rest) * 0x1p112f));  // the exponent's bias; subnormals come out exact
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
// To nearest, ties to even; every NaN becomes 0x7fff.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    if (x != x) return {0x7fff};
    const uint32_t word = word_of(x);
    return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
    const uint32_t sign = word_of(x) >> 16 & 0x8000, magnitude = word_of(x) & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000)
        return {0x7fff};
    else if (magnitude >= word_of(65520.0f))
        half = 0x7c00;
    else if (magnitude >= word_of(0x1p-14f))
        half = ((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10);
    else
        half = word_of(float_of(magnitude) + 0.5f) - word_of(0.5f);  // the addition rounds to multiples of 2^-24
    return {static_cast<uint16_t>(sign | half)};
}

template <class T>
uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
float unpack(uint32_t word, int half) {
    return to_float(T{static_cast<uint16_t>(half ? word >> 16 : word)});
}

template <class T>
uint32_t multiply_pair(uint32_t a,
                       uint32_t b) {  // products of two such numbers are exact in float, so they are rounded once
    return pack<T>(unpack<T>(a, 0) * unpack<T>(b, 0), unpack<T>(a, 1) * unpack<T>(b, 1));
}

// ftz: subnormal numbers, read or written, are zeros of their sign.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }
inline float reciprocal_approx(float x) { return flushed(1.0f / flushed(x)); }

inline uint32_t to_tf32(float x) {  // to nearest, ties away from zero; NaN is cut, as the H100 does it
    const uint32_t word = word_of(x);
    return ((word & 0x7f800000) == 0x7f800000 ? word : word + 0x1000) & ~0x1fffu;
}

}  // namespace qemb::cuda
