// csrc/cuda/device/arch.h on the emulator: the same names as ptx.h, by our reading of the PTX manual.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/block.h"
#include "emulator/matrices.h"
#include "emulator/numbers.h"
#include "emulator/primitive.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define QEMB_DEVICE inline
#define threadIdx (::emulator::running->index)
#define blockIdx (::emulator::Block::current()->index)
#define blockDim (dim3(static_cast<unsigned>(::emulator::Block::current()->size)))
#define gridDim (::emulator::Block::current()->grid)

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace qemb::cuda {

inline char* shared_bytes() { return ::emulator::Block::current()->arena(); }
inline uint32_t shared_address(const void* p) { return ::emulator::Block::current()->address_of(p); }

inline Vector16 load16(const void* from, EMULATOR_LINE) {
    EMULATOR_ENTER("load16");
    Vector16 v;
    std::memcpy(&v, block.vector(const_cast<void*>(from), false, place), 16);
    return v;
}
inline void store16(void* to, const Vector16& v, EMULATOR_LINE) {
    EMULATOR_ENTER("store16");
    std::memcpy(block.vector(to, true, place), &v, 16);
}
inline Vector16 shared_load16(uint32_t address, EMULATOR_LINE) {
    EMULATOR_ENTER("shared_load16");
    Vector16 v;
    std::memcpy(&v, block.vector(block.shared(address, 16, place), false, place), 16);
    return v;
}
inline void shared_store4(uint32_t address, uint32_t word, EMULATOR_LINE) {
    EMULATOR_ENTER("shared_store4");
    void* to = block.shared(address, 4, place);
    block.touch(to, 4, true);
    std::memcpy(to, &word, 4);
}

inline void cp_async16(uint32_t shared, const void* global, bool valid, EMULATOR_LINE) {
    EMULATOR_ENTER("cp_async16");
    block.copy(shared, global, valid, place);
}
inline void cp_async_commit() {
    const ::emulator::Inside inside;
    ::emulator::Block::current()->commit();
}
template <int kPending>
void cp_async_wait() {
    const ::emulator::Inside inside;
    ::emulator::Block::current()->wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared, EMULATOR_LINE) {
    EMULATOR_ENTER("ldmatrix_x4");
    ::emulator::ldmatrix(r, shared, false, place);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared, EMULATOR_LINE) {
    EMULATOR_ENTER("ldmatrix_x4_trans");
    ::emulator::ldmatrix(r, shared, true, place);
}
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_LINE) {
    EMULATOR_ENTER("mma");
    ::emulator::MmaLane lane{d, a, {b0, b1}};
    block.meet_warp(place, &lane, ::emulator::mma_m16n8k16<T>);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_LINE) {
    EMULATOR_ENTER("mma_tf32");
    ::emulator::MmaLane lane{d, a, {b0, b1}};
    block.meet_warp(place, &lane, ::emulator::mma_m16n8k8);
}

inline int opaque(int x) { return x; }

// No accesses of the kernel's: not instrumented for the race detector.
#define EMULATOR_ATOMIC __attribute__((no_sanitize("thread"))) inline
EMULATOR_ATOMIC int next_ticket(int* counter, EMULATOR_LINE) {
    EMULATOR_ENTER("next_ticket");
    if (!block.in_arena(counter)) block.linger(place);
    ++::emulator::counters().tickets;
    return (*counter)++;
}
EMULATOR_ATOMIC uint64_t atomic_max(uint64_t* p, uint64_t value, EMULATOR_LINE) {
    EMULATOR_ENTER("atomic_max");
    block.linger(place);
    const uint64_t before = *p;
    if (value > before) *p = value;
    return before;
}
EMULATOR_ATOMIC uint64_t load_relaxed(const uint64_t* p) { return *p; }
EMULATOR_ATOMIC void store_relaxed(uint64_t* p, uint64_t value) { *p = value; }
#undef EMULATOR_ATOMIC

inline void raise_flag(int* flag, int value, EMULATOR_LINE) {
    EMULATOR_ENTER("raise_flag");
    if (::emulator::Races::on) ::emulator::races().publish(flag);
    *flag = value;
    block.wake_others();
}
inline void wait_for_flag(const int* flag, int value, EMULATOR_LINE) {
    EMULATOR_ENTER("wait_for_flag");
    while (*flag < value) block.sleep(::emulator::Block::kElsewhere, place);
    if (::emulator::Races::on) ::emulator::races().acquire_flag(flag);
}

// Of the lane numbers the lowest five bits count.
template <class T>
T shuffle_xor(T x, int mask, EMULATOR_LINE) {
    EMULATOR_ENTER("shuffle_xor");
    return block.exchange(x, ::emulator::running->lane ^ mask, place);
}
template <class T>
T shuffle(T x, int lane, EMULATOR_LINE) {
    EMULATOR_ENTER("shuffle");
    return block.exchange(x, lane, place);
}
inline bool any_lane(bool x, EMULATOR_LINE) {
    EMULATOR_ENTER("any_lane");
    block.meet_warp(place, &x, [](void** slots) {
        const bool any = std::any_of(slots, slots + 32, [](void* slot) { return *static_cast<bool*>(slot); });
        for (int lane = 0; lane < 32; ++lane) *static_cast<bool*>(slots[lane]) = any;
    });
    return x;
}
inline void sync_warp(EMULATOR_LINE) {
    EMULATOR_ENTER("sync_warp");
    block.sync_warp(place);
}
inline void sync_block(EMULATOR_LINE) {
    EMULATOR_ENTER("sync_block");
    block.sync(place);
}

}  // namespace qemb::cuda
