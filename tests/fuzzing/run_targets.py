"""The readers of jobs and runs: texts and tasks, settings, what ranks send each other, what a resumed run reads."""

import asyncio
import fcntl
import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from targets import QRELS, Lengths, Target, cache_reader, into, lines, sealed, target, values_of

from pyqemb.cli.rerank import _windows
from pyqemb.curation.config import CurateConfig
from pyqemb.curation.corpus import read_corpus
from pyqemb.data.blocks import Blocks
from pyqemb.data.example import read_examples
from pyqemb.data.files import locked
from pyqemb.data.sealed import seal
from pyqemb.encoding.inputs import read_texts
from pyqemb.encoding.job import _claim
from pyqemb.encoding.workers import Settings
from pyqemb.errors import ConfigError
from pyqemb.evaluation.tasks import load_task
from pyqemb.llm.client import _retry_after
from pyqemb.merging.run import _checked_tensors
from pyqemb.model.cached_encoder import _FORMAT
from pyqemb.model.families import FAMILIES
from pyqemb.model.shard_files import Slice
from pyqemb.model.shards import own_rows
from pyqemb.synthesis.config import SynthesisConfig
from pyqemb.synthesis.passages import _passages, _read_personas
from pyqemb.testing.tiny import tiny_embedder
from pyqemb.training import stage2
from pyqemb.training.callbacks.base import TrainInfo
from pyqemb.training.callbacks.loggers import read_run_id, write_run_id
from pyqemb.training.consolidation import consolidate
from pyqemb.training.parallel.heartbeat import Heartbeat, _Peer
from pyqemb.training.saving import _Save
from pyqemb.training.state import random_states, write_manifest, write_shard

# Texts and tasks

DOCUMENTS = lines([{"_id": "d1", "title": "T", "text": "one"}, {"_id": "d2", "text": "two"}])
TEXT_FILES = {
    ".txt": ("What is it?\n\nA “force”.\n\ufeffx\n".encode(), "bytes"),
    ".jsonl": (DOCUMENTS, "lines"),
    ".csv": (b"_id,title,text\nd1,T,one\nd2,,two\n", "bytes"),
}

for _suffix, (_seed, _form) in TEXT_FILES.items():

    @target(f"texts{_suffix}", _suffix, _seed, _form)
    def texts(folder, suffix, seed, form):
        """The input of an encode job; of the documents to mine from; of passages and personas."""
        path = folder / f"texts{suffix}"
        passages = SimpleNamespace(passages=path, max_characters=50, min_characters=1)

        def read():
            readers: list[Callable[[], Any]] = [lambda: read_texts(path), lambda: _passages(passages)]
            readers.append(lambda: _read_personas(path))
            if suffix != ".txt":
                readers.append(lambda: read_corpus(path))
            errors = []
            for reader in readers:
                try:
                    list(reader())
                except Exception as error:
                    errors.append(error)
            # Each reader has its own errors: the worst is what counts, and one that is not of pyqemb is worst.
            for error in sorted(errors, key=lambda error: hasattr(error, "exit_code")):
                raise error

        return Target([seed], into(path, read), (path.name,), form)


TASKS = {
    "sts.jsonl": (lines([{"sentence1": "a", "sentence2": "b", "score": 0.5}] * 2), "lines"),
    "sts.tsv": (b"sentence1\tsentence2\tscore\na\tb\t0.5\nc\td\t1\n", "bytes"),
    "bitext.jsonl": (lines([{"sentence1": "a", "sentence2": "b"}]), "lines"),
}

for _name, (_seed, _form) in TASKS.items():

    @target(f"task {_name}", _name, _seed, _form)
    def task(folder, name, seed, form):
        return Target([seed], into(folder / name, lambda: load_task(folder)), (name,), form)


@target("task qrels.tsv")
def qrels(folder):
    """Judgments of a retrieval task."""
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_bytes(DOCUMENTS)
    (folder / "queries.jsonl").write_bytes(lines([{"_id": "q1", "text": "one?"}, {"_id": "q2", "text": "two?"}]))
    return Target([QRELS], into(folder / "qrels" / "test.tsv", lambda: load_task(folder)), (str(folder),))


@target("pairs to rerank")
def pairs(folder):
    path = folder / "pairs.jsonl"
    rows = [{"query": "q", "document": "d"}, {"query": "q", "documents": ["a", "b"], "instruction": "Find it."}]
    return Target([lines(rows)], into(path, lambda: list(_windows(path))), (path.name,), "lines")


SAVED = ("state.json", "dataset_info.json", "data-00000-of-00001.arrow")
try:
    import datasets
except ModuleNotFoundError:
    SAVED = ()

for _name in SAVED:

    @target(f"saved {_name}", _name)
    def saved(folder, name):
        """A folder of save_to_disk of the package datasets."""
        datasets.disable_progress_bars()
        place = folder / "saved"
        rows = [{"query": f"q{i}", "positive": "p", "negatives": ["n"]} for i in range(3)]
        datasets.Dataset.from_list(rows).save_to_disk(str(place))
        seed = (place / name).read_bytes()
        return Target(
            [seed], into(place / name, lambda: list(read_examples(place))), (str(place),),
            "bytes" if name.endswith("arrow") else "json",
        )  # fmt: skip


# Settings of jobs

CURATE = {
    "input": ["a.jsonl"],
    "out": "out",
    "step": [{"kind": "length"}, {"kind": "near"}, {"kind": "rank", "model": "m"}],
}
SYNTHESIZE = {"passages": "p.jsonl", "out": "out", "endpoint": {"model": "m", "base_url": "http://localhost:1/v1"}}

for _name, _kind, _values in (("curate", CurateConfig, CURATE), ("synthesize", SynthesisConfig, SYNTHESIZE)):

    @target(f"{_name}.json", f"{_name}.json", _kind, _values)
    def settings(folder, name, kind, values):
        path = folder / name
        return Target([json.dumps(values).encode()], into(path, lambda: kind.from_file(path)), (name,), "json")


# Jobs


@target("manifest of an encode job")
def manifest(folder):
    """Sealed; the job is another one if a value differs, and then its parts must not be used."""
    source, place = folder / "texts.txt", folder / "out.npy.parts"
    source.write_text("a\n")
    place.mkdir()
    (place / "00000000.npy").write_bytes(b"")
    given = Settings("model", "document", None, None, None, None, 8192)
    _claim(place, given, source, "text", "digest")
    path = place / "manifest.json"
    seeds = [values_of(path.read_bytes())]
    read = into(path, lambda: _claim(place, given, source, "text", "digest"))
    return Target(seeds, lambda data: read(sealed(data)), (str(place),), "json")


@target("lock of a folder")
def lock(folder):
    """What the process that holds it has written."""
    path = folder / ".lock"

    def read():
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(ConfigError) as caught, locked(folder, "run"):
                pass
        message = str(caught.value)
        assert message.startswith(str(folder)), message
        assert "\n" not in message, message

    return Target([b"pid 12 on machine\n"], into(path, read), (str(folder),))


@target("time to wait for a server")
def retry_after(folder):
    seeds = [b"3", b"0.5", b"Wed, 21 Oct 2026 07:28:00 GMT", b"Wed, 21 Oct 26 07:28:00 +0200"]

    def read(data):
        found = _retry_after({"retry-after": data.decode("latin-1")})
        assert found is None or found >= 0

    return Target(seeds, read, ())


@target("provenance of a merged model")
def provenance(folder):
    """The checkpoint, and the digests of the weights, that pyqemb.json names."""
    model = folder / "final"
    tiny_embedder(num_hidden_layers=1).save_pretrained(model, provenance={"step": 3})
    path = model / "pyqemb.json"
    return Target(
        [path.read_bytes()], into(path, lambda: _checked_tensors(model, (), FAMILIES["qwen3"])), (str(model),), "json"
    )


# Caches whose records have right digests

for _kind in ("tokens", "vectors"):

    @target(f"{_kind} record", _kind)
    def record(folder, kind):
        """A record with other lengths, offsets or keys than its values have."""
        read = cache_reader(kind, folder)
        read()
        (path,) = folder.rglob("0000.index")
        raw, values = path.read_bytes(), path.with_suffix(".data").read_bytes()
        identity = json.dumps([_FORMAT, Lengths.fingerprint, "document", None])
        seal_of = Blocks(path.parent, path.parent.name if kind == "tokens" else identity)._seal
        assert raw.endswith(seal_of(raw[:-16]))

        def read_changed(data):
            for other in path.parent.iterdir():
                other.unlink()
            path.write_bytes(data + seal_of(data))
            path.with_suffix(".data").write_bytes(values)
            cache_reader(kind, folder)()

        return Target([raw[:-16]], read_changed, (str(folder),))


# What ranks send each other


class Wire:
    """The writing end of a connection."""

    def write(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass

    def is_closing(self) -> bool:
        return False


def heartbeat(rank: int) -> Heartbeat:
    """One of three ranks, without its thread."""
    made = Heartbeat.__new__(Heartbeat)
    made.rank, made.size, made.timeout, made.lost, made.exit_code = rank, 3, 60.0, None, 1
    made._noticed, made._peers, made._missing = threading.Event(), [], {1, 2} if rank == 0 else set()
    made._token, made._deadline = "0123456789abcdef", 0.0
    return made


def received(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


@target("greeting of a rank")
def greeting(folder):
    """What anyone may send to the port of rank 0; what a rank sends, and that it is gone then."""
    hello = {"token": "0123456789abcdef", "rank": 1, "name": "rank 1 (host, pid 2)"}

    def read(data):
        beat = heartbeat(0)

        async def serve():
            await beat._greet(received(data), Wire())

        asyncio.run(serve())
        assert all(peer.left for peer in beat._peers), "the loss of a rank is not noticed"
        assert {peer.rank for peer in beat._peers} <= {1, 2}, "no such rank"
        assert {1, 2} - {peer.rank for peer in beat._peers} == beat._missing, "a rank that has come is missing"
        assert beat.lost is None or isinstance(beat.lost, str)
        assert isinstance(beat.exit_code, int)

    beats = lines([hello, {"name": "rank 1 (host, pid 2)"}, {"error": "DataError: x", "exit_code": 3}])
    return Target([lines([hello]), beats], read, (), "lines")


@target("heartbeats of a rank")
def beats(folder):
    """They end with the connection, and then the loss of the rank, or that it has left, is known."""

    def read(data):
        beat = heartbeat(1)

        async def listen():
            peer = _Peer(received(data), Wire(), 0, "rank 0 (host, pid 1)")
            beat._peers = [peer]
            await beat._listen(peer)

        asyncio.run(listen())
        assert beat._peers[0].left, "the loss of a rank is not noticed"
        assert isinstance(beat._peers[0].name, str)
        assert beat.lost is None or isinstance(beat.lost, str)
        assert isinstance(beat.exit_code, int)

    ends = [{"bye": True}], [{"error": "x", "exit_code": 3}], [{"lost": "rank 2 died", "exit_code": 6}], []
    return Target([lines([{"name": "rank 0 (host, pid 1)"}, *end]) for end in ends], read, (), "lines")


@target("report of a rank's shard")
def report(folder):
    """What a rank writes beside its shard for the first rank; sealed."""
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"12345")
    files = {"model-00002-of-00002.safetensors": {"size": 5, "sha256": "0" * 64}}
    save = _Save(folder / "step_1", folder, 1, 0, 2, 1, ExitStack(), [], deadline=0.0)
    path = save._report(1)

    def read(data):
        path.write_bytes(sealed(data))
        for entry in save._files_of(1).values():
            assert isinstance(entry["sha256"], str)

    return Target([json.dumps({"files": files}).encode()], read, (str(folder), "of rank 1"), "json")


# What a resumed run reads


class Run:
    """A checkpoint of a run, whose manifest is made anew for changed files."""

    def __init__(self, folder: Path):
        self.model = tiny_embedder(num_hidden_layers=1)
        self.folder = folder / "checkpoints" / "step_00000003"
        self.model.save_pretrained(self.folder / "portable", provenance={"step": 3})
        (self.folder / "portable" / "model.safetensors").unlink()
        config = stage2(model={"base": str(folder)}, data=[{"path": "p.jsonl"}], train={"device": "cpu"})
        state = {"config": config.model_dump(mode="json"), "data": "x", "random": [random_states()], "best": None,
            "bad_steps": 0, "evaluations_since_best": 0, "steps": 3}  # fmt: skip
        weights = dict(self.model.named_parameters())
        slices = {name: Slice(x.detach(), own_rows(x).start, tuple(x.shape)) for name, x in weights.items()}
        self.state = self.folder / "state.json"
        self.state.write_text(json.dumps(state))
        self.files = write_shard(self.folder, 0, 1, slices, {})
        write_manifest(self.folder, 3, 1, self.files)
        self.manifest = json.loads((self.folder / "manifest.json").read_bytes())
        self.manifest.pop("sha256")

    def change(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)
        self.manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (self.folder / "manifest.json").write_bytes(seal(self.manifest))


for _name in ("state.json", "portable/config.json", "portable/pyqemb.json"):

    @target(f"consolidate {_name.replace('/', ' ')}", _name)
    def consolidated(folder, name):
        """A checkpoint that is exported without its configuration."""
        run, out = Run(folder), folder / "out"
        values = json.loads((run.folder / name).read_bytes())
        if name == "state.json":
            values["random"] = []

        def read(data):
            run.change(name, data)
            if out.exists():
                for path in sorted(out.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                out.rmdir()
            consolidate(folder, out=out)

        # A checkpoint that cannot be loaded is skipped with a warning that names the file; there is no other one.
        # A changed configuration may need the weights of its base model, which is the folder around the run.
        names = (str(run.folder), f"{folder}: ", "holds no intact checkpoint")
        return Target([json.dumps(values).encode()], read, names, "json")


@target("run id of a logger")
def run_id(folder):
    info = TrainInfo(stage2(model={"base": "b"}, data=[{"path": "p.jsonl"}]), folder, steps=5, step=3)
    write_run_id(info, "wandb", "abc")
    path = folder / "wandb_run_id"

    def read():
        found = read_run_id(info, "wandb")
        assert found is None or found.isprintable(), found

    return Target([path.read_bytes()], into(path, read), (path.name,))
