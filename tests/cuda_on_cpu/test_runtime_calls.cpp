// What an op asks of the CUDA runtime: so many kernels and memsets, and nothing that makes the host wait or that a CUDA
// graph cannot capture. Once a kernel has its shared memory, a call sets no attribute any more.
#include "attention_call.h"
#include "ops/info_nce.h"
#include "ops/last_token_pool.h"
#include "ops/top_k.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

// `op` is called twice: the first call may set attributes.
template <class Op>
void check_calls(const char* name, int launches, int zeroed, const Op& op) {
    for (const bool steady : {false, true}) {
        emulator::calls() = {};
        op();
        const emulator::Calls made = emulator::calls();
        const bool right = made.launches == launches && made.zeroed == zeroed && made.copies == 0 &&
                           made.synchronizations == 0 && (!steady || made.attributes == 0);
        if (right) continue;
        std::printf(
            "  %s: %d launches (expected %d), %d memsets (expected %d), %d copies, %d synchronizations, %d "
            "attributes\n",
            name, made.launches, launches, made.zeroed, zeroed, made.copies, made.synchronizations, made.attributes);
        ++g_failures;
    }
}

void check_attention(const char* name, const Case& c, int forward, int backward, int zeroed) {
    const Inputs x = random_inputs<BFloat16>(c);
    Call<BFloat16> call(c, x.q, x.k, x.v, x.dout);
    emulator::DeviceMemory<int32_t> data(call.host_plan);
    call.plan.data = data.data();
    Attention problem{.q = call.q.data(),
                      .k = call.k.data(),
                      .v = call.v.data(),
                      .cu_seqlens_q = call.cu_q.data(),
                      .cu_seqlens_k = call.cu_k.data(),
                      .plan = call.plan};
    set_shape(problem, c, DType::kBFloat16);
    problem.scale = call.scale;
    check_calls(name, forward, 0, [&] { cuda::attention_forward({problem, call.out.data(), call.lse.data()}); });
    AttentionBackward p{problem,        call.out.data(), call.dout.data(), call.lse.data(),
                        call.dq.data(), call.dk.data(),  call.dv.data()};
    emulator::DeviceMemory<char> scratch(static_cast<size_t>(cuda::attention_backward_scratch(p)));
    p.scratch = scratch.data();
    check_calls(name, backward, zeroed, [&] { cuda::attention_backward(p); });
}

TEST(attention) {
    check_attention("one query each", self({1, 1, 1}, 2, 1, 64, true), 1, 1, 0);
    check_attention("short sequences", self({5, 9, 17}, 2, 1, 64, true), 1, 1, 0);
    check_attention("a long sequence", self({5, 200}, 2, 1, 64, true), 2, 3, 1);
}

// A batch without anything that is left out, as pyqemb.ops.info_nce makes it.
void check_info_nce(const char* name, bool gradients, int launches, int zeroed) {
    constexpr int64_t kQueries = 5, kDocuments = 9, kDim = 64;
    Tensor<BFloat16> queries(random_wide<BFloat16>(kQueries * kDim, 1, 0.1)),
        documents(random_wide<BFloat16>(kDocuments * kDim, 2, 0.1));
    emulator::DeviceMemory<int64_t> positive(std::vector<int64_t>{0, 1, 2, 3, 4});
    emulator::DeviceMemory<double> loss(kQueries), stats(5);
    emulator::DeviceMemory<float> d_queries(kQueries * kDim), d_documents(kDocuments * kDim);
    InfoNce p{};
    p.queries = queries.data();
    p.documents = documents.data();
    p.positive = positive.data();
    p.num_queries = p.num_rows = kQueries;
    p.num_documents = kDocuments;
    p.dim = kDim;
    p.options = {.groups = {}, .split = false, .temperature = 0.05, .focal = 0, .scale = 0.2};
    for (int group = 0; group < kNumGroups; ++group) p.options.groups[group].on = group != kDocOwn;
    p.loss = loss.data();
    p.stats = stats.data();
    if (gradients) p.d_queries = d_queries.data(), p.d_documents = d_documents.data();
    p.adds_positive = true;
    p.dtype = DType::kBFloat16;
    emulator::DeviceMemory<char> scratch(static_cast<size_t>(cuda::info_nce_scratch(p)));
    p.scratch = scratch.data();
    check_calls(name, launches, zeroed, [&] { cuda::info_nce(p); });
}

TEST(info_nce) {
    const int more = emulator::options().compute_capability == 90 ? 2 : 0;
    check_info_nce("loss alone", false, 7 + more, 1);
    check_info_nce("loss and gradients", true, 13 + more, 3);
}

TEST(last_token_pool) {
    constexpr int64_t kTokens = 6, kDim = 16;
    Tensor<BFloat16> hidden(random_wide<BFloat16>(kTokens * kDim, 1)), weight(random_wide<BFloat16>(kDim, 2)),
        out(2 * kDim), dout(random_wide<BFloat16>(2 * kDim, 3)), dhidden(kTokens * kDim);
    Tensor<float> dweight(kDim);
    emulator::DeviceMemory<int32_t> cu(std::vector<int32_t>{0, 2, 6});
    const LastTokenPool problem{.hidden = hidden.data(),
                                .norm_weight = weight.data(),
                                .cu_seqlens = cu.data(),
                                .num_tokens = kTokens,
                                .num_seqs = 2,
                                .embed = kDim,
                                .dim = kDim,
                                .hidden_stride = kDim,
                                .eps = 1e-6,
                                .normalize = true,
                                .dtype = DType::kBFloat16};
    LastTokenPoolForward forward{problem};
    forward.out = out.data();
    check_calls("forward", 1, 0, [&] { cuda::last_token_pool_forward(forward); });
    LastTokenPoolBackward backward{problem};
    backward.dout = dout.data();
    backward.dhidden = dhidden.data();
    backward.dnorm_weight = dweight.data();
    emulator::DeviceMemory<char> scratch(static_cast<size_t>(cuda::last_token_pool_backward_scratch(backward)));
    backward.scratch = scratch.data();
    check_calls("backward", 2, 0, [&] { cuda::last_token_pool_backward(backward); });
}

void check_top_k(const char* name, int64_t num_documents, int zeroed) {
    constexpr int64_t kQueries = 3, kDim = 16, kK = 4;
    Tensor<BFloat16> queries(random_wide<BFloat16>(kQueries * kDim, 1)),
        documents(random_wide<BFloat16>(num_documents * kDim, 2));
    Tensor<float> scores(kQueries * kK);
    emulator::DeviceMemory<int64_t> indices(kQueries * kK);
    TopK p{};
    p.queries = queries.data();
    p.documents = documents.data();
    p.scores = scores.data();
    p.indices = indices.data();
    p.num_queries = kQueries;
    p.num_documents = num_documents;
    p.dim = kDim;
    p.k = kK;
    p.dtype = DType::kBFloat16;
    emulator::DeviceMemory<char> scratch(static_cast<size_t>(cuda::top_k_scratch(p)));
    p.scratch = scratch.data();
    check_calls(name, 2, zeroed, [&] { cuda::top_k(p); });
}

TEST(top_k) {
    check_top_k("one span", 40, 0);
    check_top_k("several spans", 4096, 1);
}

}  // namespace

int main() { return run_all_on({90, 80}); }
