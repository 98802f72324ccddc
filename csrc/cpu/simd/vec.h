// One small vector type per arithmetic type, as wide as the instruction set that this file is being compiled for.
//
// Everything under cpu/kernels is compiled once per instruction set, each time inside its own namespace QEMB_ISA.
// Hazard: a template or inline function of the standard library used here would be emitted with wide instructions under
// a shared name, and the linker may pick that copy for old processors. So these files use builtins and their own
// helpers only; tests/test_build.py checks the symbols.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/inline.h"
#include "common/types.h"

#ifndef QEMB_ISA
#define QEMB_ISA generic
#endif

#if defined(__AVX512F__)
#define QEMB_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define QEMB_VECTOR_BYTES 32
#else
#define QEMB_VECTOR_BYTES 16
#endif

namespace qemb::cpu::QEMB_ISA {

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
    typedef float type __attribute__((vector_size(QEMB_VECTOR_BYTES)));
    typedef float unaligned __attribute__((vector_size(QEMB_VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t bits __attribute__((vector_size(QEMB_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
    typedef double type __attribute__((vector_size(QEMB_VECTOR_BYTES)));
    typedef double unaligned __attribute__((vector_size(QEMB_VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t bits __attribute__((vector_size(QEMB_VECTOR_BYTES)));
};

template <>
struct VecOf<int32_t> {
    typedef int32_t type __attribute__((vector_size(QEMB_VECTOR_BYTES)));
    typedef int32_t unaligned __attribute__((vector_size(QEMB_VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t bits __attribute__((vector_size(QEMB_VECTOR_BYTES)));
};

template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
inline constexpr int kLanes = QEMB_VECTOR_BYTES / sizeof(T);

template <class T>
QEMB_INLINE Vec<T> load(const T* from) {
    return *reinterpret_cast<const typename VecOf<T>::unaligned*>(from);
}
template <class T>
QEMB_INLINE void store(T* to, Vec<T> value) {
    *reinterpret_cast<typename VecOf<T>::unaligned*>(to) = value;
}
// Past the caches, for results that no core reads soon and that would only push others out. `to` is aligned to a
// vector; the thread calls finish_streams() before others may read.
template <class T>
QEMB_INLINE void stream(T* to, Vec<T> value) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(value));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(value));
#elif defined(__x86_64__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(value));
#else
    store(to, value);
#endif
}
QEMB_INLINE void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
template <class T>
QEMB_INLINE Vec<T> splat(T value) {
    return value - Vec<T>{};
}
// Whether a comparison holds anywhere.
template <class T>
QEMB_INLINE bool any(typename VecOf<T>::bits mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#elif defined(__x86_64__)
    return _mm_movemask_epi8(reinterpret_cast<__m128i>(mask)) != 0;
#else
    for (int i = 0; i < kLanes<T>; ++i)
        if (mask[i]) return true;
    return false;
#endif
}
// sum + a * b. An int32_t stands for two int16_t, whose products are added up.
template <class T>
QEMB_INLINE Vec<T> multiply_add(Vec<T> sum, T a, Vec<T> b) {
    if constexpr (sizeof(T) != sizeof(int32_t) || T(0.5) != T(0)) return sum + a * b;
#if defined(__AVX512BW__)
    else
        return sum + reinterpret_cast<Vec<T>>(_mm512_madd_epi16(_mm512_set1_epi32(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
    else
        return sum + reinterpret_cast<Vec<T>>(_mm256_madd_epi16(_mm256_set1_epi32(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
    else
        return sum + reinterpret_cast<Vec<T>>(_mm_madd_epi16(_mm_set1_epi32(a), reinterpret_cast<__m128i>(b)));
#else
    else {
        for (int i = 0; i < kLanes<T>; ++i) sum[i] += int32_t(int16_t(a)) * int16_t(b[i]) + (a >> 16) * (b[i] >> 16);
        return sum;
    }
#endif
}
template <class T>
QEMB_INLINE T sum_lanes(Vec<T> value) {
    T total = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) total += value[lane];
    return total;
}
template <class T>
QEMB_INLINE T max_lanes(Vec<T> value) {
    T best = value[0];
    for (int lane = 1; lane < kLanes<T>; ++lane) best = value[lane] > best ? value[lane] : best;
    return best;
}

template <class A>
QEMB_INLINE A min_of(A a, A b) {
    return a < b ? a : b;
}
template <class A>
QEMB_INLINE A max_of(A a, A b) {
    return a < b ? b : a;
}
QEMB_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
QEMB_INLINE int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

template <class T>
inline constexpr T kInfinity = static_cast<T>(__builtin_inf());

// e^x by range reduction to |r| <= ln(2)/2 and a polynomial; 0 below the smallest normal number. Relative error about
// one unit in the last place for float, 4e-16 for double.
template <class T>
QEMB_INLINE Vec<T> exp(Vec<T> x) {
    using Bits = typename VecOf<T>::bits;
    constexpr bool kFloat = sizeof(T) == 4;
    constexpr T kLow = kFloat ? T(-87.33654) : T(-708.39641853226408);
    constexpr T kHigh = kFloat ? T(88.72283) : T(709.78271289338397);
    constexpr T kMagic =
        kFloat ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^(mantissa bits): rounds to an integer
    constexpr T kLn2High = kFloat ? T(0.693359375) : T(0.69314718036912381649);
    constexpr T kLn2Low = kFloat ? T(-2.12194440e-4) : T(1.9082149292705877e-10);
    const Vec<T> clamped = x > kHigh ? splat<T>(kHigh) : (x < kLow ? splat<T>(kLow) : x);
    const Vec<T> shifted = clamped * T(1.44269504088896340736) + kMagic;
    const Vec<T> n = shifted - kMagic;
    const Vec<T> r = (clamped - n * kLn2High) - n * kLn2Low;
    Vec<T> poly;
    if constexpr (kFloat) {
        poly = splat<T>(1.0f / 5040);
        poly = poly * r + T(1.0f / 720);
    } else {
        poly = splat<T>(1.0 / 6227020800.0);
        poly = poly * r + T(1.0 / 479001600.0);
        poly = poly * r + T(1.0 / 39916800.0);
        poly = poly * r + T(1.0 / 3628800.0);
        poly = poly * r + T(1.0 / 362880.0);
        poly = poly * r + T(1.0 / 40320.0);
        poly = poly * r + T(1.0 / 5040.0);
        poly = poly * r + T(1.0 / 720.0);
    }
    poly = poly * r + T(1.0 / 120);
    poly = poly * r + T(1.0 / 24);
    poly = poly * r + T(1.0 / 6);
    poly = poly * r + T(0.5);
    poly = poly * r + T(1);
    poly = poly * r + T(1);
    constexpr int kMantissa = kFloat ? 23 : 52;
    constexpr auto kBias = kFloat ? 127 : 1023;
    const Bits integer = reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(splat<T>(kMagic));
    // 2^n in two factors, so that n = 128 (x just under the overflow limit) is exact.
    const Bits half = integer >> 1;
    const Vec<T> scale_a = reinterpret_cast<Vec<T>>((half + kBias) << kMantissa);
    const Vec<T> scale_b = reinterpret_cast<Vec<T>>((integer - half + kBias) << kMantissa);
    const Vec<T> result = poly * scale_a * scale_b;
    const Vec<T> kept = x < kLow ? Vec<T>{} : (x > kHigh ? splat<T>(kInfinity<T>) : result);
    return x != x ? x : kept;
}

// 2^x for x < 128 (float) or 1024 (double), in half the instructions of exp(): what a softmax needs, whose exponents do
// not exceed the row's maximum. 0 where the result would be no normal number; NaN stays NaN. Relative error 2e-7, 4e-16
// for double.
template <class T>
QEMB_INLINE Vec<T> exp2(Vec<T> x) {
    using Bits = typename VecOf<T>::bits;
    constexpr bool kFloat = sizeof(T) == 4;
    constexpr int kMantissa = kFloat ? 23 : 52;
    constexpr T kLow = kFloat ? T(-127) : T(-1023);
    // 1.5 * 2^mantissa rounds to an integer and leaves it, plus the exponent's bias, in the low bits.
    constexpr T kMagic = kFloat ? T(12582912.0 + 127) : T(6755399441055744.0 + 1023);
    const Vec<T> clamped = x < kLow ? splat<T>(kLow) : x;
    const Vec<T> shifted = clamped + kMagic;
    const Vec<T> r = clamped - (shifted - kMagic);
    Vec<T> poly;
    if constexpr (kFloat) {
        poly = splat<T>(T(1.535336188319500e-4));
        poly = poly * r + T(1.339887440266574e-3);
        poly = poly * r + T(9.618437357674640e-3);
        poly = poly * r + T(5.550332471162809e-2);
        poly = poly * r + T(2.402264791363012e-1);
        poly = poly * r + T(6.931472028550421e-1);
    } else {
        constexpr double kLn2 = 0.69314718055994530942;
        poly = splat<T>(0);
        double factor = 1;
        double terms[13];
#pragma GCC unroll 13
        for (int i = 1; i <= 12; ++i) terms[i] = factor *= kLn2 / i;
#pragma GCC unroll 13
        for (int i = 12; i > 0; --i) poly = poly * r + T(terms[i]);
    }
    poly = poly * r + T(1);
    return poly * reinterpret_cast<Vec<T>>(reinterpret_cast<Bits>(shifted) << kMantissa);
}
template <class T>
inline constexpr T kLog2E = static_cast<T>(1.44269504088896340736);

// log2(x) of a positive normal number; of zero some finite number. Relative error 1e-7, 1e-15 for double.
template <class T>
QEMB_INLINE Vec<T> log2(Vec<T> x) {
    using Bits = typename VecOf<T>::bits;
    constexpr bool kFloat = sizeof(T) == 4;
    constexpr int kMantissa = kFloat ? 23 : 52, kTerms = kFloat ? 5 : 11;
    constexpr auto kBias = kFloat ? 127 : 1023;
    const Bits bits = reinterpret_cast<Bits>(x), one = reinterpret_cast<Bits>(splat<T>(1));
    const Bits mantissa = reinterpret_cast<Bits>(splat<T>(kFloat ? T(1.9999999) : T(1.9999999999999998))) & ~one;
    Vec<T> fraction = reinterpret_cast<Vec<T>>((bits & mantissa) | one);  // from 1 to below 2
    Vec<T> exponent = __builtin_convertvector((bits >> kMantissa) - kBias, Vec<T>);
    const auto large = fraction > T(1.41421356237309504880);
    fraction = large ? fraction * T(0.5) : fraction;
    exponent = large ? exponent + T(1) : exponent;
    const Vec<T> t = (fraction - T(1)) / (fraction + T(1)), square = t * t;  // log2(f) = 2 atanh(t) / ln(2)
    Vec<T> series = splat<T>(T(1) / (2 * kTerms - 1));
#pragma GCC unroll 11
    for (int i = kTerms - 1; i > 0; --i) series = series * square + T(1) / static_cast<T>(2 * i - 1);
    return exponent + t * series * T(2.88539008177792681472);
}

QEMB_INLINE float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, 4);
    return value;
}
QEMB_INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // nearest, ties to even
    return value != value ? uint16_t(0x7fc0) : static_cast<uint16_t>(rounded);
}
QEMB_INLINE float from_f16(uint16_t half) {
#if defined(__F16C__) || defined(__AVX512F__)
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
#else
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t body = static_cast<uint32_t>(half & 0x7fffu) << 13;
    const uint32_t wide = body + ((half & 0x7c00u) == 0x7c00u ? 0x70000000u : 0x38000000u);
    float value;
    if (body < 0x00800000u) {  // zero or subnormal
        value = static_cast<float>(half & 0x3ffu) * 5.9604644775390625e-8f;
        uint32_t bits;
        __builtin_memcpy(&bits, &value, 4);
        bits |= sign;
        __builtin_memcpy(&value, &bits, 4);
        return value;
    }
    const uint32_t bits = wide | sign;
    __builtin_memcpy(&value, &bits, 4);
    return value;
#endif
}
QEMB_INLINE uint16_t to_f16(float value) {
#if defined(__F16C__) || defined(__AVX512F__)
    return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)));
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (bits < 0x38800000u) {  // subnormal half: let float addition round
        float magnitude;
        __builtin_memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        __builtin_memcpy(&bits, &magnitude, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
#endif
}

// count elements at `offset` (in elements) of storage `from`, widened to the arithmetic type.
template <class T>
inline void load_row(DType dtype, const void* from, int64_t offset, T* to, int64_t count) {
    switch (dtype) {
        case DType::kFloat32: {
            const float* source = static_cast<const float*>(from) + offset;
            for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(source[i]);
            return;
        }
        case DType::kFloat64: {
            const double* source = static_cast<const double*>(from) + offset;
            for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(source[i]);
            return;
        }
        case DType::kBFloat16: {
            const uint16_t* source = static_cast<const uint16_t*>(from) + offset;
            for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from_bf16(source[i]));
            return;
        }
        case DType::kFloat16: {
            const uint16_t* source = static_cast<const uint16_t*>(from) + offset;
            int64_t i = 0;
#if defined(__AVX512F__) || defined(__F16C__)
            if constexpr (sizeof(T) == 4) {
                for (; i + 8 <= count; i += 8)
                    _mm256_storeu_ps(to + i,
                                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
            }
#endif
            for (; i < count; ++i) to[i] = static_cast<T>(from_f16(source[i]));
            return;
        }
    }
}

// Where the storage is already the arithmetic type, rows are read and written in place.
template <class T>
QEMB_INLINE bool in_place(DType dtype) {
    return dtype == (sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64);
}
template <class T>
QEMB_INLINE const T* read(DType dtype, const void* from, int64_t offset, int64_t count, T* buffer) {
    if (in_place<T>(dtype)) return static_cast<const T*>(from) + offset;
    load_row(dtype, from, offset, buffer, count);
    return buffer;
}

template <class T>
inline void store_row(DType dtype, const T* from, void* to, int64_t offset, int64_t count) {
    switch (dtype) {
        case DType::kFloat32: {
            float* target = static_cast<float*>(to) + offset;
            for (int64_t i = 0; i < count; ++i) target[i] = static_cast<float>(from[i]);
            return;
        }
        case DType::kFloat64: {
            double* target = static_cast<double*>(to) + offset;
            for (int64_t i = 0; i < count; ++i) target[i] = static_cast<double>(from[i]);
            return;
        }
        case DType::kBFloat16: {
            uint16_t* target = static_cast<uint16_t*>(to) + offset;
            for (int64_t i = 0; i < count; ++i) target[i] = to_bf16(static_cast<float>(from[i]));
            return;
        }
        case DType::kFloat16: {
            uint16_t* target = static_cast<uint16_t*>(to) + offset;
            for (int64_t i = 0; i < count; ++i) target[i] = to_f16(static_cast<float>(from[i]));
            return;
        }
    }
}

template <class T>
QEMB_INLINE T dot(const T* a, const T* b, int64_t count) {
    Vec<T> total[4]{};  // an addition waits for the one before
    int64_t i = 0;
    for (; i + 4 * kLanes<T> <= count; i += 4 * kLanes<T>)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) total[j] += load(a + i + j * kLanes<T>) * load(b + i + j * kLanes<T>);
    for (; i + kLanes<T> <= count; i += kLanes<T>) total[0] += load(a + i) * load(b + i);
    T result = sum_lanes<T>((total[0] + total[1]) + (total[2] + total[3]));
    for (; i < count; ++i) result += a[i] * b[i];
    return result;
}

// The factor that brings a row with this sum of squares to where squares neither overflow nor vanish; 1 where it is
// there.
template <class T>
QEMB_INLINE T unit_for(T squares) {
    using Range = SquareRange<T>;
    if (squares > Range::kLow && squares < Range::kHigh) return 1;
    return squares <= Range::kLow ? Range::kGrow : Range::kShrink;
}

// 1 / sqrt(mean of squares + eps) of a row of any magnitude; 0 where that would be 1 / 0.
template <class T>
QEMB_INLINE T inverse_rms(const T* x, int64_t size, double eps) {
    const T squares = dot(x, x, size), unit = unit_for(squares);
    const double count = static_cast<double>(size);
    if (unit == 1) return static_cast<T>(1.0 / __builtin_sqrt(static_cast<double>(squares) / count + eps));
    T scaled = 0;
    for (int64_t i = 0; i < size; ++i) scaled += x[i] * unit * (x[i] * unit);
    const double rms = __builtin_sqrt(static_cast<double>(scaled) / count) / static_cast<double>(unit);
    const double whole = __builtin_hypot(rms, __builtin_sqrt(eps));
    return static_cast<T>(whole == 0 ? 0 : 1 / whole);
}

// y += scale * x
template <class T>
QEMB_INLINE void add_scaled(T* y, const T* x, T scale, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] += scale * x[i];
}

}  // namespace qemb::cpu::QEMB_ISA
