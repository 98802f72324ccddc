#include "cuda/architecture.h"
#include "cuda/attention_dispatch.h"
#include "cuda/attention_forward.cuh"
#include "cuda/attention_single.cuh"
#include "cuda/sm90/attention.h"

namespace qemb::cuda {

int64_t attention_forward_scratch(const AttentionForward& p) {
    return on_hopper() ? sm90::attention_forward_scratch(p) : 0;
}

void attention_forward(const AttentionForward& p) {
    const auto heads = static_cast<unsigned>(p.num_heads), kv_heads = static_cast<unsigned>(p.num_kv_heads);
    visit_types(p, [&]<class T, int D>() {
        if (p.plan.single && visit_group(p.num_heads / p.num_kv_heads, [&]<int kGroup>() {
                launch("varlen_attention", attention_forward_single<T, D, kGroup>,
                       dim3(static_cast<unsigned>(p.num_seqs), kv_heads), kSingleWarps * 32, single_shared<D, kGroup>(),
                       p.stream, p);
            }))
            return;
        if (!on_hopper() || !sm90::attention_forward(p))
            launch("varlen_attention", attention_forward_block<T, D>, dim3(static_cast<unsigned>(p.plan.blocks), heads),
                   kBlockWarps * 32, block_forward_shared<D>(), p.stream, p);
        visit_slots([&]<int kSlots>() {
            launch("varlen_attention", attention_forward_tile<T, D, kSlots>,
                   dim3(static_cast<unsigned>(p.plan.tiles), kv_heads), kSlots * 32, tile_forward_shared<D, kSlots>(),
                   p.stream, p);
        });
    });
}

}  // namespace qemb::cuda
