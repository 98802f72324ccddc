// Sums and maxima over lanes, a warp and a block, in an order that does not depend on timing.
#pragma once

#include "common/types.h"
#include "cuda/device/arch.h"

namespace qemb::cuda {

// Over kLanes neighbouring lanes, a power of two; each of them gets the result.
template <int kLanes, class T>
QEMB_DEVICE T lanes_sum(T x) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
template <int kLanes>
QEMB_DEVICE float lanes_max(float x) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}
template <class T>
QEMB_DEVICE T warp_sum(T x) {
    return lanes_sum<32>(x);
}
QEMB_DEVICE float warp_max(float x) { return lanes_max<32>(x); }

// Every thread of a block of kWarps warps gets the sum. `scratch`: kWarps values of shared memory, free again
// afterwards.
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

// The factor that brings a row with this sum of squares to where squares neither overflow nor vanish; 1 where it is
// there.
QEMB_DEVICE float unit_for(float squares) {
    using Range = SquareRange<float>;
    if (squares > Range::kLow && squares < Range::kHigh) return 1;
    return squares <= Range::kLow ? Range::kGrow : Range::kShrink;
}
// 1 / sqrt(mean of squares + eps), the squares of values times `unit`; 0 where that would be 1 / 0.
QEMB_DEVICE float inverse_rms(float mean, float unit, double eps) {
    if (unit == 1) return rsqrtf(mean + static_cast<float>(eps));
    const double whole = static_cast<double>(mean) / (static_cast<double>(unit) * static_cast<double>(unit)) + eps;
    return whole == 0 ? 0.0f : static_cast<float>(1 / sqrt(whole));
}

}  // namespace qemb::cuda
