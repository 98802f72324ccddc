"""Models of stage 2 of `pyqemb demo` alone, on the LibreOffice help: what the benchmarks of vectors have in common."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pyqemb.data.example import write_examples
from pyqemb.demo.help_data import help_material
from pyqemb.demo.material import Document, Material
from pyqemb.demo.measure import measure
from pyqemb.demo.pipeline import Settings, untrained_model
from pyqemb.demo.results import MEAN, NDCG
from pyqemb.model.embedder import Embedder
from pyqemb.training import stage2, train

Key = TypeVar("Key")
# (vectors of the questions, of the documents, k) -> scores and indices [questions, k], best first
Search = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def prepared(out: Path) -> tuple[Material, Settings, Path, Path]:
    """The material, the settings of the demo, and in `out` the untrained model and the training data."""
    material, settings = help_material(), Settings()
    out.mkdir(parents=True, exist_ok=True)
    base, data = untrained_model(material, settings).save_pretrained(out / "base"), out / "supervised.jsonl"
    write_examples(data, material.supervised)
    return material, settings, base, data


def trained(base: Path, data: Path, out: Path, material: Material, settings: Settings, loss: dict[str, Any]) -> Path:
    """The final folder of a run of stage 2 with these settings of the loss."""
    config = stage2(
        model={"base": str(base), "max_length": material.max_length},
        data=[{"path": str(data)}],
        loss={"temperature": settings.temperature_stage2, **loss},
        train={
            "steps": settings.steps_stage2, "global_batch_size": settings.batch, "num_negatives": 0,
            "learning_rate": settings.rate_stage2, "betas": (0.9, 0.95), "log_every": 20, "schedule": "linear",
            "tokens_per_chunk": 65536,
        },
        save={"dir": str(out), "every": None},
    )  # fmt: skip
    return train(config).folder


def scores(folder: Path, material: Material, searches: Mapping[Key, Search]) -> dict[Key, float]:
    """The mean nDCG@10 over the languages on the held-out pages, for each way to search."""
    embedder = Embedder.from_pretrained(folder)
    texts = {document.text for document in next(iter(material.corpora.values()))}
    vectors = dict(zip(texts, embedder.encode_document(list(texts)), strict=True))

    def with_texts(
        search: Search,
    ) -> Callable[[Sequence[str], Sequence[Document], int], tuple[np.ndarray, np.ndarray]]:
        def one(questions: Sequence[str], corpus: Sequence[Document], k: int) -> tuple[np.ndarray, np.ndarray]:
            documents = np.stack([vectors[document.text] for document in corpus])
            return search(embedder.encode_query(list(questions)), documents, k)

        return one

    held_out = next(iter(material.corpora))
    only = replace(material, corpora={held_out: material.corpora[held_out]})
    return {
        key: measure(str(key), with_texts(search), only).scores[held_out][MEAN][NDCG].value
        for key, search in searches.items()
    }
