// Batches for the tests of InfoNCE, the kernel's run on them, and how results are compared.
#pragma once

#include "cpu/isa.h"
#include "info_nce_truth.h"
#include "testing.h"

namespace qemb::testing {

inline std::array<Group, kNumGroups> groups_on(std::initializer_list<int> on, ScoreMask mask = ScoreMask::kOwn,
                                               double margin = 0.1) {
    std::array<Group, kNumGroups> groups{};
    for (const int group : on) groups[group] = {true, mask, false, margin, 0};
    return groups;
}

inline std::array<Group, kNumGroups> all_groups(double margin = 0.1) {
    auto groups = groups_on({kOwnHard, kBatchPositive, kBatchHard, kQueryQuery, kDocOwn, kDocPositive, kDocHard});
    for (Group& group : groups) group.margin = margin;
    for (const int group : {kDocPositive, kDocHard}) groups[group].mask = ScoreMask::kQueryDocument;
    return groups;
}

inline void normalize(double* x, int64_t dim, double noise = 1, const double* towards = nullptr) {
    double squares = 0;
    for (int64_t i = 0; i < dim; ++i) squares += x[i] * x[i];
    for (int64_t i = 0; i < dim; ++i) x[i] = x[i] * noise / std::sqrt(squares) + (towards ? towards[i] : 0);
    if (towards) normalize(x, dim);
}

// Queries near their positives, hard negatives near those; shared positives, equal texts, documents of nobody and for
// nobody.
inline InfoNceCase make_case(int64_t num_queries, int64_t num_documents, int64_t dim, uint32_t seed,
                             double noise = 0.8) {
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

// The kernel on storage of type S and arithmetic T. `log_negatives`, `given`, `adds_positive` as in the contract.
template <class T, class S = T>
InfoNceResult run(const InfoNceCase& c, DType dtype, const std::vector<S>& q, const std::vector<S>& d,
                  Wide* given = nullptr, bool adds_positive = true, bool gradients = true) {
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
              .options = c.options(),
              .dims = c.dims.data(),
              .dim_weights = c.dim_weights.data(),
              .num_dims = static_cast<int64_t>(c.dims.size()),
              .loss = r.loss.data(),
              .d_queries = gradients ? dq.data() : nullptr,
              .d_documents = gradients ? dd.data() : nullptr,
              .d_temperature = r.d_temperature.data(),
              .stats = r.stats.data(),
              .log_negatives = c.dims.empty() ? r.log_negatives.data() : nullptr,
              .log_negatives_given = given != nullptr,
              .adds_positive = adds_positive,
              .dtype = dtype};
    cpu::info_nce(p);
    if (gradients) r.dq.assign(dq.begin(), dq.end()), r.dd.assign(dd.begin(), dd.end());
    return r;
}

template <class T>
InfoNceResult run(const InfoNceCase& c, Wide* given = nullptr, bool adds_positive = true, bool gradients = true) {
    const std::vector<T> q(c.q.begin(), c.q.end()), d(c.d.begin(), c.d.end());
    return run<T>(c, sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64, q, d, given, adds_positive, gradients);
}

inline double largest(const Wide& values) {
    double result = 1e-6;
    for (const double value : values) result = std::isfinite(value) ? std::max(result, std::abs(value)) : result;
    return result;
}

inline void check_equal(const std::string& name, const InfoNceResult& r, const InfoNceResult& truth, double tolerance) {
    const auto check = [&](const char* part, const Wide& actual, const Wide& expected) {
        check_close((name + " " + part).c_str(), actual, expected, tolerance * largest(expected));
    };
    check("loss", r.loss, truth.loss);
    check("dq", r.dq, truth.dq);
    check("dd", r.dd, truth.dd);
    check("stats", r.stats, truth.stats);
    // Terms of both signs.
    check_close((name + " d_temperature").c_str(), r.d_temperature, truth.d_temperature,
                tolerance * largest(truth.dd) * 100);
}

template <class T>
void round_to(InfoNceCase& c) {
    for (Wide* x : {&c.q, &c.d})
        for (double& value : *x) value = static_cast<T>(value);
}

template <class Check>
void each_isa(Check check) {
    for (const std::string& isa : cpu::available_isas()) {
        cpu::set_isa(isa);
        check(isa);
    }
}

}  // namespace qemb::testing
