// rms_norm, qk_norm_rope and swiglu: the CUDA kernels, executed by the emulator, against the definitions in double.
#include "ops/qk_norm_rope.h"
#include "ops/rms_norm.h"
#include "ops/swiglu.h"
#include "tensor.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

constexpr double kEps = 1e-6;

struct Gradients {
    Wide dx, dweight, other;
};

// rms_norm

struct NormCase {
    int64_t rows, size;
    bool residual = true, weight_gradient = true;
    int64_t offset = 0;
};

template <class A>
void rms_norm_truth(const NormCase& c, const Wide& s, const Wide& w, Wide& y, Wide& rstd) {
    for (int64_t r = 0; r < c.rows; ++r) {
        A squares = 0;
        for (int64_t i = 0; i < c.size; ++i) squares += static_cast<A>(s[r * c.size + i]) * static_cast<A>(s[r * c.size + i]);
        const A inverse = A(1) / std::sqrt(squares / static_cast<A>(c.size) + static_cast<A>(kEps));
        rstd.push_back(inverse);
        for (int64_t i = 0; i < c.size; ++i)
            y.push_back(static_cast<A>(s[r * c.size + i]) * inverse * static_cast<A>(w[static_cast<size_t>(i)]));
    }
}

template <class A>
Gradients rms_norm_backward_truth(const NormCase& c, const Wide& s, const Wide& w, const Wide& rstd, const Wide& dy,
                                  const Wide* dsum) {
    Gradients g;
    std::vector<A> dweight(static_cast<size_t>(c.size));
    for (int64_t r = 0; r < c.rows; ++r) {
        const A inverse = static_cast<A>(rstd[static_cast<size_t>(r)]);
        A along = 0;
        for (int64_t i = 0; i < c.size; ++i) {
            const int64_t at = r * c.size + i;
            const A product = static_cast<A>(dy[at]) * static_cast<A>(s[at]);
            along += product * static_cast<A>(w[i]);
            dweight[i] += product * inverse;
        }
        const A back = along * inverse * inverse / static_cast<A>(c.size);
        for (int64_t i = 0; i < c.size; ++i) {
            const int64_t at = r * c.size + i;
            const A dx = inverse * (static_cast<A>(w[i]) * static_cast<A>(dy[at]) - static_cast<A>(s[at]) * back);
            g.dx.push_back(dsum ? dx + static_cast<A>((*dsum)[at]) : dx);
        }
    }
    g.dweight.assign(dweight.begin(), dweight.end());
    return g;
}

template <class T>
void check_rms_norm(const std::string& name, const NormCase& c, uint32_t seed) {
    const int64_t count = c.rows * c.size;
    Tensor<T> x(random_wide<T>(count, seed), c.offset), residual(random_wide<T>(count, seed + 1), c.offset);
    Tensor<T> weight(random_wide<T>(c.size, seed + 2, 0.3, 1), c.offset), sum(count, c.offset), y(count, c.offset);
    Tensor<float> rstd(c.rows);
    cuda::rms_norm_forward({.x = x.data(),
                            .residual = c.residual ? residual.data() : nullptr,
                            .weight = weight.data(),
                            .sum = c.residual ? sum.data() : nullptr,
                            .y = y.data(),
                            .rstd = rstd.data(),
                            .rows = c.rows,
                            .size = c.size,
                            .eps = kEps,
                            .dtype = dtype_of<T>});
    Wide s = x.wide();
    if (c.residual) {
        const Wide added = residual.wide();
        for (size_t i = 0; i < s.size(); ++i) s[i] = rounded<T>(static_cast<float>(s[i]) + static_cast<float>(added[i]));
        CHECK(sum.wide() == s);
    }
    Wide truth, low, truth_rstd, low_rstd;
    rms_norm_truth<double>(c, s, weight.wide(), truth, truth_rstd);
    rms_norm_truth<float>(c, s, weight.wide(), low, low_rstd);
    check_rounded<T>(name + " y", y.wide(), low, truth);
    check_rounded<float>(name + " rstd", rstd.wide(), low_rstd, truth_rstd);

    Tensor<T> stored(s, c.offset), dy(random_wide<T>(count, seed + 3), c.offset),
        dsum(random_wide<T>(count, seed + 4), c.offset), dx(count, c.offset);
    Tensor<float> dweight(c.size), inverse(truth_rstd);
    RmsNormBackward p{.s = stored.data(),
                      .weight = weight.data(),
                      .rstd = inverse.data(),
                      .dy = dy.data(),
                      .dsum = c.residual ? dsum.data() : nullptr,
                      .dx = dx.data(),
                      .dweight = c.weight_gradient ? dweight.data() : nullptr,
                      .rows = c.rows,
                      .size = c.size,
                      .dtype = dtype_of<T>};
    Tensor<float> scratch(cuda::rms_norm_backward_scratch(p) / 4);
    CHECK(c.weight_gradient || scratch.size() == 0);
    p.scratch = scratch.data();
    cuda::rms_norm_backward(p);
    const Wide more = dsum.wide(), *flows = c.residual ? &more : nullptr, inverses = inverse.wide();
    const Gradients exact = rms_norm_backward_truth<double>(c, s, weight.wide(), inverses, dy.wide(), flows);
    const Gradients narrow = rms_norm_backward_truth<float>(c, s, weight.wide(), inverses, dy.wide(), flows);
    check_rounded<T>(name + " dx", dx.wide(), narrow.dx, exact.dx);
    if (!c.weight_gradient) return;
    check_rounded<float>(name + " dweight", dweight.wide(), narrow.dweight, exact.dweight);
    const Wide before = dweight.wide();
    cuda::rms_norm_backward(p);  // another schedule: the seed moves with each launch
    CHECK(before == dweight.wide());
}

// qk_norm_rope

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
    const Gradients exact =
        qk_norm_rope_backward_truth<double>(c, x.wide(), weight.wide(), cos.wide(), sin.wide(), inverse.wide(), dy.wide());
    const Gradients narrow =
        qk_norm_rope_backward_truth<float>(c, x.wide(), weight.wide(), cos.wide(), sin.wide(), inverse.wide(), dy.wide());
    check_rounded<T>(name + " dx", dx.wide(), narrow.dx, exact.dx);
    if (!c.weight_gradient) return;
    check_rounded<float>(name + " dweight", dweight.wide(), narrow.dweight, exact.dweight);
    const Wide before = dweight.wide();
    cuda::qk_norm_rope_backward(p);
    CHECK(before == dweight.wide());
}

// swiglu

template <class A>
void swiglu_truth(const Wide& gate, const Wide& up, const Wide& dy, Wide& y, Gradients& g) {
    for (size_t i = 0; i < gate.size(); ++i) {
        const A x = static_cast<A>(gate[i]), u = static_cast<A>(up[i]), d = static_cast<A>(dy[i]);
        const A sigmoid = A(1) / (A(1) + std::exp(-x)), silu = x * sigmoid;
        y.push_back(silu * u);
        g.dx.push_back(d * u * (sigmoid + silu * (A(1) - sigmoid)));
        g.other.push_back(d * silu);
    }
}

template <class T>
void check_swiglu(const std::string& name, Wide gates, int64_t offset, uint32_t seed) {
    const auto count = static_cast<int64_t>(gates.size());
    Tensor<T> gate(gates, offset), up(random_wide<T>(count, seed + 1), offset), dy(random_wide<T>(count, seed + 2), offset);
    Tensor<T> y(count, offset), dgate(count, offset), dup(count, offset);
    cuda::swiglu_forward({.gate = gate.data(), .up = up.data(), .y = y.data(), .count = count, .dtype = dtype_of<T>});
    cuda::swiglu_backward({.gate = gate.data(),
                           .up = up.data(),
                           .dy = dy.data(),
                           .dgate = dgate.data(),
                           .dup = dup.data(),
                           .count = count,
                           .dtype = dtype_of<T>});
    Wide truth, low;
    Gradients exact, narrow;
    swiglu_truth<double>(gate.wide(), up.wide(), dy.wide(), truth, exact);
    swiglu_truth<float>(gate.wide(), up.wide(), dy.wide(), low, narrow);
    check_rounded<T>(name + " y", y.wide(), low, truth);
    check_rounded<T>(name + " dgate", dgate.wide(), narrow.dx, exact.dx);
    check_rounded<T>(name + " dup", dup.wide(), narrow.other, exact.other);
}

}  // namespace

TEST(rms_norm_of_every_row_length) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        const int64_t vector = 16 / static_cast<int64_t>(sizeof(T)), warp = 4 * 32 * vector;  // the longest row of one warp
        uint32_t seed = 1;
        for (const int64_t size : {int64_t(1), int64_t(45), vector, 64 - vector, warp - vector, warp, warp + 1, warp + vector,
                                   4 * warp, 4 * warp + vector, 8 * warp, 8 * warp + vector})
            for (const bool residual : {true, false})
                check_rms_norm<T>(dtype + " size " + std::to_string(size), {size > 4 * warp ? 2 : 5, size, residual},
                                  seed += 10);
    });
}

TEST(rms_norm_of_every_number_of_rows) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        for (const int64_t rows : {0, 1, 3, 4, 9, 2049})
            for (const int64_t size : {8, 9}) check_rms_norm<T>(dtype + " rows " + std::to_string(rows), {rows, size}, 7);
        check_rms_norm<T>(dtype + " misaligned", {6, 64, true, true, 1}, 8);
        check_rms_norm<T>(dtype + " no weight gradient", {6, 64, true, false}, 9);
        check_rms_norm<T>(dtype + " no weight gradient, any length", {6, 65, false, false}, 10);
    });
}

TEST(rms_norm_of_a_row_knows_no_other_row) {
    for (const int64_t size : {8, 9, 1024, 2560, 8192}) {
        using T = BFloat16;
        const int64_t rows = 6;
        Tensor<T> x(random_wide<T>(rows * size, 1)), weight(random_wide<T>(size, 2)), dy(random_wide<T>(rows * size, 3));
        for (int64_t i = 0; i < size; ++i) x[2 * size + i] = dy[2 * size + i] = {0x7fc0};
        const auto run = [&](int64_t first, int64_t count, Tensor<T>& y, Tensor<T>& dx) {
            Tensor<T> residual(Wide(static_cast<size_t>(count * size), 0.5)), sum(count * size);
            Tensor<float> rstd(count), dweight(size);
            cuda::rms_norm_forward({.x = x.data() + first * size,
                                    .residual = residual.data(),
                                    .weight = weight.data(),
                                    .sum = sum.data(),
                                    .y = y.data(),
                                    .rstd = rstd.data(),
                                    .rows = count,
                                    .size = size,
                                    .eps = kEps,
                                    .dtype = DType::kBFloat16});
            RmsNormBackward p{.s = sum.data(),
                              .weight = weight.data(),
                              .rstd = rstd.data(),
                              .dy = dy.data() + first * size,
                              .dsum = nullptr,
                              .dx = dx.data(),
                              .dweight = dweight.data(),
                              .rows = count,
                              .size = size,
                              .dtype = DType::kBFloat16};
            Tensor<float> scratch(cuda::rms_norm_backward_scratch(p) / 4);
            p.scratch = scratch.data();
            cuda::rms_norm_backward(p);
        };
        Tensor<T> y(rows * size), dx(rows * size);
        run(0, rows, y, dx);
        for (const int64_t row : {0, 1, 3, 5}) {
            Tensor<T> alone_y(size), alone_dx(size);
            run(row, 1, alone_y, alone_dx);
            CHECK(y.same_bits(alone_y, row * size, 0, size) && dx.same_bits(alone_dx, row * size, 0, size));
            CHECK(alone_y.wide()[0] == alone_y.wide()[0]);
        }
    }
}

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
        for (const int64_t dim : {8, 64, 80, 128}) check_qk_norm_rope<T>(dtype + " no norm", {5, 3, dim, false, 0, false}, 9);
    });
}

TEST(qk_norm_rope_of_a_head_knows_no_other_head) {
    using T = BFloat16;
    for (const int64_t dim : {64, 128, 72}) {
        const int64_t tokens = 5, heads = 3, row = heads * dim;
        Tensor<T> x(random_wide<T>(tokens * row, 1)), weight(random_wide<T>(dim, 2)), dy(random_wide<T>(tokens * row, 3));
        Tensor<float> cos(random_wide<float>(tokens * dim / 2, 4)), sin(random_wide<float>(tokens * dim / 2, 5));
        for (int64_t i = 0; i < dim; ++i) x[2 * row + dim + i] = dy[2 * row + dim + i] = {0x7fc0};  // a head in the middle
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

TEST(swiglu_of_every_length) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        for (const int64_t count : {0, 1, 3, 4, 5, 7, 8, 9, 1023, 1024, 1025, 2047, 2048, 2049, 5000})
            for (const int64_t offset : {0, 1})
                check_swiglu<T>(dtype + " " + std::to_string(count), random_wide<T>(count, 1, 3), offset, 2);
        check_swiglu<T>(dtype + " far out", {-200, -90, -0.0, 0, 90, 200, 1e-5, -1e-5, -20}, 0, 3);
    });
}

int main() {
    emulator::report_faults();
    return run_all();
}
