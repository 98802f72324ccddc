// The products of InfoNCE on Hopper: what infonce_scores.h and infonce_gradients.h compute, in the same places of the panel.
#pragma once

#include "cuda/infonce_panel.h"

namespace qemb::cuda::sm90 {

// Half types, vectors that the copy engine can fetch. The scratch memory is cut accordingly, so this is asked once for a call.
template <class T>
bool takes(const InfoNce& p);

template <class T>
void scores(const infonce::Panel<T>& a);
template <class T>
void row_gradients(const infonce::Panel<T>& a);
template <class T>
void column_gradients(const infonce::Panel<T>& a);

}  // namespace qemb::cuda::sm90
