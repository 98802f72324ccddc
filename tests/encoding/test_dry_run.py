"""The plan of an encode job: exact where it can be, and nothing is written."""

import gzip
import json

import pytest

from pyqemb.cli import main
from pyqemb.encoding import dry_run, encode_file, plan_encode
from pyqemb.errors import ConfigError, DataError
from pyqemb.model.embedder import Embedder
from pyqemb.testing.tiny import TEXTS, tiny_embedder

ROWS = [f"{text.strip()} {i}".replace("\n", " ") for i in range(4) for text in TEXTS]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    model = tiny_embedder()
    model.prompts["document"] = "a document: "
    model.save_pretrained(folder / "m")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    (folder / "texts.txt").write_text("\n".join(ROWS))
    with gzip.open(folder / "texts.jsonl.gz", "wt") as file:
        file.write((folder / "texts.jsonl").read_text())
    return folder


def files(folder):
    return sorted(path for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.txt", "texts.jsonl.gz"])
@pytest.mark.parametrize("precision", ["float32", "int8", "ubinary"])
def test_the_sizes_are_those_of_the_job(place, tmp_path, name, precision):
    options = dict(precision=precision, dim=20, rows_per_part=7)
    before = files(place)
    plan = plan_encode(place / "m", place / name, tmp_path / "x.npy", **options, tasks=3)
    assert files(place) == before
    assert not files(tmp_path)
    assert (plan.texts, plan.parts, plan.processes) == (len(ROWS), -(-len(ROWS) // 7), 3)
    assert plan.is_estimate == (name == "texts.jsonl")
    encode_file(place / "m", place / name, tmp_path / "x.npy", **options)
    header = 128
    assert plan.output == (tmp_path / "x.npy").stat().st_size - header
    assert plan.disk == plan.output + 4 * 20 * len(ROWS)
    assert plan.seconds == pytest.approx(plan.texts * plan.tokens_per_text / plan.tokens_per_second / 3)
    assert plan.memory > 50e6
    assert plan.gpu_memory == 0


def test_tokens_are_those_of_the_model(place, tmp_path):
    model = Embedder.from_pretrained(place / "m")
    for side, prompt in (("document", "a document: "), ("raw", ""), ("query", None)):
        plan = plan_encode(place / "m", place / "texts.txt", tmp_path / "x.npy", side=side, max_length=30)
        prompt = model.prompts["query"] if prompt is None else prompt
        ids = model.tokenizer.with_max_length(30).encode_documents([prompt + text for text in ROWS])
        assert plan.tokens_per_text == pytest.approx(sum(map(len, ids)) / len(ids))
        assert plan.sampled == len(ROWS)
    plan = plan_encode(place / "m", place / "texts.txt", tmp_path / "x.npy", side="query", instruction="Find it")
    ids = model.tokenizer.encode_queries(ROWS, "Find it")
    assert plan.tokens_per_text == pytest.approx(sum(map(len, ids)) / len(ids))


def test_a_sample_is_spread_over_the_first_part(place, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "_TEXTS", 4)
    seen = []
    real = dry_run.Encoder.vectors
    monkeypatch.setattr(dry_run.Encoder, "vectors", lambda self, texts: seen.append(list(texts)) or real(self, texts))
    plan = plan_encode(place / "m", place / "texts.txt", tmp_path / "x.npy", rows_per_part=10)
    assert seen == [ROWS[:1], [ROWS[0], ROWS[3], ROWS[6], ROWS[9]]]
    assert plan.sampled == 4
    seen.clear()
    monkeypatch.setattr(dry_run, "_BATCH", 1)
    plan_encode(place / "m", place / "texts.txt", tmp_path / "x.npy", rows_per_part=10, seconds=1e-9)
    assert seen == [ROWS[:1], ROWS[:1]]  # one batch at least


def test_a_disk_that_is_too_small_is_said(place, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "free_space", lambda path: 1000)
    plan = plan_encode(place / "m", place / "texts.txt", tmp_path / "x.npy")
    assert plan.lines()[-1].endswith("1.0 KB are free; this is too little")


def test_what_is_refused(place, tmp_path):
    (tmp_path / "empty.txt").touch()
    for path, options, error, words in (
        ("texts.txt", dict(dim=99), ConfigError, "dim must lie in 1..32"),
        ("texts.txt", dict(devices=[]), ConfigError, "devices must name at least one device"),
        ("texts.txt", dict(instruction="Find"), ConfigError, "instruction: is for side 'query'"),
        ("texts.txt", dict(seconds=0.0), ConfigError, "seconds must be above 0"),
        (tmp_path / "empty.txt", {}, DataError, "holds no texts"),
    ):
        with pytest.raises(error, match=words):
            plan_encode(place / "m", place / path, tmp_path / "x.npy", **options)


def test_the_command_line(place, tmp_path, capsys):
    job = ["encode", str(place / "m"), str(place / "texts.jsonl"), "--out", str(tmp_path / "x.npy"), "--dry-run"]
    assert main(job) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["texts", "tokens", "speed", "time", "memory", "disk"]
    assert lines[0] == f"texts   about {len(ROWS)}, in 1 parts"
    assert lines[3].endswith(" with 1 process")
    assert main([*job, "--tasks", "4", "--processes", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[3].endswith(" with 8 processes")
    assert main([*job, "--tasks", "0"]) == 2
    assert not files(tmp_path)
