#include "cuda/runtime.h"

#include <cuda_runtime_api.h>

#include "common/check.h"

namespace qemb::cuda {
namespace {

void check(const char* what, cudaError_t error) {
    if (error != cudaSuccess)
        throw std::runtime_error(concat("[pyqemb] CUDA could not ", what, ": ", cudaGetErrorString(error)));
}

}  // namespace

bool is_built() { return true; }

bool hopper_is_built() {
#ifdef QEMB_SM90
    return true;
#else
    return false;
#endif
}

int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

DeviceGuard::DeviceGuard(int device) : device_(device) {
    check("tell the current device", cudaGetDevice(&before_));
    if (before_ != device_) check("choose the device of the tensors", cudaSetDevice(device_));
}

DeviceGuard::~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
}

}  // namespace qemb::cuda
