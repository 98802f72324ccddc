"""The input of synthesis: passages and personas."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyqemb.data import beir
from pyqemb.data.files import atomic_file
from pyqemb.data.machine import unreadable
from pyqemb.data.npy import npy, read_vectors
from pyqemb.data.rows import check_is_file, format_of, read_rows, read_text
from pyqemb.errors import DataError
from pyqemb.synthesis.config import Personas, SynthesisConfig

_WINDOW = 256  # passages encoded together


@dataclass(frozen=True)
class Source:
    """A passage, its language if known, and the personas to choose from."""

    text: str
    language: str | None = None
    personas: tuple[str, ...] = ()


def read_sources(config: SynthesisConfig) -> Iterator[Source]:
    """The distinct passages of a configuration, with their personas. DataError if there are none."""
    people = None if config.personas is None else People(config.personas, config.out, config.seed)
    window: list[Source] = []
    count = 0
    for source in _passages(config):
        count += 1
        window.append(source)
        if len(window) == _WINDOW or count == config.limit:
            yield from window if people is None else people.offer(window)
            window = []
        if count == config.limit:
            break
    yield from window if people is None else people.offer(window)
    if not count:
        raise DataError(f"{config.passages}: holds no passage of at least {config.min_characters} characters")


class People:
    """The personas of a file, by relevance to a passage or at random."""

    def __init__(self, settings: Personas, folder: Path, seed: int):
        self._texts = list(dict.fromkeys(_read_personas(settings.file)))
        if not self._texts:
            raise DataError(f"{settings.file}: holds no personas")
        self._top, self._seed = min(settings.top, len(self._texts)), seed
        self._model = None
        if settings.model is not None:
            from pyqemb.model.encoder import open_encoder, unit_encoder

            self._model = unit_encoder(open_encoder(settings.model))
            self._vectors = self._embed(settings.model, folder)

    def offer(self, sources: list[Source]) -> Iterator[Source]:
        """Yield each source with its personas: the most relevant ones, or ones chosen by the seed and the text."""
        if not sources:
            return
        if self._model is None:
            for source in sources:
                generator = random.Random(f"{self._seed} {source.text}")
                yield Source(source.text, source.language, tuple(generator.sample(self._texts, self._top)))
            return
        import torch

        from pyqemb import ops

        vectors = np.ascontiguousarray(self._model.encode_document([source.text for source in sources]))
        _, found = ops.top_k(torch.from_numpy(vectors), torch.from_numpy(self._vectors), self._top)
        for source, indices in zip(sources, found.tolist(), strict=True):
            yield Source(source.text, source.language, tuple(self._texts[i] for i in indices))

    def _embed(self, model: str, folder: Path) -> np.ndarray:
        """Encode the personas, once for each file and model; the vectors are stored in the output folder."""
        assert self._model is not None
        digest = hashlib.sha256("\0".join([model, *self._texts]).encode("utf-8", "replace")).hexdigest()[:16]
        path = folder / f"personas-{digest}.npy"
        if not path.exists():
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                file.writelines(npy(np.asarray(self._model.encode_document(self._texts), dtype=np.float32)))
        try:
            vectors = read_vectors(path.read_bytes(), str(path))
        except OSError as error:
            raise unreadable(path, error) from error
        except DataError as error:
            raise DataError(f"{error}; remove it to encode the personas again") from error
        if len(vectors) != len(self._texts):
            raise DataError(f"{path}: damaged: has {len(vectors)} vectors of {len(self._texts)} personas; remove it")
        return vectors


def _read_personas(path: Path) -> Iterator[str]:
    check_is_file(path)
    if format_of(path) == ".txt":
        yield from (line.strip() for _, line in read_text(path) if line.strip())
        return
    for where, row in read_rows(path):
        text = next((row[key] for key in ("persona", "text", "description") if isinstance(row.get(key), str)), None)
        if text is None:
            raise DataError(f"{where}: expected a persona under 'persona', the row has {sorted(row)}")
        if text.strip():
            yield text.strip()


def _passages(config: SynthesisConfig) -> Iterator[Source]:
    seen: set[bytes] = set()
    for text, language in _rows(config.passages):
        text = _cut(text.strip(), config.max_characters)
        digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
        if len(text) >= config.min_characters and digest not in seen:
            seen.add(digest)
            yield Source(text, language)


def _rows(path: Path) -> Iterator[tuple[str, str | None]]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        yield from ((text, None) for _, text in beir.read_documents(path))
        return
    if format_of(path) == ".txt":
        yield from ((line, None) for _, line in read_text(path))
        return
    for where, row in read_rows(path):
        text = next((row[key] for key in ("text", "positive", "passage") if isinstance(row.get(key), str)), None)
        if text is None:
            raise DataError(f"{where}: expected a passage under 'text', the row has {sorted(row)}")
        title, language = row.get("title"), row.get("language")
        yield f"{title}\n{text}" if title else text, language if isinstance(language, str) else None


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    space = text.rfind(" ", longest // 2, longest)
    return text[: space if space > 0 else longest]
