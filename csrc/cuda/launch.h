// Kernel launches: checked, named, on the caller's stream. The one place that knows the CUDA runtime (or the emulator
// in its stead).
#pragma once

#include <cstddef>

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

// kernel<<<grid, block, shared bytes, stream>>>(arguments...), checked. An empty grid is no launch.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            [[maybe_unused]] void* stream, const Arguments&... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (shared > 48 * 1024)
        check(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
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
    int device = 0, value = 0;
    check("pyqemb", cudaGetDevice(&device));
    check("pyqemb", cudaDeviceGetAttribute(&value, attribute, device));
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
