// Built instead of the CUDA backend where there is no nvcc: nothing here works, and each function says why.
#include "common/check.h"
#include "cuda/runtime.h"
#include "ops/attention.h"
#include "ops/info_nce.h"
#include "ops/last_token_pool.h"
#include "ops/qk_norm_rope.h"
#include "ops/rms_norm.h"
#include "ops/swiglu.h"
#include "ops/top_k.h"

namespace qemb {
namespace {

[[noreturn]] void missing(const char* op) {
    throw std::runtime_error(
        concat("[", op,
               "] this build of pyqemb has no CUDA kernels: move the tensors to the CPU, or build it where nvcc (CUDA "
               "12.4 or newer) is on the PATH, `PYQEMB_CUDA=on pip install .`"));
}

}  // namespace

AttentionPlan size_plan(const int32_t*, const int32_t*, int64_t) { missing("attention_plan"); }
void fill_plan(const int32_t*, const int32_t*, int64_t, const AttentionPlan&, int32_t*) { missing("attention_plan"); }

namespace cuda {

bool is_built() { return false; }
bool hopper_is_built() { return false; }
int device_count() { return 0; }
DeviceGuard::DeviceGuard(int) { missing("pyqemb"); }
DeviceGuard::~DeviceGuard() = default;

AttentionPlan largest_plan(int64_t, int64_t, int64_t) { missing("attention_plan"); }
void fill_plan(const DeviceLengths&, const DeviceLengths&, int64_t, const AttentionPlan&, int32_t*, void*) {
    missing("attention_plan");
}
int64_t attention_forward_scratch(const AttentionForward&) { missing("varlen_attention"); }
int64_t attention_backward_scratch(const AttentionBackward&) { missing("varlen_attention"); }
void attention_forward(const AttentionForward&) { missing("varlen_attention"); }
void attention_backward(const AttentionBackward&) { missing("varlen_attention"); }

int64_t last_token_pool_backward_scratch(const LastTokenPoolBackward&) { missing("last_token_pool"); }
void last_token_pool_forward(const LastTokenPoolForward&) { missing("last_token_pool"); }
void last_token_pool_backward(const LastTokenPoolBackward&) { missing("last_token_pool"); }

int64_t info_nce_scratch(const InfoNce&) { missing("info_nce"); }
void info_nce(const InfoNce&) { missing("info_nce"); }

int64_t top_k_scratch(const TopK&) { missing("top_k"); }
void top_k(const TopK&) { missing("top_k"); }

int64_t rms_norm_backward_scratch(const RmsNormBackward&) { missing("rms_norm"); }
void rms_norm_forward(const RmsNormForward&) { missing("rms_norm"); }
void rms_norm_backward(const RmsNormBackward&) { missing("rms_norm"); }

int64_t qk_norm_rope_backward_scratch(const QkNormRopeBackward&) { missing("qk_norm_rope"); }
void qk_norm_rope_forward(const QkNormRopeForward&) { missing("qk_norm_rope"); }
void qk_norm_rope_backward(const QkNormRopeBackward&) { missing("qk_norm_rope"); }

void swiglu_forward(const SwigluForward&) { missing("swiglu"); }
void swiglu_backward(const SwigluBackward&) { missing("swiglu"); }

}  // namespace cuda
}  // namespace qemb
