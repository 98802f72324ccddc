"""The installed manual pages as pairs: the one-line summary of a page -> its name and the start of its description."""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

PAGES = Path("/usr/share/man")
_MOST = 12_000
_SECTION = re.compile(r"^\.\s*S[Hh]\s+\"?([^\"\n]*)\"?\s*$", re.MULTILINE)
_ESCAPES = [
    (re.compile(r"\\f(\(..|\[[^]]*\]|.)"), ""),  # fonts
    (re.compile(r"\\s[-+]?\d"), ""),  # sizes
    (re.compile(r"\\\((em|en|hy)|\\-"), "-"),
    (re.compile(r"\\\((aq|cq|oq)|\\\(lq|\\\(rq|\\\(dq"), "'"),
    (re.compile(r"\\[&|^/,%:]|\\\(..|\\\*(\(..|.)"), ""),
    (re.compile(r"\\e"), "\\\\"),
    (re.compile(r"\\ |\\~"), " "),
]


def descriptions() -> Iterator[tuple[str, str, str]]:
    """(summary, name and description, name) of at most 12,000 pages, chosen by a hash of their names."""
    paths = sorted(PAGES.glob("man?/*.gz"), key=lambda path: zlib.crc32(path.name.encode()))
    for path in paths[:_MOST]:
        if path.is_symlink():
            continue
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            found = page(file.read())
        if found is not None:
            summary, text = found
            yield summary, text, path.name.split(".")[0]


def page(source: str) -> tuple[str, str] | None:
    """The summary, and the name with the description, of a page in man(7); None if it has no such sections."""
    parts = _SECTION.split(source)
    sections = dict(zip((name.strip().upper() for name in parts[1::2]), parts[2::2], strict=True))
    name, dash, summary = _plain(sections.get("NAME", "")).partition(" - ")
    description = _plain(sections.get("DESCRIPTION", ""))
    if not dash or len(summary) < 10 or len(description) < 40:
        return None
    return summary, f"{name.split(',')[0]}: {description}"


def _plain(section: str) -> str:
    """Text without requests, comments and escapes."""
    lines = []
    for line in section.splitlines():
        if re.match(r"^[.']\s*(B|I|BR|RB|BI|IB|IR|RI|SM|SB|SS|IP|Nm|Nd)\s", line):
            line = line.split(maxsplit=1)[1].replace('"', "")
        elif line.startswith((".", "'")):
            continue
        lines.append(line)
    text = "\n".join(lines)
    for pattern, new in _ESCAPES:
        text = pattern.sub(new, text)
    return " ".join(text.split())
