#include "cpu/isa.h"

#include "common/check.h"
#include "cpu/kernels/isa.h"

namespace qemb::cpu {
namespace {

enum class Isa { kGeneric, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

Isa best_isa() {
#if defined(QEMB_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return Isa::kAvx512;
    if (avx2) return Isa::kAvx2;
#endif
    return Isa::kGeneric;
}

Isa g_isa = best_isa();

}  // namespace

std::vector<std::string> available_isas() { return {kNames, kNames + static_cast<int>(best_isa()) + 1}; }

std::string current_isa() { return kNames[static_cast<int>(g_isa)]; }

void set_isa(const std::string& name) {
    for (int i = 0; i <= static_cast<int>(best_isa()); ++i) {
        if (name == kNames[i]) {
            g_isa = static_cast<Isa>(i);
            return;
        }
    }
    QEMB_CHECK(false, "[set_isa] this machine has no '", name, "', the best it has is '",
               kNames[static_cast<int>(best_isa())], "'");
}

#if defined(QEMB_X86)
#define QEMB_FORWARD(op, Params) \
    void op(const Params& p) { \
        switch (g_isa) { \
            case Isa::kAvx512: return avx512::op(p); \
            case Isa::kAvx2: return avx2::op(p); \
            case Isa::kGeneric: return generic::op(p); \
        } \
    }
#else
#define QEMB_FORWARD(op, Params) \
    void op(const Params& p) { generic::op(p); }
#endif

QEMB_FORWARD(attention_forward, AttentionForward)
QEMB_FORWARD(attention_backward, AttentionBackward)
QEMB_FORWARD(last_token_pool_forward, LastTokenPoolForward)
QEMB_FORWARD(last_token_pool_backward, LastTokenPoolBackward)
QEMB_FORWARD(info_nce, InfoNce)
QEMB_FORWARD(top_k, TopK)
QEMB_FORWARD(rms_norm_forward, RmsNormForward)
QEMB_FORWARD(rms_norm_backward, RmsNormBackward)
QEMB_FORWARD(qk_norm_rope_forward, QkNormRopeForward)
QEMB_FORWARD(qk_norm_rope_backward, QkNormRopeBackward)
QEMB_FORWARD(swiglu_forward, SwigluForward)
QEMB_FORWARD(swiglu_backward, SwigluBackward)
QEMB_FORWARD(shingles, Shingles)
QEMB_FORWARD(min_hash, MinHash)

}  // namespace qemb::cpu
