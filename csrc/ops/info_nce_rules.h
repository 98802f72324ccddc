// The rules of InfoNCE, said once: the table of the groups, and what follows from the options. Both backends, the
// bindings and the tests read them from here.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace qemb {

// Columns that row i, of query q_i with positive p, is scored against: q_i . d_j, q_i . q_j, p . d_j.
enum Kind : int { kQueryDocument, kQueries, kDocDoc, kNumKinds };

// What a document is to queries that do not own it. kAbsent: to none of them a candidate, nor to its owner.
enum class Role : uint8_t { kHard, kPositive, kAbsent };

// Softmaxes of a row, each over the positive and its own part of the groups. Joint: one, over all. Split: four, as the
// table says. One without a group that is on adds nothing.
constexpr int kMaxSoftmaxes = 4;

// The groups of candidates of row i. Owned: owner[j] = i. The others: owner[j] != i, of that role (of queries: j != i).
// The positive itself is in none of them.
//    group, name, kind, owned, role, softmax where they are split
#define QEMB_INFO_NCE_GROUPS(GROUP) \
    GROUP(kOwnHard, "own_hard", kQueryDocument, true, Role::kHard, 0) \
    GROUP(kBatchPositive, "batch_positive", kQueryDocument, false, Role::kPositive, 1) \
    GROUP(kBatchHard, "batch_hard", kQueryDocument, false, Role::kHard, 1) \
    GROUP(kQueryQuery, "query_query", kQueries, false, Role::kPositive, 2) \
    GROUP(kDocOwn, "doc_own", kDocDoc, true, Role::kHard, 3) \
    GROUP(kDocPositive, "doc_positive", kDocDoc, false, Role::kPositive, 3) \
    GROUP(kDocHard, "doc_hard", kDocDoc, false, Role::kHard, 3)

#define QEMB_GROUP_ENUM(group, name, kind, owned, role, softmax) group,
enum InfoNceGroup : int { QEMB_INFO_NCE_GROUPS(QEMB_GROUP_ENUM) kNumGroups };
#undef QEMB_GROUP_ENUM

struct GroupRow {
    const char* name;
    Kind kind;
    bool owned;
    Role role;
    int softmax;
};
#define QEMB_GROUP_ROW(group, name, kind, owned, role, softmax) {name, kind, owned, role, softmax},
constexpr GroupRow kGroupTable[kNumGroups] = {QEMB_INFO_NCE_GROUPS(QEMB_GROUP_ROW)};
#undef QEMB_GROUP_ROW

// Which score is held against the row's limit: none, the candidate's own, or for p . d_j that of q_i . d_j.
enum class ScoreMask : int { kNone, kOwn, kQueryDocument };
constexpr const char* kMaskNames[] = {"none", "own", "query_document"};

// How a group takes part. A candidate is dropped when the score that its mask names exceeds s + margin (relative: s +
// margin * |s|), s the positive's score, or when its text equals the positive's. Its logit is score / temperature +
// hardness * score, the second part a constant to the gradient.
struct Group {
    bool on;
    ScoreMask mask;
    bool relative;
    double margin;
    double hardness;
};

struct InfoNceOptions {
    Group groups[kNumGroups];
    bool split;
    double temperature;
    double focal;  // a softmax adds (1 - P)^focal * -log P to its row, P the share of the positive
    double scale;  // of the gradients: 1 / num_queries for the mean loss
};

// The group of a candidate that its row does not own, and of one that it owns: side 0 with the query, 1 with the
// positive.
QEMB_HOST_DEVICE constexpr int group_of(Kind kind, Role role) {
    return kind == kQueries ? kQueryQuery : (kind == kDocDoc ? kDocPositive : kBatchPositive) + (role == Role::kHard);
}
QEMB_HOST_DEVICE constexpr int group_of_owned(int side) { return side ? kDocOwn : kOwnHard; }

// The anchor that a kind of columns is scored against: 0 the query, 1 the positive.
QEMB_HOST_DEVICE constexpr int side_of(Kind kind) { return kind == kDocDoc ? 1 : 0; }

// The softmax of candidates that their row does not own, and of those that it owns.
QEMB_HOST_DEVICE constexpr int softmax_of(bool split, Kind kind) { return split ? kind + 1 : 0; }
QEMB_HOST_DEVICE constexpr int softmax_of_owned(bool split, int side) { return split && side ? kMaxSoftmaxes - 1 : 0; }

constexpr bool table_agrees() {
    for (int group = 0; group < kNumGroups; ++group) {
        const GroupRow& row = kGroupTable[group];
        const int side = side_of(row.kind);
        if (group != (row.owned ? group_of_owned(side) : group_of(row.kind, row.role))) return false;
        if (row.softmax != (row.owned ? softmax_of_owned(true, side) : softmax_of(true, row.kind))) return false;
    }
    return true;
}
static_assert(table_agrees(), "a row of the table of groups is not what the functions beside it say");

// What follows from the options for every row.
struct GroupRules {
    bool split = false;
    bool dense[kNumKinds] = {};  // kinds of columns that hold candidates
    bool by_query = false;       // candidates of p . d are masked by q . d, which is then scored for that too
    bool owns = false;           // candidates among what rows own
    int sides = 1;               // anchors: the query, and the positive where it has candidates
    bool softmax_is_on[kMaxSoftmaxes] = {};  // has a group that is on; a joint one counts even without
    double logit_scale[kNumGroups] = {};     // a logit in log2 units is this times the score

    QEMB_HOST_DEVICE int num_softmaxes() const { return split ? kMaxSoftmaxes : 1; }
    QEMB_HOST_DEVICE int softmax_of(Kind kind) const { return qemb::softmax_of(split, kind); }
    QEMB_HOST_DEVICE int softmax_of_owned(int side) const { return qemb::softmax_of_owned(split, side); }
};

struct LogUnits {
    static constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
};

QEMB_INLINE GroupRules rules_of(const InfoNceOptions& options) {
    GroupRules rules;
    rules.split = options.split;
    rules.softmax_is_on[0] = !options.split;
    for (int group = 0; group < kNumGroups; ++group) {
        const Group& given = options.groups[group];
        const GroupRow& row = kGroupTable[group];
        rules.logit_scale[group] = LogUnits::kLog2E * (1 / options.temperature + given.hardness);
        if (!given.on) continue;
        (row.owned ? rules.owns : rules.dense[row.kind]) = true;
        const int side = side_of(row.kind);
        if (side > 0) rules.sides = 2;
        if (side > 0 && !row.owned && given.mask == ScoreMask::kQueryDocument) rules.by_query = true;
        rules.softmax_is_on[options.split ? row.softmax : 0] = true;
    }
    return rules;
}

// Whether a document is a candidate of a row at all.
QEMB_HOST_DEVICE bool is_candidate(int64_t document, int64_t positive, Role role) {
    return document != positive && role != Role::kAbsent;
}

// The largest score that a group lets pass, for a positive's score of s; and the same in parts: s + add + relative *
// |s|.
QEMB_HOST_DEVICE double limit_of(const Group& group, double s) {
    if (group.mask == ScoreMask::kNone) return __builtin_inf();
    return s + group.margin * (group.relative ? QEMB_MATH(fabs)(s) : 1.0);
}
struct LimitParts {
    double add, relative;
};
QEMB_HOST_DEVICE LimitParts limit_parts(const Group& group) {
    if (group.mask == ScoreMask::kNone) return {__builtin_inf(), 0};
    return group.relative ? LimitParts{0, group.margin} : LimitParts{group.margin, 0};
}

// The score that is held against the limit: for p . d_j that may be the one of q_i . d_j.
QEMB_HOST_DEVICE bool is_by_query(const Group& group) { return group.mask == ScoreMask::kQueryDocument; }
QEMB_HOST_DEVICE double held_score(const Group& group, double own, double of_query) {
    return is_by_query(group) ? of_query : own;
}

// What a softmax adds to its row, from the sum of its candidates' weights 2^(logit - offset) and the positive's logit -
// offset, in log2 units. `slope`: the derivative of the loss by that of focal = 0.
struct SoftmaxLoss {
    double value;   // -log P
    double factor;  // (1 - P)^focal, times which it counts
    double slope;
    double left;   // 1 - P, as a quotient: 1 - P would cancel
    double total;  // of all weights, the positive's included
};
QEMB_HOST_DEVICE SoftmaxLoss softmax_loss(double candidates, double gap, double focal) {
    const double positive = QEMB_MATH(exp2)(gap);
    const double total = candidates + positive, left = candidates / total;
    const double value =
        gap > -900 ? QEMB_MATH(log1p)(candidates / positive) : QEMB_MATH(log)(candidates) - gap * LogUnits::kLn2;
    double factor = 1, slope = 1;
    if (focal > 0) {
        factor = QEMB_MATH(pow)(left, focal);
        slope = left > 0 ? factor * (1 + focal * (positive / total) * value / left) : 0;
    }
    return {value, factor, slope, left, total};
}

}  // namespace qemb
