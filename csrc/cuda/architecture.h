// Which kernels a call gets: those of cuda/sm90 on Hopper, where they were built, and those of cuda/ everywhere else. A function
// of cuda/sm90 returns false where it does not take a call (a layout that the copy engine refuses, say): then cuda/ does.
#pragma once

#include "cuda/launch.h"
#include "cuda/runtime.h"

namespace qemb::cuda {

#if defined(__CUDACC__) && !defined(QEMB_SM90)
constexpr bool kSm90IsBuilt = false;
#else
constexpr bool kSm90IsBuilt = true;
#endif

template <class Params>
bool hopper_takes(const Params& p, bool (*kernels)(const Params&)) {
    return kSm90IsBuilt && newest_kernels() >= 90 && compute_capability() == 90 && kernels(p);
}

}  // namespace qemb::cuda
