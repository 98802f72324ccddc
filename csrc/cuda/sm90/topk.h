// Exact top-k search on Hopper: fills the lists of every span. False where it does not take the call.
#pragma once

#include "cuda/topk_list.h"

namespace qemb::cuda::sm90 {

bool search(const TopK& p, const topk::Cut& cut, const topk::List& lists);

}  // namespace qemb::cuda::sm90
