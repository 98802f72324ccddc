// swiglu: the CUDA kernels, executed by the emulator, against the definition in double.
#include "ops/swiglu.h"

#include "tensor.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

struct Gradients {
    Wide dx, dweight, other;
};

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
    Tensor<T> gate(gates, offset), up(random_wide<T>(count, seed + 1), offset),
        dy(random_wide<T>(count, seed + 2), offset);
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
