"""CoSENT, distillation and yes/no against dense float64 formulas written in another way."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from pyqemb import ops


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1).to(dtype).requires_grad_()


def dense_cosent(first, second, scores, temperature):
    """Every pair of rows in a matrix."""
    cosines = (first * second).sum(1) / temperature
    differences = cosines[None, :] - cosines[:, None]  # [i, j]: c_j - c_i
    wrong = scores[:, None] > scores[None, :]
    return torch.log1p(torch.exp(differences)[wrong].sum())


def relative(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("levels", [2, 6, 1000])  # many ties to none
def test_cosent(levels, temperature):
    first, second = unit(60, 24), unit(60, 24, seed=1)
    scores = torch.randint(0, levels, (60,), generator=torch.Generator().manual_seed(2)).double() / levels
    loss, truth = ops.cosent(first, second, scores, temperature), dense_cosent(first, second, scores, temperature)
    assert relative(loss.detach(), truth.detach()) < 1e-12
    for a, b in zip(*(torch.autograd.grad(x, (first, second)) for x in (loss, truth)), strict=True):
        assert relative(a, b) < 1e-11


def test_cosent_in_float32_and_narrower():
    first, second = unit(200, 64, dtype=torch.float32), unit(200, 64, seed=1, dtype=torch.float32)
    scores = torch.rand(200, generator=torch.Generator().manual_seed(2))
    exact = [x.detach().double().requires_grad_() for x in (first, second)]
    truth = dense_cosent(*exact, scores, 0.05)
    naive = dense_cosent(first, second, scores, 0.05)
    ours = ops.cosent(first, second, scores)
    assert ours.dtype == torch.float32
    true_grads, *others = (
        torch.autograd.grad(x, y) for x, y in ((truth, exact), (ours, (first, second)), (naive, (first, second)))
    )
    for ours_, naive_, true in zip(*others, true_grads, strict=True):
        assert relative(ours_, true) < 2 * relative(naive_, true)
    narrow = ops.cosent(first.detach().bfloat16(), second.detach().bfloat16(), scores)
    assert narrow.dtype == torch.float32
    assert abs(float(narrow - ours)) < 0.05


def test_cosent_without_an_order_is_nothing():
    first, second = unit(5, 8), unit(5, 8, seed=1)
    loss = ops.cosent(first, second, torch.ones(5))
    loss.backward()
    assert loss == 0
    assert not first.grad.any()
    assert ops.cosent(unit(1, 8), unit(1, 8), torch.ones(1)) == 0
    near = ops.cosent(first.detach(), second.detach(), torch.arange(5.0), temperature=1e-4)
    assert torch.isfinite(near)


def dense_distillation(queries, documents, candidates, teacher, temperature, teacher_temperature):
    losses = []
    for query, row, scores in zip(queries, candidates.tolist(), teacher, strict=True):
        there = [k for k, index in enumerate(row) if index >= 0]
        student = torch.stack([query @ documents[row[k]] for k in there]) / temperature
        target = torch.exp(scores[there] / teacher_temperature)
        losses.append((target / target.sum() * (torch.logsumexp(student, 0) - student)).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_distill_scores(reduction):
    queries, documents = unit(6, 16), unit(20, 16, seed=1)
    generator = torch.Generator().manual_seed(3)
    candidates = torch.randint(0, 20, (6, 5), generator=generator)
    for row in range(6):
        candidates[row, row % 5 + 1 :] = -1  # 1 to 5 candidates, one query has one
    teacher = 3 * torch.randn(6, 5, dtype=torch.float64, generator=generator)
    teacher[candidates < 0] = torch.nan  # nobody looks there
    loss = ops.distill_scores(queries, documents, candidates, teacher, 0.1, 2.0, reduction)
    truth = dense_distillation(queries, documents, candidates, teacher, 0.1, 2.0)
    truth = truth.mean() if reduction == "mean" else truth.sum()
    assert relative(loss.detach(), truth.detach()) < 1e-12
    for a, b in zip(*(torch.autograd.grad(x, (queries, documents)) for x in (loss, truth)), strict=True):
        assert relative(a, b) < 1e-11


def test_distill_embeddings():
    student, projection = unit(7, 12), torch.randn(20, 12, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 20, dtype=torch.float64)
    loss = ops.distill_embeddings(student, teacher)
    truth = (1 - (student * normalize(teacher[:, :12], dim=1)).sum(1)).mean()
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    loss = ops.distill_embeddings(student, teacher, projection, reduction="sum")
    truth = (1 - (normalize(student @ projection.T, dim=1) * normalize(teacher, dim=1)).sum(1)).sum()
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, (student, projection)) for x in (loss, truth)), strict=True):
        torch.testing.assert_close(a, b)


def test_yes_no():
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0], [1e4, -1e4], [-1e4, 1e4]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 0, 1, 1])
    loss = ops.yes_no(logits, labels, reduction="sum")
    truth = -torch.log_softmax(logits, dim=1)[torch.arange(4), 1 - labels].sum()
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits)[0], torch.autograd.grad(truth, logits)[0], rtol=1e-9, atol=0
    )
    torch.testing.assert_close(ops.yes_no(logits, labels), loss / 4)
    assert ops.yes_no(torch.zeros(2, 2, dtype=torch.bfloat16), torch.tensor([True, False])) == pytest.approx(
        math.log(2)
    )


def test_gradcheck():
    scores = torch.tensor([0.1, 0.9, 0.9, 0.3], dtype=torch.float64)
    torch.autograd.gradcheck(lambda a, b: ops.cosent(a, b, scores, 0.3), (unit(4, 5), unit(4, 5, seed=1)))
    candidates, teacher = torch.tensor([[0, 1, -1], [2, 0, 1]]), torch.randn(2, 3, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda q, d: ops.distill_scores(q, d, candidates, teacher, 0.3), (unit(2, 5), unit(3, 5, seed=1))
    )


V, W = torch.eye(3), torch.eye(4)[:, :3]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.cosent(V, V, [1, 2, 3]), TypeError, "scores must be a torch.Tensor, got list"),
        (lambda: ops.cosent(V, W, torch.ones(3)), ValueError, r"second must have shape \[3, 3\], got \[4, 3\]"),
        (lambda: ops.cosent(V, V, torch.ones(2)), ValueError, r"scores must have shape \[3\], got \[2\]"),
        (lambda: ops.cosent(V, V, torch.tensor([1, torch.nan, 2])), ValueError, "scores must be finite, got nan"),
        (lambda: ops.cosent(V[:0], V[:0], torch.ones(0)), ValueError, "first must be floating, of shape"),
        (lambda: ops.cosent(V, V, torch.ones(3), 0.0), ValueError, "temperature must be positive and finite, got 0.0"),
        (lambda: ops.distill_scores(V, W, torch.zeros(3, 2), torch.zeros(3, 2)), TypeError, "candidates must be int64"),
        (
            lambda: ops.distill_scores(V, W, torch.zeros(2, 2).long(), torch.zeros(3, 2)),
            ValueError,
            r"shape \[3, K\], got \[2, 2\] and \[3, 2\]",
        ),
        (lambda: ops.distill_scores(V, W, torch.full((3, 1), 4), torch.zeros(3, 1)), ValueError, "from -1 to 3, got 4"),
        (lambda: ops.distill_scores(V, W, torch.full((3, 1), -1), torch.zeros(3, 1)), ValueError, "query 0 has none"),
        (
            lambda: ops.distill_scores(V, W, torch.zeros(3, 1).long(), torch.full((3, 1), torch.inf)),
            ValueError,
            "teacher must hold finite scores, got inf",
        ),
        (lambda: ops.distill_embeddings(V, V[:, :2]), ValueError, "at least the student's 3 dimensions .* got 2"),
        (lambda: ops.distill_embeddings(V, V, torch.zeros(2, 3)), ValueError, r"projection must have shape \[3, 3\]"),
        (lambda: ops.distill_embeddings(V, torch.zeros(3, 3)), ValueError, "finite vectors that are not zero"),
        (lambda: ops.yes_no(V, torch.ones(3)), ValueError, r"logits must have shape \[B, 2\], got \[3, 3\]"),
        (lambda: ops.yes_no(torch.zeros(2, 2), torch.tensor([0, 2])), ValueError, "labels must be 0 or 1, got 2"),
        (lambda: ops.yes_no(torch.zeros(2, 2), torch.ones(2), "none"), ValueError, "reduction must be 'mean' or 'sum'"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
