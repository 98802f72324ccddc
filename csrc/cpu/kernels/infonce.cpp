// InfoNCE on the CPU by row panels: R queries meet all columns, the panel of weights E = exp((s - max) / tau) is written once
// and read twice, and both gradients are plain products with it. Per group of columns: three products, nothing recomputed.
#include "ops/infonce.h"
#include "cpu/kernels/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd/gemm.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

constexpr int64_t kTile = 256;                      // columns of a tile of the panel
constexpr int64_t kColumns = 256;                   // features of a work item of the row gradients
constexpr int64_t kPanelBytes = int64_t(96) << 20;  // aim; bounded by the rows below
constexpr int64_t kMinRows = 96, kMaxRows = 384, kRowStep = 48;

enum Group { kQueryDocument, kDocDoc, kQueryQuery };

// Where each tile's partial results are kept until they are added in order, so that thread count changes nothing.
struct TileStats {
    double kept_score;
    int64_t kept_query_document, kept, dropped;
};

template <class T>
class Run {
  public:
    explicit Run(const InfoNce& p)
        : p_(p),
          dim_(p.dim),
          padded_(round_up(p.dim, kLanes<T>)),
          doc_tiles_(ceil_div(p.num_documents, kTile)),
          query_tiles_(p.query_query ? ceil_div(p.num_queries, kTile) : 0) {
        const int64_t tiles = num_tiles();
        const int64_t fit = kPanelBytes / max_of<int64_t>(1, tiles * kTile * static_cast<int64_t>(sizeof(T)));
        rows_ = min_of(max_of(fit / kRowStep * kRowStep, kMinRows), kMaxRows);
        rows_ = min_of(rows_, round_up(p.num_queries, kRowStep));
        const int64_t values = tiles * rows_ * kTile + 2 * tiles * rows_ + 8 * rows_ * padded_ + 5 * rows_;
        T* memory = static_cast<T*>(scratch_bytes(
            Slot::kPanel, static_cast<size_t>(values) * sizeof(T) + static_cast<size_t>(tiles + 1) * sizeof(TileStats)));
        const auto take = [&](int64_t count) {
            T* here = memory;
            memory += count;
            return here;
        };
        panel_ = take(tiles * rows_ * kTile);
        tile_max_ = take(tiles * rows_);
        tile_sum_ = take(tiles * rows_);
        anchor_[0] = take(rows_ * padded_);
        anchor_[1] = take(rows_ * padded_);
        anchor_tiles_[0] = take(rows_ * padded_);
        anchor_tiles_[1] = take(rows_ * padded_);
        packed_[0] = take(rows_ * padded_);
        packed_[1] = take(rows_ * padded_);
        row_grad_[0] = take(rows_ * padded_);
        row_grad_[1] = take(rows_ * padded_);
        positive_score_ = take(rows_);
        offset_ = take(rows_);
        weight_ = take(rows_);
        positive_weight_ = take(rows_);
        limit_ = take(rows_);
        tile_stats_ = reinterpret_cast<TileStats*>(memory);
    }

    void operator()() {
        for (int i = 0; i < 5; ++i) p_.stats[i] = 0;
        if (p_.d_documents) {
            zero(p_.d_queries, p_.num_queries);
            zero(p_.d_documents, p_.num_documents);
        }
        for (first_ = 0; first_ < p_.num_queries; first_ += rows_) {
            count_ = min_of(rows_, p_.num_queries - first_);
            parallel_for(ceil_div(count_, kTileRows), [&](int64_t i) { load_anchors(i * kTileRows); });
            parallel_for(doc_tiles_ + query_tiles_,
                         [&](int64_t i) { i < doc_tiles_ ? score_documents(i) : score_queries(i - doc_tiles_); });
            find_offsets();
            parallel_for(num_tiles(), [&](int64_t tile) { exponentiate(tile); });
            finish_rows();
            if (!p_.d_documents) continue;
            const int64_t columns = ceil_div(dim_, kColumns);
            const int64_t rows = round_up(ceil_div(count_, ceil_div(num_threads(), columns)), kTileRows);
            parallel_for(columns * ceil_div(count_, rows), [&](int64_t i) {
                const int64_t row = i / columns * rows;
                row_gradients(row, min_of(rows, count_ - row), i % columns * kColumns);
            });
            parallel_for(doc_tiles_ + query_tiles_,
                         [&](int64_t i) { i < doc_tiles_ ? document_gradients(i) : query_gradients(i - doc_tiles_); });
        }
    }

  private:
    int sides() const { return p_.doc_doc ? 2 : 1; }
    int64_t num_tiles() const { return doc_tiles_ * sides() + query_tiles_; }
    // Tiles in order: query-document, then query-query, then document-document.
    T* tile(Group group, int64_t i) const { return panel_ + tile_index(group, i) * rows_ * kTile; }
    int64_t tile_index(Group group, int64_t i) const {
        return i + (group == kQueryDocument ? 0 : group == kQueryQuery ? doc_tiles_ : doc_tiles_ + query_tiles_);
    }
    T* documents_grad() const { return static_cast<T*>(p_.d_documents); }
    T* queries_grad() const { return static_cast<T*>(p_.d_queries); }
    int64_t documents_in(int64_t i) const { return min_of(kTile, p_.num_documents - i * kTile); }
    int64_t queries_in(int64_t i) const { return min_of(kTile, p_.num_queries - i * kTile); }
    bool same_text(int64_t a, int64_t b) const {
        return a == b || (p_.document_ids && p_.document_ids[a] == p_.document_ids[b]);
    }

    void zero(void* to, int64_t rows) const {
        T* values = static_cast<T*>(to);
        for (int64_t i = 0; i < rows * dim_; ++i) values[i] = 0;
    }

    // A tile of the panel's queries and their positives, and the score that the margin and the softmax start from.
    void load_anchors(int64_t start) {
        const int64_t count = min_of<int64_t>(kTileRows, count_ - start);
        for (int64_t r = start; r < start + count; ++r) {
            T* query = anchor_[0] + r * dim_;
            T* document = anchor_[1] + r * dim_;
            load_row(p_.dtype, p_.queries, (first_ + r) * dim_, query, dim_);
            load_row(p_.dtype, p_.documents, p_.positive[first_ + r] * dim_, document, dim_);
            double score = 0;
            for (int64_t d = 0; d < dim_; ++d) score += static_cast<double>(query[d]) * static_cast<double>(document[d]);
            positive_score_[r] = static_cast<T>(score);
            limit_[r] = static_cast<T>(score + p_.margin);
        }
        for (int side = 0; side < sides(); ++side)
            pack_left(by_rows(anchor_[side] + start * dim_, dim_), count, dim_, anchor_tiles_[side] + start * dim_);
    }

    Left<T> anchors(int side) const { return by_tiles(anchor_tiles_[side], dim_); }

    // Columns [start, start + count) of `from`, widened where they are narrow, and packed; returns the panels.
    T* pack_columns(const void* from, int64_t start, int64_t count) const {
        T* block = static_cast<T*>(
            scratch_bytes(Slot::kTile, static_cast<size_t>(kTile * dim_ + panel_size<T>(dim_, kTile)) * sizeof(T)));
        T* panels = block + kTile * dim_;
        pack_transposed(read(p_.dtype, from, start * dim_, count * dim_, block), dim_, count, dim_, panels);
        return panels;
    }

    void score_documents(int64_t i) {
        const int64_t start = i * kTile, count = documents_in(i);
        const T* panels = pack_columns(p_.documents, start, count);
        T* query_scores = tile(kQueryDocument, i);
        T* doc_scores = p_.doc_doc ? tile(kDocDoc, i) : nullptr;
        gemm(count_, count, dim_, anchors(0), panels, query_scores, kTile, false);
        if (doc_scores) gemm(count_, count, dim_, anchors(1), panels, doc_scores, kTile, false);

        TileStats stats{};
        for (int64_t r = 0; r < count_; ++r) {
            T* qd = query_scores + r * kTile;
            T* dd = doc_scores ? doc_scores + r * kTile : nullptr;
            const Best best = only_strangers(start, count, first_ + r) ? mask_by_score(qd, dd, limit_[r], stats)
                                                                       : mask_documents(start, count, r, qd, dd, stats);
            tile_max_[tile_index(kQueryDocument, i) * rows_ + r] = best.query_document;
            if (dd) tile_max_[tile_index(kDocDoc, i) * rows_ + r] = best.doc_doc;
        }
        tile_stats_[tile_index(kQueryDocument, i)] = stats;
    }

    // Whether a whole tile of documents holds neither the positive, nor its text, nor anything that the query owns.
    bool only_strangers(int64_t start, int64_t count, int64_t query) const {
        const int64_t positive = p_.positive[query];
        if (count != kTile || !p_.in_batch || (positive >= start && positive < start + count)) return false;
        int64_t found = 0;
        if (p_.owner)
            for (int64_t j = 0; j < kTile; ++j) found |= p_.owner[start + j] == query;
        if (p_.document_ids)
            for (int64_t j = 0; j < kTile; ++j) found |= p_.document_ids[start + j] == p_.document_ids[positive];
        return !found;
    }

    struct Best {
        T query_document, doc_doc;
    };

    // Masks in place; the sums go to stats.
    Best mask_by_score(T* qd, T* dd, T limit, TileStats& stats) const {
        using Bits = typename VecOf<T>::bits;
        const Vec<T> none = splat<T>(-kInfinity<T>);
        Vec<T> best_qd = none, best_dd = none, sum{};
        Bits over_qd{}, over_dd{};
        for (int64_t j = 0; j < kTile; j += kLanes<T>) {
            const Vec<T> score = load(qd + j);
            const Bits over = score > limit;
            const Vec<T> kept = over ? none : score;
            store(qd + j, kept);
            best_qd = kept > best_qd ? kept : best_qd;
            sum += over ? Vec<T>{} : score;
            over_qd += over;
            if (!dd) continue;
            const Vec<T> own = load(dd + j);
            const Bits masked = p_.doc_mask == DocMask::kQueryDocument ? over
                                : p_.doc_mask == DocMask::kOwnScore    ? own > limit
                                                                       : Bits{};
            const Vec<T> left = masked ? none : own;
            store(dd + j, left);
            best_dd = left > best_dd ? left : best_dd;
            over_dd += masked;
        }
        int64_t dropped_qd = 0, dropped_dd = 0;  // a lane that is over counts -1
        for (int lane = 0; lane < kLanes<T>; ++lane) dropped_qd -= over_qd[lane], dropped_dd -= over_dd[lane];
        stats.kept_query_document += kTile - dropped_qd;
        stats.kept_score += static_cast<double>(sum_lanes<T>(sum));
        stats.dropped += dropped_qd + dropped_dd;
        stats.kept += kTile - dropped_qd + (dd ? kTile - dropped_dd : 0);
        return {max_lanes<T>(best_qd), max_lanes<T>(best_dd)};
    }

    Best mask_documents(int64_t start, int64_t count, int64_t r, T* qd, T* dd, TileStats& stats) const {
        const int64_t query = first_ + r, positive = p_.positive[query];
        Best best{-kInfinity<T>, -kInfinity<T>};
        for (int64_t j = 0; j < count; ++j) {
            const int64_t document = start + j;
            const bool own = p_.owner && p_.owner[document] == query;
            const bool equal = same_text(document, positive);
            const bool over = qd[j] > limit_[r];
            if (dd) {
                const bool candidate = !own && document != positive;
                const bool masked = equal || (p_.doc_mask == DocMask::kQueryDocument ? over
                                              : p_.doc_mask == DocMask::kOwnScore    ? dd[j] > limit_[r]
                                                                                     : false);
                stats.dropped += candidate && masked;
                stats.kept += candidate && !masked;
                if (!candidate || masked)
                    dd[j] = -kInfinity<T>;
                else
                    best.doc_doc = max_of(best.doc_doc, dd[j]);
            }
            const bool candidate = document != positive && (own ? p_.hard : p_.in_batch);
            const bool masked = equal || over;
            stats.dropped += candidate && masked;
            if (candidate && !masked) {
                ++stats.kept;
                ++stats.kept_query_document;
                stats.kept_score += static_cast<double>(qd[j]);
                best.query_document = max_of(best.query_document, qd[j]);
            } else {
                qd[j] = -kInfinity<T>;
            }
        }
        return best;
    }

    void score_queries(int64_t i) {
        const int64_t start = i * kTile, count = queries_in(i);
        const T* panels = pack_columns(p_.queries, start, count);
        T* scores = tile(kQueryQuery, i);
        gemm(count_, count, dim_, anchors(0), panels, scores, kTile, false);
        TileStats stats{};
        for (int64_t r = 0; r < count_; ++r) {
            T* qq = scores + r * kTile;
            T best = -kInfinity<T>;
            for (int64_t j = 0; j < count; ++j) {
                const bool candidate = start + j != first_ + r;
                const bool masked = qq[j] > limit_[r] || same_text(p_.positive[start + j], p_.positive[first_ + r]);
                stats.dropped += candidate && masked;
                stats.kept += candidate && !masked;
                if (!candidate || masked)
                    qq[j] = -kInfinity<T>;
                else
                    best = max_of(best, qq[j]);
            }
            tile_max_[tile_index(kQueryQuery, i) * rows_ + r] = best;
        }
        tile_stats_[tile_index(kQueryQuery, i)] = stats;
    }

    void find_offsets() {
        for (int64_t r = 0; r < count_; ++r) {
            T best = positive_score_[r];
            for (int64_t t = 0; t < num_tiles(); ++t) best = max_of(best, tile_max_[t * rows_ + r]);
            offset_[r] = best;
        }
        for (int64_t t = 0; t < doc_tiles_ + query_tiles_; ++t) {
            p_.stats[1] += tile_stats_[t].kept_score;
            p_.stats[2] += static_cast<double>(tile_stats_[t].kept_query_document);
            p_.stats[3] += static_cast<double>(tile_stats_[t].kept);
            p_.stats[4] += static_cast<double>(tile_stats_[t].dropped);
        }
    }

    // Scores become weights; each tile leaves its row sums.
    void exponentiate(int64_t index) {
        const int64_t in_group = index < doc_tiles_                  ? index
                                 : index < doc_tiles_ + query_tiles_ ? index - doc_tiles_
                                                                     : index - doc_tiles_ - query_tiles_;
        const bool of_queries = index >= doc_tiles_ && index < doc_tiles_ + query_tiles_;
        const int64_t count = of_queries ? queries_in(in_group) : documents_in(in_group);
        const T inverse = static_cast<T>(kLog2E<double> / p_.temperature);
        for (int64_t r = 0; r < count_; ++r) {
            T* values = panel_ + (index * rows_ + r) * kTile;
            for (int64_t j = count; j < round_up(count, kLanes<T>); ++j) values[j] = -kInfinity<T>;
            Vec<T> sum{};
            for (int64_t j = 0; j < count; j += kLanes<T>) {
                const Vec<T> weight = exp2<T>((load(values + j) - offset_[r]) * inverse);
                store(values + j, weight);
                sum += weight;
            }
            tile_sum_[index * rows_ + r] = sum_lanes<T>(sum);
        }
    }

    // Loss, and the weights of the gradient. The positive's is -(Z_neg / Z), never P - 1: that would cancel.
    void finish_rows() {
        for (int64_t r = 0; r < count_; ++r) {
            double negatives = 0;
            for (int64_t t = 0; t < num_tiles(); ++t) negatives += static_cast<double>(tile_sum_[t * rows_ + r]);
            const double gap = (static_cast<double>(positive_score_[r]) - static_cast<double>(offset_[r])) / p_.temperature;
            const double total = negatives + __builtin_exp(gap);
            static_cast<double*>(p_.loss)[first_ + r] = gap == 0 ? __builtin_log1p(negatives) : __builtin_log(total) - gap;
            p_.stats[0] += static_cast<double>(positive_score_[r]);
            const double mean = 1.0 / (p_.temperature * static_cast<double>(p_.num_queries));
            weight_[r] = static_cast<T>(mean / total);
            positive_weight_[r] = static_cast<T>(-mean * negatives / total);
        }
        if (p_.d_documents) {
            parallel_for(sides(), [&](int64_t side) { pack_rows(anchor_[side], dim_, count_, dim_, packed_[side], weight_); });
        }
    }

    // Rows [row, row + count), features [column, column + kColumns) of the gradients of the panel's queries and positives.
    void row_gradients(int64_t row, int64_t count, int64_t column) {
        const int64_t width = min_of(kColumns, dim_ - column);
        T* block = static_cast<T*>(
            scratch_bytes(Slot::kTile, static_cast<size_t>(kTile * kColumns + panel_size<T>(kTile, kColumns)) * sizeof(T)));
        T* panels = block + kTile * kColumns;
        const auto pack = [&](const void* from, int64_t start, int64_t depth) {
            for (int64_t j = 0; j < depth; ++j)
                load_row(p_.dtype, from, (start + j) * dim_ + column, block + j * kColumns, width);
            pack_rows(block, kColumns, depth, width, panels);
        };
        const auto add = [&](const T* weights, int64_t depth, int side, bool more) {
            gemm(count, width, depth, by_rows(weights + row * kTile, kTile), panels, row_grad_[side] + row * padded_ + column,
                 padded_, more);
        };
        for (int64_t i = 0; i < doc_tiles_; ++i) {
            pack(p_.documents, i * kTile, documents_in(i));
            add(tile(kQueryDocument, i), documents_in(i), 0, i > 0);
            if (p_.doc_doc) add(tile(kDocDoc, i), documents_in(i), 1, i > 0);
        }
        for (int64_t i = 0; i < query_tiles_; ++i) {
            pack(p_.queries, i * kTile, queries_in(i));
            add(tile(kQueryQuery, i), queries_in(i), 0, true);
        }
        for (int64_t r = row; r < row + count; ++r) {
            T* dq = queries_grad() + (first_ + r) * dim_ + column;
            add_scaled(dq, row_grad_[0] + r * padded_ + column, weight_[r], width);
            add_scaled(dq, anchor_[1] + r * dim_ + column, positive_weight_[r], width);
        }
    }
    // grad[start + j, :] += sum_r E[r, j] * weight[r] * anchor[r]
    void column_gradients(T* grad, int64_t count, const T* weights, const T* packed) const {
        T* product = static_cast<T*>(scratch_bytes(
            Slot::kTile, static_cast<size_t>(kTile * padded_ + left_size<T>(kTile + kTileRows, rows_)) * sizeof(T)));
        T* tiles = product + kTile * padded_;
        pack_left(by_columns(weights, kTile), count, count_, tiles);
        gemm(count, dim_, count_, by_tiles(tiles, count_), packed, product, padded_, false);
        for (int64_t j = 0; j < count; ++j) add_scaled(grad + j * dim_, product + j * padded_, T(1), dim_);
    }
    void document_gradients(int64_t i) {
        for (int64_t r = 0; r < count_; ++r) {
            const int64_t positive = p_.positive[first_ + r];
            if (positive / kTile != i) continue;
            T* dd = documents_grad() + positive * dim_;
            add_scaled(dd, anchor_[0] + r * dim_, positive_weight_[r], dim_);
            if (p_.doc_doc) add_scaled(dd, row_grad_[1] + r * padded_, weight_[r], dim_);
        }
        column_gradients(documents_grad() + i * kTile * dim_, documents_in(i), tile(kQueryDocument, i), packed_[0]);
        if (p_.doc_doc) column_gradients(documents_grad() + i * kTile * dim_, documents_in(i), tile(kDocDoc, i), packed_[1]);
    }
    void query_gradients(int64_t i) {
        column_gradients(queries_grad() + i * kTile * dim_, queries_in(i), tile(kQueryQuery, i), packed_[0]);
    }

    const InfoNce& p_;
    const int64_t dim_, padded_, doc_tiles_, query_tiles_;
    int64_t rows_, first_ = 0, count_ = 0;
    T *panel_, *tile_max_, *tile_sum_;
    T* anchor_[2];        // [rows, dim] queries and positives of the panel
    T* anchor_tiles_[2];  // the same, packed as left operands
    T* packed_[2];        // the same, times the row weight, in panels
    T* row_grad_[2];      // [rows, padded] unscaled gradients of both
    T *positive_score_, *offset_, *weight_, *positive_weight_, *limit_;
    TileStats* tile_stats_;
};

}  // namespace

void info_nce(const InfoNce& p) {
    if (p.dtype == DType::kFloat64)
        Run<double>{p}();
    else
        Run<float>{p}();
}

}  // namespace qemb::cpu::QEMB_ISA
