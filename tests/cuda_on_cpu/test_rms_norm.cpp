// rms_norm: the CUDA kernels, executed by the emulator, against the definition in double.
#include "ops/rms_norm.h"

#include "norm_truth.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

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
        for (size_t i = 0; i < s.size(); ++i)
            s[i] = rounded<T>(static_cast<float>(s[i]) + static_cast<float>(added[i]));
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

}  // namespace

TEST(rms_norm_of_every_row_length) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        const int64_t vector = 16 / static_cast<int64_t>(sizeof(T)),
                      warp = 4 * 32 * vector;  // the longest row of one warp
        uint32_t seed = 1;
        for (const int64_t size : {int64_t(1), int64_t(45), vector, 64 - vector, warp - vector, warp, warp + 1,
                                   warp + vector, 4 * warp, 4 * warp + vector, 8 * warp, 8 * warp + vector})
            for (const bool residual : {true, false})
                check_rms_norm<T>(dtype + " size " + std::to_string(size), {size > 4 * warp ? 2 : 5, size, residual},
                                  seed += 10);
    });
}

TEST(rms_norm_of_every_number_of_rows) {
    for_each_dtype([]<class T>(const std::string& dtype) {
        for (const int64_t rows : {0, 1, 3, 4, 9, 2049})
            for (const int64_t size : {8, 9})
                check_rms_norm<T>(dtype + " rows " + std::to_string(rows), {rows, size}, 7);
        check_rms_norm<T>(dtype + " misaligned", {6, 64, true, true, 1}, 8);
        check_rms_norm<T>(dtype + " no weight gradient", {6, 64, true, false}, 9);
        check_rms_norm<T>(dtype + " no weight gradient, any length", {6, 65, false, false}, 10);
    });
}

TEST(rms_norm_of_a_row_knows_no_other_row) {
    for (const int64_t size : {8, 9, 1024, 2560, 8192}) {
        using T = BFloat16;
        const int64_t rows = 6;
        Tensor<T> x(random_wide<T>(rows * size, 1)), weight(random_wide<T>(size, 2)),
            dy(random_wide<T>(rows * size, 3));
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

int main() {
    emulator::report_faults();
    return run_all();
}
