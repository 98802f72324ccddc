// Two threads touch the same bytes, one of them writes, and nothing orders them: found whether or not this schedule
// shows it. The arch layer reports its accesses; compiled with -fsanitize=thread, and linked without it, every access
// of a kernel arrives here through the hooks below, in shared and in global memory. Lanes of a warp are ordered by
// barriers, warps by what one of them releases and the other acquires (barriers of the block or of some threads,
// mbarriers, copies that complete on them), blocks of a launch by the flags that one of them publishes and the other
// waits for.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulator {

// Of each warp of the block, how many of its releases are known.
using Clock = std::array<uint32_t, 32>;
inline void join(Clock& into, const Clock& other) {
    for (size_t w = 0; w < into.size(); ++w) into[w] = std::max(into[w], other[w]);
}

inline void join(std::unordered_map<uint32_t, uint32_t>& into, const std::unordered_map<uint32_t, uint32_t>& other) {
    for (const auto& [who, how_far] : other) into[who] = std::max(into[who], how_far);
}

class Races {
  public:
    // Who is running, and since which barriers.
    struct Now {
        uint32_t launch = 0, block = 0;  // serial numbers
        uint32_t clock = 0, warp_epoch = 0, published = 0;
        uint8_t warp = 0, lane = 0;
    };
    // Of other blocks, how many of the publications are known. What a block publishes is all that it has done so far,
    // whoever did it.
    using Others = std::unordered_map<uint32_t, uint32_t>;
    // What a block knows. Blocks take turns, each with its own.
    struct View {
        Now now;
        std::array<Clock, 32> clocks{};
        Others others;
        const void *shared_begin = nullptr, *shared_end = nullptr;
    };

    static inline bool on = false;         // is anything tracked at all?
    static inline bool in_kernel = false;  // and not within the emulator
    std::string found;                     // the first race

    void start_launch() {
        ++launch_;
        flags_.clear();
        found.clear();
    }
    View start_block(const void* shared_begin, const void* shared_end) {
        View view{{launch_, ++blocks_}, {}, {}, shared_begin, shared_end};
        for (size_t w = 0; w < view.clocks.size(); ++w) view.clocks[w][w] = 1;
        return view;
    }
    void take_turn(View* view) { view_ = view; }
    Now& now() { return view_->now; }
    // What a warp knows, for whoever acquires it; what the warp does from here on is not part of it.
    Clock release(int warp) {
        Clock& clock = view_->clocks[static_cast<size_t>(warp)];
        const Clock released = clock;
        ++clock[static_cast<size_t>(warp)];
        return released;
    }
    void acquire(int warp, const Clock& released) { join(view_->clocks[static_cast<size_t>(warp)], released); }
    void publish(const void* flag) {
        Published& published = flags_[flag];
        join(published.others, view_->others);
        join(published.warps[now().block], release(now().warp));
        published.others[now().block] = ++now().published;
    }
    void acquire_flag(const void* flag) {
        Published& published = flags_[flag];
        join(view_->others, published.others);
        acquire(now().warp, published.warps[now().block]);
    }

    // By a unit of the hardware that works for a warp.
    void access_for(int warp, const void* p, size_t bytes, bool write, uint32_t warp_epoch) {
        const Now before = now();
        now().warp = static_cast<uint8_t>(warp), now().lane = kUnit, now().warp_epoch = warp_epoch;
        access(p, bytes, write);
        now() = before;
    }
    // `later`: what is written arrives at another time.
    void access(const void* p, size_t bytes, bool write, bool later = false) {
        settle();
        Now& now = view_->now;
        now.clock = view_->clocks[now.warp][now.warp];
        const bool shared = p >= view_->shared_begin && p < view_->shared_end;  // which every block has for itself
        const uintptr_t first = reinterpret_cast<uintptr_t>(p) / kGrain,
                        last = (reinterpret_cast<uintptr_t>(p) + bytes - 1) / kGrain;
        for (uintptr_t at = first; at <= last; ++at) {
            Cell& cell = at_grain(at);
            if (cell.copied_by == now.block && now.block) report("an access and a copy that nobody has waited for", at);
            if (clashes(cell.written, shared)) {
                if (!write)
                    report("a read after a write", at);
                else if (later)
                    report("two writes", at);
                else
                    suspects_.push_back({at, value_at(at)});
            }
            if (write && (clashes(cell.read, shared) || unseen_reader(cell))) report("a write after a read", at);
            if (write)
                cell.written = {now, true}, cell.readers.reset();
            else
                note_read(cell, shared);
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
        for_copy(to, now().block);
    }
    void copy_ends(const void* to) {
        for_copy(to, 0);
        access(to, 16, true);
    }

  private:
    static constexpr uintptr_t kGrain = 2, kCells = 2048;  // bytes; cells of a page of the shadow
    static constexpr uint8_t kSeveral = 255, kUnit = 254;  // lanes; a unit that works for the whole warp
    struct Suspect {
        uintptr_t at;
        uint16_t value;
    };
    // By a flag, to other blocks and to warps of the same.
    struct Published {
        Others others;
        std::unordered_map<uint32_t, Clock> warps;
    };
    static uint16_t value_at(uintptr_t at) { return *reinterpret_cast<const volatile uint16_t*>(at * kGrain); }
    struct Access {
        Now by;
        bool happened = false;
    };
    struct Cell {
        Access written, read;
        std::unique_ptr<Clock> readers;  // of several warps, when each last read
        uint32_t copied_by = 0;          // block
    };

    bool clashes(const Access& before, bool shared) const {
        const Now& now = view_->now;
        if (!before.happened || before.by.launch != now.launch) return false;
        if (before.by.block != now.block) return !shared && !knows_block(before.by);
        if (before.by.warp == now.warp)
            return before.by.lane != now.lane && before.by.lane != kUnit && now.lane != kUnit &&
                   before.by.warp_epoch == now.warp_epoch;
        return !knows(before.by);
    }
    bool knows(const Now& other) const { return view_->clocks[view_->now.warp][other.warp] >= other.clock; }
    bool knows_block(const Now& other) const {
        const auto known = view_->others.find(other.block);
        return known != view_->others.end() && known->second > other.published;
    }
    bool unseen_reader(const Cell& cell) const {
        const Now& now = view_->now;
        if (!cell.readers || cell.read.by.launch != now.launch || cell.read.by.block != now.block) return false;
        for (size_t w = 0; w < cell.readers->size(); ++w)
            if (w != now.warp && (*cell.readers)[w] > view_->clocks[now.warp][w]) return true;
        return false;
    }
    // Earlier reads that this one makes superfluous are forgotten, the others kept with it.
    void note_read(Cell& cell, bool shared) {
        const Now& now = view_->now;
        Access joined{now, true};
        const Access& read = cell.read;
        const bool here = read.happened && read.by.launch == now.launch && read.by.block == now.block;
        if (read.happened && read.by.launch == now.launch && read.by.block != now.block) {
            // Unless that read is known here, no block has this number: clashes with everyone's write.
            if (!shared && !knows_block(read.by)) joined.by.block = 0;
        } else if (here && read.by.warp == now.warp) {
            if (read.by.warp_epoch == now.warp_epoch && read.by.lane != now.lane) joined.by.lane = kSeveral;
        } else if (here && !knows(read.by)) {
            if (!cell.readers) cell.readers = std::make_unique<Clock>(Clock{});
            (*cell.readers)[read.by.warp] = read.by.clock;
        }
        if (cell.readers && !here) cell.readers.reset();
        if (cell.readers) (*cell.readers)[now.warp] = now.clock;
        cell.read = joined;
    }
    void for_copy(const void* to, uint32_t block) {
        for (uintptr_t i = 0; i < 16 / kGrain; ++i)
            at_grain(reinterpret_cast<uintptr_t>(to) / kGrain + i).copied_by = block;
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

    View nobody_, *view_ = &nobody_;
    uint32_t launch_ = 0, blocks_ = 0;
    std::unordered_map<const void*, Published> flags_;
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
