#include "cuda/architecture.h"
#include "cuda/attention_backward.cuh"
#include "cuda/attention_dispatch.h"
#include "cuda/attention_single.cuh"
#include "cuda/sm90/attention.h"

namespace qemb::cuda {

int64_t attention_backward_scratch(const AttentionBackward& p) {
    if (p.plan.blocks + p.plan.key_blocks == 0) return 0;
    if (on_hopper()) return sm90::attention_backward_scratch(p);  // the more of the two
    return p.num_tokens * p.num_heads * static_cast<int64_t>(sizeof(float));
}

void attention_backward(const AttentionBackward& p) {
    constexpr const char* kOp = "varlen_attention";
    const auto heads = static_cast<unsigned>(p.num_heads), kv_heads = static_cast<unsigned>(p.num_kv_heads);
    const auto grid = [](int64_t x, unsigned y) { return dim3(static_cast<unsigned>(x), y); };
    visit_types(p, [&]<class T, int D>() {
        if (p.plan.single && visit_group(p.num_heads / p.num_kv_heads, [&]<int kGroup>() {
                launch(kOp, attention_backward_single<T, D, kGroup>, grid(p.num_seqs, kv_heads), kSingleWarps * 32,
                       single_shared<D, kGroup>(), p.stream, p);
            }))
            return;
        if (p.plan.blocks + p.plan.key_blocks > 0 && !(on_hopper() && sm90::attention_backward(p))) {
            const int64_t rows = p.num_tokens * p.num_heads;
            launch(kOp, attention_backward_delta<T, D>, grid(ceil_div(rows, 2048 / D), 1), 256, 0, p.stream,
                   static_cast<const T*>(p.out), static_cast<const T*>(p.dout), static_cast<float*>(p.scratch), rows);
            constexpr int kSmallStep = D == 128 ? 32 : 64;
            const auto blocks = [&]<int kStep>() {
                constexpr size_t kShared = block_backward_shared<D, kStep>();
                static_assert(kShared <= (kStep == kSmallStep ? kSmallShared : kLargeShared));
                launch(kOp, attention_backward_keys<T, D, kStep>, grid(p.plan.key_blocks, kv_heads),
                       kBackwardWarps * 32, kShared, p.stream, p);
                launch(kOp, attention_backward_queries<T, D, kStep>, grid(p.plan.blocks, heads), kBackwardWarps * 32,
                       kShared, p.stream, p);
            };
            if (has_large_shared())
                blocks.template operator()<64>();
            else
                blocks.template operator()<kSmallStep>();
        }
        visit_slots([&]<int kSlots>() {
            constexpr size_t kShared = tile_backward_shared<D, kSlots>();
            static_assert(kShared <= (kSlots == kMostSlots ? kLargeShared : kSmallShared));
            launch(kOp, attention_backward_tile<T, D, kSlots>, grid(p.plan.tiles, kv_heads), kSlots * 32, kShared,
                   p.stream, p);
        });
    });
}

}  // namespace qemb::cuda
