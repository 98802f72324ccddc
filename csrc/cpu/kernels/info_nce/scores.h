// Scores of a panel by tiles, and which of them are candidates.
#pragma once

#include "cpu/kernels/info_nce/panel.h"

namespace qemb::cpu::QEMB_ISA::info_nce_kernels {

// The score of what is no candidate: its weight is zero, and it stays finite.
template <class T>
constexpr T kNone = sizeof(T) == 4 ? T(-3e38) : T(-1e300);

// Reciprocal norms of the prefixes of a row of vectors.
template <class T>
inline void prefix_norms(const Panel<T>& a, const T* row, T* to) {
    double squares = 0;
    for (int64_t k = 0; k < a.layers; ++k) {
        squares += exact_dot(row, row, a.segments[k].begin, a.layer_end(k));
        to[k] = static_cast<T>(one_over_norm(squares));
    }
}

template <class T>
void load_column_norms(const Panel<T>& a, Kind kind) {
    constexpr int64_t kRows = 64;
    parallel_for(ceil_div(a.num_columns(kind), kRows), [&](int64_t item) {
        T* buffer = static_cast<T*>(scratch_bytes(Slot::kTile, static_cast<size_t>(a.dim) * sizeof(T)));
        for (int64_t j = item * kRows; j < min_of((item + 1) * kRows, a.num_columns(kind)); ++j)
            prefix_norms(a, read(a.p.dtype, a.columns_of(kind), j * a.dim, a.dim, buffer),
                         a.column_norm[kind == kQueries] + j * a.layers);
    });
}

// Rows [start, start + kTileRows) of the panel: queries and positives, and the score that the masks and the softmax
// start from.
template <class T>
void load_anchors(const Panel<T>& a, int64_t start) {
    const int64_t count = min_of<int64_t>(kTileRows, a.count - start);
    for (int64_t r = start; r < start + count; ++r) {
        const T* const anchors[2] = {a.anchor[0] + r * a.dim, a.anchor[1] + r * a.dim};
        load_row(a.p.dtype, a.p.queries, a.query(r) * a.dim, a.anchor[0] + r * a.dim, a.dim);
        load_row(a.p.dtype, a.p.documents, a.positive(r) * a.dim, a.anchor[1] + r * a.dim, a.dim);
        double product = 0, squares[2] = {};
        for (int64_t k = 0; k < a.layers; ++k) {
            const int64_t begin = a.segments[k].begin, end = a.layer_end(k);
            product += exact_dot(anchors[0], anchors[1], begin, end);
            double norms[2] = {1, 1};
            for (int side = 0; side < 2; ++side) {
                if (a.prefixes)
                    norms[side] = one_over_norm(squares[side] += exact_dot(anchors[side], anchors[side], begin, end));
                a.anchor_norm[side][r * a.layers + k] = static_cast<T>(norms[side]);
            }
            a.score[r * a.layers + k] = product * norms[0] * norms[1];
        }
    }
    for (int side = 0; side < a.sides; ++side)
        pack_left(by_rows(a.anchor[side] + start * a.dim, a.dim), count, a.dim, a.anchor_tiles[side] + start * a.dim);
}

// What a tile's columns are to a row that knows none of them: group by group.
template <class T>
struct ColumnRules {
    T on[kTile];   // 1: a candidate
    T add[kTile];  // the limit is s + add + relative * |s|
    T relative[kTile];
    T scale[kTile];     // of the logit, log2
    T by_query[kTile];  // 1: the limit is for the query's score
};

template <class T>
inline void fill_rules(const Panel<T>& a, Kind kind, int64_t start, int64_t count, ColumnRules<T>& rules) {
    for (int64_t j = 0; j < kTile; ++j) {
        const bool there = j < count && (kind != kQueries || start + j >= a.p.first_column);
        const bool is_absent = kind != kQueries && there && static_cast<Role>(a.p.role[start + j]) == Role::kAbsent;
        const int index = a.group_at(kind, start + j);
        const Group& group = a.p.options.groups[index];
        const LimitParts limit = limit_parts(group);
        rules.on[j] = there && group.on && !is_absent;
        rules.add[j] = static_cast<T>(limit.add);
        rules.relative[j] = static_cast<T>(limit.relative);
        rules.scale[j] = static_cast<T>(a.logit_scale[index]);
        rules.by_query[j] = kind == kDocDoc && is_by_query(group);
    }
}

// Whether a tile holds what a row has to do with: itself, its own, its positive's text.
template <class T>
bool is_known(const Panel<T>& a, Kind kind, int64_t start, int64_t count, int64_t r) {
    const int64_t query = a.query(r), self = kind == kQueries ? query : a.positive(r), text = a.p.query_text[query];
    if (self >= start && self < start + count) return true;
    if (kind != kQueries)
        for (int64_t e = a.own_end(a.first + r); e < a.own_end(a.first + r + 1); ++e)
            if (a.p.own_documents[e] >= start && a.p.own_documents[e] < start + count) return true;
    const int64_t* texts = (kind == kQueries ? a.p.query_text : a.p.document_text) + start;
    int64_t found = 0;
    for (int64_t j = 0; j < count; ++j) found |= texts[j] == text;
    return found;
}

// Takes what a row knows of a tile out of `on` (copied to `left`); counts what its text drops.
template <class T>
const T* mask_known_columns(const Panel<T>& a, Kind kind, int64_t start, int64_t count, int64_t r, const T* on, T* left,
                            TileStats& stats) {
    const int64_t query = a.query(r), self = kind == kQueries ? query : a.positive(r), text = a.p.query_text[query];
    const int64_t* texts = (kind == kQueries ? a.p.query_text : a.p.document_text) + start;
    for (int64_t j = 0; j < kTile; ++j) left[j] = on[j];
    for (int64_t j = 0; j < count; ++j) {
        const bool own = start + j == self || (kind != kQueries && a.p.owner[start + j] == query);
        const bool equal = texts[j] == text;
        stats.dropped += !own && equal && on[j] > 0;
        if (own || equal) left[j] = 0;
    }
    return left;
}

// Masks a row of scores in place: what is no candidate becomes kNone. Returns the largest logit.
template <class T>
T mask_row(T* scores, const T* query_scores, const ColumnRules<T>& rules, const T* on, T s, bool is_query_document,
           TileStats& stats) {
    using Bits = typename VecOf<T>::bits;
    const Vec<T> none = splat<T>(kNone<T>), one = splat<T>(1), lowest = splat<T>(-kInfinity<T>);
    const T magnitude = s < 0 ? -s : s;
    Vec<T> best = lowest, sum{};
    Bits kept{}, dropped{};
    for (int64_t j = 0; j < kTile; j += kLanes<T>) {
        const Vec<T> score = load(scores + j), limit = load(rules.add + j) + load(rules.relative + j) * magnitude + s;
        Vec<T> held = score;
        if (query_scores) held = load(rules.by_query + j) == one ? load(query_scores + j) : score;
        const Bits candidate = load(on + j) == one, over = held > limit;
        const Bits stays = candidate & ~over;
        store(scores + j, stays ? score : none);
        const Vec<T> logit = score * load(rules.scale + j);
        best = stays & (logit > best) ? logit : best;
        sum += stays ? score : Vec<T>{};
        kept += stays;
        dropped += candidate & over;
    }
    int64_t num_kept = 0;  // a lane that counts is -1
    for (int lane = 0; lane < kLanes<T>; ++lane) num_kept -= kept[lane], stats.dropped -= dropped[lane];
    stats.kept += num_kept;
    if (is_query_document)
        stats.kept_query_document += num_kept, stats.kept_score += static_cast<double>(sum_lanes<T>(sum));
    return max_lanes<T>(best);
}

// Tile i of columns against the panel: of one kind, or of documents against both anchors.
template <class T>
void score_tile(const Panel<T>& a, const Kind* kinds, int num_kinds, int64_t i) {
    // Scratch memory, rules and norms of the columns
    const bool of_queries = kinds[0] == kQueries;
    const int64_t start = i * kTile, count = a.columns_in(kinds[0], i), stored = round_up(count, kLanes<T>);
    T* const block = static_cast<T*>(scratch_bytes(
        Slot::kTile,
        static_cast<size_t>(2 * kTile * a.dim + (2 * a.rows + 2) * kTile) * sizeof(T) + 2 * sizeof(ColumnRules<T>)));
    T* const panels = block + kTile * a.dim;
    T* const raw = panels + kTile * a.dim;     // [num_kinds, rows, kTile], of all features so far
    T* const left = raw + 2 * a.rows * kTile;  // [kTile]
    T* const norms = left + kTile;             // [kTile], of the columns
    ColumnRules<T>* const rules = reinterpret_cast<ColumnRules<T>*>(norms + kTile);
    const T* const columns = read(a.p.dtype, a.columns_of(kinds[0]), start * a.dim, count * a.dim, block);
    for (int part = 0; part < num_kinds; ++part) {
        fill_rules(a, kinds[part], start, count, rules[part]);
        a.tile_stats[a.first_tile[kinds[part]] + i] = {};
    }
    bool known[kMaxRows];
    for (int64_t r = 0; r < a.count; ++r) known[r] = is_known(a, kinds[0], start, count, r);

    for (int64_t k = 0; k < a.layers; ++k) {
        // Products of the layer's own features, added to those before
        const Segment& segment = a.segments[k];
        pack_transposed(columns + segment.begin, a.dim, count, segment.width, panels);
        T* scores[2];
        for (int part = 0; part < num_kinds; ++part) {
            const int side = side_of(kinds[part]);
            scores[part] = a.weights(a.first_tile[kinds[part]] + i, k);
            T* const to = a.prefixes ? raw + part * a.rows * kTile : scores[part];
            Left<T> anchors = by_tiles(a.anchor_tiles[side], a.dim);
            anchors.data += segment.begin * kTileRows;
            gemm(a.count, count, segment.width, anchors, panels, to, kTile, k > 0);
        }
        for (int64_t j = 0; a.prefixes && j < kTile; ++j)
            norms[j] = j < count ? a.column_norm[of_queries][(start + j) * a.layers + k] : T(0);

        // Scores, masks and maxima, row by row
        for (int64_t r = 0; r < a.count; ++r) {
            for (int part = 0; a.prefixes && part < num_kinds; ++part) {
                const T norm = a.anchor_norm[side_of(kinds[part])][r * a.layers + k];
                const T* const from = raw + (part * a.rows + r) * kTile;
                for (int64_t j = 0; j < stored; ++j) scores[part][r * kTile + j] = from[j] * norm * norms[j];
            }
            // The last kind first: its limit may be for the query's score, which masking hides.
            for (int part = num_kinds - 1; part >= 0; --part) {
                const int64_t tile = a.first_tile[kinds[part]] + i;
                T* const row = scores[part] + r * kTile;
                for (int64_t j = stored; j < kTile; ++j) row[j] = 0;
                TileStats ignored{};
                TileStats& stats = k == a.layers - 1 ? a.tile_stats[tile] : ignored;
                const T* const on =
                    known[r] ? mask_known_columns(a, kinds[part], start, count, r, rules[part].on, left, stats)
                             : rules[part].on;
                a.tile_max[a.of_tile(tile, k) + r] =
                    mask_row(row, part > 0 ? scores[0] + r * kTile : nullptr, rules[part], on,
                             static_cast<T>(a.score[r * a.layers + k]), kinds[part] == kQueryDocument, stats);
            }
        }
    }
}

template <class T>
void score_documents(const Panel<T>& a, int64_t i) {
    Kind kinds[2];
    int count = 0;
    for (const Kind kind : {kQueryDocument, kDocDoc})
        if (a.scored[kind]) kinds[count++] = kind;
    score_tile(a, kinds, count, i);
}

}  // namespace qemb::cpu::QEMB_ISA::info_nce_kernels
