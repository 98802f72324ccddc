"""Each preset against a dense loss of its own, written from what its source says and sharing no code with the
library.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from pyqemb import ops

TAU, MARGIN = 0.05, 0.1
QUERIES, HARD = 14, 3


def groups_of_texts(seed=0, ragged=False):
    """Queries, their positives, and a list of hard negatives each; all masks have something to do."""
    generator = torch.Generator().manual_seed(seed)

    def vectors(*shape):
        return normalize(torch.randn(*shape, 24, dtype=torch.float64, generator=generator), dim=-1)

    queries = vectors(QUERIES)
    positives = normalize(queries + 1.2 * vectors(QUERIES), dim=-1)
    positives[1] = normalize(queries[0] + 0.05 * vectors(1)[0], dim=-1)  # a false negative among the positives
    queries[3] = normalize(queries[2] + 0.05 * vectors(1)[0], dim=-1)  # and among the queries
    counts = [(i * 5) % (HARD + 1) if ragged else HARD for i in range(QUERIES)]
    hard = [normalize(positives[i] + 0.8 * vectors(counts[i]), dim=-1) for i in range(QUERIES)]
    if counts[4]:
        hard[4][0] = normalize(queries[4] + 0.02 * vectors(1)[0], dim=-1)  # and among a query's own hard negatives
    return queries, positives, hard


def as_arguments(positives, hard):
    """Documents positives first, then all hard negatives; positive and owner."""
    owner = torch.cat([torch.arange(QUERIES), *(torch.full((len(x),), i) for i, x in enumerate(hard))])
    return torch.cat([positives, *hard]), torch.arange(QUERIES), owner


def row_loss(positive, *negatives):
    """Cross-entropy of the first of all logits."""
    logits = torch.cat([positive.reshape(1), *(x.reshape(-1) for x in negatives)]) / TAU
    return cross_entropy(logits[None], torch.zeros(1, dtype=torch.long))


def others(count, i):
    return torch.arange(count) != i


def qwen3(queries, positives, hard):
    """Equation 1: one softmax; m is 0 where the score of (q_i, d_j), or of (q_i, q_j), is above s(q_i, d_i+) + 0.1."""
    losses = []
    for i, query in enumerate(queries):
        s = positives[i] @ query
        limit = s.detach() + MARGIN
        strangers = torch.cat([positives[others(QUERIES, i)], *(x for j, x in enumerate(hard) if j != i)])
        of_query, own, peers = strangers @ query, hard[i] @ query, queries[others(QUERIES, i)] @ query
        kept = of_query <= limit
        of_positive = strangers @ positives[i]
        losses.append(row_loss(s, own[own <= limit], of_query[kept], peers[peers <= limit], of_positive[kept]))
    return torch.stack(losses).mean()


def qwen3_stage2(queries, positives, hard):
    losses = []
    for i, query in enumerate(queries):
        s = positives[i] @ query
        scores = torch.cat([positives[others(QUERIES, i)], *hard]) @ query
        losses.append(row_loss(s, scores[scores <= s.detach() + MARGIN]))
    return torch.stack(losses).mean()


def mnrl(queries, positives, hard):
    scores = queries @ torch.cat([positives, *hard]).T
    return cross_entropy(scores / TAU, torch.arange(QUERIES))


def ms_swift(queries, positives, hard):
    """Query-query masks the diagonal and by threshold; document-document masks the positive's own column alone."""
    documents = torch.cat([torch.cat([positives[i : i + 1], hard[i]]) for i in range(QUERIES)])
    label, losses = 0, []
    for i, query in enumerate(queries):
        of_query, peers, of_positive = documents @ query, queries @ query, documents @ positives[i]
        limit = of_query[label].detach() + MARGIN
        of_query = of_query.masked_fill(of_query > limit, -torch.inf)
        peers = peers.masked_fill((peers > limit) | ~others(QUERIES, i), -torch.inf)
        of_positive = of_positive.masked_fill(~others(len(documents), label), -torch.inf)
        losses.append(cross_entropy(torch.cat([of_query, peers, of_positive])[None] / TAU, torch.tensor([label])))
        label += 1 + len(hard[i])
    return torch.stack(losses).mean()


def memeff(queries, positives, hard):
    """exp((s - 1) / tau) sums: positives of the batch, own hard negatives, queries, positives against positives."""
    score = (queries * positives).sum(1)
    limit = (score + MARGIN).detach()[:, None]

    def mass(scores, diagonal=True):
        keep = (scores <= limit) & (
            torch.ones(QUERIES, QUERIES, dtype=torch.bool) if diagonal else ~torch.eye(QUERIES).bool()
        )
        return (keep * torch.exp((scores - 1) / TAU)).sum(1)

    total = mass(queries @ positives.T) + mass(queries @ queries.T, False) + mass(positives @ positives.T, False)
    own = [x @ queries[i] for i, x in enumerate(hard)]
    total = total + torch.stack([(torch.exp((x - 1) / TAU) * (x <= limit[i])).sum() for i, x in enumerate(own)])
    return (total.log() - (score - 1) / TAU).mean()


def gte(queries, positives, hard):
    """The partition sums q_i.d_j, q_i.q_j, d_i.q_j and d_i.d_j over the batch; the pair (q_i, d_i) once."""
    losses = []
    for i, query in enumerate(queries):
        rest, others_hard = others(QUERIES, i), torch.cat([x for j, x in enumerate(hard) if j != i])
        losses.append(
            row_loss(
                positives[i] @ query, positives[rest] @ query, torch.cat(list(hard)) @ query, queries[rest] @ query,
                queries[rest] @ positives[i], positives[rest] @ positives[i], others_hard @ positives[i],
            )
        )  # fmt: skip
    return torch.stack(losses).mean()


def classification(queries, positives, hard):
    return torch.stack([row_loss(positives[i] @ q, hard[i] @ q) for i, q in enumerate(queries)]).mean()


PRESETS = {f.__name__: f for f in (qwen3, qwen3_stage2, mnrl, ms_swift, memeff, gte, classification)}


def with_gradients(loss, queries, positives, hard):
    leaves = [x.clone().requires_grad_() for x in (queries, positives, *hard)]
    value = loss(leaves[0], leaves[1], leaves[2:])
    return value.detach(), torch.autograd.grad(value, leaves, allow_unused=True)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_parity(name, ragged):
    def ours(queries, positives, hard):
        documents, positive, owner = as_arguments(positives, hard)
        return ops.info_nce(queries, documents, positive, owner=owner, preset=name, temperature=TAU, margin=MARGIN)

    texts = groups_of_texts(ragged=ragged)
    (loss, grads), (truth, true_grads) = with_gradients(ours, *texts), with_gradients(PRESETS[name], *texts)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    for ours_, true in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(ours_, torch.zeros_like(ours_) if true is None else true, rtol=1e-9, atol=1e-12)


def test_the_presets_differ():
    """Else a parity test could pass on data that no mask or group cares about."""
    texts = groups_of_texts()
    values = [float(loss(*texts)) for loss in PRESETS.values()]
    assert len({round(value, 6) for value in values}) == len(values)
