"""A record for every public function, class and method: how it is called, and what breaks a call."""

import asyncio
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from arguments_harness import Named, Record, settings_record
from torch import Tensor

import pyqemb
from pyqemb import training
from pyqemb.curation import CurateConfig, consistency, distinct, similarity
from pyqemb.data import example as data_example
from pyqemb.data.batch import PackedBatch
from pyqemb.data.example import Example
from pyqemb.data.pairs import PairTokenizer
from pyqemb.encoding import encode_file
from pyqemb.evaluation import Bitext, DevSets, Retrieval, Sts, compare_storage, rank, retrieve, score_rankings
from pyqemb.interop import verify as interop_verify
from pyqemb.llm import Answer, Asker, Endpoint, Request, Store, parse, run_in_order
from pyqemb.model import lora, quantize
from pyqemb.model.embedder import Embedder
from pyqemb.model.reranker import Reranker
from pyqemb.synthesis import SynthesisConfig
from pyqemb.testing.tiny import (
    TEXTS,
    answering_tokenizer,
    tiny_config,
    tiny_embedder,
    tiny_tokenizer,
    write_tiny_folder,
)
from pyqemb.training import config as training_config
from pyqemb.training.callbacks.base import StepFunction
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.objectives.base import EmbeddingSection, LossParameters, Objective
from pyqemb.training.objectives.distillation import DistillationSection
from pyqemb.training.objectives.info_nce import GroupSection, InfoNCESection

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
ENCODE = {
    "prompt_name": lambda given: [] if "prompt" in given else ["unknown", ""],
    "output_value": ["vectors", 5],
    "precision": ["int4", "float16"],
    "device": DEVICES,
    "truncate_dim": [],
    "dim": [33, 1000],
    "instruction": [["a"] * 9, [], [5], ["a", None, 5, "b"]],
    "pool": [{}, {"processes": []}],
    "texts": [["a", 5], [None], [b"a"], 5, {"a": 1}, np.zeros(3), [["a"]]],
}


def encode_options(r: Random) -> dict[str, Any]:
    given = options(
        r,
        batch_size=r.randint(1, 9),
        show_progress_bar=False,
        convert_to_numpy=some(r, True, False),
        convert_to_tensor=some(r, True, False),
        device="cpu",
        normalize_embeddings=some(r, None, True, False),
        tokens_per_chunk=r.randint(1, 99),
        chunk_size=r.randint(1, 9),
        on_progress=lambda done: None,
    )
    given |= options(r, **some(r, {"dim": r.randint(1, 32)}, {"truncate_dim": r.randint(1, 32)}))
    return given | options(r, **some(r, {"prompt_name": "query"}, {"prompt": "p: "}))


@cache
def records(place: Place) -> dict[str, Any]:

    embedder, reranker = place.embedder, place.reranker
    decoder, tokenizer = embedder.model, embedder.tokenizer
    backend = answering_tokenizer
    found: dict[str, Record] = {}
    models = [None, 5, "model", {}, object(), torch.nn.Identity(), lambda: None, type]

    def record(name: str, *args: Any, **more: Any) -> None:
        found[name] = Record(*args, **more)

    # Embedder
    record(
        "pyqemb.Embedder",
        Embedder,
        lambda r: (
            dict(model=decoder, tokenizer=tokenizer)
            | options(r, pooling=some(r, "last", "mean"), prompts={"query": "q: "}, matryoshka=[16, 8])
        ),
        dict(pooling=["max", "cls", ""], matryoshka=[[64], [0], [33]]),
    )
    opened = lambda r: options(  # noqa: E731
        r,
        attention=some(r, "causal", "bidirectional"),
        dtype=some(r, "float32", torch.float64, "bfloat16"),
        max_length=r.randint(2, 99),
        device="cpu",
    )
    bad_open = dict(folder=FOLDERS, pooling=["max"], dtype=DTYPES, device=DEVICES, attention=["full"])
    record(
        "pyqemb.Embedder.from_pretrained",
        Embedder.from_pretrained,
        lambda r: dict(folder=some(r, place.model, str(place.model))) | opened(r) | options(r, pooling="mean"),
        bad_open,
        names=dict(folder=rf"\bfolder\b|{NO_FOLDER}"),
    )
    record(
        "pyqemb.Embedder.from_config",
        Embedder.from_config,
        lambda r: (
            dict(config=tiny_config(), tokenizer=tiny_tokenizer())
            | options(r, seed=r.randrange(9), attention="causal", pooling="mean", dtype="float64")
        ),
        dict(pooling=["max"], dtype=DTYPES, attention=["full"]),
    )
    encoder = tiny_embedder()
    for name in ("encode", "encode_query", "encode_document"):
        record(
            f"pyqemb.Embedder.{name}",
            getattr(encoder, name),
            lambda r: dict(texts=some(r, "a text", texts(r))) | encode_options(r),
            ENCODE,
            names=dict(texts=r"\btexts?\b", pool=r"\bpool\b"),
        )
    record("pyqemb.Embedder.embed_query", embedder.embed_query, lambda r: dict(text=r.choice(TEXTS)))
    record("pyqemb.Embedder.embed_documents", embedder.embed_documents, lambda r: dict(texts=texts(r)))
    record("pyqemb.Embedder.aembed_query", awaited(embedder.aembed_query), lambda r: dict(text=r.choice(TEXTS)))
    record("pyqemb.Embedder.aembed_documents", awaited(embedder.aembed_documents), lambda r: dict(texts=texts(r)))
    record(
        "pyqemb.Embedder.forward",
        embedder.forward,
        lambda r: dict(batch=batch(r)) | options(r, dim=r.randint(1, 32)),
        dict(batch=BAD_BATCHES, dim=[0, -1, 33, True, 1.5]),
        names=BATCH,
    )
    for name in ("pooled", "hidden"):
        record(
            f"pyqemb.Embedder.{name}",
            getattr(embedder, name),
            lambda r: dict(batch=batch(r)),
            dict(batch=BAD_BATCHES),
            names=BATCH,
        )
    for name in ("similarity", "similarity_pairwise"):
        record(
            f"pyqemb.Embedder.{name}",
            getattr(embedder, name),
            lambda r: dict(embeddings1=vectors(r, 2, 4), embeddings2=vectors(r, 2, 4).numpy()),
            dict(embeddings1=ODD_ARRAYS(4), embeddings2=ODD_ARRAYS(4)),
        )
    for name in ("truncate_embeddings", "truncate_sentence_embeddings"):
        record(f"pyqemb.Embedder.{name}", getattr(embedder, name), lambda r: dict(truncate_dim=r.randint(1, 32)))
    for kind, model in (("Embedder", embedder), ("Reranker", reranker)):
        record(
            f"pyqemb.{kind}.save_pretrained",
            model.save_pretrained,
            lambda r: dict(folder=place.new()) | options(r, dtype="bfloat16", provenance={"base": "b"}),
            dict(
                folder=[place.file, place.folder],
                dtype=DTYPES,
                provenance=[{"a": object()}, {"a": math.nan}],
                format=["gguf", ""],
            ),
            names=dict(folder=r"\bfolder\b|refus|exists|at-all|pairs|neither"),
            cheap=False,
            fine=dict(
                folder=["", "text", "\0"],
                provenance=lambda value: isinstance(value, dict) and all(type(x) is float for x in value.values()),
            ),
        )
        record(
            f"pyqemb.{kind}.push_to_hub",
            pushed(model),
            lambda r: dict(repo_id="org/name") | options(r, private=True, revision="main", commit_message="m"),
            dict(repo_id=["", "name", "a/b/c", "org/na me", "-a/b"], dtype=DTYPES),
            names=dict(repo_id=r"\brepo_id\b|hub"),
            cheap=False,
        )
        record(
            f"pyqemb.{kind}.start_multi_process_pool",
            without_processes(model),
            lambda r: dict(target_devices=["cpu"]),
            dict(target_devices=[[], ["gpu?"], ["cpu", ""]]),
            cheap=False,
        )
        record(
            f"pyqemb.{kind}.stop_multi_process_pool",
            model.stop_multi_process_pool,
            lambda r: dict(pool=dict(input=multiprocessing.Queue(), output=multiprocessing.Queue(), processes=[])),
            dict(pool=[{}, {"processes": []}]),
        )
    # Reranker
    head = torch.randn(2, 32)
    record(
        "pyqemb.Reranker",
        Reranker,
        lambda r: (
            dict(model=reranker.model, tokenizer=PairTokenizer(backend()))
            | options(r, head=head, default_instruction="task")
        ),
        dict(
            head=[torch.zeros(2), torch.zeros(3, 32), torch.zeros(2, 31), torch.zeros(2, 32, dtype=torch.int64)],
            lm_head=[torch.zeros(2), torch.zeros(3, 31), torch.zeros(384, 32, dtype=torch.int64)],
        ),
    )
    record(
        "pyqemb.Reranker.from_pretrained",
        Reranker.from_pretrained,
        lambda r: (
            dict(folder=some(r, place.reranker_folder, str(place.reranker_folder))) | opened(r) | dict(max_length=300)
        ),
        bad_open | dict(max_length=[1, 5]),
        names=dict(folder=rf"\bfolder\b|{NO_FOLDER}"),
    )
    record(
        "pyqemb.Reranker.forward",
        reranker.forward,
        lambda r: dict(batch=batch(r)),
        dict(batch=[*BAD_BATCHES, PackedBatch.pack([[1], []])]),
        names=dict(batch=r"\bbatch\b|input_ids|sequence"),
    )
    bad_pairs = [["a"], [("a",)], [("a", 5)], [("a", "b", "c")], ["ab"], [5], 5, [None], {"a": "b"}, [("a", None)]]
    told = lambda given: [["a"] * 9, [5], [], ["a", None, 5]]  # noqa: E731
    for name in ("score", "margins", "format"):
        record(
            f"pyqemb.Reranker.{name}",
            getattr(reranker, name),
            lambda r, name=name: (
                dict(pairs=pairs(r))
                | options(r, instruction="task")
                | ({} if name == "format" else options(r, tokens_per_chunk=r.randint(1, 999)))
            ),
            dict(pairs=bad_pairs, instruction=told),
            names=dict(pairs=r"\bpairs?\b"),
        )
    sorting = lambda r: dict(query=r.choice(TEXTS), documents=texts(r)) | options(r, top_k=r.randint(1, 4))  # noqa: E731
    record("pyqemb.Reranker.rerank", reranker.rerank, lambda r: sorting(r) | options(r, instruction="task"))
    scoring = lambda r: options(  # noqa: E731
        r,
        prompt="task",
        batch_size=r.randint(1, 9),
        show_progress_bar=False,
        activation_fn=torch.sigmoid,
        device="cpu",
        chunk_size=r.randint(1, 9),
    )
    odd_scoring = dict(pool=[{}, {"processes": []}], prompt_name=["query", ""], device=DEVICES)
    record(
        "pyqemb.Reranker.rank",
        reranker.rank,
        lambda r: sorting(r) | scoring(r) | options(r, return_documents=True),
        odd_scoring,
        names=dict(pool=r"\bpool\b"),
    )
    record(
        "pyqemb.Reranker.predict",
        reranker.predict,
        lambda r: (
            dict(pairs=pairs(r))
            | scoring(r)
            | options(r, apply_softmax=False, convert_to_numpy=True, convert_to_tensor=some(r, True, False))
        ),
        dict(pairs=bad_pairs, **odd_scoring),
        names=dict(pairs=r"\bpairs?\b", pool=r"\bpool\b"),
        fine=dict(pairs=[[], (), [[]]]),
    )
    # GradCache
    queries, documents = PackedBatch.pack([[1, 2], [3]]), PackedBatch.pack([[4], [5, 6]])
    loss = lambda q, d: (q - d).square().mean()  # noqa: E731
    grad_cache = GradCache(embedder, loss)
    bad = [value for value in BAD_BATCHES if not isinstance(value, PackedBatch)]
    record(
        "pyqemb.GradCache.step",
        grad_cache.step,
        lambda r: dict(queries=queries, documents=documents) | options(r, scale=r.random()),
        dict(
            queries=[*bad, PackedBatch.pack([])],
            documents=[*bad, PackedBatch.pack([])],
            scale=["1", None, math.nan, math.inf, True, 1j, [], HUGE],
        ),
    )
    record(
        "pyqemb.GradCache.step_stream",
        grad_cache.step_stream,
        lambda r: dict(stream=queries, loss_of=torch.sum) | options(r, scale=r.random()),
        dict(stream=bad, loss_of=[None, 5, "loss", {}], scale=["1", None, math.nan, True, 1j, []]),
    )
    for name in ("forward", "planned", "preview"):
        record(f"pyqemb.GradCache.{name}", getattr(grad_cache, name), lambda r: dict(stream=batch(r)), dict(stream=bad))
    rec = grad_cache.forward(queries)
    record(
        "pyqemb.GradCache.backward",
        grad_cache.backward,
        lambda r: dict(record=grad_cache.forward(queries), gradient_SE=torch.ones(2, 32)),
        dict(
            record=[5, None, {}, rec.embeddings],
            gradient_SE=[
                5,
                None,
                [1.0],
                torch.ones(2, 31),
                torch.ones(32),
                torch.ones(2, 32, dtype=torch.int64),
                torch.ones(2, 32, device="meta"),
            ],
        ),
    )
    record("pyqemb.GradCache.discard", grad_cache.discard, lambda r: dict(record=grad_cache.forward(queries)))
    # Data
    listed = lambda *args, **given: list(pyqemb.read_examples(*args, **given))  # noqa: E731
    listed.__wrapped__ = pyqemb.read_examples  # type: ignore[attr-defined]
    located = lambda *args, **given: list(data_example.read_located(*args, **given))  # noqa: E731
    located.__wrapped__ = data_example.read_located  # type: ignore[attr-defined]
    sources = lambda r: dict(source=some(r, PLAIN, EXAMPLES, place.file, str(place.file)))  # noqa: E731
    of_data = dict(source=DATA, split=r"\bsplits?\b", columns=r"\bcolumns?\b")
    reading = lambda r: sources(r) | options(r, columns={"query": "query"}, allow_empty=True)  # noqa: E731
    record(
        "pyqemb.read_examples",
        listed,
        reading,
        dict(source=BAD_ROWS, split=["train"], columns=BAD_COLUMNS),
        names=of_data,
    )
    record(
        "data.example.read_located",
        located,
        lambda r: reading(r) | options(r, name="rows"),
        dict(source=BAD_ROWS, split=["train"], columns=BAD_COLUMNS),
        names=of_data | {"source": f"{DATA}|rows"},
    )
    bad_names = [Path("rows.csv"), "rows.parquet", "rows.jsonl.zst", place.folder]
    path_names = dict(path=r"\bpath\b|expected a name|rows\.|at-all|folder|directory")
    record(
        "pyqemb.write_examples",
        pyqemb.write_examples,
        lambda r: dict(path=place.new(".jsonl"), examples=list(EXAMPLES)),
        dict(path=bad_names, examples=[[5], [None], [*EXAMPLES, 5], [{"query": "q"}], [Example(5, None)]]),
        fine=dict(path=["", "text", "\0"]),
        names=path_names | {"examples": "examples|Example"},
        cheap=False,
    )
    record(
        "data.example.write_rows",
        data_example.write_rows,
        lambda r: dict(path=place.new(".jsonl"), rows=list(PLAIN)),
        dict(path=bad_names, rows=[[{"a": object()}], [5]]),
        fine=dict(path=["", "text", "\0"]),
        names=path_names,
        cheap=False,
    )
    record(
        "data.example.check_output",
        data_example.check_output,
        lambda r: dict(path="a.jsonl"),
        dict(path=bad_names[:3]),
        names=path_names,
        fine=dict(path=["", "text", "\0"]),
    )
    record(
        "data.example.check_source",
        data_example.check_source,
        lambda r: dict(source=place.file),
        dict(source=["no-such", Path("no-such")]),
        names=dict(source="no-such"),
    )
    record("data.example.to_row", data_example.to_row, lambda r: dict(example=r.choice(EXAMPLES)))
    # Jobs
    record(
        "pyqemb.train",
        pyqemb.train,
        lambda r: dict(config=place.config(place.new()), data=PLAIN, progress="off") | options(r, callbacks=[]),
        dict(
            config=["no-such.toml", Path("x.ini"), place.file, place.folder],
            data=[value for value in BAD_ROWS if not callable(value)],
            evaluate=[
                5,
                [5],
                {},
                {"a": 5},
                "no-such-folder",
                [],
                {"a": {"path": "no-such"}},
                {"a": {"what": 1}},
                {"a": {"path": "p", "rows": []}},
            ],
            resume=["no-such-folder", Path("no-such-folder")],
        ),
        names=dict(
            config=r"\bconfig\b|no-such|x\.ini|pairs|expected a .toml|at-all|folder",
            data=f"{DATA}|dataset",
            evaluate=r"\beval(uate)?\b|no such|no-such|at-all|^a: expected",
            resume=r"\bresume\b|no-such|at-all",
        ),
        fine=dict(evaluate=lambda value: callable(value) or (isinstance(value, str) and not value)),
        cheap=False,
    )
    record(
        "pyqemb.sweep",
        pyqemb.sweep,
        lambda r: dict(
            config=place.config(place.new()), over={"train.seed": [r.randrange(9)]}, data=PLAIN, evaluate=PLAIN,
            progress="off",
        ),
        dict(
            config=["no-such.toml", Path("x.ini"), place.file, place.folder],
            over=[{}, {"what.x": [1]}, {"train.steps": []}, {"train.steps": [0]}],
            overrides=[["train.steps"], ["what.x=1"]],
            task=[1, 5],
        ),
        names=dict(
            config=r"\bconfig\b|no-such|x\.ini|pairs|expected a .toml|at-all|folder", over=r"\bover\b|what|steps",
            overrides=r"\boverrides\b|steps|what",
        ),
        free=dict(data="as of train", evaluate="as of train"),
        cheap=False,
    )  # fmt: skip
    record(
        "pyqemb.consolidate",
        pyqemb.consolidate,
        lambda r: dict(run=place.run, out=place.new()),
        dict(run=FOLDERS, step=[99], out=[place.model, place.file]),
        names=dict(run=rf"\brun\b|{NO_FOLDER}|checkpoint", step=r"\bstep", out=r"\bout\b"),
        cheap=False,
        fine=dict(out=[None, "text", "\0"], step=[1]),
    )
    both = [place.model, place.folder / "other"]
    record(
        "pyqemb.merge",
        pyqemb.merge,
        lambda r: (
            dict(checkpoints=both, out=place.new())
            | options(
                r, method=some(r, "slerp", "linear", "karcher"), weights=[2, 1], settings_from=both[0], base=both[0]
            )
        ),
        dict(
            checkpoints=[
                [],
                [place.model],
                [place.model, "no-such"],
                [place.model, place.saved_reranker],
                [place.model, 5],
            ],
            method=["mean", ""],
            weights=[[1], [1, 2, 3], [0, 0], [-1, 2], [math.nan, 1], ["a", 1], [True, 1]],
            base=["no-such", place.saved_reranker],
            out=[place.model, place.file],
            settings_from=["no-such", place.run],
        ),
        names=dict(
            checkpoints=rf"\bcheckpoints\b|{NO_FOLDER}|reranker",
            base=rf"\bbase\b|{NO_FOLDER}|reranker",
            out=r"\bout\b|exists|refus|folder|at-all|\bpairs",
        ),
        cheap=False,
        fine=dict(out=["text", "\0"]),
    )
    sts = [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in (("a", "b", 1), ("c", "d", 2), ("e", "a", 0))]
    record(
        "pyqemb.evaluate",
        pyqemb.evaluate,
        lambda r: (
            dict(model=some(r, embedder, place.model), folder=some(r, sts, PLAIN), bootstrap=r.randint(0, 3))
            | options(r, instruction="task", dim=r.randint(1, 32), seed=r.randrange(9))
        ),
        dict(model=[*models, *FOLDERS], folder=[*BAD_ROWS, "no-such"], dim=[33], split=["train"], columns=BAD_COLUMNS),
        names=dict(
            model=rf"\bmodel\b|{NO_FOLDER}", folder=f"{DATA}|evaluate", split=r"\bsplits?\b", columns=r"\bcolumns?\b"
        ),
        cheap=False,
    )
    record(
        "pyqemb.mine",
        pyqemb.mine,
        lambda r: (
            dict(model=embedder, examples=some(r, PLAIN, EXAMPLES))
            | options(
                r,
                corpus=["more"],
                k=r.randint(1, 3),
                margin=0.1,
                max_score=0.9,
                mean_margin=0.1,
                skip_top=r.randint(0, 2),
                depth=r.randint(9, 20),
                sampling=some(r, "top", "random", "softmax"),
                sampling_temperature=0.1,
                seed=r.randrange(9),
                instruction="task",
            )
        ),
        dict(
            model=models,
            examples=BAD_ROWS,
            columns=BAD_COLUMNS,
            k=[101],
            max_positive_ratio=[0, -1, 3],
            depth=lambda given: [given.get("k", 7) - 1],
            sampling_temperature=[0, -1],
            sampling=["best"],
            cache=[place.file],
            approximate=["no such index"],
            corpus=[["a", 5], Stream([5])],
        ),
        names=dict(examples=DATA, columns=r"\bcolumns?\b", cache=r"\bcache\b|pairs|at-all|text|null", k=r"\bk\b"),
        cheap=False,
        fine=dict(cache=["", "text", "\0"], approximate=[""], corpus=[None]),
    )
    curated = dict(input=[PLAIN], step=[{"kind": "exact"}])
    record(
        "pyqemb.curate",
        pyqemb.curate,
        lambda r: dict(config=dict(curated, out=some(r, str, Path)(place.new()))),
        dict(
            config=lambda given: [
                *(
                    Named({**given["config"], key: value}, key)
                    for key in ("input", "step", "out", "samples", "seed", "split", "columns")
                    for value in (0.5, [], object(), {"a": 5}, [5])
                    if (key, value) != ("input", [5])
                ),
                *(Named({**given["config"], "input": value}, "input") for value in (5, None, b"rows", {}, [None], int)),
                Named({**given["config"], "input": "no-such"}, "no-such"),
                Named({**given["config"], "samples": -1}, "samples"),
                Named({**given["config"], "what": 1}, "what"),
                Named({"input": [PLAIN]}, "out|step"),
                Named({**given["config"], "step": [{"kind": "none"}]}, "step"),
                Named({**given["config"], "step": [{"kind": "similarity", "model": 5}]}, "model"),
                Named({**given["config"], "step": [{"kind": "length", "min_characters": -5}]}, "min_characters|step"),
            ]
        ),
        names=dict(config=r"\bconfig\b|missing|input|out|step"),
        cheap=False,
    )
    record(
        "pyqemb.synthesize",
        pyqemb.synthesize,
        lambda r: dict(config=SynthesisConfig(passages=place.file, out=place.new(), endpoint={"model": "m"})),
        dict(
            config=[
                Named({"passages": "p"}, "out|endpoint"),
                Named({"passages": "p", "out": "o", "endpoint": {}}, "model"),
                Named({"passages": "no-such", "out": str(place.out / "o"), "endpoint": {"model": "m"}}, "no-such"),
                Named({"passages": 5, "out": "o", "endpoint": {"model": "m"}}, "passages"),
                Named({"passages": "p", "out": "o", "endpoint": {"model": "m"}, "tasks": {"x": 1}}, "tasks"),
            ]
        ),
        names=dict(config=r"\bconfig\b|missing"),
        cheap=False,
    )
    found["pyqemb.synthesize"].call = without_server(pyqemb.synthesize)
    record(
        "encoding.encode_file",
        encode_file,
        lambda r: (
            dict(model=place.model, path=place.texts, out=place.new(".npy"))
            | options(
                r,
                dim=r.randint(1, 32),
                precision=some(r, "float32", "binary"),
                max_length=r.randint(2, 9),
                rows_per_part=r.randint(1, 9),
                devices=["cpu"],
            )
        ),
        dict(
            model=FOLDERS,
            path=["no-such", place.folder, place.model / "config.json"],
            out=["a.txt", place.folder, "a"],
            instruction=["task"],
            field=["absent"],
            dim=[33],
            dtype=DTYPES[:4],
            devices=[[], ["gpu?"], ["cpu", ""]],
        ),
        names=dict(
            model=rf"\bmodel\b|{NO_FOLDER}",
            path=r"\bpath\b|no such|unknown format|at-all|expected a text|json:1",
            out=r"\bout\b|expected a name",
            devices=r"\bdevices?\b",
            field=r"\bfield\b|'absent'",
        ),
        fine=dict(field=lambda value: isinstance(value, str)),
        cheap=False,
    )
    filtering = lambda r: dict(model=embedder, examples=EXAMPLES[:4]) | options(r, instruction="task")  # noqa: E731
    bad_examples = [[5], [None], [*EXAMPLES, {}], [{"query": "q", "positive": "p"}]]
    record(
        "curation.consistency",
        consistency,
        lambda r: filtering(r) | options(r, top=r.randint(1, 3), pool=["more"]),
        dict(model=models, examples=bad_examples, pool=[["a", 5]]),
        cheap=False,
    )
    record(
        "curation.similarity",
        similarity,
        lambda r: filtering(r) | options(r, min_sim=0.1, max_sim=0.9),
        dict(model=models, examples=bad_examples, max_sim=lambda given: [given.get("min_sim", 0.7) - 0.1]),
        cheap=False,
    )
    record("curation.distinct", distinct, lambda r: dict(examples=EXAMPLES[:4]), dict(examples=bad_examples))
    # Evaluation
    task = dict(queries={"q": "a"}, corpus={"d": "b"}, qrels={"q": {"d": 1.0}})
    record(
        "evaluation.Retrieval",
        Retrieval,
        lambda r: dict(task) | options(r, instructions={"q": "task"}),
        dict(qrels=[{"x": {"d": 1}}, {"q": {"d": "1"}}, {"q": {"d": math.nan}}, {"q": 5}], instructions=[{"x": "a"}]),
        fine=dict(qrels=[{}]),
    )
    record(
        "evaluation.Sts",
        Sts,
        lambda r: dict(first=["a", "b"], second=["c", "d"], scores=[1.0, r.random()]),
        dict(first=[["a"], []], second=[["a"], []], scores=[[1.0], [1.0, math.nan], [1.0, "a"]]),
        names=dict(first=r"\b(first|second)\b"),
    )
    record(
        "evaluation.Bitext",
        Bitext,
        lambda r: dict(first=["a", "b"], second=["c", "d"]),
        dict(first=[["a"], []], second=[["a"], []]),
        names=dict(first=r"\b(first|second)\b"),
    )
    section = place.config(place.out / "never").eval
    record(
        "evaluation.DevSets",
        DevSets,
        lambda r: dict(section=section, datasets={"a": sts, "b": PLAIN}),
        dict(
            section=[None, 5, {}, "eval", object()],
            task=["x"],
            datasets=[5, {}, {"a": 5}, {"a": {"what": 1}}, {"a": {"path": "p", "rows": []}}, "no-such", [], [5]],
        ),
        names=dict(datasets=rf"\bdatasets?\b|evaluate|no-such|{DATA}"),
        cheap=False,
    )
    matrix = lambda r, count: vectors(r, count, 4).numpy()  # noqa: E731
    odd = [
        np.zeros(4),
        np.zeros((2, 3)),
        np.zeros((2, 4), dtype=np.int64),
        np.zeros((2, 4), dtype=complex),
        np.zeros((1, 2, 4)),
        np.array([["a"] * 4]),
    ]
    record(
        "evaluation.rank",
        rank,
        lambda r: (
            dict(query_vectors=matrix(r, 2), document_vectors=matrix(r, 3))
            | options(r, k=r.randint(1, 5), exclude=np.array([[0], [-1]]), device="cpu")
        ),
        dict(
            query_vectors=odd,
            document_vectors=odd,
            exclude=[
                np.zeros(2),
                np.zeros((2, 1)),
                np.zeros((3, 1), dtype=np.int64),
                np.full((2, 1), 7),
                np.full((2, 1), -2),
            ],
            device=DEVICES,
        ),
        names=dict(query_vectors=r"query_vectors|document_vectors"),
    )
    retrieval = Retrieval(**task)
    record(
        "evaluation.retrieve",
        retrieve,
        lambda r: dict(model=embedder, task=retrieval) | options(r, instruction="task", dim=r.randint(1, 32)),
        dict(model=models, dim=[33]),
        cheap=False,
    )
    record(
        "evaluation.score_rankings",
        score_rankings,
        lambda r: dict(rankings={"q": ["d"]}, qrels={"q": {"d": 1.0}}),
        dict(
            rankings=[{}, {"x": ["d"]}, {"q": "d"}, {"q": 5}],
            qrels=[{"q": {"d": "1"}}, {"q": {"d": math.nan}}, {"q": 5}],
        ),
        fine=dict(qrels=[{}]),
    )
    # Language models
    answer, request = Answer('{"model": "m"}'), Request((("user", "text"),))
    record("llm.Answer", Answer, lambda r: dict(text="text") | options(r, finish="stop", prompt_tokens=3, refusal="no"))
    record(
        "llm.Request",
        Request,
        lambda r: dict(messages=(("user", "text"),)) | options(r, seed=3, schema={}),
        dict(messages=[[("user",)], [("a", "b", "c")], [("a", 5)], "ab"]),
    )
    record("llm.parse", parse, lambda r: dict(answer=answer, kind=Endpoint), dict(kind=[int, Answer]))
    endpoint = Endpoint(model="m")
    record("llm.Asker", Asker, lambda r: dict(endpoint=endpoint, store=place.store))
    record(
        "llm.Store",
        closed(Store),
        lambda r: dict(path=place.new(".sqlite")),
        dict(path=[place.folder, place.file]),
        names=dict(path=r"\bpath\b|cannot be used|at-all|directory|null|pairs"),
        cheap=False,
        fine=dict(path=["", "text"]),
    )
    record("llm.Store.get", place.store.get, lambda r: dict(key="key"))
    record(
        "llm.Store.put",
        place.store.put,
        lambda r: dict(key="key", request={"a": 1}, answer=answer),
        dict(request=[{"a": object()}]),
    )
    record(
        "llm.run_in_order",
        collected(run_in_order),
        lambda r: dict(items=[1, 2], work=twice, window=r.randint(1, 3)),
        fine=dict(items=lambda value: isinstance(value, Tensor | np.ndarray)),
    )
    # Adapters and quantization
    record(
        "model.lora.LoraConfig",
        lora.LoraConfig,
        lambda r: options(r, rank=r.randint(1, 9), alpha=2.0, dropout=0.1, targets=("q_proj",), rank_stabilized=True),
        dict(rank=[0, -1], targets=[(), ("x",), ["x"]], dropout=[1, -0.1, 1.5]),
    )
    fresh = lambda: tiny_embedder().model  # noqa: E731
    adapted = fresh()
    lora.add_lora(adapted, lora.LoraConfig(rank=2))
    record(
        "model.lora.add_lora",
        lora.add_lora,
        lambda r: dict(model=fresh(), config=lora.LoraConfig(rank=2)) | options(r, seed=3),
        dict(model=[adapted]),
        names=dict(model=r"\bmodel\b"),
        cheap=False,
    )
    record("model.lora.reset_lora", lora.reset_lora, lambda r: dict(model=adapted) | options(r, seed=3), cheap=False)
    record("model.lora.adapted", lora.adapted, lambda r: dict(model=adapted))
    record("model.lora.merge_lora", lora.merge_lora, lambda r: dict(model=fresh()))
    record("model.lora.MergedParameters", lora.MergedParameters, lambda r: dict(model=adapted))
    record(
        "model.lora.save_adapter",
        lora.save_adapter,
        lambda r: dict(model=adapted, folder=place.new()) | options(r, base="b", dtype=torch.bfloat16),
        dict(model=[decoder], folder=[place.file, place.model], task_type=["X", ""], dtype=DTYPES[4:]),
        names=dict(model=r"\bmodel\b", folder=r"\bfolder\b|exists|at-all|refus"),
        fine=dict(folder=["", "text", "\0"]),
        cheap=False,
    )
    record(
        "model.lora.load_adapter",
        lora.load_adapter,
        lambda r: dict(model=fresh(), folder=place.adapters[0]),
        dict(model=[adapted], folder=[*FOLDERS, place.model]),
        names=dict(folder=rf"\bfolder\b|{NO_FOLDER}|adapter"),
        cheap=False,
    )
    record(
        "model.lora.read_adapter",
        lora.read_adapter,
        lambda r: dict(folder=place.adapters[0]),
        dict(folder=[*FOLDERS, place.model]),
        names=dict(folder=rf"\bfolder\b|{NO_FOLDER}|adapter"),
    )
    record(
        "model.lora.merge_adapters",
        lora.merge_adapters,
        lambda r: dict(folders=place.adapters, out=place.new()) | options(r, weights=[0.5, -1], rank=r.randint(1, 4)),
        dict(
            folders=[[], place.adapters[:1], [place.adapters[0], "no-such"]],
            weights=[[1], [math.nan, 1], [1, 2, 3]],
            out=[place.file, place.model],
        ),
        names=dict(folders=rf"\b(folders|adapters?)\b|{NO_FOLDER}", out=r"\bout\b|exists|refus|at-all"),
        cheap=False,
        fine=dict(out=["", "text", "\0"]),
    )
    odd_vectors = [np.zeros(4), np.zeros((2, 4), dtype=np.int64), np.array([["a"]]), np.zeros((1, 2, 4)), np.array(5.0)]
    record(
        "model.quantize.quantize",
        quantize.quantize,
        lambda r: dict(vectors_NE=matrix(r, 3), precision=some(r, "float32", "int8", "binary")),
        dict(vectors_NE=odd_vectors, precision=["int4", ""]),
    )
    record(
        "model.quantize.quantize ranges",
        lambda ranges_2E: quantize.quantize(np.zeros((2, 4), dtype=np.float32), "int8", ranges_2E),
        lambda r: dict(ranges_2E=np.zeros((2, 4))),
        dict(
            ranges_2E=[5, "text", np.zeros(4), np.zeros((2, 3)), np.full((2, 4), math.nan), np.array([["a"] * 4] * 2)]
        ),
    )
    codes = np.zeros((2, 4), dtype=np.uint8)
    record(
        "model.quantize.dequantize",
        quantize.dequantize,
        lambda r: dict(codes=codes, precision="uint8", dim=4, ranges_2E=np.zeros((2, 4))),
        dict(
            codes=[codes[0], codes.astype(np.int8), codes[:, :3].astype(np.float32)],
            precision=["int4", "", "int8", "float32"],
            dim=[3, 5],
            ranges_2E=[None, np.zeros(4), np.zeros((2, 3)), np.full((2, 4), math.nan), np.array([["a"] * 4] * 2)],
        ),
        names=dict(precision=r"\bprecision\b|\bcodes\b", dim=r"\bdim\b|ranges"),
    )
    record(
        "model.quantize.check_precision",
        quantize.check_precision,
        lambda r: dict(precision="int8"),
        dict(precision=["int4", ""]),
    )
    record("model.quantize.bytes_per_vector", quantize.bytes_per_vector, lambda r: dict(precision="int8", dim=3))
    record(
        "evaluation.compare_storage",
        compare_storage,
        lambda r: dict(model=embedder, folder=PLAIN, dims=[r.randint(1, 32)], precisions=["int8"], bootstrap=0)
        | options(r, rescore=3, seed=r.randrange(9), instruction="task"),
        dict(
            model=[*models, *FOLDERS, reranker],
            folder=[*BAD_ROWS, "no-such"],
            dims=[[], [0], [33], [True], ["8"]],
            precisions=[[], ["int4"], "int8"],
            split=["train"],
            columns=BAD_COLUMNS,
        ),
        names=dict(
            model=rf"\bmodel\b|{NO_FOLDER}", folder=f"{DATA}|evaluate", dims=r"\bdims?\b",
            precisions=r"\bprecisions?\b", split=r"\bsplits?\b", columns=r"\bcolumns?\b",
        ),
        cheap=False,
    )  # fmt: skip
    record(
        "model.quantize.value_ranges",
        quantize.value_ranges,
        lambda r: dict(vectors_NE=matrix(r, 3)),
        dict(vectors_NE=odd_vectors),
    )
    record(
        "interop.verify.verify",
        interop_verify.verify,
        lambda r: dict(folder=place.model),
        dict(folder=FOLDERS),
        names=dict(folder=rf"\bfolder\b|{NO_FOLDER}"),
        cheap=False,
    )
    record("interop.verify.run_check", interop_verify.run_check, lambda r: dict(name="name", check=lambda: "fine"))
    record(
        "interop.verify.compared",
        interop_verify.compared,
        lambda r: dict(name="name", pairs=[(np.zeros(2), np.ones(2))]),
        dict(pairs=[[5], [(np.zeros(2),)], [(np.zeros(2), "a")]]),
    )
    record(
        "interop.verify.open_sentence_transformer",
        without_library(interop_verify.open_sentence_transformer),
        lambda r: dict(folder=place.model),
    )
    # Configuration
    of_stage = training_config.ParallelSection(shard=2)
    record(
        "training.config.ParallelSection.mesh",
        of_stage.mesh,
        lambda r: dict(ranks=2 * r.randint(1, 3)),
        dict(ranks=[3, 0]),
    )
    record(
        "training.config.with_data",
        training_config.with_data,
        lambda r: dict(config=place.config(place.out / "never"), data=PLAIN),
        dict(data=[None, [], {}]),
        names=dict(data=r"\bdata\b"),
    )
    record("training.callbacks.base.StepFunction", StepFunction, lambda r: dict(on_step=print))
    record("training.objectives.base.LossParameters", LossParameters, lambda r: dict(section=EmbeddingSection()))
    record("llm.Request.body", request.body, lambda r: dict(endpoint=endpoint))
    record("llm.Request.key", request.key, lambda r: dict(endpoint=endpoint))
    record(
        "model.lora.MergedParameters.shape",
        lora.MergedParameters(adapted).shape,
        lambda r: dict(name=next(iter(lora.MergedParameters(adapted)))),
        dict(name=["", "absent"]),
    )
    record(
        "data.settings.Settings.from_file",
        CurateConfig.from_file,
        lambda r: dict(path=curation_file(place)) | options(r, overrides={"samples": 3}),
        dict(
            path=["no-such.toml", "x.ini", place.file],
            overrides=[Named({"samples": -1}, "samples"), Named({"what": 1}, "what")],
        ),
        names=dict(path=r"\bpath\b|no-such|x\.ini|expected a .toml|at-all|no such"),
        fine=dict(overrides=[{}]),
    )
    # Configuration
    record(
        "training.load_config",
        training.load_config,
        lambda r: dict(path=config_file(place)) | options(r, overrides=["train.steps=3"]),
        dict(
            path=["no-such.toml", "x.ini", place.file, place.folder],
            overrides=[
                Named(["train.steps"], "train.steps"),
                Named(["train.steps=x"], "steps"),
                Named(["what.is=1"], "what"),
                Named(["=1"], "=1"),
                Named(["train.steps=["], "train.steps"),
                ["train.steps=3", 5],
            ],
        ),
        names=dict(path=r"\bpath\b|no-such|x\.ini|expected a .toml|at-all|no such"),
        fine=dict(overrides=[[], ()]),
    )
    for name in ("stage1", "stage2"):
        record(
            f"pyqemb.{name}",
            one_section(getattr(pyqemb, name)),
            lambda r: dict(sections={"model": {"base": "b"}}),
            dict(
                sections=[
                    Named({"model": {"base": "b"}, **more}, pattern)
                    for more, pattern in (
                        ({"x": {}}, "x"),
                        ({"model": 5}, "model"),
                        ({"train": 5}, "train"),
                        ({"train": {"steps": -1}}, "steps"),
                        ({"train": {"stepz": 1}}, "stepz"),
                        ({"save": []}, "save"),
                        ({"loss": {"temperature": math.nan}}, "temper"),
                    )
                ]
            ),
            target=f"training.config.{name}",
        )
    record(
        "training.register_objective",
        training.register_objective,
        lambda r: dict(objective=Own),
        dict(objective=[None, 5, "x", int, Objective, object()]),
    )
    loss_section = training_config.LossSection()
    record(
        "training.Objective",
        Own,
        lambda r: dict(loss=loss_section) | options(r, parameters=LossParameters(loss_section)),
        dict(loss=[None, 5, {}, "x"], parameters=[5, {}, "x"]),
        target="training.objectives.base.Objective",
    )
    model_base = {"base": "b"}
    for kind, base in (
        (training_config.ModelSection, model_base),
        (training_config.DataSet, {"path": "p"}),
        (training_config.LoraSection, {}),
        (training_config.TeacherSection, {"model": "m"}),
        (training_config.LossSection, {}),
        (training_config.TrainSection, {}),
        (training_config.ParallelSection, {}),
        (training_config.EvalSection, {}),
        (training_config.SaveSection, {}),
        (training_config.LogSection, {}),
        (training_config.EvalDataset, {"path": "p"}),
        (training_config.TrainConfig, {"model": model_base}),
        (InfoNCESection, {}),
        (GroupSection, {}),
        (DistillationSection, {}),
        (EmbeddingSection, {}),
        (Endpoint, {"model": "m"}),
        (CurateConfig, {"input": ["p"], "out": "o", "step": [{"kind": "exact"}]}),
        (SynthesisConfig, {"passages": "p", "out": "o", "endpoint": {"model": "m"}}),
    ):
        in_memory = ["input"] if kind is CurateConfig else []  # rows too; curate checks them
        paths = ["path"] if kind is training_config.DataSet else []
        found[f"settings {kind.__name__}"] = settings_record(kind, base, in_memory, paths)
    ops_tests = place.ops_tests
    for name in ops_tests.catalogue():
        found[f"op {name}"] = OpRecord(name, ops_tests)
        found[f"op {name}"].target = key_of(inspect.unwrap(ops_tests.catalogue()[name].call))
    return found


class Stream:
    """An iterable without a length, again and again."""

    def __init__(self, items: list[Any]):
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


class Own(Objective):
    """An objective of a user."""

    name = "own of the harness"

    def loss(self, batch, queries_BE, documents_ME, rows):
        raise NotImplementedError


HUGE = 10**400


async def twice(item: int) -> int:
    return 2 * item


def config_file(place: Place) -> Path:
    path = place.folder / "run.toml"
    if not path.exists():
        path.write_text('[model]\nbase = "b"\n[train]\nsteps = 2\n')
    return path


def curation_file(place: Place) -> Path:
    path = place.folder / "curate.toml"
    path.write_text('input = ["p"]\nout = "o"\nstep = [{kind = "exact"}]\n')
    return path


def like(function: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with the signature of `function`."""
    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


def awaited(function: Callable[..., Any]) -> Callable[..., Any]:
    return like(function, lambda **given: asyncio.run(function(**given)))


def closed(kind: Callable[..., Any]) -> Callable[..., Any]:
    return like(kind, lambda **given: kind(**given).close())


def collected(function: Callable[..., Any]) -> Callable[..., Any]:
    async def collect(**given: Any) -> list[Any]:
        return [item async for item in function(**given)]

    return like(function, lambda **given: asyncio.run(collect(**given)))


def one_section(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(sections: Any) -> Any:
        return function(**sections)

    return call


def without_processes(model: Any) -> Callable[..., Any]:
    """start_multi_process_pool, without the valid call, which takes seconds; tests/model makes it."""

    def call(target_devices: Any) -> Any:
        return (
            None
            if type(target_devices) is list and target_devices == ["cpu"]
            else model.start_multi_process_pool(target_devices)
        )

    return like(model.start_multi_process_pool, call)


def pushed(model: Any) -> Callable[..., Any]:
    """push_to_hub up to the point where it would use the network."""

    def call(**given: Any) -> Any:
        try:
            model.push_to_hub(**given)
        except pyqemb.errors.ConfigError as error:
            if given.get("repo_id") != "org/name" or "token" not in str(error):
                raise

    return like(model.push_to_hub, call)


def without_library(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose valid call opens a model in another library, which the tests of that library do."""

    def call(folder: Any) -> Any:
        return None if isinstance(folder, Path) else function(folder)

    return like(function, call)


def without_server(function: Callable[..., Any]) -> Callable[..., Any]:
    """A synthesis whose valid call ends at the server that does not exist."""

    def call(config: Any, **given: Any) -> Any:
        if isinstance(config, SynthesisConfig) and not given:
            return None
        return function(config, **given)

    return like(function, call)


class OpRecord(Record):
    """An op of tests/ops/test_arguments.py, with the rules of that file."""

    def __init__(self, name: str, ops_tests: Any):
        self.name, self.tests = name, ops_tests
        super().__init__(self._call, self._make)

    def _make(self, r: Random) -> dict[str, Any]:
        self.op = self.tests.catalogue(r.randrange(1000))[self.name]
        return self.op.arguments

    def _call(self, **given: Any) -> Any:
        return self.op(**given)

    def parameters(self) -> list[str]:
        return list(self.tests.catalogue()[self.name].rules)

    def broken(self, arguments: Any) -> list[tuple[str, Any, str]]:
        return [(name, value, rf"\b{name}\b") for name, value in self.tests.broken_calls(self.op)]


# Public, and nothing that callers give arguments to.
RESULTS = {
    "Adapter",
    "AttentionPlan",
    "Check",
    "Curated",
    "Example",
    "Filtered",
    "LossPart",
    "MalformedAnswerError",
    "MergeReport",
    "Mined",
    "Section",
    "SweepReport",
    "SweepRun",
    "Synthesis",
    "Synthesis.report",
    "TrainInfo",
    "TrainResult",
}
# The trainer calls them: hooks and methods that users override, and the parts of losses.
HOOKS = ("Callback.", "StepFunction.", "RowLogger", "Objective.", "zero_of", "number", "positive_totals")
# Methods that the jobs of pyqemb call on each other, as in tests/docs/test_docstrings.py.
INTERNAL = {
    "check_dim",
    "encode_windows",
    "encoding_on",
    "in_processes",
    "load_rows",
    "save_parameters",
    "without_weights",
    "write_portable",
    "overridden",
    "uses_average",
}
# Any value is data, and the functions that read it check it.
ANY = {"as_data"}
# mteb calls their methods; tests/interop/test_mteb.py makes the broken calls of the rest.
MTEB = "interop.mteb."


def key_of(item: Any) -> str:
    """The module and the name of a function, class or method, the same for all places that show it."""
    function = inspect.unwrap(item)
    return f"{function.__module__.removeprefix('pyqemb.')}.{function.__qualname__}"


def is_exempt(key: str, item: Any) -> bool:
    name = key.rpartition(".")[2]
    short = key[re.match(r"[a-z_.0-9]*", key).end() :] or name  # "Callback.on_save" of a class, "merge" of a module
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    parameters = [
        each for each in inspect.signature(item).parameters.values() if each.name != "self" and each.kind not in kinds
    ]
    return (
        key.startswith(MTEB)
        or short in RESULTS
        or short.startswith(HOOKS)
        or name in INTERNAL | ANY
        or not (parameters or key.endswith(("stage1", "stage2")))
    )


def public_names() -> dict[str, Any]:
    """Every public function, class and method: what the packages list and what docs/reference shows."""
    root = Path(pyqemb.__file__).parents[1]
    found: dict[str, Any] = {}
    for home in ("pyqemb", "ops", "curation", "encoding", "evaluation", "llm", "merging", "synthesis", "training"):
        module = pyqemb if home == "pyqemb" else importlib.import_module(f"pyqemb.{home}")
        names = getattr(module, "__all__", None) or [
            name for name, item in vars(module).items() if not name.startswith("_") and hasattr(item, "__qualname__")
        ]
        found |= {f"{home}.{name}": getattr(module, name) for name in names if name != "__version__"}
    for page in ("models", "ops", "training"):
        for line in (root / "docs" / "reference" / f"{page}.md").read_text().splitlines():
            if line.startswith(":::"):
                found |= documented(line.removeprefix(":::").strip())
    for name, item in list(found.items()):
        if inspect.isclass(item) and not issubclass(item, Exception | tuple):
            for method, member in inspect.getmembers(item, inspect.isroutine):
                if not method.startswith("_") and (member.__module__ or "").startswith("pyqemb."):
                    found[f"{name}.{method}"] = member
    return {key_of(item): item for item in found.values()}


def documented(target: str) -> dict[str, Any]:
    """What an entry `::: pyqemb.x.y` shows: an object, or the public names of a module."""
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError:
        home, _, name = target.rpartition(".")
        return {target.removeprefix("pyqemb."): getattr(importlib.import_module(home), name)}
    short = target.removeprefix("pyqemb.")
    return {
        f"{short}.{name}": item
        for name, item in vars(module).items()
        if not name.startswith("_") and getattr(item, "__module__", "") == target and callable(item)
    }
