"""Work that may fail on some ranks only: if it raises on one rank, every rank raises.

Legend: B sequences, E dimension.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from pyqemb.data.batch import PackedBatch
from pyqemb.data.machine import exit_code_of
from pyqemb.errors import ConfigError, PyqembError, RankError
from pyqemb.training.parallel.world import World, is_of_a_collective

_FAILED, _DONE = 0, 1  # the report of a rank; any other number identifies the texts that it encodes


class Together:
    """The ranks inside a `together` block; they can encode texts together (`pyqemb.model.protocols.Ranks`).

    Each call of `gather_rows`, and the end of the block, is a collective in which the ranks report what they do. If a
    rank has failed, or does something else than rank 0, every rank raises.
    """

    def __init__(self, world: World):
        self.world = world
        self._raised: BaseException | None = None  # raised on every rank, so there is nothing to report

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self.world.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.world.size

    def gather_rows(self, own_BE: Tensor, partition: Sequence[np.ndarray], batch: PackedBatch) -> Tensor:
        """The rows of all sequences, given those of this rank; see `Ranks`.

        Raises:
            RankError: another rank has failed. ConfigError: another rank encodes other texts, or none.
        """
        self.report(_number_of(batch, own_BE.shape[1]), f"encodes {batch.num_sequences} texts")
        return self.world.all_gather(own_BE, partition)

    def report(self, number: int, doing: str, error: BaseException | None = None) -> None:
        """Report what this rank does, and raise on every rank unless all ranks do the same."""
        if self._raised is not None:
            raise self._raised
        numbers = self.world.gather_number(number)
        if min(numbers) == max(numbers) != _FAILED:
            return
        reports: list[tuple[str, int]] = self.world.gather_object((doing, 0 if error is None else exit_code_of(error)))
        self._raised = error or _error_of_others(numbers, reports)
        raise self._raised


@contextmanager
def together(world: World) -> Iterator[Together]:
    """If the block raises on one rank, every rank raises. The end of the block is a collective.

    In the block, the ranks may call only the collectives of the yielded object.

    Raises:
        RankError: the block raised on another rank; the exit code is that of the other rank's error.
    """
    block = Together(world)
    try:
        yield block
    except BaseException as error:
        if not is_of_a_collective(error):
            block.report(_FAILED, f"{type(error).__name__}: {error}"[:2000], error)
        raise
    block.report(_DONE, "does not encode anything more")


def _error_of_others(numbers: list[int], reports: list[tuple[str, int]]) -> PyqembError:
    failed = [rank for rank, number in enumerate(numbers) if number == _FAILED]
    if failed:
        message, exit_code = reports[failed[0]]
        return RankError(f"rank {failed[0]} failed with {message}", exit_code)
    other = next(rank for rank, number in enumerate(numbers) if number != numbers[0])
    same_words = " of other content" if reports[other] == reports[0] else ""
    return ConfigError(
        f"rank 0 {reports[0][0]}, rank {other} {reports[other][0]}{same_words}: "
        "every rank has to encode, or score, the same texts in the same order"
    )


def _number_of(batch: PackedBatch, width: int) -> int:
    """A 62-bit hash of the tokens and the width."""
    digest = hashlib.blake2b(f"{width}".encode(), digest_size=8)
    for part in (batch.lengths, batch.input_ids_T.cpu().numpy()):
        digest.update(part.tobytes())
    return 2 + int.from_bytes(digest.digest(), "little") % 2**62
