#include <algorithm>

#include "cuda/architecture.h"
#include "cuda/attention_backward.cuh"
#include "cuda/attention_backward_block.cuh"
#include "cuda/attention_dispatch.h"
#include "cuda/attention_single.cuh"
#include "cuda/sm90/attention.h"

namespace qemb::cuda {

namespace {

// run.operator()<queries of a step, stages>(): what fits the shared memory of the device.
template <int D, class Run>
void visit_steps(Run&& run) {
    if constexpr (D == 64)
        run.template operator()<64, 2>();
    else if (has_large_shared())
        run.template operator()<64, 2>();
    else
        run.template operator()<32, 1>();
}

}  // namespace

int64_t attention_backward_scratch(const AttentionBackward& p) {
    if (p.plan.blocks + p.plan.key_blocks == 0) return 0;
    int64_t bytes = on_hopper() ? sm90::attention_backward_scratch(p) : 0;
    visit_types(p, [&]<class T, int D>() {
        visit_steps<D>([&]<int kStep, int kStages>() { bytes = std::max(bytes, BlockScratch(p, kStep).bytes); });
    });
    return bytes;
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
        if (p.plan.blocks + p.plan.key_blocks > 0 && !(on_hopper() && sm90::attention_backward(p)))
            visit_steps<D>([&]<int kStep, int kStages>() {
                constexpr size_t kShared = BackwardLayout<kStep, kStages, D>::kBytes;
                static_assert(kShared <= (D == 128 && kStep == 64 ? kLargeShared : kSmallShared));
                const BlockScratch scratch(p, kStep);
                zero(kOp, scratch.ticket, static_cast<size_t>(scratch.flag_bytes()), p.stream);
                launch(kOp, attention_backward_delta<T, D>, grid(p.plan.blocks, heads), 256, 0, p.stream, p, scratch);
                launch(kOp, attention_backward_block<T, D, kStep, kStages>, grid(p.plan.key_blocks * p.num_kv_heads, 1),
                       kBlockBackwardThreads, kShared, p.stream, p, scratch);
            });
        visit_slots([&]<int kSlots>() {
            constexpr size_t kShared = tile_backward_shared<D, kSlots>();
            static_assert(kShared <= (kSlots == kMostSlots ? kLargeShared : kSmallShared));
            launch(kOp, attention_backward_tile<T, D, kSlots>, grid(p.plan.tiles, kv_heads), kSlots * 32, kShared,
                   p.stream, p);
        });
    });
}

}  // namespace qemb::cuda
