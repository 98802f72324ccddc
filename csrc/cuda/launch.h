// Kernel launches: checked, named, on the caller's stream. The one place that knows the CUDA runtime (or the emulator
// in its stead).
#pragma once

#include <cstddef>
#include <map>
#include <utility>

#include "common/check.h"
#include "cuda/device/arch.h"

#ifndef __CUDACC__
#include "emulator/launch.h"
#endif

namespace qemb::cuda {

inline void check(const char* op, cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // it would still be there after the next launch
    throw std::runtime_error(concat("[", op, "] CUDA: ", cudaGetErrorString(error)));
}

inline int current_device() {
    int device = 0;
    check("pyqemb", cudaGetDevice(&device));
    return device;
}

// From now on a block of `kernel` may have so much shared memory. The runtime is told once for each device: the call
// takes as long as a launch.
inline void allow_shared(const char* op, const void* kernel, size_t bytes) {
    if (bytes <= 48 * 1024) return;
    thread_local std::map<std::pair<int, const void*>, size_t> allowed;
    size_t& known = allowed[{current_device(), kernel}];
    if (bytes <= known) return;
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    known = bytes;
}

// kernel<<<grid, block, shared bytes, stream>>>(arguments...), checked. An empty grid is no launch.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            [[maybe_unused]] void* stream, const Arguments&... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    allow_shared(op, reinterpret_cast<const void*>(kernel), shared);
#ifdef __CUDACC__
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
    ::emulator::launch(op, kernel, grid, threads, shared, arguments...);
#endif
    check(op, cudaGetLastError());
}

#ifdef __CUDACC__
inline void zero(const char* op, void* to, size_t bytes, void* stream) {
    check(op, cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)));
}

inline int device_attribute(cudaDeviceAttr attribute) {
    int value = 0;
    check("pyqemb", cudaDeviceGetAttribute(&value, attribute, current_device()));
    return value;
}
inline int compute_capability() {
    return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
           device_attribute(cudaDevAttrComputeCapabilityMinor);
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int multiprocessor_shared() { return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }
inline int max_shared() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }  // bytes of a block
#endif

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace qemb::cuda
