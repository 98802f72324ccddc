// Global memory whose ends are guarded by pages that nobody may touch: an access past it is a fault at once, reported as such.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace emulator {

// From here on a fault ends the process with one sentence and status 3.
inline void report_faults() {
    static char stack[64 * 1024];
    const stack_t alternate{stack, 0, sizeof stack};
    sigaltstack(&alternate, nullptr);
    struct sigaction action {};
    action.sa_flags = SA_ONSTACK;
    action.sa_handler = [](int) {
        constexpr char kText[] = "a kernel touched memory that is not its own\n";
        (void)!write(2, kText, sizeof kText - 1);
        _exit(3);
    };
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}

// `count` elements that end where a guarded page starts (up to 16-byte alignment), NaN at first.
template <class T>
class DeviceMemory {
  public:
    explicit DeviceMemory(size_t count) : size_(count) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t bytes = (count * sizeof(T) + 15) / 16 * 16;
        const size_t inner = (bytes + page - 1) / page * page;
        length_ = inner + 2 * page;
        void* base = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<char*>(base);
        mprotect(base_, page, PROT_NONE);
        mprotect(base_ + page + inner, page, PROT_NONE);
        std::memset(base_ + page, 0xff, inner);
        data_ = reinterpret_cast<T*>(base_ + page + inner - bytes);
    }
    explicit DeviceMemory(const std::vector<T>& values) : DeviceMemory(values.size()) {
        if (!values.empty()) std::memcpy(data_, values.data(), values.size() * sizeof(T));
    }
    DeviceMemory(DeviceMemory&& other) noexcept
        : base_(std::exchange(other.base_, nullptr)), data_(other.data_), size_(other.size_), length_(other.length_) {}
    DeviceMemory& operator=(DeviceMemory&&) = delete;
    ~DeviceMemory() {
        if (base_) munmap(base_, length_);
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return size_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

  private:
    char* base_ = nullptr;
    T* data_ = nullptr;
    size_t size_ = 0, length_ = 0;
};

}  // namespace emulator
