// InfoNCE straight from the contract, in double: every candidate listed, gradients by the chain rule.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops/info_nce.h"
#include "prefixes.h"

namespace qemb::testing {

using Indices = std::vector<int64_t>;
using Wide = std::vector<double>;

struct InfoNceCase {
    int64_t num_queries, num_documents, dim;
    std::array<Group, kNumGroups> groups{};
    bool split = false;
    double temperature = 0.2, focal = 0, scale = 1;
    int64_t first_row = 0, num_rows = num_queries, first_column = 0;
    Indices dims{};
    Wide dim_weights{};
    Wide q{}, d{};
    Indices positive{}, query_text{}, document_text{}, owner{};
    std::vector<uint8_t> role{};
};

struct InfoNceResult {
    Wide loss, dq, dd, d_temperature, stats, log_negatives;
};

// Which group document j belongs to for row i: 0 to 2 its own, a positive, another; -1: none.
inline int part_of(const InfoNceCase& c, int64_t i, int64_t j) {
    if (j == c.positive[i] || c.role[j] == static_cast<uint8_t>(Role::kAbsent)) return -1;
    return c.owner[j] == i ? 0 : c.role[j] == static_cast<uint8_t>(Role::kPositive) ? 1 : 2;
}

struct Candidate {
    int group;
    double score;
    const double *anchor, *other;
    double *d_anchor, *d_other;
};

// Adds one prefix of row i, of unit vectors q and d, to loss and gradients with regard to them.
inline void truth_of_row(const InfoNceCase& c, int64_t i, int64_t dim, const Wide& q, const Wide& d, double share, bool last,
                         const double* given, bool pull, InfoNceResult& r) {
    const auto dot = [&](const double* x, const double* y) {
        double sum = 0;
        for (int64_t f = 0; f < dim; ++f) sum += x[f] * y[f];
        return sum;
    };
    const double *const query = &q[i * dim], *const positive = &d[c.positive[i] * dim], s = dot(query, positive);
    double *const dq = &r.dq[i * dim], *const dp = &r.dd[c.positive[i] * dim];
    std::vector<Candidate> candidates;
    const auto offer = [&](int group, double held, bool equal, Candidate candidate) {
        const Group& g = c.groups[group];
        if (!g.on) return;
        const double limit = g.relative ? s + g.margin * std::abs(s) : s + g.margin;
        const bool dropped = equal || (g.mask != ScoreMask::kNone && held > limit);
        if (last) ++r.stats[dropped ? 4 : 3];
        if (last && !dropped && group <= kBatchHard) r.stats[1] += candidate.score, r.stats[2] += 1;
        candidate.group = group;
        if (!dropped) candidates.push_back(candidate);
    };
    if (last) r.stats[0] += s;
    for (int64_t j = 0; j < c.num_documents; ++j) {
        const int part = part_of(c, i, j);
        if (part < 0) continue;
        const double* const other = &d[j * dim];
        const double by_query = dot(query, other), by_positive = dot(positive, other);
        const bool equal = c.document_text[j] == c.query_text[i];
        offer(kOwnHard + part, by_query, equal, {0, by_query, query, other, dq, &r.dd[j * dim]});
        const bool literal = c.groups[kDocOwn + part].mask == ScoreMask::kQueryDocument;
        offer(kDocOwn + part, literal ? by_query : by_positive, equal, {0, by_positive, positive, other, dp, &r.dd[j * dim]});
    }
    for (int64_t j = c.first_column; j < c.num_queries; ++j) {
        const double *const other = &q[j * dim], score = dot(query, other);
        if (j != i) offer(kQueryQuery, score, c.query_text[j] == c.query_text[i], {0, score, query, other, dq, &r.dq[j * dim]});
    }
    const auto softmax_of = [&](int group) {
        return !c.split || group == kOwnHard ? 0 : group <= kBatchHard ? 1 : group == kQueryQuery ? 2 : 3;
    };
    for (int softmax = 0; softmax < (c.split ? kMaxSoftmaxes : 1); ++softmax) {
        double best = s / c.temperature;
        const auto logit = [&](const Candidate& x) { return x.score * (1 / c.temperature + c.groups[x.group].hardness); };
        for (const Candidate& x : candidates) best = std::max(best, logit(x));
        double negatives = 0;
        for (const Candidate& x : candidates)
            if (softmax_of(x.group) == softmax) negatives += std::exp(logit(x) - best);
        const int64_t row = (i - c.first_row) * kMaxSoftmaxes + softmax;
        r.log_negatives[row] = std::log(negatives) + best;
        if (given) negatives = std::exp(given[row] - best);
        bool on = !c.split;
        for (int group = 0; group < kNumGroups; ++group) on |= c.groups[group].on && softmax_of(group) == softmax;
        if (!on) continue;
        const double positive_part = std::exp(s / c.temperature - best), left = negatives / (negatives + positive_part);
        const double value = std::log1p(negatives / positive_part), factor = std::pow(left, c.focal);
        r.loss[i - c.first_row] += share * factor * value;
        // With x = value: left = 1 - exp(-x), d(left^focal * x)/dx.
        const double slope = left > 0 ? factor * (1 + c.focal * (1 - left) * value / left) : c.focal > 0 ? 0 : 1;
        const double gradient = share * c.scale * slope;
        const auto add = [&](double of_score, double score, const Candidate& x) {
            for (int64_t f = 0; f < dim; ++f) {
                x.d_anchor[f] += of_score * x.other[f];
                x.d_other[f] += of_score * x.anchor[f];
            }
            r.d_temperature[0] -= of_score * score / c.temperature;
        };
        for (const Candidate& x : candidates)
            if (softmax_of(x.group) == softmax)
                add(gradient * std::exp(logit(x) - best) / (negatives + positive_part) / c.temperature, x.score, x);
        if (pull) add(-gradient * left / c.temperature, s, {0, s, query, positive, dq, dp});
    }
}

// What is `given` (log_negatives of all blocks) and `pull` as in the contract.
inline InfoNceResult info_nce_truth(const InfoNceCase& c, const double* given = nullptr, bool pull = true) {
    InfoNceResult all{Wide(c.num_rows), Wide(c.q.size()), Wide(c.d.size()), Wide(1), Wide(5), Wide(c.num_rows * kMaxSoftmaxes)};
    const int64_t layers = c.dims.empty() ? 1 : static_cast<int64_t>(c.dims.size());
    for (int64_t k = 0; k < layers; ++k) {
        const int64_t dim = c.dims.empty() ? c.dim : c.dims[k];
        const auto exact = [](double x) { return x; };
        const Prefix q(c.q, dim, c.dim, !c.dims.empty(), exact), d(c.d, dim, c.dim, !c.dims.empty(), exact);
        InfoNceResult part = all;
        part.dq.assign(q.unit.size(), 0), part.dd.assign(d.unit.size(), 0);
        for (int64_t i = c.first_row; i < c.first_row + c.num_rows; ++i)
            truth_of_row(c, i, dim, q.unit, d.unit, c.dims.empty() ? 1 : c.dim_weights[k], k == layers - 1, given, pull, part);
        const Wide dq = std::move(all.dq), dd = std::move(all.dd);
        all = part;
        all.dq = dq, all.dd = dd;
        q.add_gradient(part.dq, 1, all.dq);
        d.add_gradient(part.dd, 1, all.dd);
    }
    return all;
}

}  // namespace qemb::testing
