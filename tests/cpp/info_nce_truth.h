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

    InfoNceOptions options() const {
        InfoNceOptions o{.groups = {}, .split = split, .temperature = temperature, .focal = focal, .scale = scale};
        std::copy(groups.begin(), groups.end(), o.groups);
        return o;
    }
};

struct InfoNceResult {
    Wide loss, dq, dd, d_temperature, stats, log_negatives;
};

struct Candidate {
    int group;
    double score;
    const double *anchor, *other;
    double *d_anchor, *d_other;
};

// Adds one prefix of row i, of unit vectors q and d, to loss and gradients with regard to them.
inline void truth_of_row(const InfoNceCase& c, int64_t i, int64_t dim, const Wide& q, const Wide& d, double share,
                         bool last, const double* given, bool adds_positive, InfoNceResult& r) {
    const auto dot = [&](const double* x, const double* y) {
        double sum = 0;
        for (int64_t f = 0; f < dim; ++f) sum += x[f] * y[f];
        return sum;
    };
    const double *const query = &q[i * dim], *const positive = &d[c.positive[i] * dim], s = dot(query, positive);
    double *const dq = &r.dq[i * dim], *const dp = &r.dd[c.positive[i] * dim];
    const GroupRules rules = rules_of(c.options());
    std::vector<Candidate> candidates;
    const auto offer = [&](int group, double of_query, bool equal, Candidate candidate) {
        const Group& g = c.groups[group];
        if (!g.on) return;
        const bool dropped = equal || held_score(g, candidate.score, of_query) > limit_of(g, s);
        if (last) ++r.stats[dropped ? 4 : 3];
        if (last && !dropped && kGroupTable[group].kind == kQueryDocument)
            r.stats[1] += candidate.score, r.stats[2] += 1;
        candidate.group = group;
        if (!dropped) candidates.push_back(candidate);
    };
    if (last) r.stats[0] += s;
    for (int64_t j = 0; j < c.num_documents; ++j) {
        const Role role = static_cast<Role>(c.role[j]);
        if (!is_candidate(j, c.positive[i], role)) continue;
        const bool owned = c.owner[j] == i;
        const double* const other = &d[j * dim];
        const double by_query = dot(query, other), by_positive = dot(positive, other);
        const bool equal = c.document_text[j] == c.query_text[i];
        offer(owned ? group_of_owned(0) : group_of(kQueryDocument, role), by_query, equal,
              {0, by_query, query, other, dq, &r.dd[j * dim]});
        offer(owned ? group_of_owned(1) : group_of(kDocDoc, role), by_query, equal,
              {0, by_positive, positive, other, dp, &r.dd[j * dim]});
    }
    for (int64_t j = c.first_column; j < c.num_queries; ++j) {
        const double *const other = &q[j * dim], score = dot(query, other);
        if (j != i)
            offer(kQueryQuery, score, c.query_text[j] == c.query_text[i], {0, score, query, other, dq, &r.dq[j * dim]});
    }
    const auto softmax_of = [&](int group) { return c.split ? kGroupTable[group].softmax : 0; };
    for (int softmax = 0; softmax < rules.num_softmaxes(); ++softmax) {
        double best = s / c.temperature;
        const auto logit = [&](const Candidate& x) {
            return x.score * (1 / c.temperature + c.groups[x.group].hardness);
        };
        for (const Candidate& x : candidates) best = std::max(best, logit(x));
        double negatives = 0;
        for (const Candidate& x : candidates)
            if (softmax_of(x.group) == softmax) negatives += std::exp(logit(x) - best);
        const int64_t row = (i - c.first_row) * kMaxSoftmaxes + softmax;
        r.log_negatives[row] = std::log(negatives) + best;
        if (given) negatives = std::exp(given[row] - best);
        if (!rules.softmax_is_on[softmax]) continue;
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
        if (adds_positive) add(-gradient * left / c.temperature, s, {0, s, query, positive, dq, dp});
    }
}

// What is `given` (log_negatives of all blocks) and `adds_positive` as in the contract.
inline InfoNceResult info_nce_truth(const InfoNceCase& c, const double* given = nullptr, bool adds_positive = true) {
    InfoNceResult all{Wide(c.num_rows), Wide(c.q.size()), Wide(c.d.size()),
                      Wide(1),          Wide(5),          Wide(c.num_rows * kMaxSoftmaxes)};
    const int64_t layers = c.dims.empty() ? 1 : static_cast<int64_t>(c.dims.size());
    for (int64_t k = 0; k < layers; ++k) {
        const int64_t dim = c.dims.empty() ? c.dim : c.dims[k];
        const auto exact = [](double x) { return x; };
        const Prefix q(c.q, dim, c.dim, !c.dims.empty(), exact), d(c.d, dim, c.dim, !c.dims.empty(), exact);
        InfoNceResult part = all;
        part.dq.assign(q.unit.size(), 0), part.dd.assign(d.unit.size(), 0);
        for (int64_t i = c.first_row; i < c.first_row + c.num_rows; ++i)
            truth_of_row(c, i, dim, q.unit, d.unit, c.dims.empty() ? 1 : c.dim_weights[k], k == layers - 1, given,
                         adds_positive, part);
        const Wide dq = std::move(all.dq), dd = std::move(all.dd);
        all = part;
        all.dq = dq, all.dd = dd;
        q.add_gradient(part.dq, 1, all.dq);
        d.add_gradient(part.dd, 1, all.dd);
    }
    return all;
}

}  // namespace qemb::testing
