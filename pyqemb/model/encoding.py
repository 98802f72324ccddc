"""Texts to vectors, whatever their number: the half of the Embedder that sentence-transformers' users know. Legend: B texts, E hidden size."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pyqemb.data.batch import PackedBatch
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.errors import ConfigError
from pyqemb.model.config import Qwen3Config
from pyqemb.model.quantize import quantize

_TOKENS_ON_CPU, _TOKENS_ON_DEVICE = 4096, 16384  # of one forward pass
_TEXTS_AT_ONCE = 8192  # sorted and tokenised together, so that a large corpus never lies in memory as token lists
_IGNORED = ("batch_size", "show_progress_bar", "normalize_embeddings", "convert_to_numpy")


class Encoding:
    """The methods; the class that has them is called with a PackedBatch and a dim, and has what is named here."""

    tokenizer: Tokenizer
    prompts: dict[str, str]
    config: Qwen3Config
    __call__: Callable[..., Any]

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str | Sequence[str | None] | None = None,
        dim: int | None = None,
        tokens_per_chunk: int | None = None,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        precision: str = "float32",
        on_progress: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Any:
        """Unit vectors [len(texts), dim or E] in the order of the texts; [dim] for a single text.

        Args:
            instruction: one, or one a text, makes queries of the texts; without it they are taken as they are.
            dim: the first so many components, normalised again (Matryoshka).
            tokens_per_chunk: of one forward pass; None: 4096 on the CPU, 16384 elsewhere.
            prompt_name, prompt: what stands before each text, by its name in `prompts` or itself, as in sentence-transformers.
            precision: float32, int8, uint8, binary or ubinary, see `pyqemb.model.quantize`.
            on_progress: called with the number of texts that are done.
            options: of sentence-transformers' encode, so that what calls that can call this. `convert_to_tensor` gives a torch tensor,
                `truncate_dim` is `dim`; batch_size, show_progress_bar, normalize_embeddings, convert_to_numpy change nothing: chunks are
                cut by tokens, and vectors are always normalised.

        Returns:
            A float32 numpy array, or of the precision's dtype.

        Raises:
            TypeError: not texts, an unknown option. ConfigError: an unknown prompt or precision, a dim out of range, two prompts.
        """
        dim, as_tensor = _st_options(options, dim)
        if isinstance(texts, str):
            single = self.encode(
                [texts], instruction, dim, tokens_per_chunk, prompt_name=prompt_name, prompt=prompt, precision=precision
            )[0]
            return torch.from_numpy(single) if as_tensor else single
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"expected texts, got {type(text).__name__} at index {index}")
        texts = self._prompted(texts, instruction, prompt_name, prompt)
        self._check_dim(dim)
        quantize(np.empty((0, 1), dtype=np.float32), precision)
        vectors = np.zeros((len(texts), dim or self.config.hidden_size), dtype=np.float32)
        for rows, window in self.encode_windows(texts, dim, tokens_per_chunk):
            vectors[rows] = window
            if on_progress is not None:
                on_progress(rows.stop)
        vectors = quantize(vectors, precision)
        return torch.from_numpy(vectors) if as_tensor else vectors

    def encode_windows(
        self, texts: Sequence[str], dim: int | None = None, tokens_per_chunk: int | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows and their vectors, window after window; while the model works on one the next is tokenised."""
        if tokens_per_chunk is None:
            tokens_per_chunk = _TOKENS_ON_CPU if self.device.type == "cpu" else _TOKENS_ON_DEVICE
        windows = [
            slice(first, min(first + _TEXTS_AT_ONCE, len(texts))) for first in range(0, len(texts), _TEXTS_AT_ONCE)
        ]
        if not windows:
            return
        with ThreadPoolExecutor(1) as background:
            ahead = background.submit(self.tokenizer.encode_documents, texts[windows[0]])
            for rows, after in zip(windows, [*windows[1:], None], strict=True):
                tokens = ahead.result()
                if after is not None:
                    ahead = background.submit(self.tokenizer.encode_documents, texts[after])
                yield rows, self._encode(tokens, dim, tokens_per_chunk)

    def encode_query(self, texts: str | Sequence[str], instruction: str | None = None, **options: Any) -> Any:
        """`encode` for queries: with the prompt stored in the checkpoint unless an instruction or a prompt is given."""
        return self.encode(texts, instruction, **self._stored_prompt("query", instruction, options))

    def encode_document(self, texts: str | Sequence[str], **options: Any) -> Any:
        """`encode` for documents: raw texts, after the checkpoint's document prompt where it has one."""
        return self.encode(texts, **self._stored_prompt("document", None, options))

    def embed_query(self, text: str) -> list[float]:
        """For LangChain: one query's vector."""
        return self.encode_query(text).tolist()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """For LangChain: the vectors of documents."""
        return self.encode_document(texts).tolist()

    def get_embedding_dimension(self) -> int:
        """Features of a whole vector, by sentence-transformers' name."""
        return self.config.hidden_size

    get_sentence_embedding_dimension = get_embedding_dimension

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text, by sentence-transformers' name."""
        return self.tokenizer.max_length

    @staticmethod
    def similarity(a: Any, b: Any) -> Any:
        """Dot products [len(a), len(b)] of two sets of vectors; numpy for numpy, torch for torch."""
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            a, b = torch.as_tensor(a), torch.as_tensor(b)
            return torch.atleast_2d(a) @ torch.atleast_2d(b).T
        return np.atleast_2d(a) @ np.atleast_2d(b).T

    @torch.inference_mode()
    def _encode(self, tokens: list[list[int]], dim: int | None, tokens_per_chunk: int) -> np.ndarray:
        """Sorted by length, so that a chunk's sequences are alike, and put back in order at the end."""
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        chunks = PackedBatch.pack([tokens[index] for index in order]).split(tokens_per_chunk)
        sorted_BE = torch.cat([self(chunk, dim).float() for chunk in chunks]).cpu()
        vectors_BE = torch.empty_like(sorted_BE)
        vectors_BE[order] = sorted_BE
        return vectors_BE.numpy()

    def _prompted(
        self, texts: Sequence[str], instruction: str | Sequence[str | None] | None, name: str | None, prompt: str | None
    ) -> Sequence[str]:
        if (instruction is not None) + (name is not None) + (prompt is not None) > 1:
            raise ConfigError(
                "instruction, prompt_name and prompt exclude each other: each says what stands before a text"
            )
        if name is not None:
            if name not in self.prompts:
                raise ConfigError(f"prompt_name must be one of {', '.join(self.prompts)}, got {name!r}")
            prompt = self.prompts[name]
        return [prompt + text for text in texts] if prompt else self.tokenizer.format_queries(texts, instruction)

    def _stored_prompt(self, name: str, instruction: str | None, options: dict[str, Any]) -> dict[str, Any]:
        """The options, with the checkpoint's prompt of that name where nothing else is asked for."""
        asked = instruction is not None or options.get("prompt") is not None or options.get("prompt_name") is not None
        return options if asked or name not in self.prompts else {**options, "prompt_name": name}

    def _check_dim(self, dim: int | None) -> None:
        if dim is not None and not (isinstance(dim, int) and 1 <= dim <= self.config.hidden_size):
            raise ConfigError(f"dim must lie in 1..{self.config.hidden_size}, got {dim!r}")


def _st_options(options: dict[str, Any], dim: int | None) -> tuple[int | None, bool]:
    """(dim, whether a tensor is wanted) by the names of sentence-transformers; TypeError for a name that it has not."""
    unknown = options.keys() - {*_IGNORED, "convert_to_tensor", "truncate_dim"}
    if unknown:
        raise TypeError(f"encode() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    truncate = options.get("truncate_dim")
    return truncate if dim is None else dim, bool(options.get("convert_to_tensor"))
