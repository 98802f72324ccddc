// csrc/cuda/device/hopper.h on the emulator: the same names as ptx_sm90.h, by our reading of the PTX manual.
#pragma once

#include "emulator/arch.h"
#include "emulator/wgmma.h"

#define QEMB_GRID_CONSTANT

namespace qemb::cuda {

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals, EMULATOR_LINE) {
    EMULATOR_ENTER("mbarrier_init");
    ::emulator::mbarrier_init(barrier, arrivals, place);
}
inline void mbarrier_arrive(uint32_t barrier, EMULATOR_LINE) {
    EMULATOR_ENTER("mbarrier_arrive");
    ::emulator::mbarrier_arrive(barrier, 0, place);
}
inline void mbarrier_expect(uint32_t barrier, int bytes, EMULATOR_LINE) {
    EMULATOR_ENTER("mbarrier_expect");
    ::emulator::mbarrier_arrive(barrier, bytes, place);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity, EMULATOR_LINE) {
    EMULATOR_ENTER("mbarrier_wait");
    ::emulator::mbarrier_wait(barrier, parity, place);
}
inline void barrier_sync(uint32_t id, int threads, EMULATOR_LINE) {
    EMULATOR_ENTER("barrier_sync");
    block.arrive_named(id, threads, true, place);
}
inline void barrier_arrive(uint32_t id, int threads, EMULATOR_LINE) {
    EMULATOR_ENTER("barrier_arrive");
    block.arrive_named(id, threads, false, place);
}

inline void fence_async() {
    const ::emulator::Inside inside;
    ::emulator::Block::current()->fence_async();
}
inline void fence_mbarrier_init() { fence_async(); }

// By their number of coordinates, from the contiguous dimension on.
template <int kRank>
void tma_load(uint32_t shared, const TensorMap& map, uint32_t barrier, const int (&at)[kRank], EMULATOR_LINE) {
    EMULATOR_ENTER("tma_load");
    ::emulator::tensor_load(map, at, shared, barrier, place);
}
template <int kRank>
void tma_store(const TensorMap& map, uint32_t shared, const int (&at)[kRank], EMULATOR_LINE) {
    EMULATOR_ENTER("tma_store");
    ::emulator::tensor_store(map, at, shared, false, place);
}
template <int kRank>
void tma_add(const TensorMap& map, uint32_t shared, const int (&at)[kRank], EMULATOR_LINE) {
    EMULATOR_ENTER("tma_add");
    ::emulator::tensor_store(map, at, shared, true, place);
}
inline void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier, EMULATOR_LINE) {
    EMULATOR_ENTER("bulk_load");
    ::emulator::bulk_load(shared, global, bytes, barrier, place);
}
inline void bulk_store(void* global, uint32_t shared, int bytes, EMULATOR_LINE) {
    EMULATOR_ENTER("bulk_store");
    ::emulator::bulk_store(global, shared, bytes, false, place);
}
inline void bulk_add(float* global, uint32_t shared, int bytes, EMULATOR_LINE) {
    EMULATOR_ENTER("bulk_add");
    ::emulator::bulk_store(global, shared, bytes, true, place);
}
inline void bulk_commit() { ::emulator::running->stores.commit(); }
template <int kPending>
void bulk_wait_read(EMULATOR_LINE) {
    EMULATOR_ENTER("bulk_wait_read");
    block.linger(place);
    ::emulator::running->stores.wait_read(kPending);
}
template <int kPending>
void bulk_wait(EMULATOR_LINE) {
    EMULATOR_ENTER("bulk_wait");
    block.linger(place);
    ::emulator::running->stores.wait(kPending);
}

inline void publish(int* flag, int value, EMULATOR_LINE) {
    EMULATOR_ENTER("publish");
    if (::emulator::Races::on) ::emulator::races().publish(flag);
    *flag = value;
    block.wake_others();
}
inline void wait_for(const int* flag, int value, EMULATOR_LINE) {
    EMULATOR_ENTER("wait_for");
    while (*flag < value) block.sleep(::emulator::Block::kElsewhere, place);
    if (::emulator::Races::on) ::emulator::races().acquire_flag(flag);
}

enum class Major { kK, kMN };
inline void wgmma_fence(EMULATOR_LINE) {
    EMULATOR_ENTER("wgmma_fence");
    block.meet_group(place, nullptr, [](void**, ::emulator::Products& products) { products.fenced = true; });
}
inline void wgmma_commit(EMULATOR_LINE) {
    EMULATOR_ENTER("wgmma_commit");
    block.meet_group(place, nullptr, [&](void**, ::emulator::Products& products) {
        products.commit();
        block.group_commits(products);
        if (block.landing() == ::emulator::Landing::kEarly)
            while (!products.groups.empty()) products.run_oldest();
    });
}
template <int kPending>
void wgmma_wait(EMULATOR_LINE) {
    EMULATOR_ENTER("wgmma_wait");
    block.linger(place);
    block.meet_group(place, nullptr, [&](void**, ::emulator::Products& products) {
        while (products.groups.size() > kPending) products.run_oldest();
        block.group_waited(products, kPending);
        products.fenced = false;
    });
}
template <class T, int kN, Major kA = Major::kK, Major kB = Major::kK>
void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate, EMULATOR_LINE) {
    EMULATOR_ENTER("wgmma");
    ::emulator::wgmma<T, kN>({d, nullptr, a, b, accumulate}, kA == Major::kK, kB == Major::kK, place);
}
template <class T, int kN, Major kB = Major::kK>
void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, EMULATOR_LINE) {
    EMULATOR_ENTER("wgmma");
    ::emulator::wgmma<T, kN>({d, a, 0, b, accumulate}, true, kB == Major::kK, place);
}

template <int kRegisters>
void registers_increase(EMULATOR_LINE) {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    EMULATOR_ENTER("registers_increase");
    block.meet_warp(place, nullptr, [](void**) {});
}
template <int kRegisters>
void registers_decrease(EMULATOR_LINE) {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    EMULATOR_ENTER("registers_decrease");
    block.meet_warp(place, nullptr, [](void**) {});
}

}  // namespace qemb::cuda
