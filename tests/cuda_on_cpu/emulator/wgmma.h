// wgmma: products of a warpgroup that run after they are issued, read shared memory only then, and own their registers
// until a wait. Operands in shared memory are described by the manual's canonical layouts, of which the one with
// 128-byte swizzle is known here: K along rows of 128 bytes (8 rows an atom, atoms `stride` apart), or M or N along
// them (64 wide, 8 of K an atom; atoms `stride` apart along K, `leading` apart along M or N).
#pragma once

#include <memory>

#include "emulator/matrices.h"
#include "emulator/tensor_map.h"

namespace emulator {

struct WgmmaOperand {
    uint32_t start, leading, stride;
    bool k_major;
    int group;  // of warps

    WgmmaOperand(uint64_t descriptor, bool k_major, int group, const Place& place)
        : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
          leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
          stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
          k_major(k_major),
          group(group) {
        if (descriptor >> 62 != 1) fail(place.text() + ": the descriptor has another swizzle than 128 bytes");
        if (start >> 7 & 7) fail(place.text() + ": the descriptor starts within a swizzled atom");
    }
    // Eight elements from (mn, k) on, along the dimension that is contiguous.
    const uint16_t* chunk(int mn, int k, const Place& place) const {
        const auto at = k_major ? static_cast<uint32_t>(mn / 8) * stride + static_cast<uint32_t>(mn % 8 * 128 + k * 2)
                                : static_cast<uint32_t>(mn / 64) * leading + static_cast<uint32_t>(k / 8) * stride +
                                      static_cast<uint32_t>(k % 8 * 128 + mn % 64 * 2);
        char* const chunk = Block::current()->touch_async(swizzle128(start + at), 16, place);
        Block::current()->touch_for_group(chunk, 16, group);
        return reinterpret_cast<const uint16_t*>(chunk);
    }
    // to[k][mn] of 16 x kWidth elements.
    template <class T, int kWidth>
    void read(float (&to)[16][kWidth], const Place& place) const {
        for (int i = 0; i < (k_major ? kWidth : 16); ++i)
            for (int j = 0; j < (k_major ? 16 : kWidth); j += 8) {
                const uint16_t* from = k_major ? chunk(i, j, place) : chunk(j, i, place);
                for (int e = 0; e < 8; ++e) (k_major ? to[j + e][i] : to[i][j + e]) = qemb::cuda::to_float(T{from[e]});
            }
    }
};

// The sums of one or more products that follow each other. While they are in flight the registers hold a NaN of ours.
struct Accumulators {
    static constexpr uint32_t kInFlight = 0xfffffff5;
    float* registers[128];
    int count;  // for each thread
    int pending = 0;
    std::vector<float> values;  // [64, 2 * count]

    static int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
    static int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }
    float& value(int thread, int i) {
        return values[static_cast<size_t>(row_of(thread, i) * 2 * count + column_of(thread, i))];
    }
    void take() {
        values.resize(static_cast<size_t>(128 * count));
        for (int t = 0; t < 128; ++t)
            for (int i = 0; i < count; ++i) {
                value(t, i) = registers[t][i];
                registers[t][i] = __builtin_bit_cast(float, kInFlight);
            }
    }
    void give(const Place& place) {
        for (int t = 0; t < 128; ++t)
            for (int i = 0; i < count; ++i) {
                if (__builtin_bit_cast(uint32_t, registers[t][i]) != kInFlight)
                    fail(place.text() + ": the accumulators were written while the product was in flight");
                registers[t][i] = value(t, i);
            }
    }
};
struct WgmmaThread {
    float* d;
    const uint32_t* a;  // or null: in shared memory
    uint64_t a_descriptor, b_descriptor;
    bool accumulate;
};

// d = a b (+ d): 64 x kN, depth 16.
template <class T, int kN>
void wgmma(WgmmaThread self, bool a_k_major, bool b_k_major, const Place& place) {
    typedef float Row __attribute__((vector_size(32)));
    Block::current()->meet_group(place, &self, [&](void** slots, Products& products) {
        auto& in_flight = products.sums;
        const auto thread = [&](int t) -> const WgmmaThread& { return *static_cast<WgmmaThread*>(slots[t]); };
        if (!products.fenced) fail(place.text() + ": no wgmma_fence since the registers were last free");
        std::shared_ptr<Accumulators> sums;
        for (const auto& each : in_flight) {
            const float *ours = self.d, *theirs = each->registers[running->id % 128];
            if (ours == theirs && each->count == kN / 2) sums = each;
            if (!sums && ours < theirs + each->count && theirs < ours + kN / 2)
                fail(place.text() + ": some of the accumulators are in flight with another product");
        }
        if (!sums) {
            sums = std::make_shared<Accumulators>();
            sums->count = kN / 2;
            for (int t = 0; t < 128; ++t) sums->registers[t] = thread(t).d;
            sums->take();
            in_flight.push_back(sums);
        }
        ++sums->pending;
        struct Left {
            const uint32_t* registers[128];
            uint32_t words[128][4];
        };
        std::shared_ptr<Left> left;
        if (self.a) {
            left = std::make_shared<Left>();
            for (int t = 0; t < 128; ++t) {
                left->registers[t] = thread(t).a;
                std::memcpy(left->words[t], thread(t).a, 16);
            }
        }
        for (int t = 0; t < 128; ++t)
            if (thread(t).a_descriptor != self.a_descriptor || thread(t).b_descriptor != self.b_descriptor ||
                thread(t).accumulate != self.accumulate)
                fail(place.text() + ": the threads of the warpgroup disagree");
        counters().wgmma += 1;
        products.open.push_back([=, &in_flight, group = running->id / 128, accumulate = self.accumulate,
                                 a = self.a_descriptor, b = self.b_descriptor] {
            alignas(32) static float right[16][kN], left_columns[16][64];
            WgmmaOperand(b, b_k_major, group, place).read<T>(right, place);
            if (left) {
                for (int t = 0; t < 128; ++t)
                    for (int i = 0; i < 4; ++i) {
                        if (left->registers[t][i] != left->words[t][i])
                            fail(place.text() + ": the left operand was written while the product was in flight");
                        const int row = Accumulators::row_of(t, 0) + i % 2 * 8, k = t % 4 * 2 + i / 2 * 8;
                        left_columns[k][row] = qemb::cuda::unpack<T>(left->words[t][i], 0);
                        left_columns[k + 1][row] = qemb::cuda::unpack<T>(left->words[t][i], 1);
                    }
            } else {
                WgmmaOperand(a, a_k_major, group, place).read<T>(left_columns, place);
            }
            if (!accumulate) std::fill(sums->values.begin(), sums->values.end(), 0.0f);
            for (int row = 0; row < 64; ++row)
                for (int n = 0; n < kN; n += 8) {
                    Row sum = {}, more;
                    for (int k = 0; k < 16; ++k) {
                        std::memcpy(&more, &right[k][n], sizeof more);
                        sum += left_columns[k][row] * more;
                    }
                    float* to = &sums->values[static_cast<size_t>(row * kN + n)];
                    std::memcpy(&more, to, sizeof more);
                    more += sum;
                    std::memcpy(to, &more, sizeof more);
                }
            if (--sums->pending == 0) {
                sums->give(place);
                std::erase(in_flight, sums);
            }
        });
    });
}

}  // namespace emulator
