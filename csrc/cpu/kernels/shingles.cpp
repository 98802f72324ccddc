// Word n-grams and MinHash. One pass over the bytes; the hash functions of a signature are the lanes of the vectors.
#include "ops/shingles.h"
#include "cpu/kernels/isa.h"
#include "cpu/parallel.h"

namespace qemb::cpu::QEMB_ISA {
namespace {

constexpr int64_t kTextsPerItem = 64;
constexpr uint64_t kFnvStart = 0xCBF29CE484222325u, kFnvPrime = 0x100000001B3u;

enum class Kind : uint8_t { kSeparator, kLetter, kWord };

bool between(uint32_t x, uint32_t first, uint32_t last) { return x - first <= last - first; }

// Scripts without spaces, then punctuation and symbols; everything else beyond ASCII is a letter.
Kind kind_of(uint32_t point) {
    if (between(point, 0x3040, 0x30FF) || between(point, 0x3400, 0x4DBF) || between(point, 0x4E00, 0x9FFF) ||
        between(point, 0x3005, 0x3007) || between(point, 0xF900, 0xFAFF) || between(point, 0x0E00, 0x0EFF) ||
        between(point, 0x1000, 0x109F) || between(point, 0x1780, 0x17FF) || between(point, 0x20000, 0x3FFFF))
        return Kind::kWord;
    if (point < 0xC0) return point == 0xAA || point == 0xB5 || point == 0xBA ? Kind::kLetter : Kind::kSeparator;
    if (point == 0xD7 || point == 0xF7 || between(point, 0x2000, 0x206F) || between(point, 0x20A0, 0x20CF) ||
        between(point, 0x2190, 0x2BFF) || between(point, 0x3000, 0x303F) || between(point, 0xFF00, 0xFF0F) ||
        between(point, 0xFF1A, 0xFF20) || between(point, 0xFF3B, 0xFF40) || between(point, 0xFF5B, 0xFF65) ||
        between(point, 0x1F000, 0x1FAFF))
        return Kind::kSeparator;
    return Kind::kLetter;
}

uint64_t mixed(uint64_t x) {  // the finaliser of splitmix64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

uint32_t mixed(uint32_t x) {  // the finaliser of MurmurHash3
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

// Hashes of the words of [text, end), written to `words`. Returns how many.
int64_t hash_words(const unsigned char* text, const unsigned char* end, uint64_t* words) {
    int64_t count = 0;
    uint64_t hash = kFnvStart;
    bool inside = false;
    const auto close = [&] {
        if (inside) words[count++] = hash;
        hash = kFnvStart, inside = false;
    };
    while (text < end) {
        const unsigned char lead = *text;
        if (lead < 0x80) {
            const unsigned char folded = between(lead, 'A', 'Z') ? lead | 0x20 : lead;
            if (between(folded, 'a', 'z') || between(folded, '0', '9') || folded == '_')
                hash = (hash ^ folded) * kFnvPrime, inside = true;
            else
                close();
            ++text;
            continue;
        }
        const int64_t wanted = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2, left = end - text;
        const int64_t length = wanted < left ? wanted : left;
        uint32_t point = lead & (0xFF >> (wanted + 1));
        for (int64_t i = 1; i < length; ++i) point = point << 6 | (text[i] & 0x3F);
        const Kind kind = kind_of(point);
        if (kind != Kind::kLetter) close();
        if (kind != Kind::kSeparator) {
            for (int64_t i = 0; i < length; ++i) hash = (hash ^ text[i]) * kFnvPrime;
            inside = true;
        }
        if (kind == Kind::kWord) close();
        text += length;
    }
    close();
    return count;
}

// Words become n-grams in place. Returns how many.
int64_t join_words(uint64_t* words, int64_t count, int64_t n) {
    if (count == 0) return 0;
    n = n < count ? n : count;
    uint64_t leaving = 1, rolling = 0;  // the base to the power n
    for (int64_t i = 0; i < n; ++i) {
        leaving *= kShingleBase;
        rolling = rolling * kShingleBase + words[i];
    }
    const int64_t total = count - n + 1;
    for (int64_t i = 0; i < total; ++i) {
        const uint64_t first = words[i];
        words[i] = mixed(rolling);
        if (i + 1 < total) rolling = rolling * kShingleBase + words[i + n] - first * leaving;
    }
    return total;
}

int64_t shingle(const char* text, const int64_t* offsets, int64_t index, int64_t n, uint64_t* out) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(text);
    return join_words(out, hash_words(bytes + offsets[index], bytes + offsets[index + 1], out), n);
}

template <class Function>
void for_texts(int64_t num_texts, Function&& function) {
    parallel_for((num_texts + kTextsPerItem - 1) / kTextsPerItem, [&](int64_t item) {
        const int64_t first = item * kTextsPerItem, last = first + kTextsPerItem;
        for (int64_t index = first; index < (last < num_texts ? last : num_texts); ++index) function(index);
    });
}

void lower(uint32_t* __restrict signature, const uint32_t* __restrict seeds, int64_t count, uint32_t value) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t hash = mixed(value ^ seeds[i]);
        signature[i] = hash < signature[i] ? hash : signature[i];
    }
}

}  // namespace

void shingles(const Shingles& p) {
    for_texts(p.num_texts, [&](int64_t index) {
        p.counts[index] = shingle(p.text, p.offsets, index, p.n, p.hashes + p.offsets[index]);
    });
}

void min_hash(const MinHash& p) {
    uint32_t* seeds =
        static_cast<uint32_t*>(scratch_bytes(Slot::kPanel, sizeof(uint32_t) * static_cast<size_t>(p.num_hashes)));
    for (int64_t i = 0; i < p.num_hashes; ++i) seeds[i] = mixed(static_cast<uint32_t>(i + 1));
    for_texts(p.num_texts, [&](int64_t index) {
        const int64_t bytes = p.offsets[index + 1] - p.offsets[index];
        uint64_t* hashes =
            static_cast<uint64_t*>(scratch_bytes(Slot::kTile, sizeof(uint64_t) * static_cast<size_t>(bytes + 1)));
        const int64_t count = shingle(p.text, p.offsets, index, p.n, hashes);
        uint32_t* signature = p.signatures + index * p.num_hashes;
        for (int64_t i = 0; i < p.num_hashes; ++i) signature[i] = ~0u;
        for (int64_t i = 0; i < count; ++i)
            lower(signature, seeds, p.num_hashes, static_cast<uint32_t>(hashes[i] ^ (hashes[i] >> 32)));
    });
}

}  // namespace qemb::cpu::QEMB_ISA
