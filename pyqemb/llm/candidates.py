"""The JSON objects of an answer outside of the model's reasoning."""

import json
import re
from typing import Any, NamedTuple

from pyqemb.data import strict_json

_TAGS = (
    "think|thinking|thought|thoughts|reason|reasoning|reflection|analysis|scratchpad|seed:think|seed:cot_budget_reflect"
)
# Markers of the start and the end of reasoning: DeepSeek, Qwen and most others; Magistral; Kimi; OpenThinker; Command
# A; Apertus; Gemma.
_OPEN = (
    rf"<(?:{_TAGS})\b[^<>]*>|\[THINK\]|\u25c1think\u25b7|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|inner_prefix\|>"
    r"|<\|channel>(?!\s*final)"
)
_CLOSE = (
    rf"</(?:{_TAGS})\s*>|\[/THINK\]|\u25c1/think\u25b7|<\|end_of_thought\|>|<\|END_THINKING\|>|<\|inner_suffix\|>"
    r"|<channel\|>"
)
# gpt-oss switches between channels; only the final one is an answer.
_PIECE = re.compile(
    rf"(?P<final><\|channel\|>\s*final)|(?P<channel><\|channel\|>)|(?P<open>{_OPEN})|(?P<close>{_CLOSE})"
    r'|(?P<object>\{(?=\s*["}]))',
    re.IGNORECASE,
)
# A limit of invalid objects in one answer, so that a malicious answer does not take minutes.
_MAX_FAILURES = 1000
_MAX_FAILED_CHARACTERS = 4_000_000


class Candidates(NamedTuple):
    """The content of an answer outside of the model's reasoning."""

    objects: list[dict[str, Any]]  # in order
    prose: str  # the text outside of reasoning and objects
    unfinished: bool  # the answer ends inside reasoning or inside an object


def candidates(text: str) -> Candidates:
    """The complete outermost JSON objects outside of the reasoning.

    Reasoning without a closing marker extends to the end; a closing marker without an opening one ends reasoning that
    started at the beginning. Markers inside of JSON strings are text. Objects that `strict_json` rejects are ignored.
    """
    objects: list[dict[str, Any]] = []
    prose: list[str] = []
    depth = failures = failed = at = start = 0
    unfinished = False
    while failures < _MAX_FAILURES and failed < _MAX_FAILED_CHARACTERS and (found := _PIECE.search(text, at)):
        kind, at, value = found.lastgroup, found.end(), None
        if kind == "object":
            end, value = _object(text, found.start())
            if value is None:
                failures, failed, unfinished = failures + 1, failed + end - found.start(), unfinished or depth == 0
                continue
            at = end
        if depth == 0:
            prose.append(text[start : found.start()])
        start = at
        if value is not None and depth == 0:
            objects.append(value)
            unfinished = False
        elif kind == "open":
            depth += 1
        elif kind == "close" and depth:
            depth -= 1
        elif kind == "channel":
            depth = 1
        elif kind in ("close", "final"):
            depth = 0
            objects.clear()
            prose.clear()
    if depth == 0:
        prose.append(text[start:])
    return Candidates(objects, "".join(prose).strip(), unfinished or depth > 0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_unique)  # models write raw line ends into strings


def _object(text: str, start: int) -> tuple[int, dict[str, Any] | None]:
    """(its end, the object), or (the position where parsing failed, None)."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        return end, strict_json.parse(json.dumps(value), "answer")
    except json.JSONDecodeError as error:
        return error.pos, None
    except (ValueError, RecursionError):
        return start + 10_000, None
