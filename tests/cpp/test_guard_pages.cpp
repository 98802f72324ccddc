// Every op with guard pages on both sides of its operands, for every instruction set of this machine: it touches
// nothing else, and where operands lie changes no bit of the result. That results are right is checked elsewhere.
#include <type_traits>

#include "attention_truth.h"
#include "cpu/simd/vec.h"
#include "guarded.h"
#include "info_nce_cases.h"
#include "ops/last_token_pool.h"
#include "ops/qk_norm_rope.h"
#include "ops/rms_norm.h"
#include "ops/shingles.h"
#include "ops/swiglu.h"
#include "ops/top_k.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

// Storage S and arithmetic A of one dtype.
template <DType kType>
struct Types {
    static constexpr DType kDType = kType;
    using A = std::conditional_t<kType == DType::kFloat64, double, float>;
    using S = std::conditional_t<kType == DType::kFloat64 || kType == DType::kFloat32, A, uint16_t>;

    static S narrow(double x) {
        if constexpr (kType == DType::kBFloat16)
            return cpu::generic::to_bf16(static_cast<float>(x));
        else if constexpr (kType == DType::kFloat16)
            return cpu::generic::to_f16(static_cast<float>(x));
        else
            return static_cast<S>(x);
    }
    static std::vector<S> narrow(const std::vector<double>& values) {
        std::vector<S> all;
        for (const double x : values) all.push_back(narrow(x));
        return all;
    }
    static std::vector<S> random(int64_t count, uint32_t seed) {
        return narrow(random_values<double>(static_cast<size_t>(count), seed));
    }
};

// Runs call(operands) with guards left and right.
template <class Call>
void between_guards(const std::string& name, Call call) {
    report_faults();
    each_isa([&](const std::string& isa) {
        std::vector<unsigned char> results[2];
        for (const Side side : {Side::kLeft, Side::kRight}) {
            std::snprintf(g_running, sizeof g_running, "%s, %s, guard page %s", name.c_str(), isa.c_str(),
                          side == Side::kLeft ? "before" : "behind");
            GuardedOperands operands(side);
            call(operands);
            results[side == Side::kRight] = operands.results();
        }
        CHECK(results[0] == results[1]);
    });
}

// The same with each dtype: call(operands, types).
template <class Call>
void each_dtype(const std::string& name, Call call) {
    const auto run = [&](auto types) {
        between_guards(name + ", " + name_of(types.kDType), [&](GuardedOperands& o) { call(o, types); });
    };
    run(Types<DType::kFloat32>{});
    run(Types<DType::kFloat64>{});
    run(Types<DType::kBFloat16>{});
    run(Types<DType::kFloat16>{});
}

}  // namespace

TEST(attention_stays_within_its_operands) {
    const std::vector<AttentionCase> cases = {
        {{0, 0, 1, 50}, {0, 0, 1, 50}, 4, 2, 24, true},
        {{0, 5, 5}, {0, 0, 131}, 2, 1, 8, false},
        {{0, 67}, {0, 67}, 2, 2, 37, true},
    };
    for (const AttentionCase& c : cases)
        each_dtype("attention", [&]<class Types>(GuardedOperands& o, Types) {
            using S = typename Types::S;
            using A = typename Types::A;
            const int64_t queries = c.cu_q.back() * c.heads, gap = 3, key = c.kv_heads * c.dim;
            // Rows of v lie apart, and its memory ends with the last of them.
            const int64_t v_count = (c.cu_k.back() - 1) * (key + gap) + key;
            Attention p{.q = o.in(Types::random(queries * c.dim, 1)),
                        .k = o.in(Types::random(c.cu_k.back() * key, 2)),
                        .v = o.in(Types::random(v_count, 3)),
                        .cu_seqlens_q = o.in(c.cu_q),
                        .cu_seqlens_k = o.in(c.cu_k)};
            set_shape(p, c, Types::kDType);
            p.v_token_stride = key + gap;
            AttentionForward forward{p, o.out<S>(queries * c.dim), o.out<A>(queries)};
            cpu::attention_forward(forward);
            cpu::attention_backward({p, forward.out, o.in(Types::random(queries * c.dim, 4)), forward.lse,
                                     o.out<S>(queries * c.dim), o.out<S>(c.cu_k.back() * key),
                                     o.out<S>(c.cu_k.back() * key)});
        });
}

TEST(last_token_pool_stays_within_its_operands) {
    for (const bool has_weight : {false, true})
        each_dtype("last_token_pool", [&]<class Types>(GuardedOperands& o, Types) {
            using S = typename Types::S;
            const std::vector<int32_t> cu = {0, 0, 3, 4, 4};
            const int64_t embed = 37, dim = 21, stride = 40, seqs = 4;
            const LastTokenPool p{.hidden = o.in(Types::random(3 * stride + embed, 1)),
                                  .norm_weight = has_weight ? o.in(Types::random(embed, 2)) : nullptr,
                                  .cu_seqlens = o.in(cu),
                                  .num_tokens = cu.back(),
                                  .num_seqs = seqs,
                                  .embed = embed,
                                  .dim = dim,
                                  .hidden_stride = stride,
                                  .eps = 1e-6,
                                  .normalize = true,
                                  .dtype = Types::kDType};
            cpu::last_token_pool_forward({p, o.out<S>(seqs * dim)});
            cpu::last_token_pool_backward({p, o.in(Types::random(seqs * dim, 3)),
                                           o.inout(std::vector<S>(static_cast<size_t>(4 * embed))),
                                           has_weight ? o.out<typename Types::A>(embed) : nullptr});
        });
}

TEST(top_k_stays_within_its_operands) {
    for (const int64_t queries : {3, 33})
        for (const int64_t dim : {19, 64})
            each_dtype("top_k", [&]<class Types>(GuardedOperands& o, Types) {
                const int64_t documents = 203, k = 7;
                std::vector<int64_t> exclude(static_cast<size_t>(queries * 2));
                for (size_t i = 0; i < exclude.size(); ++i) exclude[i] = static_cast<int64_t>(i * 37 % 204) - 1;
                cpu::top_k({.queries = o.in(Types::random(queries * dim, 1)),
                            .documents = o.in(Types::random(documents * dim, 2)),
                            .exclude = o.in(exclude),
                            .ceiling = o.in(std::vector<float>(static_cast<size_t>(queries), 9.f)),
                            .scores = o.out<float>(queries * k),
                            .indices = o.out<int64_t>(queries * k),
                            .num_queries = queries,
                            .num_documents = documents,
                            .num_exclude = 2,
                            .dim = dim,
                            .k = k,
                            .dtype = Types::kDType});
            });
}

TEST(info_nce_stays_within_its_operands) {
    for (const bool prefixes : {false, true}) {
        InfoNceCase c = make_case(13, 41, 19, 5);
        if (prefixes) c.dims = {7, 19}, c.dim_weights = {1, 0.5};
        each_dtype("info_nce", [&]<class Types>(GuardedOperands& o, Types) {
            using A = typename Types::A;
            Indices starts{0}, own;
            for (int64_t i = 0; i < c.num_queries; ++i) {
                for (int64_t j = 0; j < c.num_documents; ++j)
                    if (c.owner[j] == i) own.push_back(j);
                starts.push_back(static_cast<int64_t>(own.size()));
            }
            cpu::info_nce({.queries = o.in(Types::narrow(c.q)),
                           .documents = o.in(Types::narrow(c.d)),
                           .positive = o.in(c.positive),
                           .query_text = o.in(c.query_text),
                           .document_text = o.in(c.document_text),
                           .role = o.in(c.role),
                           .owner = o.in(c.owner),
                           .own_starts = o.in(starts),
                           .own_documents = o.in(own),
                           .num_queries = c.num_queries,
                           .num_documents = c.num_documents,
                           .dim = c.dim,
                           .first_row = c.first_row,
                           .num_rows = c.num_rows,
                           .first_column = c.first_column,
                           .options = c.options(),
                           .dims = o.in(c.dims),
                           .dim_weights = o.in(c.dim_weights),
                           .num_dims = static_cast<int64_t>(c.dims.size()),
                           .loss = o.out<double>(c.num_rows),
                           .d_queries = o.out<A>(c.num_queries * c.dim),
                           .d_documents = o.out<A>(c.num_documents * c.dim),
                           .d_temperature = o.out<double>(1),
                           .stats = o.out<double>(5),
                           .log_negatives = prefixes ? nullptr : o.out<double>(c.num_rows * kMaxSoftmaxes),
                           .log_negatives_given = false,
                           .adds_positive = true,
                           .dtype = Types::kDType});
        });
    }
}

TEST(rms_norm_stays_within_its_operands) {
    for (const int64_t size : {5, 37, 128})
        each_dtype("rms_norm", [&]<class Types>(GuardedOperands& o, Types) {
            using S = typename Types::S;
            using A = typename Types::A;
            const int64_t rows = 7;
            const S* weight = o.in(Types::random(size, 3));
            RmsNormForward p{.x = o.in(Types::random(rows * size, 1)),
                             .residual = o.in(Types::random(rows * size, 2)),
                             .weight = weight,
                             .sum = o.out<S>(rows * size),
                             .y = o.out<S>(rows * size),
                             .rstd = o.out<A>(rows),
                             .rows = rows,
                             .size = size,
                             .eps = 1e-6,
                             .dtype = Types::kDType};
            cpu::rms_norm_forward(p);
            cpu::rms_norm_backward({.s = p.sum,
                                    .weight = weight,
                                    .rstd = p.rstd,
                                    .dy = o.in(Types::random(rows * size, 4)),
                                    .dsum = o.in(Types::random(rows * size, 5)),
                                    .dx = o.out<S>(rows * size),
                                    .dweight = o.out<A>(size),
                                    .rows = rows,
                                    .size = size,
                                    .dtype = Types::kDType});
        });
}

TEST(qk_norm_rope_stays_within_its_operands) {
    for (const int64_t head_dim : {10, 64})
        each_dtype("qk_norm_rope", [&]<class Types>(GuardedOperands& o, Types) {
            using S = typename Types::S;
            using A = typename Types::A;
            const int64_t tokens = 5, heads = 3, count = tokens * heads * head_dim;
            const S *x = o.in(Types::random(count, 1)), *weight = o.in(Types::random(head_dim, 2));
            const A* cos = o.in(random_values<A>(static_cast<size_t>(tokens * head_dim / 2), 3));
            const A* sin = o.in(random_values<A>(static_cast<size_t>(tokens * head_dim / 2), 4));
            A* rstd = o.out<A>(tokens * heads);
            cpu::qk_norm_rope_forward({.x = x,
                                       .weight = weight,
                                       .cos = cos,
                                       .sin = sin,
                                       .y = o.out<S>(count),
                                       .rstd = rstd,
                                       .tokens = tokens,
                                       .heads = heads,
                                       .head_dim = head_dim,
                                       .eps = 1e-6,
                                       .dtype = Types::kDType});
            cpu::qk_norm_rope_backward({.x = x,
                                        .weight = weight,
                                        .cos = cos,
                                        .sin = sin,
                                        .rstd = rstd,
                                        .dy = o.in(Types::random(count, 5)),
                                        .dx = o.out<S>(count),
                                        .dweight = o.out<A>(head_dim),
                                        .tokens = tokens,
                                        .heads = heads,
                                        .head_dim = head_dim,
                                        .dtype = Types::kDType});
        });
}

TEST(swiglu_stays_within_its_operands) {
    for (const int64_t count : {1, 515, 1024})
        each_dtype("swiglu", [&]<class Types>(GuardedOperands& o, Types) {
            using S = typename Types::S;
            const S *gate = o.in(Types::random(count, 1)), *up = o.in(Types::random(count, 2));
            cpu::swiglu_forward({gate, up, o.out<S>(count), count, Types::kDType});
            cpu::swiglu_backward(
                {gate, up, o.in(Types::random(count, 3)), o.out<S>(count), o.out<S>(count), count, Types::kDType});
        });
}

TEST(shingles_stay_within_their_operands) {
    // The last text ends in the middle of a character; the first has no words.
    const std::string text = " .One two, three \xe4\xb8\xad\xe6\x96\x87 \xf0\x9f\x98";
    const std::vector<int64_t> offsets = {0, 2, 9, 9, static_cast<int64_t>(text.size())};
    between_guards("shingles", [&](GuardedOperands& o) {
        const char* bytes = o.in(std::vector<char>(text.begin(), text.end()));
        const int64_t* at = o.in(offsets);
        cpu::shingles({bytes, at, o.inout(std::vector<uint64_t>(text.size())), o.out<int64_t>(4), 4, 2});
        cpu::min_hash({bytes, at, o.out<uint32_t>(4 * 19), 4, 19, 2});
    });
}

int main() { return run_all(); }
