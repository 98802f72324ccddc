// Last-token pooling: the CUDA kernels, executed by the emulator, against the definition in double.
#include "ops/last_token_pool.h"

#include "tensor.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

constexpr double kEps = 1e-6;

struct Case {
    std::vector<int32_t> lengths;
    int64_t embed, dim;
    bool norm_weight = true, normalize = true, weight_gradient = true;
    int64_t more_stride = 0, offset = 0;
};

std::vector<int32_t> cumulated(const std::vector<int32_t>& lengths) {
    std::vector<int32_t> cu{0};
    for (const int32_t length : lengths) cu.push_back(cu.back() + length);
    return cu;
}

struct Result {
    Wide out, dhidden, dweight;
};

template <class A>
Result truth(const Case& c, const Wide& hidden, const Wide& weight, const Wide& dout) {
    const std::vector<int32_t> cu = cumulated(c.lengths);
    const int64_t stride = c.embed + c.more_stride;
    Result result;
    result.out.resize(c.lengths.size() * static_cast<size_t>(c.dim));
    result.dhidden.resize(static_cast<size_t>(cu.back() * c.embed));
    std::vector<A> dweight(static_cast<size_t>(c.embed));
    for (size_t seq = 0; seq < c.lengths.size(); ++seq) {
        if (c.lengths[seq] == 0) continue;
        const int64_t row = cu[seq + 1] - 1, out = static_cast<int64_t>(seq) * c.dim;
        const auto x = [&](int64_t i) { return static_cast<A>(hidden[row * stride + i]); };
        const auto w = [&](int64_t i) { return c.norm_weight ? static_cast<A>(weight[i]) : A(1); };
        const auto dz = [&](int64_t i) { return static_cast<A>(dout[out + i]); };
        A rstd = 1, norm = 1, squares = 0, radial_grad = 0, back = 0;
        for (int64_t i = 0; i < c.embed; ++i) squares += x(i) * x(i);
        if (c.norm_weight) rstd = A(1) / std::sqrt(squares / static_cast<A>(c.embed) + static_cast<A>(kEps));
        const auto y = [&](int64_t i) { return x(i) * rstd * w(i); };
        squares = 0;
        for (int64_t i = 0; i < c.dim; ++i) {
            squares += y(i) * y(i);
            radial_grad += y(i) * dz(i);
        }
        if (c.normalize) norm = std::max(std::sqrt(squares), A(1e-12));
        radial_grad = c.normalize && norm > A(1e-12) ? radial_grad / norm / norm : A(0);
        const auto dy = [&](int64_t i) { return i < c.dim ? (dz(i) - y(i) * radial_grad) / norm : A(0); };
        for (int64_t i = 0; i < c.dim; ++i) {
            result.out[out + i] = y(i) / norm;
            back += dy(i) * w(i) * x(i);
            dweight[i] += dy(i) * x(i) * rstd;
        }
        back = c.norm_weight ? back * rstd * rstd / static_cast<A>(c.embed) : A(0);
        for (int64_t i = 0; i < c.embed; ++i) result.dhidden[row * c.embed + i] = (dy(i) * w(i) - x(i) * back) * rstd;
    }
    result.dweight.assign(dweight.begin(), dweight.end());
    return result;
}

// Every token but the last ones is NaN, and so is what lies between rows: nothing of it may be read.
template <class T>
void check_last_token_pool(const std::string& name, const Case& c, uint32_t seed) {
    const std::vector<int32_t> cu = cumulated(c.lengths);
    const int64_t stride = c.embed + c.more_stride, tokens = cu.back(),
                  num_seqs = static_cast<int64_t>(c.lengths.size());
    const Wide values = random_wide<T>(tokens * stride, seed);
    Wide hidden(values.size(), NAN);
    for (size_t seq = 0; seq < c.lengths.size(); ++seq)
        for (int64_t i = 0; i < c.embed && c.lengths[seq] > 0; ++i)
            hidden[(cu[seq + 1] - 1) * stride + i] = values[(cu[seq + 1] - 1) * stride + i];
    Tensor<T> x(hidden, c.offset), weight(random_wide<T>(c.embed, seed + 1, 0.3, 1), c.offset),
        out(num_seqs * c.dim, c.offset);
    Tensor<T> dout(random_wide<T>(num_seqs * c.dim, seed + 2), c.offset), dhidden(Wide(tokens * c.embed), c.offset);
    Tensor<float> dweight(c.embed);
    const emulator::DeviceMemory<int32_t> cu_seqlens(cu);
    const LastTokenPool problem{.hidden = x.data(),
                                .norm_weight = c.norm_weight ? weight.data() : nullptr,
                                .cu_seqlens = cu_seqlens.data(),
                                .num_tokens = tokens,
                                .num_seqs = num_seqs,
                                .embed = c.embed,
                                .dim = c.dim,
                                .hidden_stride = stride,
                                .eps = kEps,
                                .normalize = c.normalize,
                                .dtype = dtype_of<T>};
    LastTokenPoolBackward p{problem, dout.data(), dhidden.data(),
                            c.norm_weight && c.weight_gradient ? dweight.data() : nullptr};
    cuda::last_token_pool_forward({problem, out.data()});
    Tensor<float> scratch(cuda::last_token_pool_backward_scratch(p) / 4);
    CHECK(p.dnorm_weight || scratch.size() == 0);
    p.scratch = scratch.data();
    cuda::last_token_pool_backward(p);

    const Result exact = truth<double>(c, x.wide(), weight.wide(), dout.wide());
    const Result narrow = truth<float>(c, x.wide(), weight.wide(), dout.wide());
    check_rounded<T>(name + " out", out.wide(), narrow.out, exact.out);
    check_rounded<T>(name + " dhidden", dhidden.wide(), narrow.dhidden, exact.dhidden);
    Wide others = dhidden.wide();
    for (size_t seq = 0; seq < c.lengths.size(); ++seq)
        if (c.lengths[seq] > 0) std::fill_n(others.begin() + (cu[seq + 1] - 1) * c.embed, c.embed, 0);
    CHECK(others == Wide(others.size()));
    if (!p.dnorm_weight) return;
    check_rounded<float>(name + " dnorm_weight", dweight.wide(), narrow.dweight, exact.dweight);
    const Wide before = dweight.wide();
    cuda::last_token_pool_backward(p);  // another schedule: the seed moves with each launch
    CHECK(before == dweight.wide());
}

}  // namespace

TEST(pooling_of_every_row_length) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        uint32_t seed = 1;
        for (const int64_t embed : {1, 7, 8, 19, 64, 1024, 2040, 2048, 2049, 2056})
            for (const int64_t dim : {embed, (embed + 1) / 2, (embed + 15) / 16 * 8})
                if (dim <= embed)
                    check_last_token_pool<T>(dtype + " " + std::to_string(embed) + " to " + std::to_string(dim),
                                             {{2, 0, 1, 3}, embed, dim}, seed += 10);
    });
}

TEST(pooling_of_every_kind) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        for (const bool norm_weight : {true, false})
            for (const bool normalize : {true, false})
                for (const bool weight_gradient : {true, false})
                    for (const int64_t embed : {64, 65})
                        for (const int64_t more_stride : {8, 3})
                            for (const int64_t offset : {0, 1})
                                check_last_token_pool<T>(
                                    dtype,
                                    {{3, 1}, embed, 48, norm_weight, normalize, weight_gradient, more_stride, offset},
                                    5);
    });
}

TEST(pooling_of_every_number_of_sequences) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        check_last_token_pool<T>(dtype + " none", {{}, 16, 8}, 1);
        check_last_token_pool<T>(dtype + " only empty ones", {{0, 0, 0}, 16, 8}, 1);
    });
    for (const size_t count : {512, 1025}) {
        std::vector<int32_t> lengths(count, 1);
        lengths[count / 2] = 0;
        lengths[count - 1] = 2;
        check_last_token_pool<BFloat16>(std::to_string(count), {lengths, 16, 8}, 2);
    }
}

TEST(pooling_of_a_sequence_knows_no_other) {
    using T = BFloat16;
    for (const int64_t embed : {64, 45}) {
        const int64_t num_seqs = 600;
        std::vector<int32_t> cu(num_seqs + 1);
        for (int64_t i = 0; i <= num_seqs; ++i) cu[i] = static_cast<int32_t>(i);
        const emulator::DeviceMemory<int32_t> cu_seqlens(cu);
        Tensor<T> hidden(random_wide<T>(num_seqs * embed, 1)), weight(random_wide<T>(embed, 2)),
            dout(random_wide<T>(num_seqs * embed, 3));
        for (int64_t i = 0; i < embed; ++i) hidden[embed + i] = {0x7fc0};
        const auto run = [&](int64_t first, int64_t count, Tensor<T>& out, Tensor<T>& dhidden) {
            const LastTokenPool problem{.hidden = hidden.data() + first * embed,
                                        .norm_weight = weight.data(),
                                        .cu_seqlens = cu_seqlens.data(),
                                        .num_tokens = count,
                                        .num_seqs = count,
                                        .embed = embed,
                                        .dim = embed,
                                        .hidden_stride = embed,
                                        .eps = kEps,
                                        .normalize = true,
                                        .dtype = DType::kBFloat16};
            cuda::last_token_pool_forward({problem, out.data()});
            cuda::last_token_pool_backward({problem, dout.data() + first * embed, dhidden.data()});
        };
        Tensor<T> out(num_seqs * embed), dhidden(num_seqs * embed);
        run(0, num_seqs, out, dhidden);
        for (const int64_t seq : {0, 2, 3, 599}) {
            Tensor<T> alone(embed), alone_gradient(embed);
            run(seq, 1, alone, alone_gradient);
            CHECK(out.same_bits(alone, seq * embed, 0, embed) &&
                  dhidden.same_bits(alone_gradient, seq * embed, 0, embed));
            CHECK(!std::isnan(alone.wide()[0]) && !std::isnan(alone_gradient.wide()[0]));
        }
    }
}

// Where lengths do not lie among the tokens: NaN in that row alone, no gradient, nothing outside of hidden is read.
TEST(pooling_of_wrong_lengths) {
    const int64_t embed = 24;
    Tensor<float> hidden(random_wide<float>(5 * embed, 1)), dout(random_wide<float>(4 * embed, 2)), out(4 * embed),
        dhidden(Wide(5 * embed));
    const emulator::DeviceMemory<int32_t> cu_seqlens(std::vector<int32_t>{0, 3, 1, 9, 1 << 30});
    const LastTokenPool problem{.hidden = hidden.data(),
                                .norm_weight = nullptr,
                                .cu_seqlens = cu_seqlens.data(),
                                .num_tokens = 5,
                                .num_seqs = 4,
                                .embed = embed,
                                .dim = embed,
                                .hidden_stride = embed,
                                .eps = 0,
                                .normalize = true,
                                .dtype = DType::kFloat32};
    cuda::last_token_pool_forward({problem, out.data()});
    cuda::last_token_pool_backward({problem, dout.data(), dhidden.data()});
    for (int64_t i = 0; i < 4 * embed; ++i) CHECK(std::isnan(out[i]) == (i >= embed));
    for (int64_t i = 0; i < 5 * embed; ++i) CHECK((dhidden[i] != 0) == (i / embed == 2));
}

// A row of any magnitude has a direction, here 16 equal features of 1 / 4, and no gradient along it; zeros stay zero.
TEST(pooling_of_rows_of_any_magnitude) {
    const int64_t embed = 24, dim = 16;
    for (const bool norm_weight : {true, false})
        for (const double size : {0.0, 1e-30, 1e-14, 1.0, 1e30, 1e38}) {
            Tensor<float> hidden(Wide(2 * embed, size)), weight(Wide(embed, 2)), dout(Wide(dim, 3)), out(dim),
                dhidden(Wide(2 * embed));
            const emulator::DeviceMemory<int32_t> cu_seqlens(std::vector<int32_t>{0, 2});
            const LastTokenPool problem{.hidden = hidden.data(),
                                        .norm_weight = norm_weight ? weight.data() : nullptr,
                                        .cu_seqlens = cu_seqlens.data(),
                                        .num_tokens = 2,
                                        .num_seqs = 1,
                                        .embed = embed,
                                        .dim = dim,
                                        .hidden_stride = embed,
                                        .eps = 0,
                                        .normalize = true,
                                        .dtype = DType::kFloat32};
            cuda::last_token_pool_forward({problem, out.data()});
            check_close("direction", out.wide(), Wide(dim, size > 0 ? 0.25 : 0), 1e-6);
            cuda::last_token_pool_backward({problem, dout.data(), dhidden.data()});
            check_close("gradient", dhidden.wide(), Wide(2 * embed), size > 0 ? 1e-5 / size : 0);
        }
}

int main() {
    emulator::report_faults();
    return run_all();
}
