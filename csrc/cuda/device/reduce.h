// Sums and maxima over a warp and over a block, in an order that does not depend on timing.
#pragma once

#include "cuda/device/arch.h"

namespace qemb::cuda {

template <class T>
QEMB_DEVICE T warp_sum(T x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
QEMB_DEVICE float warp_max(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

// Every thread of a block of kWarps warps gets the sum. `scratch`: kWarps values of shared memory, free again afterwards.
template <int kWarps, class T>
QEMB_DEVICE T block_sum(T x, T* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    sync_block();
    T total = scratch[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) total += scratch[warp];
    sync_block();
    return total;
}

}  // namespace qemb::cuda
