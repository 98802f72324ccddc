// The rules of InfoNCE, spelled out: what the kernels and the other tests read from the table is what the method says.
#include <cstring>
#include <string>

#include "ops/info_nce.h"
#include "testing.h"

using namespace qemb;
using namespace qemb::testing;

namespace {

InfoNceOptions options(std::initializer_list<int> on, bool split, ScoreMask mask = ScoreMask::kOwn) {
    InfoNceOptions o{.groups = {}, .split = split, .temperature = 0.5, .focal = 0, .scale = 1};
    for (const int group : on) o.groups[group] = {true, mask, false, 0.1, 3};
    return o;
}

}  // namespace

TEST(the_groups_are_those_of_the_documentation) {
    const char* names[] = {"own_hard", "batch_positive", "batch_hard", "query_query",
                           "doc_own",  "doc_positive",   "doc_hard"};
    const int softmaxes[] = {0, 1, 1, 2, 3, 3, 3};
    CHECK(kNumGroups == 7);
    for (int group = 0; group < kNumGroups; ++group) {
        CHECK(std::strcmp(kGroupTable[group].name, names[group]) == 0);
        CHECK(kGroupTable[group].softmax == softmaxes[group]);
    }
    CHECK(group_of(kQueryDocument, Role::kPositive) == kBatchPositive &&
          group_of(kQueryDocument, Role::kHard) == kBatchHard);
    CHECK(group_of(kDocDoc, Role::kPositive) == kDocPositive && group_of(kDocDoc, Role::kHard) == kDocHard);
    CHECK(group_of(kQueries, Role::kPositive) == kQueryQuery && group_of(kQueries, Role::kHard) == kQueryQuery);
    CHECK(group_of_owned(0) == kOwnHard && group_of_owned(1) == kDocOwn);
    CHECK(!is_candidate(3, 3, Role::kHard) && !is_candidate(3, 4, Role::kAbsent) &&
          is_candidate(3, 4, Role::kPositive));
}

TEST(what_follows_from_the_groups_that_are_on) {
    for (const bool split : {false, true}) {
        const GroupRules nothing = rules_of(options({}, split));
        CHECK(nothing.sides == 1 && !nothing.owns && !nothing.by_query && nothing.softmax_is_on[0] == !split);
        CHECK(nothing.num_softmaxes() == (split ? 4 : 1));
        const GroupRules own = rules_of(options({kOwnHard}, split));
        CHECK(own.owns && own.sides == 1 && !own.dense[kQueryDocument] && own.softmax_is_on[0] &&
              !own.softmax_is_on[1]);
        const GroupRules doc = rules_of(options({kDocOwn}, split, ScoreMask::kQueryDocument));
        CHECK(doc.owns && doc.sides == 2 && !doc.dense[kDocDoc] && !doc.by_query && doc.softmax_is_on[split ? 3 : 0]);
        const GroupRules hard = rules_of(options({kDocHard, kQueryQuery}, split, ScoreMask::kQueryDocument));
        CHECK(!hard.owns && hard.sides == 2 && hard.dense[kDocDoc] && hard.dense[kQueries] &&
              !hard.dense[kQueryDocument]);
        CHECK(hard.by_query && hard.softmax_is_on[split ? 2 : 0] && hard.softmax_of(kDocDoc) == (split ? 3 : 0));
        CHECK(hard.softmax_of_owned(0) == 0 && hard.softmax_of_owned(1) == (split ? 3 : 0));
        CHECK(std::abs(hard.logit_scale[kDocHard] - 5 / std::log(2.0)) < 1e-12);  // 1 / 0.5 + 3
    }
}

TEST(limits) {
    const auto group = [](ScoreMask mask, bool relative) { return Group{true, mask, relative, 0.1, 0}; };
    for (const double s : {0.8, -0.8}) {
        for (const bool relative : {false, true})
            for (const ScoreMask mask : {ScoreMask::kNone, ScoreMask::kOwn, ScoreMask::kQueryDocument}) {
                const Group g = group(mask, relative);
                const LimitParts parts = limit_parts(g);
                const double wanted = mask == ScoreMask::kNone ? INFINITY : relative ? s + 0.08 : s + 0.1;
                CHECK(limit_of(g, s) == wanted || std::abs(limit_of(g, s) - wanted) < 1e-15);
                const double sum = s + parts.add + parts.relative * std::abs(s);
                CHECK(sum == wanted || std::abs(sum - wanted) < 1e-15);
                CHECK(held_score(g, 1, 2) == (mask == ScoreMask::kQueryDocument ? 2 : 1));
            }
    }
}

TEST(the_loss_of_a_softmax) {
    for (const double focal : {0.0, 2.0})
        for (const double gap : {-1000.0, -3.0, 0.0, 40.0, 2000.0}) {
            const SoftmaxLoss loss = softmax_loss(2, gap, focal);
            const double p = 1 / (1 + 2 * std::exp2(-gap)),
                         value = gap < -900 ? (1 - gap) * std::log(2.0) : std::log1p(2 * std::exp2(-gap));
            CHECK(std::abs(loss.value - value) <= 1e-12 * value);
            CHECK(std::abs(loss.left - (1 - p)) < 1e-12 && std::abs(loss.factor - std::pow(1 - p, focal)) < 1e-12);
        }
    CHECK(softmax_loss(0, 0, 2).value == 0 && softmax_loss(0, 0, 2).slope == 0);
}

int main() { return run_all(); }
