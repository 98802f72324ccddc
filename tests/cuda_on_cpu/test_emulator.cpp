// The emulator catches what it promises to catch, and lets a right kernel pass under every schedule.
#include <sys/wait.h>

#include <cstdio>

#include "cuda/launch.h"
#include "emulator/memory.h"
#include "testing.h"

using namespace qemb::cuda;
using namespace qemb::testing;
using emulator::DeviceMemory;

namespace {

constexpr int kThreads = 128, kSeeds = 100;

// What a launch fails with under one seed; empty where it succeeds.
template <class... Parameters, class... Arguments>
std::string failure(uint64_t seed, int shared, void (*kernel)(Parameters...), Arguments... arguments) {
    emulator::options().seed = seed;
    try {
        launch("test", kernel, dim3(2), kThreads, static_cast<size_t>(shared), nullptr, arguments...);
        return "";
    } catch (const std::runtime_error& error) {
        return error.what();
    }
}

void check_says(const std::string& message, const std::string& part) {
    if (message.find(part) != std::string::npos) return;
    ++g_failures;
    std::printf("  expected \"%s\" in \"%s\"\n", part.c_str(), message.c_str());
}

// A tile of 16-byte rows goes by cp.async through shared memory to other threads, twice through two stages.
enum Bug { kNone, kNoWait, kNoBarrier, kNoSecondBarrier, kWaitForOlder, kNeverWaits };
__global__ void pass_on(const Vector16* in, Vector16* out, Bug bug) {
    const int t = static_cast<int>(threadIdx.x), rounds = 4;
    auto* tile = reinterpret_cast<Vector16*>(shared_bytes());
    const auto issue = [&](int round) {
        if (round < rounds)
            cp_async16(shared_address(tile + round % 2 * kThreads + t), in + round * kThreads + t, true);
        cp_async_commit();
    };
    issue(0);
    for (int round = 0; round < rounds; ++round) {
        issue(round + 1);
        if (bug == kWaitForOlder)
            cp_async_wait<2>();
        else if (bug != kNoWait && bug != kNeverWaits)
            cp_async_wait<1>();
        if (bug != kNoBarrier) sync_block();
        out[(blockIdx.x * rounds + round) * kThreads + t] = load16(tile + round % 2 * kThreads + (t + 33) % kThreads);
        if (bug != kNoSecondBarrier) sync_block();
    }
    if (bug != kNeverWaits) cp_async_wait<0>();
}

// How often of kSeeds the result is wrong or the emulator objects.
int caught(Bug bug) {
    constexpr size_t kCount = 4 * kThreads;
    DeviceMemory<Vector16> in(kCount);
    for (size_t i = 0; i < kCount; ++i) in[i] = {{static_cast<uint32_t>(i), 1, 2, 3}};
    int count = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        DeviceMemory<Vector16> out(2 * kCount);
        bool wrong =
            !failure(seed, 2 * kThreads * 16, pass_on, static_cast<const Vector16*>(in.data()), out.data(), bug)
                 .empty();
        for (size_t i = 0; i < 2 * kCount && !wrong; ++i) {
            const size_t row = i % kCount / kThreads * kThreads + (i + 33) % kThreads;
            wrong = std::memcmp(&out[i], &in[row], 16) != 0;
        }
        count += wrong;
    }
    return count;
}

TEST(a_right_kernel_passes_under_every_seed) { CHECK(caught(kNone) == 0); }
TEST(a_missing_wait_is_seen) { CHECK(caught(kNoWait) > kSeeds / 2); }
TEST(a_wait_for_the_group_before_is_seen) { CHECK(caught(kWaitForOlder) > kSeeds / 2); }
TEST(a_missing_barrier_after_the_wait_is_seen) { CHECK(caught(kNoBarrier) > kSeeds / 2); }
TEST(a_missing_barrier_before_the_next_copy_is_seen) { CHECK(caught(kNoSecondBarrier) > kSeeds / 2); }
TEST(copies_in_flight_at_the_end_are_seen) { CHECK(caught(kNeverWaits) == kSeeds); }

__global__ void copy_without_end(const Vector16* in) {
    cp_async16(shared_address(shared_bytes() + 16 * threadIdx.x), in + threadIdx.x, true);
}
TEST(a_thread_that_ends_with_copies_in_flight_is_named) {
    const DeviceMemory<Vector16> in(kThreads);
    check_says(failure(1, 16 * kThreads, copy_without_end, in.data()), "ended with copies in flight");
}

// Within a warp: everyone writes, everyone reads the neighbour's.
__global__ void neighbours(float* out, bool synchronised) {
    const int t = static_cast<int>(threadIdx.x);
    auto* values = reinterpret_cast<float*>(shared_bytes());
    values[t] = static_cast<float>(t);
    if (synchronised) sync_warp();
    out[blockIdx.x * kThreads + t] = values[t ^ 1];
}
TEST(a_missing_warp_barrier_is_seen) {
    for (const bool synchronised : {true, false}) {
        DeviceMemory<float> out(2 * kThreads);
        int wrong = !failure(7, 4 * kThreads, neighbours, out.data(), synchronised).empty();
        for (int t = 0; t < kThreads; ++t) wrong += out[t] != static_cast<float>(t ^ 1);
        CHECK((wrong == 0) == synchronised);
    }
}

__global__ void read_matrix(int offset, int stride) {
    uint32_t words[4];
    ldmatrix_x4(words, shared_address(shared_bytes()) + offset + threadIdx.x % 32 * stride);
}
TEST(a_misaligned_matrix_row_is_named) {
    check_says(failure(1, 8192, read_matrix, 8, 16), "ldmatrix_x4 (test_emulator.cpp:");
    check_says(failure(1, 8192, read_matrix, 8, 16), "misaligned shared address");
}
TEST(a_matrix_row_past_the_end_is_named) {
    check_says(failure(1, 500, read_matrix, 0, 16), "16 bytes at 496 of 500 bytes of shared memory");
    check_says(failure(1, 8192, read_matrix, -16, 16), "16 bytes at -16");
}
TEST(bank_conflicts_are_counted) {
    const auto passes = [](int stride) {
        emulator::counters() = {};
        CHECK(failure(1, 8192, read_matrix, 0, stride).empty());
        CHECK(emulator::counters().ldmatrix == 2 * 4 * 4);
        return emulator::counters().bank_conflicts / emulator::counters().ldmatrix;
    };
    CHECK(passes(16) == 0);
    CHECK(passes(0) == 0);  // one address for all
    CHECK(passes(32) == 1);
    CHECK(passes(128) == 7);
    CHECK(passes(144) == 0);
}

__global__ void write_vectors(int stride) {
    store16(shared_bytes() + threadIdx.x / 32 * 4096 + threadIdx.x % 32 * stride, {});
}
TEST(conflicts_of_vector_stores_are_counted) {
    for (const auto& [stride, extra] : {std::pair(16, 0u), {64, 3u}, {128, 7u}}) {
        emulator::counters() = {};
        CHECK(failure(1, 16384, write_vectors, stride).empty());
        CHECK(emulator::counters().vectors == 2 * 4 * 4);
        CHECK(emulator::counters().vector_conflicts == emulator::counters().vectors * extra);
    }
}

__global__ void misaligned_vector(const char* from) { load16(from + 4); }
TEST(a_misaligned_vector_is_named) {
    const DeviceMemory<char> in(64);
    check_says(failure(1, 0, misaligned_vector, in.data()), "load16 (test_emulator.cpp:");
}

__global__ void half_a_barrier() {
    if (threadIdx.x < 64) shuffle_xor(threadIdx.x < 32 ? 1 : 2, 1);
    if (threadIdx.x % 32 < 16) return;
    sync_block();
}
__global__ void lanes_miss_a_shuffle() {
    if (threadIdx.x % 32 < 16)
        shuffle(1, 0);
    else
        sync_block();
}
TEST(a_deadlock_says_who_waits_where) {
    CHECK(failure(3, 0, half_a_barrier).empty());  // hardware does not wait for threads that have ended
    const std::string message = failure(3, 0, lanes_miss_a_shuffle);
    check_says(message, "deadlock: threads 0-15 wait in shuffle (test_emulator.cpp:");
    check_says(message, "threads 112-127 wait in sync_block (test_emulator.cpp:");
}

__global__ void two_places(bool blocks) {
    if (blocks ? threadIdx.x < 32 : threadIdx.x % 32 < 16) {
        if (blocks)
            sync_block();
        else
            sync_warp();
    } else {
        if (blocks)
            sync_block();
        else
            sync_warp();
    }
}
__global__ void two_kinds() {
    if (threadIdx.x % 2)
        sync_warp();
    else
        any_lane(true);
}
__global__ void ended_lanes() {
    if (threadIdx.x % 32 == 5) return;
    sync_warp();
}
TEST(divergence_is_seen) {
    for (uint64_t seed = 0; seed < 10; ++seed) {
        check_says(failure(seed, 0, two_places, false), "must act together");
        check_says(failure(seed, 0, two_places, true), "must act together");
        check_says(failure(seed, 0, two_kinds), "must act together");
        check_says(failure(seed, 0, ended_lanes), "ended");
    }
}

__global__ void refused(int) {}
__global__ void accepted(int) {}
TEST(a_refused_launch_is_no_error_of_the_next) {
    check_says(failure(1, 256 * 1024, refused, 0), "CUDA: invalid argument");
    CHECK(failure(1, 0, accepted, 0).empty() && cudaGetLastError() == cudaSuccess);
}
TEST(launches_that_cannot_be_are_refused) {
    check_says(failure(1, 256 * 1024, refused, 0), "CUDA: invalid argument");
    for (const auto& [capability, bytes] : {std::pair(86, 101376), {89, 101376}, {80, 166912}, {90, 232448}}) {
        emulator::use_device(capability);
        CHECK(max_shared() == bytes && failure(1, bytes, refused, 0).empty());
        check_says(failure(1, bytes + 1, refused, 0), "CUDA: invalid argument");
    }
    try {
        launch("test", refused, dim3(1, 70000), 32, 0, nullptr, 0);
        CHECK(false);
    } catch (const std::runtime_error& error) {
        check_says(error.what(), "CUDA: invalid configuration argument");
    }
    launch("test", refused, dim3(0), 32, 0, nullptr, 0);
}

// Faults end the process, so a child has them. -> what it wrote
template <class Body>
std::string in_child(Body body) {
    int ends[2];
    CHECK(pipe(ends) == 0);
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        emulator::report_faults();
        body();
        _exit(0);
    }
    close(ends[1]);
    std::string written;
    char text[200];
    for (ssize_t count; (count = read(ends[0], text, sizeof text)) > 0;)
        written.append(text, static_cast<size_t>(count));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    return written;
}

__global__ void write_at(float* out, int64_t i) {
    if (threadIdx.x == 40) out[i] = 1;
}
__global__ void write_shared_at(int i) {
    if (threadIdx.x == 40) shared_bytes()[i] = 1;
}
__global__ void deep_stack(float* out) {
    volatile float large[40000];
    for (int i = 40000; i-- > 0;) large[i] = 1;
    out[0] = large[threadIdx.x];
}
TEST(accesses_out_of_bounds_are_named) {
    DeviceMemory<float> out(100);
    check_says(in_child([&] { failure(1, 0, write_at, out.data(), int64_t{101}); }),
               "thread 40: touched byte 4 past the end of global memory");
    check_says(in_child([&] { failure(1, 0, write_at, out.data(), int64_t{-1000}); }),
               "before the pages of global memory");
    check_says(in_child([&] { failure(1, 4096, write_shared_at, 4096); }),
               "touched byte 0 past the end of shared memory");
    check_says(in_child([&] { failure(1, 0, write_at, static_cast<float*>(nullptr), int64_t{0}); }),
               "which is nobody's");
    check_says(in_child([&] { failure(1, 0, deep_stack, out.data()); }), "the stack of a thread");
}
TEST(writes_just_outside_are_seen_after_the_launch) {
    DeviceMemory<float> out(99);
    check_says(failure(1, 0, write_at, out.data(), int64_t{99}), "a write outside of global memory");
    DeviceMemory<float> other(100);
    check_says(failure(1, 0, write_at, other.data(), int64_t{-1}), "a write outside of global memory");
    out[99] = other[-1] = __builtin_bit_cast(float, ~0u);
    check_says(failure(1, 4096, write_shared_at, -8), "a write 8 bytes before shared memory");
}

TEST(memory_starts_as_nan) {
    const DeviceMemory<float> fresh(10);
    CHECK(std::isnan(fresh[0]) && std::isnan(fresh[9]));
}

// Races that no schedule need show.
__global__ void accesses(float* out, int which) {
    const int t = static_cast<int>(threadIdx.x);
    auto* tile = reinterpret_cast<Vector16*>(shared_bytes());
    store16(tile + t, {});
    if (which == 1) sync_block();
    if (which == 2) sync_warp();
    if (which == 3) shuffle(t, 0);  // orders nothing
    load16(tile + (which == 2 ? t ^ 1 : (t + 64) % kThreads));
    if (which == 4) store16(reinterpret_cast<Vector16*>(out), {{blockIdx.x, 0, 0, 0}});
}
__global__ void plain(float* out, bool ordered, bool own_row) {
    const int t = static_cast<int>(threadIdx.x);
    auto* values = reinterpret_cast<float*>(shared_bytes());
    values[t] = 0;
    if (ordered) sync_block();
    const float x = values[(t + 64) % kThreads];
    out[(own_row ? blockIdx.x : 0) * kThreads + t] = x + static_cast<float>(blockIdx.x);
}
__global__ void same_place(bool same_value) {
    shared_store4(shared_address(shared_bytes()), same_value ? 1 : threadIdx.x);
}
TEST(races_are_found) {
    DeviceMemory<float> out(2 * kThreads);
    const bool before = emulator::Races::on;
    emulator::Races::on = true;
    const auto run = [&](int which) { return failure(5, 16 * kThreads, accesses, out.data(), which); };
    check_says(run(0), "race: ");
    CHECK(run(1).empty());
    CHECK(run(2).empty());
    check_says(run(3), "of shared memory");
    check_says(run(4), "race: ");
    CHECK(failure(5, 4, same_place, true).empty());
    check_says(failure(5, 4, same_place, false), "two writes");
    for (uint64_t seed = 0; seed < 20; ++seed) {
        CHECK(failure(seed, 2 * kThreads * 16, pass_on,
                      static_cast<const Vector16*>(DeviceMemory<Vector16>(4 * kThreads).data()),
                      DeviceMemory<Vector16>(8 * kThreads).data(), kNone)
                  .empty());
        for (const Bug bug : {kNoWait, kWaitForOlder, kNoBarrier, kNoSecondBarrier})
            check_says(failure(seed, 2 * kThreads * 16, pass_on,
                               static_cast<const Vector16*>(DeviceMemory<Vector16>(4 * kThreads).data()),
                               DeviceMemory<Vector16>(8 * kThreads).data(), bug),
                       "race: ");
    }
    emulator::Races::on = before;
    if (!before) return;  // plain accesses are seen only where the compiler reports them
    CHECK(failure(5, 4 * kThreads, plain, out.data(), true, true).empty());
    check_says(failure(5, 4 * kThreads, plain, out.data(), false, true), "of shared memory");
    check_says(failure(5, 4 * kThreads, plain, out.data(), true, false), "global memory");
}

enum ChainBug { kRightChain, kOutOfTurn, kEarlyFlag, kLaterBlocks };

// Each of `sums` = 1 / 3 + 1 / 4 + ...: blocks add one after another, which the last bits show.
__global__ void chain(float* sums, int* ticket, int* added, ChainBug bug) {
    const int t = static_cast<int>(threadIdx.x), blocks = static_cast<int>(gridDim.x);
    int& mine = *reinterpret_cast<int*>(shared_bytes());
    if (t == 0) mine = next_ticket(ticket);
    sync_block();
    const int n = bug == kLaterBlocks ? blocks - 1 - mine : mine;
    if (t == kThreads - 1 && n > 0 && bug != kOutOfTurn) wait_for_flag(added, n);
    sync_block();
    if (t == 0 && bug == kEarlyFlag) raise_flag(added, n + 1);
    Vector16 sum = n > 0 ? load16(sums + 4 * t) : Vector16{};
    for (uint32_t& word : sum.word)
        word = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, word) + 1 / static_cast<float>(n + 3));
    store16(sums + 4 * t, sum);
    sync_block();
    if (t == 0 && bug != kEarlyFlag) raise_flag(added, n + 1);
}
int broken_chains(ChainBug bug, std::string& says) {
    constexpr int kBlocks = 12;
    float truth = 0;
    for (int n = 0; n < kBlocks; ++n) truth += 1 / static_cast<float>(n + 3);
    int count = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        DeviceMemory<float> sums(4 * kThreads);
        DeviceMemory<int> numbers(std::vector<int>{0, 0});
        emulator::options().seed = seed;
        try {
            launch("test", chain, dim3(kBlocks), kThreads, 16, nullptr, sums.data(), &numbers[0], &numbers[1], bug);
            count += !std::all_of(sums.data(), sums.data() + 4 * kThreads, [&](float sum) { return sum == truth; });
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
    CHECK(broken_chains(kLaterBlocks, says) == kSeeds);
    check_says(says, "threads 127-127 wait in wait_for_flag (test_emulator.cpp:");
    const bool before = emulator::Races::on;
    emulator::Races::on = true;
    CHECK(broken_chains(kRightChain, says) == 0);
    CHECK(broken_chains(kEarlyFlag, says) > kSeeds / 2);
    check_says(says, "race: ");
    CHECK(broken_chains(kOutOfTurn, says) > kSeeds / 2);
    check_says(says, "race: ");
    emulator::Races::on = before;
}

TEST(rounding_follows_the_manual) {
    const auto bf16 = [](float x) { return from_float<BFloat16>(x).bits; };
    const auto half = [](float x) { return from_float<Float16>(x).bits; };
    const float nan = std::nanf("");
    CHECK(bf16(1.00390625f) == 0x3f80 && bf16(1.01171875f) == 0x3f82 && bf16(-0.0f) == 0x8000 && bf16(nan) == 0x7fff);
    CHECK(bf16(3.4e38f) == 0x7f80 && bf16(1e-40f) == 0x0001 && bf16(-INFINITY) == 0xff80);
    CHECK(half(65519.0f) == 0x7bff && half(65520.0f) == 0x7c00 && half(nan) == 0x7fff && half(-INFINITY) == 0xfc00);
    CHECK(half(0x1p-24f) == 0x0001 && half(0x1p-25f) == 0x0000 && half(0x1.8p-24f) == 0x0002 &&
          half(-0x1p-14f) == 0x8400);
    for (uint32_t i = 0; i < 0x10000; ++i) {
        const auto bits = static_cast<uint16_t>(i);
        const float wide = to_float(Float16{bits}), wider = to_float(BFloat16{bits});
        CHECK(std::isnan(wide) ? (i & 0x7fff) > 0x7c00 : half(wide) == bits);
        CHECK(std::isnan(wider) ? (i & 0x7fff) > 0x7f80 : bf16(wider) == bits);
    }
    CHECK(to_tf32(1.0f + 0x1p-11f) == 0x3f802000 && to_tf32(-1.0f - 0x1p-11f) == 0xbf802000);
    CHECK(to_tf32(nan) == 0x7fc00000 &&
          to_tf32(INFINITY) == 0x7f800000);  // as the H100 does it; the manual says 0x7fffffff
    CHECK(exp2_approx(-127.0f) == 0 && exp2_approx(-126.0f) == 0x1p-126f && exp2_approx(-INFINITY) == 0 &&
          exp2_approx(1e-40f) == 1);
    CHECK(std::isinf(reciprocal_approx(1e-38f)) && reciprocal_approx(0x1p127f) == 0 &&
          reciprocal_approx(4.0f) == 0.25f);
}

}  // namespace

int main() { return run_all(); }
