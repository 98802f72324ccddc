// A few lines instead of a framework: TEST bodies run in order, CHECK counts, main returns non-zero on any failure.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace qemb::testing {

inline int g_failures = 0;
inline std::vector<std::pair<std::string, std::function<void()>>>& tests() {
    static std::vector<std::pair<std::string, std::function<void()>>> all;
    return all;
}
struct Register {
    Register(const char* name, std::function<void()> body) { tests().emplace_back(name, std::move(body)); }
};

template <class T>
std::vector<T> random_values(size_t count, uint32_t seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(normal(engine));
    return values;
}

// A NaN is worse than anything, and stays so.
inline bool is_worse(double error, double worst) { return !std::isnan(worst) && !(error <= worst); }

// The worst element, named, when two arrays differ by more than `tolerance`.
template <class A, class B>
void check_close(const char* name, const std::vector<A>& actual, const std::vector<B>& truth, double tolerance) {
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < truth.size(); ++i) {
        const double error = std::abs(static_cast<double>(actual[i]) - static_cast<double>(truth[i]));
        if (is_worse(error, worst)) worst = error, at = i;
    }
    if (!(worst <= tolerance)) {
        ++g_failures;
        std::printf("  %s: error %.3e at %zu (got %.8g, truth %.8g), allowed %.1e\n", name, worst, at,
                    static_cast<double>(actual[at]), static_cast<double>(truth[at]), tolerance);
    }
}

inline int run_all() {
    for (const auto& [name, body] : tests()) {
        const int before = g_failures;
        body();
        std::printf("%s %s\n", g_failures == before ? "ok  " : "FAIL", name.c_str());
    }
    return g_failures ? 1 : 0;
}

}  // namespace qemb::testing

#define TEST(name) \
    static void name(); \
    static const ::qemb::testing::Register register_##name(#name, name); \
    static void name()
#define CHECK(condition) \
    do { \
        if (!(condition)) ++::qemb::testing::g_failures, std::printf("  %s:%d: %s\n", __FILE__, __LINE__, #condition); \
    } while (0)
