"""The JSON objects of an answer that stand outside of the model's thoughts."""

import json
import re
from typing import Any, NamedTuple

from pyqemb.data import strict_json

_TAGS = (
    "think|thinking|thought|thoughts|reason|reasoning|reflection|analysis|scratchpad|seed:think|seed:cot_budget_reflect"
)
# What opens and what closes a thought: DeepSeek, Qwen and most others; Magistral; Kimi; OpenThinker; Command A;
# Apertus; Gemma.
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
# Of objects that turn out to be none, in one answer: a hostile one must not take minutes.
_MAX_FAILURES = 1000
_MAX_FAILED_CHARACTERS = 4_000_000


class Candidates(NamedTuple):
    """What an answer holds outside of the model's thoughts."""

    objects: list[dict[str, Any]]  # in their order
    prose: str  # what stands outside of thoughts and objects
    unfinished: bool  # the answer ends inside a thought, or an object begins after the last complete one


def candidates(text: str) -> Candidates:
    """Every complete JSON object outside of thoughts, the outermost ones.

    A thought that is not closed has no end; before a closing marker without an opening one everything is thought.
    Markers inside of JSON strings are text. Objects that `strict_json` refuses are none.
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


_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_unique)  # models write line ends into strings


def _object(text: str, start: int) -> tuple[int, dict[str, Any] | None]:
    """(its end, the object) or (how far it was read, None)."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        return end, strict_json.parse(json.dumps(value), "answer")
    except json.JSONDecodeError as error:
        return error.pos, None
    except (ValueError, RecursionError):
        return start + 10_000, None
