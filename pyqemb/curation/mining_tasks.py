"""Hard-negative mining by tasks on any machines: the result of `pyqemb.mine`, with vectors and candidates on disk.

The folder OUT.parts (`jobs/folder.py`) holds two kinds of parts:

documents-00000000.npy, queries-...  unit vectors of 4096 texts
search-00000000.npy, .indices        the best documents of a shard of the documents for a tile of the examples

A search needs the vectors of all positives, so the tasks search when all vectors are there. Merging the candidates of
shards is exact, because their order is total: by score, then by index.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pyqemb.curation.corpus import read_corpus
from pyqemb.curation.mining import (
    Mined,
    Negatives,
    mean_scores,
    mined_from,
    positives_of_each_text,
    queries_by_instruction,
    to_mine,
    warn_of_losses,
    within,
)
from pyqemb.curation.rules import Rules
from pyqemb.curation.search import exact
from pyqemb.curation.spool import Seen, text_hash
from pyqemb.data.arguments import Count, NotNegative, checked
from pyqemb.data.columns import Columns
from pyqemb.data.example import Example, check_output, check_source, read_examples, write_examples
from pyqemb.data.files import check_writable, locked, one_at_a_time, remove_folder
from pyqemb.data.machine import writing
from pyqemb.errors import ConfigError, DataError
from pyqemb.jobs.folder import check_complete, claim, describe_output, parts_folder, read_output
from pyqemb.jobs.parts import CandidatesPart, DamagedPartError, VectorPart, texts_digest
from pyqemb.jobs.status import Reporter
from pyqemb.jobs.tasks import Task, task_of
from pyqemb.model.cached_encoder import fingerprint
from pyqemb.model.device import search_device
from pyqemb.model.encoder import checked_vectors, open_encoder, unit_encoder
from pyqemb.model.progress import progress_bar

ROWS = 4096  # texts of a part of vectors, as many as CachedEncoder encodes at a time
SHARD = 256  # parts of documents that a search part covers
TILE = 8192  # examples that a search part covers, as in `mine`
TILES = 8  # that are searched together: the vectors of a shard are read once for them
BLOCK = 32  # parts of documents that are searched at once
_FORMAT = 1


@dataclass(frozen=True)
class MiningTask:
    """The result of `mine_task`.

    Attributes:
        folder: the folder of the parts.
        documents: the number of documents of the job.
        vectors: the number of parts of vectors of this task.
        missing: the number of parts of vectors that other tasks have not made yet. If it is not 0, nothing was
            searched.
        searches: the number of parts of the search of this task, 0 if nothing was searched.
    """

    folder: Path
    documents: int
    vectors: int
    missing: int
    searches: int


@checked
def mine_task(
    model: str | Path,
    examples: str | Path,
    out: str | Path,
    *,
    tasks: Count,
    task: NotNegative,
    split: str | None = None,
    columns: Columns | None = None,
    corpus: str | Path | None = None,
    k: Count = 7,
    max_positive_ratio: float | None = 0.95,
    margin: float | None = None,
    max_score: float | None = None,
    mean_margin: float | None = None,
    skip_top: NotNegative = 0,
    depth: Count = 100,
    sampling: Literal["top", "random", "softmax"] = "top",
    sampling_temperature: float = 0.05,
    seed: NotNegative = 0,
    instruction: str | None = None,
) -> MiningTask:
    """Do the work of one of several tasks that mine hard negatives together, on any machines with one file system.

    Call it for all tasks, then once more for all, then call `pyqemb.finish(out)`. The first call of a task encodes its
    part of the texts. The second one searches, as soon as the vectors of all tasks exist. The order of the tasks is of
    no importance, and they may run at the same time. A call that was killed continues after its last finished part. No
    task holds the vectors or the texts of all documents in memory, only the examples.

    Args:
        model: a model folder or hub id.
        examples: a file or a folder of examples, as for `pyqemb.read_examples`.
        out: the JSONL file that `pyqemb.finish` writes. The parts are in the folder OUT.parts.
        tasks: the number of tasks.
        task: the number of this task, from 0.
        split: the split of a folder (default: train, or the only one).
        columns: the columns of the rows (default: the names of a known layout).
        corpus: a file or a folder with further documents (default: only the positives of all examples). Equal texts are
            one document; they are compared by a 64-bit hash.
        k: as for `pyqemb.mine`, like all further arguments.
        max_positive_ratio: as for `pyqemb.mine`.
        margin: as for `pyqemb.mine`.
        max_score: as for `pyqemb.mine`.
        mean_margin: as for `pyqemb.mine`.
        skip_top: as for `pyqemb.mine`.
        depth: as for `pyqemb.mine`.
        sampling: as for `pyqemb.mine`.
        sampling_temperature: as for `pyqemb.mine`.
        seed: as for `pyqemb.mine`.
        instruction: as for `pyqemb.mine`.

    Returns:
        The folder of the parts, and how many of them this task has made and is still waiting for.

    Raises:
        ConfigError: an argument is out of range, the parts belong to another job, or a task with this number
            is running.
        DataError: an input cannot be read, or holds no examples.
        MachineError: the disk is full, or another error of the machine. Finished parts are kept.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> from pyqemb.curation import mine_task
        >>> from pyqemb.testing.tiny import tiny_embedder
        >>> model = tiny_embedder().save_pretrained("model")
        >>> rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(4)]
        >>> _ = Path("pairs.json").write_text(json.dumps(rows))
        >>> for task in (0, 1, 0, 1):
        ...     done = mine_task(model, "pairs.json", "mined.jsonl", tasks=2, task=task, k=1, max_positive_ratio=None)
        >>> done.missing
        0
        >>> len(pyqemb.finish("mined.jsonl").examples[0].negatives)
        1
    """
    out, own = Path(out), task_of(tasks, task)
    assert own is not None
    rules = Rules(
        k=k, max_positive_ratio=max_positive_ratio, margin=margin, max_score=max_score, mean_margin=mean_margin,
        skip_top=skip_top, depth=depth, sampling=sampling, sampling_temperature=sampling_temperature,
    )  # fmt: skip
    sources = sources_of(examples, split, columns, corpus)
    for path in map(Path, filter(None, (sources.examples, sources.corpus))):
        if out.resolve() == path:
            raise ConfigError(f"out: {out} is also an input")
        if out.resolve().is_relative_to(path):
            raise ConfigError(f"out: {out} is inside of an input, {path}")
    check_output(out)
    encoder = unit_encoder(open_encoder(model))
    rows = sources.read()
    folder = parts_folder(out)
    with locked(folder, "mine", own.member()):
        facts = {
            "format": _FORMAT, "rows per part": ROWS, "parts per shard": SHARD, "examples per tile": TILE,
            "model": str(model), "fingerprint": fingerprint(encoder), "instruction": instruction, "seed": seed,
            **asdict(rules), **asdict(sources),
        }  # fmt: skip
        with one_at_a_time(folder):
            job = claim(folder, {**facts, **sources.state()}, shared=True)
            check_writable(out)
        texts = _Texts(folder, job, rows, sources, instruction, ROWS)
        with Reporter(folder, "mine", own) as report:
            documents = _known_documents(texts)
            if documents is None:
                report.stage("encode", "[dq]*.npy", None)
                documents = _encode_documents(texts, encoder, own, report)
                with one_at_a_time(folder):
                    describe_output(folder, "mine", job, {"documents": documents.count})
            queries, parts = _Vectors(), list(texts.queries())
            for part, some, _ in parts:
                queries.add(part, len(some))
            vectors = [*documents.parts, *queries.parts]
            made = sum(own.has(number) for number in range(len(vectors)))
            report.stage("encode", "[dq]*.npy", len(vectors))
            _encode_queries(parts, encoder, own, len(documents.parts), report)
            missing = sum(not part.path.exists() for part in vectors)
            if missing:
                return MiningTask(folder, documents.count, made, missing, 0)
            search = _Search(folder, job, len(rows.mined), documents.count, ROWS * SHARD, TILE)
            report.stage("search", "search-*.npy", len(search))
            device = search_device(encoder)
            searches = _search(search, texts, rules, documents, queries, own, device=device, report=report)
            return MiningTask(folder, documents.count, made, 0, searches)


def finish(out: Path, folder: Path, job: str, facts: dict[str, Any], settings: dict[str, Any]) -> Mined:
    """Merge the candidates that tasks have found, write the examples with their negatives, and remove the folder.

    Args:
        out: the file to write.
        folder: the folder of the parts, which is locked.
        job: the digest of the job.
        facts: the manifest of the job.
        settings: the settings of the output.

    Raises:
        DataError: parts are missing or damaged, or an input has changed. The parts are kept.
    """
    try:
        sources = _Sources(**{name: facts[name] for name in _Sources.__annotations__})
        rules = Rules(**{name: facts[name] for name in Rules.__annotations__})
        shard, tile = facts["rows per part"] * facts["parts per shard"], facts["examples per tile"]
        count, seed = settings["documents"], facts["seed"]
        is_known = facts["format"] == _FORMAT and all(type(each) is int for each in (shard, tile, count, seed))
        if not (is_known and shard > 0 and tile > 0 and count > 0 and seed >= 0):
            raise ConfigError("unknown")
        sources.check()
    except (KeyError, TypeError, ConfigError) as error:
        raise DataError(f"{folder}: its manifest is of another version of pyqemb, or damaged") from error
    if any(facts.get(name) != value for name, value in sources.state().items()):
        raise DataError(f"{sources.examples}: the inputs have changed since the parts in {folder} were begun")
    rows = sources.read()
    search = _Search(folder, job, len(rows.mined), count, shard, tile)
    check_complete(folder, [search.part(number) for number in range(len(search))], search.owner)
    found, generator = Negatives.none(len(rows.mined), rules.k), np.random.default_rng(seed)
    for number, place in enumerate(search.tiles):
        merged = None
        for part in search.parts_of_tile(number):
            candidates = part.candidates()
            merged = candidates if merged is None else merge(*merged, *candidates, rules.skip_top + rules.depth)
            found.positive_scores[place] = part.positive_scores()
        assert merged is not None
        scores, indices = merged
        places = rules.choose(scores, generator)
        found.indices[place, : places.shape[1]] = np.take_along_axis(indices, places, axis=1)
        found.scores[place, : places.shape[1]] = np.take_along_axis(scores, places, axis=1)
    chosen = set(found.indices[found.indices >= 0].tolist())
    texts = {number: text for number, text in enumerate(sources.documents(rows.positives)) if number in chosen}
    mined = mined_from(rows.everything, texts, found, count)
    with writing(out):
        write_examples(out, mined.examples)
        remove_folder(folder)
    return mined


def merge(
    scores: np.ndarray, indices: np.ndarray, more_scores: np.ndarray, more_indices: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of two lists of candidates of each query, best first, equal scores by lower index.

    Args:
        scores: float32 [N, A], best first, padded with -inf.
        indices: int64 [N, A].
        more_scores: float32 [N, B], those of documents with higher indices.
        more_indices: int64 [N, B].
        k: the number of candidates to keep.

    Returns:
        scores [N, at most k], indices [N, at most k].

    Example:
        >>> from pyqemb.curation.mining_tasks import merge
        >>> lists = [np.float32([[3, 1]]), np.array([[0, 2]]), np.float32([[3, 2]]), np.array([[7, 5]])]
        >>> scores, indices = merge(*lists, 3)
        >>> indices.tolist()
        [[0, 7, 5]]
    """
    if scores.shape[1] >= k:  # most of a later list is no better than what there is
        width = int((more_scores > scores[:, k - 1 : k]).sum(axis=1).max(initial=0))
        more_scores, more_indices = more_scores[:, :width], more_indices[:, :width]
    scores, indices = np.concatenate([scores, more_scores], axis=1), np.concatenate([indices, more_indices], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)


@dataclass(frozen=True)
class _Rows:
    """The examples of a job."""

    everything: list[Example]
    mined: list[Example]  # those that get negatives
    positives: list[str]  # distinct, in order: the first documents


@dataclass(frozen=True)
class _Sources:
    """The inputs of a job by their paths."""

    examples: str
    split: str | None
    columns: dict[str, Any] | None
    corpus: str | None

    def check(self) -> None:
        """TypeError unless the fields have their types."""
        optional = isinstance(self.split, str | None) and isinstance(self.corpus, str | None)
        if not (isinstance(self.examples, str) and optional and isinstance(self.columns, dict | None)):
            raise TypeError

    def state(self) -> dict[str, str]:
        """A digest of the names, sizes and times of all input files."""
        facts = []
        for root in filter(None, (self.examples, self.corpus)):
            files = [Path(root)] if Path(root).is_file() else sorted(Path(root).rglob("*"))
            for file in files:
                if file.is_file():
                    facts.append(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}")
        return {"inputs": hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()}

    def read(self) -> _Rows:
        """Read the examples. DataError if there are none."""
        everything = list(read_examples(self.examples, self.split, columns=self.columns))
        mined = to_mine(everything)
        warn_of_losses(mined)
        return _Rows(everything, mined, list(dict.fromkeys(example.positive for example in mined)))

    def documents(self, positives: Sequence[str]) -> Iterator[str]:
        """Yield the distinct documents in order: the positives, then the corpus."""
        seen = Seen()
        yield from positives
        for some in _chunks(positives, ROWS):
            seen.add(_hashes(some))
        for some in _chunks(() if self.corpus is None else read_corpus(self.corpus), ROWS):
            new = seen.add(_hashes(some))
            yield from (text for text, is_new in zip(some, new.tolist(), strict=True) if is_new)


def sources_of(examples: str | Path, split: str | None, columns: Columns | None, corpus: str | Path | None) -> _Sources:
    """The sources with absolute paths. ConfigError for a name that a manifest cannot hold."""
    check_source(examples)
    if not Path(examples).exists():
        raise ConfigError(f"{examples}: tasks read files and folders; download a dataset of the hub before")
    if corpus is not None and not Path(corpus).exists():
        raise DataError(f"{corpus}: no such file or folder")
    paths = [None if path is None else str(Path(path).resolve()) for path in (examples, corpus)]
    for path in filter(None, paths):
        if not path.isprintable():
            raise ConfigError(f"{path}: tasks need inputs whose names can be printed")
    given = {
        name: [value] if isinstance(value, str) else list(value) for name, value in (columns or {}).items()
    } or None
    return _Sources(str(paths[0]), split, given, paths[1])


@dataclass(frozen=True)
class _Texts:
    """The texts of a job, in parts."""

    folder: Path
    job: str
    rows: _Rows
    sources: _Sources
    instruction: str | None
    size: int

    def documents(self, task: Task) -> Iterator[tuple[VectorPart, list[str]]]:
        """Yield the parts of the documents and their texts; only the parts of the task have a digest of them."""
        for number, some in enumerate(_chunks(self.sources.documents(self.rows.positives), self.size)):
            yield self.part("documents", number, some if task.has(number) else None), some

    def queries(self) -> Iterator[tuple[VectorPart, list[str], str | None]]:
        """Yield the parts of the distinct queries, their texts and their instruction."""
        number = 0
        for instruction, texts in queries_by_instruction(self.rows.mined, self.instruction)[1].items():
            for some in _chunks(texts, self.size):
                yield self.part("queries", number, [instruction, *some]), some, instruction
                number += 1

    def part(self, kind: str, number: int, texts: list[Any] | None) -> VectorPart:
        """A part; without its texts, they are not compared."""
        digest = None if texts is None else texts_digest(texts)
        return VectorPart(self.folder / f"{kind}-{number:08}.npy", self.job, digest)


class _Vectors:
    """Unit vectors in parts on disk."""

    def __init__(self) -> None:
        self.parts: list[VectorPart] = []
        self.starts = [0]
        self._read = lru_cache(maxsize=8)(self.vectors)

    def vectors(self, number: int) -> np.ndarray:
        """float32 [N, E] of a part. A DataError after the part is removed, if it is damaged."""
        part = self.parts[number]
        try:
            return part.vectors()
        except DamagedPartError as error:
            part.path.unlink(missing_ok=True)  # its task makes it again
            raise DataError(f"{error}; run all tasks again, first to encode, then to search") from error

    @property
    def count(self) -> int:
        """The number of vectors."""
        return self.starts[-1]

    def add(self, part: VectorPart, count: int) -> None:
        """Append a part of `count` vectors."""
        self.parts.append(part)
        self.starts.append(self.starts[-1] + count)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """float32 [N, E] of indices [N]."""
        owners = np.searchsorted(self.starts, indices, side="right") - 1
        found: np.ndarray | None = None
        for owner in np.unique(owners).tolist():
            vectors, own = self._read(owner), owners == owner
            found = np.empty((len(indices), vectors.shape[1]), np.float32) if found is None else found
            found[own] = vectors[indices[own] - self.starts[owner]]
        assert found is not None
        return found


@dataclass(frozen=True)
class _Search:
    """The parts of the search: number = shard * tiles + tile."""

    folder: Path
    job: str
    num_examples: int
    num_documents: int
    shard: int  # documents
    tile: int  # examples

    @property
    def tiles(self) -> list[slice]:
        """The examples of each tile."""
        count = self.num_examples
        return [slice(start, min(start + self.tile, count)) for start in range(0, count, self.tile)]

    @property
    def num_shards(self) -> int:
        """The number of shards of the documents."""
        return -(-self.num_documents // self.shard)

    def __len__(self) -> int:
        return self.num_shards * len(self.tiles)

    def part(self, number: int) -> CandidatesPart:
        """The part of this number, from 0."""
        content = texts_digest([self.num_examples, self.num_documents, number])
        return CandidatesPart(self.folder / f"search-{number:08}.npy", self.job, content)

    def parts_of_tile(self, tile: int) -> list[CandidatesPart]:
        """The parts of a tile, by shard."""
        return [self.part(shard * len(self.tiles) + tile) for shard in range(self.num_shards)]

    def owner(self, number: int, tasks: int) -> int:
        """The task that makes a part: if there are enough, each has shards of its own, whose vectors it reads."""
        return (number // len(self.tiles) if self.num_shards >= tasks else number) % tasks


def _known_documents(texts: _Texts) -> _Vectors | None:
    """The documents, if all of their parts exist: then the corpus is not read again."""
    if not (texts.folder / "output.json").exists():
        return None
    count = read_output(texts.folder, texts.job)[1].get("documents")
    if type(count) is not int:
        return None
    documents = _Vectors()
    for number, start in enumerate(range(0, count, texts.size)):
        documents.add(texts.part("documents", number, None), min(texts.size, count - start))
    return documents if all(part.path.exists() for part in documents.parts) else None


def _encode_documents(texts: _Texts, model: Any, task: Task, report: Reporter) -> _Vectors:
    """Encode the missing parts of this task; returns all documents."""
    documents = _Vectors()
    for number, (part, some) in enumerate(texts.documents(task)):
        documents.add(part, len(some))
        if task.has(number) and not part.is_whole():
            part.write(checked_vectors(model.encode_document(some), len(some), "documents"), None)
            report.advance()
    return documents


def _encode_queries(
    parts: Sequence[tuple[VectorPart, list[str], str | None]], model: Any, task: Task, first: int, report: Reporter
) -> None:
    """Encode the missing parts of this task, which are numbered from `first` on."""
    for number, (part, some, instruction) in enumerate(parts, first):
        if task.has(number) and not part.is_whole():
            vectors = model.encode_query(some, instruction=instruction)
            part.write(checked_vectors(vectors, len(some), "queries"), None)
            report.advance()


@dataclass
class _Tile:
    """The queries of a tile, and their best candidates so far."""

    part: CandidatesPart
    queries: np.ndarray
    excluded: np.ndarray
    positive_scores: np.ndarray
    ceilings: np.ndarray
    scores: np.ndarray
    indices: np.ndarray


def _search(
    search: _Search,
    texts: _Texts,
    rules: Rules,
    documents: _Vectors,
    queries: _Vectors,
    task: Task,
    *,
    device: Any,
    report: Reporter,
) -> int:
    """Search the missing parts of this task; returns the number of its parts."""
    own = [number for number in range(len(search)) if search.owner(number, task.tasks) == task.number]
    missing = [number for number in own if not search.part(number).is_whole()]
    examples, place = texts.rows.mined, {text: index for index, text in enumerate(texts.rows.positives)}
    excluded, positives = positives_of_each_text(examples, place), np.array([place[e.positive] for e in examples])
    query_rows = queries_by_instruction(examples, texts.instruction)[0]
    tiles, wanted = search.tiles, min(rules.depth + rules.skip_top, documents.count)

    def tile_of(number: int) -> _Tile:
        rows = tiles[number % len(tiles)]
        vectors = queries.rows(query_rows[rows])
        known = np.unique(excluded[rows][excluded[rows] >= 0])
        pool = documents.rows(known)
        scores = (vectors * pool[within(positives[rows], known)]).sum(axis=1)
        means = mean_scores(vectors, pool, within(excluded[rows], known)) if rules.mean_margin is not None else scores
        return _Tile(
            search.part(number), vectors, excluded[rows], scores, rules.ceilings(scores, means),
            np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64),
        )  # fmt: skip

    with progress_bar("Parts of the search", len(missing)) as advance:
        for group in _groups(missing, len(tiles)):
            work = [tile_of(number) for number in group]
            first = group[0] // len(tiles) * search.shard
            for start, vectors in _blocks(documents, first, first + search.shard):
                find = exact(vectors, device)
                for tile in work:
                    inside = np.where(
                        (tile.excluded >= start) & (tile.excluded < start + len(vectors)), tile.excluded - start, -1
                    )
                    scores, indices = find(tile.queries, inside, tile.ceilings, min(wanted, len(vectors)))
                    indices = np.where(indices < 0, -1, indices + start)
                    tile.scores, tile.indices = merge(tile.scores, tile.indices, scores, indices, wanted)
            for tile in work:
                tile.part.write(tile.scores, tile.indices, tile.positive_scores)
                report.advance()
            advance(len(group))
    return len(own)


def _groups(numbers: Sequence[int], num_tiles: int) -> Iterator[list[int]]:
    """Yield the parts that are searched together: those of one shard, at most TILES."""
    group: list[int] = []
    for number in numbers:
        if group and (len(group) == TILES or number // num_tiles != group[0] // num_tiles):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _blocks(documents: _Vectors, first: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index of the first, vectors) of the documents from `first` on, some parts at a time."""
    numbers = [number for number, start in enumerate(documents.starts[:-1]) if first <= start < end]
    for some in _chunks(numbers, BLOCK):
        start, end = documents.starts[some[0]], documents.starts[some[-1] + 1]
        block: np.ndarray | None = None
        for number in some:
            vectors, place = documents.vectors(number), documents.starts[number] - start
            block = np.empty((end - start, vectors.shape[1]), np.float32) if block is None else block
            block[place : place + len(vectors)] = vectors
        assert block is not None
        yield start, block


def _hashes(texts: Sequence[str]) -> np.ndarray:
    return np.fromiter((text_hash(text) for text in texts), np.uint64, len(texts))


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while some := list(islice(items, size)):
        yield some
