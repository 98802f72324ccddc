"""Reranker: scores whether a document answers a query, by the decoder's logits of yes and no.

Legend: B pairs, E hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyqemb.data.arguments import Count, checked
from pyqemb.data.batch import PackedBatch
from pyqemb.data.pairs import INSTRUCTION, PairTokenizer, format_pair
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.checkpoint import LM_HEAD, Tensors
from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Decoder
from pyqemb.model.packed_model import (
    Read,
    Weight,
    check_provenance,
    checked_target,
    empty_decoder,
    errors_of,
    in_order,
    open_folder,
)
from pyqemb.model.portable import WriteFiles
from pyqemb.model.portable_reranker import FORMATS, SCORE, reranker_name, write_reranker_files
from pyqemb.model.progress import progress_bar
from pyqemb.model.residual_stream import Boundaries
from pyqemb.model.scoring import Scoring
from pyqemb.model.sentence import check_reranker_modules, read_instruction
from pyqemb.model.shards import is_writer, local, own_rows
from pyqemb.model.source import Attention, local_folder, named_dtype

_PAIRS_AT_ONCE = 4096  # tokenized together


class Reranker(Scoring):
    """A reranker: scores pairs of query and document by the logits of "yes" and "no" after Qwen3-Reranker's template.

    Usually loaded with `from_pretrained`.

    Args:
        model: the decoder.
        tokenizer: its tokenizer for pairs.
        head: [2, E], the rows of the language-model head for yes and no (default: those of the token embeddings).
        lm_head: [V, E], the whole language-model head, which is saved with the model (default: tied embeddings).
        default_instruction: instruction for pairs without their own (default: that of Qwen3-Reranker's model card).

    Example:
        >>> from pyqemb.testing.tiny import write_tiny_folder
        >>> folder = write_tiny_folder("model", prefix=True)
        >>> model = pyqemb.Reranker.from_pretrained(folder, device="cpu")
        >>> model.score([("What is the capital of China?", "Beijing."), ("What is gravity?", "Beijing.")]).shape
        (2,)
    """

    heads = (LM_HEAD, SCORE)

    @checked
    def __init__(
        self,
        model: Decoder,
        tokenizer: PairTokenizer,
        head: torch.Tensor | None = None,
        lm_head: torch.Tensor | None = None,
        default_instruction: str | None = None,
    ):
        super().__init__(model, tokenizer)
        size = model.config.hidden_size
        for name, rows, count in (("head", head, 2), ("lm_head", lm_head, model.config.vocab_size)):
            if rows is not None and (tuple(rows.shape) != (count, size) or not rows.is_floating_point()):
                raise ConfigError(f"{name} must be floats [{count}, {size}], got {rows.dtype} {list(rows.shape)}")
        self.default_instruction = default_instruction
        longest = model.config.max_position_embeddings
        self.tokenizer: PairTokenizer = tokenizer.with_max_length(min(tokenizer.max_length or longest, longest))
        self.head = None if head is None else nn.Parameter(head)
        self._lm_head = lm_head  # the other rows of an untied head, for saving

    @classmethod
    @checked
    def from_pretrained(
        cls,
        folder: str | Path,
        attention: Attention | None = None,
        dtype: torch.dtype | str | None = None,
        max_length: Count | None = None,
        device: torch.device | str | None = None,
    ) -> "Reranker":
        """Load a folder of a causal language model or of a classifier with one label, or download one by its hub id.

        A causal language model may be a base model; it is then untrained as a reranker.

        Args:
            folder: a model folder or hub id.
            attention: "causal" or "bidirectional" (default: `is_causal` of config.json; absent: causal).
            dtype: the dtype of the weights (default: that of the stored weights; on a GPU, float32 becomes bfloat16).
            max_length: pairs are truncated to this many tokens (default: 8192).
            device: the device of the model (default: a GPU that can run the model, else the CPU).

        Returns:
            The model.

        Raises:
            CheckpointError: a file is missing, damaged or unsafe, or a setting is not supported; the error names the
                file.
        """
        dtype = checked_target(dtype, device)
        path, model, tensors = open_folder(folder, "reranker", attention, cls.heads)
        tokenizer = PairTokenizer.from_folder(path, max_length)
        check_reranker_modules(path, tokenizer.yes_id, tokenizer.no_id)
        head, lm_head = _read_head(tensors, model.config, tokenizer)
        if lm_head is not None and str(device) != "meta":  # there, `load_rows` decides
            lm_head = lm_head.clone()
        with errors_of(path):
            reranker = cls(model, tokenizer, head, lm_head, read_instruction(path, INSTRUCTION))
        return reranker._load(tensors, dtype, device)

    @classmethod
    def without_weights(
        cls,
        folder: str | Path,
        attention: Attention | None = None,
        max_length: Count | None = None,
        lm_head: torch.Tensor | None = None,
    ) -> "Reranker":
        """The model of a folder or hub id on the meta device; its weights are not needed and not downloaded.

        Arguments and errors are those of `from_pretrained`. `lm_head` [V, E]: the language-model head to save with the
        model if it is not tied.
        """
        path = local_folder(folder, weights=False)
        model = empty_decoder(path, "reranker", attention)
        tied = model.config.tie_word_embeddings
        head = None if tied else torch.empty(2, model.config.hidden_size, device="meta")
        tokenizer = PairTokenizer.from_folder(path, max_length)
        with errors_of(path):
            return cls(model, tokenizer, head, lm_head, read_instruction(path, INSTRUCTION))

    @torch.no_grad()
    def load_rows(self, folder: str | Path) -> None:
        """Load the weights of a folder, including the head, into the parameters."""
        super().load_rows(folder)
        if self.head is not None:
            head, lm_head = _read_head(Tensors(local_folder(folder), self.heads), self.config, self.tokenizer)
            assert head is not None
            local(self.head).copy_(head[own_rows(self.head)])
            # Only the rank that saves the model needs a copy of the other rows in its memory.
            self._lm_head = lm_head.clone() if lm_head is not None and is_writer(self) else lm_head

    @property
    def reads_embedding(self) -> bool:
        """Whether the rows of yes and no are rows of the token embedding."""
        return self.head is None

    @property
    def default_instruction(self) -> str:
        """The instruction of pairs without their own."""
        return self._instruction

    @default_instruction.setter
    def default_instruction(self, task: str | None) -> None:
        self._instruction = INSTRUCTION if task is None else task

    def forward(self, batch: PackedBatch, boundaries: Boundaries | None = None) -> torch.Tensor:
        """Compute the logits of packed pairs; differentiable.

        The last layer computes only the last token of each pair, and the head only two rows of the vocabulary.

        Args:
            batch: B pairs, as `tokenizer.encode_documents` makes them.
            boundaries: as in `Embedder.forward`.

        Returns:
            The logits [B, 2] of yes and no, float32, or float64 for a float64 model.

        Raises:
            ValueError: a sequence is empty.
        """
        batch = self._checked(batch, boundaries)
        if batch.num_sequences and not bool((batch.cu_seqlens_cpu.diff() > 0).all()):
            raise ValueError("batch must be pairs of at least one token, got an empty sequence")
        hidden_BE = self.model.norm(self.model(batch, only="last", boundaries=boundaries))
        wide = torch.promote_types(hidden_BE.dtype, torch.float32)
        return hidden_BE.to(wide) @ self._rows().to(wide).T

    @checked
    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        instruction: str | Sequence[str | None] | None = None,
        tokens_per_chunk: Count | None = None,
    ) -> np.ndarray:
        """Score pairs of query and document.

        Args:
            pairs: (query, document) texts.
            instruction: the task sentence of all pairs, or one for each pair (default: `default_instruction`).
            tokens_per_chunk: tokens in one forward pass (default: by the device).

        Returns:
            The probability of yes versus no for each pair: float32 [len(pairs)].

        Raises:
            TypeError: not pairs of two texts.
            ValueError: another number of instructions than pairs.

        Source: the Qwen3 Embedding report (arXiv 2506.05176), section 2.
        """
        with progress_bar("Pairs", len(pairs)) as advance:
            margins = self.margins(pairs, instruction, tokens_per_chunk, advance)
        return (1 / (1 + np.exp(-margins.astype(np.float64)))).astype(np.float32)

    @checked
    def margins(
        self,
        pairs: Sequence[tuple[str, str]],
        instruction: str | Sequence[str | None] | None = None,
        tokens_per_chunk: Count | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Compute `score` before the sigmoid: the logit of yes minus that of no.

        Args:
            pairs: (query, document) texts.
            instruction: the task sentence of all pairs, or one for each pair (default: `default_instruction`).
            tokens_per_chunk: tokens in one forward pass (default: by the device).
            on_progress: called with the number of new margins (default: not called).

        Returns:
            float32 [len(pairs)].
        """
        bodies = self.format(pairs, instruction)
        margins = np.empty(len(bodies), dtype=np.float32)
        for first in range(0, len(bodies), _PAIRS_AT_ONCE):
            window = bodies[first : first + _PAIRS_AT_ONCE]
            margins[first : first + len(window)] = self._margins(window, tokens_per_chunk)
            if on_progress is not None:
                on_progress(len(window))
        return margins

    @checked
    def rerank(
        self, query: str, documents: Sequence[str], top_k: Count | None = None, instruction: str | None = None
    ) -> list[tuple[int, float]]:
        """Sort documents by their score for a query.

        Args:
            query: the query.
            documents: the documents.
            top_k: how many are returned (default: all).
            instruction: the task sentence (default: `default_instruction`).

        Returns:
            (index, score) of the documents, best first; equal scores keep their order.
        """
        scores = self.score([(query, document) for document in documents], instruction)
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [(int(i), float(scores[i])) for i in order]

    @checked
    def format(
        self, pairs: Sequence[tuple[str, str]], instruction: str | Sequence[str | None] | None = None
    ) -> list[str]:
        """Format pairs for `tokenizer.encode_documents`.

        Args:
            pairs: (query, document) texts.
            instruction: the task sentence of all pairs, or one for each pair (default: `default_instruction`).

        Returns:
            A text for each pair.

        Raises:
            TypeError: not pairs of two texts.
            ValueError: another number of instructions than pairs.
        """
        if instruction is None or isinstance(instruction, str):
            instructions: Sequence[str | None] = [instruction] * len(pairs)
        else:
            instructions = list(instruction)
        if len(instructions) != len(pairs):
            raise ValueError(f"expected one instruction for each of {len(pairs)} pairs, got {len(instructions)}")
        for number, pair in enumerate(pairs):
            if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise TypeError(f"expected pairs of two texts, got {pair!r} at index {number}")
        return [
            format_pair(query, document, self.default_instruction if own is None else own)
            for (query, document), own in zip(pairs, instructions, strict=True)
        ]

    @checked
    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | str | None = None,
        provenance: Mapping[str, Any] | None = None,
        format: str = "causal-lm",
    ) -> Path:
        """Write a model folder for transformers, sentence-transformers and vLLM, completely or not at all.

        If the weights are sharded, every rank calls this, and rank 0 writes.

        Args:
            folder: the folder to write; an existing model folder is replaced once the new one is complete.
            dtype: the dtype of the weights (default: the parameters' own).
            provenance: the origin of the model, stored in pyqemb.json.
            format: "causal-lm" (default), a causal language model like Qwen3-Reranker, or "seq-cls", a classifier with
                one label, whose row is the difference of the head's two rows.

        Returns:
            The folder.

        Raises:
            ConfigError: the format is unknown, or "causal-lm" for a model that was loaded as a classifier.
            CheckpointError: a weight is not finite.
        """
        stored = named_dtype(dtype) or self.dtype
        check_provenance(provenance)
        return self.save_parameters(self._reader(stored), folder, stored, provenance, format)

    def save_parameters(
        self,
        read: Read,
        folder: str | Path,
        dtype: torch.dtype,
        provenance: Mapping[str, Any] | None = None,
        format: str = "causal-lm",
    ) -> Path:
        """`save_pretrained` with the parameters that `read` returns by name, instead of the model's."""
        if format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        if format == "causal-lm" and self.head is not None and self._lm_head is None:
            raise ConfigError(
                "format: a reranker that was loaded as a classifier has no language-model head to write; use 'seq-cls'"
            )
        weights = {reranker_name(name): weight for name, weight in self._decoder_weights(read).items()}
        if format == "seq-cls":
            weights[SCORE] = Weight((1, self.config.hidden_size), partial(self._classifier, read))
        elif self._lm_head is not None:
            weights[LM_HEAD] = Weight(self._lm_head.shape, partial(self._full_head, self._lm_head, read, dtype))
        return self._write(folder, weights, dtype, self._files(provenance, format))

    def _files(self, provenance: Mapping[str, Any] | None, format: str = "causal-lm") -> WriteFiles:
        return partial(
            write_reranker_files, format=format, config=self.config, tokenizer=self.tokenizer, tied=self.head is None,
            instruction=self.default_instruction, provenance=provenance,
        )  # fmt: skip

    def _classifier(self, read: Read) -> torch.Tensor:
        """The row [1, E] of a classifier: the row of yes minus that of no."""
        ids = [self.tokenizer.yes_id, self.tokenizer.no_id]
        rows = read("head") if self.head is not None else read("model.embed_tokens.weight")[ids]
        return (rows[:1].double() - rows[1:].double()).float()

    def _full_head(self, lm_head: torch.Tensor, read: Read, dtype: torch.dtype) -> torch.Tensor:
        """The language-model head [V, E] with the trained rows of yes and no."""
        full = lm_head.to(dtype, copy=True)
        full[[self.tokenizer.yes_id, self.tokenizer.no_id]] = read("head").to(full)
        return full

    def _rows(self) -> torch.Tensor:
        """The rows of the head for yes and no, [2, E]."""
        if self.head is not None:
            return self.head
        ids = torch.tensor([self.tokenizer.yes_id, self.tokenizer.no_id], device=self.device)
        return self.model.embed_tokens.weight.index_select(0, ids)

    def _margins(self, bodies: Sequence[str], tokens_per_chunk: Count | None) -> np.ndarray:
        tokens = self.tokenizer.encode_documents(bodies)
        forward: Callable[[PackedBatch], torch.Tensor] = self
        logits_B2 = in_order(tokens, forward, self._chunk_size(tokens_per_chunk), ranks=self._ranks).cpu().numpy()
        return logits_B2[:, 0] - logits_B2[:, 1]


def _read_head(
    tensors: Tensors, config: DecoderConfig, tokenizer: PairTokenizer
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(rows of yes and no, the whole head, a view of its file); both None if the head is tied to the embeddings."""
    score = tensors.head(SCORE)
    if score is not None:
        if score.shape != (1, config.hidden_size):
            raise CheckpointError(
                f"{tensors.folder}: {SCORE} has shape {list(score.shape)}, expected [1, {config.hidden_size}]"
            )
        return torch.cat([score, torch.zeros_like(score)]), None
    lm_head = tensors.head(LM_HEAD)
    if config.tie_word_embeddings:
        return None, None
    if lm_head is None:
        raise CheckpointError(f"{tensors.folder}: {LM_HEAD} is missing, and config.json says that it is not tied")
    if lm_head.shape != (config.vocab_size, config.hidden_size):
        raise CheckpointError(
            f"{tensors.folder}: {LM_HEAD} has shape {list(lm_head.shape)}, expected [{config.vocab_size}, "
            f"{config.hidden_size}]"
        )
    return lm_head[[tokenizer.yes_id, tokenizer.no_id]], lm_head
