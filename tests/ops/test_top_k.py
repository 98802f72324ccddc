import pytest
import torch

from pyqemb import _C, ops
from pyqemb.testing import reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("queries", "documents", "dim", "k"),
    [(1, 1, 3, 1), (95, 255, 40, 7), (97, 600, 33, 50), (3, 20, 16, 20), (2, 20_001, 8, 30)],
)
def test_equals_sorting(dtype, queries, documents, dim, k):
    q, d = torch.randn(queries, dim).to(dtype), torch.randn(documents, dim).to(dtype)
    scores, indices = ops.top_k(q, d, k)
    truth, _ = reference.top_k(q.double(), d.double(), k)
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=1e-5)
    exact = (q.double() @ d.double().T).gather(1, indices)
    torch.testing.assert_close(exact, truth, rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_equal_scores_by_lower_index():
    for documents in (700, 20_000):  # one span of documents, and several
        _, indices = ops.top_k(torch.ones(2, 4), torch.ones(documents, 4), 5)
        assert indices.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_documents_that_qualify_are_in_one_span_of_many():
    documents = torch.zeros(20_000, 1)
    documents[17_000:17_003] = torch.tensor([[1.0], [3.0], [2.0]])
    ceiling, exclude = torch.tensor([2.5]), torch.tensor([[17_000]])
    scores, indices = ops.top_k(torch.ones(1, 1), documents, 2, ceiling=ceiling, exclude=exclude)
    assert indices.tolist() == [[17_002, 0]]
    assert scores.tolist() == [[2.0, 0.0]]


def test_exclude_and_ceiling():
    q, d = torch.eye(2), torch.tensor([[1.0, 0], [0.9, 0.1], [0.5, 0.5], [0.1, 0.9]])
    scores, indices = ops.top_k(q, d, 3, exclude=torch.tensor([[0, -1], [3, 2]]), ceiling=torch.tensor([0.8, 1.0]))
    assert indices.tolist() == [[2, 3, -1], [1, 0, -1]]
    assert scores[:, 2].tolist() == [-torch.inf] * 2


def test_nan_never_qualifies():
    documents = torch.tensor([[torch.nan], [1.0], [2.0]])
    assert ops.top_k(torch.ones(1, 1), documents, 3)[1].tolist() == [[2, 1, -1]]


def test_nothing_asked_and_nothing_there():
    assert ops.top_k(torch.ones(2, 4), torch.ones(3, 4), 0)[0].shape == (2, 0)
    assert ops.top_k(torch.ones(0, 4), torch.ones(3, 4), 2)[0].shape == (0, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": 4}, ValueError, "k must be from 0 to the number of documents, 3, got 4"),
        ({"k": -1}, ValueError, "got -1"),
        ({"k": 1.5}, TypeError, "k must be an integer"),
        ({"queries": [1]}, TypeError, "queries must be a torch.Tensor"),
        ({"queries": torch.ones(2, 5)}, ValueError, "share their dimension, got 5 and 4"),
        ({"documents": torch.ones(3, 4).double()}, TypeError, "documents must have the dtype"),
        ({"exclude": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "exclude must have shape"),
        ({"ceiling": torch.zeros(2).double()}, TypeError, "ceiling must be float32"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"queries": torch.ones(2, 4), "documents": torch.ones(3, 4), "k": 1} | changes
    required = [arguments.pop(name) for name in ("queries", "documents", "k")]
    with pytest.raises(error, match=message):
        ops.top_k(*required, **arguments)


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("kind", ["nearly equal", "all lengths", "zeros", "one coordinate", "odd"])
def test_the_screen_loses_nothing(isa, kind):
    """Many queries meet a screen of 16-bit products first: the exact best must come through it, however close the
    scores are.
    """
    before = _C.current_isa()
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(130, 47 if kind == "odd" else 64, generator=generator)
    d = torch.randn(900, q.shape[1], generator=generator)
    if kind == "nearly equal":
        d = torch.nn.functional.normalize(d[:1] + 1e-4 * d, dim=1)
    elif kind == "all lengths":
        d *= 10.0 ** torch.linspace(-6, 6, 900)[:, None]
        q *= 10.0 ** torch.linspace(-3, 3, 130)[:, None]
    elif kind == "zeros":
        d[:800] = 0
        q[:40] = 0
    elif kind == "one coordinate":
        d, q = torch.eye(64).repeat(15, 1)[:900] * 3, torch.eye(64).repeat(3, 1)[:130]
    _C.set_isa(isa)
    try:
        scores, indices = ops.top_k(q, d, 11)
    finally:
        _C.set_isa(before)
    exact = q.double() @ d.double().T
    truth = exact.sort(dim=1, descending=True).values[:, :11]
    found = exact.gather(1, indices)
    room = 64 * 2e-7 * q.norm(dim=1, keepdim=True).double() * d.norm(dim=1).max()
    assert ((found - truth).abs() <= room).all()
    assert ((scores - found).abs() <= room).all()
    assert all(len(set(row)) == 11 for row in indices.tolist())


def test_what_is_not_finite_passes_the_screen_by():
    q, d = torch.randn(100, 32), torch.randn(700, 32)
    d[5], d[6, 0], d[300] = torch.nan, torch.inf, 1e20
    scores, indices = ops.top_k(q, d, 9)
    truth, _ = reference.top_k(q.double(), d[[i for i in range(700) if i not in (5, 6)]].double(), 8)
    assert not (indices == 5).any()
    for row in range(100):
        kept = [x for x, i in zip(scores[row].tolist(), indices[row].tolist(), strict=True) if i != 6][:8]
        assert kept == pytest.approx(truth[row].tolist(), rel=1e-4, abs=1e-4)
    q[3] = torch.nan
    assert (ops.top_k(q, d, 9)[1][3] == -1).all()
    assert (ops.top_k(q, d, 9)[1][4] >= 0).all()
