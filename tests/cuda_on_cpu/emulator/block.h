// A thread block: fibers, a hostile scheduler, rendezvous for everything that threads do together, and copies that land late.
#pragma once

#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/fiber.h"

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

// What a kernel did that hardware would not forgive.
[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

struct Counters {
    uint64_t bank_conflicts = 0;  // extra passes of ldmatrix over the banks
    uint64_t ldmatrix = 0;        // its passes without conflicts
};

// Threads that wait for each other: each leaves a pointer, the last one acts for all.
struct Rendezvous {
    int arrived = 0;
    uint64_t generation = 0;
    const char* kind = nullptr;
    std::vector<void*> slots;
};

struct Copy {
    uint32_t shared;
    const void* global;
    bool valid;
};

struct Thread {
    Fiber fiber;
    dim3 index;
    int id = 0;
    bool done = false;
    const char* waits_for = nullptr;
    std::deque<std::vector<Copy>> groups;  // committed and not yet landed, oldest first
    std::vector<Copy> open;                // not yet committed
};

class Block {
  public:
    Block(dim3 grid, dim3 index, int threads, size_t shared_bytes, uint64_t seed, std::function<void()> body)
        : grid(grid), index(index), size(threads), body_(std::move(body)), random_(seed) {
        if (threads < 1 || threads > 1024 || threads % 32) fail("a block needs a multiple of 32 threads up to 1024");
        arena_.reset(static_cast<char*>(std::aligned_alloc(1024, (shared_bytes + 1024) / 1024 * 1024)));
        std::memset(arena_.get(), 0xff, (shared_bytes + 1024) / 1024 * 1024);  // NaN in every type
        shared_size_ = shared_bytes;
    }

    static Block*& current() {
        static thread_local Block* block = nullptr;
        return block;
    }
    Thread& self() { return *threads_[static_cast<size_t>(running_)]; }

    void run() {
        Block* const outer = current();
        current() = this;
        for (int i = 0; i < size; ++i) {
            threads_.push_back(take_thread());
            Thread& thread = *threads_.back();
            thread.id = i;
            thread.index = dim3(static_cast<unsigned>(i), 0, 0);
            thread.fiber.start(&Block::enter);
        }
        warps_.resize(static_cast<size_t>(size / 32));
        live_ = size;
        try {
            schedule();
        } catch (...) {
            current() = outer;
            throw;  // stacks of unfinished threads are dropped with them: kernels own nothing
        }
        for (auto& thread : threads_) {
            if (!thread->groups.empty() || !thread->open.empty()) fail("a thread ended with copies in flight");
            spare().push_back(std::move(thread));
        }
        current() = outer;
    }

    // All `count` participants call with the same `kind`; the last one runs act(slots).
    template <class Act>
    void meet(Rendezvous& point, int slot, int count, const char* kind, void* argument, Act act) {
        if (point.slots.size() < 1024) point.slots.resize(1024);
        if (point.arrived > 0 && std::strcmp(point.kind, kind) != 0)
            fail(std::string("threads that must act together are in ") + point.kind + " and in " + kind);
        point.kind = kind;
        point.slots[static_cast<size_t>(slot)] = argument;
        const uint64_t generation = point.generation;
        if (++point.arrived >= count) {
            act(point.slots.data());
            leave(point);
            return;
        }
        Thread& thread = self();
        thread.waits_for = kind;
        while (point.generation == generation) thread.fiber.yield();
        thread.waits_for = nullptr;
    }
    template <class Act>
    void meet_warp(const char* kind, void* argument, Act act) {
        Warp& warp = warps_[static_cast<size_t>(self().id / 32)];
        if (warp.done) fail(std::string("a lane that has ended is missed in ") + kind);
        meet(warp.point, self().id % 32, 32, kind, argument, act);
    }
    void sync() {
        meet(barrier_, 0, live_, "sync_block", nullptr, [](void**) {});
    }

    char* shared(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
        if (address % alignment) fail(std::string(what) + ": misaligned shared address " + std::to_string(address));
        if (address + static_cast<uint64_t>(bytes) > shared_size_)
            fail(std::string(what) + ": shared address " + std::to_string(address) + " is past " + std::to_string(shared_size_));
        return arena_.get() + address;
    }
    char* arena() { return arena_.get(); }
    size_t shared_size() const { return shared_size_; }
    bool in_arena(const void* p) const {
        return static_cast<const char*>(p) >= arena_.get() && static_cast<const char*>(p) < arena_.get() + shared_size_;
    }

    // A copy lands at once (and so too early for who still reads) or as late as its wait allows (too late for who does not).
    void copy(uint32_t shared_address, const void* global, bool valid) {
        const Copy c{shared_address, global, valid};
        char* to = shared(shared_address, 16, 16, "cp_async16");
        if (reinterpret_cast<uintptr_t>(global) % 16) fail("cp_async16: misaligned global address");
        if (random_() % 2) {
            land(c);
        } else {
            std::memset(to, 0xff, 16);
            self().open.push_back(c);
        }
    }
    void commit() {
        self().groups.push_back(std::move(self().open));
        self().open.clear();
    }
    void wait(size_t pending) {
        auto& groups = self().groups;
        while (groups.size() > pending) {
            for (const Copy& c : groups.front()) land(c);
            groups.pop_front();
        }
    }

    const dim3 grid, index;
    const int size;
    static Counters& counters() {
        static Counters counters;
        return counters;
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    struct Warp {
        Rendezvous point;
        int done = 0;
        uint64_t stuck_at = ~uint64_t(0);
    };

    // Threads keep their stacks from block to block.
    static std::vector<std::unique_ptr<Thread>>& spare() {
        static thread_local std::vector<std::unique_ptr<Thread>> threads;
        return threads;
    }
    static std::unique_ptr<Thread> take_thread() {
        if (spare().empty()) return std::make_unique<Thread>();
        auto thread = std::move(spare().back());
        spare().pop_back();
        thread->done = false;
        return thread;
    }

    static void enter() {
        Block* block = current();
        try {
            block->body_();
        } catch (const std::exception& error) {
            block->error_ = error.what();
        }
        Thread& thread = block->self();
        thread.done = true;
        --block->live_;
        ++block->progress_;
        ++block->warps_[static_cast<size_t>(thread.id / 32)].done;
        // Threads that have ended are not waited for at the block's barrier.
        if (block->barrier_.arrived > 0 && block->barrier_.arrived >= block->live_) block->leave(block->barrier_);
        for (;;) thread.fiber.yield();
    }
    void leave(Rendezvous& point) {
        point.arrived = 0;
        ++point.generation;
        ++progress_;
    }
    void land(const Copy& c) {
        char* to = arena_.get() + c.shared;
        if (c.valid)
            std::memcpy(to, c.global, 16);
        else
            std::memset(to, 0, 16);
    }

    // In turn, one warp as far as it gets, or at random: by block.
    void schedule() {
        const auto policy = random_() % 3;
        const size_t count = warps_.size();
        size_t next = random_() % count;
        while (live_ > 0) {
            if (policy == 2) next = random_() % count;
            size_t tried = 0;
            while (tried < count && (warps_[next].done == 32 || warps_[next].stuck_at == progress_)) {
                next = (next + 1) % count;
                ++tried;
            }
            if (tried == count) deadlock();
            Warp& warp = warps_[next];
            const uint64_t before = progress_;
            const int first = static_cast<int>(random_() % 32);
            for (int i = 0; i < 32; ++i) {
                running_ = static_cast<int>(next) * 32 + (first + i) % 32;
                if (!self().done) self().fiber.resume();
                if (!error_.empty()) {
                    const std::string where = " (block " + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
                                              std::to_string(index.z) + ", thread " + std::to_string(running_) + ")";
                    fail(error_ + where);
                }
            }
            if (progress_ == before) warp.stuck_at = progress_;
            if (policy == 0) next = (next + 1) % count;
        }
    }
    [[noreturn]] void deadlock() {
        std::string report = "deadlock:";
        for (const auto& thread : threads_)
            if (!thread->done && thread->id % 32 == 0)
                report += " warp " + std::to_string(thread->id / 32) + " in " + (thread->waits_for ? thread->waits_for : "?") + ";";
        fail(report);
    }

    std::function<void()> body_;
    std::mt19937_64 random_;
    std::unique_ptr<char, Free> arena_;
    size_t shared_size_;
    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<Warp> warps_;
    Rendezvous barrier_;
    int running_ = 0, live_ = 0;
    uint64_t progress_ = 0;
    std::string error_;
};

}  // namespace emulator
