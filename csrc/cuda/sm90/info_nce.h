// The products of InfoNCE on Hopper: what info_nce/scores.h and info_nce/gradients.h compute, in the same places of the
// panel.
#pragma once

#include "cuda/info_nce/panel.h"

namespace qemb::cuda::sm90 {

// Half types, vectors that the copy engine can fetch. The scratch memory is cut accordingly, so this is asked once for
// a call.
template <class T>
bool takes(const InfoNce& p);

template <class T>
void scores(const info_nce_kernels::Panel<T>& a);
template <class T>
void row_gradients(const info_nce_kernels::Panel<T>& a);
template <class T>
void column_gradients(const info_nce_kernels::Panel<T>& a);

}  // namespace qemb::cuda::sm90
