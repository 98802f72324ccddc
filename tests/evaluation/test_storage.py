"""Stored vectors: truncated, quantized, ordered again."""

import json

import numpy as np
import pytest

from pyqemb.cli import main
from pyqemb.errors import ConfigError
from pyqemb.evaluation import compare_storage, evaluate
from pyqemb.evaluation.storage import Storage, rescored
from pyqemb.model.quantize import bytes_per_vector, dequantize, quantize, value_ranges
from pyqemb.testing.tiny import tiny_embedder, write_tiny_folder

QUANTIZED = ("int8", "uint8", "binary", "ubinary")
ROWS = [{"query": f"how do I {verb}?", "positive": f"choose {verb} in the menu"} for verb in ("print", "save", "undo")]


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_bytes_represent_the_vectors_to_half_a_step(precision):
    vectors = unit(300, 45)
    vectors[:, 7] = 0.25  # a feature without a range
    ranges = value_ranges(vectors)
    back = dequantize(quantize(vectors, precision, ranges), precision, 45, ranges)
    assert back.dtype == np.float32
    # The maximum of a feature has a code of its own, whose middle is half a step above it.
    assert np.abs(back - vectors).max() <= 0.5001 * (ranges[1] - ranges[0]).max() / 255
    assert np.allclose(back[:, 7], 0.25)


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_the_dot_product_of_bits_is_their_hamming_distance(precision):
    vectors = unit(40, 21)
    signs = dequantize(quantize(vectors, precision), precision, 21)
    assert np.array_equal(signs, np.where(vectors > 0, 1, -1))
    bits = vectors > 0
    hamming = (bits[:, None] != bits[None]).sum(axis=-1)
    assert np.array_equal(signs @ signs.T, 21 - 2 * hamming)


def slow_search(queries, documents, storage, k, exclude):
    """The definition, query by query in float64."""
    ranges = value_ranges(documents) if "int8" in storage.precision else None
    stored = [
        dequantize(quantize(x, storage.precision, ranges), storage.precision, x.shape[1], ranges).astype(np.float64)
        for x in (queries, documents)
    ]
    rows = []
    for query, stored_query, own in zip(queries, stored[0], exclude, strict=True):
        scores = stored[1] @ stored_query
        found = [i for i in np.lexsort((np.arange(len(scores)), -scores)) if i not in own]
        head = found[: storage.rescore]
        if storage.rescore is not None:
            head = sorted(head, key=lambda i: (-float(stored[1][i] @ query.astype(np.float64)), i))
            found = head + found[storage.rescore :]
        rows.append((found + [-1] * len(documents))[:k])
    return np.array(rows)


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("rescore", [None, 1, 7, 30, 1000])
def test_searches_are_those_of_the_definition(precision, rescore):
    queries, documents = unit(20, 33, seed=1), unit(50, 33)
    exclude = np.where(np.arange(20) % 3 == 0, np.arange(20), -1)[:, None]
    storage = Storage(precision, rescore)
    for k in (1, 12, 50):
        scores, indices = storage.search(queries, documents, k, exclude)
        assert scores.shape == indices.shape == (20, k)
        assert np.array_equal(indices, slow_search(queries, documents, storage, k, exclude))


def test_missing_documents_stay_last():
    documents = unit(3, 8)
    scores, indices = rescored(unit(2, 8, seed=1), documents, np.array([[2, -1, 0], [-1, -1, 1]]))
    assert indices[:, -1].tolist() == [-1, -1]
    assert indices[1].tolist() == [1, -1, -1]
    assert np.isneginf(scores[indices < 0]).all()


def test_the_table_has_the_values_of_single_evaluations(tmp_path):
    model = tiny_embedder()
    table = compare_storage(model, ROWS, dims=[None, 8], precisions=["float32", "int8", "binary"], rescore=2)
    assert [(row["dim"], row["precision"], row["rescore"], row["bytes_per_vector"]) for row in table] == [
        (32, "float32", None, 128), (32, "int8", None, 32), (32, "int8", 2, 32), (32, "binary", None, 4),
        (32, "binary", 2, 4), (8, "float32", None, 32), (8, "int8", None, 8), (8, "int8", 2, 8), (8, "binary", None, 1),
        (8, "binary", 2, 1),
    ]  # fmt: skip
    for row in table:
        dim = None if row["dim"] == 32 else 8
        single = evaluate(model, ROWS, dim=dim, precision=row["precision"], rescore=row["rescore"])
        assert single["metrics"] == row["metrics"]
        assert single["per_query"] == row["per_query"]


def test_quantization_changes_graded_pairs():
    """Every metric uses the stored vectors."""
    model = tiny_embedder()
    rows = [{"sentence1": f"text {i}", "sentence2": f"{'word ' * i}end", "score": i} for i in range(12)]
    exact, bits = (evaluate(model, rows, precision=p)["metrics"]["pearson"]["value"] for p in ("float32", "binary"))
    assert exact != bits


def test_the_command_prints_a_table(tmp_path, capsys):
    write_tiny_folder(tmp_path / "model")
    data = tmp_path / "dev.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["evaluate", str(tmp_path / "model"), str(data), "--bootstrap", "0"]
    report = tmp_path / "report.json"
    assert (
        main([*command, "--dim", "16,8", "--precision", "float32,ubinary", "--rescore", "3", "--json", str(report)])
        == 0
    )
    assert "ndcg@10" in capsys.readouterr().out
    assert [(row["dim"], row["precision"], row["rescore"]) for row in json.loads(report.read_text())] == [
        (16, "float32", None), (16, "ubinary", None), (16, "ubinary", 3),
        (8, "float32", None), (8, "ubinary", None), (8, "ubinary", 3),
    ]  # fmt: skip
    assert main([*command, "--precision", "int8", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["count"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int4"], "precision must be 'float32', 'int8', 'uint8', 'binary' or 'ubinary', got 'int4'"),
        (["--precision", "float32,int4"], "got 'int4'"),
        (["--rescore", "5"], "rescore needs a quantized precision"),
        (["--precision", "int8", "--rescore", "0"], "rescore must be at least 1, got 0"),
        (["--dim", "0,8"], "dims[0] must be at least 1, got 0"),
        (["--dim", "8,99"], "99"),
    ],
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, message):
    write_tiny_folder(tmp_path / "model")
    data = tmp_path / "dev.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["evaluate", str(tmp_path / "model"), str(data), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_suite_refuses_the_options_of_a_folder(tmp_path, capsys):
    for option, value in (("--dim", "8"), ("--precision", "int8"), ("--rescore", "5"), ("--split", "dev"),
                          ("--instruction", "find"), ("--bootstrap", "5")):  # fmt: skip
        assert main(["evaluate", str(tmp_path), "--suite", "mteb:STS12", option, value]) == 2
        assert f"{option}: is for a folder or examples" in capsys.readouterr().err


def test_what_is_refused():
    graded = [{"sentence1": "a", "sentence2": "b", "score": float(i)} for i in range(3)]
    with pytest.raises(ConfigError, match="rescore is for searches"):
        evaluate(tiny_embedder(), graded, precision="int8", rescore=5)
    with pytest.raises(ConfigError, match="dims: expected at least one"):
        compare_storage(tiny_embedder(), ROWS, dims=[])
    with pytest.raises(ConfigError, match="precisions: expected at least one"):
        compare_storage(tiny_embedder(), ROWS, precisions=[])
    with pytest.raises(ConfigError, match="precisions: expected each once, got int8, int8"):
        compare_storage(tiny_embedder(), ROWS, precisions=["int8", "int8"])
    with pytest.raises(ConfigError, match="dims: expected each once, got 16, 16"):
        compare_storage(tiny_embedder(), ROWS, dims=[16, 16])
    with pytest.raises(ConfigError, match="ranges: int8 needs those"):
        dequantize(np.zeros((1, 4), np.int8), "int8", 4)
    assert [bytes_per_vector(p, 1020) for p in ("float32", *QUANTIZED)] == [4080, 1020, 1020, 128, 128]
