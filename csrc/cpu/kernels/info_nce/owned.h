// The documents that a row owns: a short list of candidates that enter no tile.
#pragma once

#include "cpu/kernels/info_nce/panel.h"

namespace qemb::cpu::QEMB_ISA::info_nce_kernels {

// Scores of what a row owns, by plain products in double: they are few, and weigh most.
template <class T>
void score_own(const Panel<T>& a, int64_t r) {
    const InfoNce& p = a.p;
    TileStats& stats = a.row_stats[r] = {};
    T* buffer = static_cast<T*>(scratch_bytes(Slot::kTile, static_cast<size_t>(a.dim) * sizeof(T)));
    for (int64_t e = a.own_end(a.first + r); e < a.own_end(a.first + r + 1); ++e) {
        const int64_t document = p.own_documents[e];
        Own* own = a.own + (e - a.entries_first) * a.layers;
        const bool candidate = is_candidate(document, a.positive(r), static_cast<Role>(p.role[document]));
        const bool equal = p.document_text[document] == p.query_text[a.query(r)];
        const T* row = read(p.dtype, p.documents, document * a.dim, a.dim, buffer);
        double products[2] = {}, squares = 0;
        for (int64_t k = 0; k < a.layers; ++k) {
            const int64_t begin = a.segments[k].begin, end = a.layer_end(k);
            if (a.prefixes) squares += exact_dot(row, row, begin, end);
            const double norm = a.prefixes ? one_over_norm(squares) : 1, s = a.score[r * a.layers + k];
            double scores[2];
            for (int side = 0; side < a.sides; ++side) {
                products[side] += exact_dot(a.anchor[side] + r * a.dim, row, begin, end);
                scores[side] = products[side] * norm * static_cast<double>(a.anchor_norm[side][r * a.layers + k]);
            }
            own[k] = {{kNoScore, kNoScore}, {0, 0}, 0};
            for (int side = 0; side < a.sides; ++side) {
                const Group& group = p.options.groups[group_of_owned(side)];
                if (!group.on || !candidate) continue;
                const bool dropped = equal || held_score(group, scores[side], scores[0]) > limit_of(group, s);
                if (!dropped) own[k].score[side] = scores[side];
                if (k < a.layers - 1) continue;
                stats.dropped += dropped;
                stats.kept += !dropped;
                if (side == 0 && !dropped) ++stats.kept_query_document, stats.kept_score += scores[0];
            }
        }
    }
}

// Calls visit(softmax, entry of own, side) for the candidates among what row r owns, in layer k.
template <class T, class Visit>
QEMB_INLINE void each_own(const Panel<T>& a, int64_t r, int64_t k, Visit visit) {
    for (int64_t e = a.own_end(a.first + r); e < a.own_end(a.first + r + 1); ++e) {
        Own& own = a.own[(e - a.entries_first) * a.layers + k];
        for (int side = 0; side < 2; ++side)
            if (own.score[side] != kNoScore) visit(a.softmax_of_owned(side), own, side);
    }
}

}  // namespace qemb::cpu::QEMB_ISA::info_nce_kernels
