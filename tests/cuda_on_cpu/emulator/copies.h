// cp.async of one thread: copies that land at once, as late as their wait allows, or at any moment between.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "emulator/random.h"

namespace emulator {

enum class Landing { kEarly, kLate, kMixed };

class Copies {
  public:
    bool empty() const { return flying_.empty(); }
    void clear() { flying_.clear(), open_group_ = 0; }

    // 16 bytes; zeros where `from` is null. Until it has landed the target holds NaN: who reads early must not get what
    // was there.
    void issue(char* to, const void* from, Landing landing, Random& random) {
        flying_.push_back({to, from, open_group_, false});
        if (landing == Landing::kEarly || (landing == Landing::kMixed && random.below(3) == 0))
            land(flying_.back());
        else
            std::memset(to, 0xff, 16);
    }
    void commit() { ++open_group_; }

    // All committed groups but the newest `pending` land; visit(to) for each of their copies.
    template <class Visit>
    void wait(uint64_t pending, Random& random, Visit visit) {
        const auto waited = [&](const Copy& c) { return c.group + pending < open_group_; };
        const auto end = std::find_if_not(flying_.begin(), flying_.end(), waited);
        if (random.below(2)) std::reverse(flying_.begin(), end);  // within groups, and between them, nothing is ordered
        for (auto c = flying_.begin(); c != end; ++c) {
            land(*c);
            visit(c->to);
        }
        flying_.erase(flying_.begin(), end);
    }

    // Time passes.
    void drift(Random& random) { land(flying_[random.below(flying_.size())]); }

  private:
    struct Copy {
        char* to;
        const void* from;
        uint64_t group;
        bool landed;
    };
    static void land(Copy& c) {
        if (c.landed) return;
        if (c.from)
            std::memcpy(c.to, c.from, 16);
        else
            std::memset(c.to, 0, 16);
        c.landed = true;
    }

    std::vector<Copy> flying_;  // oldest group first
    uint64_t open_group_ = 0;
};

}  // namespace emulator
