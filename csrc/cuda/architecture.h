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

inline bool on_hopper() {
    if constexpr (!kSm90IsBuilt) return false;
    return newest_kernels() >= 90 && compute_capability() == 90;
}

}  // namespace qemb::cuda
