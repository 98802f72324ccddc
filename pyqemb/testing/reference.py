"""Every op again in a few lines of plain torch, in the dtype of its inputs.

In float64 the results are the truth that the kernels are compared with.

Run in float32 or bfloat16 the same functions give torch's own error, the yardstick of the kernels' tolerance.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyqemb.ops.groups import PRESETS, Group


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """[T, N, D]: softmax(scale q k^T) v, one sequence at a time; causal is aligned to the bottom right."""
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    out = []
    for q0, q1, k0, k1 in zip(cu_seqlens[:-1], cu_seqlens[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True):
        keys = k[k0:k1].repeat_interleave(group, dim=1)
        values = v[k0:k1].repeat_interleave(group, dim=1)
        scores = torch.einsum("qnd,knd->nqk", q[q0:q1], keys) * scale
        if causal:
            rows, columns = scores.shape[-2:]
            hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1 + columns - rows)
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0) if causal else torch.softmax(scores, dim=-1)
        out.append(torch.einsum("nqk,knd->qnd", weights, values))
    return torch.cat(out) if out else q * 0


def pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    dim: int | None = None,
    normalize: bool = True,
) -> Tensor:
    """[B, dim]: the last token, RMSNorm, cut, L2 norm; zeros for a sequence without tokens."""
    rows = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        x = hidden[end - 1] if end > start else hidden.new_zeros(hidden.shape[1])
        if norm_weight is not None:
            x = x * torch.rsqrt((x * x).mean() + eps) * norm_weight
        x = x[:dim]
        rows.append(x / x.norm().clamp_min(1e-12) if normalize and end > start else x)
    return torch.stack(rows) if rows else hidden.new_zeros(0, dim or hidden.shape[1])


def info_nce(
    queries: Tensor, documents: Tensor, positive: Tensor, owner: Tensor | None = None,
    document_ids: Tensor | None = None, temperature: float | Tensor = 0.02, margin: float | None = 0.1,
    groups: Mapping[str, Group] | None = None, split: bool = False, focal: float = 0.0,
    rows: tuple[int, int] | None = None, tau_plus: float = 0.0, known_positives: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None, guide_margin: float = 0.0, guide_relative: bool = False,
) -> Tensor:  # fmt: skip
    """The loss of `ops.info_nce` with every matrix held: its mean over all queries, of the anchors in `rows`."""
    groups = PRESETS["qwen3"] if groups is None else groups
    B, M = len(queries), len(documents)
    query, document = (torch.arange(n, device=queries.device) for n in (B, M))
    owner = torch.full_like(document, -1) if owner is None else owner
    ids = document if document_ids is None else document_ids
    qd, qq, dd = queries @ documents.T, queries @ queries.T, documents[positive] @ documents.T
    score = qd[query, positive]
    own, is_positive = owner[None, :] == query[:, None], torch.isin(document, positive)[None, :]
    if known_positives is not None:
        is_positive = is_positive | torch.isin(document, known_positives)[None, :]
    there = (document[None, :] != positive[:, None]) & (ids[None, :] != ids[positive][:, None])
    others = (query[None, :] != query[:, None]) & (ids[positive][None, :] != ids[positive][:, None])
    kinds = {"own": own, "positive": ~own & is_positive, "hard": ~own & ~is_positive}
    candidates = {
        "own_hard": (qd, kinds["own"], 0), "batch_positive": (qd, kinds["positive"], 1),
        "batch_hard": (qd, kinds["hard"], 1), "query_query": (qq, others, 2),
        "doc_own": (dd, kinds["own"], 3), "doc_positive": (dd, kinds["positive"], 3),
        "doc_hard": (dd, kinds["hard"], 3), "doc_query": (qd[:, positive].T, others, 4),
    }  # fmt: skip
    over: dict[str, Tensor] = {}  # by the guide
    if guide is not None:
        first, second = (x / x.norm(dim=1, keepdim=True) for x in guide)
        of_positive = (first * second[positive]).sum(dim=1, keepdim=True)
        bound = of_positive + guide_margin * (of_positive.abs() if guide_relative else 1)
        for prefix, left, right in (
            ("doc_query", second[positive], first), ("query_query", first, first), ("doc", second[positive], second),
            ("", first, second),
        ):  # fmt: skip
            over |= {
                name: left @ right.T > bound for name in candidates if name.startswith(prefix) and name not in over
            }
    logits: dict[int, list[Tensor]] = {}
    for name, group in groups.items():
        values, keep, softmax = candidates[name]
        if guide is not None:
            keep = keep & ~over[name]
        limit = margin if group.margin is None else group.margin
        if group.mask is not None and limit is not None:
            bound = score.detach() + limit * (score.detach().abs() if group.relative else 1)
            keep = keep & ~((qd if group.mask == "query_document" else values).detach() > bound[:, None])
        if name not in ("query_query", "doc_query"):
            keep = keep & there
        logit = values / temperature + group.hardness * values.detach()
        logits.setdefault(softmax if split else 0, []).append(logit.masked_fill(~keep, -torch.inf))
    loss = queries.new_zeros(B)
    for parts in logits.values():
        if tau_plus:
            weights, positive_weight = torch.cat(parts, dim=1).exp(), (score / temperature).exp()
            number = (weights > 0).sum(dim=1).to(weights.dtype)
            estimate = (weights.sum(dim=1) - tau_plus * number * positive_weight) / (1 - tau_plus)
            lowest = number * torch.exp(torch.as_tensor(-1 / temperature, dtype=estimate.dtype))
            some = torch.where(number > 0, torch.maximum(estimate, lowest), 1).log()
            parts = [torch.where(number > 0, some, -torch.inf)[:, None]]
        total = torch.logsumexp(torch.cat([(score / temperature)[:, None], *parts], dim=1), dim=1) - score / temperature
        if focal:  # (the derivative of 0 ** focal is not for autograd)
            some = torch.where(total > 0, total, 1)
            total = torch.where(total > 0, (-torch.expm1(-some)) ** focal * some, 0)
        loss = loss + total
    first, count = (0, B) if rows is None else rows
    return loss[first : first + count].sum() / B


def several_positives(
    queries: Tensor, documents: Tensor, positives: list[list[int]], owner: Tensor | None = None,
    document_ids: Tensor | None = None, rows: tuple[int, int] | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """`info_nce` for queries with several positives: the mean over the queries of the mean over their positives."""
    ids = (torch.arange(len(documents)) if document_ids is None else document_ids).clone()
    for _ in positives:  # at most so many chains
        for each in positives:
            for other in ids[each].tolist():
                ids[ids == other] = ids[each].min()
    first, count = (0, len(queries)) if rows is None else rows
    every = torch.tensor(sorted({document for each in positives for document in each}))
    total = queries.new_zeros(())
    for query in range(first, first + count):
        for document in positives[query]:
            positive = torch.tensor([each[0] for each in positives])
            positive[query] = document
            loss = info_nce(
                queries, documents, positive, owner, ids, rows=(query, 1), known_positives=every, **options
            )  # fmt: skip
            total = total + loss / len(positives[query])
    return total


def top_k(queries: Tensor, documents: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best first, equal scores by lower index."""
    order = torch.sort(queries @ documents.T, dim=1, descending=True, stable=True)
    return order.values[:, :k], order.indices[:, :k]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Return x / rms(x) * weight."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm of each head, then `rope`."""
    return rope(rms_norm(x, weight, eps), cos, sin)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Feature i turned with feature i + D / 2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return gate * torch.sigmoid(gate) * up
