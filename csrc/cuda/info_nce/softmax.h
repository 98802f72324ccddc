// The softmaxes of a row: offsets, sums, losses, and the weights of the gradient.
#pragma once

#include "cuda/device/reduce.h"
#include "cuda/info_nce/panel.h"

namespace qemb::cuda::info_nce_kernels {

constexpr int kRowThreads = 8;  // of each of the 32 rows of a block of finish_rows

// Combines the values of a row's threads; each of them gets the result.
template <class Combine>
QEMB_DEVICE double over_row(double x, const Combine& combine) {
    double* const values = reinterpret_cast<double*>(shared_bytes());  // [kRowThreads, 32]
    values[threadIdx.x] = x;
    sync_block();
    x = values[threadIdx.x % 32];
    for (int i = 1; i < kRowThreads; ++i) x = combine(x, values[i * 32 + threadIdx.x % 32]);
    sync_block();
    return x;
}

// What a softmax of a row has come to, relative to its offset: sums of the weights, and of weight * score by anchor.
struct Softmax {
    double offset, negatives, weighted_score_sum[2];
};

// The offset of a row's softmax, the factors that bring its tiles to it, and the sums.
template <class T>
QEMB_DEVICE Softmax finish_softmax(const Panel<T>& a, int layer, int64_t row, int s, double given) {
    const int lane = threadIdx.x / 32;
    const int64_t first = a.tile_of(layer, kQueryDocument, 0), of_positives = a.tile_of(layer, kDocDoc, 0);
    const int64_t begin = first + (a.split && s > 0 ? a.first_tile[s - 1] : 0);
    const int64_t end = first + (!a.split ? a.first_tile[kNumKinds] : s > 0 ? a.first_tile[s] : 0);
    double offset = ceil(given);
    for (int64_t tile = begin + lane; tile < end; tile += kRowThreads)
        offset = fmax(offset, static_cast<double>(a.tile_offset[tile * a.rows + row]));
    a.each_own(layer, row, s, lane, kRowThreads, [&](const Own& own, int side, int group) {
        offset = fmax(offset, ceil(own.score[side] * a.logit_scale[group]));
    });
    offset = over_row(offset, [](double x, double y) { return fmax(x, y); });

    double negatives = 0, weighted_score_sum[2] = {};
    const auto add_weighted_score = [&](bool of_positive,
                                        double part) {  // an index known at run time would put it in memory
        if (of_positive)
            weighted_score_sum[1] += part;
        else
            weighted_score_sum[0] += part;
    };
    for (int64_t tile = begin + lane; tile < end; tile += kRowThreads) {
        const int64_t at = tile * a.rows + row;
        const double shift =
            static_cast<double>(a.tile_offset[at]) - offset;  // NaN where neither tile nor row has a candidate
        const float factor = shift > -150 ? ldexpf(1.0f, static_cast<int>(shift)) : 0.0f;
        a.factors[at] = from_float<T>(factor);
        negatives += static_cast<double>(factor) * static_cast<double>(a.tile_sum[at]);
        add_weighted_score(tile >= of_positives,
                           static_cast<double>(factor) * static_cast<double>(a.tile_weighted_score_sum[at]));
    }
    a.each_own(layer, row, s, lane, kRowThreads, [&](const Own& own, int side, int group) {
        const double weight = exp2(own.score[side] * a.logit_scale[group] - offset);
        negatives += weight;
        add_weighted_score(side, weight * own.score[side]);
    });
    const auto add = [](double x, double y) { return x + y; };
    return {
        offset, over_row(negatives, add), {over_row(weighted_score_sum[0], add), over_row(weighted_score_sum[1], add)}};
}

// 32 rows a block: losses, and the weights of the gradient. The positive's is -(Z_neg / Z), never P - 1: that would
// cancel.
template <class T>
__global__ void finish_rows(const Panel<T> a) {
    const InfoNce& p = a.p;
    const int lane = threadIdx.x / 32;
    const int64_t row = blockIdx.x * int64_t(32) + threadIdx.x % 32, out = a.first + row;
    const bool is_row = row < a.count, writes = is_row && lane == 0;
    double loss = 0, d_tau = 0;
    for (int layer = 0; layer < a.layers; ++layer) {
        const double score = is_row ? a.positive_score[layer * a.rows + row] : 0;
        double positive_weight = 0, radial_grad[2] = {};
        for (int s = 0; s < (a.split ? kMaxSoftmaxes : 1); ++s) {
            double* const log_negatives =
                is_row && p.log_negatives ? p.log_negatives + out * kMaxSoftmaxes + s : nullptr;
            const bool given = log_negatives && p.log_negatives_given && a.softmax_is_on[s];
            const double log2_given = given ? *log_negatives * kLog2E : -INFINITY;
            const Softmax softmax = finish_softmax(a, layer, row, s, log2_given);
            double weight =
                softmax.negatives + (a.softmax_is_on[s] ? 0 * score : 0);  // no candidate: all are zero, or all NaN
            if (softmax.offset == -INFINITY) {
                loss += weight, positive_weight += weight, d_tau += weight;
            } else {
                const double all = given ? exp2(log2_given - softmax.offset) : softmax.negatives;
                const SoftmaxLoss part =
                    softmax_loss(all, score * kLog2E / p.options.temperature - softmax.offset, p.options.focal);
                const double slope = p.options.scale * a.shares[layer] * part.slope;
                weight = slope / (p.options.temperature * part.total);
                const double of_positive = given && !p.adds_positive ? 0 : slope * part.left / p.options.temperature;
                loss += a.shares[layer] * part.factor * part.value;
                positive_weight -= of_positive;
                radial_grad[0] += weight * softmax.weighted_score_sum[0];
                radial_grad[1] += weight * softmax.weighted_score_sum[1];
                d_tau -=
                    (weight * (softmax.weighted_score_sum[0] + softmax.weighted_score_sum[1]) - of_positive * score) /
                    p.options.temperature;
            }
            a.each_own(layer, row, s, lane, kRowThreads, [&](Own& own, int side, int group) {
                own.weight[side] =
                    static_cast<float>(weight * exp2(own.score[side] * a.logit_scale[group] - softmax.offset));
            });
            if (!writes) continue;
            const auto written = static_cast<float>(weight);
            float& largest = a.row_weight[s * a.rows + row];
            if (layer == 0 || (largest == largest && !(written <= largest))) largest = written;  // NaN stays
            if (a.prefixes) a.layer_weight[(layer * kMaxSoftmaxes + s) * a.rows + row] = written;
            if (log_negatives && !p.log_negatives_given)
                *log_negatives = softmax.negatives == 0 ? -INFINITY : log(softmax.negatives) + softmax.offset * kLn2;
        }
        if (!writes) continue;
        a.positive_weight[layer * a.rows + row] = static_cast<float>(positive_weight);
        radial_grad[0] += positive_weight * score;
        if (!a.prefixes) continue;
        a.row_radial_grad[layer * a.rows + row] = radial_grad[0];
        a.row_radial_grad[(a.layers + layer) * a.rows + row] = radial_grad[1];
    }
    if (!writes) return;
    p.loss[out] = loss;
    a.d_tau[row] = d_tau;
}

// One block: the panel's part of the stats and of d_temperature, and the unit of the packed anchors.
template <class T>
__global__ void finish_panel(const Panel<T> a) {
    constexpr int kWarps = 32;
    double* const scratch = reinterpret_cast<double*>(shared_bytes());
    double sums[6] = {};
    float largest = 0;
    for (int64_t row = threadIdx.x; row < a.count; row += kWarps * 32) {
        sums[0] += a.positive_score[(a.layers - 1) * a.rows + row];
        sums[5] += a.d_tau[row];
        for (int part = 0; part < a.num_parts; ++part)
            largest = fmaxf(largest, a.row_weight[a.softmax_of(a.parts[part]) * a.rows + row]);
    }
    for (int64_t i = threadIdx.x; i < (a.doc_tiles + a.query_tiles) * a.row_tiles + a.count; i += kWarps * 32) {
        const Tally& tally = a.tallies[i];
        sums[1] += tally.kept_score;
        sums[2] += tally.kept_query_document;
        sums[3] += tally.kept;
        sums[4] += tally.dropped;
    }
    for (int i = 0; i < 6; ++i) {
        const double sum = block_sum<kWarps>(sums[i], scratch);
        if (threadIdx.x > 0) continue;
        if (i < 5)
            a.p.stats[i] += sum;
        else if (a.p.d_temperature)
            *a.p.d_temperature += sum;
    }
    float* const maxima = reinterpret_cast<float*>(shared_bytes());
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = largest;
    sync_block();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < kWarps; ++warp) largest = fmaxf(largest, maxima[warp]);
    *a.unit = largest / 1024;  // uses the upper range of half floats too; elements of unit vectors are at most 1
}

}  // namespace qemb::cuda::info_nce_kernels
