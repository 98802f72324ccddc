// Exact top-k on the CPU: a block of queries sweeps a span of the documents tile by tile and keeps a heap of its best; the
// spans' bests are then ranked together. The order is total (score, then index), so how the work is cut changes nothing.
#include "ops/topk.h"
#include "cpu/kernels/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd/gemm.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

constexpr int64_t kQueryBlock = 192;  // documents are packed once for each block
constexpr int64_t kDocumentBlock = 256;
constexpr int64_t kItems = 64;      // aim for at least so many work items
constexpr int64_t kMinSpan = 4096;  // documents of a work item, at least

struct Found {
    float score;
    int64_t index;
};

// Ranks before: higher score, then lower index.
QEMB_INLINE bool before(const Found& a, const Found& b) {
    return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// A heap whose root is the worst of the best.
struct Heap {
    Found* data;
    int64_t size = 0;
    int64_t capacity;

    QEMB_INLINE void sift_down(int64_t at) {
        while (true) {
            int64_t worst = at;
            for (int64_t child = 2 * at + 1; child < min_of(2 * at + 3, size); ++child)
                if (before(data[worst], data[child])) worst = child;
            if (worst == at) return;
            const Found held = data[at];
            data[at] = data[worst];
            data[worst] = held;
            at = worst;
        }
    }
    void push(Found found) {
        if (size < capacity) {
            int64_t at = size++;
            data[at] = found;
            while (at > 0 && before(data[(at - 1) / 2], data[at])) {
                const Found held = data[at];
                data[at] = data[(at - 1) / 2];
                data[(at - 1) / 2] = held;
                at = (at - 1) / 2;
            }
        } else if (before(found, data[0])) {
            data[0] = found;
            sift_down(0);
        }
    }
    Found pop() {
        const Found worst = data[0];
        data[0] = data[--size];
        sift_down(0);
        return worst;
    }
};

QEMB_INLINE bool excluded(const TopK& p, int64_t query, int64_t document) {
    for (int64_t i = 0; i < p.num_exclude; ++i)
        if (p.exclude[query * p.num_exclude + i] == document) return true;
    return false;
}

// How the search is cut: `spans` of documents for each block of queries.
struct Cut {
    int64_t query_blocks, spans, span;

    explicit Cut(const TopK& p) : query_blocks(ceil_div(p.num_queries, kQueryBlock)) {
        const int64_t wanted = ceil_div(kItems, max_of<int64_t>(query_blocks, 1));
        const int64_t most = max_of<int64_t>(1, p.num_documents / max_of(kMinSpan, 4 * p.k));
        span = max_of<int64_t>(1, round_up(ceil_div(p.num_documents, min_of(wanted, most)), kDocumentBlock));
        spans = max_of<int64_t>(1, ceil_div(p.num_documents, span));
    }
};

// The best of documents [begin, end) for up to kQueryBlock queries from `first`, best first, at `found` [rows, k].
template <class T>
void search_span(const TopK& p, int64_t first, int64_t begin, int64_t end, Found* found) {
    const int64_t rows = min_of(kQueryBlock, p.num_queries - first);
    T* q = static_cast<T*>(
        scratch_bytes(Slot::kTile, static_cast<size_t>(rows * p.dim + kDocumentBlock * p.dim +
                                                       panel_size<T>(p.dim, kDocumentBlock) + rows * kDocumentBlock) *
                                       sizeof(T)));
    T* block = q + rows * p.dim;
    T* panels = block + kDocumentBlock * p.dim;
    T* scores = panels + panel_size<T>(p.dim, kDocumentBlock);
    for (int64_t row = 0; row < rows; ++row) load_row(p.dtype, p.queries, (first + row) * p.dim, q + row * p.dim, p.dim);

    Heap heaps[kQueryBlock];
    for (int64_t row = 0; row < rows; ++row) heaps[row] = Heap{found + row * p.k, 0, p.k};
    for (int64_t document = begin; document < end; document += kDocumentBlock) {
        const int64_t count = min_of(kDocumentBlock, end - document);
        pack_transposed(read(p.dtype, p.documents, document * p.dim, count * p.dim, block), p.dim, count, p.dim, panels);
        gemm(rows, count, p.dim, by_rows(q, p.dim), panels, scores, kDocumentBlock, false);
        for (int64_t row = 0; row < rows; ++row) {
            Heap& heap = heaps[row];
            const T* s = scores + row * kDocumentBlock;
            const float ceiling = p.ceiling ? p.ceiling[first + row] : kInfinity<float>;
            for (int64_t j = 0; j < count; ++j) {
                const float score = static_cast<float>(s[j]);
                if (heap.size == p.k && !(score >= heap.data[0].score)) continue;
                if (!(score <= ceiling) || (p.num_exclude && excluded(p, first + row, document + j))) continue;
                heap.push(Found{score, document + j});
            }
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        // A heap is emptied worst first, into the place that it has just left.
        for (int64_t i = heaps[row].size; i < p.k; ++i) found[row * p.k + i] = Found{-kInfinity<float>, -1};
        for (int64_t i = heaps[row].size - 1; i >= 0; --i) {
            const Found worst = heaps[row].pop();
            found[row * p.k + i] = worst;
        }
    }
}

// Merges the spans' lists of one query.
void rank(const TopK& p, const Cut& cut, int64_t query, const Found* found) {
    const int64_t row = query % kQueryBlock;
    int64_t* next = static_cast<int64_t*>(scratch_bytes(Slot::kTile, sizeof(int64_t) * static_cast<size_t>(cut.spans)));
    for (int64_t span = 0; span < cut.spans; ++span) next[span] = 0;
    for (int64_t i = 0; i < p.k; ++i) {
        Found best{-kInfinity<float>, -1};
        int64_t from = 0;
        for (int64_t span = 0; span < cut.spans; ++span) {
            if (next[span] == p.k) continue;
            const Found& head = found[((query / kQueryBlock * cut.spans + span) * kQueryBlock + row) * p.k + next[span]];
            if (head.index >= 0 && (best.index < 0 || before(head, best))) {
                best = head;
                from = span;
            }
        }
        if (best.index >= 0) ++next[from];
        p.scores[query * p.k + i] = best.score;
        p.indices[query * p.k + i] = best.index;
    }
}

}  // namespace

void top_k(const TopK& p) {
    if (p.k == 0) return;
    const Cut cut(p);
    const int64_t items = cut.query_blocks * cut.spans;
    Found* found =
        static_cast<Found*>(scratch_bytes(Slot::kPanel, sizeof(Found) * static_cast<size_t>(items * kQueryBlock * p.k)));
    parallel_for(items, [&](int64_t item) {
        const int64_t first = item / cut.spans * kQueryBlock, begin = item % cut.spans * cut.span;
        const int64_t end = min_of(begin + cut.span, p.num_documents);
        if (p.dtype == DType::kFloat64)
            search_span<double>(p, first, begin, end, found + item * kQueryBlock * p.k);
        else
            search_span<float>(p, first, begin, end, found + item * kQueryBlock * p.k);
    });
    parallel_for(p.num_queries, [&](int64_t query) { rank(p, cut, query, found); });
}

}  // namespace qemb::cpu::QEMB_ISA
