"""The input of a reranker: a query and a document in a fixed chat template with the answer yes or no.

Source: Qwen3 Embedding report (arXiv 2506.05176), section 2; the exact characters are those of Qwen3-Reranker's model
card.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import tokenizers

from pyqemb.data.folder import Rule, one_of
from pyqemb.data.tokenizer import END_TOKEN, Tokenizer, library_errors
from pyqemb.data.tokenizer_settings import TextSettings
from pyqemb.errors import ConfigError, DataError

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    "provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
MAX_LENGTH = 8192  # tokens of the whole text, as in the model card


def format_pair(query: str, document: str, instruction: str | None = None) -> str:
    """The text between PREFIX and SUFFIX. The default instruction is INSTRUCTION."""
    return (
        f"<Instruct>: {INSTRUCTION if instruction is None else instruction}\n<Query>: {query}\n<Document>: {document}"
    )


class PairTokenizer(Tokenizer):
    """Tokenizes pairs with prefix and suffix; only the text between them (the body) is truncated.

    `max_length` includes prefix and suffix. Raises DataError if "yes" or "no" is not a single token, ConfigError if no
    body would fit.
    """

    # sentence-transformers' CrossEncoder: a chat template, or a classifier.
    transformer_rules: ClassVar[Mapping[str, Rule]] = {
        "transformer_task": one_of("text-generation", "sequence-classification"),
        "modality_config": lambda value: isinstance(value, dict) and "message" in value,
        "module_output_name": one_of("causal_logits", "scores", None),
    }

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        max_length: int | None = None,
        files: Mapping[str, bytes] | None = None,
        end_token: str = END_TOKEN,
        lower_case: bool = False,
        append_end: bool = True,
    ):
        limit = MAX_LENGTH if max_length is None else max_length
        super().__init__(backend, limit, files, end_token, lower_case, append_end)
        self.yes_id, self.no_id = self._single("yes"), self._single("no")
        self._prefix, self._suffix = (backend.encode(text, add_special_tokens=False).ids for text in (PREFIX, SUFFIX))
        fixed = len(self._prefix) + len(self._suffix)
        self._room = limit - fixed
        if self._room < 1:
            raise ConfigError(f"max_length must leave room for a pair beside {fixed} fixed tokens, got {limit}")

    @staticmethod
    def _limit(settings: TextSettings) -> int | None:
        return min(settings.max_length or MAX_LENGTH, MAX_LENGTH)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of bodies (`format_pair`), with prefix and suffix."""
        if isinstance(texts, str):
            raise TypeError("expected a list of texts, got one text")
        with library_errors("the tokenizer cannot encode these texts"):
            bodies = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*self._prefix, *body.ids[: self._room], *self._suffix] for body in bodies]

    def _single(self, word: str) -> int:
        found = self.backend.encode(word, add_special_tokens=False).ids
        if len(found) != 1:
            raise DataError(f"the tokenizer makes {len(found)} tokens of {word!r}; a reranker needs one")
        return found[0]

    def _set_end(self) -> None:
        """Append no end token: the answer is predicted at the last token of the suffix."""
        if self._appends_end():
            self.backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
