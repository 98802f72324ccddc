// Texts as sets of word n-grams: their hashes, and MinHash signatures of the sets. CPU only.
//
// A word is a run of letters, digits and '_' in UTF-8, ASCII letters folded to lower case; of scripts written without
// spaces each character is a word. Its hash is FNV-1a, 64 bits. An n-gram's hash is the polynomial of its words' hashes
// in kShingleBase, mixed; a text of fewer than n words has one n-gram, all of it, and a text without words has none.
#pragma once

#include "common/types.h"

namespace qemb {

constexpr uint64_t kShingleBase = 0x9E3779B97F4A7C15u;

struct Shingles {
    const char* text;        // all texts, one after the other
    const int64_t* offsets;  // [num_texts + 1], in bytes
    uint64_t* hashes;        // of text i from offsets[i] on: there are never more n-grams than bytes
    int64_t* counts;         // [num_texts]
    int64_t num_texts;
    int64_t n;
};

// signatures[t][i] = the least value of hash function i over the n-grams of text t; all ones where it has none.
struct MinHash {
    const char* text;
    const int64_t* offsets;
    uint32_t* signatures;  // [num_texts, num_hashes]
    int64_t num_texts;
    int64_t num_hashes;
    int64_t n;
};

namespace cpu {
void shingles(const Shingles& p);
void min_hash(const MinHash& p);
}  // namespace cpu

}  // namespace qemb
