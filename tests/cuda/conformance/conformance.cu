// Every primitive of csrc/cuda/device/arch.h on fixed inputs, its results printed as words: built by nvcc they are the
// device's, built by g++ the emulator's.
#include "conformance.h"

#include "cuda/device/reduce.h"

using namespace qemb::cuda;
using namespace qemb::cuda::conformance;

namespace {

constexpr int kShared = 16 * 1024;

QEMB_DEVICE float float_at(const uint32_t* in, int i) { return __builtin_bit_cast(float, in[i]); }
QEMB_DEVICE uint32_t word(float x) { return __builtin_bit_cast(uint32_t, x); }

// Element by element: kIn words in, one out.
template <class T>
struct Widen {
    static constexpr int kIn = 1;
    static QEMB_DEVICE uint32_t apply(const uint32_t* in) { return word(to_float(T{static_cast<uint16_t>(in[0])})); }
};
template <class T>
struct Round {
    static constexpr int kIn = 1;
    static QEMB_DEVICE uint32_t apply(const uint32_t* in) { return from_float<T>(float_at(in, 0)).bits; }
};
template <class T>
struct Pack {
    static constexpr int kIn = 2;
    static QEMB_DEVICE uint32_t apply(const uint32_t* in) { return pack<T>(float_at(in, 0), float_at(in, 1)); }
};
template <class T, int kHalf>
struct Unpack {
    static constexpr int kIn = 1;
    static QEMB_DEVICE uint32_t apply(const uint32_t* in) { return word(unpack<T>(in[0], kHalf)); }
};
template <class T>
struct MultiplyPair {
    static constexpr int kIn = 2;
    static QEMB_DEVICE uint32_t apply(const uint32_t* in) { return multiply_pair<T>(in[0], in[1]); }
};
struct Tf32 {
    static constexpr int kIn = 1;
    static QEMB_DEVICE uint32_t apply(const uint32_t* in) { return to_tf32(float_at(in, 0)); }
};
struct Exp2 {
    static constexpr int kIn = 1;
    static QEMB_DEVICE uint32_t apply(const uint32_t* in) { return word(exp2_approx(float_at(in, 0))); }
};
struct Reciprocal {
    static constexpr int kIn = 1;
    static QEMB_DEVICE uint32_t apply(const uint32_t* in) { return word(reciprocal_approx(float_at(in, 0))); }
};
struct RootReciprocal {
    static constexpr int kIn = 1;
    static QEMB_DEVICE uint32_t apply(const uint32_t* in) { return word(rsqrtf(float_at(in, 0))); }
};
template <class Op>
__global__ void each(const uint32_t* in, uint32_t* out, int count) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) out[i] = Op::apply(in + i * Op::kIn);
}

// One block each. `in` holds 4 words for a thread, unless said otherwise.
__global__ void vectors(const uint32_t* in, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    store16(out + 4 * (t ^ 5), load16(in + 4 * t));
}
__global__ void shared_vectors(const uint32_t* in, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    const uint32_t base = shared_address(shared_bytes());
    for (int i = 0; i < 4; ++i) shared_store4(base + 16 * (t ^ 33) + 4 * i, in[4 * t + i]);
    sync_block();
    store16(out + 4 * t, shared_load16(base + 16 * t));
}
__global__ void addresses(const uint32_t*, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    out[t] = shared_address(shared_bytes() + 20 * t) - shared_address(shared_bytes());
}
__global__ void copies(const uint32_t* in, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    const uint32_t base = shared_address(shared_bytes());
    cp_async16(base + 16 * t, in + 4 * t, t % 3 != 0);
    cp_async_commit();
    cp_async16(base + 16 * (kThreads + t), in + 4 * (kThreads - 1 - t), t % 5 != 0);
    cp_async_commit();
    cp_async_wait<1>();
    sync_block();
    store16(out + 4 * t, shared_load16(base + 16 * (t ^ 64)));
    cp_async_wait<0>();
    sync_block();
    store16(out + 4 * (kThreads + t), shared_load16(base + 16 * (kThreads + (t ^ 64))));
}
// Every lane gives a row of its own choice.
template <bool kTransposed>
__global__ void matrices(const uint32_t* in, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    store16(shared_bytes() + 16 * t, load16(in + 4 * t));
    sync_block();
    uint32_t words[4];
    const uint32_t row = shared_address(shared_bytes()) + 16 * ((t * 37 + 11) % kThreads);
    if (kTransposed)
        ldmatrix_x4_trans(words, row);
    else
        ldmatrix_x4(words, row);
    for (int i = 0; i < 4; ++i) out[4 * t + i] = words[i];
}
// `in`: for each lane four words of a, two of b, four of d; kTiles warps' worth.
constexpr int kTiles = 16;
template <class T>
__global__ void products(const uint32_t* in, uint32_t* out) {
    for (int tile = static_cast<int>(threadIdx.x) / 32; tile < kTiles; tile += kThreads / 32) {
        const int lane = tile * 32 + static_cast<int>(threadIdx.x) % 32;
        const uint32_t* mine = in + 10 * lane;
        const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]};
        float d[4] = {float_at(mine, 6), float_at(mine, 7), float_at(mine, 8), float_at(mine, 9)};
        if constexpr (sizeof(T) == 4)
            mma_tf32(d, a, mine[4], mine[5]);
        else
            mma<T>(d, a, mine[4], mine[5]);
        for (int i = 0; i < 4; ++i) out[4 * lane + i] = word(d[i]);
    }
}
__global__ void exchanges(const uint32_t* in, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    out += t;
    int row = 0;
    for (const int mask : {1, 2, 4, 8, 16, 21, 31}) out[kThreads * row++] = shuffle_xor(in[4 * t], mask);
    for (const int lane : {0, 5, 31, 32, 77, -1}) out[kThreads * row++] = shuffle(in[4 * t], lane);
    out[kThreads * row++] = word(shuffle(float_at(in, 4 * t), t * 3 % 32));
    const uint64_t wide = in[4 * t] | static_cast<uint64_t>(in[4 * t + 1]) << 32;
    out[kThreads * row++] = static_cast<uint32_t>(shuffle_xor(wide, 9) >> 32);
    out[kThreads * row++] = any_lane(in[4 * t + 2] % 40 == 0);
    out[kThreads * row++] = any_lane(t == 70);
}
constexpr int kExchanges = 17;
__global__ void barriers(const uint32_t* in, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    auto* values = reinterpret_cast<uint32_t*>(shared_bytes());
    values[t] = in[4 * t];
    sync_warp();
    out[t] = values[t ^ 17];
    sync_block();
    values[t] = out[t] + 1;
    sync_block();
    out[kThreads + t] = values[kThreads - 1 - t];
}
// Threads draw tickets, raise a number and wait for each other; the order is open, what comes of it is not.
__global__ void counters(const uint32_t* in, uint32_t* out) {
    const int t = opaque(static_cast<int>(threadIdx.x));
    auto* const shared = reinterpret_cast<int*>(shared_bytes());
    auto* const tickets = reinterpret_cast<int*>(out + 4 * kThreads);
    auto* const numbers = reinterpret_cast<uint64_t*>(out + 4 * kThreads + 2);
    const auto number = [&](int i) { return static_cast<uint64_t>(in[4 * i]) << 32 | in[4 * i + 1]; };
    if (t == 0) {
        *shared = *tickets = 0;
        out[4 * kThreads + 4] = 0;
        store_relaxed(numbers, number(0));
    }
    sync_block();
    out[next_ticket(shared)] = 7;
    out[kThreads + next_ticket(tickets)] = 9;
    out[2 * kThreads + t] = atomic_max(numbers, number(t)) >= number(0);
    sync_block();
    out[3 * kThreads + t] = static_cast<uint32_t>(load_relaxed(numbers) >> (t % 2 * 32));
    // What the last thread has written and announces, the first one has read.
    auto* const flag = reinterpret_cast<int*>(out + 4 * kThreads + 4);
    if (t == kThreads - 1) {
        out[4 * kThreads + 5] = in[0] + 1;
        raise_flag(flag, 3);
    } else if (t == 0) {
        wait_for_flag(flag, 2);
        out[4 * kThreads + 6] = out[4 * kThreads + 5] + 1;
    }
}
__global__ void reductions(const uint32_t* in, uint32_t* out) {
    const int t = static_cast<int>(threadIdx.x);
    const float x = float_at(in, 4 * t);
    out[t] = word(warp_sum(x));
    out[kThreads + t] = word(warp_max(x));
    out[2 * kThreads + t] = word(block_sum<kThreads / 32>(x, reinterpret_cast<float*>(shared_bytes())));
}

const Words kSpecial = {0x00000000, 0x80000000, 0x00000001, 0x807fffff, 0x00800000, 0x7f7fffff, 0x7f800000,
                        0xff800000, 0x7fc00000, 0x7f800001, 0x3f800000, 0x3f808000, 0x3f818000, 0x3f801000,
                        0x3f803000, 0x477fefff, 0x477ff000, 0x33000000, 0x33000001, 0x33800000, 0x387fe000,
                        0x387ff000, 0x38800000, 0x7f7f7fff, 0x7f7f8000, 0xc2fc0000, 0xc2fc0001};
Words with_special(Words words) {
    words.insert(words.begin(), kSpecial.begin(), kSpecial.end());
    if (words.size() % 2) words.push_back(0);
    return words;
}

template <class... Extra>
void run(const char* name, const char* kind, void (*kernel)(const uint32_t*, uint32_t*, Extra...), const Words& in,
         int count, Extra... extra) {
    conformance::run(name, kind, kShared, kernel, in, count, extra...);
}
template <class Op>
void run_each(const char* name, const char* kind, const Words& in) {
    const int count = static_cast<int>(in.size()) / Op::kIn;
    run(name, kind, each<Op>, in, count, count);
}
// Relative bound; what ftz may flush may also be the smallest normal number.
template <class Op, class Truth>
void run_approx(const char* name, const Words& in, Truth truth, double bound) {
    run_each<Op>(name, "approx", in);
    std::vector<double> right, allowed;
    for (const uint32_t x : in) {
        const double y = truth(static_cast<double>(as_float(x)));
        right.push_back(std::abs(y) < 0x1p-126 ? std::copysign(0.0, y) : y);
        allowed.push_back(bound * std::abs(y) + (std::abs(y) < 0x1.01p-126 ? 0x1.01p-126 : 0));
    }
    print(name, "truth", right);
    print(name, "bound", allowed);
}

// A product from the definition, by the layout of the manual. Tensor cores may add in any order and truncate.
template <class T>
void run_product(const char* name, const Words& in) {
    constexpr int kDepth = sizeof(T) == 4 ? 8 : 16, kPerWord = kDepth / 8;
    run(name, "approx", products<T>, in, kTiles * 128);
    const auto value = [](uint32_t bits, int half) {
        if constexpr (sizeof(T) == 4)
            return static_cast<double>(as_float(bits & ~0x1fffu));
        else
            return element_of<T>(bits, half);
    };
    std::vector<double> truth, bound;
    for (int tile = 0; tile < kTiles; ++tile) {
        const auto lane = [&](int l, int i) { return in[static_cast<size_t>(10 * (32 * tile + l) + i)]; };
        // Word of k: lanes 4 g + t, t = k / kPerWord % 4; k beyond that is in the next register.
        const auto left = [&](int row, int k) {
            return value(lane(row % 8 * 4 + k / kPerWord % 4, row / 8 + k / (4 * kPerWord) * 2), k % kPerWord);
        };
        const auto right = [&](int k, int column) {
            return value(lane(column * 4 + k / kPerWord % 4, 4 + k / (4 * kPerWord)), k % kPerWord);
        };
        for (int l = 0; l < 32; ++l) {
            for (int i = 0; i < 4; ++i) {
                double sum = static_cast<double>(as_float(lane(l, 6 + i))), size = std::abs(sum);
                for (int k = 0; k < kDepth; ++k) {
                    const double product = left(l / 4 + i / 2 * 8, k) * right(k, l % 4 * 2 + i % 2);
                    sum += product;
                    size += std::abs(product);
                }
                truth.push_back(sum);
                bound.push_back(size * 0x1p-19);
            }
        }
    }
    print(name, "truth", truth);
    print(name, "bound", bound);
}

}  // namespace

int main() {
    Source source;
    const Words any = with_special(source.plain(1000)), vector_words = source.plain(4 * kThreads);
    const Words near_one = with_special(source.floats(1000, -4, 4));
    Words halves(4096);
    for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint32_t>(i * 16 + i / 256);

    run_each<Widen<BFloat16>>("to_float.bfloat16", "float", halves);
    run_each<Widen<Float16>>("to_float.float16", "float", halves);
    run_each<Round<BFloat16>>("from_float.bfloat16", "bits", any);
    run_each<Round<Float16>>("from_float.float16", "bits", any);
    run_each<Round<BFloat16>>("from_float.bfloat16.near", "bits", near_one);
    run_each<Round<Float16>>("from_float.float16.near", "bits", near_one);
    run_each<Pack<BFloat16>>("pack.bfloat16", "bits", near_one);
    run_each<Pack<Float16>>("pack.float16", "bits", near_one);
    run_each<Unpack<BFloat16, 0>>("unpack.bfloat16.low", "float", any);
    run_each<Unpack<BFloat16, 1>>("unpack.bfloat16.high", "float", any);
    run_each<Unpack<Float16, 0>>("unpack.float16.low", "float", any);
    run_each<Unpack<Float16, 1>>("unpack.float16.high", "float", any);
    // Normal numbers of either sign between 1/16 and 16.
    const auto pair = [&](uint32_t low, uint32_t span) {
        return source.words(1000, [&] {
            const auto half = [&] { return low + source.bits() % span + (source.bits() & 0x8000); };
            return half() | half() << 16;
        });
    };
    const Words bfloat16_pairs = pair(0x3d80, 0x400), float16_pairs = pair(0x2c00, 0x2000);
    run_each<MultiplyPair<BFloat16>>("multiply_pair.bfloat16", "bits", bfloat16_pairs);
    run_each<MultiplyPair<Float16>>("multiply_pair.float16", "bits", float16_pairs);
    run_each<Tf32>("to_tf32", "bits", any);
    const auto positive = with_special(source.words(1000, [&] { return source.bits() % 0x7f000000; }));
    run_approx<Exp2>(
        "exp2_approx", with_special(source.floats(1000, -140, 140)),
        [](double x) {
            const double y = std::exp2(x);
            return y > 0x1.ffffffp127 ? INFINITY : y;
        },
        0x1p-21);
    run_approx<Reciprocal>(
        "reciprocal_approx", any,
        [](double x) {
            const double y = 1 / (std::abs(x) < 0x1p-126 ? std::copysign(0.0, x) : x);
            return y;
        },
        0x1p-22);
    run_approx<RootReciprocal>("rsqrtf", positive, [](double x) { return 1 / std::sqrt(x); }, 0x1p-21);

    run("load16.store16", "bits", vectors, vector_words, 4 * kThreads);
    run("shared_store4.shared_load16", "bits", shared_vectors, vector_words, 4 * kThreads);
    run("shared_address", "bits", addresses, vector_words, kThreads);
    run("cp_async16", "bits", copies, vector_words, 8 * kThreads);
    run("ldmatrix_x4", "bits", matrices<false>, vector_words, 4 * kThreads);
    run("ldmatrix_x4_trans", "bits", matrices<true>, vector_words, 4 * kThreads);
    const auto operands = [&](auto element) {
        Words words;
        for (int lane = 0; lane < 32 * kTiles; ++lane) {
            for (int i = 0; i < 6; ++i) words.push_back(element());
            for (int i = 0; i < 4; ++i) words.push_back(as_word(source.uniform(-8, 8)));
        }
        return words;
    };
    run_product<BFloat16>("mma.bfloat16", operands([&] { return (source.bits() & 0x83ff83ff) + 0x3d803d80; }));
    run_product<Float16>("mma.float16", operands([&] { return (source.bits() & 0x9fff9fff) + 0x2c002c00; }));
    run_product<float>("mma_tf32", operands([&] { return as_word(source.uniform(-4, 4)); }));
    run("shuffles", "bits", exchanges, vector_words, kExchanges * kThreads);
    run("barriers", "bits", barriers, vector_words, 2 * kThreads);
    run("counters", "bits", counters, vector_words, 4 * kThreads + 7);
    run("reductions", "float", reductions, source.floats(4 * kThreads, -2, 2), 3 * kThreads);
}
