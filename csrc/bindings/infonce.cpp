// Checks the arguments of InfoNCE and fills its struct by name.
#include "ops/infonce.h"

#include <cmath>

#include "bindings/tensor_view.h"

namespace qemb {
namespace {

constexpr const char* kOp = "info_nce";

// On a GPU the values are not looked at, the host would have to wait. An owner out of range owns nothing there; a positive must
// be in range, the kernels read and write at it.
const int64_t* checked_indices(const Argument& x, int64_t count, int64_t low, int64_t high, const char* of) {
    x.type(ScalarType::kInt64, "int64").shape({count}).contiguous();
    const auto* values = static_cast<const int64_t*>(x->data);
    for (int64_t i = 0; x->device < 0 && i < count; ++i)
        QEMB_CHECK(values[i] >= low && values[i] < high, "[", kOp, "] ", x.name, " must be from ", low, " to ", high - 1, " (",
                   of, "), got ", values[i], " at ", i);
    return values;
}

void info_nce(py::handle queries, py::handle documents, py::handle positive, py::handle owner, py::handle document_ids,
              py::handle loss, py::handle stats, py::handle d_queries, py::handle d_documents, bool hard, bool in_batch,
              bool query_query, bool doc_doc, double margin, int doc_mask, double temperature) {
    Call call(kOp);
    const Argument q(call, "queries", queries), d(call, "documents", documents), pos(call, "positive", positive),
        l(call, "loss", loss), totals(call, "stats", stats);
    q.rank(2, "[num_queries, dim]").floating().contiguous();
    d.rank(2, "[num_documents, dim]").floating().like(q).contiguous();
    QEMB_CHECK(q->size(1) == d->size(1), "[", kOp, "] queries and documents must share their dimension, got ", q->size(1),
               " and ", d->size(1));
    QEMB_CHECK(std::isfinite(temperature) && temperature > 0, "[", kOp, "] temperature must be positive and finite, got ",
               temperature);
    QEMB_CHECK(!std::isnan(margin), "[", kOp, "] margin must be a number, got nan");
    const int64_t num_queries = q->size(0), num_documents = d->size(0);
    const int64_t* positives = checked_indices(pos, num_queries, 0, num_documents, "an index of documents");
    const int64_t* owners = nullptr;
    const int64_t* ids = nullptr;
    if (!owner.is_none())
        owners = checked_indices(Argument(call, "owner", owner), num_documents, -1, num_queries, "an index of queries, or -1");
    if (!document_ids.is_none()) {
        const Argument x(call, "document_ids", document_ids);
        x.type(ScalarType::kInt64, "int64").shape({num_documents}).contiguous();
        ids = static_cast<const int64_t*>(x->data);
    }
    l.shape({num_queries}).type(ScalarType::kFloat64, "float64").contiguous();
    totals.shape({5}).type(ScalarType::kFloat64, "float64").contiguous();
    void *dq = nullptr, *dd = nullptr;
    if (!d_queries.is_none()) {
        const Argument gq(call, "d_queries", d_queries), gd(call, "d_documents", d_documents);
        gq.shape({num_queries, q->size(1)}).type(q.arithmetic(), "the arithmetic type").contiguous();
        gd.shape({num_documents, q->size(1)}).type(q.arithmetic(), "the arithmetic type").contiguous();
        dq = gq->data;
        dd = gd->data;
    }
    InfoNce p{
        .queries = q->data,
        .documents = d->data,
        .positive = positives,
        .owner = owners,
        .document_ids = ids,
        .loss = l->data,
        .d_queries = dq,
        .d_documents = dd,
        .stats = static_cast<double*>(totals->data),
        .num_queries = num_queries,
        .num_documents = num_documents,
        .dim = q->size(1),
        .hard = hard,
        .in_batch = in_batch,
        .query_query = query_query,
        .doc_doc = doc_doc,
        .margin = margin,
        .doc_mask = static_cast<DocMask>(doc_mask),
        .temperature = temperature,
        .dtype = q->dtype(),
    };
    call.run(p, cpu::info_nce, cuda::info_nce, cuda::info_nce_scratch);
}

}  // namespace

void bind_infonce(py::module_& m) { m.def("info_nce", &info_nce); }

}  // namespace qemb
