"""Deduplication of the texts of a stream, and packing into chunks of whole sequences by token budget.

Legend: S sequences, U distinct ones.
"""

from bisect import bisect_left, insort

import numpy as np
import torch

from pyqemb.data.batch import PackedBatch


def distinct(stream: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the distinct sequences, int64 [U], and for each sequence the index of its equal, int64 [S]."""
    tokens = stream.input_ids_T.cpu().numpy()
    data, ends = tokens.tobytes(), (stream.cu_seqlens_cpu.long() * tokens.itemsize).tolist()
    firsts: dict[bytes, int] = {}
    same_S = np.fromiter(
        (firsts.setdefault(data[start:end], len(firsts)) for start, end in zip(ends, ends[1:], strict=False)),
        dtype=np.int64,
        count=stream.num_sequences,
    )
    _, first_U = np.unique(same_S, return_index=True)
    return first_U, same_S


def pack(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Indices of the sequences of each chunk: best-fit decreasing.

    Each sequence, longest first, goes into the chunk where it leaves the least space, or into a new chunk if it fits in
    none. A sequence longer than the budget gets its own chunk. There is at least one chunk, which is empty if there are
    no sequences.
    """
    if budget < 1:
        raise ValueError(f"tokens_per_chunk must be at least 1, got {budget}")
    if lengths.sum() <= budget:
        return [np.arange(len(lengths))]
    order = np.argsort(-lengths, kind="stable")
    chunks: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens of a chunk, its number), ascending
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            chunks.append([])
            room, number = budget, len(chunks) - 1
        else:
            room, number = rooms.pop(place)
        chunks[number].append(index)
        if room > length:
            insort(rooms, (room - length, number))
    return [np.array(chunk, dtype=np.int64) for chunk in chunks]


def chunk(stream: PackedBatch, budget: int) -> tuple[list[PackedBatch], np.ndarray]:
    """The chunks of `pack`, and the index in the stream of each of their sequences, int64 [S]."""
    parts = pack(stream.lengths, budget)
    return [stream.select(torch.from_numpy(part)) for part in parts], np.concatenate(parts)


def chunk_tokens(lengths: np.ndarray, budget: int) -> np.ndarray:
    """The tokens of each chunk of `pack`."""
    return np.array([lengths[part].sum() for part in pack(lengths, budget)])
