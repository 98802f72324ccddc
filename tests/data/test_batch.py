"""PackedBatch: pack, split, select; empty sequences and empty batches are ordinary."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from pyqemb.data.batch import PackedBatch

ROWS = [[5, 6, 7], [], [8], [9, 10], [], [11, 12, 13, 14]]


def unpack(batch: PackedBatch) -> list[list[int]]:
    cu = batch.cu_seqlens.tolist()
    return [batch.input_ids_T[first:last].tolist() for first, last in pairwise(cu)]


def check(batch: PackedBatch, rows: list[list[int]]) -> None:
    assert unpack(batch) == rows
    assert batch.positions_T.tolist() == [position for row in rows for position in range(len(row))]
    assert batch.input_ids_T.dtype == batch.positions_T.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens[0] == 0
    assert batch.max_seqlen == max(map(len, rows), default=0)
    assert batch.num_sequences == len(rows)
    assert batch.num_tokens == sum(map(len, rows))
    assert batch.lengths.tolist() == list(map(len, rows))


@pytest.mark.parametrize("rows", [ROWS, [[1]], [[], []], [], [[3]] * 1000])
def test_pack(rows):
    check(PackedBatch.pack(rows), rows)


def test_pack_takes_arrays_and_tensors_of_whole_numbers():
    check(PackedBatch.pack([np.array([1, 2]), torch.tensor([3])]), [[1, 2], [3]])


@pytest.mark.parametrize("rows", [[[1.5]], [["a"]], [[None]], [3], [[2**63]]])
def test_pack_refuses_what_is_no_token_id(rows):
    with pytest.raises(TypeError, match="expected lists of integer token ids"):
        PackedBatch.pack(rows)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 9, 10, 11])
def test_split_keeps_order_and_budget(max_tokens):
    chunks = PackedBatch.pack(ROWS).split(max_tokens)
    assert [row for chunk in chunks for row in unpack(chunk)] == ROWS
    for chunk in chunks:
        check(chunk, unpack(chunk))
        assert chunk.num_sequences > 0
        assert chunk.num_tokens <= max_tokens or chunk.num_sequences == 1
    for left, right in pairwise(chunks):  # greedy: the next sequence did not fit
        assert left.num_tokens + len(unpack(right)[0]) > max_tokens


def test_split_of_nothing_is_one_empty_chunk():
    chunks = PackedBatch.pack([]).split(10)
    assert len(chunks) == 1
    check(chunks[0], [])


def test_split_refuses_no_budget():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        PackedBatch.pack(ROWS).split(0)


@pytest.mark.parametrize("indices", [[], [0], [5, 1, 0], [3, 3, 2], torch.tensor([4, 0]), np.array([1])])
def test_select(indices):
    check(PackedBatch.pack(ROWS).select(indices), [ROWS[int(index)] for index in indices])


@pytest.mark.parametrize("index", [-1, 6])
def test_select_refuses_what_is_not_there(index):
    with pytest.raises(IndexError, match=r"expected indices in 0\.\.5"):
        PackedBatch.pack(ROWS).select([0, index])


def test_concat():
    check(PackedBatch.concat([PackedBatch.pack(rows) for rows in (ROWS, [], [[1, 2]])]), [*ROWS, [1, 2]])


@pytest.mark.parametrize(("name", "ids"), [("first_tokens", [5, 8, 9, 11]), ("last_tokens", [7, 8, 10, 14])])
def test_one_token_of_each_sequence(name, ids):
    batch = PackedBatch.pack(ROWS)
    tokens, cu = getattr(batch, name)()
    assert batch.input_ids_T[tokens].tolist() == ids
    assert (tokens.dtype, cu.dtype) == (torch.int64, torch.int32)
    assert cu.tolist() == [0, 1, 1, 2, 3, 3, 4]
    tokens, cu = getattr(PackedBatch.pack([]), name)()
    assert tokens.shape == (0,)
    assert cu.tolist() == [0]


def test_the_end_token_elsewhere_does_not_matter():
    """The pad and the pooled token share an id, so nothing may look for it."""
    tokens, _ = PackedBatch.pack([[0, 0, 4, 0], [0]]).last_tokens()
    assert tokens.tolist() == [3, 4]


def test_frozen_and_moved():
    batch = PackedBatch.pack(ROWS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.max_seqlen = 3
    moved = batch.to("meta")
    assert moved.cu_seqlens_cpu is batch.cu_seqlens_cpu
    assert moved.to("meta") is moved
    assert moved.lengths.tolist() == [3, 0, 1, 2, 0, 4], "known without asking the device"
    assert [chunk.lengths.tolist() for chunk in moved.split(5)] == [[3, 0, 1], [2, 0], [4]]
    assert moved.select([5, 0]).lengths.tolist() == [4, 3]
    assert moved.last_tokens()[0].shape == (4,)
    assert moved.input_ids_T.device == moved.positions_T.device == moved.cu_seqlens.device == torch.device("meta")
    check(batch.to("cpu"), ROWS)
