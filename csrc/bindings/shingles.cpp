// Checks the arguments of word n-grams and MinHash and fills their structs by name.
#include "ops/shingles.h"

#include "bindings/module.h"

namespace qemb {
namespace {

struct Texts {
    Argument text, offsets;

    Texts(Call& call, py::handle text_, py::handle offsets_)
        : text(call, "text", text_), offsets(call, "offsets", offsets_) {
        text.rank(1, "[bytes]").type(ScalarType::kUInt8, "uint8").contiguous();
        offsets.rank(1, "[num_texts + 1]").type(ScalarType::kInt64, "int64").contiguous();
        QEMB_CHECK(!call.cuda(), "[", call.op, "] texts must be on the CPU");
        QEMB_CHECK(offsets->size(0) >= 1, "[", call.op, "] offsets must hold the end of each text after a 0, got none");
        const int64_t* at = starts();
        bool rising = at[0] == 0 && at[count()] == text->size(0);
        for (int64_t i = 0; i < count(); ++i) rising = rising && at[i] <= at[i + 1];
        QEMB_CHECK(rising, "[", call.op, "] offsets must rise from 0 to the number of bytes, ", text->size(0));
    }
    int64_t count() const { return offsets->size(0) - 1; }
    const int64_t* starts() const { return static_cast<const int64_t*>(offsets->data); }
    const char* bytes() const { return static_cast<const char*>(text->data); }
};

void shingles(py::handle text, py::handle offsets, py::handle hashes, py::handle counts, int64_t n) {
    Call call("shingles");
    const Texts texts(call, text, offsets);
    const Argument h(call, "hashes", hashes), c(call, "counts", counts);
    QEMB_CHECK(n >= 1, "[shingles] n must be at least 1, got ", n);
    h.type(ScalarType::kInt64, "int64").shape({texts.text->size(0)}).contiguous();
    c.type(ScalarType::kInt64, "int64").shape({texts.count()}).contiguous();
    const Shingles p{
        .text = texts.bytes(),
        .offsets = texts.starts(),
        .hashes = static_cast<uint64_t*>(h->data),
        .counts = static_cast<int64_t*>(c->data),
        .num_texts = texts.count(),
        .n = n,
    };
    const py::gil_scoped_release unlocked;
    cpu::shingles(p);
}

void min_hash(py::handle text, py::handle offsets, py::handle signatures, int64_t n) {
    Call call("min_hash");
    const Texts texts(call, text, offsets);
    const Argument s(call, "signatures", signatures);
    QEMB_CHECK(n >= 1, "[min_hash] n must be at least 1, got ", n);
    s.rank(2, "[num_texts, num_hashes]").type(ScalarType::kInt32, "int32").contiguous();
    s.shape({texts.count(), s->size(1)});
    const MinHash p{
        .text = texts.bytes(),
        .offsets = texts.starts(),
        .signatures = static_cast<uint32_t*>(s->data),
        .num_texts = texts.count(),
        .num_hashes = s->size(1),
        .n = n,
    };
    const py::gil_scoped_release unlocked;
    cpu::min_hash(p);
}

}  // namespace

void bind_shingles(py::module_& m) {
    m.def("shingles", &shingles);
    m.def("min_hash", &min_hash);
}

}  // namespace qemb
