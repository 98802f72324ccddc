// qk_norm_rope: the CUDA kernels, executed by the emulator, against the definition in double.
#include "ops/qk_norm_rope.h"

#include "norm_truth.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

struct HeadCase {
    int64_t tokens, heads, dim;
    bool weight_gradient = true;
    int64_t offset = 0;
    bool norm = true;
};

template <class A>
void qk_norm_rope_truth(const HeadCase& c, const Wide& x, const Wide& w, const Wide& cos, const Wide& sin, Wide& y,
                        Wide& rstd) {
    const int64_t half = c.dim / 2;
    const NormCase norm{c.tokens * c.heads, c.dim};
    Wide n;
    rms_norm_truth<A>(norm, x, w, n, rstd);
    if (!c.norm) n = x, rstd.assign(rstd.size(), 1);
    y.resize(x.size());
    for (int64_t row = 0; row < norm.rows; ++row)
        for (int64_t i = 0; i < half; ++i) {
            const int64_t at = row * c.dim + i, angle = row / c.heads * half + i;
            const A a = static_cast<A>(n[at]), b = static_cast<A>(n[at + half]);
            const A cosine = static_cast<A>(cos[angle]), sine = static_cast<A>(sin[angle]);
            y[at] = a * cosine - b * sine;
            y[at + half] = b * cosine + a * sine;
        }
}

template <class A>
Gradients qk_norm_rope_backward_truth(const HeadCase& c, const Wide& x, const Wide& w, const Wide& cos, const Wide& sin,
                                      const Wide& rstd, const Wide& dy) {
    const int64_t half = c.dim / 2;
    Wide dn(dy.size());
    for (int64_t row = 0; row < c.tokens * c.heads; ++row)
        for (int64_t i = 0; i < half; ++i) {
            const int64_t at = row * c.dim + i, angle = row / c.heads * half + i;
            const A a = static_cast<A>(dy[at]), b = static_cast<A>(dy[at + half]);
            const A cosine = static_cast<A>(cos[angle]), sine = static_cast<A>(sin[angle]);
            dn[at] = a * cosine + b * sine;
            dn[at + half] = b * cosine - a * sine;
        }
    if (!c.norm) return {.dx = dn};
    return rms_norm_backward_truth<A>({c.tokens * c.heads, c.dim}, x, w, rstd, dn, nullptr);
}

template <class T>
void check_qk_norm_rope(const std::string& name, const HeadCase& c, uint32_t seed) {
    const int64_t count = c.tokens * c.heads * c.dim, angles = c.tokens * c.dim / 2;
    Wide cosines, sines;
    for (const double turn : random_values<double>(static_cast<size_t>(angles), seed)) {
        cosines.push_back(std::cos(turn * 3));
        sines.push_back(std::sin(turn * 3));
    }
    Tensor<T> x(random_wide<T>(count, seed + 1), c.offset), weight(random_wide<T>(c.dim, seed + 2, 0.3, 1), c.offset),
        y(count, c.offset);
    Tensor<float> cos(cosines, c.offset), sin(sines, c.offset), rstd(c.tokens * c.heads);
    cuda::qk_norm_rope_forward({.x = x.data(),
                                .weight = c.norm ? weight.data() : nullptr,
                                .cos = cos.data(),
                                .sin = sin.data(),
                                .y = y.data(),
                                .rstd = rstd.data(),
                                .tokens = c.tokens,
                                .heads = c.heads,
                                .head_dim = c.dim,
                                .eps = kEps,
                                .dtype = dtype_of<T>});
    Wide truth, low, truth_rstd, low_rstd;
    qk_norm_rope_truth<double>(c, x.wide(), weight.wide(), cos.wide(), sin.wide(), truth, truth_rstd);
    qk_norm_rope_truth<float>(c, x.wide(), weight.wide(), cos.wide(), sin.wide(), low, low_rstd);
    check_rounded<T>(name + " y", y.wide(), low, truth);
    check_rounded<float>(name + " rstd", rstd.wide(), low_rstd, truth_rstd);

    Tensor<T> dy(random_wide<T>(count, seed + 3), c.offset), dx(count, c.offset);
    Tensor<float> dweight(c.dim), inverse(truth_rstd);
    QkNormRopeBackward p{.x = x.data(),
                         .weight = c.norm ? weight.data() : nullptr,
                         .cos = cos.data(),
                         .sin = sin.data(),
                         .rstd = inverse.data(),
                         .dy = dy.data(),
                         .dx = dx.data(),
                         .dweight = c.weight_gradient ? dweight.data() : nullptr,
                         .tokens = c.tokens,
                         .heads = c.heads,
                         .head_dim = c.dim,
                         .dtype = dtype_of<T>};
    Tensor<float> scratch(cuda::qk_norm_rope_backward_scratch(p) / 4);
    CHECK(c.weight_gradient || scratch.size() == 0);
    p.scratch = scratch.data();
    cuda::qk_norm_rope_backward(p);
    const Gradients exact = qk_norm_rope_backward_truth<double>(c, x.wide(), weight.wide(), cos.wide(), sin.wide(),
                                                                inverse.wide(), dy.wide());
    const Gradients narrow = qk_norm_rope_backward_truth<float>(c, x.wide(), weight.wide(), cos.wide(), sin.wide(),
                                                                inverse.wide(), dy.wide());
    check_rounded<T>(name + " dx", dx.wide(), narrow.dx, exact.dx);
    if (!c.weight_gradient) return;
    check_rounded<float>(name + " dweight", dweight.wide(), narrow.dweight, exact.dweight);
    const Wide before = dweight.wide();
    cuda::qk_norm_rope_backward(p);
    CHECK(before == dweight.wide());
}

}  // namespace

TEST(qk_norm_rope_of_every_head_size) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        uint32_t seed = 1;
        for (const int64_t dim : {2, 8, 24, 64, 66, 80, 120, 128, 136, 192, 256})
            for (const int64_t heads : {1, 3})
                check_qk_norm_rope<T>(dtype + " dim " + std::to_string(dim), {5, heads, dim}, seed += 10);
    });
}

TEST(qk_norm_rope_of_every_number_of_heads_and_tokens) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        for (const int64_t dim : {64, 128}) {
            for (const int64_t heads : {2, 4, 5, 8, 9, 16}) check_qk_norm_rope<T>(dtype + " heads", {3, heads, dim}, 3);
            for (const int64_t tokens : {0, 1, 4, 33}) check_qk_norm_rope<T>(dtype + " tokens", {tokens, 2, dim}, 4);
        }
        check_qk_norm_rope<T>(dtype + " many tokens", {2049, 1, 64}, 5);
        check_qk_norm_rope<T>(dtype + " many tokens, any head size", {2049, 1, 8}, 6);
        check_qk_norm_rope<T>(dtype + " misaligned", {3, 2, 128, true, 1}, 7);
        check_qk_norm_rope<T>(dtype + " no weight gradient", {3, 2, 128, false}, 8);
        for (const int64_t dim : {8, 64, 80, 128})
            check_qk_norm_rope<T>(dtype + " no norm", {5, 3, dim, false, 0, false}, 9);
    });
}

TEST(qk_norm_rope_of_a_head_knows_no_other_head) {
    using T = BFloat16;
    for (const int64_t dim : {64, 128, 72}) {
        const int64_t tokens = 5, heads = 3, row = heads * dim;
        Tensor<T> x(random_wide<T>(tokens * row, 1)), weight(random_wide<T>(dim, 2)),
            dy(random_wide<T>(tokens * row, 3));
        Tensor<float> cos(random_wide<float>(tokens * dim / 2, 4)), sin(random_wide<float>(tokens * dim / 2, 5));
        for (int64_t i = 0; i < dim; ++i)
            x[2 * row + dim + i] = dy[2 * row + dim + i] = {0x7fc0};  // a head in the middle
        const auto run = [&](int64_t first, int64_t count, Tensor<T>& y, Tensor<T>& dx) {
            Tensor<float> rstd(count * heads);
            const float *cosines = cos.data() + first * dim / 2, *sines = sin.data() + first * dim / 2;
            cuda::qk_norm_rope_forward({.x = x.data() + first * row,
                                        .weight = weight.data(),
                                        .cos = cosines,
                                        .sin = sines,
                                        .y = y.data(),
                                        .rstd = rstd.data(),
                                        .tokens = count,
                                        .heads = heads,
                                        .head_dim = dim,
                                        .eps = kEps,
                                        .dtype = DType::kBFloat16});
            cuda::qk_norm_rope_backward({.x = x.data() + first * row,
                                         .weight = weight.data(),
                                         .cos = cosines,
                                         .sin = sines,
                                         .rstd = rstd.data(),
                                         .dy = dy.data() + first * row,
                                         .dx = dx.data(),
                                         .dweight = nullptr,
                                         .tokens = count,
                                         .heads = heads,
                                         .head_dim = dim,
                                         .dtype = DType::kBFloat16});
        };
        Tensor<T> y(tokens * row), dx(tokens * row);
        run(0, tokens, y, dx);
        const Wide values = y.wide(), gradients = dx.wide();
        for (int64_t i = 0; i < tokens * row; ++i) {
            const bool broken = i / dim == 2 * heads + 1;
            CHECK(std::isnan(values[i]) == broken && std::isnan(gradients[i]) == broken);
        }
        for (const int64_t token : {0, 3, 4}) {
            Tensor<T> alone_y(row), alone_dx(row);
            run(token, 1, alone_y, alone_dx);
            CHECK(y.same_bits(alone_y, token * row, 0, row) && dx.same_bits(alone_dx, token * row, 0, row));
        }
    }
}

int main() {
    emulator::report_faults();
    return run_all();
}
