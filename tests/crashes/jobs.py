"""The jobs of pyqemb that write, on tiny inputs, as the crash tests run them.

A job prepares its inputs and, with `earlier`, the output of an earlier run; `run` makes the new output. Its paths are
relative to the folder, so that the bytes of the output do not depend on the place.
"""

import hashlib
import importlib.util
import json
import mmap
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np

import pyqemb
from pyqemb.curation import mine_task
from pyqemb.encoding import encode_file
from pyqemb.testing.tiny import TEXTS, tiny_embedder, write_tiny_folder
from pyqemb.training import Callback, stage1, stage2
from pyqemb.training.state import checkpoints, newest_sound, step_of, verify


def contents(folder):
    """{path: digest} of a folder or file, without hidden ones; empty if it is missing."""
    paths = [folder] if folder.is_file() else sorted(folder.rglob("[!.]*"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths if path.is_file() and "/." not in str(path.relative_to(folder.parent))}  # fmt: skip


def leftovers(folder):
    """The hidden files and folders that are left, except locks."""
    return [str(path) for path in folder.rglob(".*") if path.name != ".lock"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Job:
    """`before` and `wanted`: the results of the earlier and of the new run."""

    inputs = ()  # files and folders that a run only reads
    same_bytes = True  # every run writes as many bytes
    before: ClassVar = {}
    wanted: ClassVar = {}

    def prepare(self, earlier=True):
        raise NotImplementedError

    def run(self):
        raise NotImplementedError

    def begin(self):
        """Called before each case."""

    def result(self, folder):
        raise NotImplementedError

    def holds(self, folder):
        """Check what an incomplete run left."""
        assert self.result(folder) in (self.before, self.wanted), "neither the old result nor the new one"

    def ended(self):
        """Called after the run that follows a crash."""


class Train(Job):
    """Steps after a checkpoint, each with a save that removes the checkpoint before; then the model."""

    inputs = ("base", "pairs.jsonl")
    steps, every, keep = 3, 1, 1
    save: ClassVar = {}
    options: ClassVar = {}

    def config(self):
        return stage2(
            model={"base": "base"}, data=[{"path": "pairs.jsonl"}],
            train={"steps": self.steps, "global_batch_size": 4, "num_negatives": 1, "learning_rate": 1e-3,
                   "device": "cpu", "memory": None},
            save={"dir": "run", "every": self.every, "keep": self.keep, **self.save}, **self.options,
        )  # fmt: skip

    def prepare(self, earlier=True):
        write_tiny_folder("base")
        rows = [{"query": f"q {i}", "positive": f"d {i * i}", "negatives": [f"n {i}"]} for i in range(16)]
        write_rows(Path("pairs.jsonl"), rows)
        Path("run.json").write_text(self.config().model_dump_json())
        self.argv = ["train", "run.json", "--resume", "auto", "--quiet"]

        class StopTrainingError(Exception):
            pass

        def on_step(row):
            if row["step"] == 1:
                raise StopTrainingError

        if earlier:
            with suppress(StopTrainingError):
                self.run(on_step=on_step)
            assert [verify(path) for path in checkpoints(Path("run/checkpoints"))] == [1]

    def run(self, **options):
        pyqemb.train(self.config(), resume="auto", progress="off", **options)

    def run_and_list(self):
        """Write the files of each checkpoint to saved.json, because a later one removes it."""
        saved = {}

        class List(Callback):
            def on_save(self, step, folder):
                saved[step] = contents(folder)

        for path in checkpoints(Path("run/checkpoints")):
            saved[step_of(path)] = contents(path)
        self.run(callbacks=[List()])
        Path("saved.json").write_text(json.dumps(saved))

    def result(self, folder):
        """The model, the newest checkpoint and the losses."""
        run = folder / "run"
        if not (run / "final").exists():
            return {}
        found = checkpoints(run / "checkpoints")
        losses = [(row["step"], row["loss"], row["grad_norm"]) for row in self.metrics(folder) if "loss" in row]
        best = {f"best/{name}": digest for name, digest in contents(run / "best").items()}
        return {**contents(run / "final"), **best, "losses": losses, "checkpoint": contents(found[-1])}

    def metrics(self, folder):
        return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]

    def holds(self, folder):
        found = checkpoints(folder / "run" / "checkpoints")
        assert found, "no checkpoint is left"
        verify(found[-1])

    def holds_after_power_failure(self, folder, done, least, most):
        """`least`: the newest checkpoint that has to be there, `most`: the newest that was begun."""
        said = []
        found = newest_sound(checkpoints(folder / "run" / "checkpoints")[::-1], said.append)
        if found is None:
            assert least is None, f"no checkpoint, step {least} was complete; {said}"
            return
        assert least is None or found.step >= least, f"step {found.step}, but {least} was complete; {said}"
        assert found.step <= most
        expected = self.saved[str(found.step)]
        assert contents(found.folder) == expected, f"step {found.step} is mixed"
        rows = {row["step"] for row in self.metrics(folder) if "loss" in row}
        assert set(range(1, found.step + 1)) <= rows, f"step {found.step}, but metrics.jsonl has {sorted(rows)}"
        if done:
            assert contents(folder / "run" / "final") == self.model, "the model is lost"


class TrainBackground(Train):
    """Stage 1, saved in the background."""

    save: ClassVar = {"background": True}

    def config(self):
        return stage1(
            model={"base": "base"}, data=[{"path": "pairs.jsonl"}],
            train={"steps": self.steps, "global_batch_size": 8, "learning_rate": 1e-3, "device": "cpu", "memory": None},
            save={"dir": "run", "every": self.every, "keep": self.keep, **self.save},
        )  # fmt: skip


class TrainLora(Train):
    """Adapters with dropout, whose random states count, and evaluations that save the best model."""

    options: ClassVar = {"lora": {"rank": 2, "dropout": 0.1}, "eval": {"every": 3, "metric": "score"}}

    def run(self, **options):
        def evaluate(model):
            return {"score": float(model.encode(["q 1"])[0, 0])}

        super().run(evaluate=evaluate, **options)


class Long:
    """For chains of kills."""

    steps, every, keep = 12, 2, 2


class LongTrain(Long, Train):
    pass


class LongBackground(Long, TrainBackground):
    pass


class LongLora(Long, TrainLora):
    pass


class TrainSharded(Train):
    options: ClassVar = {"parallel": {"shard": -1}}


class Merge(Job):
    """Over a folder that an earlier merge left."""

    inputs = ("a", "b")
    argv: ClassVar = ["merge", "a", "b", "--weights", "1", "3", "--out", "out", "--quiet"]

    def prepare(self, earlier=True):
        for seed, name in enumerate("ab"):
            tiny_embedder(seed=seed).save_pretrained(name)
        if earlier:
            self.run([1, 1])

    def run(self, weights=(1, 3)):
        pyqemb.merge(["a", "b"], weights=list(weights), out="out")

    def result(self, folder):
        return contents(folder / "out")


class Export(Job):
    """Over an earlier export of another precision."""

    inputs = ("model",)
    argv: ClassVar = ["export", "model", "--out", "out"]

    def prepare(self, earlier=True):
        tiny_embedder().save_pretrained("model")
        if earlier:
            self.run("float32")

    def run(self, dtype="bfloat16"):
        pyqemb.Embedder.from_pretrained("model").save_pretrained("out", dtype, {"exported_from": "model"})

    def result(self, folder):
        return contents(folder / "out")


class Encode(Job):
    """A file in parts of five rows, over the vectors of an earlier job."""

    inputs = ("model", "texts.txt")
    argv: ClassVar = ["encode", "model", "texts.txt", "--out", "vectors.npy", "--rows-per-part", "5", "--quiet"]

    def prepare(self, earlier=True):
        tiny_embedder().save_pretrained("model")
        lines = [f"{text.strip()} {i}".replace("\n", " ") for i in range(2) for text in TEXTS]
        Path("texts.txt").write_text("\n".join(lines))
        if earlier:
            np.save("vectors.npy", np.zeros((2, 2), np.float32))

    def run(self):
        encode_file("model", "texts.txt", "vectors.npy", rows_per_part=5)

    def result(self, folder):
        return contents(folder / "vectors.npy")


class EncodeTasks(Encode):
    """The same file by two tasks, whose parts are joined."""

    def run(self):
        for task in (1, 0):
            encode_file("model", "texts.txt", "vectors.npy", rows_per_part=5, tasks=2, task=task)
        pyqemb.finish("vectors.npy")


class Curate(Job):
    """Three steps, over the results of an earlier run."""

    inputs = ("rows.jsonl",)
    argv: ClassVar = ["curate", "curate.json", "--quiet"]

    def prepare(self, earlier=True):
        rows = [{"query": f"question {i % 9}", "positive": f"answer number {i % 9}"} for i in range(12)]
        text = " ".join(f"word{i}" for i in range(60))
        rows += [{"query": f"long {end}", "positive": f"{text} {end}"} for end in ("one", "two")]
        write_rows(Path("rows.jsonl"), rows)
        Path("curate.json").write_text(json.dumps(self.config()))
        if earlier:
            self.run([{"kind": "exact"}])

    def config(self, steps=({"kind": "exact"}, {"kind": "near"})):
        return {"input": ["rows.jsonl"], "out": "out", "step": list(steps)}

    def run(self, *steps):
        pyqemb.curate(self.config(*steps))

    def result(self, folder):
        return {name: digest for name, digest in contents(folder / "out").items() if name.endswith(".jsonl")}

    def holds(self, folder):
        found = self.result(folder)
        assert all(found[name] in (self.before.get(name), self.wanted.get(name)) for name in found), "a partial file"


class Mine(Job):
    """With a cache of vectors."""

    inputs = ("model", "rows.jsonl")
    argv: ClassVar = ["mine", "model", "rows.jsonl", "--k", "2", "--max-positive-ratio", "2", "--cache", "cache",
                      "--out", "mined.jsonl", "--quiet"]  # fmt: skip

    def prepare(self, earlier=True):
        tiny_embedder().save_pretrained("model")
        write_rows(Path("rows.jsonl"), [{"query": f"q {i}", "positive": f"d {i * i}"} for i in range(8)])

    def run(self):
        mined = pyqemb.mine(pyqemb.Embedder.from_pretrained("model"), "rows.jsonl", k=2, cache="cache",
                            max_positive_ratio=2.0)  # fmt: skip
        pyqemb.write_examples("mined.jsonl", mined.examples)

    def result(self, folder):
        return contents(folder / "mined.jsonl")


class MineTasks(Mine):
    """By two tasks, whose candidates are merged."""

    def run(self):
        for task in (1, 0, 1):
            mine_task("model", "rows.jsonl", "mined.jsonl", tasks=2, task=task, k=2, max_positive_ratio=2.0)
        pyqemb.finish("mined.jsonl")


class Synthesize(Job):
    """With a server that answers, in a process of its own; an answer that was received is not requested again."""

    inputs = ("passages.jsonl", "personas.txt")
    same_bytes = False  # SQLite's
    argv: ClassVar = ["synthesize", "synthesize.json"]

    def __init__(self):
        import openai  # noqa: F401  once, before the children are forked

        self.requests = mmap.mmap(-1, 8)
        reading, writing = os.pipe()
        self.server = os.fork()
        if self.server == 0:
            os.close(reading)
            _serve(self.requests, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            self.url = pipe.readline().strip()

    def close(self):
        os.kill(self.server, signal.SIGKILL)
        os.waitpid(self.server, 0)

    def prepare(self, earlier=True):
        passages = [f"Passage number {i} tells how the bridge of {1800 + i} was built, and why it stands."
                    for i in range(4)]  # fmt: skip
        write_rows(Path("passages.jsonl"), [{"text": text} for text in passages])
        Path("personas.txt").write_text("An engineer\nA nurse\nA child\nA cook\nA pilot\nA poet\n")
        Path("synthesize.json").write_text(json.dumps(self.config()))
        if earlier:
            Path("out").mkdir()
            Path("out/examples.jsonl").write_text('{"query": "old", "positive": "older"}\n')
            Path("out/malformed.jsonl").write_text("")

    def config(self):
        endpoint = {"model": "m", "base_url": self.url, "timeout": 20, "concurrency": 1}
        return {"passages": "passages.jsonl", "out": "out", "personas": {"file": "personas.txt"}, "endpoint": endpoint}

    def begin(self):
        self.requests[:] = bytes(8)

    def run(self):
        pyqemb.synthesize(self.config())

    def result(self, folder):
        return {name: digest for name, digest in contents(folder / "out").items() if name.endswith(".jsonl")}

    def holds(self, folder):
        found = self.result(folder)
        assert all(found[name] in (self.before.get(name), self.wanted.get(name)) for name in found), "a partial file"

    def ended(self):
        requests = int.from_bytes(self.requests[:], "little")
        # Again: the answer that could not be stored, and the request that was under way meanwhile.
        assert requests <= 8 + 2, f"{requests} requests for 8 answers"


def _serve(requests, writing):
    """Answer as a good model would, until the process is killed."""
    path = Path(__file__).parents[1] / "llm" / "server.py"
    spec = importlib.util.spec_from_file_location("chat_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def reply(messages):
        requests[:] = (int.from_bytes(requests[:], "little") + 1).to_bytes(8, "little")
        prompt = messages[-1]["content"]
        if "question_type:" in prompt:
            kind, level = re.search(r"   - (\w+):", prompt)[1], re.search(r"One of: (\w+)", prompt)[1]
            person = re.search(r"People:\n- (.+)", prompt)[1]
            return json.dumps({"Character": person, "Question_Type": kind, "Difficulty": level})
        passage = re.search(r"Passage number (\d+)", prompt)
        return json.dumps({"query": f"bridge question {passage[1]}"})

    server = module.FakeServer(reply)
    os.write(writing, f"{server.url}\n".encode())
    os.close(writing)
    parent = os.getppid()
    while os.getppid() == parent:  # until the fork server ends, however it ends
        time.sleep(0.2)
    os._exit(0)


JOBS = {
    "train": Train, "train-background": TrainBackground, "train-lora": TrainLora, "train-sharded": TrainSharded,
    "long": LongTrain, "long-background": LongBackground, "long-lora": LongLora, "merge": Merge, "export": Export,
    "encode": Encode, "encode-tasks": EncodeTasks, "curate": Curate, "mine": Mine, "mine-tasks": MineTasks,
    "synthesize": Synthesize,
}  # fmt: skip
