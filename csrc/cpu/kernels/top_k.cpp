// Exact top-k on the CPU: a block of queries sweeps a span of the documents tile by tile and keeps the best of what it
// meets; the spans' bests are then ranked together. The order is total (score, then index), so how the work is cut
// changes nothing.
#include "ops/top_k.h"
#include "cpu/kernels/isa.h"
#include "cpu/kernels/top_k/best.h"
#include "cpu/kernels/top_k/screen.h"
#include "cpu/parallel.h"
#include "cpu/simd/gemm.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

constexpr int64_t kQueryBlock = 768;  // documents are packed once for each block
constexpr int64_t kQueryTile = 96;    // and read from the second cache by each tile of it
constexpr int64_t kDocumentBlock = 192;
constexpr int64_t kItemsPerThread =
    4;                              // every span of documents finds its own k best before they are ranked: few spans
constexpr int64_t kMinSpan = 4096;  // documents of a work item, at least

QEMB_INLINE bool excluded(const TopK& p, int64_t query, int64_t document) {
    for (int64_t i = 0; i < p.num_exclude; ++i)
        if (p.exclude[query * p.num_exclude + i] == document) return true;
    return false;
}

// How the search is cut: `spans` of documents for each block of queries.
struct Cut {
    int64_t block, query_blocks, spans, span;

    explicit Cut(const TopK& p)
        : block(min_of(kQueryBlock, round_up(max_of<int64_t>(p.num_queries, 1), kTileRows))),
          query_blocks(ceil_div(p.num_queries, block)) {
        const int64_t wanted = ceil_div(kItemsPerThread * num_threads(), max_of<int64_t>(query_blocks, 1));
        const int64_t max_spans = max_of<int64_t>(1, p.num_documents / max_of(kMinSpan, 4 * p.k));
        span = max_of<int64_t>(1, round_up(ceil_div(p.num_documents, min_of(wanted, max_spans)), kDocumentBlock));
        spans = max_of<int64_t>(1, ceil_div(p.num_documents, span));
    }
};

// Takes those of a query's documents from `document` on that may belong to its best. `scores` are exact, or a screen's;
// most are below `bar`, and two vectors of them are passed over at once.
template <class T, class S, class Bar, class Exact>
QEMB_INLINE void take(const TopK& p, int64_t query, int64_t document, const S* scores, int64_t count, Best<T>& best,
                      Bar&& bar_of, Exact&& exact) {
    constexpr int kStep = 2 * kLanes<S>;
    const float ceiling = p.ceiling ? p.ceiling[query] : kInfinity<float>;
    T least = best.least;
    S bar = bar_of(least);
    for (int64_t start = 0; start < count; start += kStep) {
        if (start + kStep <= count) {
            const Vec<S> bars = splat<S>(bar);
            if (!any<S>((load(scores + start) >= bars) | (load(scores + start + kLanes<S>) >= bars))) continue;
        }
        for (int64_t j = start; j < min_of(start + kStep, count); ++j) {
            if (!(scores[j] >= bar)) continue;
            const T value = exact(j);
            const float score = static_cast<float>(value);
            if (!(value >= least) || !(score <= ceiling)) continue;
            if (p.num_exclude && excluded(p, query, document + j)) continue;
            best.add(score, document + j);
            if (best.least != least) least = best.least, bar = bar_of(least);
        }
    }
}

// The best of documents [begin, end) for `rows` queries from `first`, best first, at `found` [rows, k], zeros at the
// end.
template <class T>
void search_span(const TopK& p, int64_t first, int64_t rows, int64_t begin, int64_t end, Found* found) {
    const int64_t pairs = (p.dim + 1) / 2;
    const bool screens = sizeof(T) == sizeof(float) && kScreens && rows >= kScreenRows;
    const int64_t floats = rows * p.dim + left_size<T>(rows, p.dim) + kDocumentBlock * p.dim +
                           panel_size<T>(p.dim, kDocumentBlock) + kQueryTile * kDocumentBlock;
    T* q = static_cast<T*>(scratch_bytes(
        Slot::kTile, static_cast<size_t>(floats) * sizeof(T) + screen_bytes(rows, kDocumentBlock, pairs)));
    T* packed = q + rows * p.dim;
    T* block = packed + left_size<T>(rows, p.dim);
    T* panels = block + kDocumentBlock * p.dim;
    T* scores = panels + panel_size<T>(p.dim, kDocumentBlock);
    const T* queries = read(p.dtype, p.queries, first * p.dim, rows * p.dim, q);

    const int64_t capacity = min_of(3 * p.k, end - begin + p.k);
    Found* kept =
        static_cast<Found*>(scratch_bytes(Slot::kPartial, sizeof(Found) * static_cast<size_t>(rows * capacity)));
    Best<T> best[kQueryBlock];
    for (int64_t row = 0; row < rows; ++row)
        best[row] = Best<T>{kept + row * capacity, 0, p.k, capacity, -kInfinity<T>};

    Screen screen(scores + kQueryTile * kDocumentBlock, rows, kDocumentBlock, p.dim);
    bool screened = false;
    if constexpr (sizeof(T) == sizeof(float)) screened = screens && screen.set_queries(queries);
    if (!screened) pack_left(by_rows(queries, p.dim), rows, p.dim, packed);
    bool is_packed = !screened;
    for (int64_t document = begin; document < end; document += kDocumentBlock) {
        const int64_t count = min_of(kDocumentBlock, end - document);
        const T* documents = read(p.dtype, p.documents, document * p.dim, count * p.dim, block);
        if constexpr (sizeof(T) == sizeof(float)) {
            if (screened && screen.set_documents(documents, count)) {
                for (int64_t tile = 0; tile < rows; tile += kQueryTile) {
                    const int64_t height = min_of(kQueryTile, rows - tile);
                    screen.score(tile, height, count, reinterpret_cast<int32_t*>(scores), kDocumentBlock);
                    for (int64_t row = tile; row < tile + height; ++row)
                        take(
                            p, first + row, document,
                            reinterpret_cast<const int32_t*>(scores) + (row - tile) * kDocumentBlock, count, best[row],
                            [&](float least) { return screen.bar(row, least); },
                            [&](int64_t j) { return dot(queries + row * p.dim, documents + j * p.dim, p.dim); });
                }
                continue;
            }
        }
        if (!is_packed) pack_left(by_rows(queries, p.dim), rows, p.dim, packed), is_packed = true;
        pack_transposed(documents, p.dim, count, p.dim, panels);
        for (int64_t tile = 0; tile < rows; tile += kQueryTile) {
            const int64_t height = min_of(kQueryTile, rows - tile);
            gemm(height, count, p.dim, by_tiles(packed + tile * p.dim, p.dim), panels, scores, kDocumentBlock, false);
            for (int64_t row = tile; row < tile + height; ++row) {
                const T* own = scores + (row - tile) * kDocumentBlock;
                take(
                    p, first + row, document, own, count, best[row], [](T least) { return least; },
                    [&](int64_t j) { return own[j]; });
            }
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        best[row].thin();
        const int64_t size = best[row].size;
        sort(best[row].data, size);
        for (int64_t i = 0; i < p.k; ++i) found[row * p.k + i] = i < size ? best[row].data[i] : 0;
    }
}

// Merges the spans' lists of one query.
void rank(const TopK& p, const Cut& cut, int64_t query, const Found* found) {
    const int64_t row = query % cut.block;
    int64_t* next = static_cast<int64_t*>(scratch_bytes(Slot::kTile, sizeof(int64_t) * static_cast<size_t>(cut.spans)));
    for (int64_t span = 0; span < cut.spans; ++span) next[span] = 0;
    for (int64_t i = 0; i < p.k; ++i) {
        Found best = 0;
        int64_t from = 0;
        for (int64_t span = 0; span < cut.spans; ++span) {
            if (next[span] == p.k) continue;
            const Found head = found[((query / cut.block * cut.spans + span) * cut.block + row) * p.k + next[span]];
            if (head > best) best = head, from = span;
        }
        if (best) ++next[from];
        p.scores[query * p.k + i] = best ? score_of(best) : -kInfinity<float>;
        p.indices[query * p.k + i] = best ? index_of(best) : -1;
    }
}

}  // namespace

void top_k(const TopK& p) {
    if (p.k == 0 || p.num_queries == 0) return;
    const Cut cut(p);
    const int64_t items = cut.query_blocks * cut.spans;
    Found* found =
        static_cast<Found*>(scratch_bytes(Slot::kPanel, sizeof(Found) * static_cast<size_t>(items * cut.block * p.k)));
    parallel_for(items, [&](int64_t item) {
        const int64_t first = item / cut.spans * cut.block, begin = item % cut.spans * cut.span;
        const int64_t rows = min_of(cut.block, p.num_queries - first), end = min_of(begin + cut.span, p.num_documents);
        if (p.dtype == DType::kFloat64)
            search_span<double>(p, first, rows, begin, end, found + item * cut.block * p.k);
        else
            search_span<float>(p, first, rows, begin, end, found + item * cut.block * p.k);
    });
    parallel_for(p.num_queries, [&](int64_t query) { rank(p, cut, query, found); });
}

}  // namespace qemb::cpu::QEMB_ISA
