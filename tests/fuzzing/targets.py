"""The readers of bytes, each with small valid inputs that pyqemb itself has written.

A reader takes any bytes: it returns, or raises an error of pyqemb that names the file. Where a checksum would stop all
changes, the changed content gets a right one, so that it reaches the code behind.
"""

import bz2
import datetime
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pyqemb.curation.relabel import Judgement
from pyqemb.data.beir import read_beir
from pyqemb.data.blocks import Blocks
from pyqemb.data.example import read_examples, write_examples
from pyqemb.data.keyed import keys_of
from pyqemb.data.layouts import Example
from pyqemb.data.rows import read_rows
from pyqemb.data.sealed import seal
from pyqemb.data.shards import read_shards, write_shards
from pyqemb.data.token_cache import TokenFolder
from pyqemb.errors import ConfigError
from pyqemb.jobs.folder import describe_output, read_output
from pyqemb.jobs.parts import CandidatesPart, VectorPart
from pyqemb.jobs.status import Reporter, read_status
from pyqemb.jobs.tasks import Task
from pyqemb.llm.request import Answer, MalformedAnswerError, parse
from pyqemb.llm.response import RetryableError, answer_of
from pyqemb.llm.store import Store
from pyqemb.model.cached_encoder import CachedEncoder
from pyqemb.model.checkpoint import INDEX, Tensors, load_weights, write_safetensors
from pyqemb.model.embedder import Embedder
from pyqemb.model.families import FAMILIES, build_decoder, read_config
from pyqemb.model.lora import LoraConfig, add_lora, read_adapter, save_adapter
from pyqemb.model.reranker import Reranker
from pyqemb.model.shard_files import ShardedTensors, Slice
from pyqemb.model.shards import own_rows
from pyqemb.synthesis.kinds import Configuration, Labelled, Query, Sentences
from pyqemb.synthesis.passages import People
from pyqemb.testing.tiny import TEXTS, tiny_config, tiny_embedder, tiny_tokenizer, write_tiny_folder
from pyqemb.training import stage1, stage2
from pyqemb.training.callbacks.metrics import truncate_metrics
from pyqemb.training.config import TrainSection, load_config
from pyqemb.training.optim import Optimizer
from pyqemb.training.state import Checkpoint, random_states, restore_random_states, write_manifest, write_shard

Read = Callable[[bytes], Any]


@dataclass
class Target:
    """`names`: one of them must be in an error. `allowed`: errors that are not about a file."""

    seeds: list[bytes]
    read: Read
    names: tuple[str, ...]
    form: str = "bytes"
    allowed: tuple[type[Exception], ...] = ()


TARGETS: dict[str, Callable[[Path], Target]] = {}


def make(name: str, folder: Path) -> Target:
    """The target, with its files in an empty folder."""
    return TARGETS[name](folder)


def target(name: str, *args: Any):
    def add(builder):
        TARGETS[name] = lambda folder: builder(folder, *args)
        return builder

    return add


def into(path: Path, read: Callable[[], Any]) -> Read:
    """A reader of the bytes in a file."""

    def write_and_read(data: bytes) -> Any:
        path.write_bytes(data)
        return read()

    return write_and_read


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# Rows of data

EXAMPLES = [
    Example("q", "p"),
    Example("What is “gravity”?", "A force.\r\nIt pulls.", ("n", "ñ", ""), "Find it.", "task"),
    Example("a, b", 'c "d"', task="sts", score=0.25),
    Example("q", "p", ("n",), scores=(1.0, -2.5), query_embedding=(0.5, 1.0), positive_embedding=(1.0, 0.0)),
]
TABLES = {
    ".csv": [
        b'query,positive,score\n"a, b","c ""d""",0.5\nq,p,\n',
        b'\xef\xbb\xbfquery,positive\r\nq,"line\r\nend"\r\n',
    ],
    ".tsv": [b"sentence1\tsentence2\tscore\na\tb\t1\n", b"query\tpositive\tnegative\nq\tp\tn\n"],
}


def texts_of_rows(folder: Path, suffix: str) -> list[bytes]:
    if suffix in (".csv", ".tsv"):
        return TABLES[suffix]
    write_examples(folder / "seed.jsonl", EXAMPLES)
    raw = (folder / "seed.jsonl").read_bytes()
    array = json.dumps([json.loads(line) for line in raw.splitlines()]).encode()
    more = lines(
        [
            {"anchor": "a", "positive": "p", "negative_1": "x", "negative_2": "y"},
            {"sentence1": "a", "sentence2": "b", "score": 0.3},
        ]
    )
    return [raw, more, lines([{"query": "q", "pos": ["p"], "neg": ["n"]}]), *([array] if suffix == ".json" else [])]


for _suffix, _form in ((".jsonl", "lines"), (".json", "json"), (".csv", "bytes"), (".tsv", "bytes")):

    @target(f"rows{_suffix}", _suffix, _form)
    def rows(folder, suffix, form):
        seeds, path = texts_of_rows(folder, suffix), folder / f"rows{suffix}"
        return Target(seeds, into(path, lambda: list(read_rows(path))), (path.name,), form)

    @target(f"examples{_suffix}", _suffix, _form)
    def examples(folder, suffix, form):
        seeds, path = texts_of_rows(folder, suffix), folder / f"rows{suffix}"
        return Target(seeds, into(path, lambda: list(read_examples(path))), (path.name,), form)


for _suffix in (".gz", ".bz2", ".xz", ".zst"):

    @target(f"rows.jsonl{_suffix}", _suffix)
    def compressed(folder, suffix):
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
            ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True)}[suffix]  # fmt: skip
        path = folder / f"rows.jsonl{suffix}"
        seeds = [pack(raw) for raw in texts_of_rows(folder, ".jsonl")]
        return Target([*seeds, seeds[0] + seeds[1]], into(path, lambda: list(read_rows(path))), (path.name,))


@target("rows.parquet")
def parquet(folder):
    path, seeds = folder / "rows.parquet", []
    for number, options in enumerate(({}, {"compression": "zstd"}, {"compression": "none", "use_dictionary": False})):
        rows = [{"query": f"q{i}", "positive": "p", "negatives": ["n"] * i, "score": i / 2} for i in range(3 + number)]
        pq.write_table(pa.Table.from_pylist(rows), path, **options)
        seeds.append(path.read_bytes())
    day = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    kinds = {"at": pa.array([day], pa.timestamp("us", "Europe/Berlin")), "day": pa.array([day.date()]),
        "span": pa.array([1], pa.duration("ns")), "name": pa.array(["a"]).dictionary_encode(),
        "clock": pa.array([1], pa.time64("ns")), "raw": pa.array([b"x"]),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())), "old": pa.array([1], pa.date64())}  # fmt: skip
    pq.write_table(pa.table(kinds), path, compression="none")
    return Target([*seeds, path.read_bytes()], into(path, lambda: list(read_rows(path))), (path.name,))


# BEIR

CORPUS = lines([{"_id": "d1", "title": "T", "text": "one"}, {"_id": "d2", "text": "two"}, {"_id": 3, "text": ""}])
QUERIES = lines([{"_id": "q1", "text": "one?", "instruction": "Find it."}, {"_id": "q2", "text": "two?"}])
QRELS = b"query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t2\nq2\t3\t0\n"
TREC = b"q1 0 d1 1\nq2 0 d2 0\n"
BEIR = {
    "corpus.jsonl": ([CORPUS], "lines"),
    "queries.jsonl": ([QUERIES], "lines"),
    "qrels/test.tsv": ([QRELS, TREC], "bytes"),
}

for _name in BEIR:

    @target(f"beir {Path(_name).name}", _name)
    def beir(folder, name):
        (folder / "qrels").mkdir()
        for other, (seeds, _) in BEIR.items():
            (folder / other).write_bytes(seeds[0])
        path = folder / name
        return Target(BEIR[name][0], into(path, lambda: read_beir(folder, None)), (str(folder),), BEIR[name][1])


# Shards of rows


def read_all(folder):
    return {task: list(shard) for task, shard in read_shards(folder).items()}


def values_of(raw: bytes) -> bytes:
    """Sealed JSON without its digest."""
    value = json.loads(raw)
    value.pop("sha256")
    return json.dumps(value).encode()


def sealed(data: bytes) -> bytes:
    """The JSON with a digest, if it is an object that can have one."""
    try:
        value = json.loads(data)
        return seal(value) if isinstance(value, dict) else data
    except (ValueError, RecursionError):
        return data


@target("shards manifest")
def shards_manifest(folder):
    write_shards(folder / "shards", EXAMPLES)
    path = folder / "shards" / "manifest.json"
    seeds = [values_of(path.read_bytes())]
    read = into(path, lambda: read_all(folder / "shards"))
    return Target(seeds, lambda data: read(sealed(data)), (str(folder / "shards"),), "json")


@target("shards arrow")
def shards_arrow(folder):
    """A record batch, with its checksum in the manifest."""
    write_shards(folder / "shards", [example for example in EXAMPLES if example.task is None])
    manifest = json.loads((folder / "shards" / "manifest.json").read_bytes())
    manifest.pop("sha256")
    path, facts = folder / "shards" / "00000-00000.arrow", manifest["tasks"][0]["files"][0]
    whole = path.read_bytes()
    _, offset, size, _ = facts["batches"][0]

    def read(data):
        path.write_bytes(whole[:offset] + data)
        facts["size"], facts["batches"][0][2:] = offset + len(data), [len(data), zlib.crc32(data)]
        (folder / "shards" / "manifest.json").write_bytes(seal(manifest))
        return read_all(folder / "shards")

    return Target([whole[offset : offset + size]], read, (str(folder / "shards"),))


# Caches


class Lengths:
    """A model of texts without weights."""

    fingerprint = "lengths"

    def encode_document(self, texts):
        return np.array([[len(text), 1, 2] for text in texts], np.float32)


def cache_reader(kind: str, folder: Path) -> Callable[[], Any]:
    tokenizer = tiny_tokenizer(16)
    if kind == "tokens":
        return lambda: TokenFolder(tokenizer, folder).pack(TEXTS[:3])
    return lambda: CachedEncoder(Lengths(), folder).encode_document(TEXTS[:3])


for _kind in ("tokens", "vectors"):
    for _suffix in ("index", "data"):

        @target(f"{_kind} {_suffix}", _kind, _suffix)
        def cache(folder, kind, suffix):
            read = cache_reader(kind, folder)
            read()
            files = {path: path.read_bytes() for path in folder.rglob("0000.*")}
            path = next(path for path in files if path.suffix == f".{suffix}")
            truth = np.array(read()) if kind == "vectors" else read()  # not mapped: the file changes

            def check(data):
                for other, content in files.items():
                    other.write_bytes(content)
                for other in set(path.parent.iterdir()) - set(files):
                    other.unlink()
                path.write_bytes(data)
                found = read()
                assert all(map(np.array_equal, found, truth)) if kind == "vectors" else (
                    found.input_ids_T.equal(truth.input_ids_T)
                ), "other values"  # fmt: skip

            return Target([files[path]], check, (str(folder),))


@target("blocks record")
def record(folder):
    """A record of an index, with its digest."""
    blocks = Blocks(folder, "x")
    blocks.append(keys_of("ab"), np.arange(6, dtype=np.int32), np.array([8, 16]), align=4)
    path, data = folder / "0000.index", (folder / "0000.data").read_bytes()
    raw = path.read_bytes()[:-16]

    def read(changed):
        path.write_bytes(changed + blocks._seal(changed))
        (folder / "0000.data").write_bytes(data)
        found = Blocks(folder, "x")
        rows = found.rows(keys_of("ab"))
        return found.values(rows[rows >= 0], np.int32)

    return Target([raw], read, (str(folder),))


def part_target(part, suffix, check, form):
    """A file of a part that is written already; `check` reads the part."""
    path, about = part.path.with_suffix(f".{suffix}"), part.path.with_suffix(".json")
    facts = json.loads(about.read_bytes())
    facts.pop("sha256")

    def read(data):
        if suffix == "json":
            data = sealed(data)
        else:
            facts["files"][f".{suffix}"] = hashlib.sha256(data).hexdigest()
            about.write_bytes(seal(facts))
        path.write_bytes(data)
        part.verify()
        check()

    seeds = [values_of(path.read_bytes()) if suffix == "json" else path.read_bytes()]
    return Target(seeds, read, (f"{part.path.stem}.",), form)


@target("part of an encode job", "json")
@target("ids of an encode job", "ids")
@target("vectors of an encode job", "npy")
def part(folder, suffix):
    files = VectorPart(folder / "00000000.npy", "job", "texts")
    files.write(np.ones((2, 3), np.float32), ["a", "b"])

    def check():
        files.vectors()
        assert all(isinstance(key, str) for key in files.ids())

    return part_target(files, suffix, check, {"json": "json", "ids": "lines", "npy": "bytes"}[suffix])


@target("search part of a mining job", "json")
@target("indices of a mining job", "indices")
@target("scores of a mining job", "npy")
def candidates(folder, suffix):
    part = CandidatesPart(folder / "search-00000000.npy", "job", "texts")
    part.write(np.ones((2, 3), np.float32), np.arange(6).reshape(2, 3), np.ones(2, np.float32))

    def check():
        scores, indices = part.candidates()
        assert scores.shape == indices.shape
        assert len(part.positive_scores()) == len(scores)

    return part_target(part, suffix, check, "json" if suffix == "json" else "bytes")


@target("status of a job")
def status(folder):
    place = folder / "x.npy.parts"
    place.mkdir()
    with Reporter(place, "encode", Task(0, 2)) as report:
        report.stage("encode", "[0-9]*.npy", 4)
    path = place / "status-task-0-of-2.json"

    def read(data):
        path.write_bytes(sealed(data))
        found = read_status(folder / "x.npy")
        for line in [found.line(), *found.failures()]:
            assert line.isprintable()

    return Target([values_of(path.read_bytes())], read, (str(place),), "json")


@target("output of a job of tasks")
def output(folder):
    describe_output(folder, "encode", "job", {"precision": "int8"})
    path = folder / "output.json"

    def read(data):
        path.write_bytes(sealed(data))
        kind, settings = read_output(folder, "job")
        assert isinstance(kind, str)
        assert isinstance(settings, dict)

    return Target([values_of(path.read_bytes())], read, (str(folder),), "json")


@target("vectors of personas")
def personas(folder):
    people = People.__new__(People)
    people._texts, people._model = ["a", "bc"], Lengths()
    people._embed("model", folder)
    path = next(folder.glob("*.npy"))
    return Target([path.read_bytes()], into(path, lambda: people._embed("model", folder)), (path.name,))


# Weights and model folders


def header_of(raw: bytes) -> bytes:
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]


def with_header(header: bytes, raw: bytes) -> bytes:
    """A file of safetensors with another header, which has its right length."""
    return len(header).to_bytes(8, "little") + header + raw[8 + len(header_of(raw)) :]


def small_folder(folder: Path, **options: Any) -> Path:
    return write_tiny_folder(folder, num_hidden_layers=1, **options)


@target("safetensors")
@target("safetensors header", True)
def safetensors(folder, header=False):
    model = small_folder(folder / "model")
    path = model / "model.safetensors"
    raw = path.read_bytes()
    config = read_config(model)
    with torch.device("meta"):
        decoder = build_decoder(config)

    def read():
        tensors = Tensors(model)
        for name in tensors:
            tensors.shape(name)
        load_weights(decoder, tensors)

    reader = into(path, read)
    if header:
        return Target([header_of(raw)], lambda data: reader(with_header(data, raw)), (str(model),), "json")
    return Target([raw], reader, (str(model),))


@target("index of weights")
def index(folder):
    model = small_folder(folder / "model", shards=2)
    path = model / INDEX

    def read():
        return [tensor.shape for tensor in Tensors(model).values()]

    return Target([path.read_bytes()], into(path, read), (str(model),), "json")


@target("slices")
def slices(folder):
    """The metadata of a rank's rows."""
    path = folder / "model-00001-of-00001.safetensors"
    tensor = torch.arange(8.0).view(4, 2)
    seeds = [json.dumps({"x": {"first": 0, "shape": [4, 2]}}).encode()]

    def read(data):
        write_safetensors(path, {"x": tensor}, {"slices": data.decode("utf-8", "replace")})
        stored = ShardedTensors([path])
        return [stored.rows(name, slice(0, 2)) for name in stored], dict(stored)

    return Target(seeds, read, (str(folder),), "json")


MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json",
    "sentence_bert_config.json", "config_sentence_transformers.json", "pyqemb.json")  # fmt: skip

for _name in MODEL_FILES:

    @target(f"model {_name.replace('/', ' ')}", _name)
    def model_file(folder, name):
        """Everything of a model folder that is read before its weights, then a text."""
        model = folder / "model"
        tiny_embedder(num_hidden_layers=1).save_pretrained(model)
        seeds = [(model / name).read_bytes()]
        if name == "config.json":
            scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
            values = json.loads(seeds[0])
            rope = {"rope_scaling": scaled, "rope_parameters": {**scaled, "rope_theta": values["rope_theta"]}}
            seeds.append(json.dumps({**values, **rope}).encode())

        def read():
            embedder = Embedder.without_weights(model)
            embedder.tokenizer.encode_queries(["What is gravity?", ""], "Find it.")

        names = (str(model), "the tokenizer cannot encode these texts")
        return Target(seeds, into(model / name, read), names, "json")


@target("model config.json of every family")
def families(folder):
    """The decoder of a configuration, whose weights do not matter."""
    model = small_folder(folder / "model")
    config = json.loads((model / "config.json").read_bytes())
    seeds = [tiny_config(family, num_hidden_layers=1).to_dict() for family in FAMILIES]
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128}  # fmt: skip
    llama = seeds[list(FAMILIES).index("llama")]
    rope = {"rope_scaling": llama3, "rope_parameters": {**llama3, "rope_theta": llama["rope_theta"]}}
    seeds.append({**llama, **rope})
    seeds = [json.dumps({**seed, "vocab_size": config["vocab_size"]}).encode() for seed in seeds]
    return Target(seeds, into(model / "config.json", lambda: Embedder.without_weights(model)), (str(model),), "json")


# Rerankers: a causal language model, one in the form of CrossEncoder 6, and a classifier

PAIR = [("What is gravity?", "A force."), ("", "")]
RERANKER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "pyqemb.json",
    "config_sentence_transformers.json", "modules.json", "1_LogitScore/config.json")  # fmt: skip


def reranker_folder(folder: Path, format: str = "causal-lm") -> Path:
    base = small_folder(folder / "base", prefix=True)
    return Reranker.from_pretrained(base, device="cpu").save_pretrained(folder / "reranker", format=format)


def as_cross_encoder(folder: Path) -> None:
    """What sentence-transformers 6 writes beside the files of the language model."""
    ids = json.loads((folder / "pyqemb.json").read_bytes())
    modules = [
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        ("1_LogitScore", "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"),
    ]
    settings = {"model_type": "CrossEncoder", "prompts": {"web": "Find it."}, "default_prompt_name": "web"}
    score = {"true_token_id": ids["yes_id"], "false_token_id": ids["no_id"], "module_input_name": "causal_logits"}
    (folder / "modules.json").write_text(
        json.dumps([{"idx": i, "name": str(i), "path": p, "type": t} for i, (p, t) in enumerate(modules)])
    )
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps(score))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))


for _name in RERANKER_FILES:

    @target(f"reranker {_name.replace('/', ' ')}", _name)
    def reranker_file(folder, name, format="causal-lm"):
        """Everything of a reranker's folder, and the score of a pair."""
        reranker = reranker_folder(folder, format)
        if not (reranker / name).is_file():
            as_cross_encoder(reranker)
        if name == "config_sentence_transformers.json":  # read if pyqemb.json has no instruction
            (reranker / "pyqemb.json").unlink()
        seeds = [(reranker / name).read_bytes()]

        def read():
            Reranker.from_pretrained(reranker, device="cpu").score(PAIR)

        names = (str(reranker), "the tokenizer cannot encode these texts")
        return Target(seeds, into(reranker / name, read), names, "json")

    if _name in ("config.json", "pyqemb.json"):
        target(f"classifier {_name}", _name, "seq-cls")(reranker_file)


@target("head of a reranker", "causal-lm")
@target("head of a classifier", "seq-cls")
def reranker_head(folder, format):
    """The header of its weights."""
    reranker = reranker_folder(folder, format)
    path = reranker / "model.safetensors"
    raw = path.read_bytes()
    read = into(path, lambda: Reranker.from_pretrained(reranker, device="cpu").score(PAIR))
    return Target([header_of(raw)], lambda data: read(with_header(data, raw)), (str(reranker),), "json")


@target("adapter_config.json")
@target("adapter_model.safetensors", True)
def adapter(folder, weights=False):
    embedder = tiny_embedder(num_hidden_layers=1)
    add_lora(embedder.model, LoraConfig(rank=2))
    save_adapter(embedder.model, folder / "adapter", base="base")
    path = folder / "adapter" / ("adapter_model.safetensors" if weights else "adapter_config.json")
    raw = path.read_bytes()
    read = into(path, lambda: read_adapter(folder / "adapter"))
    if weights:
        return Target([header_of(raw)], lambda data: read(with_header(data, raw)), (str(folder),), "json")
    return Target([raw], read, (str(folder),), "json")


# Training


@target("checkpoint manifest.json", "manifest.json")
@target("checkpoint state.json", "state.json")
def checkpoint(folder, name):
    place = folder / "step_00000003"
    place.mkdir()
    model = tiny_embedder(num_hidden_layers=1).model
    parts = {key: Slice(x.detach(), own_rows(x).start, tuple(x.shape)) for key, x in list(model.named_parameters())[:2]}
    best = {"metric": "m", "value": 0.5, "step": 2}
    state = {"config": {"a": 1}, "data": "x", "random": [random_states()], "best": best, "bad_steps": 0,
        "evaluations_since_best": 1, "steps": 3, "base": {"model.safetensors": "0"}}  # fmt: skip
    (place / "state.json").write_text(json.dumps(state))
    write_manifest(place, 3, 1, write_shard(place, 0, 1, parts, {}))
    manifest = json.loads((place / "manifest.json").read_bytes())
    manifest.pop("sha256")
    path = place / name

    def read(data):
        if name == "manifest.json":
            data = sealed(data)
        else:
            manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (place / "manifest.json").write_bytes(seal(manifest))
        path.write_bytes(data)
        found = Checkpoint.load(place)
        dict(found.weights)
        return found

    # The generators' states are most of state.json, and have a target of their own.
    seeds = (
        [json.dumps(manifest).encode()] if name == "manifest.json" else [json.dumps({**state, "random": []}).encode()]
    )
    return Target(seeds, read, (str(place),), "json")


@target("optimizer.safetensors")
def optimizer_state(folder):
    """The header of the optimizer's state in a checkpoint."""
    layer = torch.nn.Linear(2, 3)
    optimizer = Optimizer(layer, TrainSection(ema_decay=0.9))
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step(1e-3)
    path = folder / "optimizer.safetensors"
    write_safetensors(path, optimizer.state_tensors())
    raw = path.read_bytes()
    read = into(path, lambda: optimizer.load(optimizer.weights, ShardedTensors([path]), folder))
    return Target([header_of(raw)], lambda data: read(with_header(data, raw)), (str(folder),), "json")


@target("random states")
def random_state(folder):
    states = random_states()
    seeds = [json.dumps(states).encode()]

    def read(data):
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return
        try:
            restore_random_states(value, "step_1")
        finally:
            restore_random_states(states, "step_1")

    return Target(seeds, read, ("step_1",), "json")


TOML = """stage = 1
[model]
base = "Qwen/Qwen3-Embedding-0.6B"
[[data]]
path = "pairs.jsonl"
name = "pairs"
columns = {query = "q", positive = "p"}
[lora]
rank = 8
[train]
steps = 10
lr = 1e-4
global_batch_size = 64
memory = "8GiB"
[loss]
temperature = 0.02
matryoshka = [64, 128]
[eval]
every = 5
[save]
dir = "run"
"""
YAML = """model: &m {base: base, attention: causal}
data:
  - path: "pairs.jsonl"
    instruction: >
      Find it.
train: {lr: 1e-4, steps: 3, betas: [0.9, 0.98]}
loss: {temperature: 0.05}
"""


@target("config.toml", ".toml", "bytes")
@target("config.yaml", ".yaml", "bytes")
@target("config.json", ".json", "json")
def config(folder, suffix, form):
    path = folder / f"run{suffix}"
    whole = [
        stage(model={"base": "b"}, data=[{"path": "p.jsonl"}]).model_dump(mode="json") for stage in (stage1, stage2)
    ]
    small = {"model": {"base": "b"}, "data": [{"path": "p", "name": "n"}], "lora": {"rank": 4}, "train": {"lr": 1e-4}}
    seeds = {
        ".toml": [TOML.encode()],
        ".yaml": [YAML.encode()],
        ".json": [json.dumps(v).encode() for v in (*whole, small)],
    }
    return Target(seeds[suffix], into(path, lambda: load_config(path)), (path.name,), form)


@target("metrics.jsonl")
def metrics(folder):
    path = folder / "metrics.jsonl"
    seeds = [
        lines([{"step": i, "loss": 0.5, "grad_norm": 1.0} for i in range(3)] + [{"step": 3, "eval": {"ndcg": 0.5}}])
    ]
    return Target(seeds, into(path, lambda: truncate_metrics(path, 2)), (path.name,), "lines")


# Language models

KINDS = (Judgement, Configuration, Query, Sentences, Labelled)
OF_ANSWERS = (MalformedAnswerError, RetryableError, ConfigError)  # there is no file
ANSWERS = ['<think>{"relevant": false}</think>\n```json\n{"relevant": true}\n```', '{"query": "What?"}',
    '{"character": "a", "question_type": "summary", "difficulty": "university"} and more', "[THINK]x",
    '<|channel|>analysis<|message|>x<|channel|>final<|message|>{"sentence1": "a", "sentence2": "b"}']  # fmt: skip


@target("text of an answer")
def answer(folder):
    def read(data):
        for kind in KINDS:
            for finish in ("stop", "length"):
                try:
                    parse(Answer(data.decode("utf-8", "replace"), finish), kind)
                except MalformedAnswerError:
                    continue

    return Target([text.encode() for text in ANSWERS], read, ("",), "bytes", OF_ANSWERS)


@target("body of an answer")
def body(folder):
    """What the client of openai makes of a body: its objects have any values in their fields."""
    message = {"role": "assistant", "content": ANSWERS[0], "refusal": None}
    parts = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "a"}, "b"],
    }
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    seeds = [{"choices": [{"finish_reason": "stop", "message": m}], "usage": usage} for m in (message, parts)]
    seeds.append({"error": {"message": "too many", "code": 429, "details": [{"msg": "x"}]}})

    def read(data):
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return
        answer_of(value, "server")

    return Target([json.dumps(seed).encode() for seed in seeds], read, ("",), "json", OF_ANSWERS)


@target("store of answers")
def store(folder):
    path = folder / "answers.sqlite"
    made = Store(path)
    for number in range(3):
        made.put(f"{number:064}", {"model": "m"}, Answer("text" * number))
    made.close()
    raw = path.read_bytes()

    def read(data):
        for other in folder.iterdir():
            other.unlink()
        path.write_bytes(data)
        found = Store(path)
        try:
            len(found), list(found), found.get("0" * 64)
        finally:
            found.close()

    return Target([raw], read, (path.name,))
