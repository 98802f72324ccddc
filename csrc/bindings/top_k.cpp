// Checks the arguments of top-k search and fills its struct by name.
#include "ops/top_k.h"

#include "bindings/module.h"

namespace qemb {
namespace {

constexpr const char* kOp = "top_k";

void top_k(py::handle queries, py::handle documents, py::handle exclude, py::handle ceiling, py::handle scores,
           py::handle indices) {
    Call call(kOp);
    const Argument q(call, "queries", queries), d(call, "documents", documents), s(call, "scores", scores),
        i(call, "indices", indices);
    q.rank(2, "[num_queries, dim]").floating().contiguous();
    d.rank(2, "[num_documents, dim]").floating().like(q).contiguous();
    QEMB_CHECK(q->size(1) == d->size(1), "[", kOp, "] queries and documents must share their dimension, got ",
               q->size(1), " and ", d->size(1));
    QEMB_CHECK(d->size(0) < (int64_t{1} << 32), "[", kOp, "] documents must number fewer than 2^32, got ", d->size(0));
    s.rank(2, "[num_queries, k]").type(ScalarType::kFloat32, "float32").contiguous();
    i.shape({q->size(0), s->size(1)}).type(ScalarType::kInt64, "int64").contiguous();
    s.shape({q->size(0), s->size(1)});
    TopK p{
        .queries = q->data,
        .documents = d->data,
        .exclude = nullptr,
        .ceiling = nullptr,
        .scores = static_cast<float*>(s->data),
        .indices = static_cast<int64_t*>(i->data),
        .num_queries = q->size(0),
        .num_documents = d->size(0),
        .num_exclude = 0,
        .dim = q->size(1),
        .k = s->size(1),
        .dtype = q->dtype(),
    };
    if (!exclude.is_none()) {
        const Argument x(call, "exclude", exclude);
        x.rank(2, "[num_queries, num_excluded]").type(ScalarType::kInt64, "int64").contiguous();
        x.shape({q->size(0), x->size(1)}, " (a row for each of queries)");
        for (int64_t at = 0; !call.cuda() && at < x->size(0) * x->size(1); ++at) {
            const int64_t value = static_cast<const int64_t*>(x->data)[at];
            QEMB_CHECK(value >= -1 && value < d->size(0), "[", kOp, "] exclude must be from -1 to ", d->size(0) - 1,
                       " (an index of documents, or -1), got ", value);
        }
        p.exclude = static_cast<const int64_t*>(x->data);
        p.num_exclude = x->size(1);
    }
    if (!ceiling.is_none()) {
        const Argument x(call, "ceiling", ceiling);
        x.type(ScalarType::kFloat32, "float32").shape({q->size(0)}, " (one for each of queries)").contiguous();
        p.ceiling = static_cast<const float*>(x->data);
    }
    call.run(p, cpu::top_k, cuda::top_k, cuda::top_k_scratch);
}

}  // namespace

void bind_top_k(py::module_& m) { m.def("top_k", &top_k); }

}  // namespace qemb
