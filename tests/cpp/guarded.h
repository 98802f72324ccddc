// Operands that lie against a page nobody may touch: an access past that end is a fault at once, also in a build
// without sanitizers. Inputs are read-only.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "testing.h"

namespace qemb::testing {

// kLeft: operands start where a guard page ends; kRight: they end where one starts.
enum class Side { kLeft, kRight };

class GuardedOperands {
  public:
    explicit GuardedOperands(Side side) : side_(side) {}
    GuardedOperands(const GuardedOperands&) = delete;
    ~GuardedOperands() {
        for (const Operand& o : operands_) munmap(o.pages - kPage, o.size + 2 * kPage);
    }

    template <class T>
    const T* in(const std::vector<T>& values) {
        const Operand& o = map(values.size() * sizeof(T));
        if (!values.empty()) std::memcpy(o.begin, values.data(), o.bytes);
        if (mprotect(o.pages, o.size, PROT_READ)) throw std::bad_alloc();
        return reinterpret_cast<const T*>(o.begin);
    }
    // Room for `count` elements, all bits set.
    template <class T>
    T* out(int64_t count) {
        Operand& o = map(static_cast<size_t>(count) * sizeof(T));
        o.is_output = true;
        return reinterpret_cast<T*>(o.begin);
    }
    template <class T>
    T* inout(const std::vector<T>& values) {
        T* to = out<T>(static_cast<int64_t>(values.size()));
        std::copy(values.begin(), values.end(), to);
        return to;
    }

    // The bytes of all outputs. What lies between them and the guard page at their other end must be as it was.
    std::vector<unsigned char> results() const {
        std::vector<unsigned char> all;
        for (const Operand& o : operands_) {
            if (!o.is_output) continue;
            CHECK(std::all_of(o.pages, o.begin, is_untouched));
            CHECK(std::all_of(o.begin + o.bytes, o.pages + o.size, is_untouched));
            all.insert(all.end(), o.begin, o.begin + o.bytes);
        }
        return all;
    }

  private:
    static constexpr size_t kPage = 4096;

    struct Operand {
        unsigned char *pages, *begin;
        size_t size, bytes;
        bool is_output = false;
    };

    static bool is_untouched(unsigned char byte) { return byte == 0xff; }

    Operand& map(size_t bytes) {
        const size_t size = std::max<size_t>(1, (bytes + kPage - 1) / kPage) * kPage;
        void* base = mmap(nullptr, size + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) throw std::bad_alloc();
        auto* pages = static_cast<unsigned char*>(base) + kPage;
        operands_.push_back({pages, pages + (side_ == Side::kRight ? size - bytes : 0), size, bytes});
        if (mprotect(pages, size, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
        std::memset(pages, 0xff, size);
        return operands_.back();
    }

    const Side side_;
    std::vector<Operand> operands_;
};

// What a fault is reported as; then the process ends.
inline char g_running[256] = "nothing";

inline void report_faults() {
    struct sigaction action{};
    action.sa_handler = [](int) {
        for (const char* text : {"FAIL ", static_cast<const char*>(g_running), ": memory outside of its operands\n"})
            if (write(STDOUT_FILENO, text, std::strlen(text)) < 0) break;
        _exit(1);
    };
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}

}  // namespace qemb::testing
