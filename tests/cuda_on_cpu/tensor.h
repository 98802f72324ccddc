// What the tests of the small kernels share: random arrays in guarded memory, and tolerances that come from arithmetic.
#pragma once

#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "common/types.h"
#include "cuda/device/arch.h"
#include "emulator/launch.h"
#include "emulator/memory.h"
#include "testing.h"

namespace qemb::testing {

using cuda::BFloat16;
using cuda::Float16;
using Wide = std::vector<double>;

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float>      ? DType::kFloat32
                           : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                         : DType::kFloat16;

template <class T>
double rounded(double x) {
    return cuda::to_float(cuda::from_float<T>(static_cast<float>(x)));
}

// Lies in guarded memory, `offset` elements past a 16-byte boundary.
template <class T>
class Tensor {
  public:
    explicit Tensor(int64_t count, int64_t offset = 0)
        : memory_(static_cast<size_t>(count + offset)), count_(count), offset_(offset) {}
    Tensor(const Wide& values, int64_t offset = 0) : Tensor(static_cast<int64_t>(values.size()), offset) {
        for (int64_t i = 0; i < count_; ++i) (*this)[i] = cuda::from_float<T>(static_cast<float>(values[i]));
    }

    T* data() { return memory_.data() + offset_; }
    T& operator[](int64_t i) { return data()[i]; }
    int64_t size() const { return count_; }
    Wide wide() {
        Wide values(static_cast<size_t>(count_));
        for (int64_t i = 0; i < count_; ++i) values[i] = cuda::to_float((*this)[i]);
        return values;
    }
    bool same_bits(Tensor& other, int64_t at, int64_t other_at, int64_t count) {
        return std::memcmp(data() + at, other.data() + other_at, static_cast<size_t>(count) * sizeof(T)) == 0;
    }
    bool same_bits(Tensor& other) { return same_bits(other, 0, 0, count_); }

  private:
    emulator::DeviceMemory<T> memory_;
    int64_t count_, offset_;
};

// Values that T can hold.
template <class T>
Wide random_wide(int64_t count, uint32_t seed, double scale = 1, double shift = 0) {
    Wide values = random_values<double>(static_cast<size_t>(count), seed);
    for (double& x : values) x = rounded<T>(x * scale + shift);
    return values;
}

// `low` is the formula in float, stored as T: the error that the precision itself makes. Twice that is allowed.
template <class T>
void check_rounded(const std::string& name, const Wide& actual, const Wide& low, const Wide& truth) {
    double error = 0, largest = 0;
    for (size_t i = 0; i < truth.size(); ++i) {
        error = std::max(error, std::abs(rounded<T>(low[i]) - truth[i]));
        largest = std::max(largest, std::abs(truth[i]));
    }
    check_close(name.c_str(), actual, truth, 2 * error + 2.4e-7 * largest);
}

// body<T>(name) for every dtype of the device.
template <class Body>
void for_each_dtype(Body body) {
    body.template operator()<float>(std::string("float32"));
    body.template operator()<BFloat16>(std::string("bfloat16"));
    body.template operator()<Float16>(std::string("float16"));
}

// Until the end of the scope: launches on a GPU of another compute capability.
class OnDevice {
  public:
    explicit OnDevice(int capability) { emulator::use_device(capability); }
    ~OnDevice() { emulator::use_device(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = emulator::options().compute_capability;
};

// All tests with the kernels of each architecture, or of the one that QEMB_SM names. -> the process's status
inline int run_all_on(std::initializer_list<int> capabilities) {
    const char* const only = std::getenv("QEMB_SM");
    int failed = 0;
    for (const int capability : capabilities) {
        if (only && std::atoi(only) != capability) continue;
        emulator::use_device(capability);
        std::printf("sm_%d\n", capability);
        failed |= run_all();
    }
    return failed;
}

}  // namespace qemb::testing
