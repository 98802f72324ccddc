// The source of all hostility: small, fast, the same on every machine.
#pragma once

#include <cstdint>

namespace emulator {

struct Random {
    uint64_t state = 0;

    uint64_t operator()() {  // splitmix64
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    uint64_t below(uint64_t n) { return (*this)() % n; }
};

}  // namespace emulator
