"""The lexical baseline: BM25 of the bm25s library, with words for alphabetic scripts and letter pairs for others."""

import re
from collections.abc import Sequence

import numpy as np

from pyqemb.errors import ConfigError

# Scripts without spaces: Chinese characters, kana, hangul; Thai and related scripts.
_SPACELESS = "\u0e00-\u0fff\u1100-\u11ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_PIECE = re.compile(rf"[{_SPACELESS}]+|[^\W_{_SPACELESS}]+")
_IS_SPACELESS = re.compile(rf"[{_SPACELESS}]")


def bm25_ranking(queries: Sequence[str], corpus: Sequence[str], k: int) -> np.ndarray:
    """Return the indices [len(queries), k] of the best documents by BM25, best first, padded with -1.

    The formula is Lucene's, with k1 1.5 and b 0.75.

    A document that shares no word with the query is never returned.
    """
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise ConfigError("the BM25 baseline needs bm25s: pip install 'pyqemb[demo]'") from error
    k = min(k, len(corpus))
    if not queries or not k:
        return np.full((len(queries), k), -1, dtype=np.int64)
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    # A word that is in no text, because bm25s does not support an empty vocabulary.
    index.index([words(text) or ["\0"] for text in corpus], show_progress=False)
    found, scores = index.retrieve([words(text) or ["\0"] for text in queries], k=k, show_progress=False, n_threads=1)
    return np.where(scores > 0, found, -1).astype(np.int64)


def words(text: str) -> list[str]:
    """Lower-case words; runs of a script without spaces become overlapping pairs of letters."""
    pieces = []
    for piece in _PIECE.findall(text.lower()):
        if len(piece) > 1 and _IS_SPACELESS.match(piece):
            pieces += [piece[start : start + 2] for start in range(len(piece) - 1)]
        else:
            pieces.append(piece)
    return pieces
