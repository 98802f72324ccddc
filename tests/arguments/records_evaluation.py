"""Records of evaluation."""

import math

import numpy as np
from arguments_place import (
    BAD_COLUMNS,
    BAD_ROWS,
    DATA,
    DEVICES,
    FOLDERS,
    NO_FOLDER,
    NO_MODELS,
    PLAIN,
    Place,
    Records,
    matrix,
    options,
    some,
)

import pyqemb
from pyqemb.evaluation import Bitext, DevSets, Retrieval, Sts, compare_storage, rank, retrieve, score_rankings


def add(records: Records, place: Place) -> None:
    record = records.record
    embedder, reranker = place.embedder, place.reranker
    sts = [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in (("a", "b", 1), ("c", "d", 2), ("e", "a", 0))]
    record(
        "pyqemb.evaluate",
        pyqemb.evaluate,
        lambda r: (
            dict(model=some(r, embedder, place.model), folder=some(r, sts, PLAIN), bootstrap=r.randint(0, 3))
            | options(r, instruction="task", dim=r.randint(1, 32), seed=r.randrange(9))
        ),
        dict(
            model=[*NO_MODELS, *FOLDERS], folder=[*BAD_ROWS, "no-such"], dim=[33], split=["train"], columns=BAD_COLUMNS
        ),
        names=dict(
            model=rf"\bmodel\b|{NO_FOLDER}", folder=f"{DATA}|evaluate", split=r"\bsplits?\b", columns=r"\bcolumns?\b"
        ),
        cheap=False,
    )
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
        dict(model=NO_MODELS, dim=[33]),
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
    record(
        "evaluation.compare_storage",
        compare_storage,
        lambda r: dict(model=embedder, folder=PLAIN, dims=[r.randint(1, 32)], precisions=["int8"], bootstrap=0)
        | options(r, rescore=3, seed=r.randrange(9), instruction="task"),
        dict(
            model=[*NO_MODELS, *FOLDERS, reranker],
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
