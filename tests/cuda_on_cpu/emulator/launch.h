// What csrc/cuda/launch.h calls of the CUDA runtime, on the emulator: a block on each multiprocessor, in an order of
// the seed.
#pragma once

#include <map>
#include <numeric>
#include <tuple>
#include <type_traits>

#include "emulator/hooks.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulator {

// What the next launches run under. Tests vary the seed: it decides the order of blocks, the schedule and when copies
// land.
struct Options {
    uint64_t seed = 1;
    size_t shared_limit = Block::kMostShared;  // of an H100
    int compute_capability = 90, multiprocessors = 3;
};
inline Options& options() {
    static Options options;
    return options;
}
// The next launches run on a GPU of this compute capability, with as much shared memory for a block as it has.
inline void use_device(int capability) {
    options().compute_capability = capability;
    options().shared_limit = (capability == 80 ? 163 : capability == 90 ? 227 : 99) * 1024;
}

// As in the runtime, an error stays until it is asked for.
struct Errors {
    cudaError_t last = cudaSuccess;
    std::map<const void*, size_t> most_shared;  // bytes that a kernel may be launched with, where more than 48 KB

    cudaError_t set(cudaError_t error) { return last = error; }
};
inline Errors& errors() {
    static Errors errors;
    return errors;
}

// What has been asked of the runtime. The last two make the host wait, and cannot be captured in a graph.
struct Calls {
    int launches = 0, attributes = 0, zeroed = 0, copies = 0, synchronizations = 0;
};
inline Calls& calls() {
    static Calls calls;
    return calls;
}

inline void launch(const char* op, const void* kernel, dim3 grid, int threads, size_t shared, Block::Body body,
                   const void* context) {
    ++calls().launches;
    size_t allowed = 48 * 1024;
    if (const auto found = errors().most_shared.find(kernel); found != errors().most_shared.end())
        allowed = std::min(found->second, options().shared_limit);
    if (shared > allowed) return static_cast<void>(errors().set(cudaErrorInvalidValue));
    if (grid.x >> 31 || grid.y > 65535 || grid.z > 65535)
        return static_cast<void>(errors().set(cudaErrorInvalidConfiguration));
    std::vector<uint64_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0);
    Random random{++options().seed * 0x2545f4914f6cdd1du};
    for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[random.below(i + 1)]);
    races().start_launch();
    try {
        std::vector<std::unique_ptr<Block>> blocks;
        size_t next = 0;
        const auto start = [&](Block& block) {
            const uint64_t i = order[next++];
            block.start(dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                             static_cast<unsigned>(i / grid.x / grid.y)),
                        random());
        };
        for (int i = 0; i < options().multiprocessors && next < order.size(); ++i) {
            blocks.push_back(std::make_unique<Block>(grid, threads, shared, body, context, blocks.size()));
            start(*blocks.back());
        }
        const uint64_t longest_turn = random.below(2) ? 2 : 100;
        for (size_t at = 0, waiting = 0; !blocks.empty();) {
            auto state = Block::State::kGoesOn;
            for (uint64_t steps = 1 + random.below(longest_turn); steps > 0 && state == Block::State::kGoesOn;
                 --steps) {
                state = blocks[at]->advance(waiting + 1 >= blocks.size());
                waiting = state == Block::State::kWaitsForOthers ? waiting + 1 : 0;
            }
            if (state == Block::State::kHasEnded && next < order.size())
                start(*blocks[at]);
            else if (state == Block::State::kHasEnded)
                blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(at));
            if (waiting > 0)
                at = (at + 1) % blocks.size();
            else if (!blocks.empty())
                at = random.below(blocks.size());
        }
        for (const auto& [begin, pages] : Pages::all())
            if (!pages->untouched_around()) fail(std::string("a write outside of ") + pages->name);
    } catch (const std::runtime_error& error) {
        throw std::runtime_error("[" + std::string(op) + "] " + error.what());
    }
}

}  // namespace emulator

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
    ++emulator::calls().attributes;
    auto& errors = emulator::errors();
    if (static_cast<size_t>(bytes) > emulator::options().shared_limit) return errors.set(cudaErrorInvalidValue);
    errors.most_shared[kernel] = static_cast<size_t>(bytes);
    return cudaSuccess;
}
// Each emulated GPU is a device of its own.
inline cudaError_t cudaGetDevice(int* device) {
    *device = emulator::options().compute_capability;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulator::errors().last, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}

// What no launcher may call, for the test that finds it (test_runtime_calls.cpp).
using cudaStream_t = void*;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
inline cudaError_t cudaDeviceSynchronize() {
    ++emulator::calls().synchronizations;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    ++emulator::calls().copies;
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}

namespace emulator {

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            const Arguments&... arguments) {
    static_assert((std::is_trivially_copyable_v<Parameters> && ...) && (sizeof(Parameters) + ... + 0) <= 4096,
                  "arguments of kernels are copied, 4 KB at most");
    const auto call = [&] { kernel(arguments...); };
    launch(
        op, reinterpret_cast<const void*>(kernel), grid, threads, shared,
        [](const void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
}

}  // namespace emulator

namespace qemb::cuda {

inline int compute_capability() { return ::emulator::options().compute_capability; }
inline int multiprocessors() { return ::emulator::options().multiprocessors; }
inline int max_shared() { return static_cast<int>(::emulator::options().shared_limit); }
inline int multiprocessor_shared() { return max_shared() + 1024; }

inline void zero(const char*, void* to, size_t bytes, void*) {
    ++::emulator::calls().zeroed;
    if (bytes) std::memset(to, 0, bytes);
}

}  // namespace qemb::cuda
