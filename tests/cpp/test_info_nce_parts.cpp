// InfoNCE in parts that add up to the whole: row ranges and blocks of documents; half types; threads.
#include "cpu/parallel.h"
#include "cpu/simd/vec.h"
#include "info_nce_cases.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

InfoNceResult nothing_of(const InfoNceCase& c) {
    return {{}, Wide(c.q.size()), Wide(c.d.size()), Wide(1), Wide(5), {}};
}

// All but losses and log sums.
void add(InfoNceResult& sum, const InfoNceResult& part) {
    for (const auto& x : {&InfoNceResult::dq, &InfoNceResult::dd, &InfoNceResult::d_temperature, &InfoNceResult::stats})
        for (size_t i = 0; i < (sum.*x).size(); ++i) (sum.*x)[i] += (part.*x)[i];
}

// Documents in blocks: the first round's sums make the second round's losses and gradients.
template <class T>
void check_blocks(bool split, double focal, double tolerance) {
    InfoNceCase c = make_case(400, 300, 11, 13);
    c.split = split, c.focal = focal;
    round_to<float>(c);
    const InfoNceResult whole = info_nce_truth(c);
    std::vector<InfoNceCase> blocks(3, c);
    for (int64_t j = 0; j < c.num_documents; ++j)
        for (int64_t block = 0; block < 3; ++block)
            if (j * 3 / c.num_documents != block) blocks[block].role[j] = static_cast<uint8_t>(Role::kAbsent);
    for (InfoNceCase& block : blocks) block.first_column = &block == &blocks[1] ? 0 : c.num_queries;
    Wide given(whole.log_negatives.size(), -INFINITY);
    for (const InfoNceCase& block : blocks) {
        const InfoNceResult r = run<T>(block, nullptr, true, false), truth = info_nce_truth(block);
        check_close("loss of a block", r.loss, truth.loss, tolerance);
        for (int64_t row = 0; row < c.num_rows; ++row)
            for (int s = 0; s < (split ? kMaxSoftmaxes : 1); ++s) {
                const int64_t at = row * kMaxSoftmaxes + s;
                const double x = r.log_negatives[at], y = truth.log_negatives[at];
                CHECK(x == y || std::abs(x - y) <= 10 * tolerance);
                const double high = std::max(given[at], x), low = std::min(given[at], x);
                if (high > -INFINITY) given[at] = high + std::log1p(std::exp(low - high));
            }
    }
    InfoNceResult sum = nothing_of(c);
    for (size_t block = 0; block < blocks.size(); ++block) {
        const InfoNceResult r = run<T>(blocks[block], &given, block == 2);
        sum.loss = r.loss;
        CHECK(r.log_negatives == given);
        add(sum, r);
    }
    sum.stats[0] /= 3;
    check_equal("blocks", sum, whole, tolerance);
}

}  // namespace

TEST(rows_add_up_to_the_whole) {
    const InfoNceCase c = make_case(50, 120, 9, 12);
    const InfoNceResult whole = info_nce_truth(c);
    each_isa([&](const std::string& isa) {
        InfoNceResult sum = nothing_of(c);
        for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 17}, {17, 0}, {17, 33}}) {
            InfoNceCase part = c;
            part.first_row = first, part.num_rows = count;
            const InfoNceResult r = run<double>(part);
            sum.loss.insert(sum.loss.end(), r.loss.begin(), r.loss.end());
            add(sum, r);
        }
        check_equal(isa + " rows", sum, whole, 1e-12);
    });
}

TEST(blocks_add_up_to_the_whole) {
    each_isa([](const std::string&) {
        for (const bool split : {false, true})
            for (const double focal : {0.0, 2.0})
                check_blocks<double>(split, focal, 1e-12), check_blocks<float>(split, focal, 3e-6);
    });
}

TEST(half_types) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
        const bool brain = dtype == DType::kBFloat16;
        namespace generic = cpu::QEMB_ISA;
        InfoNceCase c = make_case(50, 300, 20, 14);
        std::vector<uint16_t> stored[2];
        for (int side = 0; side < 2; ++side)
            for (double& value : side ? c.d : c.q) {
                const float single = static_cast<float>(value);
                stored[side].push_back(brain ? generic::to_bf16(single) : generic::to_f16(single));
                value = static_cast<double>(brain ? generic::from_bf16(stored[side].back())
                                                  : generic::from_f16(stored[side].back()));
            }
        for (const bool prefixes : {false, true}) {
            if (prefixes) c.dims = {4, 20}, c.dim_weights = {1, 1};
            const InfoNceResult truth = info_nce_truth(c);
            each_isa([&](const std::string& isa) {
                check_equal(isa + (brain ? " bfloat16" : " float16"), run<float>(c, dtype, stored[0], stored[1]), truth,
                            3e-6);
            });
        }
    }
}

TEST(threads_change_nothing) {
    const int before = cpu::num_threads();
    for (const bool prefixes : {false, true}) {
        InfoNceCase c = make_case(450, 600, 40, 15);
        if (prefixes) c.dims = {7, 24, 40}, c.dim_weights = {1, 1, 1};
        each_isa([&](const std::string&) {
            cpu::set_num_threads(1);
            const InfoNceResult one = run<float>(c);
            for (const int threads : {2, 5}) {
                cpu::set_num_threads(threads);
                const InfoNceResult r = run<float>(c);
                CHECK(r.loss == one.loss && r.dq == one.dq && r.dd == one.dd);
                CHECK(r.d_temperature == one.d_temperature && r.stats == one.stats);
            }
        });
    }
    cpu::set_num_threads(before);
}

int main() { return run_all(); }
