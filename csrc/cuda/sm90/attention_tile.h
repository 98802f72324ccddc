// What the attention kernels of Hopper share. A tile of D columns lies in shared memory as D / 64 panels of rows of 128
// bytes, swizzled: as the copy engine leaves it and wgmma reads it, along its rows or across them.
#pragma once

#include "cuda/attention_tile.h"
#include "cuda/sm90/ring.h"
#include "cuda/tensor_map.h"

namespace qemb::cuda::sm90 {

constexpr uint32_t kTurnBarrier = 1;  // and the next: of the two consumer warpgroups
constexpr uint32_t kTailBarrier = 3;
constexpr int kHalf = 64;  // rows of a warpgroup

template <int kRows>
constexpr int kPanelBytes = kRows * 128;
template <int kRows, int D>
constexpr int kTileBytes = kRows * D * 2;

// A [tokens, heads, D] tensor, kRows tokens of one head at a time.
template <class T, int D, int kRows>
bool make_token_map(TensorMap& map, const void* base, int64_t tokens, int64_t heads, int64_t token_stride,
                    int64_t head_stride) {
    const auto bytes = [](int64_t elements) { return elements * int64_t(sizeof(T)); };
    return make_tensor_map<T>(
        map, {.base = base,
              .rank = 3,
              .size = {D, heads, tokens},
              .byte_stride = {0, bytes(heads > 1 ? head_stride : D), bytes(tokens > 1 ? token_stride : heads * D)},
              .box = {64, 1, kRows},
              .swizzled = true});
}

// By one thread. Rows past the sequence are a neighbour's, rows past the last one zeros.
template <int kRows, int D>
QEMB_DEVICE void load_tile(uint32_t tile, const TensorMap& map, uint32_t barrier, int head, int token) {
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel)
        tma_load(tile + panel * kPanelBytes<kRows>, map, barrier, {panel * 64, head, token});
}

// Zeros to rows from `count` on, by threads [0, kConsumers): what is multiplied by zero must not be a neighbour's NaN.
// A barrier must follow. (opaque: no register is spent on the first address throughout the loop over steps.)
template <int kRows, int D>
QEMB_DEVICE void clear_rows(uint32_t tile, int count) {
    for (int i = opaque(static_cast<int>(threadIdx.x)); i < (kRows - count) * (D / 8); i += kConsumers) {
        const int row = count + i / (D / 8), chunk = i % (D / 8);
        const uint32_t at = tile + chunk / 8 * kPanelBytes<kRows> + row * 128 + ((chunk % 8 ^ row % 8) << 4);
#pragma unroll
        for (int word = 0; word < 4; ++word) shared_store4(at + 4 * word, 0);
    }
    fence_async();
}

// The k-th 16 columns of a tile, as bytes from its start.
template <int kRows>
QEMB_DEVICE int column_step(int k) {
    return k / 4 * kPanelBytes<kRows> + k % 4 * 32;
}
// A matrix `bytes` further on.
QEMB_DEVICE uint64_t moved(uint64_t matrix, int bytes) { return matrix + static_cast<uint64_t>(bytes >> 4); }

// d = a b^T over D: 64 rows of a tile of kRowsA, all kRowsB rows of another.
template <class T, int D, int kRowsA, int kRowsB>
QEMB_DEVICE void multiply_rows(float (&d)[kRowsB / 2], uint32_t a, uint32_t b) {
    const uint64_t left = matrix(a), right = matrix(b);
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
        wgmma<T, kRowsB>(d, moved(left, column_step<kRowsA>(k)), moved(right, column_step<kRowsB>(k)), k > 0);
}

// d += a b: a in registers, 64 x kRows, as accumulators would leave it; b a tile of kRows rows.
template <class T, int D, int kRows>
QEMB_DEVICE void multiply_columns(float (&d)[D / 2], const uint32_t (&a)[kRows / 16][4], uint32_t b) {
    const uint64_t right = matrix(b, kPanelBytes<kRows>);
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) wgmma<T, D, Major::kMN>(d, a[k], moved(right, k * 2048), true);
}

// Accumulators as the left operand of the next product.
template <class T, int kColumns>
QEMB_DEVICE void as_left(const float (&x)[kColumns / 2], uint32_t (&a)[kColumns / 16][4]) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[k][i] = pack<T>(x[8 * k + 2 * i], x[8 * k + 2 * i + 1]);
}

// 128 queries of a sequence and a head, or up to 64 and two heads: a half for each warpgroup; and the steps of 128 keys
// that some of them see. The heads of a group follow each other in one block, which keeps keys and values between them
// where all are in its stages.
struct QueryTile {
    static constexpr int kEnd = -1;  // as `steps`: no tile, and none will follow

    Span span;
    int first, count, head, heads, kv_head, steps;
    bool is_kept, keeps;  // the keys: from the head before, for the next one

    template <class Params>
    QEMB_DEVICE QueryTile(const Params& p, int unit, int part)
        : QueryTile(p, p.plan.data + 4 + 2 * (p.plan.tiles + unit / static_cast<int>(p.num_kv_heads)),
                    unit % static_cast<int>(p.num_kv_heads), part) {}
    template <class Params>
    QEMB_DEVICE static int units(const Params& p) {
        return p.plan.data[1] * static_cast<int>(p.num_kv_heads);
    }
    template <class Params>
    QEMB_DEVICE static int parts(const Params& p) {
        return static_cast<int>(p.num_heads / p.num_kv_heads);
    }

    // Of a warpgroup: its first query in the tile, its head, and how many queries of the tile are its own or before.
    QEMB_DEVICE bool has_two_heads() const { return span.num_q <= kHalf; }
    QEMB_DEVICE int first_of(int half) const { return has_two_heads() ? 0 : half * kHalf; }
    QEMB_DEVICE int head_of(int half) const { return has_two_heads() ? head + half : head; }
    QEMB_DEVICE int count_of(int half) const { return half < heads || !has_two_heads() ? count : 0; }
    QEMB_DEVICE int halves() const { return has_two_heads() ? heads : (count + kHalf - 1) / kHalf; }

  private:
    template <class Params>
    QEMB_DEVICE QueryTile(const Params& p, const int32_t* item, int kv_head, int part)
        : span(p.cu_seqlens_q, p.cu_seqlens_k, item[0]),
          first(item[1] * kTile),
          count(min(kTile, span.num_q - first)),
          head(kv_head * parts(p) + part),
          heads(span.num_q <= kHalf ? min(2, parts(p) - part) : 1),
          kv_head(kv_head),
          steps((visible_keys(first + count - 1, span.num_q, span.num_k, p.causal) + kTile - 1) / kTile),
          is_kept(steps <= 2 && part > 0),
          keeps(steps <= 2 && part + heads < parts(p)) {}
};

// The producer alone reads the plan, ahead of everyone. For each tile of `first` and of the units that next() returns:
// take(tile), which must expect something of the ring, after the tile's description is in shared memory for whoever
// waits for that; then the end.
constexpr int kMessageBytes = 64;
template <class Tile, class Layout>
QEMB_DEVICE Tile& message() {
    static_assert(sizeof(Tile) <= kMessageBytes);
    return *reinterpret_cast<Tile*>(shared_bytes() + Layout::kMessage);
}
template <class Tile, class Params, class Next, class Take>
QEMB_DEVICE void announce_tiles(const Params& p, Tile& message, Ring<1>& ring, int first, const Next& next,
                                const Take& take) {
    for (int unit = first, end = Tile::units(p); unit < end; unit = next())
        for (int part = 0; part < Tile::parts(p);) {
            const Tile tile(p, unit, part);
            ring.wait_empty();
            message = tile;
            take(tile);
            ring.next();
            part += tile.heads;
        }
    ring.wait_empty();
    message.steps = Tile::kEnd;
    mbarrier_arrive(ring.full());
}

}  // namespace qemb::cuda::sm90
