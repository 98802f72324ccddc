// Memory between two pages that nobody may touch: an access past either end is a fault at once.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <new>

namespace emulator {

class Pages {
  public:
    static constexpr size_t kPage = 4096;

    Pages(size_t bytes, const char* name) : name(name), inner_((bytes + kPage - 1) / kPage * kPage) {
        void* base = mmap(nullptr, inner_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) throw std::bad_alloc();
        begin_ = static_cast<char*>(base) + kPage;
        if (inner_ && mprotect(begin_, inner_, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
        all()[begin_] = this;
    }
    Pages(const Pages&) = delete;
    ~Pages() {
        all().erase(begin_);
        last_ = nullptr;
        munmap(begin_ - kPage, inner_ + 2 * kPage);
    }

    char* begin() const { return begin_; }
    char* end() const { return begin_ + inner_; }
    // The part in use; the rest holds 0xff, and untouched_around() says whether it still does.
    void use(const char* first, const char* last) { used_begin_ = first, used_end_ = last; }
    bool untouched_around() const {
        const auto fresh = [](const char* from, const char* to) {
            return std::all_of(from, to, [](char c) { return c == '\xff'; });
        };
        return !used_begin_ || (fresh(begin_, used_begin_) && fresh(used_end_, end()));
    }
    bool in_use(const void* p) const { return p >= used_begin_ && p < used_end_; }
    bool guards(const char* p) const { return p >= begin_ - kPage && p < end() + kPage; }

    // Never destroyed: the last Pages go at the end of the process.
    static std::map<const char*, Pages*>& all() {
        static auto* pages = new std::map<const char*, Pages*>;
        return *pages;
    }
    // Does p lie in a part in use? Asked for every access of a kernel, mostly for neighbours.
    static bool used(const void* p) {
        if (last_ && last_->in_use(p)) return true;
        const auto after = all().upper_bound(static_cast<const char*>(p));
        if (after == all().begin() || !std::prev(after)->second->in_use(p)) return false;
        last_ = std::prev(after)->second;
        return true;
    }

    const char* const name;

  private:
    static inline const Pages* last_ = nullptr;
    size_t inner_;
    char* begin_;
    const char *used_begin_ = nullptr, *used_end_ = nullptr;
};

}  // namespace emulator
