// Two threads touch the same bytes, one of them writes, and nothing orders them: found whether or not this schedule shows it.
// The arch layer reports its accesses; compiled with -fsanitize=thread, and linked without it, every access of a kernel arrives
// here through the hooks below, in shared and in global memory. Ordered is what sync_block, sync_warp and the wait of a copy
// order; nothing orders two blocks of a launch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulator {

class Races {
  public:
    // Who is running, and since which barriers.
    struct Now {
        uint32_t launch = 0, block = 0;  // serial numbers
        uint32_t block_epoch = 0, warp_epoch = 0;
        uint8_t warp = 0, lane = 0;
    };

    static inline bool on = false;         // is anything tracked at all?
    static inline bool in_kernel = false;  // and not within the emulator
    Now now;
    const void *shared_begin = nullptr, *shared_end = nullptr;
    std::string found;  // the first race

    void access(const void* p, size_t bytes, bool write) {
        settle();
        const bool shared = p >= shared_begin && p < shared_end;  // which every block has for itself
        const uintptr_t first = reinterpret_cast<uintptr_t>(p) / kGrain,
                        last = (reinterpret_cast<uintptr_t>(p) + bytes - 1) / kGrain;
        for (uintptr_t at = first; at <= last; ++at) {
            Cell& cell = at_grain(at);
            if (cell.copied_by == now.block && now.block) report("an access and a copy that nobody has waited for", at);
            if (clashes(cell.written, shared)) {
                if (write)
                    suspects_.push_back({at, value_at(at)});
                else
                    report("a read after a write", at);
            }
            if (write && clashes(cell.read, shared)) report("a write after a read", at);
            if (write)
                cell.written = {now, true};
            else
                join(cell.read, shared);
        }
    }
    // Two writes of the same value harm nobody; what the second one wrote is known when the next thing happens.
    void settle() {
        for (const auto& [at, value] : suspects_)
            if (value_at(at) != value) report("two writes", at);
        suspects_.clear();
    }
    // From its issue to its wait, a copy may write at any moment.
    void copy_begins(const void* to) {
        access(to, 16, true);
        for_copy(to, now.block);
    }
    void copy_ends(const void* to) {
        for_copy(to, 0);
        access(to, 16, true);
    }

  private:
    static constexpr uintptr_t kGrain = 2, kCells = 2048;  // bytes; cells of a page of the shadow
    static constexpr uint8_t kSeveral = 255;
    struct Suspect {
        uintptr_t at;
        uint16_t value;
    };
    static uint16_t value_at(uintptr_t at) { return *reinterpret_cast<const volatile uint16_t*>(at * kGrain); }
    struct Access {
        Now by;
        bool happened = false;
    };
    struct Cell {
        Access written, read;
        uint32_t copied_by = 0;  // block
    };

    bool clashes(const Access& before, bool shared) const {
        if (!before.happened || before.by.launch != now.launch) return false;
        if (before.by.block != now.block) return !shared;
        if (before.by.block_epoch != now.block_epoch) return false;
        if (before.by.warp != now.warp) return true;
        return before.by.lane != now.lane && before.by.warp_epoch == now.warp_epoch;
    }
    // Earlier reads that this one makes superfluous are forgotten, the others joined with it.
    void join(Access& read, bool shared) {
        Access joined{now, true};
        if (read.happened && read.by.launch == now.launch && read.by.block != now.block) {
            if (!shared) joined.by.block = 0;  // no block has this number: clashes with everyone's write
        } else if (read.happened && read.by.launch == now.launch && read.by.block_epoch == now.block_epoch) {
            if (read.by.warp != now.warp)
                joined.by.warp = kSeveral;
            else if (read.by.warp_epoch == now.warp_epoch && read.by.lane != now.lane)
                joined.by.lane = kSeveral;
        }
        read = joined;
    }
    void for_copy(const void* to, uint32_t block) {
        for (uintptr_t i = 0; i < 16 / kGrain; ++i) at_grain(reinterpret_cast<uintptr_t>(to) / kGrain + i).copied_by = block;
    }
    Cell& at_grain(uintptr_t at) {
        if (at / kCells != last_page_) {
            last_page_ = at / kCells;
            auto& page = shadow_[last_page_];
            if (!page) page = std::make_unique<Cell[]>(kCells);
            last_cells_ = page.get();
        }
        return last_cells_[at % kCells];
    }
    void report(const char* what, uintptr_t at);  // block.h

    std::vector<Suspect> suspects_;
    std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> shadow_;
    uintptr_t last_page_ = ~uintptr_t(0);
    Cell* last_cells_ = nullptr;
};

inline Races& races() {
    static auto* races = new Races;
    return *races;
}

// While the emulator itself works, its own accesses are nobody's.
struct Inside {
    Inside() : before(Races::in_kernel) { Races::in_kernel = false; }
    ~Inside() { Races::in_kernel = before; }
    bool before;
};

}  // namespace emulator
