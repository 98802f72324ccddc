"""Bugs planted into the CUDA kernels one at a time: each must make the kernels' own test fail on the emulator.

python tests/cuda_on_cpu/planted_bugs.py [word ...]     only the bugs whose file or reason has one of the words
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
COMPILER = os.environ.get("CXX", "g++")
SECONDS = 300  # for one test program; the whole of it, unharmed, takes up to a minute

ATTENTION = [
    "attention_forward",
    "attention_backward",
    "attention_plan",
    "sm90/attention_forward",
    "sm90/attention_backward",
]
# test program -> the kernels that it is linked with
PROGRAMS = {
    "attention": ATTENTION,
    "attention_sm90": ATTENTION,
    "info_nce": ["info_nce", "sm90/info_nce"],
    "top_k": ["top_k", "sm90/top_k"],
    "rms_norm": ["rms_norm"],
    "last_token_pool": ["last_token_pool"],
}


@dataclass(frozen=True)
class Bug:
    why: str
    program: str
    kernel: str  # the file that is compiled again
    file: str  # the file that is changed, below csrc/cuda
    old: str  # occurs there exactly once
    new: str


BUGS = [
    Bug("missing wait", "attention", "attention_forward", "attention_forward.cuh", "cp_async_wait<1>();", ""),
    Bug("missing barrier before the next load", "attention", "attention_backward", "attention_backward.cuh",
        "sync_block();  // the tiles of the head before are read", ""),
    Bug("wrong swizzle", "attention", "attention_forward", "attention_tile.h",
        "((tile + swizzled<D>(lane % 16, lane / 16)) ^ (k << 5)) + row",
        "((tile + swizzled<D>(lane % 16, lane / 16)) ^ (k << 6)) + row"),
    Bug("missing mask", "attention", "attention_forward", "attention_forward.cuh",
        "key < seen[0] ? s[i][j] * scale : -INFINITY", "s[i][j] * scale"),
    Bug("wrong stride", "attention", "attention_forward", "attention_forward.cuh",
        "lse[row * p.num_heads] =", "lse[row] ="),
    Bug("wrong slot", "attention", "attention_forward", "attention_tile.h",
        "i * kSlot, num_q, k_slot, num_k}", "i * kSlot, num_q, q_slot, num_k}"),
    Bug("lengths off by one under the causal mask", "attention", "attention_forward", "attention_tile.h",
        "i + num_k - num_q + 1", "i + num_k - num_q"),
    Bug("missing rescale", "attention", "attention_forward", "attention_tile.h", "sum = sum * factor + total;",
        "sum += total;"),
    Bug("wrong lse", "attention", "attention_forward", "attention_forward.cuh",
        "row_max[0] * kLn2 + logf(sum0)", "row_max[0] + logf(sum0)"),
    Bug("wrong transposition", "attention", "attention_backward", "attention_tile.h", "ldmatrix_x4_trans(b,",
        "ldmatrix_x4(b,"),
    Bug("a part left out of a sum", "attention", "attention_backward", "attention_single.cuh",
        "for (int w = 0; w < kKeys; ++w) x += parts[w * kGroup * D + i];",
        "for (int w = 1; w < kKeys; ++w) x += parts[w * kGroup * D + i];"),
    Bug("a variant that does not fit the device", "attention", "attention_backward", "attention_dispatch.h",
        "if (has_large_shared())", "if (true)"),
    Bug("more keys than a tile of this device has slots", "attention", "attention_plan", "attention_plan.cu",
        "k_slots + more_k > limits.slots", "k_slots + more_k > kMostSlots"),
    Bug("steps of another variant's size", "attention", "attention_backward", "attention_backward_block.cuh",
        "slot(item[2] * (kTile / step))", "slot(item[2] * (kTile / 64))"),
    Bug("sums added out of turn", "attention", "attention_backward", "attention_backward_block.cuh",
        "if (thread == kThreads - 32 && before > 0) wait_for_flag(scratch.added + slot, before);", ""),
    Bug("a flag raised before the sums are stored", "attention", "attention_backward", "attention_backward_block.cuh",
        "if (thread == 0) block.to_raise = slot, block.raised = before + 1;",
        "if (thread == 0) raise_flag(scratch.added + slot, before + 1);"),
    Bug("the last flag raised too early", "attention", "attention_backward", "attention_backward_block.cuh",
        "    sync_block();  // the last sums are stored\n", ""),
    Bug("missing barrier before P and dS are read", "attention", "attention_backward", "attention_backward_block.cuh",
        "sync_block();  // P and dS are here for everyone; so is dQ so far, in memory", ""),
    Bug("P and dS overwritten while they are read", "attention", "attention_backward", "attention_backward_block.cuh",
        "sync_block();  // the step is here for everyone, and everyone is done with the step before", ""),
    Bug("queries overwritten while they are read", "attention", "attention_backward", "attention_backward_block.cuh",
        "sync_block();  // Q and dO are read", ""),
    Bug("queries loaded into the stage in use", "attention", "attention_backward", "attention_backward_block.cuh",
        "load_step(next_head, next_query, (step + 1) % 2);", "load_step(next_head, next_query, step % 2);"),
    Bug("dQ so far forgotten", "attention", "attention_backward", "attention_backward_block.cuh",
        "        if (before > 0) {", "        if (false) {"),
    Bug("a step counted by its first query alone", "attention", "attention_backward", "attention_backward_block.cuh",
        "span.num_k - span.num_q + query + step;", "span.num_k - span.num_q + query + 1;"),
    Bug("keys that wait for those before them", "attention", "attention_backward", "attention_backward_block.cuh",
        "((span.num_k - 1) / kTile - item[1]) * kTile", "item[1] * kTile"),
    Bug("no zeros for queries that see nothing", "attention", "attention_backward", "attention_backward_block.cuh",
        "p.causal && first > 0 ?", "p.causal ?"),
    Bug("no zeros for queries without keys", "attention", "attention_backward", "attention_backward_block.cuh",
        "if (row < count) store16(static_cast<T*>(p.dq) + at, {});", ""),
    Bug("P in place of dS", "attention", "attention_backward", "attention_backward_block.cuh",
        "kStep / 16 + my_queries / 16 + m", "my_queries / 16 + m"),
    Bug("lanes that exchange the wrong half", "attention", "attention_backward", "attention_backward_block.cuh",
        "shuffle_xor(odd ? low : high, 1)", "shuffle_xor(odd ? high : low, 1)"),
    Bug("wait for the stage before", "info_nce", "info_nce", "device/tile_product.h",
        "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();"),
    Bug("missing barrier between stages", "info_nce", "info_nce", "device/tile_product.h",
        "sync_block();  // the stage is here for everyone, and everyone is done with the one that is filled next", ""),
    Bug("forgotten zero-fill", "info_nce", "info_nce", "info_nce.cu",
        "zero_out(p.d_documents,", "zero_out(nullptr,"),
    Bug("a part left out of the denominator", "info_nce", "info_nce", "info_nce/softmax.h",
        "for (int i = 1; i < kRowThreads; ++i)", "for (int i = 2; i < kRowThreads; ++i)"),
    Bug("the limit of a group forgotten when it is off", "info_nce", "info_nce", "info_nce/scores.h",
        "(second ? kSecond : 0)", "(on && second ? kSecond : 0)"),
    Bug("what rows own taken from the wrong anchor", "info_nce", "info_nce", "info_nce/gradients.h",
        "of_query * to_float(query[d])", "of_query * to_float(positive[d])"),
    Bug("split softmaxes with the weight of the first", "info_nce", "info_nce", "info_nce/gradients.h",
        "a.row_weight[a.softmax_of(kind) * a.rows + row] * sum", "a.row_weight[row] * sum"),
    Bug("the positive's part added by every block", "info_nce", "info_nce", "info_nce/softmax.h",
        "given && !p.adds_positive ? 0 :", "false ? 0 :"),
    Bug("documents beyond the end", "top_k", "top_k", "top_k/list.h", "score <= ceiling && document < p.num_documents",
        "score <= ceiling"),
    Bug("wrong order among equals", "top_k", "top_k", "top_k/list.h", "static_cast<uint32_t>(~document);",
        "static_cast<uint32_t>(document + 1);"),
    Bug("a shared bar that drops equal scores", "top_k", "top_k", "top_k/list.h",
        "if (document_of(key) < next) return score;", "return score;"),
    Bug("nothing is below 0 but -0", "top_k", "top_k", "top_k/list.h", "nextafterf(score, -INFINITY) : NAN",
        "score == 0 ? -0.0f : nextafterf(score, -INFINITY) : NAN"),
    Bug("nothing below -infinity", "top_k", "top_k", "top_k/list.h", "score > -INFINITY ? nextafterf",
        "true ? nextafterf"),
    Bug("a floor that fewer than k documents reach", "top_k", "top_k", "top_k/list.h", "rank = ceil_div(p.k, spans);",
        "rank = p.k / spans + (p.k < spans);"),
    Bug("the highest floor instead of the lowest", "top_k", "top_k", "top_k/list.h",
        "least = min(least, shuffle_xor(least, mask));", "least = max(least, shuffle_xor(least, mask));"),
    Bug("floors that no one looks at", "top_k", "top_k", "top_k/list.h", "const Key best = max(own, least);",
        "const Key best = own;"),
    Bug("a bar that is not shared", "top_k", "top_k", "top_k/list.h", "? max(best, atomic_max(memory.bars + at, best))",
        "? own"),
    Bug("a span that takes a place among its equals too early", "top_k", "top_k", "top_k/list.h",
        "rows.bar[row] = bar_of(best, static_cast<int64_t>(next) * kTile);",
        "rows.bar[row] = bar_of(best, INT64_MAX);"),
    Bug("a buffer that an incomplete batch and a tile do not fit in", "top_k", "top_k", "top_k/list.h",
        "kBuffer = kBatch + kTile;", "kBuffer = kTile;"),
    Bug("candidates left over", "top_k", "top_k", "top_k.cu", "unit.insert(rows, unit.end_tile, 1);", ""),
    Bug("candidates inserted before all are there", "top_k", "top_k", "top_k.cu",
        "sync_block();  // all candidates are there", "// all candidates are there"),
    Bug("a batch that is not sorted", "top_k", "top_k", "top_k/list.h", "!(lane & step) == !(lane & size)",
        "!(lane & step)"),
    Bug("missing warp barrier in the list", "top_k", "sm90/top_k", "top_k/list.h",
        "        sync_warp();  // a lane that offers must not change what others have yet to read\n", ""),
    Bug("a list that is moved less than the batch before it", "top_k", "top_k", "top_k/list.h",
        "if (key && shift > 0 && at + shift < k)", "if (key && shift > 1 && at + shift < k)"),
    Bug("a team left out of the weight gradient", "rms_norm", "rms_norm", "rms_norm.cu",
        "for (int team = 1; team < S::kTeams; ++team)", "for (int team = 2; team < S::kTeams; ++team)"),
    Bug("missing barrier in a sum", "rms_norm", "rms_norm", "device/reduce.h",
        "    sync_block();\n    T total", "    T total"),
    Bug("wrong transposition of the partial sums", "rms_norm", "rms_norm", "column_sum.h",
        "warp_sum(sums[lane][warp])", "warp_sum(sums[warp][lane])"),
    Bug("the token before the last", "last_token_pool", "last_token_pool", "last_token_pool.cu", "kNoToken : end - 1;",
        "kNoToken : end - 2;"),
    Bug("a sequence that lies beyond the tokens", "last_token_pool", "last_token_pool", "last_token_pool.cu",
        "|| end > p.num_tokens) return", ") return"),
    Bug("lengths of the device taken as they are", "attention", "attention_plan", "attention_plan.cu",
        "s == num_seqs ? lengths.tokens : min(max(end, last), lengths.tokens)", "end"),
    Bug("wrong lengths not reported", "attention", "attention_plan", "attention_plan.cu",
        "is_wrong(plan, data) = !q_right || !k_right;", ""),
    Bug("a positive that is no document taken as it is", "info_nce", "info_nce", "info_nce/inputs.h",
        "right ? given : 0", "given"),
    Bug("a positive that is no document not reported", "info_nce", "info_nce", "info_nce/owned.h",
        "a.fault[a.query(row)]", "0"),
    # Hopper
    Bug("wrong phase", "top_k", "sm90/top_k", "sm90/ring.h", "mbarrier_wait(empty(), parity ^ 1)",
        "mbarrier_wait(empty(), parity)"),
    Bug("wrong arrival count", "attention_sm90", "sm90/attention_forward", "sm90/attention_forward.cu",
        "k_ring.init(2);", "k_ring.init(1);"),
    Bug("a counter that does not start at zero", "attention_sm90", "sm90/attention_forward",
        "sm90/attention_forward.cu",
        "        if (p.scratch) zero(kOp, p.scratch, sizeof(int), p.stream);\n", ""),
    Bug("units that no block takes", "attention_sm90", "sm90/attention_forward", "sm90/attention_forward.cu",
        "return p.scratch ? static_cast<int>(gridDim.x) +", "return p.scratch ? static_cast<int>(gridDim.x) + 1 +"),
    Bug("fewer blocks than units, without a counter", "attention_sm90", "sm90/attention_forward",
        "sm90/attention_forward.cu",
        "p.scratch ? resident_blocks(units) : dim3(static_cast<unsigned>(units))", "resident_blocks(units)"),
    Bug("values freed while they are multiplied", "attention_sm90", "sm90/attention_forward",
        "sm90/attention_forward.cu",
        "wgmma_wait<0>();\n                v_ring.release(frees);",
        "v_ring.release(frees);\n                wgmma_wait<0>();"),
    Bug("values used before they are there", "attention_sm90", "sm90/attention_forward", "sm90/attention_forward.cu",
        "            q_ring.release(lane == 0);\n            v_ring.wait_full();",
        "            q_ring.release(lane == 0);"),
    Bug("a turn that is not passed on", "attention_sm90", "sm90/attention_forward", "sm90/attention_forward.cu",
        "                pass_turn();\n                wgmma_wait<1>();", "                wgmma_wait<1>();"),
    Bug("a neighbour's values multiplied by zero", "attention_sm90", "sm90/attention_forward",
        "sm90/attention_forward.cu",
        "clear_rows<kKeys, D>(v_tile(), tile.span.num_k - step * kKeys);", ""),
    Bug("cleared rows without a fence", "attention_sm90", "sm90/attention_forward", "sm90/attention_tile.h",
        "    fence_async();\n}", "}"),
    Bug("missing rescale", "attention_sm90", "sm90/attention_forward", "sm90/attention_forward.cu",
        "out[i] *= factor[i / 2 % 2];", "out[i] *= 1;"),
    Bug("wrong step of a descriptor", "attention_sm90", "sm90/attention_forward", "sm90/attention_tile.h",
        "k % 4 * 32;", "k % 4 * 16;"),
    Bug("wrong leading dimension", "attention_sm90", "sm90/attention_forward", "sm90/attention_tile.h",
        "matrix(b, kPanelBytes<kRows>)", "matrix(b)"),
    Bug("one head for both warpgroups", "attention_sm90", "sm90/attention_forward", "sm90/attention_tile.h",
        "? head + half : head;", "? head : head;"),
    Bug("dS stored without a fence", "attention_sm90", "sm90/attention_backward", "sm90/attention_backward.cu",
        "ds[k][i]);\n    fence_async();\n", "ds[k][i]);\n"),
    Bug("dS overwritten while it is read", "attention_sm90", "sm90/attention_backward", "sm90/attention_backward.cu",
        "step % 2 * kDsBytes", "0"),
    Bug("dS multiplied before both warpgroups have stored it", "attention_sm90", "sm90/attention_backward",
        "sm90/attention_backward.cu",
        "            barrier_sync(kSharedDsBarrier, kConsumers);  // dS is complete, the one before is read\n",
        ""),
    Bug("dS of this step multiplied instead of the one before", "attention_sm90", "sm90/attention_backward",
        "sm90/attention_backward.cu",
        "multiply_ds<T, D>(dq, ds_of(step - 1),", "multiply_ds<T, D>(dq, ds_of(step),"),
    Bug("rows of dQ staged where dS is read", "attention_sm90", "sm90/attention_backward",
        "sm90/attention_backward.cu",
        "tile, step - 1, dq, ds_of(step) + my_first * 128,", "tile, step - 1, dq, ds_of(step - 1) + my_first * 128,"),
    Bug("dQ written while it is multiplied", "attention_sm90", "sm90/attention_backward", "sm90/attention_backward.cu",
        "                wgmma_wait<1>();\n                write_dq", "                write_dq"),
    Bug("dQ of the last step written while it is multiplied", "attention_sm90", "sm90/attention_backward",
        "sm90/attention_backward.cu",
        "            wgmma_wait<0>();\n            write_dq", "            write_dq"),
    Bug("the last dQ written as the one before", "attention_sm90", "sm90/attention_backward",
        "sm90/attention_backward.cu",
        "write_dq<T, D>(p, scratch, tile, tile.steps - 1,", "write_dq<T, D>(p, scratch, tile, max(0, tile.steps - 2),"),
    Bug("keys overwritten while the other warpgroup multiplies them", "attention_sm90", "sm90/attention_backward",
        "sm90/attention_backward.cu",
        "        barrier_sync(kEndBarrier, kConsumers);  // nobody reads K and V any more: they are the staging\n", ""),
    Bug("gradients in flight when their stage is freed", "attention_sm90", "sm90/attention_backward",
        "sm90/attention_backward.cu",
        "            wgmma_wait<0>();\n            ring.release(signals);",
        "            ring.release(signals);\n            wgmma_wait<0>();"),
    Bug("staging that the copy engine overwrites without a fence", "attention_sm90", "sm90/attention_backward",
        "sm90/attention_backward.cu",
        "        fence_async();  // before the copy engine writes there\n        keys.release", "        keys.release"),
    Bug("a causal mask off by one", "attention_sm90", "sm90/attention_backward", "sm90/attention_backward.cu",
        "row < sees + query_of(i)", "row <= sees + query_of(i)"),
    Bug("a neighbour's keys multiplied by zero", "attention_sm90", "sm90/attention_backward",
        "sm90/attention_backward.cu",
        "clear_rows<kTile, D>(shared + L::kK, tile.count);", ""),
    Bug("sums added out of turn", "attention_sm90", "sm90/attention_backward", "sm90/attention_backward.cu",
        "wait_for(scratch.added + now.slot, now.before);", ""),
    Bug("published before it is written", "attention_sm90", "sm90/attention_backward", "sm90/attention_backward.cu",
        "        bulk_wait<0>();\n", ""),
    Bug("sums overwritten while they are copied", "attention_sm90", "sm90/attention_backward",
        "sm90/attention_backward.cu",
        "        bulk_wait_read<0>();\n        sums.release(true);",
        "        sums.release(true);\n        bulk_wait_read<0>();"),
    Bug("sums copied without a fence", "attention_sm90", "sm90/attention_backward", "sm90/attention_backward.cu",
        "        fence_async();\n        sync_warp();", "        sync_warp();"),
    Bug("sums taken before all have added", "attention_sm90", "sm90/attention_backward", "sm90/attention_backward.cu",
        "        wait_for(scratch.added + slot, before);\n", ""),
    Bug("keys that wait for those before them", "attention_sm90", "sm90/attention_backward",
        "sm90/attention_backward.cu",
        "(span.num_k - 1) / kTile - item[1]", "item[1]"),
    Bug("features of the next prefix in a product", "info_nce", "sm90/info_nce", "sm90/tile_product.h",
        "if (last < kStepDepth && step + 1 == steps)", "if (false)"),
    Bug("a gradient added to the features of the next prefix", "info_nce", "sm90/info_nce", "sm90/info_nce.cu",
        "pair_column(n) + j < own ?", "true ?"),
    Bug("one prefix masked by the scores of another", "info_nce", "sm90/info_nce", "sm90/info_nce/scores.h",
        "part.masked[i] |= memory.over[layer][half]", "part.masked[i] |= memory.over[0][half]"),
    Bug("one prefix masked by the scores of another", "info_nce", "info_nce", "info_nce/scores.h",
        "* a.layers + layer) * kTileThreads", "* a.layers) * kTileThreads"),
    Bug("factors that count twice", "info_nce", "info_nce", "info_nce/prefixes.h", "= from_float<T>(1.0f);",
        "= from_float<T>(2.0f);"),
    Bug("prefixes that are not normalised along themselves", "info_nce", "info_nce", "info_nce/prefixes.h",
        "gradient[d] -= radial_grad *", "gradient[d] -= 0 *"),
    Bug("a prefix without the ones beyond it", "info_nce", "info_nce", "info_nce/prefixes.h",
        "across += weight *", "across = weight *"),
    Bug("the factor of another row", "info_nce", "sm90/info_nce", "sm90/tile_product.h", "doubled(mine[8], mine[8])",
        "doubled(mine[0], mine[0])"),
    Bug("staging written while it is stored", "info_nce", "sm90/info_nce", "sm90/info_nce/scores.h",
        "if (!kPrefixes && signals) bulk_wait_read<0>();", ""),
    Bug("staging of prefixes written while it is stored", "info_nce", "sm90/info_nce", "sm90/info_nce/scores.h",
        "        if (signals) bulk_wait_read<0>();\n        barrier_sync", "        barrier_sync"),
    Bug("masks loaded while those of the tile before are read", "info_nce", "sm90/info_nce", "sm90/info_nce.cu",
        "                    barrier_sync(kMasksBarrier, kConsumers);\n                    if (last >= 0)",
        "                    if (last >= 0)"),
    Bug("masks read before they are there", "info_nce", "sm90/info_nce", "sm90/info_nce.cu",
        "                    }\n                    barrier_sync(kMasksBarrier, kConsumers);\n",
        "                    }\n"),
    Bug("a tally that two units share", "info_nce", "sm90/info_nce", "sm90/info_nce.cu",
        "if (last >= 0) write_tally(last);", ""),
    Bug("scores kept though some are masked", "info_nce", "sm90/info_nce", "sm90/info_nce/scores.h",
        "plain && !any_exceeds(part, masks.limit[0], part.masked[0] | part.masked[1]);", "plain;"),
    Bug("scores kept though the query's masks them", "info_nce", "sm90/info_nce", "sm90/info_nce/scores.h",
        "masks.limit[0], part.masked[0] | part.masked[1])", "masks.limit[0], false)"),
    Bug("scores that exceed the query's limit not looked for", "info_nce", "sm90/info_nce", "sm90/info_nce/scores.h",
        "if (!plain || any_exceeds(", "if (!plain && any_exceeds("),
    Bug("limits of another row", "info_nce", "sm90/info_nce", "sm90/info_nce/scores.h",
        "limits[first_row() + 8 * i]", "limits[first_row()]"),
    Bug("the largest score taken for the largest logit", "info_nce", "sm90/info_nce", "sm90/info_nce/scores.h",
        "lanes_max<4>(best[i]) * high;", "lanes_max<4>(best[i]);"),
    Bug("a tile called plain where a row meets its text", "info_nce", "sm90/info_nce", "sm90/info_nce.cu",
        "met |= texts[i] == text;\n        for (const Kind", "for (const Kind"),
    Bug("a tile called plain where rows meet their own", "info_nce", "sm90/info_nce", "sm90/info_nce.cu",
        "(owner < 0 || owner >= rows)", "true"),
    Bug("bytes that nobody waits for", "info_nce", "sm90/info_nce", "sm90/info_nce.cu",
        "fill_stages<true>(ring, stages, steps, kFactorBytes,", "fill_stages<true>(ring, stages, steps, 0,"),
    Bug("the positives of another panel", "info_nce", "sm90/info_nce", "sm90/info_nce.cu",
        "from = a.positive(row);", "from = a.positive(row ^ 1);"),
    Bug("candidates inserted before all are there", "top_k", "sm90/top_k", "sm90/top_k.cu",
        "sync_warp();  // all candidates are there", ""),
]  # fmt: skip


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **options)


def compile_one(source: Path, csrc: Path, target: Path) -> Path:
    includes = [f"-I{path}" for path in (csrc, ROOT / "tests" / "cuda_on_cpu", ROOT / "tests" / "cpp")]
    flags = ["-std=c++20", "-O1", "-Wno-unknown-pragmas", *includes, "-x", "c++", "-c"]
    result = run([COMPILER, *flags, str(source), "-o", str(target)])
    if result.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{result.stderr[:2000]}")
    return target


def fails(program: Path, only: str = "") -> str:
    """The first complaint of a test program, or nothing. `only`: the kernels of one architecture, 80 or 90."""
    by_line = ["stdbuf", "-oL"] if shutil.which("stdbuf") else []
    with tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "QEMB_SM": only} if only else None
        process = subprocess.Popen(
            [*by_line, program], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        clock = threading.Timer(SECONDS, process.kill)
        clock.start()
        failed = ""
        with process:
            for line in process.stdout:
                if line.startswith("FAIL"):  # enough is known
                    failed = line.strip()
                    process.kill()
                    break
        clock.cancel()
        errors.seek(0)
        if failed or process.returncode == 0:
            return failed
        return errors.read().strip() or f"status {process.returncode}"


class Workshop:
    """Objects of the tree as it is, from which each bug replaces one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.csrc = ROOT / "csrc"

    def object(self, source: Path) -> Path:
        return self.folder / str(source.relative_to(ROOT).with_suffix(".o")).replace("/", "_")

    def build(self, source: Path) -> Path:
        return compile_one(source, self.csrc, self.object(source))

    def sources(self, program: str) -> list[Path]:
        kernels = [self.csrc / "cuda" / f"{name}.cu" for name in PROGRAMS[program]]
        return [ROOT / "tests" / "cuda_on_cpu" / f"test_{program}.cpp", *kernels]

    def link(self, program: str, target: Path, replaced: dict[Path, Path]) -> Path:
        objects = [replaced.get(source, self.object(source)) for source in self.sources(program)]
        result = run([COMPILER, *map(str, objects), "-o", str(target)])
        if result.returncode:
            raise RuntimeError(f"{program} does not link:\n{result.stderr[:2000]}")
        return target

    def check_sound(self, program: str) -> None:
        complaint = fails(self.link(program, self.folder / program, {}))
        if complaint:
            raise RuntimeError(f"test_{program} fails without any bug: {complaint}")

    def plant(self, number: int, bug: Bug) -> str:
        """What the test says to the bug; nothing if it was not seen."""
        text = (self.csrc / "cuda" / bug.file).read_text()
        if text.count(bug.old) != 1:
            raise RuntimeError(f"{bug.file}: {text.count(bug.old)} times instead of once: {bug.old}")
        folder = self.folder / str(number)
        shutil.copytree(self.csrc, folder / "csrc", ignore=shutil.ignore_patterns("cpu", "bindings"))
        (folder / "csrc" / "cuda" / bug.file).write_text(text.replace(bug.old, bug.new))
        source = Path("csrc") / "cuda" / f"{bug.kernel}.cu"
        mutant = compile_one(folder / source, folder / "csrc", folder / "mutant.o")
        only = "90" if bug.kernel.startswith("sm90") else "80"
        complaint = fails(self.link(bug.program, folder / bug.program, {ROOT / source: mutant}), only)
        print("caught" if complaint else "MISSED", f"{bug.file}: {bug.why}:", complaint.partition("\n")[0], flush=True)
        return complaint


def run_all(bugs: list[Bug] = BUGS, jobs: int = 2) -> dict[Bug, str]:
    """Every bug with what its test says to it."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        workshop = Workshop(Path(folder))
        programs = sorted({bug.program for bug in bugs})
        list(pool.map(workshop.build, dict.fromkeys(s for program in programs for s in workshop.sources(program))))
        list(pool.map(workshop.check_sound, programs))
        return dict(zip(bugs, pool.map(workshop.plant, range(len(bugs)), bugs), strict=True))


if __name__ == "__main__":
    words = sys.argv[1:]
    chosen = [bug for bug in BUGS if not words or any(word in f"{bug.file} {bug.why}" for word in words)]
    sys.exit(not all(run_all(chosen).values()))
