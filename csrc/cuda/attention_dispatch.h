// Which kernel a call gets: dtype, head_dim, the shared memory of the device, and whether each sequence has one query.
#pragma once

#include "cuda/architecture.h"
#include "cuda/attention_tile.h"

namespace qemb::cuda {

// run.operator()<T, D>(). The bindings let nothing else through.
template <class Params, class Run>
void visit_types(const Params& p, Run&& run) {
    const auto with = [&]<class T>() {
        if (p.head_dim == 128)
            run.template operator()<T, 128>();
        else
            run.template operator()<T, 64>();
    };
    if (p.dtype == DType::kBFloat16)
        with.template operator()<BFloat16>();
    else
        with.template operator()<Float16>();
}

// run.operator()<slots of a tile>(); the plan of the batch was made for as many.
template <class Run>
void visit_slots(Run&& run) {
    if (has_large_shared())
        run.template operator()<kMostSlots>();
    else
        run.template operator()<kMostSlots / 2>();
}

// run.operator()<group>(); false where the heads of a group are too many for one pass.
template <class Run>
bool visit_group(int64_t group, Run&& run) {
    if (group == 1)
        run.template operator()<1>();
    else if (group == 2)
        run.template operator()<2>();
    else if (group == 4)
        run.template operator()<4>();
    else
        return false;
    return true;
}

}  // namespace qemb::cuda
