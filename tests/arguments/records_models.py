"""Records of models: Embedder, Reranker, and the checks of their folders."""

import asyncio
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from arguments_place import (
    BAD_BATCHES,
    BATCH,
    DEVICES,
    DTYPES,
    FOLDERS,
    NO_FOLDER,
    ODD_ARRAYS,
    Place,
    Records,
    batch,
    like,
    options,
    pairs,
    some,
    texts,
    vectors,
)

import pyqemb
from pyqemb.data.batch import PackedBatch
from pyqemb.data.pairs import PairTokenizer
from pyqemb.interop import verify as interop_verify
from pyqemb.model.embedder import Embedder
from pyqemb.model.reranker import Reranker
from pyqemb.testing.tiny import TEXTS, answering_tokenizer, tiny_config, tiny_embedder, tiny_tokenizer

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


def awaited(function: Callable[..., Any]) -> Callable[..., Any]:
    return like(function, lambda **given: asyncio.run(function(**given)))


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


def add(records: Records, place: Place) -> None:
    record = records.record
    embedder, reranker = place.embedder, place.reranker
    decoder, tokenizer = place.embedder.model, place.embedder.tokenizer
    backend = answering_tokenizer
    record(
        "pyqemb.Embedder",
        Embedder,
        lambda r: (
            dict(model=decoder, tokenizer=tokenizer)
            | options(r, pooling=some(r, "last", "mean"), prompts={"query": "q: "}, matryoshka=[16, 8])
        ),
        dict(pooling=["max", "lasttoken", ""], matryoshka=[[64], [0], [33]]),
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
