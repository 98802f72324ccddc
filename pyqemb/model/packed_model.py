"""What an Embedder and a Reranker share.

It is a decoder and its tokenizer, read from and written to a folder, on one device.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from pyqemb.data.batch import PackedBatch
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.checkpoint import LM_HEAD, Tensors, check_sizes, check_weights, load_rows, load_weights
from pyqemb.model.decoder import Decoder
from pyqemb.model.device import pick_device
from pyqemb.model.families import FAMILIES, build_decoder, read_config
from pyqemb.model.lora import merged_parameters
from pyqemb.model.portable import check_digests
from pyqemb.model.protocols import Ranks
from pyqemb.model.safety import check_safe
from pyqemb.model.sentence import Kind, check_kind
from pyqemb.model.source import Attention, local_folder, named_dtype, with_attention

_TOKENS_ON_CPU, _TOKENS_ON_DEVICE = 4096, 16384  # of one forward pass

Model = TypeVar("Model", bound="PackedModel")
Results = TypeVar("Results", torch.Tensor, list[Any])


class Opened(NamedTuple):
    """A model folder whose files have been checked, before its weights are read; `model` has none yet."""

    path: Path
    model: Decoder
    tensors: Tensors


def open_folder(
    folder: str | Path, kind: Kind, attention: Attention | None, heads: Collection[str] = (LM_HEAD,)
) -> Opened:
    """Open a folder, or a hub id, that is to hold a model of that kind.

    CheckpointError names the file that is wrong.
    """
    path = local_folder(folder)
    check_safe(path)
    config = with_attention(read_config(path), attention)
    check_kind(path, kind)
    tensors = Tensors(path, heads)
    check_sizes(config, FAMILIES[config.model_type], tensors)
    with torch.device("meta"):
        return Opened(path, build_decoder(config), tensors)


class PackedModel(nn.Module):
    """A decoder with its tokenizer.

    Attributes:
        model: the Decoder; config: its configuration.
    """

    tokenizer: Tokenizer
    _ranks: Ranks | None = None
    heads: Collection[str] = (LM_HEAD,)  # tensors of a folder that are no weights of the decoder

    def __init__(self, model: Decoder, tokenizer: Tokenizer):
        super().__init__()
        vocab_size = model.config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}")
        self.model, self.config = model, model.config

    @property
    def attention(self) -> Attention:
        """The mask: causal, or every token sees its whole sequence."""
        return "causal" if self.config.is_causal else "bidirectional"

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
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
        """A copy, such as that of a worker process, encodes alone."""
        return {**self.__dict__, "_ranks": None}

    def _load(
        self: Model, tensors: Tensors, dtype: torch.dtype | str | None, device: torch.device | str | None
    ) -> Model:
        """Read the weights and move the model to its device.

        On a GPU, wide weights become bfloat16 unless `dtype` says otherwise. On the meta device there are none.
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
        """Read the weights of a folder into parameters that are there already; of sharded ones this rank's rows alone.

        CheckpointError as of `from_pretrained`. Adapters stay as they are.
        """
        load_rows(self.model, Tensors(local_folder(folder), self.heads))

    @property
    def reads_embedding(self) -> bool:
        """Whether the weight of the token embedding is used beside its forward pass."""
        return False

    def _decoder_weights(self) -> dict[str, torch.Tensor]:
        """The decoder's parameters as a checkpoint names them, adapters folded in."""
        return {self.model.family.stored_name(name): x for name, x in merged_parameters(self.model).items()}

    def _chunk_size(self, tokens_per_chunk: int | None) -> int:
        """The number of tokens in one forward pass; None: what suits the device."""
        if tokens_per_chunk is not None:
            return tokens_per_chunk
        return _TOKENS_ON_CPU if self.device.type == "cpu" else _TOKENS_ON_DEVICE

    def _checked(self, batch: PackedBatch) -> PackedBatch:
        """The batch where the model is."""
        if not isinstance(batch, PackedBatch):
            raise TypeError(f"expected a PackedBatch, got {type(batch).__name__}")
        ids = batch.input_ids_T
        if ids.device.type == "cpu" and ids.numel():  # elsewhere it would wait for the device
            low, high = (int(value) for value in torch.aminmax(ids))
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise IndexError(f"input_ids_T must lie in 0..{self.config.vocab_size - 1} (vocab_size), got {wrong}")
        return batch.to(self.device)


def stored_as(weights: Mapping[str, torch.Tensor], dtype: torch.dtype, folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights in the dtype of a folder to be written; CheckpointError: NaN or infinity."""
    stored = {name: tensor.detach().to(dtype) for name, tensor in weights.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: not written: {name} holds NaN or infinity as {dtype}")
    return stored


@torch.inference_mode()
def in_order(
    tokens: list[list[int]],
    forward: Callable[[PackedBatch], Results],
    tokens_per_chunk: int,
    advance: Callable[[int], None] = lambda done: None,
    ranks: Ranks | None = None,
) -> Results:
    """The results of the forward passes in the order of `tokens`: a tensor [B, E], or a list.

    The sequences are sorted by length, so that those of a chunk are alike. With `ranks`, which is for tensors, each
    rank computes a part of the chunks and gets the results of all.
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
    """`in_order` by several ranks: chunk i is computed by rank i % size. A rank without a chunk takes part."""
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
