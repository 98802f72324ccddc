import dataclasses

import pytest
import torch
from torch.nn.functional import normalize

from pyqemb import _C, ops
from pyqemb.ops.infonce import PRESETS
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


def both(data, dtype=torch.float64, temperature=0.05, preset="qwen3", margin=0.1, doc_mask="query_document", **options):
    queries, documents, positive, owner, ids = data
    low = [x.to(dtype).requires_grad_() for x in (queries, documents)]
    loss = ops.info_nce(
        *low, positive, owner=owner, document_ids=ids, temperature=temperature, preset=preset, margin=margin,
        doc_mask=doc_mask, **options,
    )  # fmt: skip
    grads = torch.autograd.grad(loss, low)
    exact = [x.detach().double().requires_grad_() for x in low]
    groups = dataclasses.asdict(PRESETS[preset])
    use_margin = groups.pop("margin")
    truth = reference.info_nce(
        *exact, positive, owner, ids, temperature, margin if use_margin else None, doc_mask=doc_mask, **groups
    )
    return (loss.detach(), *grads), (truth.detach(), *torch.autograd.grad(truth, exact))


def relative(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("doc_mask", ["query_document", "own", "none"])
def test_equals_the_dense_formula(preset, doc_mask):
    ours, truth = both(batch(), preset=preset, doc_mask=doc_mask)
    for actual, exact in zip(ours, truth, strict=True):
        assert relative(actual, exact) < 1e-11


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 5, 3), (5, 5, 100), (97, 256, 33), (385, 257, 40), (400, 1100, 130)])
def test_shapes_around_the_panels(shape):
    num_queries, num_documents, dim = shape
    data = batch(num_queries, max(num_documents, 41), dim)
    ours, truth = both(data)
    for actual, exact in zip(ours, truth, strict=True):
        assert relative(actual, exact) < 1e-11


@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.01])
def test_float32_at_low_temperature(temperature):
    ours, truth = both(batch(512, 1024, 128, noise=0.8), torch.float32, temperature)
    assert abs(float(ours[0]) - float(truth[0])) < 1e-6
    for actual, exact in zip(ours[1:], truth[1:], strict=True):
        assert relative(actual, exact) < 4e-6


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


def test_very_low_temperature_without_any_similarity():
    queries = normalize(torch.randn(40, 64) * torch.tensor([1.0] * 32 + [0] * 32), dim=1)
    documents = normalize(torch.randn(40, 64) * torch.tensor([0.0] * 32 + [1] * 32) - 0.05 * queries, dim=1)
    queries.requires_grad_()
    loss = ops.info_nce(queries, documents, torch.arange(40), temperature=0.005)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(queries.grad).all() and queries.grad.abs().sum() > 0


def test_every_negative_masked_gives_zero_loss():
    document = normalize(torch.randn(1, 16), dim=1).repeat(8, 1)
    queries = document.clone().requires_grad_()
    loss = ops.info_nce(queries, document, torch.arange(8), document_ids=torch.zeros(8, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and (queries.grad == 0).all()


def test_margin_masks_false_negatives():
    queries = torch.eye(4)[:2]
    documents = torch.stack([torch.tensor([0.6, 0.0, 0.8, 0.0]), torch.eye(4)[1], torch.eye(4)[0]])
    arguments = (queries, documents, torch.tensor([0, 1]))
    masked = ops.info_nce(*arguments, preset="qwen3_stage2", temperature=0.1)
    kept = ops.info_nce(*arguments, preset="qwen3_stage2", temperature=0.1, margin=0.5)
    assert masked < 0.01 < 1 < kept


def test_matryoshka_is_the_mean_over_renormalised_prefixes():
    queries, documents, positive, owner, ids = batch()
    losses = [
        reference.info_nce(normalize(queries[:, :d], dim=1), normalize(documents[:, :d], dim=1), positive, owner, ids)
        for d in (48, 16)
    ]
    ours = ops.info_nce(queries, documents, positive, owner=owner, document_ids=ids, matryoshka=[48, 16])
    torch.testing.assert_close(ours, sum(losses) / 2)


def test_stats():
    queries, documents, positive, owner, ids = batch()
    _, stats = ops.info_nce(queries, documents, positive, owner=owner, document_ids=ids, return_stats=True)
    assert stats["positive"] == pytest.approx(float((queries * documents[positive]).sum(1).mean()))
    assert stats["negative"] < stats["positive"] and 0 < stats["masked"] < 1


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


def test_gradcheck():
    queries, documents, positive, owner, ids = batch(4, 41, 3)
    arguments = [x.clone().requires_grad_() for x in (queries, documents)]
    torch.autograd.gradcheck(
        lambda q, d: ops.info_nce(q, d, positive, owner=owner, document_ids=ids, temperature=0.2, margin=0.5), arguments
    )


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


def test_no_queries():
    documents = torch.ones(32, 512, requires_grad=True)
    for _ in range(3):  # the second time in memory that was used
        loss = ops.info_nce(torch.zeros(0, 512), documents, torch.zeros(0, dtype=torch.int64))
        (gradient,) = torch.autograd.grad(loss, documents)
        assert loss == 0 and not gradient.any()
        torch.full_like(documents, 3.0)


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
