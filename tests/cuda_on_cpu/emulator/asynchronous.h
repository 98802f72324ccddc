// What runs beside the threads: bulk copies that land at once, at any moment, or as late as somebody's wait allows;
// products of warpgroups; and which bytes the units that do it may not see yet.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "emulator/copies.h"
#include "emulator/races.h"

namespace emulator {

using Work = std::function<void()>;

// Copies into shared memory; a barrier in memory tells who waits for them, so that the scheduler alone decides when
// they land.
class Engine {
  public:
    bool empty() const { return flying_.empty(); }
    void clear() { flying_.clear(); }
    void submit(Work work, Landing landing) {
        if (landing == Landing::kEarly)
            work();
        else
            flying_.push_back(std::move(work));
    }
    // Nothing is ordered.
    void land_one(Random& random) {
        const auto i = flying_.begin() + static_cast<std::ptrdiff_t>(random.below(flying_.size()));
        const Work work = std::move(*i);
        flying_.erase(i);
        work();
    }

  private:
    std::vector<Work> flying_;
};

// Copies out of shared memory, of one thread, in groups: first they read, then they write, each as late as a wait
// allows.
class Stores {
  public:
    bool are_waited_for() const {
        return std::all_of(begin(flying_), end(flying_), [](auto& store) { return store.is_free; });
    }
    void clear() { flying_.clear(), open_group_ = 0; }
    void submit(Work read, Work write) { flying_.push_back({std::move(read), std::move(write), open_group_}); }
    void commit() { ++open_group_; }
    // Until their sources may be overwritten.
    void wait_read(uint64_t pending) {
        for (Store& store : flying_)
            if (store.group + pending < open_group_) store.do_read(), store.is_free = true;
    }
    void wait(uint64_t pending) {
        for (; !flying_.empty() && flying_.front().group + pending < open_group_; flying_.pop_front())
            flying_.front().land();
    }
    // The oldest that has not; false where all have.
    bool land_one() {
        for (Store& store : flying_)
            if (store.write) return store.land(), true;
        return false;
    }
    void land_all() {
        while (land_one()) {
        }
    }

  private:
    struct Store {
        Work read, write;
        uint64_t group;
        bool is_free = false;

        void do_read() {
            if (read) std::exchange(read, nullptr)();
        }
        void land() {
            do_read();
            if (write) std::exchange(write, nullptr)();
        }
    };
    std::deque<Store> flying_;
    uint64_t open_group_ = 0;
};

struct Accumulators;

// Products of one warpgroup: committed groups run in order, the newest as late as a wait allows. They run only when all
// four warps have come so far, so that who has waited for them knows what all had done.
struct Products {
    std::vector<Work> open;
    std::deque<std::vector<Work>> groups;
    std::vector<std::shared_ptr<Accumulators>> sums;  // in flight
    std::deque<Clock> commits;                        // not waited for
    bool fenced = false;

    bool empty() const { return open.empty() && groups.empty(); }
    void clear() { open.clear(), groups.clear(), sums.clear(), commits.clear(), fenced = false; }
    void commit() { groups.push_back(std::exchange(open, {})); }
    void run_oldest() {
        const std::vector<Work> group = std::move(groups.front());
        groups.pop_front();
        for (const Work& work : group) work();
    }
};

// Ordinary writes reach the copy engine and the tensor cores only through a fence of the thread that wrote. A cell is 4
// bytes of shared memory and holds its writer, and how many fences that writer had passed.
class Proxies {
  public:
    void start(size_t bytes, int threads) {
        cells_.assign(bytes / 4 + 1, {});
        fences_.assign(static_cast<size_t>(threads), 1);
    }
    void write(size_t offset, size_t bytes, int thread) {
        for (size_t i = offset / 4; i <= (offset + bytes - 1) / 4; ++i)
            cells_[i] = {static_cast<uint32_t>(thread), fences_[static_cast<size_t>(thread)]};
    }
    void fence(int thread) { ++fences_[static_cast<size_t>(thread)]; }
    // The thread whose write of one of these bytes is not to be seen yet, or -1.
    int unseen(size_t offset, size_t bytes) const {
        for (size_t i = offset / 4; i <= (offset + bytes - 1) / 4; ++i)
            if (cells_[i].fences && fences_[cells_[i].thread] == cells_[i].fences)
                return static_cast<int>(cells_[i].thread);
        return -1;
    }

  private:
    struct Cell {
        uint32_t thread = 0, fences = 0;
    };
    std::vector<Cell> cells_;
    std::vector<uint32_t> fences_;
};

}  // namespace emulator
