// Checks the arguments of InfoNCE and fills its struct by name.
#include "ops/info_nce.h"

#include <cmath>
#include <iterator>
#include <numeric>
#include <optional>

#include "bindings/module.h"

namespace qemb {
namespace {

constexpr const char* kOp = "info_nce";

// On a GPU the values are not looked at, the host would have to wait: the kernels do it.
const int64_t* checked_indices(const Argument& x, int64_t count, int64_t low, int64_t high, const char* of,
                               const char* why = "") {
    x.type(ScalarType::kInt64, "int64").shape({count}, why).contiguous();
    const auto* values = static_cast<const int64_t*>(x->data);
    for (int64_t i = 0; x->device < 0 && i < count; ++i)
        QEMB_CHECK(values[i] >= low && values[i] < high, "[", kOp, "] ", x.name, " must be from ", low, " to ",
                   high - 1, " (", of, "), got ", values[i], " at ", i);
    return values;
}

void checked_vectors(const Argument& q, const Argument& d) {
    q.rank(2, "[num_queries, dim]").floating().contiguous();
    d.rank(2, "[num_documents, dim]").floating().like(q).contiguous();
    QEMB_CHECK(q->size(1) == d->size(1), "[", kOp, "] queries and documents must share their dimension, got ",
               q->size(1), " and ", d->size(1));
}

// What is left out, for the CPU: the kernels of CUDA derive it on the device.
struct Derived {
    std::vector<int64_t> query_text, document_text, owner, own_starts;
    std::vector<uint8_t> role;

    explicit Derived(InfoNce& p) {
        const auto queries = static_cast<size_t>(p.num_queries), documents = static_cast<size_t>(p.num_documents);
        if (!p.document_text) {
            document_text.resize(documents);
            std::iota(document_text.begin(), document_text.end(), 0);
            p.document_text = document_text.data();
        }
        if (!p.role) {
            role.assign(documents, static_cast<uint8_t>(Role::kHard));
            for (size_t i = 0; i < queries; ++i) {
                role[static_cast<size_t>(p.positive[i])] = static_cast<uint8_t>(Role::kPositive);
                query_text.push_back(p.document_text[p.positive[i]]);
            }
            p.role = role.data();
            p.query_text = query_text.data();
        }
        if (!p.owner) {
            owner.assign(documents, -1);
            own_starts.assign(queries + 1, 0);
            p.owner = owner.data();
            p.own_starts = own_starts.data();
        }
    }
};

// What the caller gave, before anything is made of it.
void check_info_nce(py::handle queries, py::handle documents, py::handle positive, py::handle owner,
                    py::handle document_ids) {
    Call call(kOp);
    const Argument q(call, "queries", queries), d(call, "documents", documents), pos(call, "positive", positive);
    checked_vectors(q, d);
    const int64_t num_queries = q->size(0), num_documents = d->size(0);
    QEMB_CHECK(num_queries > 0, "[", kOp, "] queries must hold at least one query, got shape ", q->shape_text());
    QEMB_CHECK(num_documents > 0, "[", kOp, "] documents must hold at least one document, got shape ", d->shape_text());
    checked_indices(pos, num_queries, 0, num_documents, "an index of documents: each query has a positive",
                    " (one for each of queries)");
    if (!owner.is_none())
        checked_indices(Argument(call, "owner", owner), num_documents, -1, num_queries, "an index of queries, or -1",
                        " (one for each of documents)");
    if (!document_ids.is_none())
        Argument(call, "document_ids", document_ids)
            .type(ScalarType::kInt64, "int64")
            .shape({num_documents}, " (one for each of documents)");
}

// Where a name stands among `count` names.
template <class NameAt>
int index_in(const char* what, const std::string& name, int count, const NameAt& name_at) {
    for (int i = 0; i < count; ++i)
        if (name == name_at(i)) return i;
    std::string known;
    for (int i = 0; i < count; ++i) known += (i ? ", " : "") + std::string(name_at(i));
    QEMB_CHECK(false, "[", kOp, "] ", what, " must be one of ", known, ", got '", name, "'");
    return -1;
}

const char* group_name(int group) { return kGroupTable[group].name; }
const char* mask_name(int mask) { return kMaskNames[mask]; }

// Options without a group that is on.
InfoNceOptions make_options(double temperature, bool split, double focal, double scale) {
    QEMB_CHECK(std::isfinite(temperature) && temperature > 0, "[", kOp,
               "] temperature must be positive and finite, got ", temperature);
    QEMB_CHECK(std::isfinite(focal) && focal >= 0, "[", kOp, "] focal must be finite and at least 0, got ", focal);
    return {.groups = {}, .split = split, .temperature = temperature, .focal = focal, .scale = scale};
}

void turn_on(InfoNceOptions& options, const std::string& group, const std::string& mask, double margin, bool relative,
             double hardness) {
    QEMB_CHECK(!std::isnan(margin), "[", kOp, "] margin must be a number, got nan");
    QEMB_CHECK(std::isfinite(hardness), "[", kOp, "] hardness must be finite, got ", hardness);
    const int place = index_in("group", group, kNumGroups, group_name);
    const int which = index_in("mask", mask, static_cast<int>(std::size(kMaskNames)), mask_name);
    options.groups[place] = {true, static_cast<ScoreMask>(which), relative, margin, hardness};
}

void info_nce(const InfoNceOptions& options, py::handle queries, py::handle documents, py::handle positive,
              py::handle query_text, py::handle document_text, py::handle role, py::handle owner, py::handle own_starts,
              py::handle own_documents, int64_t first_row, int64_t num_rows, int64_t first_column,
              const std::vector<int64_t>& dims, const std::vector<double>& dim_weights, py::handle loss,
              py::handle stats, py::handle d_queries, py::handle d_documents, py::handle d_temperature,
              py::handle log_negatives, bool log_negatives_given, bool adds_positive) {
    Call call(kOp);
    const Argument q(call, "queries", queries), d(call, "documents", documents), pos(call, "positive", positive),
        l(call, "loss", loss), totals(call, "stats", stats);
    checked_vectors(q, d);
    const int64_t num_queries = q->size(0), num_documents = d->size(0);
    QEMB_CHECK(first_row >= 0 && num_rows >= 0 && first_row + num_rows <= num_queries, "[", kOp,
               "] rows must lie in 0 to ", num_queries, ", got ", first_row, " to ", first_row + num_rows);
    QEMB_CHECK(dims.size() == dim_weights.size(), "[", kOp, "] a weight for each of ", dims.size(), " dims, got ",
               dim_weights.size());
    QEMB_CHECK(!call.cuda() || dims.size() <= kMaxPrefixes, "[", kOp, "] at most ", kMaxPrefixes, " dims on CUDA, got ",
               dims.size());
    const auto given = [&](const char* name, py::handle object, int64_t count, ScalarType type, const char* type_name) {
        if (object.is_none()) return static_cast<const void*>(nullptr);
        const Argument x(call, name, object);
        return static_cast<const void*>(x.type(type, type_name).shape({count}).contiguous()->data);
    };
    const auto integers = [&](const char* name, py::handle object, int64_t count) {
        return static_cast<const int64_t*>(given(name, object, count, ScalarType::kInt64, "int64"));
    };
    const auto doubles = [&](const Argument& x, std::initializer_list<int64_t> shape) {
        return static_cast<double*>(x.shape(shape).type(ScalarType::kFloat64, "float64").contiguous()->data);
    };
    InfoNce p{
        .queries = q->data,
        .documents = d->data,
        .positive = checked_indices(pos, num_queries, 0, num_documents, "an index of documents"),
        .query_text = integers("query_text", query_text, num_queries),
        .document_text = integers("document_text", document_text, num_documents),
        .role = static_cast<const uint8_t*>(given("role", role, num_documents, ScalarType::kUInt8, "uint8")),
        .owner = integers("owner", owner, num_documents),
        .own_starts = integers("own_starts", own_starts, num_queries + 1),
        .own_documents = integers("own_documents", own_documents, num_documents),
        .num_queries = num_queries,
        .num_documents = num_documents,
        .dim = q->size(1),
        .first_row = first_row,
        .num_rows = num_rows,
        .first_column = first_column,
        .options = options,
        .dims = dims.data(),
        .dim_weights = dim_weights.data(),
        .num_dims = static_cast<int64_t>(dims.size()),
        .loss = doubles(l, {num_rows}),
        .d_queries = optional_gradient(call, "d_queries", d_queries, {q->size(0), q->size(1)}, q),
        .d_documents = optional_gradient(call, "d_documents", d_documents, {d->size(0), d->size(1)}, d),
        .d_temperature =
            d_temperature.is_none() ? nullptr : doubles(Argument(call, "d_temperature", d_temperature), {1}),
        .stats = doubles(totals, {5}),
        .log_negatives = log_negatives.is_none()
                             ? nullptr
                             : doubles(Argument(call, "log_negatives", log_negatives), {num_rows, kMaxSoftmaxes}),
        .log_negatives_given = log_negatives_given,
        .adds_positive = adds_positive,
        .dtype = q->dtype(),
    };
    std::optional<Derived> derived;
    if (!call.cuda()) derived.emplace(p);
    call.run(p, cpu::info_nce, cuda::info_nce, cuda::info_nce_scratch);
}

}  // namespace

void bind_info_nce(py::module_& m) {
    using py::arg;
    py::class_<InfoNceOptions>(m, "InfoNceOptions")
        .def(py::init(&make_options), py::kw_only(), arg("temperature"), arg("split"), arg("focal"), arg("scale"))
        .def("turn_on", &turn_on, arg("group"), py::kw_only(), arg("mask"), arg("margin"), arg("relative"),
             arg("hardness"));
    m.def("check_info_nce", &check_info_nce);
    m.def("info_nce", &info_nce, arg("options"), py::kw_only(), arg("queries"), arg("documents"), arg("positive"),
          arg("query_text"), arg("document_text"), arg("role"), arg("owner"), arg("own_starts"), arg("own_documents"),
          arg("first_row"), arg("num_rows"), arg("first_column"), arg("dims"), arg("dim_weights"), arg("loss"),
          arg("stats"), arg("d_queries"), arg("d_documents"), arg("d_temperature"), arg("log_negatives"),
          arg("log_negatives_given"), arg("adds_positive"));
    py::tuple groups(static_cast<py::ssize_t>(kNumGroups));
    for (int group = 0; group < kNumGroups; ++group) groups[group] = group_name(group);
    m.attr("INFO_NCE_GROUPS") = groups;
    m.attr("MAX_SOFTMAXES") = kMaxSoftmaxes;
    m.attr("MAX_PREFIXES") = kMaxPrefixes;
}

}  // namespace qemb
