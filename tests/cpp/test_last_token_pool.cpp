// Last-token pooling against the definition.
#include "cpu/isa.h"
#include "ops/last_token_pool.h"
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
        cpu::last_token_pool_forward({{.hidden = narrow.data(),
                                       .norm_weight = narrow_weight.data(),
                                       .cu_seqlens = cu.data(),
                                       .num_tokens = cu.back(),
                                       .num_seqs = 3,
                                       .embed = embed,
                                       .dim = dim,
                                       .hidden_stride = embed,
                                       .eps = 1e-6,
                                       .normalize = true,
                                       .dtype = DType::kFloat32},
                                      out.data()});
        check_close(isa.c_str(), out, truth, 1e-6);
    }
}

int main() { return run_all(); }
