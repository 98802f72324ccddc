// Attention against naive loops in double, for every instruction set of this machine.
#include "ops/attention.h"

#include "attention_truth.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "testing.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

using Case = AttentionCase;
using Result = AttentionResult;

const std::vector<Case> kCases = {
    {{0, 1, 48, 97}, {0, 1, 48, 97}, 4, 2, 16, false}, {{0, 1, 48, 97}, {0, 1, 48, 97}, 4, 2, 16, true},
    {{0, 0, 300}, {0, 0, 300}, 2, 1, 24, true},        {{0, 3, 4}, {0, 10, 300}, 2, 2, 8, true},
    {{0, 250, 251}, {0, 200, 201}, 2, 1, 40, true},    {{0, 5}, {0, 0}, 1, 1, 8, false},
    {{0, 1, 2, 3}, {0, 7, 14, 270}, 6, 2, 136, false},
};

template <class T>
Result native(const Case& c, DType dtype, const std::vector<T>& q, const std::vector<T>& k, const std::vector<T>& v,
              const std::vector<T>& dout) {
    std::vector<T> out(q.size()), dq(q.size()), dk(k.size()), dv(k.size()),
        lse(static_cast<size_t>(c.cu_q.back() * c.heads));
    Attention problem{
        .q = q.data(), .k = k.data(), .v = v.data(), .cu_seqlens_q = c.cu_q.data(), .cu_seqlens_k = c.cu_k.data()};
    set_shape(problem, c, dtype);
    cpu::attention_forward({problem, out.data(), lse.data()});
    const AttentionBackward backward{problem, out.data(), dout.data(), lse.data(), dq.data(), dk.data(), dv.data()};
    cpu::attention_backward(backward);
    return {{out.begin(), out.end()},
            {dq.begin(), dq.end()},
            {dk.begin(), dk.end()},
            {dv.begin(), dv.end()},
            {lse.begin(), lse.end()}};
}

template <class T>
void compare(DType dtype, double tolerance) {
    for (const Case& c : kCases) {
        const auto q = random_values<T>(static_cast<size_t>(c.cu_q.back() * c.heads * c.dim), 1);
        const auto k = random_values<T>(static_cast<size_t>(c.cu_k.back() * c.kv_heads * c.dim), 2);
        const auto v = random_values<T>(k.size(), 3), dout = random_values<T>(q.size(), 4);
        const auto wide = [](const std::vector<T>& x) { return std::vector<double>(x.begin(), x.end()); };
        const Result truth = attention_truth(c, wide(q), wide(k), wide(v), wide(dout), [](double x) { return x; });
        for (const std::string& isa : cpu::available_isas()) {
            cpu::set_isa(isa);
            const Result ours = native<T>(c, dtype, q, k, v, dout);
            check_close((isa + " out").c_str(), ours.out, truth.out, tolerance);
            check_close((isa + " dq").c_str(), ours.dq, truth.dq, tolerance);
            check_close((isa + " dk").c_str(), ours.dk, truth.dk, tolerance);
            check_close((isa + " dv").c_str(), ours.dv, truth.dv, tolerance);
        }
    }
}

}  // namespace

TEST(float32_equals_naive_loops) { compare<float>(DType::kFloat32, 3e-5); }
TEST(float64_equals_naive_loops) { compare<double>(DType::kFloat64, 1e-12); }

TEST(same_bits_on_one_and_three_threads) {
    const Case c{{0, 500, 530, 531}, {0, 500, 530, 531}, 4, 2, 32, true};
    const auto q = random_values<float>(static_cast<size_t>(531 * 4 * 32), 1);
    const auto k = random_values<float>(static_cast<size_t>(531 * 2 * 32), 2);
    cpu::set_num_threads(1);
    const Result one = native<float>(c, DType::kFloat32, q, k, k, q);
    cpu::set_num_threads(3);
    CHECK(cpu::num_threads() == 3);
    const Result three = native<float>(c, DType::kFloat32, q, k, k, q);
    CHECK(one.out == three.out && one.dq == three.dq && one.dk == three.dk && one.dv == three.dv);
}

int main() { return run_all(); }
