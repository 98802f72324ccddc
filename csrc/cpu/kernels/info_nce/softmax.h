// The softmaxes of a row: offsets, sums, losses, and the weights of the gradient.
#pragma once

#include "cpu/kernels/info_nce/owned.h"

namespace qemb::cpu::QEMB_ISA::info_nce_kernels {

// Calls visit(tile, kind) for the tiles of a softmax.
template <class T, class Visit>
QEMB_INLINE void each_tile(const Panel<T>& a, int s, Visit visit) {
    for (int kind = 0; kind < kNumKinds; ++kind) {
        if (!a.dense[kind] || a.softmax_of(static_cast<Kind>(kind)) != s) continue;
        for (int64_t i = 0; i < a.tiles[kind]; ++i) visit(a.first_tile[kind] + i, static_cast<Kind>(kind));
    }
}

// The largest logit of each softmax of a row, the positive's included.
template <class T>
void find_offsets(const Panel<T>& a, int64_t r) {
    for (int64_t k = 0; k < a.layers; ++k) {
        for (int s = 0; s < a.num_softmaxes(); ++s) {
            double best = a.score[r * a.layers + k] * kLog2E<double> / a.p.options.temperature;
            each_tile(a, s, [&](int64_t tile, Kind) {
                best = max_of(best, static_cast<double>(a.tile_max[a.of_tile(tile, k) + r]));
            });
            if (a.p.log_negatives_given)
                best = max_of(best, a.p.log_negatives[(a.first + r) * kMaxSoftmaxes + s] * kLog2E<double>);
            a.softmax(r, k, s) = {best, 0, 0};
        }
        each_own(a, r, k, [&](int s, Own& own, int side) {
            double& best = a.softmax(r, k, s).offset;
            best = max_of(best, own.score[side] * a.logit_scale[group_of_owned(side)]);
        });
        for (int s = 0; s < a.num_softmaxes(); ++s) {
            double& best = a.softmax(r, k, s).offset;
            best = static_cast<double>(static_cast<T>(best));  // as the tiles have it
        }
    }
}

// The logit's scale of each column of a tile, in two parts: the rounding of one would count as often as the exponent is
// large.
template <class T>
struct Scales {
    T high[kTile], low[kTile];
};

template <class T>
inline void fill_scales(const Panel<T>& a, int64_t tile, Scales<T>& scales) {
    const Kind kind = a.kind_of(tile);
    const int64_t start = (tile - a.first_tile[kind]) * kTile;
    for (int64_t j = 0; j < kTile; ++j) {
        const double scale = a.logit_scale[a.group_at(kind, start + j)];
        scales.high[j] = static_cast<T>(scale);
        scales.low[j] = static_cast<T>(scale - static_cast<double>(scales.high[j]));
    }
}

// Scores of a tile become weights; each row leaves its sums.
template <class T>
void exponentiate(const Panel<T>& a, int64_t tile) {
    const Kind kind = a.kind_of(tile);
    if (!a.dense[kind]) return;
    const bool sums_scores = a.prefixes || a.p.d_temperature;
    Scales<T> scales;
    fill_scales(a, tile, scales);
    for (int64_t k = 0; k < a.layers; ++k)
        for (int64_t r = 0; r < a.count; ++r) {
            T* values = a.weights(tile, k) + r * kTile;
            const T offset = static_cast<T>(a.softmax(r, k, a.softmax_of(kind)).offset);
            Vec<T> sum{}, weighted_score_sum{};
            for (int64_t j = 0; j < kTile; j += kLanes<T>) {
                const Vec<T> score = load(values + j);
                const Vec<T> weight = exp2<T>(score * load(scales.high + j) + (score * load(scales.low + j) - offset));
                store(values + j, weight);
                sum += weight;
                if (sums_scores) weighted_score_sum += weight * score;
            }
            a.tile_sum[a.of_tile(tile, k) + r] = sum_lanes<T>(sum);
            a.tile_weighted_score_sum[a.of_tile(tile, k) + r] = sums_scores ? sum_lanes<T>(weighted_score_sum) : T(0);
        }
}

// The score of row r and a column of a tile, in double from the vectors as they are stored.
template <class T>
double exact_score(const Panel<T>& a, int64_t r, int64_t k, Kind kind, int64_t column) {
    T* buffer = static_cast<T*>(scratch_bytes(Slot::kTile, static_cast<size_t>(a.dim) * sizeof(T)));
    const int64_t end = a.layer_end(k);
    const T* const row = a.anchor[side_of(kind)] + r * a.dim;
    const T* const other = read(a.p.dtype, a.columns_of(kind), column * a.dim, end, buffer);
    const double product = exact_dot(row, other, 0, end);
    if (!a.prefixes) return product;
    return product * one_over_norm(exact_dot(row, row, 0, end)) * one_over_norm(exact_dot(other, other, 0, end));
}

// A product in float is off by some 5e-8, which at a temperature of 0.01 is 5e-6 of a weight. The few candidates that
// make up a row are weighed anew from products in double. `change(kind, weight, moment)` gets the differences.
template <class T, class Change>
void refine(const Panel<T>& a, int64_t r, int64_t k, int s, double negatives, Change change) {
    const double offset = a.softmax(r, k, s).offset, threshold = negatives / 64;
    const double lowest = __builtin_log2(0.999 * threshold) + offset;
    each_tile(a, s, [&](int64_t tile, Kind kind) {
        if (!(static_cast<double>(a.tile_max[a.of_tile(tile, k) + r]) >= lowest))
            return;  // a row with NaN stays as it is
        T* values = a.weights(tile, k) + r * kTile;
        const int64_t i = tile - a.first_tile[kind];
        for (int64_t j = 0; j < a.columns_in(kind, i); ++j) {
            const double before = static_cast<double>(values[j]);
            if (before <= threshold) continue;
            const double scale = a.logit_scale[a.group_at(kind, i * kTile + j)];
            const double score = exact_score(a, r, k, kind, i * kTile + j);
            const double weight = __builtin_exp2(score * scale - offset);
            values[j] = static_cast<T>(weight);
            change(kind, weight - before, weight * score - before * (__builtin_log2(before) + offset) / scale);
        }
    });
}

// Coefficients of the raw vectors: those of a segment are sums over the layers that contain it.
template <class T>
void to_raw_vectors(const Panel<T>& a, int64_t r) {
    const auto norm = [&](int side, int64_t k) { return static_cast<double>(a.anchor_norm[side][r * a.layers + k]); };
    double d_positive_score = 0, radial_grad[2] = {};
    for (int64_t k = a.layers - 1; k >= 0; --k) {
        d_positive_score += a.d_positive_score[r * a.layers + k] * norm(0, k) * norm(1, k);
        a.d_positive_score_sum[r * a.layers + k] = d_positive_score;
        for (int side = 0; side < 2; ++side) {
            double& value = a.radial_grad[side][r * a.layers + k];
            radial_grad[side] += value * norm(side, k) * norm(side, k);
            value = radial_grad[side];
        }
    }
    if (!a.prefixes) return;
    for (int64_t e = a.own_end(a.first + r); e < a.own_end(a.first + r + 1); ++e) {
        Own* own = a.own + (e - a.entries_first) * a.layers;
        const T* norms = a.column_norm[0] + a.p.own_documents[e] * a.layers;
        double weights[2] = {}, own_radial_grad = 0;
        for (int64_t k = a.layers - 1; k >= 0; --k) {
            const double of_document = static_cast<double>(norms[k]);
            own_radial_grad += own[k].radial_grad * of_document * of_document;
            own[k].radial_grad = own_radial_grad;
            for (int side = 0; side < 2; ++side)
                own[k].weight[side] = weights[side] += own[k].weight[side] * norm(side, k) * of_document;
        }
    }
}

// Losses, and the weights of the gradient. The positive's is -(Z_neg / Z), never P - 1: that would cancel.
template <class T>
void finish_row(const Panel<T>& a, int64_t r) {
    const InfoNce& p = a.p;
    const int64_t row = a.first + r;
    double loss = 0, d_tau = 0;
    for (int64_t k = 0; k < a.layers; ++k) {
        const double score = a.score[r * a.layers + k], share_of_layer = a.prefixes ? p.dim_weights[k] : 1;
        // What the row owns
        double weighted_score_sums[kMaxSoftmaxes][2] = {};
        each_own(a, r, k, [&](int s, Own& own, int side) {
            Softmax& softmax = a.softmax(r, k, s);
            own.weight[side] = __builtin_exp2(own.score[side] * a.logit_scale[group_of_owned(side)] - softmax.offset);
            softmax.negatives += own.weight[side];
            weighted_score_sums[s][side] += own.weight[side] * own.score[side];
        });
        double d_positive_score = 0, radial_grad[2] = {};
        for (int s = 0; s < a.num_softmaxes(); ++s) {
            // Sum of the weights of all candidates
            Softmax& softmax = a.softmax(r, k, s);
            double* const given = p.log_negatives ? p.log_negatives + row * kMaxSoftmaxes + s : nullptr;
            each_tile(a, s, [&](int64_t tile, Kind kind) {
                softmax.negatives += static_cast<double>(a.tile_sum[a.of_tile(tile, k) + r]);
                weighted_score_sums[s][side_of(kind)] +=
                    static_cast<double>(a.tile_weighted_score_sum[a.of_tile(tile, k) + r]);
            });
            double& negatives = softmax.negatives;
            double all = p.log_negatives_given ? __builtin_exp2(*given * kLog2E<double> - softmax.offset) : negatives;
            if constexpr (sizeof(T) == 4)
                refine(a, r, k, s, all, [&](Kind kind, double weight, double weighted_score_sum) {
                    negatives += weight;
                    weighted_score_sums[s][side_of(kind)] += weighted_score_sum;
                });
            if (!p.log_negatives_given) {
                all = negatives;
                if (given)
                    *given = all <= 0 ? -kInfinity<double>
                                      : __builtin_log(all) + softmax.offset * LogUnits::kLn2;  // NaN stays
            }
            if (!a.softmax_is_on[s]) continue;

            // Loss and weight of the gradient
            const SoftmaxLoss part =
                softmax_loss(all, score * kLog2E<double> / p.options.temperature - softmax.offset, p.options.focal);
            loss += share_of_layer * part.factor * part.value;
            const double gradient = share_of_layer * p.options.scale * part.slope;
            softmax.weight = gradient / (p.options.temperature * part.total);
            const double of_positive =
                !p.log_negatives_given || p.adds_positive ? gradient * part.left / p.options.temperature : 0;
            d_positive_score -= of_positive;
            for (int side = 0; side < 2; ++side) radial_grad[side] += softmax.weight * weighted_score_sums[s][side];
            d_tau -= (softmax.weight * (weighted_score_sums[s][0] + weighted_score_sums[s][1]) - of_positive * score) /
                     p.options.temperature;
        }

        // Coefficients of what the row owns, and of the positive
        each_own(a, r, k, [&](int s, Own& own, int side) {
            own.weight[side] *= a.softmax(r, k, s).weight;
            own.radial_grad += own.weight[side] * own.score[side];
        });
        a.d_positive_score[r * a.layers + k] = d_positive_score;
        for (int side = 0; side < 2; ++side)
            a.radial_grad[side][r * a.layers + k] = radial_grad[side] + d_positive_score * score;
    }
    p.loss[row] = loss;
    a.d_tau[r] = d_tau;
    if (a.gradients()) to_raw_vectors(a, r);
}

}  // namespace qemb::cpu::QEMB_ISA::info_nce_kernels
