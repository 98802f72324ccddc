import pytest
import torch
from torch.nn.functional import normalize

from pyqemb import _C, ops
from pyqemb.ops import Group
from pyqemb.ops.groups import GROUPS, NATIVE_GROUPS, PRESETS, Options
from pyqemb.ops.info_nce import Anchors, Columns, Others, info_nce_block
from pyqemb.ops.info_nce_composed import debiased
from pyqemb.testing import reference


def batch(num_queries=70, num_documents=300, dim=48, noise=0.6, seed=0):
    """Queries near their positives, hard negatives near them too, shared positives, texts that occur twice."""
    generator = torch.Generator().manual_seed(seed)
    documents = normalize(torch.randn(num_documents, dim, dtype=torch.float64, generator=generator), dim=1)
    positive = torch.randint(0, num_documents, (num_queries,), generator=generator)
    queries = normalize(
        documents[positive]
        + noise * normalize(torch.randn(num_queries, dim, dtype=torch.float64, generator=generator), dim=1),
        dim=1,
    )
    owner = torch.full((num_documents,), -1)
    for document in range(num_documents // 3):
        query = int(torch.randint(0, num_queries, (1,), generator=generator))
        owner[document] = query
        documents[document] = normalize(documents[document] + documents[positive[query]], dim=0)
    owner[positive] = torch.arange(num_queries)
    ids = torch.arange(num_documents)
    ids[:20] = ids[20:40]
    return queries, documents, positive, owner, ids


def both(
    data, dtype=torch.float64, temperature=0.05, preset="qwen3", margin=0.1, groups=None, softmax="joint", focal=0.0,
    **options
):  # fmt: skip
    """(loss, gradients) of the op in `dtype` and of the dense formula in float64, on the same rounded vectors."""
    queries, documents, positive, owner, ids = data
    low = [x.to(dtype).requires_grad_() for x in (queries, documents)]
    loss = ops.info_nce(
        *low, positive, owner=owner, document_ids=ids, temperature=temperature, preset=preset, margin=margin,
        groups=groups, softmax=softmax, focal=focal, **options,
    )  # fmt: skip
    grads = torch.autograd.grad(loss, low)
    exact = [x.detach().double().requires_grad_() for x in low]
    chosen = {name: group for name, group in {**PRESETS[preset], **(groups or {})}.items() if group}
    truth = reference.info_nce(
        *exact, positive, owner, ids, temperature, margin, chosen, softmax == "split", focal, **options
    )  # fmt: skip
    return (loss.detach(), *grads), (truth.detach(), *torch.autograd.grad(truth, exact))


def relative(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


def assert_equal(results, tolerance):
    for actual, exact in zip(*results, strict=True):
        assert relative(actual, exact) < tolerance


OFF = dict.fromkeys(GROUPS)


@pytest.mark.promise("R11", "InfoNCE against the dense formula")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("softmax", ["joint", "split"])
@pytest.mark.parametrize("focal", [0.0, 0.7, 2.0])
def test_equals_the_dense_formula(preset, softmax, focal):
    assert_equal(both(batch(), preset=preset, softmax=softmax, focal=focal), 1e-11)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(
    "group",
    [
        Group(mask=None),
        Group(margin=-0.1),
        Group(margin=0.05, relative=True),
        Group(margin=-0.1, relative=True, hardness=5.0),
        Group(mask="query_document", margin=0.0),
        Group(mask=None, hardness=-3.0),
    ],
    ids=str,
)
def test_each_group_alone_and_among_others(name, group):
    if name in ("query_query", "doc_query") and group.mask == "query_document":
        pytest.skip("has no query-document score")
    assert_equal(both(batch(), groups={**OFF, name: group}), 1e-11)
    assert_equal(both(batch(), groups={name: group}), 1e-11)
    assert_equal(both(batch(), groups={name: group}, softmax="split", preset="mnrl"), 1e-11)


DEBIASED = {
    "joint": {},
    "split": dict(softmax="split", preset="ms_swift"),
    "clamped in many rows": dict(tau_plus=0.3, temperature=0.3),
    "focal": dict(focal=1.5, softmax="split"),
    "hardness": dict(groups={"batch_hard": Group(hardness=3.0), "own_hard": Group(mask=None)}),
    "all directions": dict(preset="gte"),
    "all directions, split, masked": dict(
        preset="gte", softmax="split", groups={"doc_query": Group(margin=-0.2, hardness=1.0)}
    ),
    "of some rows": dict(rows=(20, 30)),
    "most rows have no candidates": dict(preset="classification"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", DEBIASED)
def test_debiased_equals_the_dense_formula(case, dtype):
    given = dict(tau_plus=0.002, temperature=0.1) | DEBIASED[case]
    results = both(batch(), dtype, **given)
    assert_equal(results, 1e-10 if dtype == torch.float64 else 4e-6)
    plain = both(batch(), dtype, **{**given, "tau_plus": 0.0})
    assert relative(plain[0][0], results[1][0]) > 1e-3


def test_the_debiased_cases_hold_clamped_rows_and_others():
    queries, documents, positive, *_ = batch()
    log_counts = torch.tensor(len(documents) - 1.0, dtype=torch.float64).log()
    for tau_plus, temperature, expected in ((0.002, 0.1, 43), (0.3, 0.3, 70)):
        logits = queries @ documents.T / temperature
        own = logits.gather(1, positive[:, None])
        sums = logits.scatter(1, positive[:, None], -torch.inf).logsumexp(1, keepdim=True)
        results = debiased(sums, log_counts, own, temperature, tau_plus)
        assert int((results.by_log_sum == 0).sum()) == expected
        assert bool((results.log_sums >= log_counts - 1 / temperature).all())


@pytest.mark.parametrize("softmax", ["joint", "split"])
def test_a_learned_temperature_of_several_sweeps(softmax):
    queries, documents, positive, owner, ids = batch()
    tau, exact = (torch.tensor(0.07, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = dict(focal=1.0, tau_plus=0.002)
    loss = ops.info_nce(
        queries, documents, positive, owner=owner, document_ids=ids, temperature=tau, softmax=softmax, preset="gte",
        **options
    )  # fmt: skip
    truth = reference.info_nce(
        queries, documents, positive, owner, ids, exact, groups=PRESETS["gte"], split=softmax == "split", **options
    )
    torch.testing.assert_close(loss, truth, rtol=1e-11, atol=0)
    ours, true = torch.autograd.grad(loss, tau)[0], torch.autograd.grad(truth, exact)[0]
    torch.testing.assert_close(ours, true, rtol=1e-10, atol=0)


@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("noise", [0.15, 0.8, 1.5])
def test_several_sweeps_in_float32_at_low_temperature(temperature, noise):
    """Sure rows too: the weight of a candidate in the second sweep is not a difference."""
    ours, truth = both(batch(256, 1024, 128, noise=noise), torch.float32, temperature, preset="gte")
    assert abs(float(ours[0]) - float(truth[0])) < 1e-6
    for actual, exact in zip(ours[1:], truth[1:], strict=True):
        assert relative(actual, exact) < 2e-6


def test_the_symmetric_loss_is_that_of_clip():
    """One positive each: the sum of the cross-entropies over rows and over columns."""
    queries, documents = (normalize(torch.randn(30, 24, dtype=torch.float64), dim=1) for _ in range(2))
    logits, diagonal = queries @ documents.T / 0.07, torch.arange(30)
    rows, columns = (torch.nn.functional.cross_entropy(x, diagonal) for x in (logits, logits.T))
    loss = ops.info_nce(
        queries, documents, diagonal, preset="mnrl", groups={"doc_query": Group(mask=None)}, softmax="split",
        temperature=0.07,
    )  # fmt: skip
    torch.testing.assert_close(loss, rows + columns, rtol=1e-12, atol=0)


POSITIVES = [[3, 17, 40], [5], [8, 3], [11, 12], [30], [31, 32, 33, 34], [50]]  # queries 0 and 2 share one

SEVERAL = {
    "joint": {},
    "split": dict(softmax="split", focal=1.0),
    "own negatives alone": dict(preset="classification"),
    "all directions": dict(preset="gte"),
    "all directions, split, debiased": dict(preset="gte", softmax="split", tau_plus=0.01),
    "some rows": dict(rows=(2, 4)),
    "no rows": dict(rows=(7, 0)),
}


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("case", SEVERAL)
def test_several_positives_equal_the_dense_formula(case, owned):
    queries, documents, *_ = batch(7, 60)
    options = dict(SEVERAL[case])
    owner = None
    if owned:
        owner = torch.full((60,), -1)
        owner[[0, 1, 2, 3, 17, 40, 20, 21]] = 0
        owner[[31, 32, 33, 34, 22, 23, 24]] = 5
    ids = torch.arange(60)
    ids[[41, 42]] = ids[[17, 5]]
    more = torch.tensor([[query, other] for query, each in enumerate(POSITIVES) for other in each[1:]])
    leaves, exact = ([x.clone().requires_grad_() for x in (queries, documents)] for _ in range(2))
    positive = torch.tensor([each[0] for each in POSITIVES])
    loss, stats = ops.info_nce(
        *leaves, positive, owner=owner, document_ids=ids, more_positives=more, temperature=0.1, return_stats=True,
        **options,
    )  # fmt: skip
    preset, softmax = options.pop("preset", "qwen3"), options.pop("softmax", "joint")
    truth = reference.several_positives(
        *exact, POSITIVES, owner, ids, temperature=0.1, groups=PRESETS[preset], split=softmax == "split", **options
    )
    torch.testing.assert_close(loss, truth, rtol=1e-11, atol=0)
    if options.get("rows") == (7, 0):
        return
    for ours, true in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-12)
    if "rows" not in options:
        cosines = [float((documents[each] @ queries[query]).mean()) for query, each in enumerate(POSITIVES)]
        assert stats["positive"] == pytest.approx(sum(cosines) / 7, rel=1e-12)


def test_the_parts_of_ranks_with_several_positives_add_up():
    queries, documents, *_ = batch(7, 60)
    more = torch.tensor([[query, other] for query, each in enumerate(POSITIVES) for other in each[1:]])
    positive = torch.tensor([each[0] for each in POSITIVES])
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    options = dict(more_positives=more, temperature=tau, matryoshka=[48, 16])
    leaves = [queries.requires_grad_(), documents.requires_grad_(), tau]
    whole = ops.info_nce(queries, documents, positive, **options)
    parts = [ops.info_nce(queries, documents, positive, rows=rows, **options) for rows in ((0, 3), (3, 4), (7, 0))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (sum(parts), whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def guide_of(data, dim=12, seed=5):
    """Vectors of another model: near the first ones, with queries near some documents that are not their positives."""
    generator = torch.Generator().manual_seed(seed)
    queries, documents, *_ = data
    turn = torch.randn(queries.shape[1], dim, dtype=torch.float64, generator=generator)
    noise = [0.3 * torch.randn(len(x), dim, dtype=torch.float64, generator=generator) for x in (queries, documents)]
    return queries @ turn + noise[0], documents @ turn + noise[1]


GUIDED = {
    "qwen3": {},
    "ms_swift, split": dict(preset="ms_swift", softmax="split", focal=1.0),
    "mnrl, relative": dict(preset="mnrl", guide_margin=-0.3, guide_relative=True),
    "gte, debiased": dict(preset="gte", tau_plus=0.01, temperature=0.1),
    "gte, split, hardness": dict(
        preset="gte", softmax="split", groups={"doc_query": Group(margin=0.0, hardness=2.0), "doc_own": Group()}
    ),
    "classification": dict(preset="classification", guide_margin=-0.2),
    "some rows": dict(rows=(20, 30)),
    "no rows": dict(rows=(70, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", GUIDED)
def test_a_guide_equals_the_dense_formula(case, dtype, monkeypatch):
    monkeypatch.setattr("pyqemb.ops.info_nce_guided._ELEMENTS", 2500)  # several blocks
    data = batch()
    given = dict(guide=guide_of(data)) | GUIDED[case]
    ours, truth = both(data, dtype, **given)
    if case == "no rows":
        assert not any(x.any() for x in (*ours, *truth))
        return
    assert_equal((ours, truth), 1e-10 if dtype == torch.float64 else 2e-5)
    without = both(data, dtype, **{**given, "guide": None})[0]
    assert relative(ours[1], without[1].double()) > 1e-3, "the guide masks nothing"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("softmax", ["joint", "split"])
def test_a_guide_that_masks_nothing_is_the_plain_loss(preset, softmax):
    data = batch()
    tau = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    queries, documents, positive, owner, ids = data
    leaves = [queries.requires_grad_(), documents.requires_grad_(), tau]
    options = dict(
        owner=owner, document_ids=ids, preset=preset, softmax=softmax, temperature=tau, matryoshka=[48, 16],
        return_stats=True,
    )  # fmt: skip
    plain, plain_stats = ops.info_nce(queries, documents, positive, **options)
    guided, stats = ops.info_nce(queries, documents, positive, guide=guide_of(data), guide_margin=9.0, **options)
    torch.testing.assert_close(guided, plain, rtol=1e-11, atol=0)
    assert dict(stats) == pytest.approx(dict(plain_stats), rel=1e-11)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (guided, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("loss", [{}, {"preset": "gte", "softmax": "split"}], ids=str)
def test_a_guide_with_several_positives(loss):
    data = batch(7, 60)
    queries, documents, *_ = data
    guide = guide_of(data)
    more = torch.tensor([[query, other] for query, each in enumerate(POSITIVES) for other in each[1:]])
    leaves, exact = ([x.clone().requires_grad_() for x in (queries, documents)] for _ in range(2))
    ours = ops.info_nce(
        *leaves, torch.tensor([each[0] for each in POSITIVES]), more_positives=more, guide=guide, temperature=0.1,
        **loss,
    )  # fmt: skip
    truth = reference.several_positives(
        *exact, POSITIVES, guide=guide, temperature=0.1, groups=PRESETS[loss.get("preset", "qwen3")],
        split="softmax" in loss,
    )  # fmt: skip
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=0)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(truth, exact), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_no_further_positives_change_nothing():
    queries, documents, positive, *_ = batch()
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert torch.equal(
        ops.info_nce(queries, documents, positive, more_positives=none), ops.info_nce(queries, documents, positive)
    )


def test_tau_plus_zero_is_the_plain_loss():
    queries, documents, positive, *_ = batch()
    plain = ops.info_nce(queries, documents, positive)
    assert torch.equal(ops.info_nce(queries, documents, positive, tau_plus=0.0), plain)
    assert relative(ops.info_nce(queries, documents, positive, tau_plus=1e-13), plain) < 1e-9


def test_the_stats_of_several_sweeps():
    queries, documents, positive, owner, ids = batch()
    options = dict(owner=owner, document_ids=ids, return_stats=True)
    _, plain = ops.info_nce(queries, documents, positive, preset="mnrl", **options)
    _, debiased_ = ops.info_nce(queries, documents, positive, preset="mnrl", tau_plus=0.01, **options)
    assert dict(plain) == dict(debiased_)
    _, both_ways = ops.info_nce(queries, documents, positive, preset="mnrl", groups={"doc_query": True}, **options)
    assert both_ways["positive"] == plain["positive"]
    assert both_ways["negative"] == plain["negative"]
    assert both_ways["masked"] != plain["masked"]


@pytest.mark.parametrize("name", GROUPS)
def test_each_group_off(name):
    assert_equal(both(batch(), preset="ms_swift", groups={name: False}), 1e-11)


def test_every_group_its_own_way():
    """Other columns of a tile, other rules, in all four softmaxes; in float32 too."""
    kinds = [Group(margin=0.1 * i - 0.2, relative=i % 2 == 1, hardness=i - 2.0) for i in range(len(GROUPS))]
    groups = dict(zip(GROUPS, kinds, strict=True))
    for softmax in ("joint", "split"):
        assert_equal(both(batch(200, 900), groups=groups, softmax=softmax, focal=1.5), 1e-11)
        assert_equal(both(batch(200, 900), torch.float32, groups=groups, softmax=softmax, focal=1.5), 2e-6)


@pytest.mark.parametrize("doc_mask", ["query_document", "own", "none"])
def test_doc_mask_changes_the_document_groups(doc_mask):
    queries, documents, positive, owner, ids = batch()
    mask = None if doc_mask == "none" else doc_mask
    groups = {name: Group(mask=mask) for name in ("doc_positive", "doc_hard")}
    arguments = dict(owner=owner, document_ids=ids, margin=0.0)
    by_name = ops.info_nce(queries, documents, positive, doc_mask=doc_mask, **arguments)
    assert by_name == ops.info_nce(queries, documents, positive, groups=groups, **arguments)


@pytest.mark.parametrize("softmax", ["joint", "split"])
@pytest.mark.parametrize(
    "groups", [None, {"batch_hard": Group(hardness=4.0), "own_hard": Group(hardness=2.0)}], ids=str
)
def test_temperature_gradient(softmax, groups):
    queries, documents, positive, owner, ids = batch()
    tau, exact = (torch.tensor(0.07, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = ops.info_nce(
        queries, documents, positive, owner=owner, document_ids=ids, temperature=tau, softmax=softmax, groups=groups,
        focal=1.0
    )  # fmt: skip
    truth = reference.info_nce(
        queries, documents, positive, owner, ids, exact, groups={**PRESETS["qwen3"], **(groups or {})},
        split=softmax == "split", focal=1.0,
    )  # fmt: skip
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, tau)[0], torch.autograd.grad(truth, exact)[0], rtol=1e-10, atol=0
    )
    learned = torch.tensor([-2.6], requires_grad=True)  # its logarithm, as one would train it
    ops.info_nce(queries.float(), documents.float(), positive, temperature=learned.exp()).backward()
    assert learned.grad.shape == (1,)
    assert learned.grad != 0


@pytest.mark.promise("R12", "parts of 1, 7, 32, 64, 100, 150 and 199 of 200 rows")
@pytest.mark.parametrize("size", [1, 7, 32, 64, 100, 150, 199])
def test_parts_of_any_size_add_up_in_float32(size):
    data = batch(200, 700, 64)
    whole = both(data, torch.float32, 0.02)[0]
    parts = [both(data, torch.float32, 0.02, rows=(at, min(size, 200 - at)))[0] for at in range(0, 200, size)]
    for index, value in enumerate(whole):
        assert relative(sum(part[index].double() for part in parts), value.double()) <= 1e-6


@pytest.mark.parametrize("preset", ["qwen3", "classification"])
def test_rows_of_several_processes_add_up(preset):
    data = batch(100, 500)
    queries, documents, positive, owner, ids = data
    whole = both(data, preset=preset)[0]
    parts = [both(data, preset=preset, rows=rows) for rows in ((0, 37), (37, 60), (97, 3), (100, 0))]
    for part, truth in parts[:3]:
        assert_equal((part, truth), 1e-11)
    for index, value in enumerate(whole):
        torch.testing.assert_close(sum(part[0][index] for part in parts), value, rtol=1e-11, atol=1e-14)
    with pytest.raises(ValueError, match="rows must lie in 0 to 100, got 90 to 101"):
        ops.info_nce(queries, documents, positive, rows=(90, 11))


def test_reductions():
    queries, documents, positive, owner, _ = (
        x.clone().requires_grad_() if x.is_floating_point() else x for x in batch()
    )
    mean, total = (ops.info_nce(queries, documents, positive, owner=owner, reduction=r) for r in ("mean", "sum"))
    torch.testing.assert_close(total, mean * len(queries))
    for a, b in zip(*(torch.autograd.grad(x, (queries, documents)) for x in (total, mean)), strict=True):
        torch.testing.assert_close(a, b * len(queries))


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 5, 3), (5, 5, 100), (97, 256, 33), (385, 257, 40), (400, 1100, 130)])
def test_shapes_around_the_panels(shape):
    num_queries, num_documents, dim = shape
    data = batch(num_queries, max(num_documents, 41), dim)
    assert_equal(both(data), 1e-11)
    assert_equal(both(data, preset="memeff", softmax="split"), 1e-11)


@pytest.mark.promise("R12", "float32 at low temperatures")
@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.01])
@pytest.mark.parametrize("dim", [64, 128, 1024])
@pytest.mark.parametrize("noise", [0.3, 0.8, 1.5])
def test_float32_at_low_temperature(temperature, dim, noise):
    """Sure rows and unsure ones.

    Single products in float32 are off by 5e-8, which is 5e-6 of a weight at tau = 0.01.
    """
    ours, truth = both(batch(256, 1024, dim, noise=noise), torch.float32, temperature)
    assert abs(float(ours[0]) - float(truth[0])) < 1e-6
    for actual, exact in zip(ours[1:], truth[1:], strict=True):
        assert relative(actual, exact) < 2e-6


@pytest.mark.promise("R12", "1024 queries and documents at 0.05, 0.02 and 0.01, float32 and bfloat16")
@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.01])
def test_a_thousand_queries_at_low_temperature(temperature):
    """In bfloat16 against the vectors before they were rounded; without masks, whose limits rounding may cross."""
    data = batch(1024, 1024, 256, noise=0.8)
    ours, truth = both(data, torch.float32, temperature)
    assert abs(float(ours[0]) - float(truth[0])) <= 1e-6
    for actual, exact in zip(ours[1:], truth[1:], strict=True):
        assert relative(actual, exact) <= 2e-6
    rounded = both(data, torch.bfloat16, temperature, preset="mnrl")[0]
    truth = both(data, torch.float64, temperature, preset="mnrl")[1]
    assert abs(float(rounded[0]) - float(truth[0])) <= 1e-3
    for actual, exact in zip(rounded[1:], truth[1:], strict=True):
        assert relative(actual, exact) <= 7e-3


FINITE = {
    "logits of 1e4 and -1e4": dict(temperature=1e-4),
    "every negative over the limit": dict(margin=-1e9),
    "one text": dict(ids=0),
    "no masks": dict(margin=None),
    "debiased": dict(tau_plus=0.05),
}


@pytest.mark.promise("R12", "logits of 1e4, everything masked, one text, a learned temperature: all finite")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", FINITE)
def test_always_finite(case, preset, dtype):
    """Vectors that are equal or opposite, some of them several times; the temperature is learned."""
    given = dict(FINITE[case])
    direction = normalize(torch.randn(4, 32), dim=1)
    documents = torch.cat([direction, -direction, direction, direction]).to(dtype).requires_grad_()
    queries = torch.cat([direction, direction, -direction]).to(dtype).requires_grad_()
    ids = given.pop("ids", None)
    tau = torch.tensor(given.pop("temperature", 0.02), requires_grad=True)
    for softmax in ("joint", "split"):
        for focal in (0.0, 2.0):
            loss = ops.info_nce(
                queries, documents, torch.arange(12), owner=torch.arange(16) % 12, preset=preset, temperature=tau,
                document_ids=None if ids is None else torch.full((16,), ids), softmax=softmax, focal=focal, **given,
            )  # fmt: skip
            assert loss.isfinite()
            for gradient in torch.autograd.grad(loss, (queries, documents, tau)):
                assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_storage_costs_only_the_rounding_of_the_gradient(dtype):
    ours, truth = both(batch(), dtype)
    assert abs(float(ours[0]) - float(truth[0])) < 1e-5
    for actual, exact in zip(ours[1:], truth[1:], strict=True):
        assert relative(actual, exact) < 4e-3


def test_confident_rows_keep_a_relative_error_in_their_gradient():
    """P of the positive is near 1: forming P - 1 would lose everything that is left."""
    ours, truth = both(batch(64, 128, 64, noise=0.15), torch.float32, 0.02, preset="mnrl")
    rows = (ours[1].double() - truth[1]).norm(dim=1) / truth[1].norm(dim=1)
    assert rows.median() < 1e-4


@pytest.mark.parametrize("temperature", [0.0115, 0.005, 0.001])
def test_very_low_temperature_without_any_similarity(temperature):
    queries = normalize(torch.randn(40, 64) * torch.tensor([1.0] * 32 + [0] * 32), dim=1)
    documents = normalize(torch.randn(40, 64) * torch.tensor([0.0] * 32 + [1] * 32) - 0.05 * queries, dim=1)
    queries.requires_grad_()
    loss = ops.info_nce(queries, documents, torch.arange(40), temperature=temperature)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(queries.grad).all()
    assert queries.grad.abs().sum() > 0


@pytest.mark.promise("R12", "every negative masked")
def test_every_negative_masked_gives_zero_loss():
    document = normalize(torch.randn(1, 16), dim=1).repeat(8, 1)
    queries = document.clone().requires_grad_()
    loss = ops.info_nce(queries, document, torch.arange(8), document_ids=torch.zeros(8, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert (queries.grad == 0).all()


def test_margin_masks_false_negatives():
    queries = torch.eye(4)[:2]
    documents = torch.stack([torch.tensor([0.6, 0.0, 0.8, 0.0]), torch.eye(4)[1], torch.eye(4)[0]])
    arguments = (queries, documents, torch.tensor([0, 1]))
    masked = ops.info_nce(*arguments, preset="qwen3_stage2", temperature=0.1)
    kept = ops.info_nce(*arguments, preset="qwen3_stage2", temperature=0.1, margin=0.5)
    assert masked < 0.01 < 1 < kept


def dense_prefixes(data, dims, weights, groups, temperature=0.05, **options):
    """(loss, gradients) in float64: a weighted sum of losses of prefixes that are normalised again."""
    queries, documents, *rest = data
    leaves = [x.detach().double().requires_grad_() for x in (queries, documents)]
    losses = [
        weight * reference.info_nce(*(normalize(x[:, :dim], dim=1) for x in leaves), *rest, temperature, groups=groups,
            **options)
        for dim, weight in zip(dims, weights, strict=True)
    ]  # fmt: skip
    return sum(losses).detach(), *torch.autograd.grad(sum(losses), leaves)


def prefixes(data, dtype, dims, temperature=0.05, **options):
    queries, documents, positive, owner, ids = data
    leaves = [x.to(dtype).requires_grad_() for x in (queries, documents)]
    loss = ops.info_nce(
        *leaves, positive, owner=owner, document_ids=ids, temperature=temperature, matryoshka=dims, **options
    )
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dims", [[48], [48, 16], [5, 16, 33], [1, 2, 3, 17, 31, 47, 48]], ids=str)
def test_matryoshka_equals_renormalised_prefixes(preset, dims):
    data = batch(70, 300)
    truth = dense_prefixes(data, dims, [1 / len(dims)] * len(dims), PRESETS[preset])
    assert_equal((prefixes(data, torch.float64, dims, preset=preset), truth), 1e-10)


@pytest.mark.parametrize("softmax", ["joint", "split"])
def test_matryoshka_with_everything_else(softmax):
    data, dims, weights = batch(130, 600, 96), [8, 40, 96], [0.2, 0.0, 1.5]
    groups = {"own_hard": Group(hardness=3.0), "batch_hard": Group(margin=-0.1, relative=True), "doc_own": Group()}
    options = dict(focal=1.5, rows=(10, 100))
    truth = dense_prefixes(
        data, dims, weights, {**PRESETS["qwen3"], **groups}, split=softmax == "split", **options
    )  # fmt: skip
    ours = prefixes(
        data, torch.float64, dims, matryoshka_weights=weights, groups=groups, softmax=softmax, **options
    )  # fmt: skip
    assert_equal((ours, truth), 1e-10)


@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.01])
def test_matryoshka_in_float32(temperature):
    dims = [32, 64, 128, 256]
    data = tuple(x.float() if x.is_floating_point() else x for x in batch(256, 700, 256, noise=0.8))
    truth = dense_prefixes(data, dims, [0.25] * 4, PRESETS["qwen3"], temperature)
    ours = prefixes(data, torch.float32, dims, temperature)
    assert abs(float(ours[0]) - float(truth[0])) < 1e-6
    assert_equal((ours[1:], truth[1:]), 2e-6)


def test_matryoshka_temperature_gradient():
    queries, documents, positive, owner, _ = batch()
    tau, exact = (torch.tensor(0.07, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = ops.info_nce(queries, documents, positive, owner=owner, temperature=tau, matryoshka=[48, 16])
    cut = [[normalize(x[:, :dim], dim=1) for x in (queries, documents)] for dim in (48, 16)]
    truth = sum(reference.info_nce(*vectors, positive, owner, temperature=exact) for vectors in cut) / 2
    torch.testing.assert_close(
        *(torch.autograd.grad(x, t)[0] for x, t in ((loss, tau), (truth, exact))), rtol=1e-10, atol=0
    )


def test_matryoshka_weights_go_with_their_dimensions():
    queries, documents, positive, owner, _ = batch()
    rising, falling = (
        ops.info_nce(queries, documents, positive, owner=owner, matryoshka=dims, matryoshka_weights=weights)
        for dims, weights in (([8, 48], [0.2, 1.5]), ([48, 8], [1.5, 0.2]))
    )
    swapped = ops.info_nce(queries, documents, positive, owner=owner, matryoshka=[8, 48], matryoshka_weights=[1.5, 0.2])
    assert rising == falling != swapped


def test_a_prefix_of_zeros_stays_finite():
    queries, documents, positive, owner, _ = batch()
    queries, documents = queries.float(), documents.float()
    queries[3, :16] = documents[7, :16] = 0
    leaves = [queries.requires_grad_(), documents.requires_grad_()]
    loss = ops.info_nce(*leaves, positive, owner=owner, matryoshka=[16, 48])
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in leaves)


@pytest.mark.promise("R12", "blocks of 1, 7, 64, 100, 210 and 310 of 310 documents")
@pytest.mark.parametrize("size", [1, 7, 64, 100, 210, 310])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str)
def test_blocks_of_a_ring_add_up_to_the_whole(size, dtype, tolerance):
    """Two rounds over blocks of documents and queries: log sums, then gradients."""
    queries, documents, positive, owner, ids = (x.to(dtype) if x.is_floating_point() else x for x in batch(60, 310))
    options = Options.of("qwen3", {"doc_own": Group()}, 0.1, None, "split", 0.5, 0.05, 1 / 60)
    role = torch.zeros(310, dtype=torch.uint8).index_fill(0, positive, 1)
    anchors = Anchors(queries, documents[positive], ids[positive])
    cuts = [(slice(at, at + size), slice(at // 5, (at + size) // 5)) for at in range(0, 310, size)]
    cuts.append((slice(310, 310), slice(60, 60)))

    def blocks(**given):
        for number, (d, q) in enumerate(cuts):
            columns = Columns(documents[d], ids[d], role[d], owner[d])
            others = Others(queries[q], ids[positive][q])
            yield info_nce_block(anchors, columns, others, options, adds_positive=number == 0, **given)

    sums = torch.stack([block.log_negatives_RS for block in blocks()])
    totals = torch.logsumexp(sums, dim=0)
    results = list(blocks(log_negatives_RS=totals, gradients=True))
    d_queries = sum(block.d_anchors_RE for block in results) + torch.cat([block.d_others_QE for block in results])
    d_documents = torch.cat([block.d_columns_CE for block in results])
    d_documents.index_add_(0, positive, sum(block.d_positives_RE for block in results))

    leaves = [queries.requires_grad_(), documents.requires_grad_(), torch.tensor(0.05, dtype=dtype, requires_grad=True)]
    whole = ops.info_nce(
        *leaves[:2], positive, owner=owner, document_ids=ids, groups={"doc_own": Group()}, softmax="split", focal=0.5,
        temperature=leaves[2],
    )  # fmt: skip
    ours = (results[0].losses_R.mean(), d_queries, d_documents, sum(block.d_temperature for block in results))
    for actual, exact in zip(ours, (whole.detach(), *torch.autograd.grad(whole, leaves)), strict=True):
        assert relative(actual, exact.double()) <= tolerance


def test_stats():
    queries, documents, positive, owner, ids = batch()
    _, stats = ops.info_nce(queries, documents, positive, owner=owner, document_ids=ids, return_stats=True)
    assert stats["positive"] == pytest.approx(float((queries * documents[positive]).sum(1).mean()))
    assert stats["negative"] < stats["positive"]
    assert 0 < stats["masked"] < 1


@pytest.mark.parametrize("margin", [0.1, -0.8])  # none and many of the strangers are over
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_stats_count_every_candidate(dtype, margin):
    """Whole tiles of strangers are masked by vectors, the others one by one; the counts must not tell them apart."""
    queries, documents, positive, owner, ids = batch(60, 1100)
    queries, documents = queries.to(dtype), documents.to(dtype)
    scores = queries @ documents.T
    limit = scores.gather(1, positive[:, None]) + margin
    candidate = torch.arange(1100)[None] != positive[:, None]
    dropped = candidate & ((scores > limit) | (ids[None] == ids[positive][:, None]))
    _, stats = ops.info_nce(
        queries,
        documents,
        positive,
        owner=owner,
        document_ids=ids,
        preset="qwen3_stage2",
        margin=margin,
        return_stats=True,
    )
    assert stats["masked"] == pytest.approx(int(dropped.sum()) / int(candidate.sum()), rel=1e-12)
    assert stats["negative"] == pytest.approx(float(scores[candidate & ~dropped].double().mean()), rel=1e-4)


@pytest.mark.promise("R10", "InfoNCE")
def test_gradcheck():
    queries, documents, positive, owner, ids = batch(4, 41, 3)
    arguments = [x.clone().requires_grad_() for x in (queries, documents)]
    torch.autograd.gradcheck(
        lambda q, d: ops.info_nce(q, d, positive, owner=owner, document_ids=ids, temperature=0.2, margin=0.5), arguments
    )


@pytest.mark.promise("R14", "InfoNCE")
def test_same_bits_for_any_thread_count_and_scaled_by_the_outer_gradient():
    queries, documents, positive, owner, ids = (x.float() if x.is_floating_point() else x for x in batch(200, 600, 40))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [queries.clone().requires_grad_(), documents.clone().requires_grad_()]
            loss = ops.info_nce(*leaves, positive, owner=owner, document_ids=ids)
            results.append((loss.detach(), *torch.autograd.grad(3 * loss, leaves)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    leaves = [queries.clone().requires_grad_(), documents.clone().requires_grad_()]
    plain = torch.autograd.grad(ops.info_nce(*leaves, positive, owner=owner, document_ids=ids), leaves)
    torch.testing.assert_close(results[0][1], 3 * plain[0])


@pytest.mark.parametrize("isa", _C.available_isas())
def test_every_instruction_set(isa):
    best = _C.current_isa()
    try:
        _C.set_isa(isa)
        ours, truth = both(batch(), torch.float32)
    finally:
        _C.set_isa(best)
    assert all(relative(actual, exact) < 4e-6 for actual, exact in zip(ours, truth, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"preset": "best"}, ValueError, "preset must be one of qwen3"),
        ({"doc_mask": "all"}, ValueError, "doc_mask must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": float("nan")}, ValueError, "temperature must be positive"),
        ({"margin": float("nan")}, ValueError, "margin must be a number"),
        ({"positive": torch.tensor([0, 1, 4])}, ValueError, "positive must be from 0 to 3 .*, got 4 at 2"),
        ({"positive": torch.tensor([0, -1, 2])}, ValueError, "got -1 at 1"),
        ({"positive": torch.tensor([0, 1])}, ValueError, r"positive must have shape \[3\], got \[2\]"),
        ({"positive": torch.tensor([0, 1, 2], dtype=torch.int32)}, TypeError, "positive must be int64"),
        ({"owner": torch.tensor([0, 1, 2])}, ValueError, r"owner must have shape \[4\]"),
        ({"owner": torch.tensor([0, 1, 2, 3])}, ValueError, "owner must be from -1 to 2"),
        ({"document_ids": torch.zeros(2, dtype=torch.int64)}, ValueError, "document_ids must have shape"),
        ({"queries": torch.zeros(3, 5)}, ValueError, "share their dimension, got 5 and 8"),
        ({"queries": torch.zeros(8)}, ValueError, "queries must have shape"),
        ({"queries": torch.zeros(3, 8).double()}, TypeError, "documents must have the dtype of queries"),
        ({"matryoshka": []}, ValueError, "matryoshka must list"),
        ({"matryoshka": [9]}, ValueError, "from 1 to 8"),
        ({"matryoshka": [4, 8, 2]}, ValueError, r"must rise or fall, each dimension once, got \[4, 8, 2\]"),
        ({"matryoshka": [4, 4]}, ValueError, "must rise or fall"),
        ({"matryoshka": [4, 8], "matryoshka_weights": [1.0]}, ValueError, "must be 2 numbers of at least 0"),
        ({"matryoshka_weights": [1.0]}, ValueError, "need matryoshka"),
        (
            {"queries": torch.zeros(0, 8), "positive": torch.zeros(0, dtype=torch.int64)},
            ValueError,
            "at least one query",
        ),
        ({"groups": {"best": True}}, ValueError, "a group is one of own_hard, .*, got 'best'"),
        ({"groups": {"own_hard": 0.1}}, TypeError, "own_hard must be a Group, True, False or None, got float"),
        ({"groups": {"query_query": Group(mask="query_document")}}, ValueError, "no query-document score"),
        ({"groups": {"own_hard": Group(hardness=-50.0)}}, ValueError, "hardness of own_hard must be above"),
        ({"softmax": "both"}, ValueError, "softmax must be 'joint' or 'split', got 'both'"),
        ({"focal": -1.0}, ValueError, "focal must be finite and at least 0"),
        ({"more_positives": torch.zeros(2, dtype=torch.int64)}, ValueError, r"must be int64 of shape \[X, 2\], got"),
        ({"more_positives": torch.tensor([[3, 0]])}, ValueError, "from 0 to 2 in column 0 .*queries.*, got 3"),
        ({"more_positives": torch.tensor([[0, -1]])}, ValueError, "from 0 to 3 in column 1 .*documents.*, got -1"),
        ({"guide": torch.zeros(3, 2)}, TypeError, "guide must be two tensors"),
        ({"guide": (torch.zeros(3, 2), torch.zeros(3, 2))}, ValueError, r"each of documents, of shape \[4, F\], got"),
        ({"guide": (torch.zeros(3, 2), torch.zeros(4, 3))}, ValueError, "guide: queries and documents must share"),
        ({"guide_margin": float("nan")}, ValueError, "guide_margin must be"),
        ({"tau_plus": 1.0}, ValueError, "tau_plus must be at least 0 and below 1, got 1.0"),
        ({"tau_plus": float("nan")}, ValueError, "tau_plus must be at least 0 and below 1, got nan"),
        ({"groups": {"doc_query": Group(mask="query_document")}}, ValueError, "doc_query has no query-document score"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
        ({"temperature": torch.tensor(-0.1)}, ValueError, "temperature must be positive"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {
        "queries": torch.zeros(3, 8),
        "documents": torch.zeros(4, 8),
        "positive": torch.tensor([0, 1, 2]),
    } | changes
    required = [arguments.pop(name) for name in ("queries", "documents", "positive")]
    with pytest.raises(error, match=message):
        ops.info_nce(*required, **arguments)


@pytest.mark.parametrize("arguments", [{"mask": "all"}, {"margin": float("nan")}, {"hardness": float("inf")}])
def test_a_bad_group_is_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Group(**arguments)


def test_the_native_options_name_what_they_do_not_know():
    options = _C.InfoNceOptions(temperature=0.05, split=False, focal=0.0, scale=1.0)
    fields = {"margin": 0.1, "relative": False, "hardness": 0.0}
    with pytest.raises(ValueError, match=r"group must be one of own_hard, .*, doc_hard, got 'other'"):
        options.turn_on("other", mask="own", **fields)
    with pytest.raises(ValueError, match="mask must be one of none, own, query_document, got 'all'"):
        options.turn_on("own_hard", mask="all", **fields)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        _C.InfoNceOptions(temperature=0.0, split=False, focal=0.0, scale=1.0)
    for group in NATIVE_GROUPS:
        options.turn_on(group, mask="none", **fields)


@pytest.mark.deep
@pytest.mark.parametrize("case", ["both directions, debiased", "several positives", "guide"])
def test_losses_of_several_sweeps_hold_no_matrix_of_scores(case):
    """4096 queries and documents: a matrix of their scores in float32 has 64 MiB, and its bits have 2 MiB."""
    count = 4096
    queries, documents = (normalize(torch.randn(count, 32), dim=1).requires_grad_() for _ in range(2))
    options = {
        "both directions, debiased": dict(preset="gte", tau_plus=0.01),
        "several positives": dict(more_positives=torch.tensor([[query, query + 1] for query in range(0, count, 2)])),
        "guide": dict(guide=(torch.randn(count, 8), torch.randn(count, 8)), preset="mnrl"),
    }[case]

    def step():
        ops.info_nce(queries, documents, torch.arange(count), **options).backward()

    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 40 << 20, f"{largest >> 20} MiB at once"
