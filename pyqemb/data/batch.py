"""PackedBatch: sequences laid end to end, nothing padded. Legend: B sequences, T tokens of all of them together."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

_MAX_TOKENS = 2**31 - 1  # cu_seqlens is int32


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A batch that knows its own layout.

    Sequence b holds the tokens `cu_seqlens[b]` to `cu_seqlens[b + 1]`; it may be empty. Its last token is pooled.
    """

    input_ids_T: torch.Tensor  # int64 [T]
    positions_T: torch.Tensor  # int64 [T], 0, 1, ... in each sequence
    cu_seqlens: torch.Tensor  # int32 [B + 1]: 0, ..., T
    max_seqlen: int

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int]]) -> "PackedBatch":
        """Pack lists of token ids as given: nothing is appended. No sequences give an ordinary empty batch."""
        try:
            lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
            input_ids = np.array(array("q", chain.from_iterable(sequences)), dtype=np.int64)
        except (TypeError, OverflowError) as error:
            raise TypeError(f"[PackedBatch.pack] expected lists of integer token ids: {error}") from error
        return cls._from_lengths(torch.from_numpy(input_ids), lengths)

    @classmethod
    def _from_lengths(cls, input_ids_T: torch.Tensor, lengths: np.ndarray) -> "PackedBatch":
        if lengths.sum() > _MAX_TOKENS:
            raise ValueError(f"[PackedBatch] at most {_MAX_TOKENS} tokens fit one batch, got {lengths.sum()}")
        cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=cu_seqlens[1:])
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        return cls(
            input_ids_T=input_ids_T,
            positions_T=torch.from_numpy(positions).to(input_ids_T.device),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)).to(input_ids_T.device),
            max_seqlen=int(lengths.max(initial=0)),
        )

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids_T)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [B], on the CPU."""
        return np.diff(self.cu_seqlens.cpu().numpy().astype(np.int64))

    def split(self, max_tokens: int) -> list["PackedBatch"]:
        """Cut into contiguous chunks of whole sequences, each of at most `max_tokens` tokens.

        A sequence longer than that gets a chunk of its own. An empty batch gives one empty chunk.
        """
        if max_tokens < 1:
            raise ValueError(f"[PackedBatch.split] max_tokens must be at least 1, got {max_tokens}")
        cu = self.cu_seqlens.cpu().numpy().astype(np.int64)
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
        tokens = slice(int(cu[first]), int(cu[last]))
        return PackedBatch(
            input_ids_T=self.input_ids_T[tokens],
            positions_T=self.positions_T[tokens],
            cu_seqlens=self.cu_seqlens[first : last + 1] - int(cu[first]),
            max_seqlen=int(np.diff(cu[first : last + 1]).max(initial=0)),
        )

    def select(self, indices: Sequence[int] | torch.Tensor) -> "PackedBatch":
        """The sequences at `indices`, in that order; an index may come more than once."""
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        count = self.num_sequences
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < count):
            raise IndexError(
                f"[PackedBatch.select] expected indices in 0..{count - 1}, got {chosen.min()}..{chosen.max()}"
            )
        cu = self.cu_seqlens.cpu().numpy().astype(np.int64)
        lengths = np.diff(cu)[chosen]
        starts_in_result = np.cumsum(lengths) - lengths
        tokens = np.arange(lengths.sum()) + np.repeat(cu[chosen] - starts_in_result, lengths)
        return PackedBatch._from_lengths(
            self.input_ids_T[torch.from_numpy(tokens).to(self.input_ids_T.device)], lengths
        )

    def last_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the pooled tokens are: their indices, int64 [B'], and the cu_seqlens, int32 [B + 1], of these alone.

        B' counts the sequences that have a token; an empty sequence stays empty in the second tensor.
        """
        ends = self.cu_seqlens[1:].long()
        filled = ends > self.cu_seqlens[:-1]
        cu_last = torch.zeros_like(self.cu_seqlens)
        cu_last[1:] = filled.cumsum(0)
        return ends[filled] - 1, cu_last

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        return PackedBatch(
            self.input_ids_T.to(device, non_blocking=True),
            self.positions_T.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.max_seqlen,
        )
