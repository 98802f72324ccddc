// csrc/cuda/launch.h on the emulator: blocks one after another, in an order of the seed.
#pragma once

#include <numeric>

#include "emulator/block.h"

namespace emulator {

// What the next launches run under. Tests vary the seed: it decides the order of blocks, the schedule and when copies land.
struct Options {
    uint64_t seed = 1;
    size_t shared_limit = 227 * 1024;  // of an H100
};
inline Options& options() {
    static Options options;
    return options;
}

}  // namespace emulator

namespace qemb::cuda {

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, void*,
            const Arguments&... arguments) {
    if (shared > ::emulator::options().shared_limit)
        throw std::runtime_error(std::string("[") + op + "] too much shared memory: " + std::to_string(shared));
    std::vector<uint64_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(++::emulator::options().seed);
    std::shuffle(order.begin(), order.end(), random);
    for (const uint64_t i : order) {
        const dim3 index(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / grid.x / grid.y));
        try {
            ::emulator::Block(grid, index, threads, shared, random(), [&] { kernel(arguments...); }).run();
        } catch (const std::runtime_error& error) {
            throw std::runtime_error(std::string("[") + op + "] " + error.what());
        }
    }
}

inline void zero(const char*, void* to, size_t bytes, void*) { std::memset(to, 0, bytes); }

}  // namespace qemb::cuda
