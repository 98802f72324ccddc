// Pooling and top-k against the definition, the vector exponential, and the low-precision conversions.
#include <algorithm>

#include "cpu/isa.h"
#include "cpu/simd/vec.h"
#include "ops/pooling.h"
#include "ops/topk.h"
#include "testing.h"

using namespace qemb;
using namespace qemb::testing;

TEST(pool_takes_the_last_row) {
    const int64_t embed = 19, dim = 11;
    const std::vector<int32_t> cu = {0, 3, 3, 4};
    const auto hidden = random_values<double>(4 * embed, 1), weight = random_values<double>(embed, 2);
    std::vector<double> truth(3 * dim);
    for (const auto& [seq, row] : {std::pair{0, 2}, std::pair{2, 3}}) {
        double mean = 0, norm = 0;
        for (int64_t i = 0; i < embed; ++i) mean += hidden[row * embed + i] * hidden[row * embed + i] / embed;
        for (int64_t i = 0; i < dim; ++i) {
            truth[seq * dim + i] = hidden[row * embed + i] / std::sqrt(mean + 1e-6) * weight[i];
            norm += truth[seq * dim + i] * truth[seq * dim + i];
        }
        for (int64_t i = 0; i < dim; ++i) truth[seq * dim + i] /= std::sqrt(norm);
    }
    const std::vector<float> narrow(hidden.begin(), hidden.end()), narrow_weight(weight.begin(), weight.end());
    for (const std::string& isa : cpu::available_isas()) {
        cpu::set_isa(isa);
        std::vector<float> out(3 * dim, NAN);
        cpu::pool_forward({.hidden = narrow.data(),
                           .norm_weight = narrow_weight.data(),
                           .out = out.data(),
                           .cu_seqlens = cu.data(),
                           .num_seqs = 3,
                           .embed = embed,
                           .dim = dim,
                           .hidden_stride = embed,
                           .eps = 1e-6,
                           .normalize = true,
                           .dtype = DType::kFloat32});
        check_close(isa.c_str(), out, truth, 1e-6);
    }
}

TEST(top_k_equals_sorting) {
    const int64_t queries = 100, documents = 700, dim = 20, k = 30;
    const auto q = random_values<float>(queries * dim, 1), d = random_values<float>(documents * dim, 2);
    for (const std::string& isa : cpu::available_isas()) {
        cpu::set_isa(isa);
        std::vector<float> scores(queries * k);
        std::vector<int64_t> indices(queries * k);
        cpu::top_k({.queries = q.data(),
                    .documents = d.data(),
                    .exclude = nullptr,
                    .ceiling = nullptr,
                    .scores = scores.data(),
                    .indices = indices.data(),
                    .num_queries = queries,
                    .num_documents = documents,
                    .num_exclude = 0,
                    .dim = dim,
                    .k = k,
                    .dtype = DType::kFloat32});
        std::vector<double> truth;
        for (int64_t i = 0; i < queries; ++i) {
            std::vector<double> row(documents);
            for (int64_t j = 0; j < documents; ++j)
                for (int64_t x = 0; x < dim; ++x) row[j] += static_cast<double>(q[i * dim + x]) * d[j * dim + x];
            for (int64_t at = 0; at < k; ++at) CHECK(std::abs(row[indices[i * k + at]] - scores[i * k + at]) < 1e-4);
            std::sort(row.rbegin(), row.rend());
            truth.insert(truth.end(), row.begin(), row.begin() + k);
        }
        check_close(isa.c_str(), scores, truth, 1e-4);
    }
}

TEST(exponential_is_good_to_the_last_bits) {
    using namespace qemb::cpu::generic;
    for (double x = -86; x < 88; x += 0.0137) {
        const float got = exp<float>(splat<float>(static_cast<float>(x)))[0];
        CHECK(std::abs(got / std::exp(static_cast<double>(static_cast<float>(x))) - 1) < 2.5e-7);
        CHECK(std::abs(exp<double>(splat<double>(x * 8))[0] / std::exp(x * 8) - 1) < 1e-15);
    }
    CHECK(exp<float>(splat<float>(-INFINITY))[0] == 0 && exp<float>(splat<float>(200.f))[0] == INFINITY);
    CHECK(std::isnan(exp<float>(splat<float>(NAN))[0]) && exp<float>(splat<float>(0.f))[0] == 1);
}

TEST(half_precision_round_trips) {
    using namespace qemb::cpu::generic;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const auto half = static_cast<uint16_t>(bits);
        const float wide = from_f16(half), brain = from_bf16(half);
        CHECK(std::isnan(wide) || to_f16(wide) == half);
        CHECK(std::isnan(brain) || to_bf16(brain) == half);
    }
    CHECK(to_bf16(1.00390625f) == 0x3f80 && to_bf16(1.01171875f) == 0x3f82);  // ties to even
    CHECK(to_f16(65520.f) == 0x7c00 && to_f16(1e-8f) == 0);
}

int main() { return run_all(); }
