// Top-k search against the definition.
#include <algorithm>

#include "cpu/isa.h"
#include "ops/top_k.h"
#include "testing.h"

using namespace qemb;
using namespace qemb::testing;

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

int main() { return run_all(); }
