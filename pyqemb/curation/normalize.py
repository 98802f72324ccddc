"""Normalization of texts for comparison."""

import html
import re
import unicodedata

# Joiners and direction marks are of category Cf; variation selectors are marks that `combining` does not count.
_VARIATION = re.compile("[\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_ENTITY = re.compile(r"&(?:#?\w{1,32});")


def plain(text: str) -> str:
    """Normalize a text for comparison.

    HTML entities are decoded; zero-width characters, soft hyphens, accents, case, compatibility forms and repeated
    spaces are removed.

    Example:
        >>> plain("Caf\u00e9&nbsp;\u200bo\u00adle\u0301")
        'cafe ole'
    """
    while _ENTITY.search(text) and (decoded := html.unescape(text)) != text:  # text like "&amp;nbsp;" is encoded twice
        text = decoded
    if not text.isascii():
        text = _VARIATION.sub("", unicodedata.normalize("NFKD", text))
        text = "".join(c for c in text if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())
