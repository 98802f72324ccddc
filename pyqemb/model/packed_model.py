"""The base class of Embedder and Reranker.

It holds a decoder and its tokenizer on one device, and reads and writes model folders.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from pyqemb.data.arguments import checked
from pyqemb.data.batch import PackedBatch
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.checkpoint import (
    LM_HEAD,
    WEIGHTS,
    Stored,
    Tensors,
    check_sizes,
    check_weights,
    file_order,
    load_rows,
    load_weights,
    stream_safetensors,
)
from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Decoder
from pyqemb.model.device import named_device, pick_device
from pyqemb.model.families import FAMILIES, build_decoder, read_config
from pyqemb.model.hub import check_push, push_folder
from pyqemb.model.lora import MergedParameters
from pyqemb.model.portable import WriteFiles, check_digests, model_folder
from pyqemb.model.protocols import Ranks
from pyqemb.model.residual_stream import Boundaries
from pyqemb.model.safety import check_safe
from pyqemb.model.sentence import Kind, check_kind
from pyqemb.model.shards import full_tensor, has_shards, is_writer
from pyqemb.model.source import Attention, local_folder, named_dtype, with_attention

_TOKENS_ON_CPU, _TOKENS_ON_DEVICE = 4096, 16384  # of one forward pass

Model = TypeVar("Model", bound="PackedModel")
Results = TypeVar("Results", torch.Tensor, list[Any])
Read = Callable[[str], torch.Tensor]


class Weight(NamedTuple):
    """A tensor to be written to a folder, computed when it is written."""

    shape: Sequence[int]
    compute: Callable[[], torch.Tensor]


@contextmanager
def errors_of(folder: Path) -> Iterator[None]:
    """Turn a ConfigError about a model that is made of the files of a folder into a CheckpointError that names it."""
    try:
        yield
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


class Opened(NamedTuple):
    """A model folder whose files have been checked, before its weights are read; `model` has none yet."""

    path: Path
    model: Decoder
    tensors: Tensors


def empty_decoder(folder: Path, kind: Kind, attention: Attention | None = None) -> Decoder:
    """The decoder of a folder, on the meta device; weights are not needed. CheckpointError as in `open_folder`."""
    config = _checked_config(folder, kind, attention)
    with torch.device("meta"):
        return build_decoder(config)


def open_folder(
    folder: str | Path, kind: Kind, attention: Attention | None, heads: Collection[str] = (LM_HEAD,)
) -> Opened:
    """Open a folder or a hub id and check that it holds a model of that kind.

    CheckpointError names the invalid file.
    """
    path = local_folder(folder)
    config = _checked_config(path, kind, attention)
    family = FAMILIES[config.model_type]
    tensors = Tensors(path, heads, family=family)
    check_sizes(config, family, tensors)
    with torch.device("meta"):
        return Opened(path, build_decoder(config), tensors)


def _checked_config(folder: Path, kind: Kind, attention: Attention | None) -> DecoderConfig:
    check_safe(folder)
    config = with_attention(read_config(folder), attention)
    check_kind(folder, kind)
    if kind == "reranker" and config.is_encoder:
        raise CheckpointError(
            f"{folder}: model_type {config.model_type!r} is an encoder; a Reranker needs a causal language model"
        )
    return config


def check_provenance(provenance: Mapping[str, Any] | None) -> None:
    """TypeError: it cannot be stored as JSON."""
    try:
        json.dumps(provenance)
    except (TypeError, ValueError) as error:
        raise TypeError(f"[save_pretrained] provenance must be values that JSON has: {error}") from error


def checked_target(dtype: torch.dtype | str | None, device: torch.device | str | None) -> torch.dtype | None:
    """The dtype of that name. ConfigError: `dtype` or `device` is unknown, before a file is opened."""
    if device is not None and device != "auto":
        named_device(device)
    return named_dtype(dtype)


class PackedModel(nn.Module):
    """A decoder with its tokenizer.

    Attributes:
        model: the Decoder; config: its configuration.
    """

    tokenizer: Tokenizer
    _ranks: Ranks | None = None
    heads: Collection[str] = (LM_HEAD,)  # tensors of a folder that are not weights of the decoder

    def __init__(self, model: Decoder, tokenizer: Tokenizer):
        super().__init__()
        vocab_size = model.config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}")
        self.model, self.config = model, model.config

    @property
    def attention(self) -> Attention:
        """The attention mask: causal or bidirectional."""
        return "causal" if self.config.is_causal else "bidirectional"

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.model.parameters()).dtype

    @contextmanager
    def encoding_on(self, ranks: Ranks) -> Iterator[None]:
        """Within this context each rank encodes a part of the texts, and every rank gets all results.

        Every rank has to call `encode`, or `score`, with the same texts. The results are those of one process.
        """
        self._ranks = ranks
        try:
            yield
        finally:
            self._ranks = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickled copies, as for worker processes, encode without other ranks."""
        return {**self.__dict__, "_ranks": None}

    def _load(
        self: Model, tensors: Tensors, dtype: torch.dtype | str | None, device: torch.device | str | None
    ) -> Model:
        """Read the weights and move the model to its device.

        On a GPU, float32 and float64 weights become bfloat16 unless `dtype` is given. On the meta device none are read.
        """
        if str(device) == "meta":
            check_weights(self.model, tensors)
            return self.to("meta", named_dtype(dtype))
        check_digests(tensors.folder)
        load_weights(self.model, tensors, named_dtype(dtype))
        place = pick_device(device, self.config)
        narrows = place.type == "cuda" and dtype is None and self.dtype.itemsize > 2
        return self.to(place, torch.bfloat16 if narrows else self.dtype)

    def load_rows(self, folder: str | Path) -> None:
        """Load the weights of a folder into the existing parameters; of sharded parameters only the rows of this rank.

        CheckpointError as in `from_pretrained`. Adapters do not change.
        """
        load_rows(self.model, Tensors(local_folder(folder), self.heads, family=self.model.family))

    @property
    def reads_embedding(self) -> bool:
        """Whether the weight of the token embedding is used outside of its forward pass."""
        return False

    def write_portable(self, folder: Path, dtype: torch.dtype, provenance: Mapping[str, Any]) -> None:
        """Write the files of `save_pretrained` except the weights, whose dtype is `dtype`, into an existing folder."""
        self._files(provenance)(folder, folder.name, dtype, {})

    @checked
    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the folder of `save_pretrained` to the Hugging Face Hub, in one commit.

        Args:
            repo_id: the repository, "ORG/NAME"; it is created if it does not exist.
            dtype: the dtype of the weights (default: the parameters' own).
            private: whether a new repository is private (default: the default of the account or organization).
            revision: the branch (default: main).
            commit_message: the message of the commit (default: "Upload model").
            token: a token with write access (default: that of `hf auth login` or HF_TOKEN).

        Returns:
            The URL of the commit.

        Raises:
            ConfigError: `repo_id` is not an id, there is no token, or the hub rejects the upload.
            CheckpointError: a weight is not finite.
            MachineError: the network or the disk fails.
        """
        dtype = named_dtype(dtype)
        check_push(repo_id, token)
        with TemporaryDirectory() as parent:
            folder = self.save_pretrained(Path(parent) / repo_id.partition("/")[2], dtype)
            return push_folder(
                folder, repo_id, private=private, revision=revision, commit_message=commit_message, token=token
            )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | str | None = None) -> Path:
        """Write the model folder."""
        raise NotImplementedError

    def _files(self, provenance: Mapping[str, Any] | None) -> WriteFiles:
        """A function that writes all files of a folder except the weights."""
        raise NotImplementedError

    def _reader(self, dtype: torch.dtype) -> Read:
        """A function that returns the parameter of a name; sharded parameters in their compute dtype."""
        parameters = dict(self.named_parameters())
        return lambda name: full_tensor(parameters[name], dtype)

    def _decoder_weights(self, read: Read) -> dict[str, Weight]:
        """The decoder's parameters by their names in a checkpoint, with adapters merged in."""
        merged = MergedParameters(self.model, lambda name: read(f"model.{name}"))
        return {
            self.model.family.stored_name(name): Weight(merged.shape(name), partial(merged.__getitem__, name))
            for name in merged
        }

    def _write(
        self, folder: str | Path, weights: Mapping[str, Weight], dtype: torch.dtype, write_files: WriteFiles
    ) -> Path:
        """Write a model folder, tensor by tensor. With sharded weights every rank gathers them, and rank 0 writes.

        Raises CheckpointError: NaN or infinity.
        """
        stored = {name: Stored(dtype, weight.shape) for name, weight in weights.items()}
        tensors = (_finite(weights[name].compute().to(dtype), name, folder) for name in file_order(stored))
        try:
            if is_writer(self):
                with model_folder(folder, write_files) as temporary:
                    stream_safetensors(temporary / WEIGHTS, stored, tensors)
        finally:
            if has_shards(self):  # the ranks gather every tensor, even if rank 0 could not write
                for _ in tensors:
                    pass
        return Path(folder)

    def _chunk_size(self, tokens_per_chunk: int | None) -> int:
        """The number of tokens in one forward pass; None: the default of the device."""
        if tokens_per_chunk is not None:
            return tokens_per_chunk
        return _TOKENS_ON_CPU if self.device.type == "cpu" else _TOKENS_ON_DEVICE

    def _checked(self, batch: PackedBatch, boundaries: Boundaries | None = None) -> PackedBatch:
        """The checked batch on the device of the model."""
        if boundaries is not None and not isinstance(boundaries, Boundaries):
            raise TypeError(f"boundaries must be a Boundaries, got {type(boundaries).__name__}")
        if not isinstance(batch, PackedBatch):
            raise TypeError(f"batch must be a PackedBatch, got {type(batch).__name__}")
        ids = batch.input_ids_T
        if ids.device.type == "cpu" and ids.numel():  # on a GPU the check would make the host wait
            low, high = (int(value) for value in torch.aminmax(ids))
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise IndexError(f"input_ids_T must lie in 0..{self.config.vocab_size - 1} (vocab_size), got {wrong}")
        return batch.to(self.device)


def _finite(tensor: torch.Tensor, name: str, folder: str | Path) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{folder}: not written: {name} holds NaN or infinity as {tensor.dtype}")
    return tensor


@torch.inference_mode()
def in_order(
    tokens: list[list[int]],
    forward: Callable[[PackedBatch], Results],
    tokens_per_chunk: int,
    advance: Callable[[int], None] = lambda done: None,
    ranks: Ranks | None = None,
) -> Results:
    """The results of the forward passes in the order of `tokens`: a tensor [B, E], or a list.

    The sequences are sorted by length, so that those of a chunk have similar lengths. With `ranks`, which requires
    tensors, each rank computes a part of the chunks and gets all results.
    """
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    batch = PackedBatch.pack([tokens[index] for index in order])
    chunks = batch.split(tokens_per_chunk)
    if ranks is not None:
        return _in_order_on(ranks, order, batch, chunks, forward, advance)
    results = []
    for chunk in chunks:
        results.append(forward(chunk))
        advance(chunk.num_sequences)
    if isinstance(results[0], torch.Tensor):
        sorted_BE = torch.cat([result.float() for result in results])
        vectors_BE = torch.empty_like(sorted_BE)
        vectors_BE[order] = sorted_BE
        return vectors_BE
    items: list[Any] = [None] * len(tokens)
    for index, item in zip(order, (item for result in results for item in result), strict=True):
        items[index] = item
    return items


def _in_order_on(
    ranks: Ranks,
    order: list[int],
    batch: PackedBatch,
    chunks: list[PackedBatch],
    forward: Callable[[PackedBatch], Any],
    advance: Callable[[int], None],
) -> Any:
    """`in_order` on several ranks: rank i % size computes chunk i. Ranks without a chunk join the collective."""
    places = np.split(np.array(order), np.cumsum([chunk.num_sequences for chunk in chunks])[:-1])
    none = np.empty(0, dtype=np.int64)
    partition = [np.concatenate([none, *places[rank :: ranks.size]]) for rank in range(ranks.size)]
    own = []
    for chunk in chunks[ranks.rank :: ranks.size] or [PackedBatch.pack([])]:
        own.append(forward(chunk).float())
        advance(chunk.num_sequences)
    rows_BE = ranks.gather_rows(torch.cat(own), partition, batch)
    advance(len(order) - len(partition[ranks.rank]))
    return rows_BE
