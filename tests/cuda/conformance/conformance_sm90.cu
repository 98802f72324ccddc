// Every primitive of csrc/cuda/device/hopper.h on fixed inputs, as conformance.cu does it for arch.h.
#include "conformance.h"

#include "cuda/tensor_map.h"

using namespace qemb::cuda;
using namespace qemb::cuda::conformance;

namespace {

constexpr int kShared = 64 * 1024;

QEMB_DEVICE uint32_t word(float x) { return __builtin_bit_cast(uint32_t, x); }
QEMB_DEVICE uint32_t base() { return shared_address(shared_bytes()); }
constexpr int kBarriers = kShared - 64;  // bytes from the start of shared memory
// One barrier for copies: of `arrivals`, visible to all.
QEMB_DEVICE uint32_t make_barrier(uint32_t arrivals) {
    const uint32_t barrier = base() + kBarriers;
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, arrivals);
        fence_mbarrier_init();
    }
    sync_block();
    return barrier;
}

// Values go round three times; the phase decides who may read.
__global__ void barriers_in_memory(const uint32_t* in, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    auto* const values = reinterpret_cast<uint32_t*>(shared_bytes());
    const uint32_t barrier = make_barrier(kThreads);
    uint32_t value = in[t];
    for (int round = 0; round < 3; ++round) {
        values[round * kThreads + t] = value + static_cast<uint32_t>(round);
        mbarrier_arrive(barrier);
        mbarrier_wait(barrier, static_cast<uint32_t>(round % 2));
        value = values[round * kThreads + (t * 37 + 5) % kThreads];
        out[round * kThreads + t] = value;
    }
}
// Two warps hand over to two others, which alone wait.
__global__ void barriers_of_some(const uint32_t* in, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    auto* const values = reinterpret_cast<uint32_t*>(shared_bytes());
    if (t < 64) {
        values[t] = in[t];
        barrier_arrive(3, kThreads);
        barrier_sync(4, 64);
        out[t] = values[63 - t];
    } else {
        barrier_sync(3, kThreads);
        out[t] = values[t - 64] + 1;
    }
}
__global__ void __launch_bounds__(kThreads, 1) registers(const uint32_t* in, uint32_t* out) {
    registers_decrease<64>();
    registers_increase<96>();
    out[threadIdx.x] = static_cast<uint32_t>(opaque(static_cast<int>(in[threadIdx.x])));
}

// Boxes of a tensor, one after another into the same place.
template <int kRank>
__global__ void loads(const uint32_t*, uint32_t* out, const QEMB_GRID_CONSTANT TensorMap map, int bytes, int step) {
    const int t = static_cast<int>(threadIdx.x);
    const uint32_t barrier = make_barrier(1);
    for (int round = 0; round < 4; ++round) {
        if (t == 0) {
            int at[kRank];
            for (int d = 0; d < kRank; ++d) at[d] = (round - 1) * (d == 0 ? step : d + 3);
            mbarrier_expect(barrier, bytes);
            tma_load(base(), map, barrier, at);
        }
        mbarrier_wait(barrier, static_cast<uint32_t>(round % 2));
        for (int i = t; i < bytes / 4; i += kThreads)
            out[round * bytes / 4 + i] = reinterpret_cast<const uint32_t*>(shared_bytes())[i];
        sync_block();
    }
}
__global__ void bulk(const uint32_t* in, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    const uint32_t barrier = make_barrier(1);
    if (t == 0) {
        mbarrier_expect(barrier, 512);
        bulk_load(base() + 16, in + 4, 496, barrier);
        bulk_load(base() + 1024, in, 16, barrier);
    }
    mbarrier_wait(barrier, 0);
    const auto* const values = reinterpret_cast<const uint32_t*>(shared_bytes());
    out[t] = t < 124 ? values[4 + t] : values[256 + t - 124];
}
// Shared memory goes out, whole and over the edges; then some of it is added.
template <int kRank, bool kAdds>
__global__ void stores(const uint32_t* in, uint32_t* out, const QEMB_GRID_CONSTANT TensorMap map, int words, int step) {
    (void)out;
    const int t = static_cast<int>(threadIdx.x);
    for (int i = t; i < words; i += kThreads)
        shared_store4(base() + 4 * i, kAdds ? word(static_cast<float>(in[i] % 1000)) : in[i]);
    fence_async();
    sync_block();
    if (t > 0) return;
    for (int round = 0; round < 3; ++round) {
        int at[kRank];
        for (int d = 0; d < kRank; ++d) at[d] = (round - 1) * (d == 0 ? step : d + 3);
        if (kAdds)
            tma_add(map, base(), at);
        else
            tma_store(map, base(), at);
        bulk_commit();
        bulk_wait_read<0>();
    }
}

// Blocks add runs of floats one after another; the first that finds nothing left reads the sums. numbers: the next run,
// and how many have been added.
constexpr int kRuns = 24;
__global__ void in_turn(const uint32_t* in, uint32_t* out, int* numbers) {
    const int t = static_cast<int>(threadIdx.x);
    auto* const values = reinterpret_cast<float*>(shared_bytes());
    auto* const ticket = reinterpret_cast<int*>(shared_bytes() + 2 * kThreads * 4);
    auto* const sums = reinterpret_cast<float*>(out);
    while (true) {
        if (t == 0) *ticket = next_ticket(numbers);
        sync_block();
        const int n = *ticket;
        if (n >= kRuns) break;
        values[t] = static_cast<float>(in[n * kThreads + t] % 1000) / 7;
        fence_async();
        sync_block();
        if (t == 0 && n == 0) bulk_store(sums, base(), kThreads * 4);
        if (t == 0 && n > 0) {
            wait_for(numbers + 1, n);
            bulk_add(sums, base(), kThreads * 4);
        }
        if (t == 0) {
            bulk_commit();
            bulk_wait<0>();
            publish(numbers + 1, n + 1);
        }
        sync_block();
    }
    if (*ticket > kRuns) return;
    wait_for(numbers + 1, kRuns);
    out[kThreads + t] = word(sums[t] + 1);
}

// d = a b (+ d), a: 64 x 32, b: 32 x kN, both in 16-bit words at `in`, rows of M or N and 32 of K; then d, 64 x kN
// floats. In shared memory the operands begin 32 bytes into their rows, or 16 rows down.
constexpr int kDepth = 32, kA = 0, kB = 8192, kPanel = 64 * 128;
template <class T, int kN, Major kMajorA, Major kMajorB, bool kWords>
__global__ void products(const uint32_t* in, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    const auto place = [](Major major, int mn, int k) {
        const int row = major == Major::kK ? mn : k + 16, column = major == Major::kK ? k + 16 : mn % 64;
        return (major == Major::kK ? 0 : mn / 64 * kPanel) + row * 128 + ((column / 8 ^ row % 8) * 16 + column % 8 * 2);
    };
    const auto element = [&](int i) { return static_cast<uint16_t>(in[i / 2] >> 16 * (i % 2)); };
    for (int i = t; i < 64 * kDepth; i += kThreads)
        *reinterpret_cast<uint16_t*>(shared_bytes() + kA + place(kMajorA, i / kDepth, i % kDepth)) = element(i);
    for (int i = t; i < kN * kDepth; i += kThreads)
        *reinterpret_cast<uint16_t*>(shared_bytes() + kB + place(kMajorB, i / kDepth, i % kDepth)) =
            element(64 * kDepth + i);
    fence_async();
    sync_block();
    const auto row_of = [&](int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; };
    const auto column_of = [&](int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; };
    const uint32_t* const start = in + (64 + kN) * kDepth / 2;
    float d[kN / 2];
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) d[i] = __builtin_bit_cast(float, start[row_of(i) * kN + column_of(i)]);
    uint32_t a[2][4];
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = (row_of(0) + i % 2 * 8) * kDepth + 16 * k + t % 4 * 2 + i / 2 * 8;
            a[k][i] = element(at) | static_cast<uint32_t>(element(at + 1)) << 16;
        }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const auto operand = [&](Major major, int start_of) {
            return major == Major::kK ? matrix(base() + start_of) + (32 + 32 * k >> 4)
                                      : matrix(base() + start_of, kPanel) + (16 * 128 + 2048 * k >> 4);
        };
        if constexpr (kWords)
            wgmma<T, kN, kMajorB>(d, a[k], operand(kMajorB, kB), true);
        else
            wgmma<T, kN, kMajorA, kMajorB>(d, operand(kMajorA, kA), operand(kMajorB, kB), kN != 64 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) out[row_of(i) * kN + column_of(i)] = word(d[i]);
}

template <class T, int kN, Major kMajorA, Major kMajorB, bool kWords>
void run_product(const char* name, Source& source) {
    Words in;
    const auto element = [&] {  // between 1/16 and 16
        const uint32_t bits =
            std::is_same_v<T, BFloat16> ? 0x3d80 + source.bits() % 0x400 : 0x2c00 + source.bits() % 0x2000;
        return bits | (source.bits() & 0x8000);
    };
    for (int i = 0; i < (64 + kN) * kDepth / 2; ++i) {
        const uint32_t low = element();
        in.push_back(low | element() << 16);
    }
    for (int i = 0; i < 64 * kN; ++i) in.push_back(as_word(source.uniform(-8, 8)));
    run(name, "approx", kShared, products<T, kN, kMajorA, kMajorB, kWords>, in, 64 * kN);
    const auto value = [&](int i) { return element_of<T>(in[static_cast<size_t>(i / 2)], i % 2); };
    std::vector<double> truth, bound;
    for (int row = 0; row < 64; ++row)
        for (int column = 0; column < kN; ++column) {
            const bool adds = kWords || kN != 64;
            const double before =
                static_cast<double>(as_float(in[static_cast<size_t>((64 + kN) * kDepth / 2 + row * kN + column)]));
            double sum = adds ? before : 0, size = std::abs(sum);
            for (int k = 0; k < kDepth; ++k) {
                const double product = value(row * kDepth + k) * value((64 + column) * kDepth + k);
                sum += product;
                size += std::abs(product);
            }
            truth.push_back(sum);
            bound.push_back(size * 0x1p-18);
        }
    print(name, "truth", truth);
    print(name, "bound", bound);
}

// A tensor of 16-bit values (or floats) in `memory`, its rows a little apart.
template <class T>
TensorMap make_map(Memory& memory, int rank, const int (&size)[4], const int (&box)[4], bool swizzled) {
    TensorShape shape{memory.data(), rank, {}, {}, {}, swizzled};
    int64_t stride = (size[0] * int64_t(sizeof(T)) + 31) / 16 * 16;
    for (int d = 0; d < rank; ++d) {
        shape.size[d] = size[d];
        shape.box[d] = box[d];
        if (d > 0) shape.byte_stride[d] = stride, stride *= size[d];
    }
    TensorMap map;
    if (!make_tensor_map<T>(map, shape)) throw std::runtime_error("no tensor map");
    return map;
}
template <class T, int kRank>
void run_loads(const char* name, Source& source, const int (&size)[4], const int (&box)[4], bool swizzled) {
    Memory memory(16384);
    for (int i = 0; i < 16384; ++i) memory.data()[i] = source.bits();
    const TensorMap map = make_map<T>(memory, kRank, size, box, swizzled);
    const int bytes = box[0] * box[1] * box[2] * box[3] * static_cast<int>(sizeof(T));
    run(name, "bits", kShared, loads<kRank>, {0}, bytes, map, bytes, box[0] / 2);
}
template <class T, int kRank, bool kAdds>
void run_stores(const char* name, Source& source, const int (&size)[4], const int (&box)[4], bool swizzled) {
    constexpr int kCount = 4096;
    Memory memory(kCount);
    for (int i = 0; i < kCount; ++i)
        memory.data()[i] = kAdds ? as_word(static_cast<float>(source.bits() % 1000)) : source.bits();
    const TensorMap map = make_map<T>(memory, kRank, size, box, swizzled);
    const Words in = source.plain(box[0] * box[1] * box[2] * box[3] * static_cast<int>(sizeof(T)) / 4);
    Memory from(in.size()), none(1);
    std::copy(in.begin(), in.end(), from.data());
    launch(name, stores<kRank, kAdds>, dim3(1), kThreads, kShared, nullptr, static_cast<const uint32_t*>(from.data()),
           none.data(), map, static_cast<int>(in.size()), box[0] / 2);
    finish();
    print(name, "bits", memory, kCount);
}

void run_in_turn(Source& source) {
    const Words in = source.plain(kRuns * kThreads);
    Memory from(in.size()), out(2 * kThreads), numbers(2);
    std::copy(in.begin(), in.end(), from.data());
    std::fill(numbers.data(), numbers.data() + 2, 0);
    launch("in_turn", in_turn, dim3(7), kThreads, kShared, nullptr, static_cast<const uint32_t*>(from.data()),
           out.data(), reinterpret_cast<int*>(numbers.data()));
    finish();
    print("blocks_in_turn", "bits", out, 2 * kThreads);
}

}  // namespace

int main() {
    Source source;
    const Words plain = source.plain(kThreads);
    run("mbarrier", "bits", kShared, barriers_in_memory, plain, 3 * kThreads);
    run("named_barriers", "bits", kShared, barriers_of_some, plain, kThreads);
    run("registers", "bits", kShared, registers, plain, kThreads);
    run("bulk_load", "bits", kShared, bulk, plain, kThreads);
    run_in_turn(source);
    run_loads<BFloat16, 1>("tma_load.1d", source, {100, 1, 1, 1}, {64, 1, 1, 1}, false);
    run_loads<BFloat16, 2>("tma_load.2d.swizzled", source, {100, 20, 1, 1}, {64, 16, 1, 1}, true);
    run_loads<float, 2>("tma_load.2d.float", source, {50, 20, 1, 1}, {32, 12, 1, 1}, true);
    run_loads<Float16, 3>("tma_load.3d", source, {40, 6, 20, 1}, {24, 2, 8, 1}, false);
    run_loads<BFloat16, 3>("tma_load.3d.swizzled", source, {128, 4, 30, 1}, {64, 1, 24, 1}, true);
    run_loads<BFloat16, 4>("tma_load.4d.swizzled", source, {64, 3, 5, 12}, {64, 2, 3, 4}, true);
    run_stores<BFloat16, 2, false>("tma_store.2d.swizzled", source, {100, 20, 1, 1}, {64, 16, 1, 1}, true);
    run_stores<Float16, 3, false>("tma_store.3d", source, {40, 6, 10, 1}, {24, 2, 8, 1}, false);
    run_stores<BFloat16, 4, false>("tma_store.4d", source, {64, 3, 5, 6}, {64, 2, 3, 4}, true);
    run_stores<BFloat16, 1, false>("tma_store.1d", source, {100, 1, 1, 1}, {64, 1, 1, 1}, false);
    run_stores<float, 2, true>("tma_add.2d.swizzled", source, {50, 20, 1, 1}, {32, 12, 1, 1}, true);
    run_stores<float, 1, true>("tma_add.1d", source, {100, 1, 1, 1}, {64, 1, 1, 1}, false);
    constexpr Major kK = Major::kK, kMN = Major::kMN;
    run_product<BFloat16, 64, kK, kK, false>("wgmma.64", source);
    run_product<Float16, 128, kK, kK, false>("wgmma.128.float16", source);
    run_product<BFloat16, 256, kK, kMN, false>("wgmma.256.b_across", source);
    run_product<BFloat16, 128, kMN, kK, false>("wgmma.128.a_across", source);
    run_product<Float16, 64, kMN, kMN, false>("wgmma.64.both_across", source);
    run_product<BFloat16, 64, kK, kMN, true>("wgmma.64.words", source);
    run_product<BFloat16, 128, kK, kK, true>("wgmma.128.words", source);
    run_product<Float16, 256, kK, kMN, true>("wgmma.256.words", source);
}
