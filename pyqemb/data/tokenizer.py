"""Tokenization: the instruction template for queries, and the end token for all texts.

The pooled token is the appended `<|endoftext|>`. It is also the pad token of the released checkpoints, so it is located
by position (last of its sequence), not by its id.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tokenizers

from pyqemb.data.folder import Rule, read_bytes, read_object
from pyqemb.data.machine import reason
from pyqemb.data.strict_json import parse
from pyqemb.data.tokenizer_settings import CLASSES, TextSettings, read_text_settings
from pyqemb.errors import ConfigError, DataError

if TYPE_CHECKING:
    from typing_extensions import Self

END_TOKEN = "<|endoftext|>"
TEMPLATE = "Instruct: {task}\nQuery:{query}"
_COPIED = ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Turn the errors of the library tokenizers into a DataError that starts with `where`.

    It raises Exception itself, and of a file that contradicts itself a PanicException, which is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{where}: {reason(error)}") from error


# JSON may write each letter of a key as an escape.
_KEY = "".join(rf"(?:{letter}|\\u00{ord(letter):02x})" for letter in "continuing_subword_prefix")
_PREFIX = re.compile(rf'"{_KEY}"\s*:\s*"[^"]', re.IGNORECASE)


def _check_merges(path: Path, text: str) -> None:
    """DataError if a merge of tokenizer.json lacks the prefix that the file states for the second part of a merge.

    tokenizers cuts off as many bytes without looking. In the middle of a character this ends the process.
    """
    if not _PREFIX.search(text):
        return
    try:
        model = json.loads(text)["model"]
        prefix, merges = model.get("continuing_subword_prefix"), model.get("merges", [])
        parts = [each.split(" ", 1) if isinstance(each, str) else each for each in merges]
        wrong = next((pair for pair in parts if prefix and not pair[1].startswith(prefix)), None)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return  # tokenizers says what is wrong with it
    if wrong is not None:
        raise DataError(
            f"{path}: the second part of the merge {wrong!r:.100} should start with continuing_subword_prefix, "
            f"which is {prefix!r:.100}"
        )


class Tokenizer:
    """A Hugging Face tokenizer that appends the end token exactly once, also after truncation.

    `max_length` includes the end token; None means no truncation. `files` are other files beside tokenizer.json (name
    to content) that `save` writes again. `end_token` is pooled: `<|endoftext|>` in models derived from Qwen.
    `lower_case` lowercases texts and prompts. With `append_end` False, tokenizer.json determines the end of a text, for
    models that were trained in this way.
    """

    template = TEMPLATE
    transformer_rules: ClassVar[Mapping[str, Rule]] = {}  # see read_text_settings

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        max_length: int | None = None,
        files: Mapping[str, bytes] | None = None,
        end_token: str = END_TOKEN,
        lower_case: bool = False,
        append_end: bool = True,
    ):
        end_id = backend.token_to_id(end_token)
        if end_id is None:
            raise DataError(f"the tokenizer has no token {end_token!r}, which is the one that is pooled")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length must be at least 1 (the end token), got {max_length}")
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.end_token, self.end_id, self.max_length = backend, end_token, end_id, max_length
        self.files = dict(files or {})
        self.lower_case, self.append_end = lower_case, append_end
        if lower_case:
            _add_lower_case(backend)
        self._set_end()
        self._last_ids = self._appended()

    @classmethod
    def from_folder(cls, folder: str | Path, max_length: int | None = None) -> "Self":
        """Read a folder's tokenizer.json. `max_length` None: that of the folder, else no limit.

        The end token is that of pyqemb.json, else `<|endoftext|>`; a model other than Qwen3 without this token uses its
        eos_token, or its sep_token. It is appended for folders without modules.json; with modules.json, texts end as in
        sentence-transformers.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        content = read_bytes(folder, "tokenizer.json")
        if content is None:
            raise DataError(f"{folder}: has no tokenizer.json")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        _check_merges(path, text)
        with library_errors(f"{path}: not a tokenizer"):
            backend = tokenizers.Tokenizer.from_str(text)
        with library_errors(f"{path}: cannot be used"):
            return cls._of_folder(folder, backend, max_length)

    @classmethod
    def _of_folder(cls, folder: Path, backend: tokenizers.Tokenizer, max_length: int | None) -> "Self":
        settings = read_text_settings(folder, backend, cls.transformer_rules)
        files = {name: found for name in (*_COPIED, "tokenizer_config.json") if (found := read_bytes(folder, name))}
        try:
            limit = cls._limit(settings) if max_length is None else max_length
            return cls(backend, limit, files, _end_token(folder, backend), settings.lower_case, settings.append_end)
        except DataError as error:
            raise DataError(f"{folder}: {error}") from error
        except ConfigError as error:
            if max_length is not None:  # an argument of the caller
                raise
            raise DataError(f"{folder}: {error}") from error

    @staticmethod
    def _limit(settings: TextSettings) -> int | None:
        """The maximum length in the folder's settings."""
        return settings.max_length

    def with_max_length(self, max_length: int | None) -> "Self":
        """The same tokenizer with another maximum length."""
        return type(self)(self.backend, max_length, self.files, self.end_token, self.lower_case, self.append_end)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of raw texts, end token last."""
        if isinstance(texts, str):
            raise TypeError("expected a list of texts, got one text")
        with library_errors("the tokenizer cannot encode these texts"):
            try:
                encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=True)
            except TypeError as error:
                raise _not_a_text(texts) or error from error
        if self.max_length is None:
            return [encoding.ids for encoding in encodings]
        return [self._truncate(encoding.ids, self.max_length) for encoding in encodings]

    def encode_queries(
        self, texts: Sequence[str], instruction: str | Sequence[str | None] | None = None
    ) -> list[list[int]]:
        r"""Token ids of `Instruct: {task}\nQuery:{query}`, end token last.

        One instruction for all texts, or one for each; None leaves the query raw.
        """
        return self.encode_documents(self.format_queries(texts, instruction))

    @classmethod
    def format_queries(cls, texts: Sequence[str], instruction: str | Sequence[str | None] | None = None) -> list[str]:
        """The texts that `encode_queries` tokenizes."""
        tasks = [instruction] * len(texts) if instruction is None or isinstance(instruction, str) else list(instruction)
        if len(tasks) != len(texts):
            raise ValueError(f"expected one instruction for each of {len(texts)} texts, got {len(tasks)}")
        return [
            text if task is None else cls.template.format(task=task, query=text)
            for text, task in zip(texts, tasks, strict=True)
        ]

    def save(
        self, folder: str | Path, padding_side: Literal["left", "right"] = "left", own_padding: bool = False
    ) -> None:
        """Write tokenizer.json (which appends the end token), tokenizer_config.json and `files`.

        `padding_side` is the side on which other libraries pad texts, with the end token. With `own_padding`, they pad
        with the padding token of the tokenizer if it has one.
        """
        folder = Path(folder)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        (folder / "tokenizer_config.json").write_text(
            json.dumps(self._tokenizer_config(padding_side, own_padding), indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )

    def _tokenizer_config(self, padding_side: str, own_padding: bool) -> dict[str, Any]:
        stored = parse(self.files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
        for name in ("auto_map", "backend", "is_local", "local_files_only"):  # transformers 5 does not read them
            stored.pop(name, None)
        if isinstance(stored.get("extra_special_tokens"), list):  # a list only in transformers 5
            stored["additional_special_tokens"] = stored.pop("extra_special_tokens")
        if stored.get("tokenizer_class") not in CLASSES:  # class names of transformers 5 only
            stored["tokenizer_class"] = "PreTrainedTokenizerFast"
        stored["padding_side"] = padding_side
        if not own_padding:
            stored.setdefault("eos_token", self.end_token)
        if not (own_padding and stored.get("pad_token")):
            stored["pad_token"] = self.end_token
        if self.max_length is not None:
            stored["model_max_length"] = self.max_length
        return stored

    def _truncate(self, ids: list[int], limit: int) -> list[int]:
        return ids if len(ids) <= limit else [*ids[: max(limit - len(self._last_ids), 0)], *self._last_ids]

    def _appended(self) -> list[int]:
        """The tokens that the post-processor appends to every text."""
        plain = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a", add_special_tokens=True).ids
        starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
        return whole[starts[0] + len(plain) :] if plain and starts else []

    def _appends_end(self) -> bool:
        without = self.backend.encode("a", add_special_tokens=False).ids
        return self.backend.encode("a", add_special_tokens=True).ids[len(without) :][-1:] == [self.end_id]

    def _set_end(self) -> None:
        """Make the tokenizer append the end token, unless it does already."""
        if not self.append_end or self._appends_end():
            return
        end = tokenizers.processors.TemplateProcessing(
            single=f"$A {self.end_token}",
            pair=f"$A {self.end_token} $B {self.end_token}",
            special_tokens=[(self.end_token, self.end_id)],
        )
        before = self.backend.post_processor
        self.backend.post_processor = end if before is None else tokenizers.processors.Sequence([before, end])
        if not self._appends_end():
            raise DataError(f"the tokenizer's post-processor cannot be made to append {self.end_token!r}")


def _not_a_text(texts: Sequence[str]) -> Exception | None:
    """The error of the first item that no tokenizer encodes, for which tokenizers raises a TypeError without it."""
    for text in texts:
        if not isinstance(text, str):
            return TypeError(f"texts: expected texts, got {text!r:.100}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            return DataError(f"texts: {text!r:.200} holds half of a surrogate pair, which is no text")
    return None


def _end_token(folder: Path, backend: tokenizers.Tokenizer) -> str:
    contract, config, settings = (
        read_object(folder, name) for name in ("pyqemb.json", "config.json", "tokenizer_config.json")
    )
    if "end_token" in contract:
        return str(contract["end_token"])
    if backend.token_to_id(END_TOKEN) is not None or config.get("model_type", "qwen3") == "qwen3":
        return END_TOKEN
    for name in ("eos_token", "sep_token"):  # BERT has no eos_token
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return END_TOKEN


def _add_lower_case(backend: tokenizers.Tokenizer) -> None:
    """Lowercase every text first, as sentence-transformers does for `do_lower_case`."""
    before = backend.normalizer
    if before is None or b'"Lowercase"' not in before.__getstate__():
        lower = tokenizers.normalizers.Lowercase()
        backend.normalizer = tokenizers.normalizers.Sequence([lower] if before is None else [lower, before])
