"""What the calls of the records work on, values that break them, and helpers."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from arguments_harness import Record
from torch import Tensor

import pyqemb
from pyqemb.data.batch import PackedBatch
from pyqemb.data.example import Example
from pyqemb.llm import Store
from pyqemb.model import lora
from pyqemb.model.reranker import Reranker
from pyqemb.testing.tiny import TEXTS, tiny_embedder, write_tiny_folder

ROWS = [{"query": f"question {i}", "positive": f"answer {i}", "negatives": [f"other {i}"]} for i in range(8)]
PLAIN = [{"query": row["query"], "positive": row["positive"]} for row in ROWS]
EXAMPLES = [Example(**row) for row in PLAIN]
BAD_ROWS = (
    5,
    0.5,
    True,
    object(),
    b"rows",
    [5],
    [None],
    [["query", "positive"]],
    [{}],
    [{"query": 1, "positive": "p"}],
    [{"query": "q"}],
    [{"positive": "p"}],
    [{"query": "q", "positive": None}],
    [{"query": "q", "positive": "p", "x": 1}],
    [Example(5, None)],
    [*EXAMPLES, 5],
    [],
    "no-such-file.jsonl",
    Path("no-such-file.jsonl"),
    lambda: None,
    {},
    [{"query": "q", "positive": "p", "negatives": [5]}],
    [{"query": "q", "positive": "p", "score": math.nan}],
)


# Data in memory has no name: its errors say "list[3]: column 'query'", or what was expected instead of it.
DATA = r"expected a|\w+\[\d+\]|holds no examples|no-such-file|column|expected at least one|at-all|no such|data\b"


BAD_COLUMNS = ({"query": []}, {"what": "query"}, {"query": ["a", "b"]}, {"query": ""}, {"query": "absent"})
FOLDERS = ("", "no/such/folder", Path("no-such-folder"), "no-such-folder")
NO_FOLDER = r"no such|folder|no-such|has no config|at-all|\bIs a dir|null"
DTYPES = ("float33", "int8", "", "Tensor", torch.int8, torch.complex64)
DEVICES = ("gpu?", "", "cuda:x", "cpu cpu")
NO_MODELS = (None, 5, "model", {}, object(), torch.nn.Identity(), lambda: None, type)


class Place:
    """What the calls work on: models, folders and files, made once."""

    def __init__(self, folder: Path, ops_tests: Any):
        self.folder, self.ops_tests = folder, ops_tests
        self.model, self.reranker_folder = folder / "embedder", folder / "reranker"
        self.embedder = tiny_embedder()
        self.embedder.save_pretrained(self.model)
        tiny_embedder(1).save_pretrained(folder / "other")
        write_tiny_folder(self.reranker_folder, prefix=True)
        self.reranker = Reranker.from_pretrained(self.reranker_folder, device="cpu")
        self.saved_reranker = self.reranker.save_pretrained(folder / "saved reranker")
        self.file = folder / "pairs.jsonl"
        self.file.write_text("".join(json.dumps(row) + "\n" for row in PLAIN))
        self.texts = folder / "texts.txt"
        self.texts.write_text("one\ntwo\nthree\n")
        self.run = folder / "run"
        self.settings = {"steps": 1, "global_batch_size": 4, "device": "cpu"}
        write_tiny_folder(folder / "base")
        pyqemb.train(self.config(self.run, save_every=1), data=PLAIN, progress="off")
        self.out = folder / "out"
        self.out.mkdir()
        self.adapters = []
        for seed in (0, 1):
            adapted = tiny_embedder()
            lora.add_lora(adapted.model, lora.LoraConfig(rank=2), seed)
            self.adapters.append(lora.save_adapter(adapted.model, folder / f"adapter{seed}"))
        self.numbers = itertools.count()
        self.store = Store(folder / "answers.sqlite")

    def config(self, run: Path, save_every: int | None = None, **sections: Any) -> Any:
        save = {"dir": str(run), **({"every": save_every} if save_every else {})}
        return pyqemb.stage1(model={"base": str(self.folder / "base")}, train=self.settings, save=save, **sections)

    def new(self, suffix: str = "") -> Path:
        """A path that does not exist."""
        return self.out / f"{next(self.numbers)}{suffix}"


def vectors(r: Random, count: int, size: int) -> Tensor:
    return torch.nn.functional.normalize(
        torch.randn(count, size, generator=torch.Generator().manual_seed(r.randrange(99))), dim=1
    )


def some(r: Random, *values: Any) -> Any:
    return r.choice(values)


def texts(r: Random, low: int = 1) -> list[str]:
    return [r.choice(TEXTS) or "x" for _ in range(r.randint(low, 3))]


def pairs(r: Random) -> list[tuple[str, str]]:
    return [(r.choice(TEXTS), r.choice(TEXTS)) for _ in range(r.randint(1, 3))]


def options(r: Random, **given: Any) -> dict[str, Any]:
    """A part of the arguments, each with a probability of a half."""
    return {name: value for name, value in given.items() if r.random() < 0.5}


def batch(r: Random) -> PackedBatch:
    return PackedBatch.pack([[r.randrange(300) for _ in range(r.randint(1, 4))] for _ in range(r.randint(1, 3))])


ODD_ARRAYS = lambda size: (  # noqa: E731
    5,
    0.5,
    None,
    "text",
    {},
    object(),
    ["a"],
    [None],
    np.zeros((1, 1, size)),
    np.array(["a"]),
    torch.zeros(1, 1, size),
    torch.zeros(2, size + 1),
    np.zeros((2, size - 1)),
    torch.zeros(2, size, dtype=torch.bool),
    torch.zeros(2, size, dtype=torch.complex64),
    torch.zeros(2, size).to_sparse(),
    np.full((2, size), "a", dtype=object),
    lambda: None,
    b"ab",
    [[0.0], [0.0, 1.0]],
)
BAD_BATCHES = (
    5,
    None,
    "text",
    {},
    [[1]],
    torch.zeros(2),
    object(),
    PackedBatch.pack([[10_000]]),
    PackedBatch.pack([[-1]]),
)
BATCH = {"batch": r"\bbatch\b|input_ids"}
HUGE = 10**400


def like(function: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with the signature of `function`."""
    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


def matrix(r: Random, count: int) -> np.ndarray:
    return vectors(r, count, 4).numpy()


class Records(dict[str, Record]):
    """The records by name."""

    def record(self, name: str, *args: Any, **more: Any) -> Record:
        """Add a record, of which the arguments are those of Record. The names are distinct."""
        assert name not in self, name
        self[name] = Record(*args, **more)
        return self[name]
