// Global memory of the emulated device, and faults that say who touched what.
#pragma once

#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "emulator/block.h"

namespace emulator {

// From here on a fault ends the process with one sentence and status 3.
inline void report_faults() {
    static char stack[64 * 1024];
    const stack_t alternate{stack, 0, sizeof stack};
    sigaltstack(&alternate, nullptr);
    struct sigaction action{};
    action.sa_flags = SA_ONSTACK | SA_SIGINFO;
    action.sa_sigaction = [](int, siginfo_t* info, void*) {
        const auto* p = static_cast<const char*>(info->si_addr);
        if (const Block* block = Block::current(); block && running)
            std::fprintf(stderr, "block (%u, %u, %u), thread %d: ", block->index.x, block->index.y, block->index.z,
                         running->id);
        for (const auto& [begin, pages] : Pages::all()) {
            if (!pages->guards(p)) continue;
            const bool before = p < pages->begin();
            std::fprintf(stderr, "touched byte %ld %s %s\n",
                         static_cast<long>(before ? pages->begin() - p : p - pages->end()),
                         before ? "before the pages of" : "past the end of", pages->name);
            _exit(3);
        }
        std::fprintf(stderr, "touched %p, which is nobody's\n", info->si_addr);
        _exit(3);
    };
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}

// `count` elements that end where a guarded page starts (up to 16-byte alignment), NaN at first. What lies between them
// and the guards is looked at after every launch.
template <class T>
class DeviceMemory {
  public:
    explicit DeviceMemory(size_t count)
        : pages_(std::make_unique<Pages>(std::max<size_t>(1, (count * sizeof(T) + 15) / 16 * 16), "global memory")),
          size_(count) {
        std::memset(pages_->begin(), 0xff, static_cast<size_t>(pages_->end() - pages_->begin()));
        char* begin = pages_->end() - (count * sizeof(T) + 15) / 16 * 16;
        pages_->use(begin, begin + count * sizeof(T));
        data_ = reinterpret_cast<T*>(begin);
    }
    explicit DeviceMemory(const std::vector<T>& values) : DeviceMemory(values.size()) {
        if (!values.empty()) std::memcpy(data_, values.data(), values.size() * sizeof(T));
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return size_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

  private:
    std::unique_ptr<Pages> pages_;
    T* data_;
    size_t size_;
};

}  // namespace emulator
