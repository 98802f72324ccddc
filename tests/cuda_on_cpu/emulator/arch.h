// csrc/cuda/device/arch.h on the emulator: the same names as ptx.h, by our reading of the PTX manual.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/block.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define QEMB_DEVICE inline
#define threadIdx (::emulator::Block::current()->self().index)
#define blockIdx (::emulator::Block::current()->index)
#define gridDim (::emulator::Block::current()->grid)

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace qemb::cuda {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
struct alignas(16) Vector16 {
    uint32_t word[4];
};

namespace bits {
template <class To, class From>
To cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace bits

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits::cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) { return static_cast<float>(bits::cast<_Float16>(x.bits)); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    if (x != x) return {0x7fff};
    uint32_t word = bits::cast<uint32_t>(x);
    word += 0x7fff + (word >> 16 & 1);
    return {static_cast<uint16_t>(word >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
    return {bits::cast<uint16_t>(static_cast<_Float16>(x))};
}

template <class T>
uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
float unpack(uint32_t word, int half) {
    return to_float(T{static_cast<uint16_t>(half ? word >> 16 : word)});
}

template <class T>
uint32_t multiply_pair(uint32_t a, uint32_t b) {
    return pack<T>(unpack<T>(a, 0) * unpack<T>(b, 0), unpack<T>(a, 1) * unpack<T>(b, 1));
}

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return std::fabs(y) < 1.17549435e-38f ? 0.0f : y;  // ftz
}
inline float reciprocal_approx(float x) {
    const float y = 1.0f / x;
    return std::fabs(y) < 1.17549435e-38f ? std::copysign(0.0f, y) : y;  // ftz
}
inline uint32_t to_tf32(float x) {  // round to nearest, ties away
    const uint32_t word = bits::cast<uint32_t>(x);
    return (word & 0x7f800000) == 0x7f800000 ? word : (word + 0x1000) & ~0x1fffu;
}

inline char* shared_bytes() { return ::emulator::Block::current()->arena(); }
inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const char*>(p) - ::emulator::Block::current()->arena());
}

namespace bits {
inline void check16(const void* p, const char* what) {
    auto* block = ::emulator::Block::current();
    if (reinterpret_cast<uintptr_t>(p) % 16) ::emulator::fail(std::string(what) + ": misaligned address");
    if (block->in_arena(p)) block->shared(shared_address(p), 16, 16, what);
}
}  // namespace bits
inline Vector16 load16(const void* from) {
    bits::check16(from, "load16");
    Vector16 v;
    std::memcpy(&v, from, 16);
    return v;
}
inline void store16(void* to, const Vector16& v) {
    bits::check16(to, "store16");
    std::memcpy(to, &v, 16);
}

inline void shared_store4(uint32_t address, uint32_t word) {
    std::memcpy(::emulator::Block::current()->shared(address, 4, 4, "shared_store4"), &word, 4);
}
inline Vector16 shared_load16(uint32_t address) {
    return load16(::emulator::Block::current()->shared(address, 16, 16, "shared_load16"));
}

inline void cp_async16(uint32_t shared, const void* global, bool valid) {
    ::emulator::Block::current()->copy(shared, global, valid);
}
inline void cp_async_commit() { ::emulator::Block::current()->commit(); }
template <int kPending>
void cp_async_wait() {
    ::emulator::Block::current()->wait(kPending);
}

namespace bits {
// Lane i gives the address of row i % 8 of matrix i / 8; lane l receives elements (l / 4, l % 4 * 2 and + 1) of each matrix.
inline void ldmatrix(uint32_t (&r)[4], uint32_t shared, bool transposed, const char* what) {
    struct Lane {
        uint32_t address;
        uint32_t* to;
    } lane{shared, r};
    auto* block = ::emulator::Block::current();
    block->meet_warp(what, &lane, [&](void** slots) {
        uint16_t matrix[4][8][8];
        auto& counters = ::emulator::Block::counters();
        for (int m = 0; m < 4; ++m) {
            int rows_at[8] = {};
            for (int row = 0; row < 8; ++row) {
                const uint32_t address = static_cast<Lane*>(slots[m * 8 + row])->address;
                std::memcpy(matrix[m][row], block->shared(address, 16, 16, what), 16);
                ++rows_at[address / 16 % 8];
            }
            ++counters.ldmatrix;
            counters.bank_conflicts += static_cast<uint64_t>(*std::max_element(rows_at, rows_at + 8) - 1);
        }
        for (int l = 0; l < 32; ++l) {
            const int row = l / 4, column = l % 4 * 2;
            for (int m = 0; m < 4; ++m) {
                const uint16_t low = transposed ? matrix[m][column][row] : matrix[m][row][column];
                const uint16_t high = transposed ? matrix[m][column + 1][row] : matrix[m][row][column + 1];
                static_cast<Lane*>(slots[l])->to[m] = low | static_cast<uint32_t>(high) << 16;
            }
        }
    });
}

struct MmaLane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};
}  // namespace bits

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) { bits::ldmatrix(r, shared, false, "ldmatrix_x4"); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) { bits::ldmatrix(r, shared, true, "ldmatrix_x4_trans"); }

// Lane l, with g = l / 4 and t = l % 4: a holds (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) and their right neighbours;
// b holds (k, n) = (2t, g), (2t + 8, g) and their lower neighbours; d holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    bits::MmaLane lane{d, a, {b0, b1}};
    ::emulator::Block::current()->meet_warp("mma", &lane, [](void** slots) {
        float left[16][16], right[8][16];
        for (int l = 0; l < 32; ++l) {
            const auto& x = *static_cast<bits::MmaLane*>(slots[l]);
            const int g = l / 4, t = l % 4 * 2;
            for (int h = 0; h < 2; ++h) {
                left[g][t + h] = unpack<T>(x.a[0], h);
                left[g + 8][t + h] = unpack<T>(x.a[1], h);
                left[g][t + 8 + h] = unpack<T>(x.a[2], h);
                left[g + 8][t + 8 + h] = unpack<T>(x.a[3], h);
                right[g][t + h] = unpack<T>(x.b[0], h);
                right[g][t + 8 + h] = unpack<T>(x.b[1], h);
            }
        }
        for (int l = 0; l < 32; ++l) {
            const auto& x = *static_cast<bits::MmaLane*>(slots[l]);
            for (int i = 0; i < 4; ++i) {
                const float* row = left[l / 4 + i / 2 * 8];
                const float* column = right[l % 4 * 2 + i % 2];
                float sum = 0;
                for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
                x.d[i] += sum;
            }
        }
    });
}

// Lane l, with g = l / 4 and t = l % 4: a holds (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b holds (k, n) = (t, g), (t + 4, g).
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    bits::MmaLane lane{d, a, {b0, b1}};
    ::emulator::Block::current()->meet_warp("mma_tf32", &lane, [](void** slots) {
        float left[16][8], right[8][8];
        const auto value = [](uint32_t word) { return bits::cast<float>(word & ~0x1fffu); };
        for (int l = 0; l < 32; ++l) {
            const auto& x = *static_cast<bits::MmaLane*>(slots[l]);
            const int g = l / 4, t = l % 4;
            left[g][t] = value(x.a[0]);
            left[g + 8][t] = value(x.a[1]);
            left[g][t + 4] = value(x.a[2]);
            left[g + 8][t + 4] = value(x.a[3]);
            right[g][t] = value(x.b[0]);
            right[g][t + 4] = value(x.b[1]);
        }
        for (int l = 0; l < 32; ++l) {
            const auto& x = *static_cast<bits::MmaLane*>(slots[l]);
            for (int i = 0; i < 4; ++i) {
                const float* row = left[l / 4 + i / 2 * 8];
                const float* column = right[l % 4 * 2 + i % 2];
                float sum = 0;
                for (int k = 0; k < 8; ++k) sum += row[k] * column[k];
                x.d[i] += sum;
            }
        }
    });
}

namespace bits {
template <class T>
T exchange(T x, int from, const char* what) {
    struct Lane {
        T in, out;
        int from;
    } lane{x, x, from};
    ::emulator::Block::current()->meet_warp(what, &lane, [](void** slots) {
        for (int l = 0; l < 32; ++l) {
            auto* to = static_cast<Lane*>(slots[l]);
            to->out = static_cast<Lane*>(slots[to->from & 31])->in;
        }
    });
    return lane.out;
}
}  // namespace bits
template <class T>
T shuffle_xor(T x, int mask) {
    return bits::exchange(x, ::emulator::Block::current()->self().id % 32 ^ mask, "shuffle_xor");
}
template <class T>
T shuffle(T x, int lane) {
    return bits::exchange(x, lane, "shuffle");
}
inline bool any_lane(bool x) {
    int any = x;
    for (int mask = 16; mask > 0; mask /= 2) any |= shuffle_xor(any, mask);
    return any != 0;
}
inline void sync_warp() {
    ::emulator::Block::current()->meet_warp("sync_warp", nullptr, [](void**) {});
}
inline void sync_block() { ::emulator::Block::current()->sync(); }

}  // namespace qemb::cuda
