#include "cpu/memory.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace qemb::cpu {
namespace {

constexpr size_t kPage = size_t(2) << 20;     // a huge page: a block has few page faults even when it is new
constexpr size_t kGrain = size_t(256) << 10;  // sizes are multiples of it

struct Block {
    void* data;
    size_t size;
};

class Blocks {
  public:
    void* take(size_t bytes) {
        const size_t size = std::max((bytes + kGrain - 1) / kGrain, size_t(1)) * kGrain;
        std::lock_guard lock(mutex);
        // The smallest that fits and wastes at most a quarter.
        auto best = kept_.end();
        for (auto at = kept_.begin(); at != kept_.end(); ++at)
            if (at->size >= size && at->size <= size + size / 4 && (best == kept_.end() || at->size < best->size))
                best = at;
        Block block;
        if (best != kept_.end()) {
            block = *best;
            kept_.erase(best);
            kept_size_ -= block.size;
        } else {
            keep_at_most(std::max(most_used_, used_ + size) - used_ - size);
            block = {map(size), size};
            if (!block.data) {
                keep_at_most(0);
                block.data = map(size);
            }
            if (!block.data) throw std::bad_alloc();
        }
        sizes_.emplace(block.data, block.size);
        used_ += block.size;
        most_used_ = std::max(most_used_, used_);
        return block.data;
    }

    void give_back(void* data) {
        std::lock_guard lock(mutex);
        const auto found = sizes_.find(data);
        const Block block{data, found->second};
        sizes_.erase(found);
        used_ -= block.size;
        kept_.push_back(block);
        kept_size_ += block.size;
        keep_at_most(limit_);
    }

    void keep_at_most(size_t bytes) {  // the oldest go first
        size_t gone = 0;
        for (; kept_size_ > bytes; ++gone) {
            munmap(kept_[gone].data, kept_[gone].size);
            kept_size_ -= kept_[gone].size;
        }
        kept_.erase(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(gone));
    }
    size_t kept() const { return kept_size_; }
    void forget() {
        keep_at_most(0);
        most_used_ = used_;
    }

    std::mutex mutex;

  private:
    static void* map(size_t size) {
        // Mapped with a page to spare, so that the block can start at a huge page; the rest goes back at once.
        void* wide = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (wide == MAP_FAILED) return nullptr;
        char* const begin = static_cast<char*>(wide);
        const size_t skip = (kPage - reinterpret_cast<uintptr_t>(wide) % kPage) % kPage;
        if (skip) munmap(begin, skip);
        munmap(begin + skip + size, kPage - skip);
#if defined(MADV_HUGEPAGE)
        madvise(begin + skip, size, MADV_HUGEPAGE);
#endif
        return begin + skip;
    }

    std::vector<Block> kept_;  // oldest first
    std::unordered_map<void*, size_t> sizes_;
    size_t kept_size_ = 0, used_ = 0, most_used_ = 0;
    const size_t limit_ = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) / 4 * static_cast<size_t>(sysconf(_SC_PAGESIZE));
};

Blocks& blocks() {
    static auto* all = new Blocks;  // never destroyed: tensors may outlive static destructors
    return *all;
}

// A fork must not copy a mutex that another thread holds.
[[maybe_unused]] const int g_at_fork =
    pthread_atfork([] { blocks().mutex.lock(); }, [] { blocks().mutex.unlock(); }, [] { blocks().mutex.unlock(); });

}  // namespace

void* take_block(size_t bytes) { return blocks().take(bytes); }
void give_back_block(void* block) { blocks().give_back(block); }

size_t kept_bytes() {
    std::lock_guard lock(blocks().mutex);
    return blocks().kept();
}
void release_kept() {
    std::lock_guard lock(blocks().mutex);
    blocks().forget();
}

}  // namespace qemb::cpu
