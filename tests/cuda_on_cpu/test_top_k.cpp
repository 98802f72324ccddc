// top_k: the CUDA kernels, executed by the emulator, against a sort of the scores in double.
#include "ops/top_k.h"

#include <algorithm>

#include "cuda/top_k/list.h"
#include "tensor.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

using Indices = std::vector<int64_t>;

struct Case {
    int64_t queries, documents, dim, k;
    int64_t num_exclude = 0, offset = 0;
    bool ceiling = false;
};

struct Result {
    Wide scores;
    Indices indices;
};

template <class T>
Result run(const Case& c, const Wide& q, const Wide& d, const Indices& exclude = {},
           const std::vector<float>& ceiling = {}) {
    Tensor<T> queries(q, c.offset), documents(d, c.offset);
    Tensor<float> scores(c.queries * c.k);
    emulator::DeviceMemory<int64_t> indices(static_cast<size_t>(c.queries * c.k)), excluded(exclude);
    emulator::DeviceMemory<float> ceilings(ceiling);
    TopK p{.queries = queries.data(),
           .documents = documents.data(),
           .exclude = c.num_exclude ? excluded.data() : nullptr,
           .ceiling = c.ceiling ? ceilings.data() : nullptr,
           .scores = scores.data(),
           .indices = indices.data(),
           .num_queries = c.queries,
           .num_documents = c.documents,
           .num_exclude = c.num_exclude,
           .dim = c.dim,
           .k = c.k,
           .dtype = dtype_of<T>};
    emulator::DeviceMemory<char> scratch(static_cast<size_t>(cuda::top_k_scratch(p)));
    p.scratch = scratch.data();
    cuda::top_k(p);
    return {scores.wide(), Indices(indices.data(), indices.data() + indices.size())};
}

Result sorted(const Case& c, const Wide& q, const Wide& d, const Indices& exclude, const std::vector<float>& ceiling) {
    Result truth;
    for (int64_t i = 0; i < c.queries; ++i) {
        std::vector<std::pair<double, int64_t>> found;
        for (int64_t j = 0; j < c.documents; ++j) {
            double score = 0;
            for (int64_t k = 0; k < c.dim; ++k) score += q[i * c.dim + k] * d[j * c.dim + k];
            bool out = std::isnan(score) || (c.ceiling && score > ceiling[i]);
            for (int64_t e = 0; e < c.num_exclude; ++e) out |= exclude[i * c.num_exclude + e] == j;
            if (!out) found.emplace_back(-score, j);
        }
        std::sort(found.begin(), found.end());
        found.resize(static_cast<size_t>(c.k), {INFINITY, -1});
        for (const auto& [score, index] : found) truth.scores.push_back(-score), truth.indices.push_back(index);
    }
    return truth;
}

// Small integers, whose products are exact: many scores are equal, and there is one right answer to the bit.
Wide integers(int64_t count, uint32_t seed, int64_t range = 3) {
    std::mt19937 random(seed);
    Wide values(static_cast<size_t>(count));
    for (double& x : values)
        x = static_cast<double>(static_cast<int64_t>(random() % static_cast<uint64_t>(2 * range + 1)) - range);
    return values;
}

template <class T>
void check_exact(const std::string& name, const Case& c, uint32_t seed) {
    const Wide q = integers(c.queries * c.dim, seed), d = integers(c.documents * c.dim, seed + 1);
    std::mt19937 random(seed);
    Indices exclude;
    for (int64_t i = 0; i < c.queries * c.num_exclude; ++i)
        exclude.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(c.documents + 1)) - 1);
    std::vector<float> ceiling(c.ceiling ? static_cast<size_t>(c.queries) : 0);
    for (float& x : ceiling) x = static_cast<float>(random() % 12);
    emulator::options().seed = seed;
    const Result ours = run<T>(c, q, d, exclude, ceiling), truth = sorted(c, q, d, exclude, ceiling);
    if (ours.scores == truth.scores && ours.indices == truth.indices) return;
    std::printf("  %s %d x %d x %d, k %d\n", name.c_str(), static_cast<int>(c.queries), static_cast<int>(c.documents),
                static_cast<int>(c.dim), static_cast<int>(c.k));
    CHECK(false);
}

}  // namespace

TEST(equals_a_sort) {
    const Case cases[] = {{1, 1, 1, 1},       {3, 0, 8, 2},       {2, 5, 3, 9},     {127, 127, 8, 7},
                          {128, 128, 63, 31}, {129, 129, 64, 32}, {5, 300, 65, 33}, {130, 260, 8, 1},
                          {3, 500, 129, 100}, {2, 700, 16, 300},  {0, 5, 8, 3},     {4, 3000, 8, 40},
                          {131, 2200, 24, 5}, {2, 5000, 8, 64}};
    uint32_t seed = 1;
    for (Case c : cases)
        for_each_dtype([&]<class T>(const std::string& dtype) {
            check_exact<T>(dtype, c, ++seed);
            if (std::is_same_v<T, BFloat16> || c.documents == 0) return;
            c.num_exclude = 3;
            c.ceiling = true;
            check_exact<T>(dtype + " with exclude and ceiling", c, ++seed);
        });
}

TEST(keys) {
    using namespace cuda::top_k_kernels;
    const float scores[] = {-INFINITY, -3e38f, -1, -1e-45f, 0, 1e-45f, 2, 3e38f, INFINITY};
    const int64_t documents[] = {(int64_t{1} << 32) - 2, 70000, 1, 0};
    Key last = 0;
    for (const float score : scores)
        for (const int64_t document : documents) {
            const Key key = key_of(score, document);
            CHECK(key > last && score_of(key) == score && document_of(key) == document);
            last = key;
        }
    CHECK(key_of(-0.0f, 3) == key_of(0.0f, 3));
    // What may be dropped: equal scores of later documents; of earlier ones only what is below.
    for (const float score : scores) {
        const float later = bar_of(key_of(score, 9), 10), earlier = bar_of(key_of(score, 10), 10);
        CHECK(score <= later && !(score <= earlier));
        if (score > -INFINITY) CHECK(std::nextafter(score, -INFINITY) <= earlier);
    }
    CHECK(std::isnan(bar_of(0, 10)));
}

// Multiprocessors of the emulated device, until the end of the scope.
class With {
  public:
    explicit With(int multiprocessors) { emulator::options().multiprocessors = multiprocessors; }
    ~With() { emulator::options().multiprocessors = before_; }
    With(const With&) = delete;
    With& operator=(const With&) = delete;

  private:
    int before_ = emulator::options().multiprocessors;
};

// One feature: a query's scores are its value times those of the documents.
void check_scores(const char* name, const Wide& queries, const Wide& documents, int64_t k, uint32_t seed,
                  int64_t num_exclude = 0) {
    const Case c{.queries = static_cast<int64_t>(queries.size()),
                 .documents = static_cast<int64_t>(documents.size()),
                 .dim = 1,
                 .k = k,
                 .num_exclude = num_exclude};
    Wide q, d;  // rows of 16 bytes, which the copy engine takes
    for (const double x : queries) q.push_back(x), q.resize(q.size() + 7);
    for (const double x : documents) d.push_back(x), d.resize(d.size() + 7);
    Case wide = c;
    wide.dim = 8;
    Indices exclude;  // the first documents
    for (int64_t i = 0; i < c.queries * num_exclude; ++i) exclude.push_back(i % num_exclude);
    emulator::options().seed = seed;
    const Result ours = run<BFloat16>(wide, q, d, exclude), truth = sorted(wide, q, d, exclude, {});
    if (ours.scores == truth.scores && ours.indices == truth.indices) return;
    std::printf("  %s, k %d, seed %u\n", name, static_cast<int>(k), seed);
    CHECK(false);
}

// Many equal scores around the k-th best, in every span: the bar that spans share must not drop the lowest of them.
TEST(ties_across_spans) {
    for (const int multiprocessors : {1, 4, 5}) {
        const With device(multiprocessors);
        for (uint32_t seed = 1; seed <= 2; ++seed) {
            Wide few = integers(4700, seed, 1), level(4700, 2), late(4700, -1), early(4700, 0);
            for (size_t i = 0; i < late.size(); ++i) late[i] = i % 50 == 49 ? 1 : -1;
            for (size_t i = 0; i < early.size(); ++i) early[i] = i < 90 ? 1 : i % 3 ? 0 : -0.0;
            for (const int64_t k : {1, 31, 200}) {
                check_scores("few scores", {1, -2, 0, 3}, few, k, seed);
                check_scores("one score", {1, -1, 0}, level, k, seed);
                check_scores("few good ones in every span", {1, 2, -1}, late, k, seed);
                check_scores("all good ones in the first span", {1, 2, -1}, early, k, seed, 40);
            }
        }
    }
}

// Every span has seven good scores at its beginning and one that is needed at its end.
TEST(the_last_of_k_comes_late) {
    const With device(4);
    Wide documents(4 * 1152, 0);
    for (size_t i = 0; i < documents.size(); ++i) documents[i] = i % 1152 < 7 ? 10 : i % 1152 == 1151 ? 5 : 0;
    for (const uint32_t seed : {1, 2, 3, 4}) check_scores("late", {1, 2}, documents, 31, seed);
}

// Better and better: every score enters every list, and the bar never holds anything back. Worse and worse: the first
// span has all, and the others must not put their own in.
TEST(ascending_and_descending_scores) {
    const With device(4);
    Wide rising(4300), falling(4300);
    for (size_t i = 0; i < rising.size(); ++i) {
        rising[i] = std::floor(static_cast<double>(i) / 20);
        falling[i] = 215 - rising[i];
    }
    Wide uneven = rising;  // batches that are not complete, then whole tiles
    for (size_t i = 0; i < uneven.size(); ++i)
        if (i / 128 % 2 == 0 && i % 128 < 100) uneven[i] = -1000;
    for (uint32_t seed = 1; seed <= 2; ++seed)
        for (const int64_t k : {7, 150}) {
            check_scores("uneven", {1, 2, 1, 0.5}, uneven, k, seed);
            check_scores("rising", {1, 0, -1}, rising, k, seed);
            check_scores("falling", {1, 0, -1}, falling, k, seed);
        }
}

// Lowest scores qualify as long as there is room, whatever the bar.
TEST(minus_infinity_across_spans) {
    const With device(4);
    Wide documents(4300, -INFINITY);
    documents[4200] = documents[17] = 1;
    for (const int64_t k : {2, 60, 200})
        for (const uint32_t seed : {5, 6, 7, 8}) check_scores("-inf", {1, 2}, documents, k, seed);
}

// What one span has found holds back the scores of others. Four searches of a quarter each would let in 9271 for a
// query; the k-th best of the best span alone as the bar of all, 6220; no fewer than 3600 are in the lists.
TEST(spans_share_a_bar) {
    const With device(4);
    const Case c{.queries = 20, .documents = 16384, .dim = 8, .k = 900};
    const Wide q = random_wide<BFloat16>(c.queries * c.dim, 3), d = random_wide<BFloat16>(c.documents * c.dim, 4);
    emulator::counters() = {};
    for (uint64_t seed = 1; seed <= 4; ++seed) {
        emulator::options().seed = seed;
        run<BFloat16>(c, q, d);
    }
    const double of_query = static_cast<double>(emulator::counters().tickets) / (4 * static_cast<double>(c.queries));
    std::printf("  %.0f scores of a query enter lists\n", of_query);
    CHECK(of_query < 5900);
}

TEST(devices_with_99_KB_of_shared_memory_a_block) {
    if (emulator::options().compute_capability != 80) return;  // once is enough
    for (const int capability : {86, 89}) {
        const OnDevice device(capability);
        check_exact<BFloat16>("bfloat16", {.queries = 130, .documents = 260, .dim = 72, .k = 9}, 3);
        check_exact<float>("float32", {.queries = 3, .documents = 2200, .dim = 40, .k = 33}, 4);
    }
}

TEST(rows_that_are_not_aligned) {
    check_exact<BFloat16>("bfloat16", {.queries = 5, .documents = 200, .dim = 16, .k = 7, .offset = 1}, 3);
    check_exact<float>("float32", {.queries = 5, .documents = 200, .dim = 16, .k = 7, .offset = 1}, 4);
}

TEST(scores_are_those_of_float32) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        const Case c{.queries = 20, .documents = 400, .dim = 300, .k = 20};
        const Wide q = random_wide<T>(c.queries * c.dim, 5), d = random_wide<T>(c.documents * c.dim, 6);
        const Result ours = run<T>(c, q, d), truth = sorted(c, q, d, {}, {});
        check_close((dtype + " scores").c_str(), ours.scores, truth.scores, 3e-5);
        CHECK(ours.indices == truth.indices);
    });
}

TEST(nan_never_qualifies_and_minus_infinity_does) {
    const Case c{.queries = 3, .documents = 150, .dim = 8, .k = 4};
    Wide q = integers(3 * 8, 1), d = integers(150 * 8, 2);
    const Result clean = run<BFloat16>(c, q, d);
    for (int64_t k = 0; k < 8; ++k) q[8 + k] = NAN;
    const Result ours = run<BFloat16>(c, q, d);
    for (size_t i = 0; i < 12; ++i) {
        CHECK(ours.indices[i] == (i / 4 == 1 ? -1 : clean.indices[i]));
        CHECK(ours.scores[i] == (i / 4 == 1 ? -INFINITY : clean.scores[i]));
    }
    const Result low = run<float>({.queries = 1, .documents = 2, .dim = 1, .k = 3}, {1}, {-3e38, NAN});
    CHECK((low.indices == Indices{0, -1, -1}));
    const Result lowest = run<BFloat16>({.queries = 1, .documents = 3, .dim = 1, .k = 3}, {1}, {NAN, -INFINITY, 5});
    CHECK((lowest.indices == Indices{2, 1, -1}));
}

TEST(a_query_alone_finds_the_same_bits) {
    const Case all{.queries = 140, .documents = 1500, .dim = 40, .k = 6};
    const Wide q = random_wide<BFloat16>(all.queries * all.dim, 1),
               d = random_wide<BFloat16>(all.documents * all.dim, 2);
    emulator::options().seed = 11;
    const Result together = run<BFloat16>(all, q, d);
    emulator::options().seed = 12;
    CHECK(run<BFloat16>(all, q, d).indices == together.indices);
    for (const int64_t i : {0, 77, 139}) {
        Case one = all;
        one.queries = 1;
        const Result alone = run<BFloat16>(one, Wide(q.begin() + i * all.dim, q.begin() + (i + 1) * all.dim), d);
        for (int64_t r = 0; r < all.k; ++r) {
            CHECK(alone.indices[r] == together.indices[i * all.k + r]);
            CHECK(alone.scores[r] == together.scores[i * all.k + r]);
        }
    }
}

int main() {
    emulator::report_faults();
    return run_all_on({80, 90});  // an A100's kernels, an H100's
}
