"""The contrastive loss for large batches: loss and gradients in one sweep, without storing the score matrix."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack  # of typing from Python 3.11 on

from pyqemb import _C
from pyqemb.ops import checks
from pyqemb.ops.common import arithmetic, differentiable, native
from pyqemb.ops.groups import Group, Options
from pyqemb.ops.info_nce_composed import composed, over_positives
from pyqemb.ops.info_nce_guided import Guide
from pyqemb.ops.info_nce_sweep import Batch, sweep
from pyqemb.ops.prefixes import over_prefixes, prefixes, unit_rows

_OP = "info_nce"
_ABSENT = 2  # role of a document that is no candidate of anybody


class _Keywords(TypedDict, total=False):
    """The keyword arguments of `info_nce` that do not change what it returns."""

    owner: Tensor | None
    document_ids: Tensor | None
    more_positives: Tensor | None
    guide: tuple[Tensor, Tensor] | None
    guide_margin: float
    guide_relative: bool
    preset: str
    groups: Mapping[str, Group | bool | None] | None
    temperature: float | Tensor
    margin: float | None
    doc_mask: str | None
    softmax: Literal["joint", "split"]
    focal: float
    tau_plus: float
    matryoshka: Sequence[int] | None
    matryoshka_weights: Sequence[float] | None
    reduction: Literal["mean", "sum"]
    rows: tuple[int, int] | None


@overload
def info_nce(
    queries_BE: Tensor, documents_ME: Tensor, positive: Tensor, *, return_stats: Literal[True],
    **keywords: Unpack[_Keywords],
) -> "tuple[Tensor, Stats]": ...  # fmt: skip


@overload
def info_nce(
    queries_BE: Tensor, documents_ME: Tensor, positive: Tensor, *, return_stats: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...  # fmt: skip


def info_nce(
    queries_BE: Tensor,
    documents_ME: Tensor,
    positive: Tensor,
    *,
    owner: Tensor | None = None,
    document_ids: Tensor | None = None,
    more_positives: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    guide_margin: float = 0.0,
    guide_relative: bool = False,
    preset: str = "qwen3",
    groups: Mapping[str, Group | bool | None] | None = None,
    temperature: float | Tensor = 0.02,
    margin: float | None = 0.1,
    doc_mask: str | None = None,
    softmax: Literal["joint", "split"] = "joint",
    focal: float = 0.0,
    tau_plus: float = 0.0,
    matryoshka: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    rows: tuple[int, int] | None = None,
    return_stats: bool = False,
) -> "Tensor | tuple[Tensor, Stats]":
    """Mean over queries of -log(exp(s_i / tau) / Z_i), where s is the dot product of unit vectors; differentiable once.

    Z_i sums exp(score / tau) over the positive and the enabled groups of candidates:

    | group | score | candidates |
    | --- | --- | --- |
    | own_hard | q_i . d_j | documents that belong to query i |
    | batch_positive, batch_hard | q_i . d_j | positives of other queries; all other documents of other queries |
    | query_query | q_i . q_j | the other queries |
    | doc_own, doc_positive, doc_hard | d_i+ . d_j | the same three kinds of documents against the positive |
    | doc_query | d_i+ . q_j | the other queries against the positive |

    A candidate is masked if its score exceeds the group's limit, or if its text equals the positive's.

    Args:
        queries_BE: [B, E] unit vectors, float32, bfloat16, float16 or float64. Logits are float32 (float64 for
            float64).
        documents_ME: [M, E] of the same dtype: positives, hard negatives and any other documents.
        positive: [B] int64, the index of each query's positive among the documents. Queries may share one. Indices
            that are on a GPU are checked there: if one is wrong, the loss is NaN.
        owner: [M] int64, the query that a document belongs to (its positive, or its own hard negative), -1 for none.
            Queries may own different numbers of documents.
        document_ids: [M] int64, equal for equal texts. In the query-query group, queries whose positives are equal
            texts mask each other too.
        more_positives: [X, 2] int64, pairs of a query and a further positive of it, each pair once. The loss of a query
            is then the mean over its positives; a positive's candidates are without the query's other positives
            (Khosla et al., arXiv 2004.11362, equation 2, with the other positives left out of the denominator). Two
            queries that share a positive share all of them. The host reads the values.
        guide: vectors [B, F] and [M, F] of the queries and the documents by another model, of the same floating dtype;
            constants, of any norm. A candidate whose score by these vectors exceeds that of the positive plus
            `guide_margin` is masked too (Solatorio, arXiv 2402.16829). Computed in torch, by blocks of rows.
        guide_margin: see `guide`; -0.05 masks candidates that are almost as close as the positive.
        guide_relative: the limit is s + guide_margin * |s|, s the guide's score of the positive.
        preset: which groups are enabled and how they are masked: qwen3, qwen3_stage2, mnrl, ms_swift, memeff, gte or
            classification.
        groups: changes to the preset by group: a Group, True (a Group with its defaults), or False or None to disable
            it.
        temperature: tau > 0; a tensor of one element gets a gradient (on a GPU the host waits for its value).
        margin: the margin of the groups without their own; None disables their masks.
        doc_mask: mask of the enabled document-document groups: "query_document", "own" or "none"; None: that of the
            preset.
        softmax: "joint", or "split": a separate softmax for own_hard, the batch groups, query_query, the doc groups and
            doc_query, each with the positive; the loss is their sum.
        focal: gamma >= 0: a softmax that gives the positive the probability P is weighted by (1 - P) ** gamma, which is
            differentiated too (Lin et al., arXiv 1708.02002, equation 4).
        tau_plus: the probability that a candidate is a positive, 0 <= tau_plus < 1: the sum S over the N candidates of
            a softmax becomes max((S - tau_plus * N * exp(s_i / tau)) / (1 - tau_plus), N * exp(-1 / tau)), the debiased
            contrastive loss (Chuang et al., arXiv 2007.00224, equation 8). Masked candidates are not counted in N.
        matryoshka: ascending or descending dimensions; the loss is computed for each prefix of the vectors, normalized
            again, e.g. [1024, 256]. All prefixes take one sweep (on a GPU up to eight; with more, one sweep each).
        matryoshka_weights: weights of their losses; None: the mean of the losses.
        reduction: "mean" over the queries or "sum".
        rows: (first, count): only these queries are anchors. The mean is still over all B, so that the losses of
            several ranks add up to the loss of the batch.
        return_stats: also return {"positive", "negative", "masked"}: mean score of the positives, mean score of the
            query-document candidates that are not masked, and the share of masked candidates (all of the largest
            prefix). On a GPU the host waits for them when they are read.

    Returns:
        The loss, a scalar tensor in the arithmetic dtype; with return_stats a pair (loss, mapping).

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: no queries, an unknown preset or group, incompatible
            shapes, an index out of range (on the CPU), a temperature that is not positive and
            finite, Matryoshka dimensions outside 1..E or not in order.

    Example:
        >>> queries_BE = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
        >>> documents_ME = queries_BE.clone()  # document i is the positive of query i
        >>> pyqemb.ops.info_nce(queries_BE, documents_ME, torch.arange(4), temperature=0.02).shape
        torch.Size([])

    Source: Qwen3 Embedding technical report (arXiv 2506.05176), equation 1.
    """
    queries_BE, documents_ME = checks.tensor(_OP, "queries", queries_BE), checks.tensor(_OP, "documents", documents_ME)
    positive, owner = checks.tensor(_OP, "positive", positive), checks.optional_tensor(_OP, "owner", owner)
    document_ids = checks.optional_tensor(_OP, "document_ids", document_ids)
    guide_margin = checks.finite(_OP, "guide_margin", guide_margin)
    checks.flag(_OP, "guide_relative", guide_relative)
    checks.choice(_OP, "reduction", reduction, ("mean", "sum"))
    checks.flag(_OP, "return_stats", return_stats)
    tau, temperature = _temperature(temperature, queries_BE)
    if not checks.has_no_values():  # a compiled graph holds no values yet
        _C.check_info_nce(queries_BE.contiguous(), documents_ME.contiguous(), positive, owner, document_ids)
    more_positives = _more_positives(more_positives, queries_BE, documents_ME)
    guides = (None, None) if guide is None else _guide(guide, queries_BE, documents_ME)
    num_queries = queries_BE.shape[0]
    first, count = (0, num_queries) if rows is None else _rows(rows, num_queries)
    options = Options.of(
        preset,
        groups,
        margin,
        doc_mask,
        softmax,
        focal,
        temperature,
        1 / num_queries if reduction == "mean" else 1.0,
        tau_plus=tau_plus,
    )
    dims, weights = prefixes(matryoshka, matryoshka_weights, queries_BE.shape[-1])
    wanted = torch.is_grad_enabled()
    differs = wanted and (queries_BE.requires_grad or documents_ME.requires_grad)
    learns = wanted and tau is not None and tau.requires_grad

    totals: Tensor

    def once(queries: Tensor, documents: Tensor, dims: Sequence[int] = (), weights: Sequence[float] = ()) -> Tensor:
        nonlocal totals
        inputs = _Inputs(
            queries=queries.contiguous(), documents=documents.contiguous(), tau=tau, positive=positive, owner=owner,
            ids=document_ids, more=more_positives, first_row=first, num_rows=count, dims=dims, dim_weights=weights,
            differs=differs, learns=learns, guide_queries=guides[0], guide_documents=guides[1],
            guide_margin=guide_margin, guide_relative=guide_relative,
        )  # fmt: skip
        loss, totals = _info_nce(*inputs, *options)
        return loss

    composes = options.is_composed or more_positives is not None or guide is not None
    if dims and (composes or (len(dims) > _C.MAX_PREFIXES and not queries_BE.is_cpu)):
        loss = over_prefixes(once, dims, weights, queries_BE, documents_ME)
    else:
        loss = once(queries_BE, documents_ME, dims, weights)
    return (loss, Stats(totals, count)) if return_stats else loss


def _temperature(value: Any, queries: Tensor) -> tuple[Tensor | None, float]:
    """The temperature as a tensor that gets a gradient (None for a number), and its value."""
    if not isinstance(value, Tensor):
        return None, checks.positive(_OP, "temperature", value)
    tau = checks.tensor(_OP, "temperature", value)
    if tau.numel() != 1 or not tau.is_floating_point():
        raise ValueError(
            f"[{_OP}] temperature must be a number or a floating tensor of one element, got {tau.dtype} of shape "
            f"{list(tau.shape)}"
        )
    return tau, checks.positive(_OP, "temperature", tau.detach().item())


def _more_positives(given: Any, queries: Tensor, documents: Tensor) -> Tensor | None:
    """The pairs on the CPU, after a check of their values; None if there are none."""
    if given is None:
        return None
    pairs = checks.tensor(_OP, "more_positives", given)
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"[{_OP}] more_positives must be int64 of shape [X, 2], got {pairs.dtype} of shape {list(pairs.shape)}"
        )
    if checks.has_no_values():
        return pairs
    pairs = pairs.cpu()
    for column, (name, size) in enumerate((("queries", len(queries)), ("documents", len(documents)))):
        values = pairs[:, column]
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < size:
            wrong = values[(values < 0) | (values >= size)][0]
            raise ValueError(
                f"[{_OP}] more_positives must be from 0 to {size - 1} in column {column} (an index of {name}), got "
                f"{int(wrong)}"
            )
    return pairs if len(pairs) else None


def _guide(given: Any, queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vectors of the guide, in the arithmetic dtype."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(f"[{_OP}] guide must be two tensors, of the queries and the documents, got {given!r:.60}")
    vectors = [checks.tensor(_OP, "guide", each) for each in given]
    for name, each, like in zip(("queries", "documents"), vectors, (queries, documents), strict=True):
        if not each.is_floating_point() or each.dim() != 2 or len(each) != len(like):
            raise ValueError(
                f"[{_OP}] guide must hold a floating vector for each of {name}, of shape [{len(like)}, F], got "
                f"{each.dtype} of shape {list(each.shape)}"
            )
    if vectors[0].shape[1] != vectors[1].shape[1]:
        raise ValueError(
            f"[{_OP}] guide: queries and documents must share their dimension, got {vectors[0].shape[1]} and "
            f"{vectors[1].shape[1]}"
        )
    first, second = (unit_rows(each.detach().to(arithmetic(each.dtype))) for each in vectors)
    return first, second


def _rows(rows: Any, num_queries: int) -> tuple[int, int]:
    given = checks.items(_OP, "rows", rows, "two integers")
    if len(given) != 2:
        raise ValueError(f"[{_OP}] rows must be (first, count), got {len(given)} values")
    first, count = (checks.integer(_OP, f"rows[{place}]", value, 0) for place, value in enumerate(given))
    if first + count > num_queries:
        raise ValueError(f"[{_OP}] rows must lie in 0 to {num_queries}, got {first} to {first + count}")
    return first, count


class Stats(Mapping[str, float]):
    """The statistics of one call, fetched from the device when they are first read.

    `totals`, float64 [5], holds sums over the anchor rows; the totals of several calls can be added.
    """

    def __init__(self, totals: Tensor, num_rows: int):
        self.totals, self._num_rows = totals, num_rows

    @cached_property
    def _values(self) -> dict[str, float]:
        positive, negative, count, kept, dropped = self.totals.tolist()
        return {
            "positive": positive / max(self._num_rows, 1),
            "negative": negative / count if count else 0.0,
            "masked": dropped / (kept + dropped) if kept + dropped else 0.0,
        }

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Block(NamedTuple):
    """The contribution of one block of columns to R anchors.

    It holds losses, log sums [R, 4], the totals of Stats, and gradients if they are requested.
    """

    losses_R: Tensor
    totals: Tensor
    log_negatives_RS: Tensor
    d_anchors_RE: Tensor
    d_positives_RE: Tensor
    d_columns_CE: Tensor
    d_others_QE: Tensor
    d_temperature: Tensor


class Anchors(NamedTuple):
    """R queries with their positives; the texts of the positives."""

    queries_RE: Tensor
    positives_RE: Tensor
    text_R: Tensor


class Columns(NamedTuple):
    """A block of documents: texts, roles, and the anchor that owns each, or -1."""

    documents_CE: Tensor
    text_C: Tensor
    role_C: Tensor
    owner_C: Tensor


class Others(NamedTuple):
    """A block of queries as candidates of query_query; the texts of their positives."""

    queries_QE: Tensor
    text_Q: Tensor


def info_nce_block(
    anchors: Anchors,
    columns: Columns,
    others: Others,
    options: Options,
    *,
    log_negatives_RS: Tensor | None = None,
    adds_positive: bool = True,
    gradients: bool = False,
) -> Block:
    """One block of documents and queries against R anchors, for a ring in which no rank holds all of them.

    The first round computes the log sums of each block, which the caller adds up (torch.logaddexp). The second round
    takes the totals and returns gradients. `adds_positive`, set for one block only, adds the terms of the anchors and
    their positives. Texts are equal if their ids are equal, which also excludes an anchor from its own query-query
    candidates.
    """
    rows, texts = len(anchors.queries_RE), torch.cat([anchors.text_R, columns.text_C])
    if not rows:
        dtype = arithmetic(anchors.queries_RE.dtype)
        d_anchors, d_positives, d_columns, d_others = (
            torch.zeros_like(x, dtype=dtype)
            for x in (anchors.queries_RE, anchors.positives_RE, columns.documents_CE, others.queries_QE)
        )
        sums, totals, d_tau = (
            texts.new_zeros(shape, dtype=torch.float64) for shape in ((0, _C.MAX_SOFTMAXES), (5,), (1,))
        )
        return Block(sums[:, 0], totals, sums, d_anchors, d_positives, d_columns, d_others, d_tau)
    log_negatives = log_negatives_RS
    if log_negatives is None:
        log_negatives = texts.new_empty((rows, _C.MAX_SOFTMAXES), dtype=torch.float64)
    absent = torch.full((rows,), _ABSENT, dtype=torch.uint8, device=texts.device)
    batch = Batch(
        queries=torch.cat([anchors.queries_RE, others.queries_QE]),
        documents=torch.cat([anchors.positives_RE, columns.documents_CE]),
        # The positives of the others are on other ranks; the kernel does not read them.
        positive=torch.cat([torch.arange(rows, device=texts.device), torch.zeros_like(others.text_Q)]),
        query_text=torch.cat([anchors.text_R, others.text_Q]),
        document_text=texts,
        role=torch.cat([absent, columns.role_C]),
        owner=torch.cat([torch.full_like(anchors.text_R, -1), columns.owner_C]),
    )
    losses, totals, d_queries, d_documents, d_temperature = sweep(
        batch,
        options,
        first_row=0,
        num_rows=rows,
        first_column=rows,
        differs=gradients,
        learns=gradients,
        log_negatives=log_negatives,
        log_negatives_given=log_negatives_RS is not None,
        adds_positive=adds_positive,
    )
    split = rows if gradients else 0
    return Block(
        losses,
        totals,
        log_negatives,
        d_queries[:split],
        d_documents[:split],
        d_documents[split:],
        d_queries[split:],
        d_temperature,
    )


class _Inputs(NamedTuple):
    """The arguments of the op before those of Options."""

    queries: Tensor
    documents: Tensor
    tau: Tensor | None
    positive: Tensor
    owner: Tensor | None
    ids: Tensor | None
    more: Tensor | None
    first_row: int
    num_rows: int
    dims: Sequence[int]
    dim_weights: Sequence[float]
    differs: bool  # whether queries or documents need a gradient
    learns: bool  # whether the temperature needs one
    guide_queries: Tensor | None
    guide_documents: Tensor | None
    guide_margin: float
    guide_relative: bool


def _inputs(given: Sequence[Any]) -> tuple[_Inputs, Options]:
    size = len(_Inputs._fields)
    return _Inputs(*given[:size]), Options(*given[size:])


def _fake(*given: Any) -> tuple[Tensor, ...]:
    inputs, _ = _inputs(given)
    queries, documents = inputs.queries, inputs.documents
    return (
        queries.new_empty((), dtype=arithmetic(queries.dtype)),
        queries.new_empty(5, dtype=torch.float64),
        *(x.new_empty(x.shape if inputs.differs else (0,), dtype=arithmetic(x.dtype)) for x in (queries, documents)),
        queries.new_empty(1 if inputs.learns else 0, dtype=torch.float64),
    )


@native(
    "info_nce(Tensor queries, Tensor documents, Tensor? tau, Tensor positive, Tensor? owner, Tensor? ids, "
    "Tensor? more, int first_row, int num_rows, int[] dims, float[] dim_weights, bool differs, bool learns, "
    "Tensor? guide_queries, Tensor? guide_documents, float guide_margin, bool guide_relative, "
    "str[] groups, str[] masks, float[] margins, "
    "bool[] relative, float[] hardness, bool split, float focal, float temperature, float scale, "
    "float tau_plus=0.0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def _forward(*given: Any) -> tuple[Tensor, ...]:
    inputs, options = _inputs(given)
    batch = Batch(
        queries=inputs.queries,
        documents=inputs.documents,
        positive=inputs.positive,
        query_text=None,
        document_text=None if inputs.ids is None else inputs.ids.contiguous(),
        role=None,
        owner=inputs.owner,
    )
    dtype = arithmetic(inputs.queries.dtype)
    if inputs.more is not None or inputs.guide_queries is not None or options.is_composed:
        run = composed if inputs.more is None else partial(over_positives, more_X2=inputs.more)
        guide = None
        if inputs.guide_queries is not None and inputs.guide_documents is not None:
            guide = Guide(inputs.guide_queries, inputs.guide_documents, inputs.guide_margin, inputs.guide_relative)
        loss, totals, *gradients = run(
            batch, options, first_row=inputs.first_row, num_rows=inputs.num_rows, differs=inputs.differs,
            learns=inputs.learns, guide=guide,
        )  # fmt: skip
        return loss.to(dtype), totals, *gradients
    losses, totals, *gradients = sweep(
        batch,
        options,
        first_row=inputs.first_row,
        num_rows=inputs.num_rows,
        dims=inputs.dims,
        dim_weights=inputs.dim_weights,
        differs=inputs.differs,
        learns=inputs.learns,
    )
    return losses.sum().mul_(options.scale).to(dtype), totals, *gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, tau = inputs[0], inputs[2]
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtype = queries.dtype
    ctx.tau = None if tau is None else (tau.shape, tau.dtype)


def _backward(_: Any, ctx: Any, d_loss: Tensor | None, __: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None, None, None]
    if d_loss is not None:
        d_queries, d_documents, d_tau = ctx.saved_tensors
        for place, gradient in enumerate((d_queries, d_documents)):
            if ctx.needs_input_grad[place]:
                grads[place] = (gradient * d_loss).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.tau
            grads[2] = (d_tau * d_loss).to(dtype).reshape(shape)
    return tuple(grads)


_info_nce = differentiable("info_nce", _forward, None, _keep, _backward, inputs=3, results=2)
