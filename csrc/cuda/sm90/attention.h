// The attention kernels of Hopper, for the plan's blocks of long sequences. Each returns false where it does not take
// the call.
#pragma once

#include "ops/attention.h"

namespace qemb::cuda::sm90 {

int64_t attention_forward_scratch(const AttentionForward& p);
bool attention_forward(const AttentionForward& p);
int64_t attention_backward_scratch(const AttentionBackward& p);
bool attention_backward(const AttentionBackward& p);

}  // namespace qemb::cuda::sm90
