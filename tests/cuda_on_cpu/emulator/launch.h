// csrc/cuda/launch.h on the emulator: blocks one after another, in an order of the seed.
#pragma once

#include <numeric>
#include <tuple>
#include <type_traits>

#include "emulator/hooks.h"

namespace emulator {

// What the next launches run under. Tests vary the seed: it decides the order of blocks, the schedule and when copies land.
struct Options {
    uint64_t seed = 1;
    size_t shared_limit = Block::kMostShared;  // of an H100
    int compute_capability = 90, multiprocessors = 3;
};
inline Options& options() {
    static Options options;
    return options;
}

inline void launch(const char* op, dim3 grid, int threads, size_t shared, Block::Body body, const void* context) {
    static uint32_t serial = 0;
    if (shared > options().shared_limit)
        throw std::runtime_error("[" + std::string(op) + "] " + "too much shared memory: " + std::to_string(shared));
    if (grid.x >> 31 || grid.y > 65535 || grid.z > 65535)
        throw std::runtime_error("[" + std::string(op) + "] " + "no such grid: " + text(grid));
    std::vector<uint64_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0);
    Random random{++options().seed * 0x2545f4914f6cdd1du};
    for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[random.below(i + 1)]);
    races().now.launch = ++serial;
    try {
        Block block(grid, threads, shared, body, context);
        for (const uint64_t i : order)
            block.run(dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                           static_cast<unsigned>(i / grid.x / grid.y)),
                      random());
        for (const auto& [begin, pages] : Pages::all())
            if (!pages->untouched_around()) fail(std::string("a write outside of ") + pages->name);
    } catch (const std::runtime_error& error) {
        throw std::runtime_error("[" + std::string(op) + "] " + error.what());
    }
}

}  // namespace emulator

namespace qemb::cuda {

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, void*,
            const Arguments&... arguments) {
    static_assert((std::is_trivially_copyable_v<Parameters> && ...) && (sizeof(Parameters) + ... + 0) <= 4096,
                  "arguments of kernels are copied, 4 KB at most");
    const auto call = [&] { kernel(arguments...); };
    ::emulator::launch(
        op, grid, threads, shared, [](const void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
}

inline int compute_capability() { return ::emulator::options().compute_capability; }
inline int multiprocessors() { return ::emulator::options().multiprocessors; }

inline void zero(const char*, void* to, size_t bytes, void*) {
    if (bytes) std::memset(to, 0, bytes);
}

}  // namespace qemb::cuda
