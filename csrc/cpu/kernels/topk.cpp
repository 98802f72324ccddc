// Exact top-k on the CPU: a block of queries sweeps the documents tile by tile and keeps a heap of its best.
#include "ops/topk.h"
#include "cpu/kernels/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd/gemm.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

constexpr int64_t kQueryBlock = 96;
constexpr int64_t kDocumentBlock = 256;

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

template <class T>
void search_block(const TopK& p, int64_t first) {
    const int64_t rows = min_of(kQueryBlock, p.num_queries - first);
    const int64_t heap_values = ceil_div(static_cast<int64_t>(sizeof(Found)) * rows * p.k, static_cast<int64_t>(sizeof(T)));
    T* q = static_cast<T*>(scratch_bytes(
        Slot::kTile, static_cast<size_t>(rows * p.dim + kDocumentBlock * p.dim + panel_size<T>(p.dim, kDocumentBlock) +
                                         rows * kDocumentBlock + heap_values + 16) *
                         sizeof(T)));
    T* block = q + rows * p.dim;
    T* panels = block + kDocumentBlock * p.dim;
    T* scores = panels + panel_size<T>(p.dim, kDocumentBlock);
    // Round up to the alignment of Found.
    Found* found = reinterpret_cast<Found*>(
        round_up(static_cast<int64_t>(reinterpret_cast<intptr_t>(scores + rows * kDocumentBlock)), alignof(Found)));
    for (int64_t row = 0; row < rows; ++row) load_row(p.dtype, p.queries, (first + row) * p.dim, q + row * p.dim, p.dim);

    Heap heaps[kQueryBlock];
    for (int64_t row = 0; row < rows; ++row) heaps[row] = Heap{found + row * p.k, 0, p.k};
    for (int64_t document = 0; document < p.num_documents; document += kDocumentBlock) {
        const int64_t count = min_of(kDocumentBlock, p.num_documents - document);
        load_row(p.dtype, p.documents, document * p.dim, block, count * p.dim);
        pack_transposed(block, p.dim, count, p.dim, panels);
        gemm(rows, count, p.dim, q, p.dim, 1, panels, scores, kDocumentBlock, false);
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
        for (int64_t i = p.k - 1; i >= 0; --i) {
            const Found best = i < heaps[row].size ? heaps[row].pop() : Found{-kInfinity<float>, -1};
            p.scores[(first + row) * p.k + i] = best.score;
            p.indices[(first + row) * p.k + i] = best.index;
        }
    }
}

}  // namespace

void top_k(const TopK& p) {
    if (p.k == 0) return;
    parallel_for(ceil_div(p.num_queries, kQueryBlock), [&](int64_t block) {
        if (p.dtype == DType::kFloat64)
            search_block<double>(p, block * kQueryBlock);
        else
            search_block<float>(p, block * kQueryBlock);
    });
}

}  // namespace qemb::cpu::QEMB_ISA
