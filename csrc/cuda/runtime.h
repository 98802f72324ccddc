// What the bindings ask of the CUDA runtime itself.
#pragma once

namespace qemb::cuda {

bool is_built();
bool hopper_is_built();
int device_count();  // 0 where there is no device or no driver

// Kernels for newer architectures than this are left alone. Tests and benchmarks lower it to 80, to compare.
inline int& newest_kernels() {
    static int newest = 90;
    return newest;
}

// The calling thread works on `device` until the end of the scope.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0, device_ = 0;
};

}  // namespace qemb::cuda
