"""Search with the model of a finished demo."""

from dataclasses import dataclass
from pathlib import Path

from pyqemb.data.example import read_lines
from pyqemb.demo.material import Document
from pyqemb.demo.measure import ModelSearch
from pyqemb.demo.pipeline import CORPUS, MODEL
from pyqemb.errors import ConfigError
from pyqemb.model.embedder import Embedder


@dataclass(frozen=True)
class Answer:
    """A search result: its cosine similarity with the question, the name of its source, and its text."""

    score: float
    source: str
    text: str


def ask(out: Path, question: str, count: int = 5) -> list[Answer]:
    """The `count` best documents of the demo's largest corpus, without duplicate texts."""
    if not (out / MODEL / "config.json").is_file() or not (out / CORPUS).is_file():
        raise ConfigError(f"{out}: there is no finished demo here; run `pyqemb demo --out {out}` first")
    if not question.strip():
        raise ConfigError("--ask: expected a question, got an empty text")
    documents = {row["text"]: Document(row["text"], row["source"]) for _, row in read_lines(out / CORPUS)}
    corpus = list(documents.values())
    scores, indices = ModelSearch(Embedder.from_pretrained(out / MODEL))([question], corpus, count)
    return [Answer(float(s), corpus[i].source, corpus[i].text) for s, i in zip(scores[0], indices[0], strict=True)]
