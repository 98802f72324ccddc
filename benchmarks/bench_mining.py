"""Hard negatives on vectors that are there already: against faiss-cpu with the same rule, and sentence-transformers'
mine_hard_negatives.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pyqemb
from pyqemb.curation.mining import search_negatives
from pyqemb.curation.rules import Rules
from pyqemb.data.example import Example

DIM, K, DEPTH = 256, 7, 50


def vectors(count, documents, seed=0):
    """Unit vectors; each query scores about 0.7 with the document of its number."""
    generator = np.random.default_rng(seed)
    d = generator.standard_normal((documents, DIM)).astype(np.float32)
    q = d[:count] + generator.standard_normal((count, DIM)).astype(np.float32)
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, d))


def by_faiss(index, q, d, own):
    """TopK-PercPos over faiss's candidates: asked for a few more than are wanted, for the positive is among them."""
    scores, indices = index.search(q, DEPTH + 1)
    ceiling = 0.95 * (q * d[own]).sum(axis=1)
    good = (scores <= ceiling[:, None]) & (indices != own[:, None])
    order = np.argsort(~good, axis=1, kind="stable")[:, :K]
    return np.take_along_axis(indices, order, axis=1)


@pytest.mark.parametrize(("count", "documents"), [(4096, 200_000), (2048, 1_000_000)])
def test_against_faiss(compare, count, documents):
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    (q, d), own = vectors(count, documents), np.arange(count)
    index = faiss.IndexFlatIP(DIM)
    index.add(d)
    rules = Rules(k=K, depth=DEPTH)

    def ours():
        found = search_negatives(q, own, d, rules, own[:, None], own, generator=np.random.default_rng(0))
        return found.indices

    same = (ours() == by_faiss(index, q, d, own)).mean()
    assert same > 0.999, same  # neighbours whose scores differ in the last bit may change places
    compare(
        f"mine, PercPos, {count} x {documents} x {DIM}", ours,
        {"faiss-cpu IndexFlatIP": lambda: by_faiss(index, q, d, own)},
        rounds=3, gflop=2 * count * documents * DIM / 1e9,
    )  # fmt: skip


class Ready:
    """A model whose vectors are known, as both libraries see one."""

    device = torch.device("cpu")

    def __init__(self, queries, documents):
        self.queries, self.documents = queries, documents

        self.model_card_data = SimpleNamespace(base_model="ready")

    def _encode(self, table, texts, convert_to_tensor=False):
        found = np.stack([table[text] for text in texts])
        return torch.from_numpy(found) if convert_to_tensor else found

    def encode_query(self, texts, instruction=None, convert_to_tensor=False, **_):
        return self._encode(self.queries, texts, convert_to_tensor)

    def encode_document(self, texts, convert_to_tensor=False, **_):
        return self._encode(self.documents, texts, convert_to_tensor)

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)

    def get_embedding_dimension(self):
        return DIM


@pytest.mark.parametrize("use_faiss", [False, True], ids=["torch", "faiss"])
def test_against_sentence_transformers(compare, use_faiss):
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.util import mine_hard_negatives

    count, documents = 4000, 50_000
    q, d = vectors(count, documents)
    texts = [f"document {i}" for i in range(documents)]
    model = Ready({f"query {i}": q[i] for i in range(count)}, dict(zip(texts, d, strict=True)))
    examples = [Example(f"query {i}", texts[i]) for i in range(count)]
    rows = datasets.Dataset.from_dict(
        {"anchor": [e.query for e in examples], "positive": [e.positive for e in examples]}
    )

    def ours():
        return pyqemb.mine(model, examples, corpus=texts, k=K, depth=DEPTH).examples

    def theirs():
        return mine_hard_negatives(
            rows, model, corpus=texts, num_negatives=K, relative_margin=0.05, range_max=DEPTH, use_faiss=use_faiss,
            output_format="n-tuple", verbose=False,
        )  # fmt: skip

    found = {row["anchor"]: {row[f"negative_{i}"] for i in range(1, K + 1)} for row in theirs()}
    same = np.mean([len(found[e.query] & set(e.negatives)) / K for e in ours() if e.query in found])
    assert same > 0.999
    assert len(found) > 0.95 * count
    name = f"mine_hard_negatives{', faiss' if use_faiss else ''}"
    compare(f"mine, {count} queries, {documents} documents, vectors given", ours, {name: theirs}, rounds=3)
