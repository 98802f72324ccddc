// info_nce: the CUDA kernels, executed by the emulator, against the dense formula and its gradients in double.
#include "ops/info_nce.h"

#include <array>

#include "cuda/architecture.h"
#include "prefixes.h"
#include "tensor.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

using Indices = std::vector<int64_t>;
using Groups = std::array<Group, kNumGroups>;

// The report's formula: all groups but the positive's own documents.
Groups qwen3(double margin = 0.1, ScoreMask of_documents = ScoreMask::kQueryDocument) {
    Groups groups;
    for (int i = 0; i < kNumGroups; ++i)
        groups[i] = {i != kDocOwn, i < kDocOwn ? ScoreMask::kOwn : of_documents, false, margin, 0};
    return groups;
}

Groups only(std::initializer_list<int> on, double margin = 0.1, ScoreMask mask = ScoreMask::kOwn) {
    Groups groups = {};
    for (const int i : on) groups[i] = {true, mask, false, margin, 0};
    return groups;
}

struct Case {
    int64_t queries, documents, dim;
    Groups groups = qwen3();
    double temperature = 0.05, focal = 0;
    bool split = false;
    int64_t first_row = 0, num_rows = -1, first_column = 0;  // -1: all from first_row on
    bool owners = true, ids = true, absent = false;
    int64_t panel_rows = 0, offset = 0;
    double noise = 0.6;
    Indices dims = {};  // prefixes
    Wide shares = {};

    int64_t rows() const { return num_rows < 0 ? queries - first_row : num_rows; }
    double scale() const { return 0.7 / static_cast<double>(queries); }
    InfoNceOptions options() const {
        InfoNceOptions o{.groups = {}, .split = split, .temperature = temperature, .focal = focal, .scale = scale()};
        std::copy(groups.begin(), groups.end(), o.groups);
        return o;
    }
};

struct Batch {
    Wide q, d;
    Indices positive, owner, query_text, document_text, own_starts, own_documents;
    std::vector<uint8_t> role;
};

struct Result {
    Wide loss, dq, dd, d_temperature, stats, log_negatives;
    double temperature_bound = 0;  // sum of the absolute values that d_temperature is made of
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

void list_owned(Batch& b, int64_t queries) {
    b.own_documents.clear();
    b.own_starts = {0};
    for (int64_t i = 0; i < queries; ++i) {
        for (size_t j = 0; j < b.owner.size(); ++j)
            if (b.owner[j] == i) b.own_documents.push_back(static_cast<int64_t>(j));
        b.own_starts.push_back(static_cast<int64_t>(b.own_documents.size()));
    }
    b.own_documents.resize(b.owner.size(), -1);
}

// Queries near their positives, hard negatives near them too, shared positives, texts that occur twice.
template <class T>
Batch make_batch(const Case& c, uint32_t seed) {
    std::mt19937 random(seed);
    const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
    Batch b;
    b.q = random_values<double>(static_cast<size_t>(c.queries * c.dim), seed + 100);
    b.d = random_values<double>(static_cast<size_t>(c.documents * c.dim), seed + 200);
    b.owner.resize(static_cast<size_t>(c.documents), -1);
    for (int64_t j = 0; j < c.documents; ++j) {
        normalize<T>(&b.d[j * c.dim], c.dim);
        b.role.push_back(static_cast<uint8_t>(c.absent && below(6) == 0 ? Role::kAbsent : Role::kHard));
        b.document_text.push_back((c.ids && j < 20 ? std::min(j + 20, c.documents - 1) : j) + 7'000'000'000);
    }
    for (int64_t i = 0; i < c.queries; ++i) b.positive.push_back(below(c.documents));
    for (int64_t j = 0; j < c.documents / 3 && c.queries > 0; ++j) {
        const int64_t query = below(c.queries);
        b.owner[j] = query;
        for (int64_t k = 0; k < c.dim; ++k) b.d[j * c.dim + k] += b.d[b.positive[query] * c.dim + k];
        normalize<T>(&b.d[j * c.dim], c.dim);
    }
    for (int64_t i = 0; i < c.queries; ++i) {
        const int64_t p = b.positive[i];
        b.owner[p] = i;
        if (b.role[p] == static_cast<uint8_t>(Role::kHard)) b.role[p] = static_cast<uint8_t>(Role::kPositive);
        b.query_text.push_back(b.document_text[p]);
        double* q = &b.q[i * c.dim];
        normalize<double>(q, c.dim);
        for (int64_t k = 0; k < c.dim; ++k) q[k] = b.d[p * c.dim + k] + c.noise * q[k];
        normalize<T>(q, c.dim);
    }
    if (!c.owners) std::fill(b.owner.begin(), b.owner.end(), -1);
    list_owned(b, c.queries);
    return b;
}

int softmax_of(const Case& c, int group) { return c.split ? kGroupTable[group].softmax : 0; }

// In the arithmetic A; in float with weights (in units of a power of two) and scaled anchors stored as T, but for what
// a row owns.
template <class A, class T>
Result dense(const Case& c, const Batch& b) {
    const auto stored = [](A x) { return std::is_same_v<A, double> ? x : static_cast<A>(rounded<T>(x)); };
    const auto dot = [&](const double* x, const double* y) {
        A sum = 0;
        for (int64_t i = 0; i < c.dim; ++i) sum += static_cast<A>(x[i]) * static_cast<A>(y[i]);
        return sum;
    };
    Result r{{}, Wide(b.q.size()), Wide(b.d.size()), Wide(1), Wide(5), {}};
    struct Candidate {
        const double *anchor, *with;
        double *d_anchor, *d_with;
        A score, logit;
        int group;
    };
    for (int64_t i = c.first_row; i < c.first_row + c.rows(); ++i) {
        const int64_t p = b.positive[i];
        const double *q = &b.q[i * c.dim], *d = &b.d[p * c.dim];
        double *dq = &r.dq[i * c.dim], *dp = &r.dd[p * c.dim];
        const A s = dot(q, d);
        r.stats[0] += s;
        std::vector<Candidate> candidates;
        const auto offer = [&](int group, bool same, A score, A of_query, Candidate x) {
            const Group& g = c.groups[group];
            if (!g.on) return;
            const A limit = s + static_cast<A>(g.margin) * (g.relative ? std::abs(s) : A(1));
            const A held = is_by_query(g) ? of_query : score;
            const bool dropped = same || (g.mask != ScoreMask::kNone && held > limit);
            ++r.stats[dropped ? 4 : 3];
            if (dropped) return;
            if (group < kQueryQuery) r.stats[1] += score, r.stats[2] += 1;
            x.score = score, x.group = group;
            x.logit = score * static_cast<A>(1 / c.temperature + g.hardness);
            candidates.push_back(x);
        };
        for (int64_t j = 0; j < c.documents; ++j) {
            const Role role = static_cast<Role>(b.role[j]);
            if (!is_candidate(j, p, role)) continue;
            const bool own = b.owner[j] == i, same = b.document_text[j] == b.query_text[i];
            const double* with = &b.d[j * c.dim];
            const A qd = dot(q, with), dd = dot(d, with);
            offer(own ? group_of_owned(0) : group_of(kQueryDocument, role), same, qd, qd,
                  {q, with, dq, &r.dd[j * c.dim], 0, 0, 0});
            offer(own ? group_of_owned(1) : group_of(kDocDoc, role), same, dd, qd,
                  {d, with, dp, &r.dd[j * c.dim], 0, 0, 0});
        }
        for (int64_t j = c.first_column; j < c.queries; ++j) {
            const double* with = &b.q[j * c.dim];
            const A qq = dot(q, with);
            if (j != i)
                offer(kQueryQuery, b.query_text[j] == b.query_text[i], qq, qq,
                      {q, with, dq, &r.dq[j * c.dim], 0, 0, 0});
        }
        double loss = 0;
        for (int softmax = 0; softmax < (c.split ? kMaxSoftmaxes : 1); ++softmax) {
            A best = -INFINITY, negatives = 0;
            for (const auto& x : candidates)
                if (softmax_of(c, x.group) == softmax) best = std::max(best, x.logit);
            r.log_negatives.push_back(-INFINITY);
            if (best == -INFINITY) continue;
            const auto weight_of = [&](const Candidate& x) { return std::exp(x.logit - best); };
            for (const auto& x : candidates)
                if (softmax_of(c, x.group) == softmax) negatives += weight_of(x);
            r.log_negatives.back() = std::log(negatives) + static_cast<double>(best);
            const double gap = static_cast<double>(s) / c.temperature - static_cast<double>(best);
            const double total = negatives + std::exp(gap), left = negatives / total;
            const double value = gap > 0 ? std::log1p(negatives * std::exp(-gap)) : std::log(total) - gap;
            const double factor = std::pow(left, c.focal);
            const double slope = c.scale() * factor * (1 + c.focal * (1 - left) * value / left);
            loss += factor * value;
            const A log2 = best * static_cast<A>(1.4426950408889634), unit = std::exp2(log2 - std::ceil(log2));
            const A weight = static_cast<A>(slope / (c.temperature * total));
            const A d_positive_score = static_cast<A>(-slope * left / c.temperature),
                    anchors = static_cast<A>(c.scale() / c.temperature);
            for (const auto& x : candidates) {
                if (softmax_of(c, x.group) != softmax) continue;
                const bool own = x.group == kOwnHard || x.group == kDocOwn;
                const A e = own ? weight_of(x) : stored(weight_of(x) * unit) / unit;
                r.d_temperature[0] -= weight_of(x) * weight * x.score / static_cast<A>(c.temperature);
                r.temperature_bound += std::abs(weight_of(x) * weight * x.score) / c.temperature;
                for (int64_t k = 0; k < c.dim; ++k) {
                    const A of_anchor = weight * static_cast<A>(x.anchor[k]);
                    x.d_anchor[k] += e * weight * static_cast<A>(x.with[k]);
                    x.d_with[k] += e * (own ? of_anchor : stored(of_anchor / anchors) * anchors);
                }
            }
            r.d_temperature[0] -= d_positive_score * s / static_cast<A>(c.temperature);
            r.temperature_bound += std::abs(d_positive_score * s) / c.temperature;
            for (int64_t k = 0; k < c.dim; ++k) dq[k] += d_positive_score * d[k], dp[k] += d_positive_score * q[k];
        }
        r.loss.push_back(loss);
    }
    return r;
}

// The sum over the prefixes, normalised again and, but for the truth, stored as T.
template <class A, class T>
Result formula(const Case& c, const Batch& b) {
    if (c.dims.empty()) return dense<A, T>(c, b);
    Result all{Wide(static_cast<size_t>(c.rows())), Wide(b.q.size()), Wide(b.d.size()), Wide(1), Wide(5), {}};
    for (size_t k = 0; k < c.dims.size(); ++k) {
        Case part_case = c;
        part_case.dim = c.dims[k];
        const auto stored = [](double x) { return std::is_same_v<A, double> ? x : rounded<T>(x); };
        const Prefix q(b.q, c.dims[k], c.dim, true, stored), d(b.d, c.dims[k], c.dim, true, stored);
        Batch part_batch = b;
        part_batch.q = q.unit, part_batch.d = d.unit;
        const Result part = dense<A, T>(part_case, part_batch);
        q.add_gradient(part.dq, c.shares[k], all.dq);
        d.add_gradient(part.dd, c.shares[k], all.dd);
        for (size_t i = 0; i < all.loss.size(); ++i) all.loss[i] += c.shares[k] * part.loss[i];
        all.d_temperature[0] += c.shares[k] * part.d_temperature[0];
        all.temperature_bound += c.shares[k] * part.temperature_bound;
        all.stats = part.stats;
    }
    return all;
}

template <class T>
Result run(const Case& c, const Batch& b, bool gradients = true, const Wide& given = {}, bool adds_positive = true) {
    Tensor<T> q(b.q, c.offset), d(b.d, c.offset);
    Tensor<float> dq(q.size()), dd(d.size());
    emulator::DeviceMemory<int64_t> positive(b.positive), query_text(b.query_text), document_text(b.document_text);
    emulator::DeviceMemory<int64_t> owner(b.owner), own_starts(b.own_starts), own_documents(b.own_documents);
    emulator::DeviceMemory<uint8_t> role(b.role);
    const size_t rows = static_cast<size_t>(c.rows()), softmaxes = c.split ? kMaxSoftmaxes : 1;
    emulator::DeviceMemory<double> loss(rows), stats(5), d_temperature(1), log_negatives(rows * kMaxSoftmaxes);
    for (size_t i = 0; i < given.size(); ++i)
        log_negatives.data()[i / softmaxes * kMaxSoftmaxes + i % softmaxes] = given[i];
    const auto given_or_null = [](const auto& values, auto* data) { return values.empty() ? nullptr : data; };
    InfoNce p{.queries = q.data(),
              .documents = d.data(),
              .positive = positive.data(),
              .query_text = given_or_null(b.query_text, query_text.data()),
              .document_text = given_or_null(b.document_text, document_text.data()),
              .role = given_or_null(b.role, role.data()),
              .owner = given_or_null(b.owner, owner.data()),
              .own_starts = given_or_null(b.own_starts, own_starts.data()),
              .own_documents = given_or_null(b.own_documents, own_documents.data()),
              .num_queries = c.queries,
              .num_documents = c.documents,
              .dim = c.dim,
              .first_row = c.first_row,
              .num_rows = c.rows(),
              .first_column = c.first_column,
              .options = c.options(),
              .dims = c.dims.data(),
              .dim_weights = c.shares.data(),
              .num_dims = static_cast<int64_t>(c.dims.size()),
              .loss = loss.data(),
              .d_queries = gradients && c.queries > 0 ? dq.data() : nullptr,  // as torch has it
              .d_documents = gradients ? dd.data() : nullptr,
              .d_temperature = d_temperature.data(),
              .stats = stats.data(),
              .log_negatives = c.dims.empty() ? log_negatives.data() : nullptr,
              .log_negatives_given = !given.empty(),
              .adds_positive = adds_positive,
              .dtype = dtype_of<T>,
              .panel_rows = c.panel_rows};
    emulator::DeviceMemory<char> scratch(static_cast<size_t>(cuda::info_nce_scratch(p)));
    p.scratch = scratch.data();
    cuda::info_nce(p);
    Result r{{loss.data(), loss.data() + rows}, dq.wide(), dd.wide(), {d_temperature.data()[0]}, {}, {}};
    r.stats.assign(stats.data(), stats.data() + 5);
    for (size_t i = 0; i < rows * softmaxes && c.dims.empty(); ++i)
        r.log_negatives.push_back(log_negatives.data()[i / softmaxes * kMaxSoftmaxes + i % softmaxes]);
    return r;
}

// Relative to the largest element: a document that is nobody's candidate is as exact as the others.
void check_gradient(const std::string& name, const Wide& actual, const Wide& low, const Wide& truth, double rounding) {
    double error = 0, largest = 0;
    for (size_t i = 0; i < truth.size(); ++i) {
        if (std::isinf(truth[i])) continue;
        error = std::max(error, std::abs(low[i] - truth[i]));
        largest = std::max(largest, std::abs(truth[i]));
    }
    check_close(name.c_str(), actual, truth, 2 * error + rounding * largest);
}

// Infinities must be the same; they are then left out.
void check_log(const std::string& name, Wide actual, Wide low, Wide truth, double allowed) {
    for (size_t i = 0; i < truth.size(); ++i) {
        if (!std::isinf(truth[i])) continue;
        CHECK(actual[i] == truth[i]);
        actual[i] = low[i] = truth[i] = 0;
    }
    check_gradient(name, actual, low, truth, allowed);
}

void compare(const std::string& label, const Case& c, const Result& ours, const Result& low, const Result& truth) {
    check_gradient(label + " loss", ours.loss, low.loss, truth.loss, 5e-7 / c.temperature);
    check_gradient(label + " dq", ours.dq, low.dq, truth.dq, 5e-7);
    check_gradient(label + " dd", ours.dd, low.dd, truth.dd, 5e-7);
    check_close(
        (label + " dtau").c_str(), ours.d_temperature, truth.d_temperature,
        2 * std::abs(low.d_temperature[0] - truth.d_temperature[0]) + 5e-7 / c.temperature * truth.temperature_bound);
}

template <class T>
void check_batch(const std::string& name, const Case& c, const Batch& b, uint32_t seed) {
    emulator::options().seed = seed;
    const Result truth = formula<double, double>(c, b), low = formula<float, T>(c, b), ours = run<T>(c, b);
    const std::string label = name + " " + std::to_string(c.queries) + " x " + std::to_string(c.documents) + " x " +
                              std::to_string(c.dim) + " seed " + std::to_string(seed);
    compare(label, c, ours, low, truth);
    if (c.dims.empty())
        check_log(label + " log negatives", ours.log_negatives, low.log_negatives, truth.log_negatives, 1e-6);
    check_close((label + " sums").c_str(), Wide{ours.stats[0], ours.stats[1]}, Wide{truth.stats[0], truth.stats[1]},
                1e-6 * (1 + truth.stats[2] + static_cast<double>(c.queries)));
    for (int i = 2; i < 5; ++i) CHECK(ours.stats[i] == truth.stats[i]);
}

template <class T>
Batch check(const std::string& name, const Case& c, uint32_t seed = 1) {
    const Batch b = make_batch<T>(c, seed);
    check_batch<T>(name, c, b, seed);
    return b;
}

bool same(const Result& a, const Result& b) {
    return a.loss == b.loss && a.dq == b.dq && a.dd == b.dd && a.stats == b.stats &&
           a.d_temperature == b.d_temperature && a.log_negatives == b.log_negatives;
}

}  // namespace

TEST(every_preset) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        const Case c{.queries = 70, .documents = 150, .dim = 24};
        const auto with = [&](const Groups& groups) {
            Case changed = c;
            changed.groups = groups;
            return changed;
        };
        for (const ScoreMask mask : {ScoreMask::kQueryDocument, ScoreMask::kOwn, ScoreMask::kNone})
            check<T>(dtype + " qwen3", with(qwen3(-0.6, mask)), 2);
        check<T>(dtype + " stage 2", with(only({kOwnHard, kBatchPositive, kBatchHard})));
        check<T>(dtype + " mnrl", with(only({kOwnHard, kBatchPositive, kBatchHard}, 0, ScoreMask::kNone)));
        check<T>(dtype + " nothing", with(only({})));
        Case plain = c;
        plain.owners = plain.ids = false;
        check<T>(dtype + " no ids", plain);
    });
}

TEST(own_negatives_alone_need_no_panel) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        emulator::Block::counters() = {};
        Case c{.queries = 70, .documents = 150, .dim = 24, .groups = only({kOwnHard})};
        check<T>(dtype + " classification", c);
        c.groups = only({kOwnHard, kDocOwn}, -0.3, ScoreMask::kQueryDocument);
        c.split = true;
        check<T>(dtype + " with the positive's", c);
        CHECK(emulator::Block::counters().ldmatrix == 0);
    });
}

// The scores of queries and documents are needed for a mask, whether their groups are on or not.
TEST(positives_masked_by_the_query) {
    Case c{.queries = 30, .documents = 140, .dim = 16, .groups = only({kDocHard}, -0.3, ScoreMask::kQueryDocument)};
    check<BFloat16>("bfloat16", c);
    c.groups[kBatchPositive] = {true, ScoreMask::kOwn, false, -0.5, 0};
    check<BFloat16>("bfloat16", c);
    c.groups[kDocPositive] = {true, ScoreMask::kOwn, true, -0.2, 0};
    check<float>("float32", c);
}

// Groups on or off with masks, margins and hardness of their own; then what is above them.
TEST(any_groups) {
    for (uint32_t seed = 1; seed <= 16; ++seed) {
        std::mt19937 random(seed);
        const auto below = [&](uint32_t n) { return static_cast<int>(random() % n); };
        Case c{.queries = 70, .documents = 150, .dim = 24};
        for (Group& group : c.groups)
            group = {below(3) > 0, static_cast<ScoreMask>(below(3)), below(2) > 0, 0.1 * below(9) - 0.6,
                     below(2) * 7.0 * below(9)};
        c.split = below(2), c.absent = below(2), c.focal = below(2) * 0.5 * below(6);
        c.first_row = below(2) * 13, c.first_column = below(2) * 9;
        if (below(2)) c.num_rows = 31;
        if (seed % 4 == 0)
            check<float>("float32", c, seed);
        else if (seed % 4 == 1)
            check<Float16>("float16", c, seed);
        else
            check<BFloat16>("bfloat16", c, seed);
    }
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

// 256 positives, 128 documents of nobody, 128 of the first rows, 128 of any; one text occurs twice.
Batch whole_tiles(const Case& c) {
    Batch b = make_batch<BFloat16>(c, 9);
    for (int64_t i = 0; i < c.queries; ++i) b.positive[i] = i;
    for (int64_t j = 0; j < c.documents; ++j) {
        b.owner[j] = j < 256 ? j : j < 384 ? -1 : j < 512 ? j - 384 : j % 256;
        b.role[j] = static_cast<uint8_t>(j < 256 ? Role::kPositive : Role::kHard);
        b.document_text[j] = j == 300 ? b.document_text[5] : j + 1000;
    }
    for (int64_t i = 0; i < c.queries; ++i) b.query_text[i] = b.document_text[i];
    list_owned(b, c.queries);
    return b;
}

// Whole tiles of rows, and columns of which some meet none of them: Hopper's kernels look such up once, and what a warp
// has to do there depends on whether one of its scores exceeds a limit.
TEST(tiles_of_which_limits_alone_decide) {
    Case c{.queries = 256, .documents = 640, .dim = 16};
    for (const Groups& groups :
         {qwen3(-0.3, ScoreMask::kQueryDocument), only({kBatchPositive, kBatchHard, kDocHard})}) {
        c.groups = groups;
        check_batch<BFloat16>("plain tiles", c, whole_tiles(c), 9);
    }
    c.groups = qwen3(1.1), c.temperature = 0.2;
    c.dims = {8, 16}, c.shares = {1, 1};
    check_batch<BFloat16>("plain tiles of prefixes", c, whole_tiles(c), 9);
}

// Where no candidate of a row is masked, its bits are those of a batch without limits, whatever others mask.
TEST(a_row_does_not_depend_on_what_others_mask) {
    Case c{.queries = 256, .documents = 640, .dim = 16, .groups = qwen3(3)};
    const Batch b = whole_tiles(c);
    const Result all = run<BFloat16>(c, b), truth = formula<double, double>(c, b);
    check_batch<BFloat16>("nothing masked", c, b, 9);
    c.groups = qwen3(1.1);
    check_batch<BFloat16>("few masked", c, b, 9);
    const Result some = run<BFloat16>(c, b), some_truth = formula<double, double>(c, b);
    int num_equal = 0;
    for (size_t i = 0; i < truth.loss.size(); ++i) {
        if (truth.loss[i] != some_truth.loss[i]) continue;
        CHECK(all.loss[i] == some.loss[i] && all.log_negatives[i] == some.log_negatives[i]);
        ++num_equal;
    }
    std::printf("  %d of %d rows mask nothing\n", num_equal, static_cast<int>(truth.loss.size()));
    CHECK(num_equal > 20 && num_equal < 236);
}

TEST(rows_that_are_not_aligned) {
    check<BFloat16>("bfloat16", {.queries = 20, .documents = 30, .dim = 16, .offset = 1});
    check<float>("float32", {.queries = 20, .documents = 30, .dim = 16, .offset = 3});
    check<BFloat16>("bfloat16", {.queries = 20, .documents = 30, .dim = 9, .first_row = 3, .first_column = 5});
}

TEST(panels_follow_each_other) {
    const Case c{.queries = 300,
                 .documents = 140,
                 .dim = 16,
                 .first_row = 3,
                 .num_rows = 290,
                 .first_column = 150,
                 .panel_rows = 128};
    const Batch b = check<BFloat16>("bfloat16", c, 3);
    Case whole = c;
    whole.panel_rows = 0;
    CHECK(run<BFloat16>(c, b).loss == run<BFloat16>(whole, b).loss);
    check<float>("float32", {.queries = 140, .documents = 30, .dim = 8, .panel_rows = 1}, 4);
}

TEST(prefixes_take_one_sweep) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        for (const Groups& groups :
             {qwen3(-0.2), only({kOwnHard, kBatchPositive, kBatchHard}), only({kOwnHard, kDocOwn})}) {
            Case c{.queries = 70,
                   .documents = 150,
                   .dim = 80,
                   .groups = groups,
                   .temperature = 0.1,
                   .dims = {16, 32, 64, 80}};
            c.shares = {0.4, 0.3, 0.2, 0.1};
            check<T>(dtype + " prefixes", c, 2);
        }
        Case c{.queries = 140,
               .documents = 140,
               .dim = 45,
               .temperature = 0.2,
               .focal = 1,
               .split = true,
               .panel_rows = 128};
        c.groups[kBatchHard].hardness = 3;
        c.dims = {3, 20, 41}, c.shares = {0.5, 0, 1};
        check<T>(dtype + " ragged prefixes", c, 3);
        c.dim = 48, c.dims = {6, 20, 46};  // within the steps of Hopper's kernels
        check<T>(dtype + " even prefixes", c, 5);
        c.first_row = 5, c.num_rows = 60, c.first_column = 7, c.absent = true;
        check<T>(dtype + " some rows", c, 4);
        Case wide{.queries = 20, .documents = 60, .dim = 328, .dims = {40, 304, 328}, .shares = {1, 1, 1}};
        check<T>(dtype + " more than a tile of features", wide, 6);
    });
}

TEST(devices_with_99_KB_of_shared_memory_a_block) {
    if (emulator::options().compute_capability != 80) return;  // once is enough
    Case c{.queries = 140, .documents = 150, .dim = 40, .groups = qwen3(-0.2), .temperature = 0.1};
    c.dims = {3, 5, 10, 16, 20, 25, 32, 40}, c.shares = Wide(8, 0.3);
    {
        const OnDevice device(86);
        check<BFloat16>("eight prefixes", c, 2);
    }
    const OnDevice device(89);
    c.queries = 40, c.documents = 60;
    check<float>("eight prefixes", c, 2);
    c.dims = {}, c.shares = {};
    check<float>("no prefixes", c);
}

TEST(prefixes_run_on_the_kernels_of_the_architecture) {
    Case c{.queries = 20, .documents = 40, .dim = 48, .dims = {16, 48}, .shares = {1, 1}};
    for (const bool even : {true, false}) {
        c.dims[0] = even ? 16 : 15;
        emulator::Block::counters() = {};
        check<BFloat16>("bfloat16", c);
        CHECK((emulator::Block::counters().wgmma > 0) == (cuda::on_hopper() && even));
        CHECK((emulator::Block::counters().mma > 0) == !(cuda::on_hopper() && even));
    }
}

TEST(every_schedule_gives_the_same_bits) {
    Case c{.queries = 140, .documents = 140, .dim = 24, .focal = 1};
    c.groups[kDocOwn] = c.groups[kOwnHard];
    const Batch b = make_batch<BFloat16>(c, 7);
    const Result first = run<BFloat16>(c, b);
    for (uint64_t seed = 1; seed < 4; ++seed) {
        emulator::options().seed = seed * 1000;
        CHECK(same(first, run<BFloat16>(c, b)));
    }
    const auto check_loss_alone = [&](const Result& whole) {
        const Result alone = run<BFloat16>(c, b, false);
        CHECK(alone.loss == whole.loss && alone.stats == whole.stats && alone.d_temperature == whole.d_temperature);
    };
    check_loss_alone(first);
    c.dims = {8, 24}, c.shares = {1, 2};
    const Result of_prefixes = run<BFloat16>(c, b);
    emulator::options().seed = 5000;
    CHECK(same(of_prefixes, run<BFloat16>(c, b)));
    check_loss_alone(of_prefixes);
}

// Each block holds a part of the documents, and every positive as a document that is absent; together they are the
// whole.
TEST(blocks_of_documents_add_up) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        for (const bool split : {false, true}) {
            Case c{.queries = 40, .documents = 150, .dim = 24, .focal = 2, .split = split, .owners = false};
            c.groups[kBatchHard].hardness = 3;
            const Batch b = make_batch<T>(c, 6);
            const Result truth = dense<double, double>(c, b), low = dense<float, T>(c, b);
            const int64_t starts[] = {0, 60, 150};
            Case block_case[2] = {c, c};
            Batch blocks[2];
            Wide logs;
            for (int i = 0; i < 2; ++i) {
                const int64_t held = starts[i + 1] - starts[i];
                Batch& block = blocks[i] = b;
                block.d.assign(b.d.begin() + starts[i] * c.dim, b.d.begin() + starts[i + 1] * c.dim);
                block.role.assign(b.role.begin() + starts[i], b.role.begin() + starts[i + 1]);
                block.document_text.assign(b.document_text.begin() + starts[i],
                                           b.document_text.begin() + starts[i + 1]);
                for (int64_t query = 0; query < c.queries; ++query) {
                    const double* document = &b.d[b.positive[query] * c.dim];
                    block.d.insert(block.d.end(), document, document + c.dim);
                    block.role.push_back(static_cast<uint8_t>(Role::kAbsent));
                    block.document_text.push_back(b.query_text[query]);
                    block.positive[query] = held + query;
                }
                block_case[i].documents = held + c.queries;
                block_case[i].first_column = i == 0 ? 0 : c.queries;  // the queries are in the first one
                block.owner.assign(block.document_text.size(), -1);
                list_owned(block, c.queries);
                const Wide part = run<T>(block_case[i], block, false).log_negatives;
                for (size_t k = 0; k < part.size(); ++k)
                    if (i == 0)
                        logs.push_back(part[k]);
                    else if (part[k] > -INFINITY)
                        logs[k] = std::max(logs[k], part[k]) + std::log1p(std::exp(-std::abs(logs[k] - part[k])));
            }
            Result sum{{}, Wide(b.q.size()), Wide(b.d.size()), Wide(1), {}, {}};
            for (int i = 0; i < 2; ++i) {
                const int64_t held = starts[i + 1] - starts[i];
                const Result part = run<T>(block_case[i], blocks[i], true, logs, i == 0);
                sum.loss = part.loss;
                sum.d_temperature[0] += part.d_temperature[0];
                for (size_t k = 0; k < sum.dq.size(); ++k) sum.dq[k] += part.dq[k];
                for (int64_t j = 0; j < held + c.queries; ++j) {
                    const int64_t to = j < held ? starts[i] + j : b.positive[j - held];
                    for (int64_t k = 0; k < c.dim; ++k) sum.dd[to * c.dim + k] += part.dd[j * c.dim + k];
                }
            }
            compare(dtype + " blocks", c, sum, low, truth);
        }
    });
}

// pyqemb/ops/info_nce_composed.py: a given sum is not that of the row, but says how much its candidates weigh.
TEST(sums_that_are_given_weigh_the_candidates) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        const Case c{
            .queries = 40, .documents = 150, .dim = 24, .groups = only({kBatchPositive, kBatchHard}), .owners = false};
        const Batch b = make_batch<T>(c, 6);
        const double allowed = sizeof(T) == 4 ? 3e-5 : std::is_same_v<T, Float16> ? 1e-3 : 6e-3;
        const Wide sums = run<T>(c, b, false).log_negatives;
        const Result plain = run<T>(c, b, true, sums, false);
        Wide given = sums;
        const double more[] = {0, 1, 5, 600};
        for (size_t i = 0; i < given.size(); ++i) given[i] += more[i % 4];
        const Result ours = run<T>(c, b, true, given, false);
        for (int64_t i = 0; i < c.queries; ++i) {
            double positive = 0;
            for (int64_t k = 0; k < c.dim; ++k)
                positive += b.q[i * c.dim + k] * b.d[b.positive[i] * c.dim + k] / c.temperature;
            const double factor =
                (1 + std::exp(positive - sums[i])) / (std::exp(more[i % 4]) + std::exp(positive - sums[i]));
            double error = 0, size = 0;
            for (int64_t k = i * c.dim; k < (i + 1) * c.dim; ++k) {
                if (i % 4 == 3) CHECK(ours.dq[k] == 0);
                error += std::pow(ours.dq[k] - factor * plain.dq[k], 2), size += std::pow(factor * plain.dq[k], 2);
            }
            CHECK(std::sqrt(error) <= allowed * std::sqrt(size) + 1e-30);
        }
        for (const double x : ours.dd) CHECK(std::isfinite(x));

        // At a temperature at which every candidate weighs 1 the sums are their numbers.
        Case counting = c;
        counting.temperature = 1e12;
        const Wide ours_counts = run<T>(counting, b, false).log_negatives;
        const Wide counts = dense<double, double>(counting, b).log_negatives;
        for (size_t i = 0; i < counts.size(); ++i)
            CHECK(std::abs(std::exp(ours_counts[i]) - std::round(std::exp(counts[i]))) < 1e-6);
    });
}

TEST(a_softmax_that_is_off_adds_nothing) {
    const Case c{.queries = 20,
                 .documents = 30,
                 .dim = 8,
                 .groups = only({kBatchPositive, kBatchHard}),
                 .focal = 1,
                 .split = true,
                 .owners = false};
    const Batch b = make_batch<BFloat16>(c, 1);
    Wide logs = run<BFloat16>(c, b).log_negatives;
    const Result clean = run<BFloat16>(c, b, true, logs);
    for (size_t i = 2; i < logs.size(); i += kMaxSoftmaxes) logs[i] = 3;
    const Result ours = run<BFloat16>(c, b, true, logs);
    CHECK(ours.loss == clean.loss && ours.dq == clean.dq && ours.dd == clean.dd);
}

TEST(cold_and_sure) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        check<T>(dtype + " cold", {.queries = 60, .documents = 100, .dim = 64, .temperature = 0.005, .noise = 30});
        check<T>(dtype + " warm", {.queries = 60, .documents = 100, .dim = 64, .temperature = 3});
        // Rows whose candidates lie far below their positive: still exact, row by row. (As columns they meet rows of a
        // larger weight, so not with the query-query group.)
        const Case c{.queries = 60,
                     .documents = 100,
                     .dim = 64,
                     .groups = only({kOwnHard, kBatchPositive, kBatchHard}),
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
    for (const bool split : {false, true}) {
        Case c{.queries = 40,
               .documents = 60,
               .dim = 16,
               .groups = qwen3(-10, ScoreMask::kOwn),
               .focal = 1,
               .split = split};
        c.groups[kDocOwn] = c.groups[kOwnHard];
        const Result ours = run<BFloat16>(c, make_batch<BFloat16>(c, 1));
        CHECK(ours.loss == Wide(40) && ours.dq == Wide(40 * 16) && ours.dd == Wide(60 * 16) &&
              ours.d_temperature == Wide(1));
        CHECK(ours.log_negatives == Wide(ours.log_negatives.size(), -INFINITY));
    }
    check<float>("no queries", {.queries = 0, .documents = 5, .dim = 8});
    check<float>("no rows", {.queries = 6, .documents = 5, .dim = 8, .first_row = 2, .num_rows = 0});
}

TEST(no_bank_is_met_twice) {
    emulator::Block::counters() = {};
    check<BFloat16>("bfloat16", {.queries = 60, .documents = 60, .dim = 72});
    check<float>("float32", {.queries = 20, .documents = 20, .dim = 40});
    CHECK(emulator::Block::counters().ldmatrix > 0 && emulator::Block::counters().bank_conflicts == 0);
}

TEST(what_is_left_out_is_derived) {
    using T = BFloat16;
    Case c{40, 90, 64};
    c.owners = false;
    Batch b = make_batch<T>(c, 5);
    for (int64_t j = 0; j < c.documents; ++j) b.document_text[j] = j;
    for (int64_t i = 0; i < c.queries; ++i) b.query_text[i] = b.positive[i];
    const Result given = run<T>(c, b);
    b.role.clear(), b.query_text.clear();
    const Result derived = run<T>(c, b);
    b.document_text.clear(), b.owner.clear(), b.own_starts.clear(), b.own_documents.clear();
    const Result bare = run<T>(c, b);
    for (const Result* result : {&derived, &bare})
        CHECK(result->loss == given.loss && result->dq == given.dq && result->dd == given.dd &&
              result->stats == given.stats);
}

// Nothing outside of the documents is touched, and the losses of the other rows keep their bits.
TEST(a_positive_that_is_no_document_gives_nan) {
    using T = BFloat16;
    Case c{40, 90, 64};
    Batch b = make_batch<T>(c, 6);
    b.positive[7] = b.positive[8] = 0;  // what stands in for row 7's
    b.role[0] = static_cast<uint8_t>(Role::kPositive);
    b.query_text[7] = b.query_text[8] = b.document_text[0];
    const Result right = run<T>(c, b);
    for (const int64_t wrong : {c.documents, int64_t(-1), int64_t(1) << 40}) {
        b.positive[7] = wrong;
        const Result result = run<T>(c, b);
        for (size_t i = 0; i < result.loss.size(); ++i)
            CHECK(i == 7 ? std::isnan(result.loss[i]) : result.loss[i] == right.loss[i]);
    }
}

TEST(a_row_with_nan_leaves_the_others_alone) {
    for (const Groups& groups : {only({kOwnHard, kBatchPositive, kBatchHard}), only({kOwnHard})}) {
        Case c{.queries = 6, .documents = 200, .dim = 16, .groups = groups, .focal = 1};
        Batch b = make_batch<BFloat16>(c, 1);
        const Result clean = run<BFloat16>(c, b);
        b.q[2 * 16 + 3] = NAN;
        const Result ours = run<BFloat16>(c, b);
        for (int64_t i = 0; i < 6; ++i) {
            CHECK((i == 2) == std::isnan(ours.loss[i]));
            for (int64_t k = i * 16; k < i * 16 + 16; ++k)
                CHECK(i == 2 ? std::isnan(ours.dq[k]) : ours.dq[k] == clean.dq[k]);
        }
    }
}

int main() {
    emulator::report_faults();
    return run_all_on({80, 90});  // an A100's kernels, an H100's
}
