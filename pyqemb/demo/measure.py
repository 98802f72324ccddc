"""Scores of a model or of BM25 on the held-out questions, by group and their mean, with bootstrap intervals."""

from collections.abc import Callable, Sequence

import numpy as np

from pyqemb.demo.bm25 import bm25_ranking
from pyqemb.demo.material import Document, Material, Question
from pyqemb.demo.results import ACCURACY, MEAN, NDCG, Found, Row, Score
from pyqemb.evaluation import rank
from pyqemb.evaluation.metrics import accuracy_at_1, ndcg_at_k
from pyqemb.model.embedder import Embedder

_DEPTH = 10
_RESAMPLES = 1000
# (questions, corpus) -> scores and indices [len(questions), depth], best first, padded with -1
Search = Callable[[Sequence[str], Sequence[Document], int], tuple[np.ndarray, np.ndarray]]


class ModelSearch:
    """Search with a model; each distinct text is encoded once."""

    def __init__(self, embedder: Embedder):
        self.embedder = embedder
        self._vectors: dict[str, np.ndarray] = {}

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Return the unit vectors of the texts as documents: float32 [len(texts), E]."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        self._vectors.update(zip(new, self.embedder.encode_document(new), strict=True))
        return np.stack([self._vectors[text] for text in texts])

    def __call__(self, questions: Sequence[str], corpus: Sequence[Document], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, indices) [len(questions), k] of the best documents of each question."""
        return rank(self.embedder.encode_query(list(questions)), self.vectors([d.text for d in corpus]), k)


def bm25_search(questions: Sequence[str], corpus: Sequence[Document], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search with BM25; the scores are not used."""
    found = bm25_ranking(questions, [document.text for document in corpus], k)
    return np.zeros(found.shape, dtype=np.float32), found


def measure(name: str, search: Search, material: Material, seed: int = 0, folder: str | None = None) -> Row:
    """A row of the table: the scores of every group on every corpus, and the mean over the material's groups."""
    scores = {}
    for corpus_name, corpus in material.corpora.items():
        values = _values(search, material.questions, corpus)
        scores[corpus_name] = {
            **{
                group: {metric: _interval([v], seed) for metric, v in metrics.items()}
                for group, metrics in values.items()
            },
            MEAN: {
                metric: _interval([values[group][metric] for group in material.groups], seed)
                for metric in (NDCG, ACCURACY)
            },
        }
    return Row(name, scores, folder)


def best_and_worst(search: ModelSearch, material: Material, count: int = 10) -> tuple[list[Found], list[Found]]:
    """Return the questions answered most and least clearly on the first corpus.

    Clarity is the answer's score minus the score of the best wrong document.
    """
    corpus = next(iter(material.corpora.values()))
    questions = [question for question in material.questions if question.group in material.groups]
    scores, indices = search([question.text for question in questions], corpus, 100)
    found = []
    for question, row_scores, row in zip(questions, scores, indices, strict=True):
        hits = np.array([corpus[i].text in question.answers for i in row])
        place = int(hits.argmax()) if hits.any() else len(row)
        right = row_scores[hits].max() if hits.any() else row_scores[-1]
        wrong = row_scores[~hits].max() if (~hits).any() else row_scores[-1]
        returned = [
            (float(s), corpus[i].source, corpus[i].text, bool(h)) for s, i, h in zip(row_scores, row, hits, strict=True)
        ]
        answer = min(question.answers & {document.text for document in corpus}, default="")
        found.append((float(right - wrong), Found(question.group, question.text, answer, place + 1, returned[:3])))
    found.sort(key=lambda pair: pair[0])
    return [f for _, f in found[::-1][:count]], [f for _, f in found[:count]]


def _values(
    search: Search, questions: Sequence[Question], corpus: Sequence[Document]
) -> dict[str, dict[str, np.ndarray]]:
    """{group: {metric: value of each question}}; documents with the text of an answer are answers."""
    places: dict[str, list[str]] = {}
    for index, document in enumerate(corpus):
        places.setdefault(document.text, []).append(str(index))
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question)
    values = {}
    for group, asked in groups.items():
        _, indices = search([question.text for question in asked], corpus, _DEPTH)
        ndcg, accuracy = [], []
        for question, row in zip(asked, indices, strict=True):
            ranking = [str(index) for index in row if index >= 0]
            relevant = {place: 1.0 for answer in question.answers for place in places.get(answer, ())}
            ndcg.append(ndcg_at_k(ranking, relevant, _DEPTH))
            accuracy.append(accuracy_at_1(ranking, relevant))
        values[group] = {NDCG: np.array(ndcg), ACCURACY: np.array(accuracy)}
    return values


def _interval(groups: Sequence[np.ndarray], seed: int) -> Score:
    """The mean of the groups' means; each group is resampled separately."""
    generator = np.random.default_rng(seed)
    samples = np.zeros(_RESAMPLES)
    for values in groups:
        samples += values[generator.integers(0, len(values), (_RESAMPLES, len(values)))].mean(axis=1) / len(groups)
    low, high = np.quantile(samples, [0.025, 0.975])
    return Score(float(np.mean([values.mean() for values in groups])), float(low), float(high))
