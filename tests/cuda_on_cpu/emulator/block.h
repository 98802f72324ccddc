// A thread block: fibers, a hostile scheduler, and a meeting point for everything that threads do together.
#pragma once

#include <bit>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "emulator/asynchronous.h"
#include "emulator/banks.h"
#include "emulator/fiber.h"
#include "emulator/races.h"

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

// What a kernel did that hardware would not forgive.
[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

// A primitive and the line of the kernel that calls it.
struct Place {
    const char* what = nullptr;
    const char* file = "";
    int line = 0;

    bool operator==(const Place& other) const {
        return line == other.line && (file == other.file || !std::strcmp(file, other.file)) &&
               (what == other.what || !std::strcmp(what, other.what));
    }
    std::string text() const {
        const char* slash = std::strrchr(file, '/');
        return std::string(what) + " (" + (slash ? slash + 1 : file) + ":" + std::to_string(line) + ")";
    }
};

struct Thread {
    Fiber fiber;
    dim3 index;
    int id = 0, lane = 0, warp = 0;
    bool done = false;
    Place waits_in;
    Copies copies;
    Stores stores;
};
inline Thread* running = nullptr;

inline std::string text(dim3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

class Block {
  public:
    using Body = void (*)(const void* context);
    static constexpr uint32_t kSharedBase = 1024;  // of the addresses: nobody may take them for offsets
    static constexpr size_t kMostShared = 227 * 1024;
    // Keys of those that linger, and of those that wait for another block: no barrier's, no address.
    static constexpr uint32_t kIdle = 16, kElsewhere = 17;

    // Blocks with other places live at the same time.
    Block(dim3 grid, int threads, size_t shared_bytes, Body body, const void* context, size_t place = 0)
        : grid(grid), size(threads), body_(body), context_(context), shared_size_(shared_bytes), place_(place) {
        if (threads < 1 || threads > 1024 || threads % 32) fail("a block needs a multiple of 32 threads up to 1024");
        if (shared_bytes > kMostShared)
            fail("a block has at most " + std::to_string(kMostShared) + " bytes of shared memory");
        while (pool().size() < static_cast<size_t>(threads)) pool().push_back(std::make_unique<Thread>());
        all().push_back(this);
        warps_.resize(static_cast<size_t>(threads / 32));
        groups_.resize(static_cast<size_t>((threads + 127) / 128));
        arena_ = arena_pages().end() - (shared_bytes + 15) / 16 * 16;
    }

    ~Block() { std::erase(all(), this); }
    Block(const Block&) = delete;

    static Block*& current() {
        static Block* block = nullptr;
        return block;
    }

    enum class State { kGoesOn, kWaitsForOthers, kHasEnded };

    void start(dim3 at, uint64_t seed) {
        index = at;
        random_ = {seed};
        policy_ = static_cast<Policy>(random_.below(4));
        landing_ = static_cast<Landing>(random_.below(3));
        last_ = random_.below(warps_.size());
        live_ = size;
        waiting_ = 0;
        running = nullptr;
        error_.clear();
        std::memset(arena_ - kFront, 0xff,
                    static_cast<size_t>(arena_pages().end() - arena_) + kFront);  // NaN in every type
        for (int i = 0; i < size; ++i) {
            Thread& t = thread(i);
            t.id = i, t.lane = i % 32, t.warp = i / 32;
            t.index = dim3(static_cast<unsigned>(i), 0, 0);
            t.done = false;
            t.copies.clear();
            t.stores.clear();
            t.fiber.start(&Block::enter, t.lane);
        }
        for (Warp& warp : warps_) warp.start(random_);
        for (Group& group : groups_) group.arrived = 0, group.products.clear();
        named_ = {};
        sleepers_.clear();
        engine_.clear();
        proxies_.start(shared_size_, size);
        view_ = races().start_block(arena_, arena_pages().end());
        memory_clocks_.clear();
        straggler_ = random_.below(warps_.size());
    }
    // One decision of the scheduler. `alone`: all other blocks wait for this one.
    State advance(bool alone) {
        current() = this;
        races().take_turn(&view_);
        try {
            const State state = step(alone);
            current() = nullptr;
            return state;
        } catch (const std::runtime_error& error) {  // stacks of unfinished threads are dropped: kernels own nothing
            current() = nullptr;
            std::string where = "block " + text(index);
            if (running) where += ", thread " + std::to_string(running->id);
            throw std::runtime_error(where + ": " + error.what());
        }
    }

    // All lanes of a warp call from one place; the last one runs act(their 32 arguments).
    template <class Act>
    void meet_warp(const Place& place, void* argument, Act act) {
        Thread& self = *running;
        Warp& warp = warps_[static_cast<size_t>(self.warp)];
        arrive(warp.place, warp.arrived, place);
        if (warp.ended) fail(place.text() + " misses lanes that have ended");
        warp.slots[self.lane] = argument;
        if (++warp.arrived < 32) {
            block(self, warp, place);
            return;
        }
        act(warp.slots);
        warp.arrived = 0;
        warp.runnable = ~0u;
        warp.accesses.count();
        if (!self.copies.empty() && landing_ == Landing::kMixed) self.copies.drift(random_);
        if (--warp.turns == 0) {
            to_scheduler(self);
            see();
        }
    }
    // All threads of a warpgroup, likewise; act(their 128 arguments, the products of the warpgroup).
    template <class Act>
    void meet_group(const Place& place, void* argument, Act act) {
        Thread& self = *running;
        Group& group = groups_[static_cast<size_t>(self.id / 128)];
        arrive(group.place, group.arrived, place);
        const size_t first = static_cast<size_t>(self.id / 128 * 4);
        if (first + 4 > warps_.size()) fail(place.text() + " needs a warpgroup of 128 threads");
        for (size_t w = first; w < first + 4; ++w)
            if (warps_[w].ended) fail(place.text() + " misses threads that have ended");
        group.slots[self.id % 128] = argument;
        if (++group.arrived < 128) return block(self, warps_[static_cast<size_t>(self.warp)], place);
        act(group.slots, group.products);
        group.arrived = 0;
        for (size_t w = first; w < first + 4; ++w) warps_[w].runnable = ~0u;
        if (--warps_[static_cast<size_t>(self.warp)].turns == 0) to_scheduler(self);
        see();
    }
    // Until somebody wakes whoever sleeps under this key: an address of shared memory, or the number of a barrier.
    void sleep(uint32_t key, const Place& place) {
        Thread& self = *running;
        sleepers_.push_back({key, &self});
        block(self, warps_[static_cast<size_t>(self.warp)], place);
    }
    void wake(uint32_t key) {
        std::erase_if(sleepers_, [&](const Sleeper& sleeper) {
            if (sleeper.key != key) return false;
            warps_[static_cast<size_t>(sleeper.thread->warp)].runnable |= 1u << sleeper.thread->lane;
            return true;
        });
    }
    // What the threads of all blocks wait for that sleep under kElsewhere, may have happened.
    static void wake_others() {
        for (Block* block : all()) block->wake(kElsewhere);
    }
    // Where time may pass: until all others have gone as far as they can.
    void linger(const Place& place) {
        if (landing_ == Landing::kLate || (landing_ == Landing::kMixed && random_.below(2))) sleep(kIdle, place);
    }
    // A barrier of some of the threads.
    void arrive_named(uint32_t id, int threads, bool waits, const Place& place) {
        if (id < 1 || id > 15) fail(place.text() + ": barriers have numbers from 1 to 15, not " + std::to_string(id));
        if (threads % 32 || threads < 32 || threads > size) fail(place.text() + ": not whole warps of the block");
        Named& barrier = named_[id];
        if (barrier.arrived > 0 && barrier.threads != threads)
            fail(place.text() + ": others expect another number of threads");
        barrier.threads = threads;
        barrier.warps |= 1u << running->warp;
        if (Races::on) join(barrier.arrivals, races().release(running->warp));
        const uint64_t turn = barrier.turn;
        if (++barrier.arrived == threads) {
            for (size_t w = 0; w < warps_.size(); ++w) warps_[w].epoch += barrier.warps >> w & 1;
            barrier.opened = std::exchange(barrier.arrivals, {});
            barrier.arrived = 0;
            barrier.warps = 0;
            ++barrier.turn;
            wake(id);
        }
        while (waits && barrier.turn == turn) sleep(id, place);
        if (waits && Races::on) races().acquire(running->warp, barrier.opened);
        see();
    }
    // What threads and copies that arrive at an mbarrier have done, is known to those who have waited for its phase.
    void release_to(uint32_t address, const Clock& clock) { join(memory_clocks_[address].arrivals, clock); }
    void open(uint32_t address) { memory_clocks_[address].opened = memory_clocks_[address].arrivals; }
    void acquire_from(uint32_t address) { races().acquire(running->warp, memory_clocks_[address].opened); }
    void group_commits(Products& products) {
        if (!Races::on) return;
        Clock all{};
        for (int w = running->warp / 4 * 4; w < running->warp / 4 * 4 + 4; ++w) join(all, races().release(w));
        products.commits.push_back(all);
    }
    void group_waited(Products& products, size_t pending) {
        for (; products.commits.size() > pending; products.commits.pop_front())
            for (int w = running->warp / 4 * 4; w < running->warp / 4 * 4 + 4; ++w)
                races().acquire(w, products.commits.front());
    }
    // The first warp of a warpgroup stands for it where the tensor cores read.
    void touch_for_group(void* p, uint32_t bytes, int group) {
        if (Races::on) races().access_for(group * 4, p, bytes, false, warps_[static_cast<size_t>(group) * 4].epoch);
    }
    // Each lane receives what lane `from` holds.
    template <class T>
    T exchange(T x, int from, const Place& place) {
        static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "what __shfl_sync takes");
        struct Lane {
            T in, out;
            int from;
        } self{x, x, from & 31};
        meet_warp(place, &self, [](void** slots) {
            for (int l = 0; l < 32; ++l) {
                auto* to = static_cast<Lane*>(slots[l]);
                to->out = static_cast<Lane*>(slots[to->from])->in;
            }
        });
        return self.out;
    }
    void sync_warp(const Place& place) {
        meet_warp(place, nullptr, [this](void**) { ++warps_[static_cast<size_t>(running->warp)].epoch; });
        see();
    }
    // Threads that have ended are not waited for.
    void sync(const Place& place) {
        Thread& self = *running;
        arrive(barrier_, waiting_, place);
        ++waiting_;
        if (waiting_ < live_)
            block(self, warps_[static_cast<size_t>(self.warp)], place);
        else
            open_barrier();
        see();
    }

    void* shared(uint32_t address, uint32_t bytes, const Place& place) {
        if (address % bytes) fail(place.text() + ": misaligned shared address " + std::to_string(address));
        if (address < kSharedBase || address - kSharedBase + uint64_t{bytes} > shared_size_)
            fail(place.text() + ": " + std::to_string(bytes) + " bytes at " +
                 std::to_string(static_cast<int64_t>(address) - kSharedBase) + " of " + std::to_string(shared_size_) +
                 " bytes of shared memory");
        return arena_ + (address - kSharedBase);
    }
    char* arena() { return arena_; }
    size_t shared_size() const { return shared_size_; }
    bool in_arena(const void* p) const { return p >= arena_ && p < arena_pages().end(); }
    uint32_t address_of(const void* p) const {
        return static_cast<uint32_t>(static_cast<const char*>(p) - arena_) + kSharedBase;
    }

    // Called for every access of the arch layer.
    void touch(void* p, uint32_t bytes, bool write) {
        if (Races::on) races().access(p, bytes, write);
        if (write && in_arena(p))
            proxies_.write(static_cast<size_t>(static_cast<char*>(p) - arena_), bytes, running->id);
    }
    // 16 bytes, or fewer, that the copy engine or the tensor cores touch.
    char* touch_async(uint32_t address, uint32_t bytes, const Place& place) {
        auto* p = static_cast<char*>(shared(address, bytes, place));
        const int writer = proxies_.unseen(static_cast<size_t>(p - arena_), bytes);
        if (writer >= 0)
            fail(place.text() + " at byte " + std::to_string(p - arena_) +
                 " of shared memory: no fence_async after the write by thread " + std::to_string(writer));
        return p;
    }
    void fence_async() { proxies_.fence(running->id); }
    void submit(Work work) { engine_.submit(std::move(work), landing_); }
    Landing landing() const { return landing_; }
    Random& random() { return random_; }
    // 16 bytes anywhere, checked and counted.
    void* vector(void* p, bool write, const Place& place) {
        if (reinterpret_cast<uintptr_t>(p) % 16) fail(place.text() + ": misaligned address");
        if (in_arena(p)) {
            shared(address_of(p), 16, place);
            warps_[static_cast<size_t>(running->warp)].accesses.add(running->lane, place.file, place.line,
                                                                    address_of(p));
        }
        touch(p, 16, write);
        return p;
    }

    void copy(uint32_t to, const void* from, bool valid, const Place& place) {
        void* target = shared(to, 16, place);
        if (reinterpret_cast<uintptr_t>(from) % 16) fail(place.text() + ": misaligned global address");
        if (Races::on) {
            if (valid) races().access(from, 16, false);
            races().copy_begins(target);
        }
        proxies_.write(static_cast<size_t>(static_cast<char*>(target) - arena_), 16, running->id);
        running->copies.issue(static_cast<char*>(target), valid ? from : nullptr, landing_, random_);
    }
    void commit() { running->copies.commit(); }
    void wait(uint64_t pending) {
        running->copies.wait(pending, random_, [](char* to) {
            if (Races::on) races().copy_ends(to);
        });
    }

    static Counters& counters() { return emulator::counters(); }

    const dim3 grid;
    dim3 index;
    const int size;

  private:
    // In turn, at random, one warp as far as it gets, or one warp later than all others.
    enum class Policy { kInTurn, kRandom, kEager, kStraggler };
    static constexpr size_t kFront = 256;

    struct Warp {
        void* slots[32];
        uint32_t runnable;  // lanes
        int arrived, ended;
        uint64_t turns;  // how often its lanes may still act together before another warp runs
        bool downwards;
        Place place;
        uint32_t epoch;
        VectorAccesses accesses;

        void start(Random& random) {
            runnable = ~0u;
            arrived = ended = 0;
            epoch = 0;
            downwards = random.below(2);
            accesses.count();
        }
        int after(int lane) const {
            if (downwards) return (lane + 31 - std::countl_zero(std::rotr(runnable, lane))) % 32;
            return (lane + 1 + std::countr_zero(std::rotr(runnable, (lane + 1) % 32))) % 32;
        }
    };

    struct Group {
        void* slots[128];
        int arrived = 0;
        Place place;
        Products products;
    };
    struct Named {
        int arrived = 0, threads = 0;
        uint32_t warps = 0;
        uint64_t turn = 0;
        Clock arrivals{}, opened{};
    };
    struct Phases {
        Clock arrivals{}, opened{};
    };
    struct Sleeper {
        uint32_t key;
        Thread* thread;
    };

    static std::vector<Block*>& all() {
        static std::vector<Block*> blocks;
        return blocks;
    }
    // What a place in the machine has, one block after another.
    struct Multiprocessor {
        std::vector<std::unique_ptr<Thread>> threads;
        const Pages arena{kMostShared + kFront, "shared memory"};
    };
    Multiprocessor& multiprocessor() const {
        static std::vector<std::unique_ptr<Multiprocessor>> places;
        while (places.size() <= place_) places.push_back(std::make_unique<Multiprocessor>());
        return *places[place_];
    }
    std::vector<std::unique_ptr<Thread>>& pool() const { return multiprocessor().threads; }
    const Pages& arena_pages() const { return multiprocessor().arena; }
    Thread& thread(int id) const { return *pool()[static_cast<size_t>(id)]; }

    static void enter() {
        Block& block = *current();
        try {
            block.see();
            Races::in_kernel = true;
            block.body_(block.context_);
            Races::in_kernel = false;
            block.end();
        } catch (const std::exception& error) {
            block.error_ = error.what();
        }
        Races::in_kernel = false;
        for (;;) block.leave(*running);
    }
    void end() {
        Thread& self = *running;
        Warp& warp = warps_[static_cast<size_t>(self.warp)];
        if (Races::on) races().settle();
        if (!self.copies.empty() || !self.stores.are_waited_for()) fail("the thread ended with copies in flight");
        if (self.id % 128 == 0 && !groups_[static_cast<size_t>(self.id / 128)].products.empty())
            fail("the warpgroup ended with products in flight");
        if (warp.arrived) fail("the thread ended while others of its warp wait in " + warp.place.text());
        self.done = true;
        if (++warp.ended == 32) warp.accesses.count();
        if (--live_ > 0 && waiting_ == live_) open_barrier();
        warp.runnable &= ~(1u << self.lane);
    }
    void arrive(Place& meeting, int others, const Place& place) {
        if (others == 0)
            meeting = place;
        else if (!(meeting == place))
            fail("threads that must act together are in " + meeting.text() + " and in " + place.text());
    }
    void block(Thread& self, Warp& warp, const Place& place) {
        self.waits_in = place;
        warp.runnable &= ~(1u << self.lane);
        if (!self.copies.empty() && landing_ == Landing::kMixed) self.copies.drift(random_);
        leave(self);
        see();
    }
    // To the next lane of the warp that can run, or to the scheduler.
    void leave(Thread& self) {
        const Warp& warp = warps_[static_cast<size_t>(self.warp)];
        if (!warp.runnable || !error_.empty()) return to_scheduler(self);
        Thread& next = thread(self.warp * 32 + warp.after(self.lane));
        running = &next;
        self.fiber.switch_to(next.fiber);
    }
    void to_scheduler(Thread& self) { self.fiber.leave(scheduler_); }
    void open_barrier() {
        waiting_ = 0;
        Clock all{};
        for (size_t w = 0; Races::on && w < warps_.size(); ++w)
            if (warps_[w].ended < 32) join(all, races().release(static_cast<int>(w)));
        for (Warp& warp : warps_) {
            if (warp.ended == 32) continue;
            const auto w = static_cast<int>(&warp - warps_.data());
            if (Races::on) races().acquire(w, all);
            ++warp.epoch;
            for (int lane = 0; lane < 32; ++lane)
                if (!thread(w * 32 + lane).done) warp.runnable |= 1u << lane;
            warp.accesses.count();
        }
    }
    void see() {
        if (!Races::on) return;
        races().settle();
        auto& now = races().now();
        now.warp = static_cast<uint8_t>(running->warp);
        now.lane = static_cast<uint8_t>(running->lane);
        now.warp_epoch = warps_[static_cast<size_t>(running->warp)].epoch;
    }

    State step(bool alone) {
        const size_t count = warps_.size();
        if (live_ == 0) {
            running = nullptr;
            if (!engine_.empty()) fail("the block ended with copies in flight");
            for (int i = 0; i < size; ++i) thread(i).stores.land_all();
            for (const char* p = arena_ - kFront; p < arena_; ++p)
                if (*p != '\xff') fail("a write " + std::to_string(arena_ - p) + " bytes before shared memory");
            return State::kHasEnded;
        }
        drift();
        size_t chosen = count;
        const size_t first = policy_ == Policy::kRandom   ? random_.below(count)
                             : policy_ == Policy::kInTurn ? last_ + 1
                                                          : last_;
        for (size_t i = 0; i < count; ++i) {
            const size_t w = (first + i) % count;
            if (!warps_[w].runnable) continue;
            chosen = w;
            if (policy_ != Policy::kStraggler || w != straggler_) break;
        }
        if (chosen == count) {
            running = nullptr;
            const bool lingering = sleeps_under(kIdle);
            if (!engine_.empty() && (!lingering || random_.below(2)))
                engine_.land_one(random_);
            else if (lingering)
                wake(kIdle);
            else if (sleeps_under(kElsewhere) && !alone)
                return State::kWaitsForOthers;
            else
                deadlock();
            return State::kGoesOn;
        }
        Warp& warp = warps_[chosen];
        warp.turns = policy_ == Policy::kEager ? ~uint64_t(0) : policy_ == Policy::kInTurn ? 1 : 1 + random_.below(8);
        last_ = chosen;
        running = &thread(static_cast<int>(chosen) * 32 + warp.after(static_cast<int>(random_.below(32))));
        running->fiber.enter(scheduler_);
        if (!error_.empty()) fail(error_);
        if (!races().found.empty()) {
            running = nullptr;
            fail(races().found);
        }
        return State::kGoesOn;
    }
    bool sleeps_under(uint32_t key) const {
        return std::any_of(sleepers_.begin(), sleepers_.end(), [&](const Sleeper& s) { return s.key == key; });
    }
    [[noreturn]] void deadlock() {
        std::string report = "deadlock:";
        for (int first = 0; first < size;) {
            int last = first;
            const Thread& t = thread(first);
            const auto same = [&](const Thread& other) {
                return other.done == t.done && (t.done || other.waits_in == t.waits_in);
            };
            while (last + 1 < size && same(thread(last + 1))) ++last;
            report += " threads " + std::to_string(first) + "-" + std::to_string(last) +
                      (t.done ? std::string(" have ended;") : " wait in " + t.waits_in.text() + ";");
            first = last + 1;
        }
        running = nullptr;
        fail(report);
    }
    // Time passes.
    void drift() {
        if (landing_ != Landing::kMixed) return;
        if (!engine_.empty() && random_.below(3) == 0) engine_.land_one(random_);
        Products& products = groups_[random_.below(groups_.size())].products;
        if (!products.groups.empty() && random_.below(3) == 0) products.run_oldest();
        if (random_.below(3) == 0)
            thread(static_cast<int>(random_.below(static_cast<uint64_t>(size)))).stores.land_one();
    }
    Body body_;
    const void* context_;
    size_t shared_size_, place_;
    char* arena_;
    Races::View view_;
    std::vector<Warp> warps_;
    std::vector<Group> groups_;
    std::array<Named, 16> named_;
    std::unordered_map<uint32_t, Phases> memory_clocks_;
    std::vector<Sleeper> sleepers_;
    Engine engine_;
    Proxies proxies_;
    Random random_;
    Policy policy_{};
    Landing landing_{};
    Place barrier_;
    int waiting_ = 0, live_ = 0;
    size_t last_ = 0, straggler_ = 0;
    void* scheduler_ = nullptr;
    std::string error_;
};

inline void Races::report(const char* what, uintptr_t at) {
    if (!found.empty()) return;
    const auto* p = reinterpret_cast<const char*>(at * kGrain);
    const bool shared = p >= view_->shared_begin && p < view_->shared_end;
    found =
        "race: " + std::string(what) + " by thread " + std::to_string(running->id) + " of block " +
        text(Block::current()->index) +
        (shared ? ", byte " + std::to_string(p - static_cast<const char*>(view_->shared_begin)) + " of shared memory"
                : std::string(", global memory"));
}

}  // namespace emulator
