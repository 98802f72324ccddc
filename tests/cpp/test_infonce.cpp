// InfoNCE against its contract in double, and that contract's gradients against central differences.
#include "infonce_truth.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd/vec.h"
#include "testing.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

constexpr double kInf = INFINITY;

std::array<Group, kNumGroups> groups_on(std::initializer_list<int> on, ScoreMask mask = ScoreMask::kOwn, double margin = 0.1) {
    std::array<Group, kNumGroups> groups{};
    for (const int group : on) groups[group] = {true, mask, false, margin, 0};
    return groups;
}

std::array<Group, kNumGroups> all_groups(double margin = 0.1) {
    auto groups = groups_on({kOwnHard, kBatchPositive, kBatchHard, kQueryQuery, kDocOwn, kDocPositive, kDocHard});
    for (Group& group : groups) group.margin = margin;
    for (const int group : {kDocPositive, kDocHard}) groups[group].mask = ScoreMask::kQueryDocument;
    return groups;
}

void normalize(double* x, int64_t dim, double noise = 1, const double* towards = nullptr) {
    double squares = 0;
    for (int64_t i = 0; i < dim; ++i) squares += x[i] * x[i];
    for (int64_t i = 0; i < dim; ++i) x[i] = x[i] * noise / std::sqrt(squares) + (towards ? towards[i] : 0);
    if (towards) normalize(x, dim);
}

// Queries near their positives, hard negatives near those; shared positives, equal texts, documents of nobody and for nobody.
InfoNceCase make_case(int64_t num_queries, int64_t num_documents, int64_t dim, uint32_t seed, double noise = 0.8) {
    InfoNceCase c{num_queries, num_documents, dim, all_groups()};
    std::mt19937 random(seed);
    const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
    c.q = random_values<double>(static_cast<size_t>(num_queries * dim), seed + 1);
    c.d = random_values<double>(static_cast<size_t>(num_documents * dim), seed + 2);
    c.role.assign(static_cast<size_t>(num_documents), static_cast<uint8_t>(Role::kHard));
    for (int64_t j = 0; j < num_documents; ++j) {
        normalize(&c.d[j * dim], dim);
        c.owner.push_back(-1);
        c.document_text.push_back(7'000'000'000 + (j % 11 == 10 ? below(j) : j));
        if (j % 13 == 12) c.role[j] = static_cast<uint8_t>(Role::kAbsent);
    }
    for (int64_t i = 0; i < num_queries; ++i) {
        const int64_t p = i % 7 == 6 ? below(num_documents) : i % num_documents;
        c.positive.push_back(p);
        c.query_text.push_back(c.document_text[p]);
        c.owner[p] = i;
        if (c.role[p] == static_cast<uint8_t>(Role::kHard)) c.role[p] = static_cast<uint8_t>(Role::kPositive);
        normalize(&c.q[i * dim], dim, noise, &c.d[p * dim]);
    }
    for (int64_t j = 0; j < num_documents; ++j) {
        if (c.owner[j] >= 0 || j % 4 == 3) continue;
        c.owner[j] = below(num_queries);
        normalize(&c.d[j * dim], dim, 1.2, &c.d[c.positive[c.owner[j]] * dim]);
    }
    c.scale = 1.0 / static_cast<double>(num_queries);
    return c;
}

// The kernel on storage of type S and arithmetic T. `log_negatives`, `given`, `pull` as in the contract.
template <class T, class S = T>
InfoNceResult run(const InfoNceCase& c, DType dtype, const std::vector<S>& q, const std::vector<S>& d, Wide* given = nullptr,
                  bool pull = true, bool gradients = true) {
    Indices starts{0}, own;
    for (int64_t i = 0; i < c.num_queries; ++i) {
        for (int64_t j = 0; j < c.num_documents; ++j)
            if (c.owner[j] == i) own.push_back(j);
        starts.push_back(static_cast<int64_t>(own.size()));
    }
    InfoNceResult r{Wide(c.num_rows), {}, {}, Wide(1), Wide(5), given ? *given : Wide(c.num_rows * kMaxSoftmaxes)};
    std::vector<T> dq(c.q.size(), T(7)), dd(c.d.size(), T(7));
    InfoNce p{.queries = q.data(),
              .documents = d.data(),
              .positive = c.positive.data(),
              .query_text = c.query_text.data(),
              .document_text = c.document_text.data(),
              .role = c.role.data(),
              .owner = c.owner.data(),
              .own_starts = starts.data(),
              .own_documents = own.data(),
              .num_queries = c.num_queries,
              .num_documents = c.num_documents,
              .dim = c.dim,
              .first_row = c.first_row,
              .num_rows = c.num_rows,
              .first_column = c.first_column,
              .groups = {},
              .split = c.split,
              .temperature = c.temperature,
              .focal = c.focal,
              .scale = c.scale,
              .dims = c.dims.data(),
              .dim_weights = c.dim_weights.data(),
              .num_dims = static_cast<int64_t>(c.dims.size()),
              .loss = r.loss.data(),
              .d_queries = gradients ? dq.data() : nullptr,
              .d_documents = gradients ? dd.data() : nullptr,
              .d_temperature = r.d_temperature.data(),
              .stats = r.stats.data(),
              .log_negatives = c.dims.empty() ? r.log_negatives.data() : nullptr,
              .given = given != nullptr,
              .pull = pull,
              .dtype = dtype};
    std::copy(c.groups.begin(), c.groups.end(), p.groups);
    cpu::info_nce(p);
    if (gradients) r.dq.assign(dq.begin(), dq.end()), r.dd.assign(dd.begin(), dd.end());
    return r;
}

template <class T>
InfoNceResult run(const InfoNceCase& c, Wide* given = nullptr, bool pull = true, bool gradients = true) {
    const std::vector<T> q(c.q.begin(), c.q.end()), d(c.d.begin(), c.d.end());
    return run<T>(c, sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64, q, d, given, pull, gradients);
}

double largest(const Wide& values) {
    double most = 1e-6;
    for (const double value : values) most = std::isfinite(value) ? std::max(most, std::abs(value)) : most;
    return most;
}

void check_equal(const std::string& name, const InfoNceResult& r, const InfoNceResult& truth, double tolerance) {
    const auto check = [&](const char* part, const Wide& actual, const Wide& expected) {
        check_close((name + " " + part).c_str(), actual, expected, tolerance * largest(expected));
    };
    check("loss", r.loss, truth.loss);
    check("dq", r.dq, truth.dq);
    check("dd", r.dd, truth.dd);
    check("stats", r.stats, truth.stats);
    // Terms of both signs.
    check_close((name + " d_temperature").c_str(), r.d_temperature, truth.d_temperature, tolerance * largest(truth.dd) * 100);
}

template <class T>
void round_to(InfoNceCase& c) {
    for (Wide* x : {&c.q, &c.d})
        for (double& value : *x) value = static_cast<T>(value);
}

// Every instruction set, float and double.
void check_case(InfoNceCase c, const std::string& name, double float_tolerance = 3e-6, double double_tolerance = 1e-12) {
    round_to<float>(c);
    const InfoNceResult truth = infonce_truth(c);
    for (const std::string& isa : cpu::available_isas()) {
        cpu::set_isa(isa);
        check_equal(isa + " float " + name, run<float>(c), truth, float_tolerance);
        check_equal(isa + " double " + name, run<double>(c), truth, double_tolerance);
    }
}

Wide differences(const InfoNceCase& c, Wide InfoNceCase::* x) {
    Wide gradient;
    for (size_t at = 0; at < (c.*x).size(); ++at) {
        const auto loss = [&](double step) {
            InfoNceCase moved = c;
            (moved.*x)[at] += step;
            double total = 0;
            for (const double value : infonce_truth(moved).loss) total += value * c.scale;
            return total;
        };
        gradient.push_back((loss(1e-6) - loss(-1e-6)) / 2e-6);
    }
    return gradient;
}

}  // namespace

TEST(the_truth_has_the_gradients_of_its_loss) {
    for (const bool prefixes : {false, true}) {
        InfoNceCase c = make_case(7, 13, 5, 1);
        c.focal = 1.5;
        c.split = true;
        if (prefixes) c.dims = {2, 3, 5}, c.dim_weights = {0.2, 1, 0.5};
        const InfoNceResult truth = infonce_truth(c);
        check_close("dq", truth.dq, differences(c, &InfoNceCase::q), 1e-8);
        check_close("dd", truth.dd, differences(c, &InfoNceCase::d), 1e-8);
        CHECK(truth.stats[4] > 0);
        InfoNceCase warmer = c, colder = c;
        warmer.temperature += 1e-6, colder.temperature -= 1e-6;
        double change = 0;
        const Wide above = infonce_truth(warmer).loss, below = infonce_truth(colder).loss;
        for (size_t i = 0; i < above.size(); ++i) change += (above[i] - below[i]) * c.scale / 2e-6;
        check_close("d_temperature", truth.d_temperature, Wide{change}, 1e-8);
    }
}

TEST(any_groups_any_masks) {
    for (int on = 0; on < 1 << kNumGroups; ++on) {
        InfoNceCase c = make_case(11, 37, 7, static_cast<uint32_t>(on));
        std::mt19937 random(static_cast<uint32_t>(on));
        for (int group = 0; group < kNumGroups; ++group) {
            const bool of_documents = group >= kDocOwn;
            c.groups[group] = {((on >> group) & 1) != 0, static_cast<ScoreMask>(random() % (of_documents ? 3 : 2)),
                               random() % 2 == 0, static_cast<double>(random() % 5) / 10 - 0.087,
                               random() % 2 ? static_cast<double>(random() % 5) : 0};
        }
        c.split = random() % 2;
        c.focal = random() % 3;
        c.first_row = static_cast<int64_t>(random() % 4), c.num_rows = 7, c.first_column = static_cast<int64_t>(random() % 11);
        if (on % 3 == 0) c.dims = {2, 3, 7}, c.dim_weights = {0.3, 0, 1};
        check_case(c, "groups " + std::to_string(on));
    }
}

TEST(sizes_around_tiles_and_panels) {
    for (const auto& [queries, documents] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {2, 1}, {1, 2}, {47, 255}, {48, 256}, {49, 257}, {255, 300}, {257, 258}, {400, 520}, {900, 30}}) {
        InfoNceCase c = make_case(queries, documents, 19, 5);
        check_case(c, std::to_string(queries) + " x " + std::to_string(documents));
        c.dims = {3, 16, 19}, c.dim_weights = {1, 0.5, 0.25};
        check_case(c, std::to_string(queries) + " x " + std::to_string(documents) + " prefixes");
    }
}

TEST(prefixes_of_any_width) {
    for (const Indices& dims : std::vector<Indices>{{33}, {40}, {1, 2, 3, 40}, {16, 32}, {5, 17, 31, 33, 40}, {8, 40}}) {
        InfoNceCase c = make_case(20, 60, 40, 6);
        for (double& x : c.q) x *= 1.7;  // gradients are those of the vectors as they came
        c.dims = dims;
        for (size_t k = 0; k < dims.size(); ++k) c.dim_weights.push_back(1.0 / static_cast<double>(1 + k));
        // The gradient of a prefix of one feature is zero, by cancellation.
        const double tolerance = dims[0] == 1 ? 1e-5 : 3e-6;
        check_case(c, "prefixes to " + std::to_string(dims.back()) + " by " + std::to_string(dims.size()), tolerance);
        c.split = true, c.focal = 2, c.dim_weights[0] = 0;
        check_case(c, "split prefixes to " + std::to_string(dims.back()) + " by " + std::to_string(dims.size()), tolerance);
    }
}

TEST(a_small_weight_keeps_its_gradient) {
    InfoNceCase c = make_case(30, 90, 24, 7);
    c.dims = {4, 24}, c.dim_weights = {1e-30, 0};
    InfoNceCase whole = c;
    whole.dim_weights[0] = 1;
    InfoNceResult truth = infonce_truth(whole);
    for (const std::string& isa : cpu::available_isas()) {
        cpu::set_isa(isa);
        InfoNceResult r = run<float>(c);
        for (Wide* x : {&r.loss, &r.dq, &r.dd, &r.d_temperature})
            for (double& value : *x) value *= 1e30;
        check_equal(isa, r, truth, 3e-6);
    }
}

TEST(low_temperatures) {
    for (const double temperature : {0.05, 0.02, 0.01})
        for (const int64_t dim : {64, 300}) {
            InfoNceCase c = make_case(60, 300, dim, 8);
            c.temperature = temperature;
            check_case(c, "temperature " + std::to_string(temperature) + ", d = " + std::to_string(dim), 2e-6, 1e-11);
        }
    InfoNceCase c = make_case(20, 50, 64, 9, 30);  // no similarity above 0.3
    c.groups = all_groups(1);
    c.temperature = 0.005;
    check_case(c, "temperature 0.005", 3e-6, 1e-11);
}

TEST(a_sure_row_keeps_its_gradient) {
    InfoNceCase c = make_case(12, 30, 16, 10, 0.05);
    c.temperature = 0.01;
    check_case(c, "sure", 5e-6, 1e-10);
}

TEST(nothing_left) {
    InfoNceCase c = make_case(20, 60, 12, 11);
    c.groups = all_groups(-5);  // every candidate is masked
    check_case(c, "all masked");
    c.groups = all_groups();
    c.owner.assign(c.owner.size(), -1);
    check_case(c, "no owners");
    c.groups = {};
    check_case(c, "no groups");
    c.groups = groups_on({kQueryQuery});
    c.first_column = c.num_queries;
    check_case(c, "no columns");
    c.groups = all_groups();
    c.role.assign(c.role.size(), static_cast<uint8_t>(Role::kAbsent));
    check_case(c, "all absent");
    c.first_row = 5, c.num_rows = 0;
    check_case(c, "no rows");
    for (const double value : run<float>(c).dq) CHECK(value == 0);
}

TEST(rows_add_up_to_the_whole) {
    const InfoNceCase c = make_case(50, 120, 9, 12);
    const InfoNceResult whole = infonce_truth(c);
    InfoNceResult sum{{}, Wide(c.q.size()), Wide(c.d.size()), Wide(1), Wide(5), {}};
    for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 17}, {17, 0}, {17, 33}}) {
        InfoNceCase part = c;
        part.first_row = first, part.num_rows = count;
        const InfoNceResult r = run<double>(part);
        sum.loss.insert(sum.loss.end(), r.loss.begin(), r.loss.end());
        for (const auto& x : {&InfoNceResult::dq, &InfoNceResult::dd, &InfoNceResult::d_temperature, &InfoNceResult::stats})
            for (size_t i = 0; i < (sum.*x).size(); ++i) (sum.*x)[i] += (r.*x)[i];
    }
    check_equal("rows", sum, whole, 1e-12);
}

// Documents in blocks: the first round's sums make the second round's losses and gradients.
template <class T>
void check_blocks(bool split, double focal, double tolerance) {
    InfoNceCase c = make_case(40, 300, 11, 13);
    c.split = split, c.focal = focal;
    round_to<float>(c);
    const InfoNceResult whole = infonce_truth(c);
    std::vector<InfoNceCase> blocks(3, c);
    for (int64_t j = 0; j < c.num_documents; ++j)
        for (int64_t block = 0; block < 3; ++block)
            if (j * 3 / c.num_documents != block) blocks[block].role[j] = static_cast<uint8_t>(Role::kAbsent);
    for (InfoNceCase& block : blocks) block.first_column = &block == &blocks[1] ? 0 : c.num_queries;
    Wide given(whole.log_negatives.size(), -kInf);
    for (const InfoNceCase& block : blocks) {
        const InfoNceResult r = run<T>(block, nullptr, true, false), truth = infonce_truth(block);
        check_close("loss of a block", r.loss, truth.loss, tolerance);
        for (int64_t row = 0; row < c.num_rows; ++row)
            for (int s = 0; s < (split ? kMaxSoftmaxes : 1); ++s) {
                const int64_t at = row * kMaxSoftmaxes + s;
                const double x = r.log_negatives[at], y = truth.log_negatives[at];
                CHECK(x == y || std::abs(x - y) <= 10 * tolerance);
                const double high = std::max(given[at], x), low = std::min(given[at], x);
                if (high > -kInf) given[at] = high + std::log1p(std::exp(low - high));
            }
    }
    InfoNceResult sum{{}, Wide(c.q.size()), Wide(c.d.size()), Wide(1), Wide(5), {}};
    for (size_t block = 0; block < blocks.size(); ++block) {
        const InfoNceResult r = run<T>(blocks[block], &given, block == 2);
        sum.loss = r.loss;
        CHECK(r.log_negatives == given);
        for (const auto& x : {&InfoNceResult::dq, &InfoNceResult::dd, &InfoNceResult::d_temperature, &InfoNceResult::stats})
            for (size_t i = 0; i < (sum.*x).size(); ++i) (sum.*x)[i] += (r.*x)[i];
    }
    sum.stats[0] /= 3;
    check_equal("blocks", sum, whole, tolerance);
}
TEST(blocks_add_up_to_the_whole) {
    for (const bool split : {false, true})
        for (const double focal : {0.0, 2.0})
            check_blocks<double>(split, focal, 1e-12), check_blocks<float>(split, focal, 3e-6);
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
            const InfoNceResult truth = infonce_truth(c);
            for (const std::string& isa : cpu::available_isas()) {
                cpu::set_isa(isa);
                check_equal(isa + (brain ? " bfloat16" : " float16"), run<float>(c, dtype, stored[0], stored[1]), truth, 3e-6);
            }
        }
    }
}

TEST(threads_change_nothing) {
    const int before = cpu::num_threads();
    for (const bool prefixes : {false, true}) {
        InfoNceCase c = make_case(450, 600, 40, 15);
        if (prefixes) c.dims = {7, 24, 40}, c.dim_weights = {1, 1, 1};
        InfoNceResult first;
        for (const int threads : {1, 2, 5}) {
            cpu::set_num_threads(threads);
            const InfoNceResult r = run<float>(c);
            if (threads == 1) first = r;
            CHECK(r.loss == first.loss && r.dq == first.dq && r.dd == first.dd);
            CHECK(r.d_temperature == first.d_temperature && r.stats == first.stats);
        }
    }
    cpu::set_num_threads(before);
}

int main() { return run_all(); }
