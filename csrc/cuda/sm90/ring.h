// Stages of shared memory between a thread that has the copy engine fill them and warpgroups that multiply them.
#pragma once

#include "cuda/device/hopper.h"
#include "cuda/launch.h"

namespace qemb::cuda::sm90 {

// The last of three warpgroups loads; the first two multiply, 64 rows of a tile each.
constexpr int kConsumers = 256, kThreads = 384;
constexpr int kBlockRegisters = 168 * kThreads;
constexpr int kProducerRegisters = 24;  // of a thread of the third warpgroup, unless a kernel asks for more

// Of a kernel whose blocks stay on their multiprocessor and take one unit of work after another.
inline dim3 resident_blocks(int64_t units) {
    return dim3(static_cast<unsigned>(min(int64_t(multiprocessors()), units)));
}

// A kernel's life: one thread makes the barriers, then one thread produces while the others consume, and perhaps one
// delivers what they have made. One if with two branches is what ptxas wants to see for registers to move between
// warpgroups.
template <int kProducer = kProducerRegisters, class Init, class Produce, class Consume, class Deliver>
QEMB_DEVICE void by_role(const Init& init, const Produce& produce, const Consume& consume, const Deliver& deliver) {
    if (threadIdx.x == 0) {
        init();
        fence_mbarrier_init();
    }
    sync_block();
    if (threadIdx.x >= kConsumers) {
        registers_decrease<kProducer>();
        if (threadIdx.x == kConsumers) produce();
        if (threadIdx.x == kConsumers + 32) deliver();
    } else {
        registers_increase<(kBlockRegisters - kProducer * (kThreads - kConsumers)) / kConsumers>();
        consume();
    }
}
template <int kProducer = kProducerRegisters, class Init, class Produce, class Consume>
QEMB_DEVICE void by_role(const Init& init, const Produce& produce, const Consume& consume) {
    by_role<kProducer>(init, produce, consume, [] {});
}

// Where one side of the ring is: both walk through the stages in the same order.
template <int kStages>
struct Ring {
    static constexpr int kCount = kStages;
    static constexpr int kBytes = 2 * kStages * 8;  // of barriers: a full one for each stage, then an empty one

    uint32_t barriers;
    int stage = 0;
    uint32_t parity = 0;

    // By the init of by_role. `readers`: arrivals that free a stage; `writers`: that fill it.
    QEMB_DEVICE void init(int readers, int writers = 1) const {
#pragma unroll
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(barriers + 8 * i, writers);
            mbarrier_init(barriers + 8 * (kStages + i), readers);
        }
    }
    QEMB_DEVICE uint32_t full() const { return barriers + 8 * stage; }
    QEMB_DEVICE uint32_t empty() const { return full() + 8 * kStages; }
    QEMB_DEVICE void wait_full() const { mbarrier_wait(full(), parity); }
    QEMB_DEVICE void wait_empty() const { mbarrier_wait(empty(), parity ^ 1); }
    // The stage is free, and on to the next.
    QEMB_DEVICE void release(bool arrives) {
        if (arrives) mbarrier_arrive(empty());
        next();
    }
    // To read so many stages again, which were not released.
    QEMB_DEVICE void rewind(int steps) {
        stage -= steps;
        const bool wraps = stage < 0;
        stage += wraps ? kStages : 0;
        parity ^= wraps;
    }
    QEMB_DEVICE void next() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

}  // namespace qemb::cuda::sm90
