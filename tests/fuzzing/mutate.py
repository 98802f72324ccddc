"""Changes valid bytes, the same way for the same seed: bytes and blocks, and the structure of JSON documents."""

import json
import random
import struct

FORMS = ("bytes", "json", "lines")  # of a seed; in the last each line is JSON

_NUMBERS = (0, 1, -1, 2, 7, 8, 127, 128, 255, 256, 1023, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53,
    2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**63))  # fmt: skip
_RAW = (
    "null", "true", "false", '""', "[]", "{}", "0", "-0", "-1", "0.5", "1e308", "1e309", "-1e999", "1" * 19, "1" * 5000,
    "NaN", "Infinity", "-Infinity", '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"../x"', '"/"', '"a/b"', '"é"',
    '"\U0001f600"', '"%s{0}"', "[null]", "[[]]", "[0]", "{\"\": 0}", "[" * 50 + "]" * 50, "[" * 3000 + "]" * 3000,
    '{"a":' * 500 + "1" + "}" * 500, "[" * 2000, '"' + "x" * 5000 + '"', "01", "1.", "+1", "'a'", "0x10", "1_0",
    *map(str, _NUMBERS),
)  # fmt: skip
_TOKENS = (
    b"\0", b"\n", b"\r\n", b"\r", b"\t", b",", b";", b'"', b"'", b"\\", b"\\u", b"{", b"}", b"[", b"]", b":", b"\xff",
    b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\x0b", b"\x1c", b"\xc2\x85", b"#", b"=",
    b"&a", b"*a", b"<<", b"!!", b"---", b"nan", b"inf", b"1e400", b"9" * 400, b"[" * 2000, b"{" * 300, b"</think>",
    b"../", b"%s", b"\x1f\x8b", b"PAR1",
)  # fmt: skip


def mutate(seed: int, seeds: list[bytes], form: str = "bytes") -> bytes:
    """One of the seeds, changed once or a few times."""
    rng = random.Random(seed)
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if form != "bytes" and rng.random() < 0.65:
            data = _structure(rng, data, form == "lines")
        else:
            data = rng.choice(_BYTES)(rng, data, seeds)
    return data[: 1 << 20]


def _range(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 1, 2, 4, 8, 16, 64, 256)))


def _flip(rng, data, seeds):
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _set(rng, data, seeds):
    start, _ = _range(rng, data)
    return data[:start] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + data[start + 1 :]


def _insert(rng, data, seeds):
    start, _ = _range(rng, data)
    return data[:start] + rng.choice((rng.choice(_TOKENS), rng.randbytes(rng.choice((1, 2, 8, 64))))) + data[start:]


def _delete(rng, data, seeds):
    start, end = _range(rng, data)
    return data[:start] + data[end:]


def _duplicate(rng, data, seeds):
    start, end = _range(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 50)) + data[end:]


def _cut(rng, data, seeds):
    return data[: rng.randrange(len(data) + 1)]


def _splice(rng, data, seeds):
    other = rng.choice(seeds)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _copy(rng, data, seeds):
    (start, end), at = _range(rng, data), rng.randrange(len(data) + 1)
    return data[:at] + data[start:end] + data[at + (end - start) * rng.randrange(2) :]


def _number(rng, data, seeds):
    kind, value = rng.choice(["<B", "<H", "<I", "<Q", ">I", ">Q"]), rng.choice(_NUMBERS)
    size = struct.calcsize(kind)
    at = rng.randrange(max(1, len(data) - size + 1)) // rng.choice((1, size))
    return data[:at] + struct.pack(kind, value % (1 << 8 * size)) + data[at + size :]


def _digits(rng, data, seeds):
    """Another number in place of digits."""
    places = [i for i in range(len(data)) if data[i : i + 1].isdigit()]
    if not places:
        return _insert(rng, data, seeds)
    start = end = rng.choice(places)
    while data[end : end + 1].isdigit():
        end += 1
    return data[:start] + str(rng.choice(_NUMBERS)).encode() + data[end:]


_BYTES = (_flip, _flip, _set, _insert, _insert, _delete, _duplicate, _cut, _splice, _copy, _number, _digits)


def _structure(rng: random.Random, data: bytes, lines: bool) -> bytes:
    """A change of a value in a JSON document; of bytes if it is none."""
    rows = data.split(b"\n") if lines else [data]
    at = rng.randrange(len(rows))
    try:
        value = json.loads(rows[at])
        changed = _change(rng, value)
        rows[at] = _dump(changed, escape=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, OverflowError):
        return _insert(rng, data, [data])
    if lines and rng.random() < 0.1:
        rows.insert(at, rows[at])
    return b"\n".join(rows)


class _Text(str):
    """Text of JSON, valid or not, that takes the place of a value."""


class _Pairs(list):
    """(key, value) of an object, perhaps with a key that occurs twice."""


def _dump(value, escape):
    if isinstance(value, _Text):
        return str(value)
    if isinstance(value, (dict, _Pairs)):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=escape)}: {_dump(v, escape)}" for k, v in pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_dump(item, escape) for item in value) + "]"
    return json.dumps(value, ensure_ascii=escape)


def _change(rng: random.Random, value):
    """The document with one of its values changed: each level is as likely as the next."""
    children = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if children and rng.random() < 0.75:
        key = rng.choice(children)
        return _with(value, key, _change(rng, value[key]))
    if isinstance(value, dict) and children and rng.random() < 0.6:
        return _change_object(rng, value)
    if isinstance(value, list) and children and rng.random() < 0.5:
        return _change_list(rng, value)
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice((value + value, value[:-1], value + "\0", value.upper(), "../" + value, value * 200,
            " " + value, value + "\n", value[::-1], value + "\U0001f600"))  # fmt: skip
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, value + 0.5, value * 1000, str(value), bool(value), [value])
        )
    return rng.choice((_Text(rng.choice(_RAW)), _Text(rng.choice(_RAW)), [value], {"a": value}, [value] * 3))


def _with(value, key, item):
    if isinstance(value, dict):
        return {**value, key: item}
    return [*value[:key], item, *value[key + 1 :]]


def _change_object(rng, value):
    keys = list(value)
    key, other = rng.choice(keys), rng.choice(keys)
    return rng.choice((
        {k: v for k, v in value.items() if k != key},
        {k: v for k, v in value.items() if k != key},
        _Pairs([*value.items(), (key, value[other])]),
        {**value, key: value[other], other: value[key]},
        {(k + "x" if k == key else k): v for k, v in value.items()},
        {**value, rng.choice(("", "x", "__class__", "type", "\0", "a.b", "../x", "a" * 300)): value[key]},
    ))  # fmt: skip


def _change_list(rng, value):
    at = rng.randrange(len(value))
    return rng.choice((
        value[:at] + value[at + 1 :], [*value, value[at]], value * 2, value[::-1], [], value[:at] + value[at:] * 20,
        [*value, None], [value],
    ))  # fmt: skip
