// RMSNorm and its gradients by definition: rms_norm's own, and those of the heads of qk_norm_rope.
#pragma once

#include "tensor.h"

namespace qemb::testing {

constexpr double kEps = 1e-6;

struct Gradients {
    Wide dx, dweight, other;
};

struct NormCase {
    int64_t rows, size;
    bool residual = true, weight_gradient = true;
    int64_t offset = 0;
};

template <class A>
void rms_norm_truth(const NormCase& c, const Wide& s, const Wide& w, Wide& y, Wide& rstd) {
    for (int64_t r = 0; r < c.rows; ++r) {
        A squares = 0;
        for (int64_t i = 0; i < c.size; ++i)
            squares += static_cast<A>(s[r * c.size + i]) * static_cast<A>(s[r * c.size + i]);
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
        A radial_grad = 0;
        for (int64_t i = 0; i < c.size; ++i) {
            const int64_t at = r * c.size + i;
            const A product = static_cast<A>(dy[at]) * static_cast<A>(s[at]);
            radial_grad += product * static_cast<A>(w[i]);
            dweight[i] += product * inverse;
        }
        const A back = radial_grad * inverse * inverse / static_cast<A>(c.size);
        for (int64_t i = 0; i < c.size; ++i) {
            const int64_t at = r * c.size + i;
            const A dx = inverse * (static_cast<A>(w[i]) * static_cast<A>(dy[at]) - static_cast<A>(s[at]) * back);
            g.dx.push_back(dsum ? dx + static_cast<A>((*dsum)[at]) : dx);
        }
    }
    g.dweight.assign(dweight.begin(), dweight.end());
    return g;
}

}  // namespace qemb::testing
