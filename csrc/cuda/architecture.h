// Which kernels a call gets: those of cuda/sm90 on Hopper, where they were built, and those of cuda/ everywhere else. A
// function of cuda/sm90 returns false where it does not take a call (a layout that the copy engine refuses, say): then
// cuda/ does.
#pragma once

#include "cuda/launch.h"
#include "cuda/runtime.h"

namespace qemb::cuda {

#if defined(__CUDACC__) && !defined(QEMB_SM90)
constexpr bool kSm90IsBuilt = false;
#else
constexpr bool kSm90IsBuilt = true;
#endif

// Shared memory of a block, in bytes: GPUs of sm_86, sm_89 and sm_120 have the smaller limit, an A100 the larger one,
// and newer server GPUs more. Kernels that need more than the smaller limit have a second variant.
constexpr int kSmallShared = 99 * 1024, kLargeShared = 163 * 1024;
constexpr int kReservedShared = 1024;  // bytes that CUDA takes of a multiprocessor's for each of its blocks
inline bool has_large_shared() { return max_shared() >= kLargeShared; }

inline bool on_hopper() {
    if constexpr (!kSm90IsBuilt) return false;
    return newest_kernels() >= 90 && compute_capability() == 90;
}

}  // namespace qemb::cuda
