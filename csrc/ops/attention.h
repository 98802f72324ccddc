// Attention over packed sequences with grouped-query heads: out = softmax(scale * q k^T) v within each sequence.
// The score matrix exists only as tiles. Storage in `dtype`, arithmetic in float (double for float64).
#pragma once

#include "common/types.h"

namespace qemb {

// How the CUDA kernels cut a batch: made once from its lengths, reused by every layer and by both passes. Sequences of
// at most kTile queries and keys (or fewer, where the device has better kernels for blocks) are short: several of them
// share a tile, each from a row that is a multiple of kSlot, so that a sequence meets the same sums whatever shares its
// tile. The others are cut into blocks, longest first.
struct AttentionPlan {
    static constexpr int kTile = 128, kSlot = 16;

    const int32_t* data = nullptr;  // on the device; see below
    int64_t tiles = 0;              // capacity: tiles of short sequences
    int64_t blocks = 0;             // capacity: blocks of kTile queries of long sequences
    int64_t key_blocks = 0;         // capacity: blocks of kTile keys of long sequences
    int64_t summed = 0;             // capacity: blocks of queries of sequences of more than kTile keys
    bool single = false;            // known that no sequence has more than one query
    // data: [4] counts of tiles, blocks, key_blocks, and the most queries and keys of a short sequence; then pairs:
    // tiles of {first sequence, number of sequences}, blocks of {sequence, block}; then triples: key_blocks of
    // {sequence, block, number of the sequence's first block of queries among those that `summed` counts}. Each list is
    // padded to its capacity. Last, 1 where the device found lengths that are none: then all results are NaN.
    int64_t size() const { return 5 + 2 * (tiles + blocks) + 3 * key_blocks; }
};

// What both passes take. Query head h reads key head h / (num_heads / num_kv_heads). Causal masks are aligned to the
// bottom right: query i of num_q sees key j of num_k when j <= i + num_k - num_q.
struct Attention {
    const void* q;                // [T, num_heads, head_dim]
    const void* k;                // [S, num_kv_heads, head_dim]
    const void* v;                // [S, num_kv_heads, head_dim]
    const int32_t* cu_seqlens_q;  // [num_seqs + 1], on the host for the CPU
    const int32_t* cu_seqlens_k;  // [num_seqs + 1]
    int64_t num_tokens;           // T
    int64_t num_keys;             // S
    int64_t num_seqs;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t q_token_stride, q_head_stride;  // in elements; the last dimension is contiguous
    int64_t k_token_stride, k_head_stride;
    int64_t v_token_stride, v_head_stride;
    double scale;
    bool causal;
    DType dtype;
    AttentionPlan plan{};  // cuda
};

// A query that sees no key gets zeros and lse = -inf.
struct AttentionForward : Attention {
    void* out = nullptr;      // [T, num_heads, head_dim], contiguous
    void* lse = nullptr;      // [T, num_heads] natural log, float (double for float64)
    void* scratch = nullptr;  // cuda: attention_forward_scratch(p) bytes
    void* stream = nullptr;
};

struct AttentionBackward : Attention {
    const void* out = nullptr;   // [T, num_heads, head_dim], contiguous
    const void* dout = nullptr;  // [T, num_heads, head_dim], contiguous
    const void* lse = nullptr;   // [T, num_heads]
    void* dq = nullptr;          // [T, num_heads, head_dim], contiguous, written whole
    void* dk = nullptr;          // [S, num_kv_heads, head_dim], contiguous, written whole
    void* dv = nullptr;          // [S, num_kv_heads, head_dim], contiguous, written whole
    void* scratch = nullptr;     // cuda: attention_backward_scratch(p) bytes
    void* stream = nullptr;
};

namespace cpu {
void attention_forward(const AttentionForward& p);
void attention_backward(const AttentionBackward& p);
}  // namespace cpu

// The plan of a batch, on the host: the capacities, exact, without data; and the data, p.size() values.
AttentionPlan size_plan(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int64_t num_seqs);
void fill_plan(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int64_t num_seqs, const AttentionPlan& plan,
               int32_t* data);

namespace cuda {
// Cumulative lengths that only the device knows, of so many tokens. `checked` gets them as the kernels may read them:
// never decreasing, and ending at `tokens`.
struct DeviceLengths {
    const int32_t* given;
    int32_t* checked;
    int64_t tokens;
};

// Capacities that hold any batch of so many sequences and tokens, and the plan of one whose lengths only the device
// knows.
AttentionPlan largest_plan(int64_t num_seqs, int64_t tokens_q, int64_t tokens_k);
void fill_plan(const DeviceLengths& q, const DeviceLengths& k, int64_t num_seqs, const AttentionPlan& plan,
               int32_t* data, void* stream);
int64_t attention_forward_scratch(const AttentionForward& p);
int64_t attention_backward_scratch(const AttentionBackward& p);
void attention_forward(const AttentionForward& p);
void attention_backward(const AttentionBackward& p);
}  // namespace cuda

}  // namespace qemb
