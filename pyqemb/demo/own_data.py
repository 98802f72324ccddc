"""The recipe with your own files.

It takes training pairs in any form that pyqemb reads, and a BEIR folder for evaluation.
"""

from pathlib import Path

from pyqemb.data.beir import read_documents
from pyqemb.data.example import Example, read_examples
from pyqemb.demo.material import Document, Material, Question, halves, sample
from pyqemb.errors import DataError

_WEAK_PAIRS = 100_000
GROUP = "test"


def own_material(train: Path, folder: Path, *, seed: int = 0, limit: int | None = None) -> Material:
    """Material of a training file and a BEIR folder. Training pairs whose query is a test question are removed.

    Raises a DataError that names the invalid file (and line).
    """
    corpus = list(read_documents(folder))
    asked = [(example.query, example.positive) for example in read_examples(folder)]
    answers: dict[str, set[str]] = {}
    for query, positive in asked:
        answers.setdefault(query, set()).add(positive)
    examples = list(dict.fromkeys(read_examples(train)))[:limit]
    kept = [example for example in examples if example.query not in answers]
    if not kept:
        raise DataError(f"{train}: every query of it is also a question in {folder}; nothing is left to train on")
    texts = list(
        dict.fromkeys(text for example in kept for text in (example.query, example.positive, *example.negatives))
    )
    documents = {text for answer in answers.values() for text in answer}
    return Material(
        name=train.name.split(".")[0],
        texts=texts,
        weak=sample(list(halves(texts)), _WEAK_PAIRS, seed=seed),
        supervised=[Example(e.query, e.positive, e.negatives, e.instruction, e.task or "pair") for e in kept],
        questions=[Question(GROUP, query, frozenset(found)) for query, found in answers.items()],
        corpora={"corpus": [Document(text, identity) for identity, text in corpus]},
        groups=(GROUP,),
        facts={
            "training pairs": len(kept),
            "training pairs left out because their query is a test question": len(examples) - len(kept),
            "test questions": len(answers),
            "test documents": len(corpus),
            "answers that are also training texts": len(documents & set(texts)),
        },
    )
