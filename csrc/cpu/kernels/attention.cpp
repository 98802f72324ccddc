// Varlen grouped-query attention on the CPU: blocks of keys are widened and packed once and serve every query head of
// the group; scores live in a tile that fits the second cache, with the online softmax of FlashAttention over key
// blocks.
#include "ops/attention.h"
#include "cpu/kernels/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd/gemm.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

constexpr int64_t kQueryBlock = 48;     // rows of a score tile, a multiple of every kTileRows
constexpr int64_t kKeyBlock = 256;      // columns of a score tile
constexpr int64_t kQueryChunk = 288;    // query tokens of a forward work item, at most: threads share long sequences
constexpr int64_t kBackwardBlock = 96;  // rows of a backward tile; also a multiple of every kTileRows
constexpr int64_t kKeyChunk = 1152;     // keys of a backward work item, at least; a multiple of two backward blocks
constexpr int64_t kMaxChunks = 4;  // each chunk of keys of a long sequence keeps a dQ of its own until they are added

// All that is known about the lengths of one sequence.
struct Lengths {
    int64_t q_start, num_q, k_start, num_k;
    bool causal;

    template <class Params>
    Lengths(const Params& p, int64_t seq)
        : q_start(p.cu_seqlens_q[seq]),
          num_q(p.cu_seqlens_q[seq + 1] - q_start),
          k_start(p.cu_seqlens_k[seq]),
          num_k(p.cu_seqlens_k[seq + 1] - k_start),
          causal(p.causal) {}

    // Keys that query i may see: [0, visible(i)).
    QEMB_INLINE int64_t visible(int64_t i) const {
        return causal ? max_of<int64_t>(0, min_of<int64_t>(num_k, i + num_k - num_q + 1)) : num_k;
    }
};

// A work item: some query tokens (forward) or keys (backward) of one (sequence, key head).
struct Item {
    int64_t seq, head, start, cost;
};

// Longest first, so that no core is left alone with a long one: sorted by powers of two, linear and stable.
struct Items {
    Item* data;
    int64_t count = 0;

    // for_each(emit) calls emit(item) for every item, in the same order each time.
    template <class ForEach>
    explicit Items(ForEach for_each) {
        int64_t buckets[65] = {};
        const auto bucket = [](int64_t cost) { return cost <= 0 ? 64 : __builtin_clzll(static_cast<uint64_t>(cost)); };
        for_each([&](const Item& item) { ++buckets[bucket(item.cost)]; });
        for (int64_t& size : buckets) {
            const int64_t here = size;
            size = count;
            count += here;
        }
        data = static_cast<Item*>(scratch_bytes(Slot::kPanel, sizeof(Item) * static_cast<size_t>(count + 1)));
        for_each([&](const Item& item) { data[buckets[bucket(item.cost)]++] = item; });
    }
};

// Bump allocation out of this thread's scratch.
template <class T>
struct Arena {
    T* next;
    explicit Arena(int64_t count)
        : next(static_cast<T*>(scratch_bytes(Slot::kTile, static_cast<size_t>(count) * sizeof(T)))) {}
    QEMB_INLINE T* take(int64_t count) {
        T* here = next;
        next += round_up(count, 16);
        return here;
    }
};

// q, k, v, out or dout where it is stored: [tokens, heads, dim].
struct Stored {
    DType dtype;
    const void* data;
    int64_t token_stride, head_stride;

    // A head's rows lie a whole token apart, too far for the processor to guess the next one.
    template <class T>
    void load(int64_t token, int64_t head, int64_t rows, int64_t dim, T* to) const {
        constexpr int64_t kAhead = 6, kLine = 64;
        const int64_t item = size_of(dtype), first = token * token_stride + head * head_stride;
        const char* bytes = static_cast<const char*>(data) + first * item;
        for (int64_t row = 0; row < rows; ++row) {
            if (row + kAhead < rows)
                for (int64_t at = 0; at < dim * item; at += kLine)
                    __builtin_prefetch(bytes + (row + kAhead) * token_stride * item + at);
            load_row(dtype, data, first + row * token_stride, to + row * dim, dim);
        }
    }
};
template <class Params>
Stored keys_of(const Params& p) {
    return {p.dtype, p.k, p.k_token_stride, p.k_head_stride};
}
template <class Params>
Stored values_of(const Params& p) {
    return {p.dtype, p.v, p.v_token_stride, p.v_head_stride};
}
template <class Params>
Stored queries_of(const Params& p) {
    return {p.dtype, p.q, p.q_token_stride, p.q_head_stride};
}

// exp(scale * s - offset) over [0, count), zeros up to `padded`; returns the sum.
template <class T>
QEMB_INLINE T exponentiate(T* s, int64_t count, int64_t padded, T scale, T offset) {
    const T factor = scale * kLog2E<T>;
    const Vec<T> subtracted = splat<T>(offset * kLog2E<T>);
    Vec<T> sums{};
    int64_t j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>) {
        const Vec<T> e = exp2<T>(load(s + j) * factor - subtracted);
        store(s + j, e);
        sums += e;
    }
    T sum = sum_lanes<T>(sums);
    if (j < count) {
        Vec<T> e = exp2<T>(load(s + j) * factor - subtracted);
        for (int64_t lane = 0; lane < count - j; ++lane) {
            s[j + lane] = e[lane];
            sum += e[lane];
        }
    }
    for (j = count; j < padded; ++j) s[j] = 0;
    return sum;
}

// P = exp(scale * s - lse) in place of s and dS = scale * P * (dP - delta) in place of dP, zeros up to `padded`.
template <class T>
QEMB_INLINE void probabilities_and_gradients(T* s, T* dp, int64_t count, int64_t padded, T scale, T lse, T delta) {
    const T factor = scale * kLog2E<T>;
    const Vec<T> subtracted = splat<T>(lse * kLog2E<T>);
    for (int64_t j = 0; j < count; j += kLanes<T>) {
        const Vec<T> prob = exp2<T>(load(s + j) * factor - subtracted);
        store(s + j, prob);
        store(dp + j, (load(dp + j) - delta) * (prob * scale));
    }
    for (int64_t j = count; j < padded; ++j) s[j] = dp[j] = 0;
}

template <class T>
QEMB_INLINE T row_max(const T* s, int64_t count) {
    Vec<T> best = splat<T>(-kInfinity<T>);
    int64_t j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>) {
        const Vec<T> value = load(s + j);
        best = value > best ? value : best;
    }
    T result = max_lanes<T>(best);
    for (; j < count; ++j) result = max_of(result, s[j]);
    return result;
}

// Query tokens of one forward item. Equal parts, since each of them packs all keys.
QEMB_INLINE int64_t query_chunk(const Lengths& len) {
    return round_up(ceil_div(len.num_q, max_of<int64_t>(1, ceil_div(len.num_q, kQueryChunk))), 16);
}

template <class T>
void forward_item(const AttentionForward& p, const Item& item) {
    const Lengths len(p, item.seq);
    const int64_t group = p.num_heads / p.num_kv_heads, dim = p.head_dim, padded = round_up(dim, kLanes<T>);
    const int64_t tokens = min_of(query_chunk(len), len.num_q - item.start), rows = tokens * group;
    const int64_t max_keys = round_up(min_of(kKeyBlock, len.num_k), kLanes<T>);

    // Rows are (head of the group, token): one block of keys serves them all.
    Arena<T> arena(rows * dim + rows * padded + 2 * rows + kQueryBlock * max_keys + max_keys * dim +
                   panel_size<T>(dim, max_keys) + panel_size<T>(max_keys, dim) + 8 * 16);
    T* q = arena.take(rows * dim);
    T* out = arena.take(rows * padded);
    T* maxima = arena.take(rows);
    T* sums = arena.take(rows);
    T* scores = arena.take(kQueryBlock * max_keys);
    T* block = arena.take(max_keys * dim);
    T* k_panels = arena.take(panel_size<T>(dim, max_keys));
    T* v_panels = arena.take(panel_size<T>(max_keys, dim));

    // Load Q.
    for (int64_t g = 0; g < group; ++g)
        queries_of(p).load(len.q_start + item.start, item.head * group + g, tokens, dim, q + g * tokens * dim);
    for (int64_t row = 0; row < rows; ++row) {
        maxima[row] = -kInfinity<T>;
        sums[row] = 0;
    }
    for (int64_t i = 0; i < rows * padded; ++i) out[i] = 0;

    const T scale = static_cast<T>(p.scale);
    const int64_t last_visible = len.visible(item.start + tokens - 1);
    for (int64_t key = 0; key < last_visible; key += kKeyBlock) {
        const int64_t keys = min_of(kKeyBlock, len.num_k - key), width = round_up(keys, kLanes<T>);
        // Pack K transposed and V, once for the group.
        keys_of(p).load(len.k_start + key, item.head, keys, dim, block);
        pack_transposed(block, dim, keys, dim, k_panels);
        values_of(p).load(len.k_start + key, item.head, keys, dim, block);
        pack_rows(block, dim, keys, dim, v_panels);

        for (int64_t g = 0; g < group; ++g) {
            for (int64_t token = 0; token < tokens; token += kQueryBlock) {
                const int64_t count = min_of(kQueryBlock, tokens - token), first = g * tokens + token;
                if (len.visible(item.start + token + count - 1) <= key) continue;
                // Scores.
                gemm(count, keys, dim, by_rows(q + first * dim, dim), k_panels, scores, width, false);
                // Online softmax.
                for (int64_t r = 0; r < count; ++r) {
                    T* s = scores + r * width;
                    T* o = out + (first + r) * padded;
                    const int64_t seen = min_of(keys, len.visible(item.start + token + r) - key);
                    if (seen <= 0) {
                        for (int64_t j = 0; j < width; ++j) s[j] = 0;
                        continue;
                    }
                    const T before = maxima[first + r], now = max_of(before, row_max(s, seen) * scale);
                    if (now > before) {
                        const T shrink = before == -kInfinity<T> ? T(0) : exp<T>(splat<T>(before - now))[0];
                        sums[first + r] *= shrink;
                        for (int64_t d = 0; d < padded; ++d) o[d] *= shrink;
                        maxima[first + r] = now;
                    }
                    sums[first + r] += exponentiate(s, seen, width, scale, now);
                }
                // Weighted values.
                gemm(count, dim, keys, by_rows(scores, width), v_panels, out + first * padded, padded, true);
            }
        }
    }

    // Write O and lse.
    for (int64_t g = 0; g < group; ++g) {
        for (int64_t token = 0; token < tokens; ++token) {
            const int64_t row = g * tokens + token, head = item.head * group + g, at = len.q_start + item.start + token;
            T* o = out + row * padded;
            const bool seen = len.visible(item.start + token) > 0;
            const T inverse = seen ? T(1) / sums[row] : T(0);
            for (int64_t d = 0; d < dim; ++d) o[d] *= inverse;
            store_row(p.dtype, o, p.out, (at * p.num_heads + head) * dim, dim);
            const T sum = sums[row];
            static_cast<T*>(p.lse)[at * p.num_heads + head] =
                seen ? maxima[row] + static_cast<T>(__builtin_log(static_cast<double>(sum))) : -kInfinity<T>;
        }
    }
}

// Keys of one backward item. It follows from the length alone, so the order of additions does too.
QEMB_INLINE int64_t key_chunk(const Lengths& len) {
    return max_of(kKeyChunk, round_up(ceil_div(len.num_k, kMaxChunks), 2 * kBackwardBlock));
}

// dQ of sequences with several chunks of keys: `chunks` arrays [num_heads, num_q, padded] each, at `start` for each
// sequence.
template <class T>
struct PartialGradients {
    T* values = nullptr;
    int64_t* start;

    explicit PartialGradients(const AttentionBackward& p) {
        const int64_t width = p.num_heads * round_up(p.head_dim, kLanes<T>);
        start =
            static_cast<int64_t*>(scratch_bytes(Slot::kIndex, sizeof(int64_t) * static_cast<size_t>(p.num_seqs + 1)));
        start[0] = 0;
        for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
            const Lengths len(p, seq);
            const int64_t chunks = ceil_div(len.num_k, key_chunk(len));
            start[seq + 1] = start[seq] + (chunks > 1 ? chunks * len.num_q * width : 0);
        }
        const int64_t total = start[p.num_seqs];
        if (total) values = static_cast<T*>(scratch_bytes(Slot::kPartial, sizeof(T) * static_cast<size_t>(total)));
    }
    T* of(int64_t seq, int64_t part) const {
        return start[seq + 1] > start[seq] ? values + start[seq] + part : nullptr;
    }
};

template <class T>
void backward_item(const AttentionBackward& p, const Item& item, const PartialGradients<T>& partial) {
    const Lengths len(p, item.seq);
    const int64_t group = p.num_heads / p.num_kv_heads, dim = p.head_dim, padded = round_up(dim, kLanes<T>);
    const int64_t first_key = item.start, num_q = len.num_q, num_k = min_of(key_chunk(len), len.num_k - first_key);
    const int64_t max_keys = round_up(min_of(2 * kBackwardBlock, num_k), kLanes<T>);
    const int64_t max_rows = min_of(kBackwardBlock, num_q);
    T* const kept_dq = partial.of(item.seq, first_key / key_chunk(len) * p.num_heads * num_q * padded);

    Arena<T> arena(2 * num_k * padded + 3 * num_q * dim + num_q * padded + 2 * num_q + 2 * max_rows * max_keys +
                   2 * panel_size<T>(dim, max_keys) + panel_size<T>(max_keys, dim) + 2 * panel_size<T>(max_rows, dim) +
                   max_keys * dim + 16 * 16);
    T* dk = arena.take(num_k * padded);
    T* dv = arena.take(num_k * padded);
    T* q = arena.take(num_q * dim);
    T* dout = arena.take(num_q * dim);
    T* out = arena.take(num_q * dim);
    T* own_dq = arena.take(kept_dq ? 0 : num_q * padded);
    T* lse = arena.take(num_q);
    T* delta = arena.take(num_q);
    T* probs = arena.take(max_rows * max_keys);
    T* dscores = arena.take(max_rows * max_keys);
    T* kt_panels = arena.take(panel_size<T>(dim, max_keys));
    T* vt_panels = arena.take(panel_size<T>(dim, max_keys));
    T* k_panels = arena.take(panel_size<T>(max_keys, dim));
    T* q_panels = arena.take(panel_size<T>(max_rows, dim));
    T* dout_panels = arena.take(panel_size<T>(max_rows, dim));
    T* block = arena.take(max_keys * dim);

    const T scale = static_cast<T>(p.scale);
    for (int64_t i = 0; i < num_k * padded; ++i) dk[i] = dv[i] = 0;

    const auto pack_keys = [&](int64_t token, int64_t keys) {
        values_of(p).load(len.k_start + token, item.head, keys, dim, block);
        pack_transposed(block, dim, keys, dim, vt_panels);
        keys_of(p).load(len.k_start + token, item.head, keys, dim, block);
        pack_transposed(block, dim, keys, dim, kt_panels);
        pack_rows(block, dim, keys, dim, k_panels);
    };

    for (int64_t g = 0; g < group && num_q > 0; ++g) {
        const int64_t head = item.head * group + g, packed_row = p.num_heads * dim;
        // Load Q, dO; delta = rowsum(dO * O).
        queries_of(p).load(len.q_start, head, num_q, dim, q);
        Stored{p.dtype, p.dout, packed_row, dim}.load(len.q_start, head, num_q, dim, dout);
        Stored{p.dtype, p.out, packed_row, dim}.load(len.q_start, head, num_q, dim, out);
        for (int64_t i = 0; i < num_q; ++i) {
            delta[i] = dot(dout + i * dim, out + i * dim, dim);
            lse[i] = static_cast<const T*>(p.lse)[(len.q_start + i) * p.num_heads + head];
        }
        T* dq = kept_dq ? kept_dq + head * num_q * padded : own_dq;
        for (int64_t i = 0; i < num_q * padded; ++i) dq[i] = 0;

        for (int64_t key = 0; key < num_k; key += 2 * kBackwardBlock) {
            const int64_t keys = min_of(2 * kBackwardBlock, num_k - key), width = round_up(keys, kLanes<T>);
            const int64_t token = first_key + key;
            if (g == 0 || num_k > keys) pack_keys(token, keys);

            for (int64_t row = 0; row < num_q; row += kBackwardBlock) {
                const int64_t rows = min_of(kBackwardBlock, num_q - row);
                if (len.visible(row + rows - 1) <= token) continue;
                // P = exp(scale S - lse)
                gemm(rows, keys, dim, by_rows(q + row * dim, dim), kt_panels, probs, width, false);
                gemm(rows, keys, dim, by_rows(dout + row * dim, dim), vt_panels, dscores, width, false);
                for (int64_t r = 0; r < rows; ++r) {
                    const int64_t seen = max_of<int64_t>(0, min_of(keys, len.visible(row + r) - token));
                    probabilities_and_gradients(probs + r * width, dscores + r * width, seen, width, scale,
                                                lse[row + r], delta[row + r]);
                }
                pack_rows(q + row * dim, dim, rows, dim, q_panels);
                pack_rows(dout + row * dim, dim, rows, dim, dout_panels);
                gemm(keys, dim, rows, by_columns(probs, width), dout_panels, dv + key * padded, padded, true);
                gemm(keys, dim, rows, by_columns(dscores, width), q_panels, dk + key * padded, padded, true);
                gemm(rows, dim, keys, by_rows(dscores, width), k_panels, dq + row * padded, padded, true);
            }
        }
        for (int64_t i = 0; i < num_q && !kept_dq; ++i)
            store_row(p.dtype, dq + i * padded, p.dq, ((len.q_start + i) * p.num_heads + head) * dim, dim);
    }
    for (int64_t j = 0; j < num_k; ++j) {
        const int64_t to = ((len.k_start + first_key + j) * p.num_kv_heads + item.head) * dim;
        store_row(p.dtype, dk + j * padded, p.dk, to, dim);
        store_row(p.dtype, dv + j * padded, p.dv, to, dim);
    }
}

// dQ of one (sequence, head) whose keys came in several chunks: added in the order of the chunks.
template <class T>
void add_chunks(const AttentionBackward& p, int64_t seq, int64_t head, const PartialGradients<T>& partial) {
    const Lengths len(p, seq);
    const int64_t dim = p.head_dim, padded = round_up(dim, kLanes<T>), chunks = ceil_div(len.num_k, key_chunk(len));
    T* total = partial.of(seq, head * len.num_q * padded);
    if (!total) return;
    for (int64_t i = 0; i < len.num_q; ++i) {
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
            add_scaled(total + i * padded, total + (chunk * p.num_heads * len.num_q + i) * padded, T(1), dim);
        store_row(p.dtype, total + i * padded, p.dq, ((len.q_start + i) * p.num_heads + head) * dim, dim);
    }
}

template <class T>
void forward(const AttentionForward& p) {
    const Items items([&](const auto& emit) {
        for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
            const Lengths len(p, seq);
            const int64_t chunk = query_chunk(len);
            for (int64_t start = 0; start < len.num_q; start += chunk)
                for (int64_t head = 0; head < p.num_kv_heads; ++head)
                    emit(Item{seq, head, start, min_of(chunk, len.num_q - start) * max_of<int64_t>(len.num_k, 1)});
        }
    });
    parallel_for(items.count, [&](int64_t i) { forward_item<T>(p, items.data[i]); });
}

template <class T>
void backward(const AttentionBackward& p) {
    // dK and dV of the group are summed in one place, without atomics.
    const Items items([&](const auto& emit) {
        for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
            const Lengths len(p, seq);
            const int64_t chunk = key_chunk(len);
            for (int64_t start = 0; start < max_of<int64_t>(len.num_k, 1); start += chunk)
                for (int64_t head = 0; head < p.num_kv_heads; ++head)
                    emit(Item{seq, head, start, max_of<int64_t>(len.num_q, 1) * min_of(chunk, len.num_k - start)});
        }
    });
    const PartialGradients<T> partial(p);
    parallel_for(items.count, [&](int64_t i) { backward_item<T>(p, items.data[i], partial); });
    if (partial.values)
        parallel_for(p.num_seqs * p.num_heads,
                     [&](int64_t i) { add_chunks<T>(p, i / p.num_heads, i % p.num_heads, partial); });
}

}  // namespace

void attention_forward(const AttentionForward& p) {
    p.dtype == DType::kFloat64 ? forward<double>(p) : forward<float>(p);
}
void attention_backward(const AttentionBackward& p) {
    p.dtype == DType::kFloat64 ? backward<double>(p) : backward<float>(p);
}

}  // namespace qemb::cpu::QEMB_ISA
