"""Embedder: a packed decoder with tokenizer and pooling, which encodes texts or packed tokens as unit vectors.

Legend: B sequences, T packed tokens, E hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from pyqemb import ops
from pyqemb.data.arguments import Count, NotNegative, checked
from pyqemb.data.batch import PackedBatch, to_device
from pyqemb.data.tokenizer import TEMPLATE, Tokenizer
from pyqemb.errors import ConfigError
from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Decoder, RMSNorm
from pyqemb.model.encoding import Encoding
from pyqemb.model.families import build_decoder
from pyqemb.model.neighbors import register_with_langchain
from pyqemb.model.packed_model import Read, check_provenance, checked_target, empty_decoder, errors_of, open_folder
from pyqemb.model.portable import WriteFiles, write_portable_files
from pyqemb.model.residual_stream import Boundaries
from pyqemb.model.sentence import DEFAULT_PROMPTS, POOLINGS, SentenceSettings, read_sentence_settings
from pyqemb.model.source import Attention, local_folder, named_dtype, with_attention
from pyqemb.ops.prefixes import unit_rows

_MEANS = "mean", "weighted_mean"  # the poolings that need every token


class Embedder(Encoding):
    """A text embedding model: encodes texts or packed tokens as vectors. Usually loaded with `from_pretrained`.

    Args:
        model: the decoder.
        tokenizer: its tokenizer.
        pooling: "last" (default): the last token. "mean": the mean of all tokens. "cls": the first token, with
            bidirectional attention. "weighted_mean": the mean with the weights 1, 2, 3, ... of the tokens of a text.
        prompts: the prefixes that encode_query ("query") and encode_document ("document") add to a text.
        matryoshka: the dimensions that the model was trained for, largest first (default: only the full one).

    Raises:
        ConfigError: the pooling is unknown, or is "cls" with causal attention.

    Example:
        >>> from pyqemb.testing.tiny import write_tiny_folder
        >>> model = pyqemb.Embedder.from_pretrained(write_tiny_folder("model"), device="cpu")
        >>> queries = model.encode_query(["What is the capital of China?"])
        >>> documents = model.encode_document(["Beijing is the capital of China.", "Gravity attracts bodies."])
        >>> queries.shape, documents.shape
        ((1, 32), (2, 32))
        >>> model.similarity(queries, documents).shape
        torch.Size([1, 2])

    `from_pretrained` sets these attributes from the folder's files, with the meaning of sentence-transformers:
    `normalize` (whether the folder has a Normalize module), `plain` (whether it is a base model, without modules.json),
    `truncate_dim`, `default_prompt_name` and `similarity_fn_name`.
    """

    @checked
    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        pooling: str = "last",
        prompts: Mapping[str, str] = DEFAULT_PROMPTS,
        matryoshka: Sequence[Count] | None = None,
    ):
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if pooling == "cls" and model.config.is_causal:
            raise ConfigError(
                "pooling 'cls' needs bidirectional attention: in causal attention the first token sees no other"
            )
        if matryoshka is not None and max(matryoshka, default=1) > model.config.hidden_size:
            raise ConfigError(f"matryoshka must be at most {model.config.hidden_size} dimensions, got {matryoshka}")
        super().__init__(model, tokenizer)
        self.pooling = pooling
        self.tokenizer = tokenizer.with_max_length(tokenizer.max_length or model.config.max_tokens)
        model.config.check_length(self.tokenizer.max_length)
        self.prompts = dict(prompts)
        self.matryoshka = tuple(matryoshka or ()) or None
        self.normalize, self.plain = True, False
        self.truncate_dim: int | None = None
        self.default_prompt_name: str | None = None
        self.similarity_fn_name = "cosine"
        register_with_langchain(type(self))

    @classmethod
    @checked
    def from_pretrained(
        cls,
        folder: str | Path,
        attention: Attention | None = None,
        pooling: str | None = None,
        dtype: torch.dtype | str | None = None,
        max_length: Count | None = None,
        device: torch.device | str | None = None,
    ) -> "Embedder":
        """Load a Hugging Face folder of a model family, or download one by its hub id (`org/name`).

        The families are Qwen3, Qwen2, Llama, Mistral, BERT, RoBERTa, XLM-RoBERTa and DistilBERT.

        Args:
            folder: a model folder or hub id.
            attention: "causal" or "bidirectional" (default: `is_causal` of config.json; absent: causal).
            pooling: "last", "mean", "cls" or "weighted_mean" (default: the Pooling module of modules.json; absent:
                last, or mean for BERT and its relatives).
            dtype: the dtype of the weights (default: that of the stored weights; on a GPU, float32 becomes bfloat16).
            max_length: texts are truncated to this many tokens (default: sentence_bert_config.json or
                tokenizer_config.json).
            device: the device of the model (default: a GPU that can run the model, else the CPU); "meta": shapes
                without weights, see `load_rows`.

        Returns:
            The model.

        Raises:
            CheckpointError: a file is missing, damaged or unsafe, or a setting is not supported; the error names the
                file.
        """
        dtype = checked_target(dtype, device)
        path, model, tensors = open_folder(folder, "embedder", attention)
        return cls._from_files(path, model, pooling, max_length)._load(tensors, dtype, device)

    @classmethod
    def without_weights(
        cls,
        folder: str | Path,
        attention: Attention | None = None,
        pooling: str | None = None,
        max_length: Count | None = None,
    ) -> "Embedder":
        """The model of a folder or hub id on the meta device; its weights are not needed and not downloaded.

        Arguments and errors are those of `from_pretrained`.
        """
        path = local_folder(folder, weights=False)
        return cls._from_files(path, empty_decoder(path, "embedder", attention), pooling, max_length)

    @classmethod
    def _from_files(
        cls, path: Path, model: Decoder, pooling: str | None = None, max_length: Count | None = None
    ) -> "Embedder":
        """A decoder with the settings of its folder."""
        tokenizer = Tokenizer.from_folder(path, max_length)
        if max_length is None and model.config.is_encoder:  # some folders give a larger length than there are positions
            limit = model.config.max_tokens
            tokenizer = tokenizer.with_max_length(min(tokenizer.max_length or limit, limit))
        settings = read_sentence_settings(path, model.config.hidden_size, model.config.default_pooling)
        if pooling is not None:
            settings = replace(settings, pooling=pooling)
        matryoshka = model.config.extra.get("matryoshka_dimensions")
        with errors_of(path):
            embedder = cls(model, tokenizer, settings.pooling, settings.prompts, matryoshka)
        embedder.normalize, embedder.truncate_dim = settings.normalize, settings.truncate_dim
        embedder.default_prompt_name = settings.default_prompt_name
        embedder.similarity_fn_name = settings.similarity_fn_name
        embedder.plain = not (path / "modules.json").is_file()
        return embedder

    @classmethod
    @checked
    def from_config(
        cls,
        config: DecoderConfig,
        tokenizer: Tokenizer,
        seed: NotNegative = 0,
        attention: Attention | None = None,
        pooling: str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> "Embedder":
        """An untrained model: normal weights of deviation `initializer_range`, norm weights of one.

        The weights depend only on the seed. torch's global random state is neither used nor changed.

        Args:
            config: sizes and constants of the decoder.
            tokenizer: its tokenizer.
            seed: seed of the weights.
            attention: "causal" or "bidirectional" (default: as in `config`).
            pooling: "last", "mean", "cls" or "weighted_mean" (default: last, or mean for BERT and its relatives).
            dtype: the dtype of the weights (default: float32).

        Returns:
            The model, on the CPU.
        """
        config = with_attention(config, attention)
        with torch.device("meta"):
            model = build_decoder(config)
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                else:
                    parameter.normal_(0.0, config.initializer_range, generator=generator)
        return cls(model.to(named_dtype(dtype) or torch.float32), tokenizer, pooling or config.default_pooling)

    @property
    def settings(self) -> SentenceSettings:
        """The settings that are saved with the decoder. ConfigError: incompatible values."""
        return SentenceSettings(
            self.pooling, self.prompts, self.default_prompt_name, self.similarity_fn_name, self.truncate_dim,
            self.normalize
        )  # fmt: skip

    @property
    def default_instruction(self) -> str | None:
        """The task sentence in the query prompt; None if the prompt is empty or has another form."""
        before, after = TEMPLATE.format(task="\0", query="").split("\0")
        prompt = self.prompts.get("query", "")
        fits = prompt.startswith(before) and prompt.endswith(after)
        return prompt[len(before) : len(prompt) - len(after)] if fits else None

    @default_instruction.setter
    def default_instruction(self, task: str | None) -> None:
        self.prompts["query"] = "" if task is None else TEMPLATE.format(task=task, query="")

    def forward(self, batch: PackedBatch, dim: int | None = None, boundaries: Boundaries | None = None) -> torch.Tensor:
        """Encode packed token ids; differentiable.

        Args:
            batch: B sequences, on any device; the vectors are on the device of the model.
            dim: the Matryoshka dimension: vectors are truncated to it and normalized again (default: E).
            boundaries: an empty object is filled, so that a second pass over this batch saves a third of its products;
                a filled object is used (default: none).

        Returns:
            Unit vectors [B, dim or E], float32, or float64 for a float64 model. An empty sequence gives a zero row.
        """
        self.check_dim(dim)
        batch = self._checked(batch, boundaries)
        if self.pooling in _MEANS:
            # The direction of the sum is that of the mean.
            return unit_rows(self._sums(self.model(batch, boundaries=boundaries), batch)[:, :dim])
        hidden_BE = self._one_token(batch, boundaries)
        _, cu_pooled = batch.last_tokens()
        norm = self.model.norm
        if not isinstance(norm, RMSNorm) or type(norm).forward is not RMSNorm.forward:
            return ops.last_token_pool(norm(hidden_BE), cu_pooled, dim=dim)
        return ops.last_token_pool(hidden_BE, cu_pooled, norm_weight=_wide(norm.scale), eps=norm.eps, dim=dim)

    def pooled(self, batch: PackedBatch) -> torch.Tensor:
        """Encode packed token ids without the final normalization.

        Args:
            batch: B sequences, on any device.

        Returns:
            Vectors [B, E], with the dtype of `forward`.
        """
        batch = self._checked(batch)
        if self.pooling in _MEANS:
            lengths_B = to_device(torch.from_numpy(batch.lengths), self.device)
            totals_B = lengths_B if self.pooling == "mean" else lengths_B * (lengths_B + 1) // 2
            return self._sums(self.model(batch), batch) / totals_B.clamp(min=1)[:, None]
        hidden_BE = self.model.norm(self._one_token(batch, None))
        _, cu_pooled = batch.last_tokens()
        vectors_BE = hidden_BE.new_zeros(batch.num_sequences, hidden_BE.shape[1])
        vectors_BE[cu_pooled.diff() > 0] = hidden_BE
        return vectors_BE

    def _one_token(self, batch: PackedBatch, boundaries: Boundaries | None) -> torch.Tensor:
        """The pooled token of each non-empty sequence before the final norm, [B', E].

        The last layer computes only these tokens, because the others are not used.
        """
        only: Literal["first", "last"] = "first" if self.pooling == "cls" else "last"
        return _wide(self.model(batch, only=only, boundaries=boundaries))

    def _sums(self, hidden_TE: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The sum of the tokens of each sequence, with the weights of the mean, [B, E]."""
        hidden_TE = _wide(hidden_TE)
        if self.pooling == "weighted_mean":
            hidden_TE = hidden_TE * (batch.positions_T + 1)[:, None]
        lengths = to_device(torch.from_numpy(batch.lengths), hidden_TE.device)
        # Sums in the order of the tokens on a GPU too, unlike index_add.
        return torch.segment_reduce(hidden_TE, "sum", lengths=lengths, axis=0, unsafe=True)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Compute the hidden states of packed token ids after the final norm.

        Args:
            batch: B sequences of T tokens in total, on any device.

        Returns:
            Hidden states [T, E] in the dtype of the model.
        """
        return self.model(self._checked(batch))

    @checked
    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a model folder for sentence-transformers, transformers, vLLM and TEI, completely or not at all.

        Adapters are merged into the weights. If the weights are sharded, every rank calls this, and rank 0 writes.

        Args:
            folder: the folder to write. An existing model folder is replaced once the new one is complete; any other
                non-empty folder is an error.
            dtype: the dtype of the weights (default: the parameters' own).
            provenance: the origin of the model, stored in pyqemb.json.

        Returns:
            The folder.

        Raises:
            TypeError: the provenance cannot be stored as JSON.
            ConfigError: the folder is neither empty nor a model folder.
            CheckpointError: a weight is not finite.
        """
        stored = named_dtype(dtype) or self.dtype
        check_provenance(provenance)
        return self.save_parameters(self._reader(stored), folder, stored, provenance)

    def save_parameters(
        self, read: Read, folder: str | Path, dtype: torch.dtype, provenance: Mapping[str, Any] | None = None
    ) -> Path:
        """`save_pretrained` with the parameters that `read` returns by name, instead of the model's."""
        return self._write(folder, self._decoder_weights(read), dtype, self._files(provenance))

    def _files(self, provenance: Mapping[str, Any] | None) -> WriteFiles:
        return partial(
            write_portable_files, config=self.config, tokenizer=self.tokenizer, settings=self.settings,
            matryoshka=self.matryoshka, provenance=provenance,
        )  # fmt: skip


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Convert to float32 or wider, because rounding unit vectors to bfloat16 costs the loss two digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
