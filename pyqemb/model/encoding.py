"""Encoding of any number of texts, with the methods and arguments of SentenceTransformer.

Legend: B texts, T tokens, E hidden size.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pyqemb.data.arguments import Count, checked
from pyqemb.data.batch import PackedBatch
from pyqemb.errors import ConfigError
from pyqemb.model.device import pick_device
from pyqemb.model.neighbors import ModelCardData, also_called, check_batch_size, register_with_langchain
from pyqemb.model.packed_model import PackedModel, in_order
from pyqemb.model.pool import Pool, Pooled, as_tensors
from pyqemb.model.progress import progress_bar
from pyqemb.model.protocols import Ranks
from pyqemb.model.quantize import quantize
from pyqemb.model.similarity import check_similarity, similarity, similarity_pairwise

_TEXTS_AT_ONCE = 8192  # sorted and tokenized together, so that not all token lists of a large corpus are in memory
_OUTPUTS = ("sentence_embedding", "token_embeddings", None)
_log = logging.getLogger("pyqemb")

# An array or a tensor; a list of tensors or dicts, one for each text; the dict of one text.
Encoded = np.ndarray | torch.Tensor | list[Any] | dict[str, Any]


class Encoding(Pooled, PackedModel):
    """The methods, as a base class; subclasses are called with a PackedBatch and a dim, and have these attributes."""

    prompts: dict[str, str]
    default_prompt_name: str | None
    truncate_dim: int | None
    normalize: bool
    plain: bool
    hidden: Callable[[PackedBatch], torch.Tensor]
    pooled: Callable[[PackedBatch], torch.Tensor]

    @also_called("texts", "sentences", "inputs")
    @checked
    def encode(
        self,
        texts: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: Count | None = None,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | Sequence[str] | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        pool: Pool | None = None,
        chunk_size: Count | None = None,
        *,
        instruction: str | Sequence[str | None] | None = None,
        dim: int | None = None,
        tokens_per_chunk: Count | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Encoded:
        """Encode texts as vectors: [len(texts), E] in the order of the texts, [E] for a single text, (0,) for no text.

        The arguments are those of SentenceTransformer.encode, in its order, and four of pyqemb's own.

        Args:
            texts: one text or a list of texts; `sentences` and `inputs` are other names of this argument.
            prompt_name: the name in `prompts` of the prefix of each text (default: the model's `default_prompt_name`).
            prompt: the prefix of each text, instead of a named prompt.
            batch_size: checked and otherwise unused; forward passes are bounded by `tokens_per_chunk`.
            show_progress_bar: True shows a bar on stderr.
            output_value: "token_embeddings" gives a tensor [tokens, E] for each text, None gives a dict of input_ids,
                attention_mask, token_embeddings and sentence_embedding for each text.
            precision: None or float32, int8, uint8, binary, ubinary, see `pyqemb.model.quantize`.
            convert_to_numpy: False gives a list of tensors.
            convert_to_tensor: True gives one tensor.
            device: move the model there first. A list of devices encodes in one process for each.
            normalize_embeddings: True gives unit vectors. Otherwise the vectors are normalized if the model's folder
                has a Normalize module. For a base model (a folder without modules.json), None (the default) gives unit
                vectors and False the output of the pooling.
            truncate_dim: keep the first components only; they are normalized again only by `normalize_embeddings=True`.
                None: the model's own `truncate_dim`.
            pool: the worker processes of `start_multi_process_pool` (default: encode in this process).
            chunk_size: the number of texts that a worker process gets at a time.
            instruction: format the texts as queries with this task sentence, or with one for each text.
            dim: the number of first components to keep, normalized again (Matryoshka).
            tokens_per_chunk: tokens in one forward pass; None: 4096 on the CPU, 16384 elsewhere.
            on_progress: called with the number of texts that are done.

        Returns:
            A float32 numpy array, or one of the precision's dtype, unless an argument says otherwise.

        Raises:
            TypeError: not texts, an unknown argument. ConfigError (a ValueError): an invalid value of an argument.

        Example:
            >>> from pyqemb.testing.tiny import tiny_embedder
            >>> tiny_embedder().encode(["one text", "another"], truncate_dim=8).shape
            (2, 8)
        """
        single = isinstance(texts, str)
        texts = [texts] if isinstance(texts, str) else _text_list(texts)
        precision = precision or "float32"
        _check_output(output_value, precision, len(texts))
        check_batch_size(batch_size)
        width = self._width(dim, truncate_dim)
        texts = self._prompted(texts, instruction, prompt_name, prompt)
        if device is not None and isinstance(device, (str, torch.device)):
            self.to(pick_device(device, self.config))
            device = None
        results: Any
        with progress_bar("Texts", len(texts), show_progress_bar) as advance:
            if pool is not None or device is not None:
                options = dict(
                    prompt="", output_value=output_value, normalize_embeddings=normalize_embeddings, dim=dim,
                    truncate_dim=width if dim is None else None, tokens_per_chunk=tokens_per_chunk,
                )  # fmt: skip
                parts = self.in_processes("encode", texts, options, device, pool, chunk_size, advance)
                results = _joined(parts, width, output_value)
            elif output_value == "sentence_embedding":
                forward = self._vectors_of(dim, truncate_dim, normalize_embeddings)
                windows = self._windows(texts, forward, tokens_per_chunk, advance, self._ranks)
                results = _filled(windows, (len(texts), width), on_progress)
            else:
                forward = self._vectors_of(dim, truncate_dim, None if self.plain else False)
                details = self._details_of(output_value, forward)
                results = [
                    item for _, window in self._windows(texts, details, tokens_per_chunk, advance) for item in window
                ]
        if output_value == "sentence_embedding":
            results = self._converted(quantize(results, precision), convert_to_numpy, convert_to_tensor)
        return results[0] if single else results

    def encode_windows(
        self, texts: Sequence[str], dim: int | None = None, tokens_per_chunk: Count | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield row indices and their unit vectors by windows; the next window is tokenized while the model runs."""
        forward: Callable[[PackedBatch], torch.Tensor] = lambda chunk: self(chunk, dim)  # noqa: E731
        for rows, window in self._windows(texts, forward, tokens_per_chunk, lambda done: None, self._ranks):
            yield rows, window.cpu().numpy()

    @also_called("texts", "sentences", "inputs")
    @checked
    def encode_query(
        self,
        texts: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *rest: Any,
        instruction: str | None = None,
        **options: Any,
    ) -> Encoded:
        """Encode queries: `encode` with the model's prompt "query" unless a prompt or an instruction is given.

        Args:
            texts: one query or a list of queries.
            prompt_name: the name of another prompt.
            prompt: another prompt.
            rest: further arguments of `encode`, in its order.
            instruction: the task sentence of the query prompt (default: that of the model).
            options: further arguments of `encode`, by name.

        Returns:
            Vectors as of `encode`.
        """
        if prompt_name is None and prompt is None and instruction is None and "query" in self.prompts:
            prompt_name = "query"
        return self.encode(texts, prompt_name, prompt, *rest, instruction=instruction, **options)

    @also_called("texts", "sentences", "inputs")
    @checked
    def encode_document(
        self,
        texts: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *rest: Any,
        **options: Any,
    ) -> Encoded:
        """Encode documents: `encode` with the model's prompt "document" unless another prompt is given.

        Args:
            texts: one document or a list of documents.
            prompt_name: the name of another prompt.
            prompt: another prompt.
            rest: further arguments of `encode`, in its order.
            options: further arguments of `encode`, by name.

        Returns:
            Vectors as of `encode`.
        """
        if prompt_name is None and prompt is None and "document" in self.prompts:
            prompt_name = "document"
        return self.encode(texts, prompt_name, prompt, *rest, **options)

    @checked
    def embed_query(self, text: str) -> list[float]:
        """Encode one query, as LangChain calls it.

        Args:
            text: the query.

        Returns:
            Its vector, as a list.
        """
        register_with_langchain(type(self))
        return self.encode_query(text).tolist()

    @checked
    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Encode documents, as LangChain calls it.

        Args:
            texts: the documents.

        Returns:
            Their vectors, as lists.
        """
        register_with_langchain(type(self))
        return self.encode_document(texts).tolist()

    async def aembed_query(self, text: str) -> list[float]:
        """Call `embed_query` in a thread.

        Args:
            text: the query.

        Returns:
            Its vector, as a list.
        """
        return await asyncio.to_thread(self.embed_query, text)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Call `embed_documents` in a thread.

        Args:
            texts: the documents.

        Returns:
            Their vectors, as lists.
        """
        return await asyncio.to_thread(self.embed_documents, texts)

    def get_embedding_dimension(self) -> int:
        """Get the dimension of a vector, by sentence-transformers' name.

        Returns:
            The number of components that `encode` returns.
        """
        return self._width(None, None)

    get_sentence_embedding_dimension = get_embedding_dimension

    @property
    def max_seq_length(self) -> int | None:
        """The number of tokens to which a text is truncated, by sentence-transformers' name."""
        return self.tokenizer.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.config.check_length(value)
        self.tokenizer = self.tokenizer.with_max_length(value or self.config.max_tokens)

    def get_max_seq_length(self) -> int | None:
        """Get `max_seq_length`.

        Returns:
            The number of tokens to which a text is truncated.
        """
        return self.max_seq_length

    @checked
    @contextmanager
    def truncate_embeddings(self, truncate_dim: Count | None) -> Iterator[None]:
        """Within this context `encode` returns the first `truncate_dim` components.

        Args:
            truncate_dim: the number of components; None for all.

        Yields:
            Nothing.
        """
        before, self.truncate_dim = self.truncate_dim, truncate_dim
        try:
            yield
        finally:
            self.truncate_dim = before

    truncate_sentence_embeddings = truncate_embeddings

    @cached_property
    def model_card_data(self) -> ModelCardData:
        """Where the evaluators of sentence-transformers store their results."""
        return ModelCardData()

    @property
    def similarity_fn_name(self) -> str:
        """The measure of `similarity`: cosine, dot, euclidean or manhattan; the last two are negative distances."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, name: Any) -> None:
        self._similarity_fn_name = check_similarity(name)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Compare each vector with each, by `similarity_fn_name`.

        Args:
            embeddings1: [N, E] array or tensor.
            embeddings2: [M, E] array or tensor.

        Returns:
            Similarities [N, M].
        """
        return similarity(self.similarity_fn_name, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Compare each vector with the one in the same row, by `similarity_fn_name`.

        Args:
            embeddings1: [N, E] array or tensor.
            embeddings2: [N, E] array or tensor.

        Returns:
            Similarities [N].
        """
        return similarity_pairwise(self.similarity_fn_name, embeddings1, embeddings2)

    def _windows(
        self,
        texts: Sequence[str],
        forward: Callable[[PackedBatch], Any],
        tokens_per_chunk: Count | None,
        advance: Callable[[int], None],
        ranks: Ranks | None = None,
    ) -> Iterator[tuple[slice, Any]]:
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
                yield rows, in_order(tokens, forward, self._chunk_size(tokens_per_chunk), advance, ranks)

    def _vectors_of(
        self, dim: int | None, truncate_dim: int | None, normalize_embeddings: bool | None
    ) -> Callable[[PackedBatch], torch.Tensor]:
        """A forward pass with the output that sentence-transformers' modules and arguments define."""
        width = self._width(dim, truncate_dim)
        if dim is not None or normalize_embeddings:
            return lambda chunk: self(chunk, width)
        whole = self if self.normalize and not (self.plain and normalize_embeddings is False) else self.pooled
        return lambda chunk: whole(chunk)[:, :width]

    def _details_of(
        self, output_value: str | None, forward: Callable[[PackedBatch], torch.Tensor]
    ) -> Callable[[PackedBatch], list[Any]]:
        def details(chunk: PackedBatch) -> list[Any]:
            lengths = chunk.lengths.tolist()
            tokens = list(self.hidden(chunk).split(lengths))
            if output_value == "token_embeddings":
                return tokens
            ids = chunk.input_ids_T.to(self.device, torch.long).split(lengths)
            return [
                {"input_ids": i, "attention_mask": torch.ones_like(i), "token_embeddings": t, "sentence_embedding": v}
                for i, t, v in zip(ids, tokens, forward(chunk), strict=True)
            ]

        return details

    def _converted(self, vectors: np.ndarray, to_numpy: bool, to_tensor: bool) -> Encoded:
        if not len(vectors):
            vectors = np.array([], dtype=np.float32 if to_tensor else np.float64)  # the dtype of sentence-transformers
        if to_numpy and not to_tensor:
            return vectors
        tensor = torch.from_numpy(vectors)
        tensor = tensor.to(self.device) if tensor.is_floating_point() else tensor
        return tensor if to_tensor else list(tensor)

    def _prompted(
        self, texts: Sequence[str], instruction: str | Sequence[str | None] | None, name: str | None, prompt: str | None
    ) -> Sequence[str]:
        if instruction is not None:
            if name is not None or prompt is not None:
                raise ConfigError(
                    "instruction and prompt_name or prompt exclude each other: each says what precedes a text"
                )
            return self.tokenizer.format_queries(texts, instruction)
        if prompt is None:
            name = self.default_prompt_name if name is None else name
            if name is not None and name not in self.prompts:
                raise ConfigError(f"prompt_name must be one of {', '.join(self.prompts)}, got {name!r}")
            prompt = "" if name is None else self.prompts[name]
        elif name is not None:
            _log.warning("encode: prompt_name %r is ignored, for prompt is given", name)
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a text, got {type(prompt).__name__}")
        return [prompt + text for text in texts] if prompt else texts

    def _width(self, dim: int | None, truncate_dim: int | None) -> int:
        """The number of components to return."""
        self.check_dim(dim)
        if dim is not None and truncate_dim is not None:
            raise ConfigError("dim and truncate_dim exclude each other: dim normalizes the vectors again")
        truncate_dim = self.truncate_dim if truncate_dim is None else truncate_dim
        if truncate_dim is not None and (type(truncate_dim) is not int or truncate_dim < 1):
            raise ConfigError(f"truncate_dim must be a positive number, got {truncate_dim!r}")
        return dim or min(truncate_dim or self.config.hidden_size, self.config.hidden_size)

    def token_counts(self, texts: Sequence[str], side: str, instruction: str | None = None) -> list[int]:
        """The number of tokens of each text, after truncation, with the prompt of a side: query, document or raw."""
        name = side if side in ("query", "document") and instruction is None and side in self.prompts else None
        return [len(ids) for ids in self.tokenizer.encode_documents(self._prompted(texts, instruction, name, None))]

    def check_dim(self, dim: int | None) -> None:
        """ConfigError unless the model has vectors of this dimension."""
        if dim is not None and not (
            isinstance(dim, int) and not isinstance(dim, bool) and 1 <= dim <= self.config.hidden_size
        ):
            raise ConfigError(f"dim must lie in 1..{self.config.hidden_size}, got {dim!r}")


def _check_output(output_value: str | None, precision: str, texts: int) -> None:
    if output_value not in _OUTPUTS:
        raise ConfigError(f"output_value must be one of {', '.join(map(str, _OUTPUTS))}, got {output_value!r}")
    quantize(np.empty((0, 1), dtype=np.float32), precision)
    if precision != "float32" and output_value != "sentence_embedding":
        raise ConfigError(f"precision must be float32 for output_value {output_value!r}, got {precision!r}")
    if precision.endswith("int8") and texts == 1:
        raise ConfigError(f"precision {precision!r} needs the value ranges of several texts, got one text")


def _joined(parts: list[Any], width: int, output_value: str | None) -> np.ndarray | list[Any]:
    """Concatenate the results of several processes."""
    if output_value == "sentence_embedding":
        return np.concatenate(parts) if parts else np.empty((0, width), dtype=np.float32)
    return as_tensors([item for part in parts for item in part])


def _filled(
    windows: Iterator[tuple[slice, torch.Tensor]], shape: tuple[int, int], on_progress: Callable[[int], None] | None
) -> np.ndarray:
    """All vectors in one array."""
    vectors = np.zeros(shape, dtype=np.float32)
    for rows, window in windows:
        vectors[rows] = window.cpu().numpy()
        if on_progress is not None:
            on_progress(rows.stop)
    return vectors


def _text_list(texts: Any) -> list[str]:
    """A list of texts from a list, a tuple, a numpy array, a column of a table; TypeError: anything else."""
    if isinstance(texts, (Mapping, bytes)) or not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
        raise TypeError(f"expected a text or a list of texts, got {type(texts).__name__}")
    texts = texts.tolist() if isinstance(texts, np.ndarray) else list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"expected texts, got {type(text).__name__} at index {index}")
    return texts
