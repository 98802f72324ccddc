"""Bugs planted into pyqemb one at a time: each must make the crash tests fail.

python tests/crashes/planted.py [word ...]     only the bugs whose file or reason has one of the words
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bug:
    why: str
    file: str  # below pyqemb
    old: str  # occurs there exactly once
    new: str
    request: dict[str, object]  # to the fork server, which must find it
    quick: bool = False  # tried in `make test`


TRAIN = {"mode": "power", "job": "train", "every": 150}
FRESH = {**TRAIN, "earlier": False}
BUGS = [
    Bug("a file is not synced before its folder is renamed", "data/files.py",
        "fsync_folder(path) if path.is_dir() else fsync_file(path)", "fsync_folder(path) if path.is_dir() else None",
        TRAIN),
    Bug("a folder is not synced before it is renamed", "data/files.py",
        "            fsync_folder(temporary)\n            _replace_folder", "            _replace_folder", TRAIN),
    Bug("the rename of a checkpoint is not synced", "data/files.py",
        "            fsync_folder(target.parent)  # before", "            # before", TRAIN),
    Bug("the name of a new folder is not synced", "data/files.py",
        "        fsync_folder(folder.parent)\n", "        pass\n", FRESH),
    Bug("the rows of metrics.jsonl are not synced", "training/callbacks/metrics.py",
        "                os.fsync(self._file.fileno())\n", "", TRAIN),
    Bug("a file is not synced before its rename", "data/files.py",
        "            fsync_file(temporary)\n            os.replace", "            os.replace",
        {"mode": "power", "job": "encode", "every": 5}, quick=True),
    Bug("a folder is removed before its replacement", "data/files.py",
        "            _replace_folder(temporary, target)\n",
        "            remove(target)\n            _replace_folder(temporary, target)\n",
        {"mode": "writes", "job": "merge", "every": 2, "first": 60, "faults": ["kill"]}),
    Bug("the manifest is written before the other files", "training/saving.py",
        "        files = state.write_shard(",
        "        state.write_manifest(self.temporary, self.step, self.count, {})\n"
        "        files = state.write_shard(", {"mode": "writes", "job": "train", "every": 1000, "faults": ["kill"]}),
    Bug("a checkpoint is written in place", "training/saving.py",
        "temporary = stack.enter_context(atomic_folder(target))",
        "temporary = target; target.mkdir(parents=True)",
        {"mode": "writes", "job": "train", "every": 4, "first": 50, "faults": ["kill"]}),
    Bug("the old checkpoint is removed before the new one is written", "training/saving.py",
        "        assert self._save is None\n", "        assert self._save is None\n"
        "        [state.remove_folder(path) for path in state.checkpoints(self.folder)]\n",
        {"mode": "writes", "job": "train", "every": 20, "first": 40, "faults": ["kill"]}),
    Bug("temporary files stay after an error", "data/files.py",
        "            shutil.rmtree(temporary, ignore_errors=True)\n", "            pass\n",
        {"mode": "space", "job": "merge", "sizes": 3}),
    Bug("a file that cannot be read counts as damaged", "training/state.py",
        "        raise unreadable(error.filename or folder, error, CheckpointError) from error",
        "        raise CheckpointError(str(error)) from error", {"mode": "reads", "job": "train", "every": 12}),
    Bug("the random states are not restored", "training/trainer.py",
        "                restore_random_states(random[self.world.rank], checkpoint.folder)",
        "                pass", {"mode": "kills", "job": "long-lora", "kills": 3, "seed": 0}),
    Bug("a signal is forgotten", "training/signals.py",
        "        self.name = signal.Signals(number).name", "        self.name = None",
        {"mode": "signals", "job": "train", "signals": 20, "seed": 0}),
]  # fmt: skip


def plant(bug: Bug, folder: Path) -> Path:
    """A copy of pyqemb with the bug, in `folder`."""
    copy = folder / "pyqemb"
    shutil.copytree(ROOT / "pyqemb", copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / bug.file
    text = path.read_text()
    assert text.count(bug.old) == 1, f"{bug.why}: {bug.file} has {text.count(bug.old)} times {bug.old!r}"
    path.write_text(text.replace(bug.old, bug.new))
    return folder


def main(*words: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from server import ForkServer, build_shim

    missed = []
    with tempfile.TemporaryDirectory() as scratch:
        shim = build_shim(Path(scratch))
        for number, bug in enumerate(BUGS):
            if words and not any(word in bug.why or word in bug.file for word in words):
                continue
            home = Path(scratch) / str(number)
            home.mkdir()
            with ForkServer(shim, plant(bug, home)) as server:
                report = server.ask(**bug.request)
            found = report["wrong"]
            print(f"{'found' if found else 'MISSED'}  {bug.why}: {found[0].splitlines()[0][:160] if found else report}")
            missed += [bug.why] * (not found)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main(*sys.argv[1:])
