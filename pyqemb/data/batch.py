"""PackedBatch: concatenated sequences without padding. Legend: B sequences, T tokens in total."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

_MAX_TOKENS = 2**31 - 1  # cu_seqlens is int32


def to_device(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`x` on `device`; a copy to a GPU goes through pinned memory, so that the host does not wait for it."""
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type != "cpu")  # a copy to the CPU must be complete before it is read


def _check(name: str, value: Any, dtype: torch.dtype) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"[PackedBatch] {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"[PackedBatch] {name} must be {dtype}, got {value.dtype}")
    if value.dim() != 1 or value.layout is not torch.strided:
        raise ValueError(f"[PackedBatch] {name} must be dense with one dimension, got shape {list(value.shape)}")


def _check_total(lengths: np.ndarray) -> None:
    """Refuse more tokens than cu_seqlens can count, before memory is allocated for them."""
    if (total := int(lengths.sum(dtype=np.int64))) > _MAX_TOKENS:
        raise ValueError(f"[PackedBatch] a batch holds at most {_MAX_TOKENS} tokens, got {total}")


@dataclass(frozen=True, eq=False, repr=False)
class PackedBatch:
    """Sequences of tokens, concatenated without padding.

    Sequence b has the tokens `cu_seqlens[b]` to `cu_seqlens[b + 1]`; it may be empty. Batches are usually made with
    `PackedBatch.pack`.

    Args:
        input_ids_T: token ids, int64 [T].
        positions_T: position of each token in its sequence, int64 [T].
        cu_seqlens: cumulative sequence lengths, int32 [B + 1], from 0 to T.
        max_seqlen: length of the longest sequence.
        cu_seqlens_cpu: `cu_seqlens` on the CPU, so that lengths are known without waiting for the GPU (default: copied
            once).

    Raises:
        TypeError: a value is not a tensor of its dtype.
        ValueError: incompatible shapes, devices or lengths.

    Example:
        >>> batch = pyqemb.PackedBatch.pack([[5, 6, 7], [8]])
        >>> batch
        PackedBatch(2 sequences, 4 tokens, longest 3, cpu)
        >>> batch.cu_seqlens.tolist()
        [0, 3, 4]
    """

    input_ids_T: torch.Tensor  # int64 [T]
    positions_T: torch.Tensor  # int64 [T], 0, 1, ... in each sequence
    cu_seqlens: torch.Tensor  # int32 [B + 1]: 0, ..., T
    max_seqlen: int
    cu_seqlens_cpu: torch.Tensor = None  # type: ignore[assignment]  # copied once when not given

    def __post_init__(self) -> None:
        names = ("input_ids_T", "positions_T", "cu_seqlens")
        for name in names:
            _check(name, getattr(self, name), torch.int32 if name == "cu_seqlens" else torch.int64)
        if self.cu_seqlens_cpu is None:
            object.__setattr__(self, "cu_seqlens_cpu", self.cu_seqlens.cpu())
        _check("cu_seqlens_cpu", self.cu_seqlens_cpu, torch.int32)
        for name in names[1:]:
            if (value := getattr(self, name)).device != self.device:
                raise ValueError(
                    f"[PackedBatch] {name} must be on the device of input_ids_T, {self.device}, got {value.device}"
                )
        if self.cu_seqlens_cpu.device.type != "cpu":
            raise ValueError(f"[PackedBatch] cu_seqlens_cpu must be on the CPU, got {self.cu_seqlens_cpu.device}")
        if self.positions_T.shape != self.input_ids_T.shape:
            raise ValueError(
                f"[PackedBatch] input_ids_T and positions_T must have one shape, got {list(self.input_ids_T.shape)} "
                "and "
                f"{list(self.positions_T.shape)}"
            )
        if self.cu_seqlens_cpu.shape != self.cu_seqlens.shape:
            raise ValueError(
                f"[PackedBatch] cu_seqlens_cpu must have shape {list(self.cu_seqlens.shape)}, "
                f"got {list(self.cu_seqlens_cpu.shape)}"
            )
        cu = self._cu()
        if not len(cu) or cu[0] != 0 or cu[-1] != self.num_tokens or (np.diff(cu) < 0).any():
            raise ValueError(
                f"[PackedBatch] cu_seqlens (cu_seqlens_cpu) must rise from 0 to the number of tokens of input_ids_T, "
                f"{self.num_tokens}, got {cu.tolist()!s:.100}"
            )
        longest = int(np.diff(cu).max(initial=0))
        if isinstance(self.max_seqlen, bool) or not isinstance(self.max_seqlen, int):
            raise TypeError(f"[PackedBatch] max_seqlen must be an integer, got {type(self.max_seqlen).__name__}")
        if not longest <= self.max_seqlen <= self.num_tokens:
            raise ValueError(
                f"[PackedBatch] max_seqlen must be from {longest} to {self.num_tokens}, got {self.max_seqlen!s:.100}"
            )

    def __repr__(self) -> str:
        longest = int(self.lengths.max(initial=0))
        return (
            f"PackedBatch({self.num_sequences} sequences, {self.num_tokens} tokens, longest {longest}, {self.device})"
        )

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int]]) -> "PackedBatch":
        """Pack lists of token ids without appending any.

        Args:
            sequences: B lists of token ids; no sequences give an empty batch.

        Returns:
            The batch, on the CPU.

        Raises:
            TypeError: not lists of integers. ValueError: 2^31 tokens or more.
        """
        try:
            lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
            _check_total(lengths)
            input_ids = np.array(array("q", chain.from_iterable(sequences)), dtype=np.int64)
        except (TypeError, OverflowError) as error:
            raise TypeError(f"[PackedBatch.pack] sequences: expected lists of integer token ids: {error}") from error
        return cls._from_lengths(torch.from_numpy(input_ids), lengths)

    @classmethod
    def _from_lengths(cls, input_ids_T: torch.Tensor, lengths: np.ndarray) -> "PackedBatch":
        cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=cu_seqlens[1:])
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        device, on_cpu = input_ids_T.device, torch.from_numpy(cu_seqlens.astype(np.int32))
        return cls(
            input_ids_T=input_ids_T,
            positions_T=to_device(torch.from_numpy(positions), device),
            cu_seqlens=to_device(on_cpu, device),
            max_seqlen=int(lengths.max(initial=0)),
            cu_seqlens_cpu=on_cpu,
        )

    @classmethod
    def concat(cls, batches: Sequence["PackedBatch"]) -> "PackedBatch":
        """Concatenate batches.

        Args:
            batches: at least one, all on one device.

        Returns:
            A batch of the sequences of all of them, in order.

        Raises:
            TypeError: not batches. ValueError: no batches, several devices, or 2^31 tokens or more.
        """
        for at, batch in enumerate(batches):
            if not isinstance(batch, PackedBatch):
                raise TypeError(f"[PackedBatch.concat] batches[{at}] must be a PackedBatch, got {type(batch).__name__}")
        if not batches:
            raise ValueError("[PackedBatch.concat] batches must hold at least one, got none")
        if len(devices := {str(batch.device) for batch in batches}) > 1:
            raise ValueError(f"[PackedBatch.concat] batches must be on one device, got {', '.join(sorted(devices))}")
        lengths = np.concatenate([batch.lengths for batch in batches])
        _check_total(lengths)
        return cls._from_lengths(torch.cat([batch.input_ids_T for batch in batches]), lengths)

    @property
    def device(self) -> torch.device:
        """The device of all tensors except `cu_seqlens_cpu`."""
        return self.input_ids_T.device

    @property
    def num_sequences(self) -> int:
        """The number of sequences, B, including empty ones."""
        return len(self.cu_seqlens) - 1

    @property
    def num_tokens(self) -> int:
        """The total number of tokens, T."""
        return len(self.input_ids_T)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [B], on the CPU."""
        return np.diff(self._cu())

    def _cu(self) -> np.ndarray:
        return self.cu_seqlens_cpu.numpy().astype(np.int64)

    def split(self, max_tokens: int) -> list["PackedBatch"]:
        """Split into contiguous chunks of whole sequences.

        Args:
            max_tokens: the maximum tokens of a chunk. A longer sequence gets its own chunk.

        Returns:
            The chunks, in order; one empty chunk for an empty batch.

        Raises:
            TypeError: `max_tokens` is not an integer. ValueError: it is below 1.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int | np.integer):
            raise TypeError(f"[PackedBatch.split] max_tokens must be an integer, got {type(max_tokens).__name__}")
        if max_tokens < 1:
            raise ValueError(f"[PackedBatch.split] max_tokens must be at least 1, got {max_tokens}")
        cu = self._cu()
        if cu[-1] <= max_tokens:
            return [self]
        chunks, first = [], 0
        while first < self.num_sequences:
            fitting = int(np.searchsorted(cu, cu[first] + max_tokens, side="right")) - 1
            last = max(fitting, first + 1)
            chunks.append(self._slice(first, last, cu))
            first = last
        return chunks

    def _slice(self, first: int, last: int, cu: np.ndarray) -> "PackedBatch":
        tokens, start = slice(int(cu[first]), int(cu[last])), int(cu[first])
        on_cpu = self.cu_seqlens_cpu[first : last + 1] - start
        return PackedBatch(
            input_ids_T=self.input_ids_T[tokens],
            positions_T=self.positions_T[tokens],
            cu_seqlens=on_cpu if self.device.type == "cpu" else self.cu_seqlens[first : last + 1] - start,
            max_seqlen=int(np.diff(cu[first : last + 1]).max(initial=0)),
            cu_seqlens_cpu=on_cpu,
        )

    def select(self, indices: Sequence[int] | torch.Tensor) -> "PackedBatch":
        """Select sequences.

        Args:
            indices: their indices, in the order of the result; an index may occur more than once.

        Returns:
            A batch of these sequences.

        Raises:
            TypeError: not integers on the CPU. IndexError: outside 0 to B - 1. ValueError: 2^31 tokens or more.
        """
        try:
            chosen = np.asarray(indices)
        except (TypeError, ValueError) as error:
            raise TypeError(f"[PackedBatch.select] indices must be integers on the CPU: {error}") from error
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
            raise TypeError(
                f"[PackedBatch.select] indices must be a list of integers, got {chosen.dtype} of shape "
                f"{list(chosen.shape)}"
            )
        chosen = chosen.astype(np.int64)
        count = self.num_sequences
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < count):
            raise IndexError(
                f"[PackedBatch.select] expected indices in 0..{count - 1}, got {chosen.min()}..{chosen.max()}"
            )
        cu = self._cu()
        lengths = np.diff(cu)[chosen]
        _check_total(lengths)
        starts_in_result = np.cumsum(lengths) - lengths
        tokens = np.arange(lengths.sum()) + np.repeat(cu[chosen] - starts_in_result, lengths)
        return PackedBatch._from_lengths(self.input_ids_T[to_device(torch.from_numpy(tokens), self.device)], lengths)

    def last_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the last token of each sequence, for pooling.

        Returns:
            Their indices, int64 [B'], where B' is the number of non-empty sequences, and the cu_seqlens of these
            tokens, int32 [B + 1], in which an empty sequence stays empty.
        """
        return self._of_each(self.cu_seqlens_cpu[1:] - 1)

    def first_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the first token of each sequence, for pooling.

        Returns:
            Their indices, int64 [B'], and their cu_seqlens, int32 [B + 1], as of `last_tokens`.
        """
        return self._of_each(self.cu_seqlens_cpu[:-1])

    def _of_each(self, tokens_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The token of each non-empty sequence, and the cu_seqlens of these tokens."""
        filled = self.cu_seqlens_cpu.diff() > 0
        cu_seqlens = torch.zeros_like(self.cu_seqlens_cpu)
        cu_seqlens[1:] = filled.cumsum(0)
        return to_device(tokens_B[filled].long(), self.device), to_device(cu_seqlens, self.device)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Move to another device; `cu_seqlens_cpu` stays on the CPU.

        Args:
            device: a torch.device or its name.

        Returns:
            The batch on that device.

        Raises:
            ValueError: not a device.
        """
        try:
            device = torch.device(device)
        except (TypeError, RuntimeError):
            raise ValueError(
                f"[PackedBatch.to] device must be a torch.device or its name, got {device!r:.100}"
            ) from None
        if device == self.device:
            return self
        return PackedBatch(
            to_device(self.input_ids_T, device),
            to_device(self.positions_T, device),
            self.cu_seqlens_cpu if device.type == "cpu" else to_device(self.cu_seqlens_cpu, device),
            self.max_seqlen,
            self.cu_seqlens_cpu,
        )
