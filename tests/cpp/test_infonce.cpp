// InfoNCE against the dense formula in double, with gradients by central differences of that formula.
#include "ops/infonce.h"

#include "cpu/isa.h"
#include "testing.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

constexpr int64_t kQueries = 9, kDocuments = 14, kDim = 5;
constexpr double kTemperature = 0.2, kMargin = 0.3;

struct Batch {
    std::vector<double> q, d;
    std::vector<int64_t> positive, owner, ids;
};

Batch make_batch() {
    Batch b{random_values<double>(kQueries * kDim, 1), random_values<double>(kDocuments * kDim, 2), {}, {}, {}};
    const auto unit = [](std::vector<double>& x) {
        for (size_t row = 0; row < x.size(); row += kDim) {
            double norm = 0;
            for (size_t i = 0; i < kDim; ++i) norm += x[row + i] * x[row + i];
            for (size_t i = 0; i < kDim; ++i) x[row + i] /= std::sqrt(norm);
        }
    };
    unit(b.q), unit(b.d);
    for (int64_t i = 0; i < kQueries; ++i) b.positive.push_back(i == 3 ? 2 : i);  // 2 and 3 share a positive
    for (int64_t j = 0; j < kDocuments; ++j) b.owner.push_back(j < kQueries ? j : j == 13 ? -1 : j - kQueries);
    for (int64_t j = 0; j < kDocuments; ++j) b.ids.push_back(j == 12 ? 4 : j);  // 12 is the text of 4
    return b;
}

double dense_loss(const Batch& b) {
    const auto dot = [](const double* x, const double* y) {
        double sum = 0;
        for (int64_t i = 0; i < kDim; ++i) sum += x[i] * y[i];
        return sum;
    };
    double total = 0;
    for (int64_t i = 0; i < kQueries; ++i) {
        const double* q = &b.q[i * kDim];
        const double* p = &b.d[b.positive[i] * kDim];
        const double s = dot(q, p);
        double z = std::exp(s / kTemperature);
        for (int64_t j = 0; j < kDocuments; ++j) {
            if (j == b.positive[i] || b.ids[j] == b.ids[b.positive[i]]) continue;
            const double qd = dot(q, &b.d[j * kDim]);
            if (qd > s + kMargin) continue;  // equation 1 masks both groups of documents by the query's score
            z += std::exp(qd / kTemperature);
            if (b.owner[j] != i) z += std::exp(dot(p, &b.d[j * kDim]) / kTemperature);
        }
        for (int64_t j = 0; j < kQueries; ++j) {
            if (j == i || b.ids[b.positive[j]] == b.ids[b.positive[i]]) continue;
            const double qq = dot(q, &b.q[j * kDim]);
            if (qq <= s + kMargin) z += std::exp(qq / kTemperature);
        }
        total += std::log(z) - s / kTemperature;
    }
    return total / kQueries;
}

std::vector<double> differences(Batch& b, std::vector<double>& x) {
    std::vector<double> gradient(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
        const double here = x[i], step = 1e-6;
        x[i] = here + step;
        const double above = dense_loss(b);
        x[i] = here - step;
        gradient[i] = (above - dense_loss(b)) / (2 * step);
        x[i] = here;
    }
    return gradient;
}

template <class T>
void compare(DType dtype, double tolerance) {
    Batch b = make_batch();
    const double truth = dense_loss(b);
    const std::vector<double> dq_truth = differences(b, b.q), dd_truth = differences(b, b.d);
    const std::vector<T> q(b.q.begin(), b.q.end()), d(b.d.begin(), b.d.end());
    for (const std::string& isa : cpu::available_isas()) {
        cpu::set_isa(isa);
        std::vector<double> loss(kQueries), stats(5);
        std::vector<T> dq(q.size()), dd(d.size());
        cpu::info_nce({.queries = q.data(),
                       .documents = d.data(),
                       .positive = b.positive.data(),
                       .owner = b.owner.data(),
                       .document_ids = b.ids.data(),
                       .loss = loss.data(),
                       .d_queries = dq.data(),
                       .d_documents = dd.data(),
                       .stats = stats.data(),
                       .num_queries = kQueries,
                       .num_documents = kDocuments,
                       .dim = kDim,
                       .hard = true,
                       .in_batch = true,
                       .query_query = true,
                       .doc_doc = true,
                       .margin = kMargin,
                       .doc_mask = DocMask::kQueryDocument,
                       .temperature = kTemperature,
                       .dtype = dtype});
        double mean = 0;
        for (const double value : loss) mean += value / kQueries;
        check_close((isa + " loss").c_str(), std::vector<double>{mean}, std::vector<double>{truth}, tolerance);
        check_close((isa + " dq").c_str(), dq, dq_truth, tolerance);
        check_close((isa + " dd").c_str(), dd, dd_truth, tolerance);
        CHECK(stats[4] > 0);  // the batch does exercise the masks
    }
}

}  // namespace

TEST(float32_equals_the_dense_formula) { compare<float>(DType::kFloat32, 2e-6); }
TEST(float64_equals_the_dense_formula) { compare<double>(DType::kFloat64, 1e-8); }

int main() { return run_all(); }
