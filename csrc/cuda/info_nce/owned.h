// What rows have that tiles do not: the positive, and the documents that they own.
#pragma once

#include "cuda/device/reduce.h"
#include "cuda/device/vector.h"
#include "cuda/info_nce/panel.h"

namespace qemb::cuda::info_nce_kernels {

// A warp: a . b over the features [begin, end).
template <class T>
QEMB_DEVICE double warp_dot(const T* a, const T* b, int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t d = begin + threadIdx.x % 32; d < end; d += 32)
        sum += static_cast<double>(to_float(a[d])) * static_cast<double>(to_float(b[d]));
    return warp_sum(sum);
}

// A warp: scores of what a row owns, in double: they are few, and weigh most.
template <class T>
QEMB_DEVICE void score_own(const Panel<T>& a, int layer, int64_t row, double s, Tally& tally) {
    const InfoNce& p = a.p;
    const int64_t query = a.query(row), positive = p.positive[query];
    for (int64_t e = a.own_begin(row); e < a.own_end(row); ++e) {
        const int64_t document = p.own_documents[e];
        const auto score = [&](const T* anchor, int side) {
            return warp_dot(anchor, a.documents.data + document * p.dim, 0, a.ends[layer]) *
                   static_cast<double>(a.of_anchor(layer, side, row)) *
                   static_cast<double>(a.of_document(layer, document));
        };
        const double of_query = score(a.anchors[0].data + row * p.dim, 0);
        const double of_positive = a.sides == 2 ? score(a.documents.data + positive * p.dim, 1) : 0;
        const bool candidate = is_candidate(document, positive, static_cast<Role>(p.role[document]));
        const bool equal = p.document_text[document] == p.query_text[query];
        const auto masked = [&](int side, double score) {
            const Group& group = p.options.groups[group_of_owned(side)];
            if (!group.on || !candidate) return kNoScore;
            const bool dropped = equal || held_score(group, score, of_query) > limit_of(group, s);
            tally.kept += !dropped;
            tally.dropped += dropped;
            return dropped ? kNoScore : score;
        };
        const double hard = masked(0, of_query), own = masked(1, of_positive);
        if (hard != kNoScore) tally.kept_query_document += 1, tally.kept_score += hard;
        if (threadIdx.x % 32 == 0) a.own_of(layer, e) = {{hard, own}, {0, 0}, 0};
    }
}

// A warp for each row: the positive's score, in double, what the row owns, and the chain of rows with its positive.
template <class T>
__global__ void start_rows(const Panel<T> a) {
    const int lane = threadIdx.x % 32;
    const int64_t row = blockIdx.x * int64_t(4) + threadIdx.x / 32;
    if (row >= a.count) return;
    const int64_t* const positive = a.anchors[1].index;
    Tally tally;
    for (int layer = 0; layer < a.layers; ++layer) {
        const double product =
            warp_dot(a.anchors[0].data + row * a.p.dim, a.documents.data + positive[row] * a.p.dim, 0, a.ends[layer]);
        const double score = product * static_cast<double>(a.of_anchor(layer, 0, row)) *
                                 static_cast<double>(a.of_anchor(layer, 1, row)) +
                             a.fault[a.query(row)];
        tally = {};
        score_own(a, layer, row, score, tally);
        if (lane == 0) a.positive_score[layer * a.rows + row] = score;
    }

    int64_t next = a.count;
    int earlier = 0;
    for (int64_t other = lane; other < a.count; other += 32)
        if (positive[other] == positive[row]) {
            if (other < row) ++earlier;
            if (other > row && other < next) next = other;
        }
    earlier = warp_sum(earlier);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) next = min(next, shuffle_xor(next, mask));
    if (lane > 0) return;
    a.tallies[(a.doc_tiles + a.query_tiles) * a.row_tiles + row] = tally;
    a.next_same[row] = next < a.count ? next : -1;
    a.is_first_same[row] = earlier == 0;
}

}  // namespace qemb::cuda::info_nce_kernels
