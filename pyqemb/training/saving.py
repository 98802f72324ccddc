"""Writing of checkpoints by threads, one in each rank that holds a shard of the weights.

The threads call no collectives, because these would interleave with those of the training. A rank reports the sizes and
digests of its files to the first rank through a small file in the folder of the checkpoint. The main threads agree on
whether all ranks are done, or one has failed, at a step boundary or while they wait.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyqemb.data.files import atomic_folder
from pyqemb.data.machine import reason, writing
from pyqemb.data.sealed import seal, unseal
from pyqemb.errors import MachineError
from pyqemb.model.shard_files import Slice
from pyqemb.model.shards import is_sharded
from pyqemb.training import state
from pyqemb.training.parallel.together import together
from pyqemb.training.parallel.world import World

_log = logging.getLogger("pyqemb")
_POLL = 0.02  # seconds between two checks
_PATIENCE = 4.0  # seconds that the first rank, when it exits with an error, waits for the shards of others
_RUNNING, _DONE, _FAILED = range(3)


class Saver:
    """Writes the checkpoints of a run into `folder`, one at a time, and keeps the `keep` newest.

    `resumed_from` is the step of the checkpoint that the run continues from, 0 for a new run. Checkpoints of later
    steps, which an earlier process has written, are deleted with the first save.

    All ranks call the methods at the same step, except `leave`.
    """

    def __init__(self, folder: Path, keep: int, world: World, resumed_from: int = 0):
        self.folder, self.keep, self.world = folder, keep, world
        self._abandoned_after: int | None = resumed_from  # None after the first save
        self._save: _Save | None = None

    def start(
        self,
        step: int,
        weights: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
        run_state: Mapping[str, Any],
        write_portable: Callable[[Path], None],
        copy: bool,
    ) -> None:
        """Begin to write a checkpoint; the previous one must be complete.

        Args:
            step: the step of the checkpoint.
            weights: the weights of this rank; of sharded weights, each rank of the first replica writes its rows.
            optimizer: the tensors of the optimizer.
            run_state: the content of state.json.
            write_portable: fills the folder `portable`.
            copy: write copies of the tensors, so that training can continue before `wait` or `poll` returns the folder.

        Raises:
            MachineError: the folder cannot be created.
        """
        assert self._save is None
        target, count = self.folder / f"step_{step:08}", _num_shards(weights)
        held, temporary, shards = ExitStack(), Path(), []
        with together(self.world):
            if self.world.rank < count:
                shards = [{name: Slice.of(x) for name, x in tensors.items()} for tensors in (weights, optimizer)]
            if copy:
                shards = [{name: part.copied() for name, part in slices.items()} for slices in shards]
            if self.world.is_first:
                with _about(target), ExitStack() as stack:
                    temporary = stack.enter_context(atomic_folder(target))
                    (temporary / state.STATE_FILE).write_text(json.dumps(run_state), encoding="utf-8")
                    (temporary / state.PORTABLE).mkdir()
                    write_portable(temporary / state.PORTABLE)
                    held = stack.pop_all()
        temporary = self.world.broadcast_object(temporary)
        self._save = _Save(
            target, temporary, step, self.world.rank, count, self.keep, held, shards,
            abandoned_after=self._abandoned_after,
        )  # fmt: skip
        self._save.thread.start()

    def poll(self) -> Path | None:
        """The folder of the checkpoint that was completed since the last call; None if there is none.

        Raises:
            MachineError: it could not be written; RankError: another rank could not write its shard. Older checkpoints
                are intact, and this one is removed.
        """
        save = self._save
        if save is None:
            return None
        status = self.world.gather_number(save.status)
        if _FAILED in status:
            self._give_up(save, status[self.world.rank] == _FAILED)
        if _RUNNING in status:
            return None
        self._save, self._abandoned_after = None, None
        return save.target

    def wait(self) -> Path | None:
        """Call `poll` until the checkpoint that is being written is complete."""
        while self._save is not None:
            self._save.thread.join(_POLL if self.world.size > 1 else None)
            if (folder := self.poll()) is not None:
                return folder
        return None

    def leave(self) -> None:
        """Wait for the thread of this rank only, when it exits with an error that other ranks may not know of.

        The checkpoint is completed if the other ranks finish their shards too.
        """
        save, self._save = self._save, None
        if save is None:
            return
        save.deadline = time.monotonic() + _PATIENCE
        save.thread.join()
        if save.error is not None:
            save.discard()
            _log.error("%s", save.error)

    def _give_up(self, save: "_Save", own: bool) -> None:
        """Remove the partial checkpoint, and raise on every rank."""
        save.deadline, self._save = 0.0, None
        save.thread.join()
        self.world.barrier()  # no rank is writing
        save.discard()
        with together(self.world):
            if own and save.error is not None:
                raise save.error


@dataclass
class _Save:
    """A checkpoint that is being written, as one rank sees it.

    Attributes:
        number: the rank; only ranks below `count` have a shard.
        held: on the first rank, the context that completes the folder at its end, and removes it after an error.
        shards: this rank's slices of the weights and of the optimizer.
        abandoned_after: checkpoints of later steps are deleted, unless it is None.
        deadline: when the first rank stops waiting for the shards of others.
        error: the error of this rank.
    """

    target: Path
    temporary: Path
    step: int
    number: int
    count: int
    keep: int
    held: ExitStack
    shards: list[dict[str, Slice]]
    abandoned_after: int | None = None
    deadline: float = math.inf
    error: Exception | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    @property
    def status(self) -> int:
        """The status of this rank: running, done or failed."""
        if self.thread.is_alive():
            return _RUNNING
        return _DONE if self.error is None else _FAILED

    def discard(self) -> None:
        """Remove the partial checkpoint, once no rank is writing."""
        with suppress(_DiscardedError), self.held:
            raise _DiscardedError

    def _run(self) -> None:
        try:
            if self.number < self.count:
                with _about(self.target), writing(self.target, self.temporary):
                    self._write()
        except Exception as error:
            self.error = error
        finally:
            self.shards.clear()

    def _write(self) -> None:
        files = state.write_shard(self.temporary, self.number, self.count, *self.shards)
        if self.number:
            report = self._report(self.number)
            partial = report.with_suffix(".partial")
            partial.write_bytes(seal({"files": files}))
            os.replace(partial, report)  # from now on the first rank may rename the folder
            return
        for number in range(1, self.count):
            files |= self._files_of(number)
        with self.held:
            state.write_manifest(self.temporary, self.step, self.count, files)
            if self.abandoned_after is not None:
                state.delete_abandoned(self.target.parent, self.abandoned_after, self.step)
        state.mark_verified(self.target)  # each rank has read its files back
        state.retain(self.target.parent, self.step, self.keep)

    def _report(self, number: int) -> Path:
        """The file in which a rank reports that it has written its shard."""
        return self.temporary / f"shard-{number:05}.json"

    def _files_of(self, number: int) -> dict[str, Any]:
        """Wait for the files of another rank, and return them."""
        path = self._report(number)
        while not path.exists():
            if time.monotonic() > self.deadline:
                raise MachineError(f"{self.target}: rank {number} has not written its shard")
            time.sleep(_POLL)
        files = state.checked_entries(path, unseal(path.read_bytes(), str(path)).get("files"))
        path.unlink()
        for name, entry in files.items():
            if not (self.temporary / name).is_file() or (self.temporary / name).stat().st_size != entry["size"]:
                raise MachineError(f"{name} of rank {number} is not there: all ranks must share the folder save.dir")
        return files


class _DiscardedError(Exception):
    """Ends the context of a folder that will not be completed."""


@contextmanager
def _about(target: Path) -> Iterator[None]:
    """Add to errors of the machine that the checkpoint was not written."""
    try:
        yield
    except MachineError as error:
        words = f"{target}: could not be written: {reason(error)}; older checkpoints are intact"
        raise MachineError(words, error.errno, str(target)) from error


def _num_shards(weights: Mapping[str, torch.Tensor]) -> int:
    """The number of ranks that share the weights."""
    sharded: list[Any] = [x for x in weights.values() if is_sharded(x)]
    return sharded[0].device_mesh.size() if sharded else 1
