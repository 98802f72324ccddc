// What the searches of top_k share: how the work is cut, and how a warp keeps the sorted list of a query. Scores that
// pass the query's bar wait in a buffer and are merged into the list a batch at a time. The bar is a lower bound of
// the k-th best of all documents, to which every span contributes.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/device/tile_product.h"
#include "cuda/launch.h"
#include "ops/top_k.h"

namespace qemb::cuda::top_k_kernels {

constexpr const char* kOp = "top_k";
constexpr int64_t kMinSpan = 1024;  // documents
constexpr int64_t kSpanTiles = 16;  // what a span costs beside its products, in tiles of 128 documents
constexpr int kMaxSpans = 256, kSpansOfLane = kMaxSpans / 32;
constexpr int kRowsOfWarp = kTile / (kTileThreads / 32);
constexpr int kBatch = 32;               // of candidates: one a lane
constexpr int kBuffer = kBatch + kTile;  // candidates of a row: an incomplete batch and a whole tile

// A score and its document as one number: the larger comes first, of equal scores the lower document. 0: none.
using Key = uint64_t;
QEMB_DEVICE Key key_of(float score, int64_t document) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, score == 0 ? 0.0f : score);  // -0 equals 0
    const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<Key>(ordered) << 32 | static_cast<uint32_t>(~document);
}
QEMB_DEVICE float score_of(Key key) {
    const uint32_t ordered = static_cast<uint32_t>(key >> 32);
    return __builtin_bit_cast(float, ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
QEMB_DEVICE int64_t document_of(Key key) { return static_cast<uint32_t>(~key); }

// Documents from `next` on that score at most this come after `key`: among equal scores the lower document is first.
// NaN, which nothing is below: there are none.
QEMB_DEVICE float bar_of(Key key, int64_t next) {
    if (key == 0) return NAN;
    const float score = score_of(key);
    if (document_of(key) < next) return score;
    return score > -INFINITY ? nextafterf(score, -INFINITY) : NAN;
}

// Every tile of 128 queries meets `spans` spans of documents; each such pair is a unit. The device holds `slots` blocks
// at a time, and takes the units in waves of so many.
struct Cut {
    int64_t query_tiles, tiles, spans = 1, span_tiles, blocks;
    int64_t rank;  // so many documents of every span are k in all

    Cut(const TopK& p, int64_t slots)
        : query_tiles(ceil_div(p.num_queries, kTile)), tiles(ceil_div(p.num_documents, kTile)) {
        const int64_t max_spans = std::clamp<int64_t>(p.num_documents / std::max(kMinSpan, 4 * p.k), 1, kMaxSpans);
        const auto time = [&](int64_t n) {
            return ceil_div(query_tiles * n, slots) * (ceil_div(tiles, n) + kSpanTiles);
        };
        for (int64_t n = 2; n <= max_spans; ++n)
            if (time(n) < time(spans)) spans = n;
        span_tiles = std::max<int64_t>(1, ceil_div(tiles, spans));
        spans = std::max<int64_t>(1, ceil_div(tiles, span_tiles));
        blocks = std::min(slots, query_tiles * spans);
        rank = ceil_div(p.k, spans);
    }
};

// Keys of all blocks. With a single span the lists lie where the result's indices will be, and nothing is shared.
struct Memory {
    Key* bars;        // [num_queries]: a lower bound of the k-th best
    Key* floors;      // [num_queries, spans]: the rank-th best of each span so far
    Key* lists;       // [spans, num_queries, k], best first
    Key* candidates;  // [blocks, 128, kBuffer]

    Memory(const TopK& p, const Cut& cut)
        : bars(static_cast<Key*>(p.scratch)),
          floors(bars + (cut.spans > 1 ? p.num_queries : 0)),
          lists(floors + (cut.spans > 1 ? p.num_queries * cut.spans : 0)),
          candidates(lists + (cut.spans > 1 ? p.num_queries * cut.spans * p.k : 0)) {
        if (cut.spans == 1) lists = reinterpret_cast<Key*>(p.indices);
    }
    int64_t bytes(const Cut& cut) const {
        return static_cast<int64_t>(sizeof(Key)) * (candidates - bars + cut.blocks * kTile * kBuffer);
    }
};

// What a block knows of its queries, in shared memory.
struct Rows {
    float ceiling[kTile], bar[kTile];
    int waiting[kTile];  // candidates
};

// The largest key in the first lane.
QEMB_DEVICE Key sorted(Key key) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int size = 2; size <= 32; size *= 2)
#pragma unroll
        for (int step = size / 2; step > 0; step /= 2) {
            const Key other = shuffle_xor(key, step);
            const bool takes_larger = !(lane & step) == !(lane & size);
            key = takes_larger == (other > key) ? other : key;
        }
    return key;
}
// How many of the warp's sorted keys are larger than mine?
QEMB_DEVICE int count_larger(Key of_warp, Key mine) {
    int count = 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) count += shuffle(of_warp, count + step - 1) > mine ? step : 0;
    return count + (shuffle(of_warp, count) > mine);
}

// A warp merges its sorted keys into a list, whose last ones drop out: each key moves by as many places as there are
// larger ones in the other row.
QEMB_DEVICE void merge_batch(Key* list, int64_t k, Key batch) {
    const int lane = threadIdx.x % 32;
    int64_t place = lane;
    for (int64_t chunk = (k - 1) / 32 * 32; chunk >= 0; chunk -= 32) {  // backwards: nothing is overwritten unread
        const int64_t at = chunk + lane;
        const Key key = at < k ? list[at] : 0;
        sync_warp();
        if (shuffle(key, 31) > shuffle(batch, 0)) {  // the batch comes after this chunk and those before it
            place += chunk + 32;
            break;
        }
        place += count_larger(key, batch);
        const int shift = count_larger(batch, key);
        if (key && shift > 0 && at + shift < k) list[at + shift] = key;
    }
    if (batch && place < k) list[place] = batch;
    sync_warp();
}

QEMB_DEVICE bool is_excluded(const TopK& p, int64_t query, int64_t document) {
    for (int64_t i = 0; i < p.num_exclude; ++i)
        if (p.exclude[query * p.num_exclude + i] == document) return true;
    return false;
}

// A unit of the work. begin() and insert() are called by the first kTileThreads threads of the block, whose warps own
// 16 rows each.
struct Unit {
    const TopK& p;
    const Cut& cut;
    const Memory& memory;
    int number, query_tile;
    int tile, end_tile;  // of 128 documents

    QEMB_DEVICE Unit(const TopK& p, const Cut& cut, const Memory& memory, int number)
        : p(p),
          cut(cut),
          memory(memory),
          number(number),
          query_tile(number % static_cast<int>(cut.query_tiles)),
          tile(number / static_cast<int>(cut.query_tiles) * static_cast<int>(cut.span_tiles)),
          end_tile(static_cast<int>(min(tile + cut.span_tiles, cut.tiles))) {}

    QEMB_DEVICE int64_t query(int row) const { return static_cast<int64_t>(query_tile) * kTile + row; }
    QEMB_DEVICE void begin(Rows& rows) const {
        const int lane = threadIdx.x % 32, row = first_row() + lane % kRowsOfWarp;
        if (lane < kRowsOfWarp) {
            const bool exists = query(row) < p.num_queries;
            rows.ceiling[row] = !exists ? -INFINITY : p.ceiling ? p.ceiling[query(row)] : INFINITY;
            const Key bar = exists && cut.spans > 1 ? load_relaxed(memory.bars + query(row)) : 0;
            rows.bar[row] = exists ? bar_of(bar, static_cast<int64_t>(tile) * kTile) : INFINITY;
            rows.waiting[row] = 0;
        }
        each_row([&](int own) {
            for (int64_t i = lane; i < p.k; i += 32) list(own)[i] = 0;
        });
        sync_warp();
    }
    // Eight scores of a row as a thread holds them: of two neighbors of a tile from `column` on, of the two 8
    // columns further, and so on.
    QEMB_DEVICE void offer(Rows& rows, int row, const float (&scores)[8], int of_tile, int column) const {
        const float bar = rows.bar[row];
        bool any = false;
#pragma unroll
        for (int i = 0; i < 8; ++i) any |= !(scores[i] <= bar);
        if (!any) return;
        row = opaque(row);
        const float ceiling = rows.ceiling[row];
#pragma unroll 1  // seldom: one copy of the code
        for (int i = 0; i < 8; ++i) {
            float score = scores[0];
#pragma unroll
            for (int j = 1; j < 8; ++j) score = i == j ? scores[j] : score;
            const int64_t document = static_cast<int64_t>(of_tile) * kTile + column + i / 2 * 8 + i % 2;
            if (!(score <= bar) && score <= ceiling && document < p.num_documents)
                candidates(row)[next_ticket(&rows.waiting[row])] = key_of(score, document);
        }
    }
    // The candidates of rows that have at least `enough` enter their lists; the tiles before `next` have been offered.
    QEMB_DEVICE void insert(Rows& rows, int next, int enough) const {
        if (!any_lane(rows.waiting[first_row() + static_cast<int>(threadIdx.x) % kRowsOfWarp] >= enough)) return;
        each_row([&](int row) {
            if (rows.waiting[row] >= enough) insert_row(rows, row, next);
        });
        sync_warp();  // a lane that offers must not change what others have yet to read
    }

  private:
    // The span of the unit: seldom needed, and a register that the products lack.
    QEMB_DEVICE int64_t part() const { return opaque(number) / static_cast<int>(cut.query_tiles); }
    QEMB_DEVICE static int first_row() { return opaque(static_cast<int>(threadIdx.x)) / 32 * kRowsOfWarp; }
    QEMB_DEVICE Key* list(int row) const { return memory.lists + (part() * p.num_queries + query(row)) * p.k; }
    QEMB_DEVICE Key* candidates(int row) const {
        return memory.candidates + (static_cast<int64_t>(blockIdx.x) * kTile + row) * kBuffer;
    }
    template <class Body>
    QEMB_DEVICE void each_row(const Body& body) const {
#pragma unroll 1
        for (int row = first_row(); row < first_row() + kRowsOfWarp && query(row) < p.num_queries; ++row) body(row);
    }
    QEMB_DEVICE void insert_row(Rows& rows, int row, int next) const {
        const int lane = threadIdx.x % 32, count = rows.waiting[row];
#pragma unroll 1
        for (int i = lane; i - lane < count; i += 32) {
            Key key = i < count ? candidates(row)[i] : 0;
            if (key && is_excluded(p, query(row), document_of(key))) key = 0;
            merge_batch(list(row), p.k, sorted(key));
        }
        Key best = list(row)[p.k - 1];
        if (cut.spans > 1) best = share(query(row), best, list(row)[cut.rank - 1]);
        if (lane == 0) {
            rows.waiting[row] = 0;
            rows.bar[row] = bar_of(best, static_cast<int64_t>(next) * kTile);
        }
        sync_warp();
    }
    // The k-th best of this span is not above that of all, and neither is the lowest floor of all spans. -> in the
    // first lane, the bar
    QEMB_DEVICE Key share(int64_t at, Key own, Key floor) const {
        const int lane = threadIdx.x % 32;
        Key* const floors = memory.floors + at * cut.spans;
        if (lane == 0) store_relaxed(floors + part(), floor);
        sync_warp();
        Key least = ~Key{0};
        for (int64_t i = lane; i < cut.spans; i += 32) least = min(least, load_relaxed(floors + i));
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) least = min(least, shuffle_xor(least, mask));
        const Key best = max(own, least);
        return lane == 0 ? max(best, atomic_max(memory.bars + at, best)) : best;
    }
};

}  // namespace qemb::cuda::top_k_kernels
