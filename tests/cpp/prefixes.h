// Prefixes of vectors, normalised again, and their gradients brought back to the vectors: Matryoshka by definition.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace qemb::testing {

// The first `dim` of `width` elements of each row, over their norm; or, where nothing is cut, the rows as they are.
struct Prefix {
    int64_t dim, width;
    bool is_cut;
    std::vector<double> unit{}, norms{};

    template <class Store>
    Prefix(const std::vector<double>& rows, int64_t dim, int64_t width, bool is_cut, const Store& store)
        : dim(dim), width(width), is_cut(is_cut) {
        for (size_t row = 0; row < rows.size(); row += static_cast<size_t>(width)) {
            double squares = 0;
            for (int64_t i = 0; i < dim; ++i) squares += rows[row + i] * rows[row + i];
            norms.push_back(is_cut ? std::max(std::sqrt(squares), 1e-12) : 1);
            for (int64_t i = 0; i < dim; ++i) unit.push_back(store(rows[row + i] / norms.back()));
        }
    }
    // to [rows, width] += share times the gradient with regard to the rows, of one with regard to `unit`.
    void add_gradient(const std::vector<double>& gradient, double share, std::vector<double>& to) const {
        for (size_t row = 0; row < norms.size(); ++row) {
            const double *u = &unit[row * dim], *g = &gradient[row * dim];
            double radial_grad = 0;
            for (int64_t i = 0; i < dim && is_cut; ++i) radial_grad += g[i] * u[i];
            for (int64_t i = 0; i < dim; ++i) to[row * width + i] += share * (g[i] - radial_grad * u[i]) / norms[row];
        }
    }
};

}  // namespace qemb::testing
