// mbarrier: 8 bytes of shared memory that count arrivals and the bytes of copies, phase after phase.
#pragma once

#include "emulator/block.h"

namespace emulator {

struct MBarrier {
    static constexpr uint32_t kMost = (1u << 20) - 1;
    uint64_t phase : 1, expected : 20, pending : 20, : 1;
    int64_t bytes : 22;  // that copies still owe; they may come before they are expected
};
static_assert(sizeof(MBarrier) == 8);

inline MBarrier& mbarrier_at(uint32_t address, const Place& place) {
    auto& barrier = *static_cast<MBarrier*>(Block::current()->shared(address, 8, place));
    if (barrier.expected == MBarrier::kMost || barrier.expected == 0) fail(place.text() + ": no mbarrier_init before");
    return barrier;
}

inline void mbarrier_init(uint32_t address, uint32_t arrivals, const Place& place) {
    Block& block = *Block::current();
    if (arrivals < 1 || arrivals >= MBarrier::kMost) fail(place.text() + ": no such number of arrivals");
    auto& barrier = *static_cast<MBarrier*>(block.shared(address, 8, place));
    std::memset(&barrier, 0, sizeof barrier);
    barrier.expected = barrier.pending = arrivals;
    block.touch(&barrier, 8, true);
}

inline void mbarrier_settle(uint32_t address, MBarrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.expected;
    if (Races::on) Block::current()->open(address);
    Block::current()->wake(address);
}

// `bytes` more are expected first.
inline void mbarrier_arrive(uint32_t address, int bytes, const Place& place) {
    MBarrier& barrier = mbarrier_at(address, place);
    if (barrier.pending == 0) fail(place.text() + ": more arrivals than the phase has");
    if (Races::on) Block::current()->release_to(address, races().release(running->warp));
    barrier.bytes += bytes;
    --barrier.pending;
    mbarrier_settle(address, barrier);
}

// A copy that has landed says so. `issued`: what its thread knew, the copy among it.
inline void mbarrier_complete(uint32_t address, int bytes, const Clock& issued, const Place& place) {
    Block::current()->touch_async(address, 8, place);
    if (Races::on) Block::current()->release_to(address, issued);
    MBarrier& barrier = mbarrier_at(address, place);
    barrier.bytes -= bytes;
    mbarrier_settle(address, barrier);
}

inline void mbarrier_wait(uint32_t address, uint32_t parity, const Place& place) {
    if (parity > 1) fail(place.text() + ": a parity is 0 or 1");
    while (mbarrier_at(address, place).phase == parity) Block::current()->sleep(address, place);
    if (Races::on) Block::current()->acquire_from(address);
}

}  // namespace emulator
