// Attention: the CUDA kernels, executed by the emulator, against the definition in double. Tolerance: twice the error
// of a dense implementation that stores scores and weights in the same dtype.
#include "attention_call.h"

using namespace qemb;
using namespace qemb::testing;

TEST(short_sequences_share_tiles) {
    for (const Case& c :
         {self({1, 15, 16, 17, 31, 2, 0, 40, 128, 127, 1}, 2, 1, 64, false),
          self({1, 15, 16, 17, 31, 2, 0, 40, 128, 127, 1}, 2, 2, 64, true), self({64, 64, 100}, 4, 1, 128, true),
          self({33, 90}, 2, 1, 128, false), self({5, 9, 3}, 8, 1, 64, false)})
        check<BFloat16>(describe(c), c);
    check<Float16>("float16", self({50, 70, 20}, 2, 1, 64, true));
}

TEST(long_sequences_are_cut_into_blocks) {
    for (const Case& c : {self({129}, 2, 1, 64, false), self({200, 5, 257}, 2, 1, 64, true),
                          self({260}, 2, 2, 128, true), self({130, 20}, 2, 1, 128, false)})
        check<BFloat16>(describe(c), c);
    check<Float16>("float16", self({190}, 1, 1, 128, true));
}

// dQ is a sum over blocks of keys, of blocks of threads that run at the same time.
TEST(long_sequences_have_the_same_bits_under_every_schedule) {
    if (emulator::options().compute_capability != 80) return;  // Hopper's own kernels: test_attention_sm90.cpp
    for (const int capability : {80, 86}) {
        const OnDevice device(capability);
        const int64_t dim = capability == 86 ? 128 : 64;
        for (const bool causal : {false, true}) {
            const Case c = self({causal ? 400 : 270, 140, 150}, 2, 1, dim, causal);
            check<BFloat16>(describe(c), c);
            const Inputs x = random_inputs<BFloat16>(c);
            Call<BFloat16> first(c, x.q, x.k, x.v, x.dout);
            first.run();
            for (int i = 0; i < 2; ++i) {
                Call<BFloat16> again(c, x.q, x.k, x.v, x.dout);
                again.run(i == 1);
                CHECK(again.dq.same_bits(first.dq) && again.dk.same_bits(first.dk) && again.dv.same_bits(first.dv));
            }
        }
    }
}

TEST(queries_and_keys_of_different_lengths) {
    for (const Case& c :
         {Case{{0, 3, 4, 20}, {0, 10, 120, 130}, 2, 1, 64, true}, Case{{0, 50, 51}, {0, 20, 21}, 2, 1, 64, true},
          Case{{0, 5, 9}, {0, 0, 7}, 1, 1, 64, false}, Case{{0, 0, 7}, {0, 5, 9}, 1, 1, 64, false},
          Case{{0, 200}, {0, 70}, 1, 1, 64, true}, Case{{0, 3}, {0, 300}, 2, 1, 64, true},
          Case{{0, 0, 1}, {0, 150, 290}, 4, 2, 64, false}, Case{{0, 140, 160}, {0, 0, 30}, 1, 1, 64, true},
          Case{{0, 140, 400}, {0, 300, 310}, 2, 1, 128, true}})
        check<BFloat16>(describe(c), c);
}

TEST(one_query_a_sequence) {
    for (const int64_t group : {1, 2, 4, 3})
        check<BFloat16>(
            "group of " + std::to_string(group),
            Case{{0, 1, 2, 2, 3, 4}, {0, 1, 34, 50, 50, 350}, 2 * group, 2, group == 2 ? 128 : 64, group == 4});
}

TEST(thousands_of_tiny_sequences) {
    std::vector<int32_t> lengths;
    for (int i = 0; i < 2000; ++i) lengths.push_back(i % 3);
    check<BFloat16>("tiny", self(lengths, 1, 1, 64, false));
}

TEST(a_plan_made_on_the_device) {
    const Case c = self({3, 150, 0, 128, 40, 300, 1, 1, 20}, 2, 1, 64, true);
    check<BFloat16>("device plan", c, true);
    const AttentionPlan exact = size_plan(c.cu_q.data(), c.cu_k.data(), 9), largest = cuda::largest_plan(9, 643, 643);
    CHECK(exact.tiles <= largest.tiles && exact.blocks <= largest.blocks && exact.key_blocks <= largest.key_blocks &&
          exact.summed == 5 && exact.summed <= largest.summed && !exact.single);
    std::vector<int32_t> all(2001);
    for (int i = 0; i <= 2000; ++i) all[static_cast<size_t>(i)] = i;
    CHECK(size_plan(all.data(), all.data(), 2000).tiles <= cuda::largest_plan(2000, 2000, 2000).tiles);
    CHECK(size_plan(all.data(), all.data(), 2000).single);
}

// Whatever the lengths on the device are: nothing outside of the tensors is touched, and every result is NaN.
TEST(lengths_that_are_none_give_nan) {
    for (const std::vector<int32_t>& lengths : {std::vector<int32_t>{0, 150, 40, 190},
                                                {0, 20, 150, 189},
                                                {0, 20, 150, 1 << 30},
                                                {0, -5, 150, 190},
                                                {7, 20, 150, 190},
                                                {0, 1 << 30, -(1 << 30), 190}}) {
        const Case c = self({20, 130, 40}, 2, 1, 64, true);
        const Inputs x = random_inputs<BFloat16>(c);
        Call<BFloat16> call(c, x.q, x.k, x.v, x.dout);
        for (auto* cu : {&call.cu_q, &call.cu_k}) std::copy(lengths.begin(), lengths.end(), cu->data());
        call.run(true);
        const auto all_nan = [](Tensor<BFloat16>& y) {
            for (const double value : y.wide())
                if (!std::isnan(value)) return false;
            return true;
        };
        CHECK(all_nan(call.out) && all_nan(call.dk) && all_nan(call.dv) && all_nan(call.dq));
    }
}

namespace {

void check_bits_alone(const Case& all) {
    const Inputs x = random_inputs<BFloat16>(all);
    Call<BFloat16> packed(all, x.q, x.k, x.v, x.dout);
    packed.run();
    const int64_t q_row = all.heads * all.dim, k_row = all.kv_heads * all.dim;
    for (size_t s = 0; s + 1 < all.cu_q.size(); ++s) {
        const int64_t begin = all.cu_q[s], count = all.cu_q[s + 1] - begin;
        const Case one = self({static_cast<int32_t>(count)}, all.heads, all.kv_heads, all.dim, all.causal);
        const auto part = [&](const Wide& from, int64_t row) {
            return Wide(from.begin() + begin * row, from.begin() + (begin + count) * row);
        };
        Call<BFloat16> alone(one, part(x.q, q_row), part(x.k, k_row), part(x.v, k_row), part(x.dout, q_row));
        alone.run();
        CHECK(alone.out.same_bits(packed.out, 0, begin * q_row, count * q_row));
        CHECK(alone.dq.same_bits(packed.dq, 0, begin * q_row, count * q_row));
        CHECK(alone.dk.same_bits(packed.dk, 0, begin * k_row, count * k_row));
        CHECK(alone.dv.same_bits(packed.dv, 0, begin * k_row, count * k_row));
    }
}

// The second and the fourth of five sequences hold NaN.
void check_nan_stays(const Case& c) {
    const int64_t q_row = c.heads * c.dim, k_row = c.kv_heads * c.dim;
    Inputs x = random_inputs<BFloat16>(c);
    const AttentionResult truth = attention_truth(c, x.q, x.k, x.v, x.dout, [](double value) { return value; });
    for (const size_t s : {size_t(1), size_t(3)}) {
        for (int64_t i = c.cu_q[s] * q_row; i < c.cu_q[s + 1] * q_row; ++i) x.q[i] = x.dout[i] = NAN;
        for (int64_t i = c.cu_q[s] * k_row; i < c.cu_q[s + 1] * k_row; ++i) x.k[i] = x.v[i] = NAN;
    }
    Call<BFloat16> call(c, x.q, x.k, x.v, x.dout);
    call.run();
    for (const size_t s : {size_t(0), size_t(2), size_t(4)}) {
        double worst = 0;
        const auto compare = [&](Tensor<BFloat16>& ours, const Wide& right, int64_t row) {
            for (int64_t i = c.cu_q[s] * row; i < c.cu_q[s + 1] * row; ++i) {
                const double error = std::abs(cuda::to_float(ours[i]) - right[i]);
                if (testing::is_worse(error, worst)) worst = error;
            }
        };
        compare(call.out, truth.out, q_row);
        compare(call.dq, truth.dq, q_row);
        compare(call.dk, truth.dk, k_row);
        compare(call.dv, truth.dv, k_row);
        CHECK(worst < 0.05);
    }
}

}  // namespace

TEST(a_sequence_has_the_same_bits_alone) { check_bits_alone(self({20, 100, 7, 128, 33, 200, 64}, 2, 1, 64, true)); }

TEST(nan_stays_in_its_sequence) {
    for (const bool causal : {false, true}) check_nan_stays(self({20, 30, 17, 140, 40}, 2, 1, 64, causal));
}

// Tiles of four slots; sequences of more than 64 tokens are blocks, of which head_dim 128 loads 32 rows at a time.
TEST(devices_with_99_KB_of_shared_memory_a_block) {
    if (emulator::options().compute_capability != 80) return;  // once is enough
    const std::vector<int32_t> two_of_64{0, 64, 128};
    CHECK(size_plan(two_of_64.data(), two_of_64.data(), 2).tiles == 1);
    for (const int capability : {86, 89}) {
        const OnDevice device(capability);
        CHECK(size_plan(two_of_64.data(), two_of_64.data(), 2).tiles == 2);
        const int64_t dim = capability == 86 ? 128 : 64;
        for (const Case& c :
             {self({1, 15, 17, 64, 2, 0, 33, 31}, 2, 1, dim, false), self({65, 16, 150}, 2, 1, dim, true),
              Case{{0, 3, 4, 40}, {0, 60, 64, 128}, 1, 1, dim, true}})
            check<BFloat16>(describe(c), c, capability == 89);
        check<Float16>("float16", self({50, 70, 20}, 2, 1, dim, true));
        check_bits_alone(self({20, 64, 7, 33, 129}, 2, 1, dim, true));
        check_nan_stays(self({20, 30, 17, 140, 40}, 2, 1, dim, capability == 89));
    }
}

TEST(hopper_with_the_kernels_of_every_gpu) {
    if (emulator::options().compute_capability != 90) return;
    cuda::newest_kernels() = 80;
    emulator::counters().wgmma = 0;
    const Case c = self({40, 200, 129}, 2, 1, 128, true);
    check<BFloat16>(describe(c), c);
    CHECK(emulator::counters().wgmma == 0);
    cuda::newest_kernels() = 90;
}

TEST(no_bank_conflicts) { CHECK(emulator::Block::counters().bank_conflicts == 0); }

int main() {
    emulator::report_faults();
    return run_all_on({80, 90});  // an A100's kernels, an H100's
}
