"""Why the titles of `pyqemb demo` are hard: facts about the questions, and nDCG@10 of BM25 and of models.

    python benchmarks/quality/titles.py [MODEL_FOLDER ...]

A model is any folder that pyqemb or sentence-transformers opens. The corpus is the held-out pages.
"""

import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from pyqemb.demo.help_data import TITLES, help_material
from pyqemb.demo.measure import ModelSearch, Search, bm25_search, measure
from pyqemb.demo.results import ACCURACY, NDCG
from pyqemb.model.encoder import open_encoder

_LONG = 4  # letters of a word that counts as shared


def main() -> None:
    material = help_material()
    held_out, corpus = next(iter(material.corpora.items()))
    titles = [question for question in material.questions if question.group == TITLES]
    material = replace(material, questions=titles, corpora={held_out: corpus}, groups=[TITLES])
    texts = {document.text for document in corpus}
    answers = [(question.text, question.answers & texts) for question in titles]
    shared = [statistics.fmean(bool(words(text) & words(a)) for a in found) for text, found in answers]
    print(f"{len(titles)} titles, {statistics.fmean(len(found) for _, found in answers):.1f} paragraphs each")
    print(f"{statistics.fmean(shared):.0%} of a title's paragraphs share a word with it")
    searches: list[tuple[str, Search]] = [("BM25", bm25_search)]
    searches += [(folder, ModelSearch(open_encoder(Path(folder)))) for folder in sys.argv[1:]]
    for name, search in searches:
        scores = measure(name, search, material).scores[held_out][TITLES]
        for metric in (NDCG, ACCURACY):
            at = scores[metric]
            print(f"{name}: {metric} {at.value:.3f} [{at.low:.3f}, {at.high:.3f}]", flush=True)


def words(text: str) -> set[str]:
    """The words of at least four letters, in lower case."""
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) >= _LONG}


if __name__ == "__main__":
    main()
