// What the bindings ask of the CUDA runtime itself.
#pragma once

namespace qemb::cuda {

bool is_built();
int device_count();  // 0 where there is no device or no driver

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
