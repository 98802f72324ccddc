// Exact top-k on the CPU: a block of queries sweeps a span of the documents tile by tile and keeps the best of what it meets;
// the spans' bests are then ranked together. The order is total (score, then index), so how the work is cut changes nothing.
#include "ops/topk.h"
#include "cpu/kernels/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd/gemm.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

constexpr int64_t kQueryBlock = 768;  // documents are packed once for each block
constexpr int64_t kQueryTile = 96;    // and read from the second cache by each tile of it
constexpr int64_t kDocumentBlock = 192;
constexpr int64_t kItemsPerThread = 4;  // every span of documents finds its own k best before they are ranked: few spans
constexpr int64_t kMinSpan = 4096;      // documents of a work item, at least

// A document and its score in one number that is larger the better it ranks: higher score, then lower index. Zero is none.
using Found = uint64_t;

QEMB_INLINE Found found_of(float score, int64_t index) {
    uint32_t bits;
    const float positive_zero = score + 0.0f;
    __builtin_memcpy(&bits, &positive_zero, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<Found>(bits) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
}
QEMB_INLINE float score_of(Found found) {
    uint32_t bits = static_cast<uint32_t>(found >> 32);
    bits = bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits;
    float score;
    __builtin_memcpy(&score, &bits, sizeof score);
    return score;
}
QEMB_INLINE int64_t index_of(Found found) { return static_cast<uint32_t>(~static_cast<uint32_t>(found)); }

QEMB_INLINE void swap(Found& a, Found& b) {
    const Found held = a;
    a = b;
    b = held;
}

// Moves the k largest of `size` distinct numbers to the front, the k-th of them to its end.
void select(Found* data, int64_t size, int64_t k) {
    int64_t low = 0, high = size - 1;
    const int64_t wanted = k - 1;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;  // the median of three becomes the pivot
        if (data[middle] > data[low]) swap(data[middle], data[low]);
        if (data[high] > data[low]) swap(data[high], data[low]);
        if (data[high] > data[middle]) swap(data[high], data[middle]);
        const Found pivot = data[middle];
        int64_t i = low, j = high;
        while (i <= j) {
            while (data[i] > pivot) ++i;
            while (data[j] < pivot) --j;
            if (i <= j) swap(data[i++], data[j--]);
        }
        if (wanted <= j)
            high = j;
        else if (wanted >= i)
            low = i;
        else
            return;
    }
}

// Best first.
void sort(Found* data, int64_t size) {
    while (size > 16) {
        const int64_t half = size / 2;
        select(data, size, half);
        sort(data + half, size - half);
        size = half;
    }
    for (int64_t i = 1; i < size; ++i) {
        const Found moved = data[i];
        int64_t at = i;
        for (; at > 0 && data[at - 1] < moved; --at) data[at] = data[at - 1];
        data[at] = moved;
    }
}

// The best k of what is added, among up to `capacity` that are kept until a selection thins them out.
template <class T>
struct Best {
    Found* data;
    int64_t size, k, capacity;
    T least;  // a score below has no chance

    QEMB_INLINE void add(float score, int64_t index) {
        data[size++] = found_of(score, index);
        if (size == capacity) thin();
    }
    void thin() {
        if (size < k) return;
        select(data, size, k);
        size = k;
        const float score = score_of(data[k - 1]);
        // In float64 a little less can still become that score as a float.
        least = sizeof(T) == sizeof(float)
                    ? static_cast<T>(score)
                    : static_cast<T>(score - 1e-7 * static_cast<double>(score < 0 ? -score : score) - 1e-300);
    }
};

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
        const int64_t most = max_of<int64_t>(1, p.num_documents / max_of(kMinSpan, 4 * p.k));
        span = max_of<int64_t>(1, round_up(ceil_div(p.num_documents, min_of(wanted, most)), kDocumentBlock));
        spans = max_of<int64_t>(1, ceil_div(p.num_documents, span));
    }
};

// Takes those of a query's scores with documents from `document` on that may belong to its best. Most are below `least`: two
// vectors of them are passed over at once.
template <class T>
QEMB_INLINE void take(const TopK& p, int64_t query, int64_t document, const T* scores, int64_t count, Best<T>& best) {
    constexpr int kStep = 2 * kLanes<T>;
    const float ceiling = p.ceiling ? p.ceiling[query] : kInfinity<float>;
    for (int64_t start = 0; start < count; start += kStep) {
        if (start + kStep <= count) {
            const Vec<T> bar = splat<T>(best.least);
            if (!any<T>((load(scores + start) >= bar) | (load(scores + start + kLanes<T>) >= bar))) continue;
        }
        for (int64_t j = start; j < min_of(start + kStep, count); ++j) {
            const float score = static_cast<float>(scores[j]);
            if (!(scores[j] >= best.least) || !(score <= ceiling)) continue;
            if (p.num_exclude && excluded(p, query, document + j)) continue;
            best.add(score, document + j);
        }
    }
}

// The best of documents [begin, end) for `rows` queries from `first`, best first, at `found` [rows, k], zeros at the end.
template <class T>
void search_span(const TopK& p, int64_t first, int64_t rows, int64_t begin, int64_t end, Found* found) {
    T* q = static_cast<T*>(
        scratch_bytes(Slot::kTile, static_cast<size_t>(left_size<T>(rows, p.dim) + kDocumentBlock * p.dim +
                                                       panel_size<T>(p.dim, kDocumentBlock) + kQueryTile * kDocumentBlock) *
                                       sizeof(T)));
    T* block = q + left_size<T>(rows, p.dim);
    T* panels = block + kDocumentBlock * p.dim;
    T* scores = panels + panel_size<T>(p.dim, kDocumentBlock);
    for (int64_t row = 0; row < rows; row += kTileRows) {
        const int64_t count = min_of<int64_t>(kTileRows, rows - row);
        pack_left(by_rows(read(p.dtype, p.queries, (first + row) * p.dim, count * p.dim, block), p.dim), count, p.dim,
                  q + row * p.dim);
    }

    const int64_t capacity = min_of(3 * p.k, end - begin + p.k);
    Found* kept = static_cast<Found*>(scratch_bytes(Slot::kPartial, sizeof(Found) * static_cast<size_t>(rows * capacity)));
    Best<T> best[kQueryBlock];
    for (int64_t row = 0; row < rows; ++row) best[row] = Best<T>{kept + row * capacity, 0, p.k, capacity, -kInfinity<T>};
    for (int64_t document = begin; document < end; document += kDocumentBlock) {
        const int64_t count = min_of(kDocumentBlock, end - document);
        pack_transposed(read(p.dtype, p.documents, document * p.dim, count * p.dim, block), p.dim, count, p.dim, panels);
        for (int64_t tile = 0; tile < rows; tile += kQueryTile) {
            const int64_t height = min_of(kQueryTile, rows - tile);
            gemm(height, count, p.dim, by_tiles(q + tile * p.dim, p.dim), panels, scores, kDocumentBlock, false);
            for (int64_t row = tile; row < tile + height; ++row)
                take(p, first + row, document, scores + (row - tile) * kDocumentBlock, count, best[row]);
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
