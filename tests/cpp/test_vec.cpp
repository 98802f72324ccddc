// The vector exponential, and the low-precision conversions.
#include "cpu/simd/vec.h"

#include "testing.h"

using namespace qemb;
using namespace qemb::testing;

TEST(exponential_is_good_to_the_last_bits) {
    using namespace qemb::cpu::generic;
    for (double x = -86; x < 88; x += 0.0137) {
        const float got = exp<float>(splat<float>(static_cast<float>(x)))[0];
        CHECK(std::abs(got / std::exp(static_cast<double>(static_cast<float>(x))) - 1) < 2.5e-7);
        CHECK(std::abs(exp<double>(splat<double>(x * 8))[0] / std::exp(x * 8) - 1) < 1e-15);
    }
    CHECK(exp<float>(splat<float>(-INFINITY))[0] == 0 && exp<float>(splat<float>(200.f))[0] == INFINITY);
    CHECK(std::isnan(exp<float>(splat<float>(NAN))[0]) && exp<float>(splat<float>(0.f))[0] == 1);
}

TEST(half_precision_round_trips) {
    using namespace qemb::cpu::generic;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const auto half = static_cast<uint16_t>(bits);
        const float wide = from_f16(half), brain = from_bf16(half);
        CHECK(std::isnan(wide) || to_f16(wide) == half);
        CHECK(std::isnan(brain) || to_bf16(brain) == half);
    }
    CHECK(to_bf16(1.00390625f) == 0x3f80 && to_bf16(1.01171875f) == 0x3f82);  // ties to even
    CHECK(to_f16(65520.f) == 0x7c00 && to_f16(1e-8f) == 0);
}

int main() { return run_all(); }
