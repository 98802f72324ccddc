// info_nce: the CUDA kernels, executed by the emulator, against the dense formula and its gradients in double.
#include "ops/infonce.h"
#include "tensor.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

using Indices = std::vector<int64_t>;

struct Case {
    int64_t queries, documents, dim;
    bool hard = true, in_batch = true, query_query = true, doc_doc = true;
    DocMask doc_mask = DocMask::kQueryDocument;
    double margin = 0.1, temperature = 0.05;
    bool owners = true, ids = true;
    int64_t panel_rows = 0, offset = 0;
    double noise = 0.6;
};

struct Batch {
    Wide q, d;
    Indices positive, owner, ids;
};

struct Result {
    Wide loss, dq, dd, stats;
};

template <class T>
void normalize(double* x, int64_t dim) {
    double squares = 0;
    for (int64_t i = 0; i < dim; ++i) squares += x[i] * x[i];
    for (int64_t i = 0; i < dim; ++i) {
        x[i] /= std::sqrt(squares);
        if constexpr (!std::is_same_v<T, double>) x[i] = rounded<T>(x[i]);
    }
}

// Queries near their positives, hard negatives near them too, shared positives, texts that occur twice.
template <class T>
Batch make_batch(const Case& c, uint32_t seed) {
    std::mt19937 random(seed);
    const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
    Batch b{random_values<double>(static_cast<size_t>(c.queries * c.dim), seed + 100),
            random_values<double>(static_cast<size_t>(c.documents * c.dim), seed + 200),
            {},
            Indices(static_cast<size_t>(c.documents), -1),
            {}};
    for (int64_t j = 0; j < c.documents; ++j) normalize<T>(&b.d[j * c.dim], c.dim);
    for (int64_t i = 0; i < c.queries; ++i) b.positive.push_back(below(c.documents));
    for (int64_t j = 0; j < c.documents / 3 && c.queries > 0; ++j) {
        const int64_t query = below(c.queries);
        b.owner[j] = query;
        for (int64_t k = 0; k < c.dim; ++k) b.d[j * c.dim + k] += b.d[b.positive[query] * c.dim + k];
        normalize<T>(&b.d[j * c.dim], c.dim);
    }
    for (int64_t i = 0; i < c.queries; ++i) {
        b.owner[b.positive[i]] = i;
        double* q = &b.q[i * c.dim];
        normalize<double>(q, c.dim);
        for (int64_t k = 0; k < c.dim; ++k) q[k] = b.d[b.positive[i] * c.dim + k] + c.noise * q[k];
        normalize<T>(q, c.dim);
    }
    for (int64_t j = 0; j < c.documents; ++j) b.ids.push_back((j < 20 ? std::min(j + 20, c.documents - 1) : j) + 7'000'000'000);
    return b;
}

// In the arithmetic A; in float with weights (in units of a power of two) and scaled anchors stored as T.
template <class A, class T>
Result dense(const Case& c, const Batch& b) {
    const auto stored = [](A x) { return std::is_same_v<A, double> ? x : static_cast<A>(rounded<T>(x)); };
    const auto dot = [&](const double* x, const double* y) {
        A sum = 0;
        for (int64_t i = 0; i < c.dim; ++i) sum += static_cast<A>(x[i]) * static_cast<A>(y[i]);
        return sum;
    };
    const auto text = [&](int64_t j) { return c.ids ? b.ids[j] : j; };
    Result r{{}, Wide(b.q.size()), Wide(b.d.size()), Wide(5)};
    struct Candidate {
        const double *anchor, *with;
        double *d_anchor, *d_with;
        A score;
        bool kept;
    };
    for (int64_t i = 0; i < c.queries; ++i) {
        const int64_t p = b.positive[i];
        const double *q = &b.q[i * c.dim], *d = &b.d[p * c.dim];
        double *dq = &r.dq[i * c.dim], *dp = &r.dd[p * c.dim];
        const A s = dot(q, d), limit = s + static_cast<A>(c.margin);
        r.stats[0] += s;
        std::vector<Candidate> candidates;
        for (int64_t j = 0; j < c.documents; ++j) {
            if (j == p) continue;
            const bool own = c.owners && b.owner[j] == i, same = text(j) == text(p);
            const double* with = &b.d[j * c.dim];
            const A qd = dot(q, with);
            if (own ? c.hard : c.in_batch) {
                candidates.push_back({q, with, dq, &r.dd[j * c.dim], qd, !same && !(qd > limit)});
                if (candidates.back().kept) r.stats[1] += qd, r.stats[2] += 1;
            }
            if (c.doc_doc && !own) {
                const A dd = dot(d, with);
                const bool over =
                    c.doc_mask == DocMask::kQueryDocument ? qd > limit : c.doc_mask == DocMask::kOwnScore && dd > limit;
                candidates.push_back({d, with, dp, &r.dd[j * c.dim], dd, !same && !over});
            }
        }
        for (int64_t j = 0; j < c.queries && c.query_query; ++j) {
            if (j == i) continue;
            const A qq = dot(q, &b.q[j * c.dim]);
            candidates.push_back(
                {q, &b.q[j * c.dim], dq, &r.dq[j * c.dim], qq, text(b.positive[j]) != text(p) && !(qq > limit)});
        }
        A best = -INFINITY, negatives = 0;
        for (const auto& x : candidates) {
            ++r.stats[x.kept ? 3 : 4];
            if (x.kept) best = std::max(best, x.score);
        }
        if (best == -INFINITY) {
            r.loss.push_back(0);
            continue;
        }
        const A tau = static_cast<A>(c.temperature), log2 = best / tau * static_cast<A>(1.4426950408889634);
        const A unit = std::exp2(log2 - std::ceil(log2));
        for (const auto& x : candidates)
            if (x.kept) negatives += std::exp((x.score - best) / tau);
        const double gap = (static_cast<double>(s) - static_cast<double>(best)) / c.temperature;
        r.loss.push_back(gap > 0 ? std::log1p(negatives * std::exp(-gap)) : std::log(negatives + std::exp(gap)) - gap);
        const double total = negatives + std::exp(gap), mean = 1 / (c.temperature * static_cast<double>(c.queries));
        const A weight = static_cast<A>(mean / total), of_positive = static_cast<A>(-mean * negatives / total);
        for (const auto& x : candidates) {
            if (!x.kept) continue;
            const A e = stored(std::exp((x.score - best) / tau) * unit) / unit;
            for (int64_t k = 0; k < c.dim; ++k) {
                x.d_anchor[k] += e * weight * static_cast<A>(x.with[k]);
                x.d_with[k] += e * stored(weight * static_cast<A>(x.anchor[k]) / static_cast<A>(mean)) * static_cast<A>(mean);
            }
        }
        for (int64_t k = 0; k < c.dim; ++k) dq[k] += of_positive * d[k], dp[k] += of_positive * q[k];
    }
    return r;
}

template <class T>
Result run(const Case& c, const Batch& b, bool gradients = true) {
    Tensor<T> q(b.q, c.offset), d(b.d, c.offset);
    Tensor<float> dq(q.size()), dd(d.size());
    emulator::DeviceMemory<int64_t> positive(b.positive), owner(b.owner), ids(b.ids);
    emulator::DeviceMemory<double> loss(static_cast<size_t>(c.queries)), stats(5);
    InfoNce p{.queries = q.data(),
              .documents = d.data(),
              .positive = positive.data(),
              .owner = c.owners ? owner.data() : nullptr,
              .document_ids = c.ids ? ids.data() : nullptr,
              .loss = loss.data(),
              .d_queries = gradients && c.queries > 0 ? dq.data() : nullptr,  // as torch has it
              .d_documents = gradients ? dd.data() : nullptr,
              .stats = stats.data(),
              .num_queries = c.queries,
              .num_documents = c.documents,
              .dim = c.dim,
              .hard = c.hard,
              .in_batch = c.in_batch,
              .query_query = c.query_query,
              .doc_doc = c.doc_doc,
              .margin = c.margin,
              .doc_mask = c.doc_mask,
              .temperature = c.temperature,
              .dtype = dtype_of<T>,
              .panel_rows = c.panel_rows};
    emulator::DeviceMemory<char> scratch(static_cast<size_t>(cuda::info_nce_scratch(p)));
    p.scratch = scratch.data();
    cuda::info_nce(p);
    return {{loss.data(), loss.data() + c.queries}, dq.wide(), dd.wide(), {stats.data(), stats.data() + 5}};
}

// Relative to the largest element: a document that is nobody's candidate is as exact as the others.
void check_gradient(const std::string& name, const Wide& actual, const Wide& low, const Wide& truth, double rounding) {
    double error = 0, largest = 0;
    for (size_t i = 0; i < truth.size(); ++i) {
        error = std::max(error, std::abs(low[i] - truth[i]));
        largest = std::max(largest, std::abs(truth[i]));
    }
    check_close(name.c_str(), actual, truth, 2 * error + rounding * largest);
}

template <class T>
Batch check(const std::string& name, const Case& c, uint32_t seed = 1) {
    const Batch b = make_batch<T>(c, seed);
    emulator::options().seed = seed;
    const Result truth = dense<double, double>(c, b), low = dense<float, T>(c, b), ours = run<T>(c, b);
    const std::string label = name + " " + std::to_string(c.queries) + " x " + std::to_string(c.documents) + " x " +
                              std::to_string(c.dim) + " seed " + std::to_string(seed);
    check_gradient(label + " loss", ours.loss, low.loss, truth.loss, 5e-7 / c.temperature);
    check_gradient(label + " dq", ours.dq, low.dq, truth.dq, 5e-7);
    check_gradient(label + " dd", ours.dd, low.dd, truth.dd, 5e-7);
    check_close((label + " sums").c_str(), Wide{ours.stats[0], ours.stats[1]}, Wide{truth.stats[0], truth.stats[1]},
                1e-6 * (1 + truth.stats[2] + static_cast<double>(c.queries)));
    for (int i = 2; i < 5; ++i) CHECK(ours.stats[i] == truth.stats[i]);
    CHECK(c.margin > 0 || (truth.stats[3] > 0 && truth.stats[4] > truth.stats[3] / 50));  // the masks have work
    return b;
}

bool same(const Result& a, const Result& b) { return a.loss == b.loss && a.dq == b.dq && a.dd == b.dd && a.stats == b.stats; }

}  // namespace

TEST(every_preset_and_document_mask) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        for (const DocMask mask : {DocMask::kQueryDocument, DocMask::kOwnScore, DocMask::kNone})
            check<T>(dtype + " qwen3", {.queries = 70, .documents = 150, .dim = 24, .doc_mask = mask, .margin = -0.6}, 2);
        check<T>(dtype + " stage 2", {.queries = 70, .documents = 150, .dim = 24, .query_query = false, .doc_doc = false});
        check<T>(dtype + " mnrl",
                 {.queries = 70, .documents = 150, .dim = 24, .query_query = false, .doc_doc = false, .margin = INFINITY});
        check<T>(dtype + " classification", {.queries = 70,
                                             .documents = 150,
                                             .dim = 24,
                                             .in_batch = false,
                                             .query_query = false,
                                             .doc_doc = false,
                                             .margin = INFINITY});
        check<T>(dtype + " no hard", {.queries = 70, .documents = 150, .dim = 24, .hard = false, .in_batch = false});
        check<T>(dtype + " no ids", {.queries = 70, .documents = 150, .dim = 24, .owners = false, .ids = false});
    });
}

TEST(ragged_sizes) {
    const Case cases[] = {{1, 1, 1},     {1, 2, 5},      {2, 1, 8},     {3, 130, 63},  {129, 3, 64},   {127, 127, 8},
                          {128, 128, 8}, {129, 129, 65}, {20, 40, 127}, {20, 40, 128}, {20, 257, 129}, {40, 260, 72}};
    uint32_t seed = 10;
    for (const Case& c : cases) {
        check<BFloat16>("bfloat16", c, ++seed);
        if (c.dim < 65 || c.queries < 128) check<float>("float32", c, ++seed);
    }
    check<Float16>("float16", {129, 257, 129}, 5);
}

TEST(rows_that_are_not_aligned) {
    check<BFloat16>("bfloat16", {.queries = 20, .documents = 30, .dim = 16, .offset = 1});
    check<float>("float32", {.queries = 20, .documents = 30, .dim = 16, .offset = 3});
}

TEST(panels_follow_each_other) {
    const Case c{.queries = 300, .documents = 140, .dim = 16, .panel_rows = 128};
    const Batch b = check<BFloat16>("bfloat16", c, 3);
    Case whole = c;
    whole.panel_rows = 0;
    CHECK(run<BFloat16>(c, b).loss == run<BFloat16>(whole, b).loss);
    check<float>("float32", {.queries = 140, .documents = 30, .dim = 8, .panel_rows = 1}, 4);
}

TEST(every_schedule_gives_the_same_bits) {
    const Case c{.queries = 140, .documents = 140, .dim = 24};
    const Batch b = make_batch<BFloat16>(c, 7);
    const Result first = run<BFloat16>(c, b);
    for (uint64_t seed = 1; seed < 4; ++seed) {
        emulator::options().seed = seed * 1000;
        CHECK(same(first, run<BFloat16>(c, b)));
    }
    const Result loss_only = run<BFloat16>(c, b, false);
    CHECK(loss_only.loss == first.loss && loss_only.stats == first.stats);
}

TEST(cold_and_sure) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        check<T>(dtype + " cold", {.queries = 60, .documents = 100, .dim = 64, .temperature = 0.005, .noise = 30});
        check<T>(dtype + " warm", {.queries = 60, .documents = 100, .dim = 64, .temperature = 3});
        // Rows whose candidates lie far below their positive: still exact, row by row. (As columns they meet rows of a larger
        // weight, so not with the query-query group.)
        const Case c{.queries = 60,
                     .documents = 100,
                     .dim = 64,
                     .query_query = false,
                     .doc_doc = false,
                     .temperature = 0.01,
                     .owners = false,
                     .ids = false,
                     .noise = 0.3};
        const Batch b = check<T>(dtype + " sure", c);
        const Result truth = dense<double, double>(c, b), ours = run<T>(c, b);
        const double allowed = sizeof(T) == 4 ? 3e-5 : std::is_same_v<T, Float16> ? 1e-3 : 6e-3;
        for (int64_t i = 0; i < c.queries; ++i) {
            double error = 0, size = 0;
            for (int64_t k = i * c.dim; k < (i + 1) * c.dim; ++k)
                error += std::pow(ours.dq[k] - truth.dq[k], 2), size += std::pow(truth.dq[k], 2);
            CHECK(std::sqrt(error) <= allowed * std::sqrt(size));
            CHECK(std::abs(ours.loss[i] - truth.loss[i]) <= 1e-4 * truth.loss[i]);
        }
    });
}

TEST(rows_without_candidates) {
    const Case c{.queries = 40, .documents = 60, .dim = 16, .margin = -10};
    Case none = c;
    none.doc_mask = DocMask::kOwnScore;
    const Result ours = run<BFloat16>(none, make_batch<BFloat16>(none, 1));
    CHECK(ours.loss == Wide(40) && ours.dq == Wide(40 * 16) && ours.dd == Wide(60 * 16));
    check<float>("no queries", {.queries = 0, .documents = 5, .dim = 8});
}

TEST(no_bank_is_met_twice) {
    emulator::Block::counters() = {};
    check<BFloat16>("bfloat16", {.queries = 60, .documents = 60, .dim = 72});
    check<float>("float32", {.queries = 20, .documents = 20, .dim = 40});
    CHECK(emulator::Block::counters().ldmatrix > 0 && emulator::Block::counters().bank_conflicts == 0);
}

TEST(a_row_with_nan_leaves_the_others_alone) {
    Case c{.queries = 6, .documents = 200, .dim = 16, .query_query = false, .doc_doc = false};
    Batch b = make_batch<BFloat16>(c, 1);
    const Result clean = run<BFloat16>(c, b);
    b.q[2 * 16 + 3] = NAN;
    const Result ours = run<BFloat16>(c, b);
    for (int64_t i = 0; i < 6; ++i) {
        CHECK((i == 2) == std::isnan(ours.loss[i]));
        for (int64_t k = i * 16; k < i * 16 + 16; ++k) CHECK(i == 2 ? std::isnan(ours.dq[k]) : ours.dq[k] == clean.dq[k]);
    }
}

int main() {
    emulator::report_faults();
    return run_all();
}
