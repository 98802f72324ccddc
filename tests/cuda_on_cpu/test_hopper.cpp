// What the emulator promises of Hopper's units: a right kernel passes under every schedule, and each way to misuse them
// is seen.
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "emulator/memory.h"
#include "testing.h"

using namespace qemb::cuda;
using namespace qemb::testing;
using emulator::DeviceMemory;

namespace {

constexpr int kThreads = 256, kSeeds = 60, kSteps = 5, kRows = 64, kDepth = 64 * kSteps;
constexpr int kTileBytes = kRows * 128, kStages = 2;

enum Bug {
    kNone,
    kNoEmptyWait,         // the producer overwrites what is still multiplied
    kWrongPhase,          // the consumer waits for a phase that has long ended
    kWrongArrivals,       // the barrier expects an arrival that never comes
    kTooManyArrivals,     // every thread frees the stage
    kEarlyRelease,        // the stage is freed before the products that read it are done
    kNoWait,              // sums are read while products are in flight
    kNoProductFence,      // products without a fence of the registers
    kWrongDescriptor,     // the next 16 of depth begin elsewhere
    kWrongBytes,          // fewer bytes are expected than are copied
    kNoInitFence,         // barriers that the copy engine does not know of
    kNoBarrierAfterInit,  // or the other threads
    kNoStoreFence,        // what was written is stored without a fence
    kNoStoreBarrier,      // or before the others have written
    kNoStoreWait,         // or the kernel ends while it is stored
    kChangedOperand,      // registers of an operand change in flight
    kChangedSums,         // registers of the sums change in flight
    kNumBugs,
};
const char* const kBugNames[] = {"none",
                                 "no empty wait",
                                 "wrong phase",
                                 "wrong arrivals",
                                 "too many arrivals",
                                 "early release",
                                 "no wait",
                                 "no product fence",
                                 "wrong descriptor",
                                 "wrong bytes",
                                 "no init fence",
                                 "no barrier after init",
                                 "no store fence",
                                 "no store barrier",
                                 "no store wait",
                                 "changed operand",
                                 "changed sums"};

// c = a b^T, 64 x 64 of float: tiles come by the copy engine through two stages, half of the depth of a through
// registers; c goes out by the copy engine.
__global__ void product(const QEMB_GRID_CONSTANT TensorMap a, const QEMB_GRID_CONSTANT TensorMap b,
                        const QEMB_GRID_CONSTANT TensorMap c, Bug bug) {
    const uint32_t start = shared_address(shared_bytes()), barriers = start + 2 * kStages * kTileBytes,
                   out = barriers + 1024;
    const auto full = [&](int step) { return barriers + 8 * (step % kStages); };
    const auto empty = [&](int step) { return barriers + 8 * (kStages + step % kStages); };
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(full(i), 1);
            mbarrier_init(empty(i), bug == kWrongArrivals ? 2 : 1);
        }
        if (bug != kNoInitFence) fence_mbarrier_init();
    }
    if (bug != kNoBarrierAfterInit) sync_block();
    if (threadIdx.x >= 128) {
        registers_decrease<24>();
        if (threadIdx.x > 128) return;
        for (int step = 0; step < kSteps; ++step) {
            const uint32_t stage = start + step % kStages * 2 * kTileBytes, parity = step / kStages % 2;
            if (bug != kNoEmptyWait) mbarrier_wait(empty(step), parity ^ 1);
            mbarrier_expect(full(step), bug == kWrongBytes ? kTileBytes : 2 * kTileBytes);
            tma_load(stage, a, full(step), {step * 64, 0});
            tma_load(stage + kTileBytes, b, full(step), {step * 64, 0});
        }
        return;
    }
    registers_increase<240>();
    const int t = static_cast<int>(threadIdx.x), lane = t % 32, row = t / 32 * 16 + lane / 4;
    float sums[32];
    uint32_t words[4];
    for (int step = 0; step < kSteps; ++step) {
        const uint32_t stage = start + step % kStages * 2 * kTileBytes, parity = step / kStages % 2;
        mbarrier_wait(full(step), bug == kWrongPhase ? parity ^ 1 : parity);
        ldmatrix_x4(words, stage + (t / 32 * 16 + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4));
        if (bug != kNoProductFence) wgmma_fence();
        for (int k = 0; k < 4; ++k) {
            const uint64_t right = matrix(stage + kTileBytes) + (bug == kWrongDescriptor ? 1 : 2) * k;
            if (k == 0)
                wgmma<BFloat16, 64>(sums, words, right, step > 0);
            else
                wgmma<BFloat16, 64>(sums, matrix(stage) + 2 * k, right, true);
        }
        wgmma_commit();
        if (bug == kChangedOperand) words[0] += 1;
        if (bug == kChangedSums) sums[3] = 0;
        if (bug == kEarlyRelease && t == 0) mbarrier_arrive(empty(step));
        if (bug != kNoWait || step + 1 < kSteps) wgmma_wait<0>();
        if (bug == kTooManyArrivals || (bug != kEarlyRelease && t == 0)) mbarrier_arrive(empty(step));
    }
    for (int i = 0; i < 32; ++i) {
        const int at_row = row + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2, word = column % 32;
        shared_store4(out + column / 32 * kTileBytes + at_row * 128 + ((word / 4 ^ at_row % 8) << 4) + word % 4 * 4,
                      __builtin_bit_cast(uint32_t, sums[i]));
    }
    if (bug == kNoWait) wgmma_wait<0>();
    if (bug != kNoStoreFence) fence_async();
    if (bug != kNoStoreBarrier) barrier_sync(1, 128);
    if (t > 0) return;
    for (int half = 0; half < 2; ++half) tma_store(c, out + half * kTileBytes, {half * 32, 0});
    bulk_commit();
    if (bug != kNoStoreWait) bulk_wait_read<0>();
}
constexpr size_t kShared = (2 * kStages + 2) * kTileBytes + 1024;

template <class T>
TensorMap map_of(const DeviceMemory<T>& memory, int columns, int box) {
    TensorMap map;
    CHECK(make_tensor_map<T>(map, {.base = memory.data(),
                                   .rank = 2,
                                   .size = {columns, kRows},
                                   .byte_stride = {0, columns * int64_t(sizeof(T))},
                                   .box = {box, kRows},
                                   .swizzled = true}));
    return map;
}

// How often of kSeeds the result is wrong or the emulator objects; what it says, once.
int caught(Bug bug, std::string& says) {
    DeviceMemory<BFloat16> a(kRows * kDepth), b(kRows * kDepth);
    for (int i = 0; i < kRows * kDepth; ++i) {
        a[static_cast<size_t>(i)] = from_float<BFloat16>(static_cast<float>(i * 7 % 13 - 6));
        b[static_cast<size_t>(i)] = from_float<BFloat16>(static_cast<float>(i * 5 % 11 - 5));
    }
    int count = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        DeviceMemory<float> c(kRows * kRows);
        emulator::options().seed = seed;
        try {
            launch("test", product, dim3(1), kThreads, kShared, nullptr, map_of(a, kDepth, 64), map_of(b, kDepth, 64),
                   map_of(c, kRows, 32), bug);
        } catch (const std::runtime_error& error) {
            says = error.what();
            ++count;
            continue;
        }
        bool wrong = false;
        for (int i = 0; i < kRows && !wrong; ++i)
            for (int j = 0; j < kRows && !wrong; ++j) {
                float sum = 0;
                for (int k = 0; k < kDepth; ++k)
                    sum += to_float(a[static_cast<size_t>(i * kDepth + k)]) *
                           to_float(b[static_cast<size_t>(j * kDepth + k)]);
                wrong = c[static_cast<size_t>(i * kRows + j)] != sum;
            }
        count += wrong;
    }
    return count;
}

TEST(a_right_kernel_passes_and_every_misuse_is_seen) {
    for (int bug = kNone; bug < kNumBugs; ++bug) {
        std::string says;
        const int count = caught(static_cast<Bug>(bug), says);
        // Some schedules are kind to these.
        constexpr Bug kSometimes[] = {kNoEmptyWait,    kEarlyRelease,   kNoWait,     kNoBarrierAfterInit,
                                      kNoStoreBarrier, kChangedOperand, kChangedSums};
        const bool sure = std::find(std::begin(kSometimes), std::end(kSometimes), bug) == std::end(kSometimes);
        const bool right = bug == kNone ? count == 0 : sure ? count == kSeeds : count > kSeeds / 4;
        if (!right) std::printf("  %s: seen in %d of %d runs (%s)\n", kBugNames[bug], count, kSeeds, says.c_str());
        CHECK(right);
    }
}

// Whether or not the schedule shows it.
TEST(races_are_found) {
    const bool before = emulator::Races::on;
    emulator::Races::on = true;
    for (const Bug bug : {kNone, kEarlyRelease, kNoStoreBarrier}) {
        std::string says;
        const int count = caught(bug, says);
        CHECK(count == (bug == kNone ? 0 : kSeeds));
        CHECK(bug == kNone || says.find("race: ") != std::string::npos);
    }
    emulator::Races::on = before;
}

// A sentence for each.
template <class... Parameters, class... Arguments>
std::string failure(void (*kernel)(Parameters...), Arguments... arguments) {
    for (emulator::options().seed = 0; emulator::options().seed < 20;) {
        try {
            launch("test", kernel, dim3(1), kThreads, kShared, nullptr, arguments...);
        } catch (const std::runtime_error& error) {
            return error.what();
        }
    }
    return "";
}
void check_says(const std::string& message, const std::string& part) {
    if (message.find(part) != std::string::npos) return;
    ++g_failures;
    std::printf("  expected \"%s\" in \"%s\"\n", part.c_str(), message.c_str());
}

enum Misuse {
    kUnmade,
    kMisaligned,
    kNamedCount,
    kNamedId,
    kHalfGroup,
    kOverlap,
    kSwizzle,
    kLeftInFlight,
    kDescriptorWithin,
    kDisagree
};
__global__ void misuse(Misuse which) {
    const uint32_t start = shared_address(shared_bytes());
    const int t = static_cast<int>(threadIdx.x);
    float sums[64];
    if (which == kUnmade && t == 0) mbarrier_wait(start, 0);
    if (which == kMisaligned && t == 0) mbarrier_init(start + 4, 1);
    if (which == kNamedCount) barrier_sync(1, t < 128 ? 256 : 128);
    if (which == kNamedId) barrier_sync(16, 256);
    if (which == kHalfGroup && t % 128 < 64) return;
    if (which == kHalfGroup) wgmma_fence();
    if (which < kOverlap || t >= 128) return;
    wgmma_fence();
    const uint64_t a = matrix(start) + (which == kDescriptorWithin ? 8 : 0);
    wgmma<BFloat16, 128>(sums, a,
                         which == kSwizzle    ? a & ~(uint64_t{3} << 62)
                         : which == kDisagree ? matrix(start + 1024 * (t % 2))
                                              : a,
                         false);
    if (which == kOverlap) wgmma<BFloat16, 64>(reinterpret_cast<float (&)[32]>(sums[8]), a, a, false);
    wgmma_commit();
    if (which != kLeftInFlight) wgmma_wait<0>();
}
TEST(misuse_is_named) {
    check_says(failure(misuse, kUnmade), "mbarrier_wait (test_hopper.cpp:");
    check_says(failure(misuse, kUnmade), "no mbarrier_init before");
    check_says(failure(misuse, kMisaligned), "misaligned shared address");
    check_says(failure(misuse, kNamedCount), "others expect another number of threads");
    check_says(failure(misuse, kNamedId), "numbers from 1 to 15");
    check_says(failure(misuse, kHalfGroup), "misses threads that have ended");
    check_says(failure(misuse, kOverlap), "in flight with another product");
    check_says(failure(misuse, kSwizzle), "another swizzle");
    check_says(failure(misuse, kLeftInFlight), "products in flight");
    check_says(failure(misuse, kDescriptorWithin), "within a swizzled atom");
    check_says(failure(misuse, kDisagree), "the threads of the warpgroup disagree");
}

__global__ void dropped_copy(const QEMB_GRID_CONSTANT TensorMap map, bool fenced) {
    const uint32_t start = shared_address(shared_bytes());
    if (threadIdx.x > 0) return;
    shared_store4(start, 1);
    mbarrier_init(start + kTileBytes, 1);
    if (fenced) fence_mbarrier_init();
    mbarrier_expect(start + kTileBytes, kTileBytes);
    tma_load(start, map, start + kTileBytes, {0, 0});
}
TEST(copies_are_watched) {
    const DeviceMemory<BFloat16> memory(kRows * kDepth);
    const TensorMap map = map_of(memory, kDepth, 64);
    check_says(failure(dropped_copy, map, false), "no fence_async after the write by thread 0");
    check_says(failure(dropped_copy, map, true), "ended with copies in flight");
}

enum ChainBug { kRightChain, kOutOfTurn, kEarlyPublication, kLaterBlocks };
constexpr int kLinks = 40, kWidth = 64;
float link(int n, int i) { return static_cast<float>((n * 37 + i * 11) % 101) / 7; }

// sum[i] = link(0, i) + link(1, i) + ...: blocks add them one after another, which the last bits show.
__global__ void chain(float* sum, int* ticket, int* added, ChainBug bug) {
    if (threadIdx.x > 0) return;
    const uint32_t start = shared_address(shared_bytes());
    for (int n = next_ticket(ticket); n < kLinks; n = next_ticket(ticket)) {
        if (bug == kLaterBlocks) n = kLinks - 1 - n;
        for (int i = 0; i < kWidth; ++i)
            shared_store4(start + static_cast<uint32_t>(4 * i), __builtin_bit_cast(uint32_t, link(n, i)));
        fence_async();
        if (n == 0) {
            bulk_store(sum, start, 4 * kWidth);
        } else {
            if (bug != kOutOfTurn) wait_for(added, n);
            bulk_add(sum, start, 4 * kWidth);
        }
        bulk_commit();
        bulk_wait_read<0>();
        if (bug != kEarlyPublication) bulk_wait<0>();
        publish(added, n + 1);
    }
}
int broken_chains(ChainBug bug, std::string& says) {
    std::vector<float> truth(kWidth);
    for (int n = 0; n < kLinks; ++n)
        for (int i = 0; i < kWidth; ++i) truth[static_cast<size_t>(i)] += link(n, i);
    int count = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        DeviceMemory<float> sum(kWidth);
        DeviceMemory<int> numbers(std::vector<int>{0, 0});
        emulator::options().seed = seed;
        try {
            launch("test", chain, dim3(5), 32, 1024, nullptr, sum.data(), &numbers[0], &numbers[1], bug);
            count += !std::equal(truth.begin(), truth.end(), sum.data());
        } catch (const std::runtime_error& error) {
            says = error.what();
            ++count;
        }
    }
    return count;
}
TEST(blocks_wait_for_each_other) {
    std::string says;
    CHECK(broken_chains(kRightChain, says) == 0);
    CHECK(broken_chains(kOutOfTurn, says) > kSeeds / 4);
    CHECK(broken_chains(kEarlyPublication, says) > kSeeds / 4);
    CHECK(broken_chains(kLaterBlocks, says) == kSeeds);
    check_says(says, "deadlock: threads 0-0 wait in wait_for (test_hopper.cpp:");
    const bool before = emulator::Races::on;
    emulator::Races::on = true;
    CHECK(broken_chains(kRightChain, says) == 0);
    CHECK(broken_chains(kOutOfTurn, says) > kSeeds / 2);
    check_says(says, "race: two writes");
    emulator::Races::on = before;
}

TEST(tensors_that_the_engine_refuses) {
    const DeviceMemory<BFloat16> memory(4096);
    TensorMap map;
    const auto fits = [&](auto change) {
        TensorShape shape{.base = memory.data(),
                          .rank = 2,
                          .size = {64, 32},
                          .byte_stride = {0, 128},
                          .box = {64, 16},
                          .swizzled = true};
        change(shape);
        return make_tensor_map<BFloat16>(map, shape);
    };
    CHECK(fits([](TensorShape&) {}));
    CHECK(!fits([&](TensorShape& shape) { shape.base = memory.data() + 1; }));
    CHECK(!fits([](TensorShape& shape) { shape.byte_stride[1] = 120; }));
    CHECK(!fits([](TensorShape& shape) { shape.size[1] = 0; }));
    CHECK(!fits([](TensorShape& shape) { shape.box[0] = 32; }));
    CHECK(!fits([](TensorShape& shape) { shape.box[1] = 512; }));
}

}  // namespace

int main() {
    emulator::report_faults();
    return run_all();
}
