// Exact top-k search on Hopper: fills the lists of every span. False where it does not take the call.
#pragma once

#include "cuda/top_k/list.h"

namespace qemb::cuda::sm90 {

bool search(const TopK& p, const top_k_kernels::Cut& cut, const top_k_kernels::Memory& memory);

}  // namespace qemb::cuda::sm90
