// What the conformance programs share: memory of the device, inputs, and lines of results, "name kind words...", kind
// being
//   bits      compared exactly
//   float     floats, compared exactly, except that all NaN are equal
//   approx    floats; lines "name.truth doubles..." and "name.bound doubles..." say what is right and how far off each
//   may be
#pragma once

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/launch.h"

#ifndef __CUDACC__
#include "emulator/memory.h"
#endif

namespace qemb::cuda::conformance {

using Words = std::vector<uint32_t>;
constexpr int kThreads = 128;

#ifdef __CUDACC__
class Memory {
  public:
    explicit Memory(size_t count) { check("conformance", cudaMallocManaged(&data_, count * sizeof(uint32_t) + 16)); }
    ~Memory() { cudaFree(data_); }
    Memory(const Memory&) = delete;
    uint32_t* data() { return data_; }

  private:
    uint32_t* data_ = nullptr;
};
inline void finish() { check("conformance", cudaDeviceSynchronize()); }
#else
using Memory = emulator::DeviceMemory<uint32_t>;
inline void finish() {}
#endif

inline float as_float(uint32_t word) { return __builtin_bit_cast(float, word); }
inline uint32_t as_word(float x) { return __builtin_bit_cast(uint32_t, x); }

// Inputs. Not the distributions of the standard library: those differ from library to library.
struct Source {
    std::mt19937 engine{20240607};

    uint32_t bits() { return static_cast<uint32_t>(engine()); }
    float uniform(float low, float high) { return low + (high - low) * static_cast<float>(bits() >> 8) * 0x1p-24f; }
    template <class Make>
    Words words(int count, Make make) {
        Words all(static_cast<size_t>(count));
        for (uint32_t& x : all) x = make();
        return all;
    }
    Words plain(int count) {
        return words(count, [&] { return bits(); });
    }
    Words floats(int count, float low, float high) {
        return words(count, [&] { return as_word(uniform(low, high)); });
    }
};
// One of the two elements of a word; of float16 normal numbers alone.
template <class T>
double element_of(uint32_t word, int half) {
    const uint32_t bits = half ? word >> 16 : word & 0xffff;
    if (std::is_same_v<T, BFloat16>) return static_cast<double>(as_float(bits << 16));
    return std::ldexp(static_cast<double>((bits & 1023) | 1024), static_cast<int>(bits >> 10 & 31) - 25) *
           (bits >> 15 ? -1 : 1);
}

inline void print(const char* name, const char* kind, Memory& out, int count) {
    std::printf("%s %s", name, kind);
    for (int i = 0; i < count; ++i) std::printf(" %08" PRIx32, out.data()[i]);
    std::printf("\n");
}
inline void print(const char* name, const char* what, const std::vector<double>& values) {
    std::printf("%s.%s", name, what);
    for (const double x : values) std::printf(" %.17g", x);
    std::printf("\n");
}

template <class... Parameters, class... Extra>
void run(const char* name, const char* kind, int shared, void (*kernel)(const uint32_t*, uint32_t*, Parameters...),
         const Words& in, int count, const Extra&... extra) {
    Memory from(in.size()), to(static_cast<size_t>(count));
    std::copy(in.begin(), in.end(), from.data());
    std::fill(to.data(), to.data() + count, 0xffffffffu);
    launch(name, kernel, dim3(1), kThreads, static_cast<size_t>(shared), nullptr,
           static_cast<const uint32_t*>(from.data()), to.data(), extra...);
    finish();
    print(name, kind, to, count);
}

}  // namespace qemb::cuda::conformance
