"""The losses other than InfoNCE: graded pairs, scores of a teacher, vectors of a teacher, yes or no.

They are plain torch, because they are small.

Legend: B rows, M documents, K candidates of a row, E dimension, F the teacher's. All return a scalar, differentiable.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pyqemb.ops import checks
from pyqemb.ops.common import arithmetic

Reduction = Literal["mean", "sum"]
_REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")


def cosent(first_BE: Tensor, second_BE: Tensor, scores_B: Tensor, temperature: float = 0.05) -> Tensor:
    """Return the CoSENT loss of pairs of vectors.

    It is log(1 + sum of exp((c_j - c_i) / tau) over all i, j with scores_i > scores_j), where c is the dot product of
    the two vectors of a row.

    Args:
        first_BE: [B, E] unit vectors of a floating dtype.
        second_BE: [B, E] unit vectors of the same dtype.
        scores_B: [B], higher for more similar pairs.
        temperature: tau > 0 (default 0.05).

    Returns:
        One loss for all rows, in float32 (float64 for float64). 0 if all scores are equal.

    Raises:
        TypeError: not a tensor. ValueError: no rows, incompatible shapes, scores that are not finite, an invalid
            temperature.

    Example:
        >>> first_BE = torch.eye(2)
        >>> second_BE = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # cosines 1 and 0
        >>> pyqemb.ops.cosent(first_BE, second_BE, torch.tensor([5.0, 1.0])) < 1e-6  # in the order of the scores
        tensor(True)

    Source: CoSENT (Su 2022); Qwen3-VL-Embedding (arXiv 2601.04720), section 5.1. Takes O(B log B): each row is compared
    with the running sum over all rows of lower scores.
    """
    op = "cosent"
    first_BE = _matrix(op, "first", first_BE)
    second_BE = _matrix(op, "second", second_BE, "first", first_BE)
    scores_B = _vector(op, "scores", scores_B, "first", first_BE)
    temperature = checks.positive(op, "temperature", temperature)
    cosines = _dots(first_BE, second_BE).double() / temperature
    order = torch.argsort(scores_B)
    cosines, scores = cosines[order], scores_B[order]
    below = torch.logcumsumexp(cosines, dim=0)
    # How many rows have a lower score than each.
    lower = torch.searchsorted(scores, scores)
    counts = lower > 0
    terms = below[(lower - 1)[counts]] - cosines[counts]
    return torch.logsumexp(torch.cat([0 * cosines[:1], terms]), dim=0).to(arithmetic(first_BE.dtype))


def distill_scores(
    queries_BE: Tensor,
    documents_ME: Tensor,
    candidates_BK: Tensor,
    teacher_BK: Tensor,
    temperature: float = 0.05,
    teacher_temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy between the teacher's and the student's softmax over the candidates of each query.

    Args:
        queries_BE: [B, E] unit vectors.
        documents_ME: [M, E] unit vectors.
        candidates_BK: [B, K] int64, indices of documents; padded with -1.
        teacher_BK: [B, K] the teacher's scores (logits), finite for every candidate.
        temperature: temperature of the student's softmax (default 0.05).
        teacher_temperature: temperature of the teacher's softmax (default 1).
        reduction: "mean" over the queries (default) or "sum".

    Returns:
        The loss, a scalar in float32 (float64 for float64).

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: incompatible shapes, a query without candidates, an
            index out of range, a score that is not finite, an invalid temperature.

    Example:
        >>> queries_BE, documents_ME = torch.eye(2)[:1], torch.eye(2)
        >>> candidates_BK, teacher_BK = torch.tensor([[0, 1]]), torch.tensor([[9.0, 1.0]])
        >>> pyqemb.ops.distill_scores(queries_BE, documents_ME, candidates_BK, teacher_BK, temperature=0.125)
        tensor(0.0030)

    Source: Qwen3-VL-Embedding (arXiv 2601.04720), section 5.1: one positive and k negatives.
    """
    op = "distill_scores"
    queries_BE = _matrix(op, "queries", queries_BE)
    documents_ME = _matrix(op, "documents", documents_ME, "queries", queries_BE, rows=False)
    candidates_BK, teacher_BK = (
        _beside(op, name, x, "queries", queries_BE)
        for name, x in (("candidates", candidates_BK), ("teacher", teacher_BK))
    )
    shape = candidates_BK.shape
    if candidates_BK.dtype != torch.int64:
        raise TypeError(f"[{op}] candidates must be int64, got {candidates_BK.dtype}")
    if len(shape) != 2 or shape[0] != len(queries_BE) or teacher_BK.shape != shape:
        raise ValueError(
            f"[{op}] candidates and teacher must have shape [{len(queries_BE)}, K], got {list(shape)} and "
            f"{list(teacher_BK.shape)} (a row for each of queries)"
        )
    _real(op, "teacher", teacher_BK)
    temperature = checks.positive(op, "temperature", temperature)
    teacher_temperature = checks.positive(op, "teacher_temperature", teacher_temperature)
    checks.choice(op, "reduction", reduction, _REDUCTIONS)
    there = candidates_BK >= 0
    wrong = (candidates_BK < -1) | (candidates_BK >= len(documents_ME))
    if bool(wrong.any()):
        raise ValueError(
            f"[{op}] candidates must be from -1 to {len(documents_ME) - 1}, got {int(candidates_BK[wrong][0])}"
        )
    if not bool(there.any(dim=1).all()):
        raise ValueError(f"[{op}] candidates: query {int((~there.any(dim=1)).nonzero()[0])} has none")
    if not bool(torch.isfinite(teacher_BK[there]).all()):
        raise ValueError(
            f"[{op}] teacher must hold finite scores, got {teacher_BK[there][~teacher_BK[there].isfinite()][0]}"
        )
    wide = arithmetic(queries_BE.dtype)
    # Zeros for the padding: a NaN there would reach the gradient of the query.
    chosen_BKE = documents_ME[candidates_BK.clamp_min(0)].to(wide).masked_fill(~there[..., None], 0)
    student = torch.einsum("be,bke->bk", queries_BE.to(wide), chosen_BKE) / temperature
    student = student.masked_fill(~there, -torch.inf).log_softmax(dim=1).masked_fill(~there, 0)
    teacher = (teacher_BK.to(wide) / teacher_temperature).masked_fill(~there, -torch.inf).softmax(dim=1)
    return _reduced(-(teacher * student).sum(dim=1), reduction)


def distill_embeddings(
    student_BE: Tensor, teacher_BF: Tensor, projection_FE: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """1 - cosine between each row and the teacher's vector.

    Args:
        student_BE: [B, E] unit vectors.
        teacher_BF: [B, F], of any norm; a constant.
        projection_FE: [F, E], a learned projection from the student's to the teacher's dimension. Without it the
            teacher is truncated to its first E components (Matryoshka teachers; F must be at least E).
        reduction: "mean" over the rows (default) or "sum".

    Returns:
        The loss, a scalar in float32 (float64 for float64).

    Raises:
        TypeError: not a tensor. ValueError: no rows, incompatible shapes, teacher vectors that are zero or not finite.

    Example:
        >>> pyqemb.ops.distill_embeddings(torch.eye(2), torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
        tensor(0.5000)

    Source: jina-embeddings-v5 (arXiv 2602.15547), stage 1, with a projection; F2LLM-v2 for the prefix.
    """
    op = "distill_embeddings"
    student_BE = _matrix(op, "student", student_BE)
    teacher_BF = _beside(op, "teacher", teacher_BF, "student", student_BE)
    _floating(op, "teacher", teacher_BF)
    checks.choice(op, "reduction", reduction, _REDUCTIONS)
    if teacher_BF.dim() != 2 or len(teacher_BF) != len(student_BE):
        raise ValueError(
            f"[{op}] teacher must have shape [{len(student_BE)}, F], got {list(teacher_BF.shape)} (a row for each of "
            "student)"
        )
    size, teachers = student_BE.shape[1], teacher_BF.shape[1]
    if projection_FE is None and teachers < size:
        raise ValueError(
            f"[{op}] teacher must have at least the student's {size} dimensions without a projection, got {teachers}"
        )
    if projection_FE is not None:
        projection_FE = _beside(op, "projection", projection_FE, "student", student_BE)
        _floating(op, "projection", projection_FE)
        if projection_FE.shape != (teachers, size):
            raise ValueError(
                f"[{op}] projection must have shape [{teachers}, {size}], got {list(projection_FE.shape)} "
                "(from the dimension of student to that of teacher)"
            )
    wide = arithmetic(student_BE.dtype)
    student, teacher = student_BE.to(wide), teacher_BF.detach().to(wide)
    if projection_FE is None:
        teacher = teacher[:, :size]
    else:
        student = student @ projection_FE.to(wide).T
    norms = teacher.norm(dim=1)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise ValueError(
            f"[{op}] teacher must hold finite vectors that are not zero, got norm {norms[~(norms > 0)][:1].tolist()}"
        )
    return _reduced(1 - F.cosine_similarity(student, teacher, dim=1), reduction)


def yes_no(logits_B2: Tensor, labels_B: Tensor, reduction: Reduction = "mean") -> Tensor:
    """-log p(label), where p is the softmax over the logits of the two answers: the loss of a reranker.

    Args:
        logits_B2: [B, 2] of "yes" and "no".
        labels_B: [B], true or 1 if the answer is yes.
        reduction: "mean" over the rows (default) or "sum".

    Returns:
        The loss, a scalar in float32 (float64 for float64).

    Raises:
        TypeError: not a tensor. ValueError: no rows, incompatible shapes, a label that is neither 0 nor 1.

    Example:
        >>> pyqemb.ops.yes_no(torch.zeros(2, 2), torch.tensor([True, False]))
        tensor(0.6931)

    Source: Qwen3 Embedding report (arXiv 2506.05176), equation 2.
    """
    op = "yes_no"
    logits_B2 = checks.tensor(op, "logits", logits_B2)
    _floating(op, "logits", logits_B2)
    if logits_B2.dim() != 2 or logits_B2.shape[1] != 2 or not len(logits_B2):
        raise ValueError(f"[{op}] logits must have shape [B, 2], got {list(logits_B2.shape)}")
    checks.choice(op, "reduction", reduction, _REDUCTIONS)
    labels = _vector(op, "labels", labels_B, "logits", logits_B2)
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(f"[{op}] labels must be 0 or 1, got {labels[(labels != 0) & (labels != 1)][0].item()}")
    yes, no = logits_B2.to(arithmetic(logits_B2.dtype)).unbind(1)
    sign = 2 * labels.to(yes.dtype) - 1
    return _reduced(F.softplus(-sign * (yes - no)), reduction)


def _reduced(losses_B: Tensor, reduction: Reduction) -> Tensor:
    return losses_B.mean() if reduction == "mean" else losses_B.sum()


def _dots(a_BE: Tensor, b_BE: Tensor) -> Tensor:
    wide = arithmetic(a_BE.dtype)
    return (a_BE.to(wide) * b_BE.to(wide)).sum(dim=1)


def _matrix(
    op: str, name: str, value: Any, like_name: str = "", like: Tensor | None = None, rows: bool = True
) -> Tensor:
    """Check a nonempty [B, E] tensor; with `like`, of the same dimension and, with `rows`, as many rows."""
    x = checks.tensor(op, name, value) if like is None else _beside(op, name, value, like_name, like)
    if x.dim() != 2 or not len(x) or not x.shape[1] or not x.is_floating_point():
        raise ValueError(f"[{op}] {name} must be floating, of shape [B, E], got {x.dtype} of shape {list(x.shape)}")
    if like is None:
        return x
    if x.dtype != like.dtype:
        raise TypeError(f"[{op}] {name} must have the dtype of {like_name}, {like.dtype}, got {x.dtype}")
    if x.shape[1] != like.shape[1] or (rows and len(x) != len(like)):
        wanted = [len(like) if rows else "M", like.shape[1]]
        raise ValueError(f"[{op}] {name} must have shape {wanted}, got {list(x.shape)} (as {like_name})")
    return x


def _vector(op: str, name: str, value: Any, like_name: str, like: Tensor) -> Tensor:
    """A finite number for each row of `like`."""
    x = _beside(op, name, value, like_name, like)
    _real(op, name, x)
    if x.shape != (len(like),):
        raise ValueError(
            f"[{op}] {name} must have shape [{len(like)}], got {list(x.shape)} (one for each of {like_name})"
        )
    if not bool(torch.isfinite(x.double()).all()):
        raise ValueError(f"[{op}] {name} must be finite, got {x[~torch.isfinite(x)][0].item()}")
    return x


def _beside(op: str, name: str, value: Any, like_name: str, like: Tensor) -> Tensor:
    x = checks.tensor(op, name, value)
    checks.on_device_of(op, name, x, like_name, like)
    return x


def _floating(op: str, name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"[{op}] {name} must have a floating dtype, got {x.dtype}")


def _real(op: str, name: str, x: Tensor) -> None:
    if x.dtype.is_complex:
        raise TypeError(f"[{op}] {name} must hold real numbers, got {x.dtype}")
