// InfoNCE against its contract in double, and that contract's gradients against central differences.
#include "info_nce_cases.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

// Every instruction set, float and double.
void check_case(InfoNceCase c, const std::string& name, double float_tolerance = 3e-6,
                double double_tolerance = 1e-12) {
    round_to<float>(c);
    const InfoNceResult truth = info_nce_truth(c);
    each_isa([&](const std::string& isa) {
        check_equal(isa + " float " + name, run<float>(c), truth, float_tolerance);
        check_equal(isa + " double " + name, run<double>(c), truth, double_tolerance);
    });
}

Wide differences(const InfoNceCase& c, Wide InfoNceCase::* x) {
    Wide gradient;
    for (size_t at = 0; at < (c.*x).size(); ++at) {
        const auto loss = [&](double step) {
            InfoNceCase moved = c;
            (moved.*x)[at] += step;
            double total = 0;
            for (const double value : info_nce_truth(moved).loss) total += value * c.scale;
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
        const InfoNceResult truth = info_nce_truth(c);
        check_close("dq", truth.dq, differences(c, &InfoNceCase::q), 1e-8);
        check_close("dd", truth.dd, differences(c, &InfoNceCase::d), 1e-8);
        CHECK(truth.stats[4] > 0);
        InfoNceCase warmer = c, colder = c;
        warmer.temperature += 1e-6, colder.temperature -= 1e-6;
        double change = 0;
        const Wide above = info_nce_truth(warmer).loss, below = info_nce_truth(colder).loss;
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
        c.first_row = static_cast<int64_t>(random() % 4), c.num_rows = 7,
        c.first_column = static_cast<int64_t>(random() % 11);
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
    for (const Indices& dims :
         std::vector<Indices>{{33}, {40}, {1, 2, 3, 40}, {16, 32}, {5, 17, 31, 33, 40}, {8, 40}}) {
        InfoNceCase c = make_case(20, 60, 40, 6);
        for (double& x : c.q) x *= 1.7;  // gradients are those of the vectors as they came
        c.dims = dims;
        for (size_t k = 0; k < dims.size(); ++k) c.dim_weights.push_back(1.0 / static_cast<double>(1 + k));
        // The gradient of a prefix of one feature is zero, by cancellation.
        const double tolerance = dims[0] == 1 ? 1e-5 : 3e-6;
        check_case(c, "prefixes to " + std::to_string(dims.back()) + " by " + std::to_string(dims.size()), tolerance);
        c.split = true, c.focal = 2, c.dim_weights[0] = 0;
        check_case(c, "split prefixes to " + std::to_string(dims.back()) + " by " + std::to_string(dims.size()),
                   tolerance);
    }
}

TEST(a_small_weight_keeps_its_gradient) {
    InfoNceCase c = make_case(30, 90, 24, 7);
    c.dims = {4, 24}, c.dim_weights = {1e-30, 0};
    InfoNceCase whole = c;
    whole.dim_weights[0] = 1;
    InfoNceResult truth = info_nce_truth(whole);
    each_isa([&](const std::string& isa) {
        InfoNceResult r = run<float>(c);
        for (Wide* x : {&r.loss, &r.dq, &r.dd, &r.d_temperature})
            for (double& value : *x) value *= 1e30;
        check_equal(isa, r, truth, 3e-6);
    });
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

int main() { return run_all(); }
