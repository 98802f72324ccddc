"""A NaN in a vector reaches the loss of the rows that it is a candidate of, and of no others."""

from itertools import product

import pytest
import torch
from torch.nn.functional import normalize

from pyqemb import _C, ops
from pyqemb.ops import Group
from pyqemb.ops.groups import GROUPS, PRESETS, Options
from pyqemb.ops.info_nce import Anchors, Columns, Others, info_nce_block

QUERIES, DOCUMENTS, DIM = 5, 300, 16
POSITIVE = torch.arange(QUERIES)
OWNER = torch.full((DOCUMENTS,), -1)
OWNER[:QUERIES] = OWNER[QUERIES : 2 * QUERIES] = OWNER[280 : 280 + QUERIES] = torch.arange(QUERIES)
OWN = (2, 7, 282)  # documents of query 2: its positive and two others


def vectors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((QUERIES, DIM), (DOCUMENTS, DIM))
    return tuple(
        normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=1).to(dtype) for shape in shapes
    )


def losses(queries, documents, **options):
    """Of each row by itself."""
    rows = ((row, 1) for row in range(QUERIES))
    return torch.stack([ops.info_nce(queries, documents, POSITIVE, owner=OWNER, rows=r, **options) for r in rows])


def with_nan(x, row, column=3):
    x = x.clone()
    x[row, column] = torch.nan
    return x


OPTIONS = {
    "plain": {},
    "split": {"softmax": "split"},
    "focal": {"focal": 2.0},
    "matryoshka": {"matryoshka": [DIM, 5]},
    "no masks": {"margin": None},
    "margin of the positive": {"margin": -0.5},
    "temperature": {"temperature": torch.tensor(0.1, requires_grad=True)},
    "hardness": {"groups": {"own_hard": Group(hardness=2.0)}},
    "debiased": {"tau_plus": 0.01},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_of_what_a_query_owns(preset, options, dtype):
    queries, documents = vectors(dtype)
    for isa in _C.available_isas():
        before = _C.current_isa()
        _C.set_isa(isa)
        try:
            clean = losses(queries, documents, preset=preset, **options)
            broken = [losses(queries, with_nan(documents, row), preset=preset, **options) for row in OWN]
        finally:
            _C.set_isa(before)
        assert clean.isfinite().all()
        for row, loss in zip(OWN, broken, strict=True):
            assert loss[2].isnan(), (isa, row)
            if preset == "classification":  # nobody else's candidate
                assert torch.equal(loss[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def is_candidate(group, row, query):
    """Whether a document of OWN, or another one, is a query's candidate in a group."""
    if "own" in group or group in ("query_query", "doc_query"):
        return "own" in group and row in OWN and query == 2
    return (row == 2) == group.endswith("positive") and not (row in OWN and query == 2)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    "kind", [Group(), Group(mask=None), Group(mask="query_document"), Group(relative=True, margin=-0.2)], ids=str
)
@pytest.mark.parametrize("softmax", ["joint", "split"])
def test_of_each_group_alone(group, kind, softmax):
    """Which documents and queries are candidates decides which rows have a NaN."""
    if group in ("query_query", "doc_query") and kind.mask == "query_document":
        pytest.skip("has no query-document score")
    queries, documents = vectors()
    options = dict(groups={**dict.fromkeys(GROUPS), group: kind}, softmax=softmax, temperature=0.1)
    clean = losses(queries, documents, **options)
    for row in (*OWN, 100):
        loss = losses(queries, with_nan(documents, row), **options)
        expected = [(row == 2 and query == 2) or is_candidate(group, row, query) for query in range(QUERIES)]
        assert loss.isnan().tolist() == expected, row
        kept = ~torch.tensor(expected)
        assert torch.equal(loss[kept], clean[kept])
    loss = losses(with_nan(queries, 2), documents, **options)
    assert loss.isnan().tolist() == [query == 2 or group in ("query_query", "doc_query") for query in range(QUERIES)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradients_of_the_rows_concerned_are_nan(options):
    queries, documents = vectors()
    leaves = [queries.requires_grad_(), with_nan(documents, 7).requires_grad_()]
    loss = ops.info_nce(*leaves, POSITIVE, owner=OWNER, preset="classification", **options)
    loss.backward()
    assert loss.isnan()
    assert leaves[0].grad[2].isnan().any()
    assert leaves[1].grad[7].isnan().any()
    assert leaves[0].grad[[0, 1, 3, 4]].isfinite().all()
    assert leaves[1].grad[[0, 1, 3, 4, 5, 6, 8, 9]].isfinite().all()
    if (tau := options.get("temperature")) is not None:
        assert tau.grad.isnan()


def test_blocks_of_a_ring_keep_it():
    """Their log sums too: what a ring adds up is NaN, not the sum of the others."""
    queries, documents = vectors(torch.float64)
    columns = with_nan(documents[QUERIES:], 100)
    count = len(columns)
    options = Options.of("mnrl", None, 0.1, None, "joint", 0.0, 0.1, 1.0)
    block = info_nce_block(
        Anchors(queries, documents[:QUERIES], POSITIVE),
        Columns(
            columns,
            torch.arange(QUERIES, QUERIES + count),
            torch.zeros(count, dtype=torch.uint8),
            torch.full((count,), -1),
        ),
        Others(queries[:0], POSITIVE[:0]),
        options,
    )
    assert block.losses_R.isnan().all()
    assert block.log_negatives_RS[:, 0].isnan().all()


@pytest.mark.parametrize(("sign", "preset"), product([1, -1], ["mnrl", "qwen3"]))
def test_infinity(sign, preset):
    """A score of minus infinity has no weight; one of infinity is over every limit, or makes the loss infinite or
    NaN.
    """
    queries, documents = vectors()
    queries[:, 0] = 0.5
    documents[7] = 0
    documents[7, 0] = sign * torch.inf
    without = torch.arange(DOCUMENTS) != 7
    loss = losses(queries, documents, preset=preset, groups=dict.fromkeys(("doc_own", "doc_positive", "doc_hard")))
    rest = [
        ops.info_nce(
            queries, documents[without], POSITIVE, owner=OWNER[without], rows=(row, 1), preset=preset,
            groups=dict.fromkeys(("doc_own", "doc_positive", "doc_hard")),
        )
        for row in range(QUERIES)
    ]  # fmt: skip
    if sign > 0 and preset == "mnrl":
        assert not loss.isfinite().any()
    else:
        torch.testing.assert_close(loss, torch.stack(rest))


def test_a_candidate_that_is_none_stays_out_of_the_distillation():
    queries, documents = vectors(torch.float64)
    documents[0] = torch.nan
    leaves = [queries.requires_grad_(), documents.requires_grad_()]
    candidates = torch.tensor([[1, 2], [3, -1], [4, -1], [5, 6], [7, 8]])
    ops.distill_scores(*leaves, candidates, torch.zeros(QUERIES, 2)).backward()
    assert leaves[0].grad.isfinite().all()
    assert (leaves[1].grad[0] == 0).all()
