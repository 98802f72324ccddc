"""Runs a job in a forked child for each call that changes its folder, and lets this call fail or kills the child before
it. Started with shim.c preloaded and one thread.

    python driver.py JOB FOLDER EVERY        prints a JSON object: calls, children, and what did not hold
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import pyqemb
from pyqemb.encoding import encode_file
from pyqemb.errors import PyqembError
from pyqemb.testing.tiny import TEXTS, tiny_embedder, write_tiny_folder
from pyqemb.training import stage2
from pyqemb.training.state import checkpoints, verify

FAULTS = {"kill": -1, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
BROKEN = 99  # the exit status of an error that is none of pyqemb's

shim = ctypes.CDLL(None)
shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long]
shim.fault_calls.restype = ctypes.c_long
shim.fault_names.restype = ctypes.c_char_p


def contents(folder):
    """{path: digest} of a folder or file, without hidden ones; empty if it is missing."""
    paths = [folder] if folder.is_file() else sorted(folder.rglob("[!.]*"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths if path.is_file() and "/." not in str(path.relative_to(folder.parent))}  # fmt: skip


def leftovers(folder):
    return [str(path) for path in folder.rglob(".*") if "partial" in path.name or ".old." in path.name]


class Train:
    """Two steps after a checkpoint, each with a save that removes the checkpoint before; then the model."""

    def prepare(self, folder):
        write_tiny_folder(folder / "base")
        rows = [{"query": f"q {i}", "positive": f"d {i * i}", "negatives": [f"n {i}"]} for i in range(16)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        class StopTrainingError(Exception):
            pass

        def on_step(row):
            if row["step"] == 1:
                raise StopTrainingError

        with suppress(StopTrainingError):
            self.run(folder, on_step=on_step)
        assert [verify(path) for path in checkpoints(folder / "run" / "checkpoints")] == [1]

    def run(self, folder, **options):
        os.chdir(folder)  # the paths in the model's card are the same in every copy
        config = stage2(
            model={"base": "base"}, data=[{"path": "pairs.jsonl"}],
            train={"steps": 3, "global_batch_size": 4, "num_negatives": 1, "learning_rate": 1e-3, "device": "cpu",
                "memory": None},
            save={"dir": "run", "every": 1, "keep": 1},
        )  # fmt: skip
        pyqemb.train(config, resume="auto", **options)

    def result(self, folder):
        return contents(folder / "run" / "final")

    def holds(self, folder):
        found = checkpoints(folder / "run" / "checkpoints")
        assert found, "no checkpoint is left"
        verify(found[-1])


class Merge:
    """Over a folder that an earlier merge left."""

    def prepare(self, folder):
        for seed, name in enumerate("ab"):
            tiny_embedder(seed=seed).save_pretrained(folder / name)
        self.run(folder, [1, 1])
        self.before = self.result(folder)

    def run(self, folder, weights=(1, 3)):
        pyqemb.merge([folder / "a", folder / "b"], weights=list(weights), out=folder / "out")

    def result(self, folder):
        return contents(folder / "out")

    def holds(self, folder):
        found = self.result(folder)
        assert found in (self.before, self.wanted), f"neither the old folder nor the new one: {sorted(found)}"


class Encode:
    """A file in parts of five rows, over the vectors of an earlier job."""

    def prepare(self, folder):
        tiny_embedder().save_pretrained(folder / "model")
        lines = [f"{text.strip()} {i}".replace("\n", " ") for i in range(2) for text in TEXTS]
        (folder / "texts.txt").write_text("\n".join(lines))
        np.save(folder / "vectors.npy", np.zeros((2, 2), np.float32))
        self.before = self.result(folder)

    def run(self, folder):
        encode_file(folder / "model", folder / "texts.txt", folder / "vectors.npy", rows_per_part=5)

    def result(self, folder):
        return contents(folder / "vectors.npy")

    def holds(self, folder):
        assert self.result(folder) in (self.before, self.wanted), "neither the old vectors nor the new ones"


class Curate:
    """Three steps, over the results of an earlier run."""

    def prepare(self, folder):
        rows = [{"query": f"question {i % 9}", "positive": f"answer number {i % 9}"} for i in range(12)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.run(folder, [{"kind": "exact"}])
        self.before = self.result(folder)

    def run(self, folder, steps=({"kind": "exact"}, {"kind": "near"})):
        pyqemb.curate({"input": [str(folder / "rows.jsonl")], "out": str(folder / "out"), "step": list(steps)})

    def result(self, folder):
        return {name: digest for name, digest in contents(folder / "out").items() if name.endswith(".jsonl")}

    def holds(self, folder):
        found = self.result(folder)
        assert all(found[name] in (self.before.get(name), self.wanted.get(name)) for name in found), "a partial file"


class Mine:
    """With a cache of vectors."""

    def prepare(self, folder):
        tiny_embedder().save_pretrained(folder / "model")
        rows = [{"query": f"q {i}", "positive": f"d {i * i}"} for i in range(8)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, folder):
        mined = pyqemb.mine(
            pyqemb.Embedder.from_pretrained(folder / "model"), folder / "rows.jsonl", k=2, cache=folder / "cache",
            max_positive_ratio=None,
        )  # fmt: skip
        pyqemb.write_examples(folder / "mined.jsonl", mined.examples)

    def result(self, folder):
        return contents(folder / "mined.jsonl")

    def holds(self, folder):
        assert self.result(folder) in ({}, self.wanted), "a partial file"


JOBS = {"train": Train, "merge": Merge, "encode": Encode, "curate": Curate, "mine": Mine}


def forked(job, folder, fault, at, log):
    """Run the job in a child; -> its exit status (of a signal: negative), the number and the names of its calls"""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 0
        try:
            os.close(reading)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            shim.fault_arm(os.fsencode(folder), fault, at)
            try:
                job.run(folder)
            except PyqembError as error:
                status = error.exit_code
                print(f"{type(error).__name__}: {error}")
            except BaseException:
                status = BROKEN
                traceback.print_exc()
            calls, names = shim.fault_calls(), shim.fault_names()
            shim.fault_arm(b"", 0, -1)
            os.write(writing, json.dumps([calls, names.decode().split()]).encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        report = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, *(json.loads(report) if report else (0, []))


def main(name, place, every):
    """Every `every`-th call, each with every fault in turn."""
    torch.set_num_threads(1)
    place, job = Path(place), JOBS[name]()
    template, work, log = place / "template", place / "work", place / "log"
    template.mkdir()
    job.prepare(template)
    shutil.copytree(template, work)
    status, calls, names = forked(job, work, 0, -1, log)
    assert status == 0, log.read_text()
    job.wanted = job.result(work)
    assert job.wanted
    assert calls > 10, names
    wrong, children, statuses = [], 0, {}
    for at in range(0, calls, int(every)):
        for fault, number in FAULTS.items():
            shutil.rmtree(work)
            shutil.copytree(template, work)
            status, _, _ = forked(job, work, number, at, log)
            children += 1
            statuses[str(status)] = statuses.get(str(status), 0) + 1
            where = f"{fault} at call {at}, {names[at]}"
            try:
                said = log.read_text()
                assert status == -signal.SIGKILL if number == -1 else status in (0, 3, 74), (status, said[-1500:])
                if status == 0:
                    assert job.result(work) == job.wanted, "another result, without an error"
                job.holds(work)
                status, _, _ = forked(job, work, 0, -1, log)
                assert status == 0, ("the next run fails", status, log.read_text()[-1500:])
                assert job.result(work) == job.wanted, "the next run has another result"
                assert not leftovers(work), leftovers(work)
            except (AssertionError, PyqembError) as error:
                wrong.append(f"{where}: {error}")
    print(json.dumps({"calls": calls, "children": children, "statuses": statuses, "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
