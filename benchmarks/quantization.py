"""nDCG@10 by precision of the stored vectors, with and without quantization in training: docs/concepts/quantization.md.

Stage 2 of `pyqemb demo` alone, on the LibreOffice help: one layer, 192 features. `python benchmarks/quantization.py
FOLDER` trains the models into FOLDER, prints a table in Markdown, and writes FOLDER/quantization.json.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyqemb.data.example import write_examples
from pyqemb.demo.help_data import help_material
from pyqemb.demo.material import Document, Material
from pyqemb.demo.measure import measure
from pyqemb.demo.pipeline import Settings, untrained_model
from pyqemb.demo.results import MEAN, NDCG
from pyqemb.evaluation.storage import Storage
from pyqemb.model.embedder import Embedder
from pyqemb.training import stage2, train

TRAININGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, int8": {"precisions": ("float32", "int8")},
    "float32, binary": {"precisions": ("float32", "binary")},
    "binary": {"precisions": ("binary",)},
    "float32, spread_out 1": {"spread_out": 1.0},
}
STORAGES = (Storage(), Storage("int8"), Storage("binary"), Storage("binary", rescore=40))


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


def by_storage(folder: Path, material: Material) -> dict[str, float]:
    """The mean nDCG@10 over the languages on the held-out pages, for each way to store the vectors."""
    embedder = Embedder.from_pretrained(folder)
    texts = {document.text for document in next(iter(material.corpora.values()))}
    vectors = dict(zip(texts, embedder.encode_document(list(texts)), strict=True))

    def search(storage: Storage) -> Callable[[Sequence[str], Sequence[Document], int], tuple[np.ndarray, np.ndarray]]:
        def one(questions: Sequence[str], corpus: Sequence[Document], k: int) -> tuple[np.ndarray, np.ndarray]:
            documents = np.stack([vectors[document.text] for document in corpus])
            return storage.search(embedder.encode_query(list(questions)), documents, k)

        return one

    held_out = next(iter(material.corpora))
    only = replace(material, corpora={held_out: material.corpora[held_out]})
    return {name(s): measure(name(s), search(s), only).scores[held_out][MEAN][NDCG].value for s in STORAGES}


def name(storage: Storage) -> str:
    return storage.precision + (f", rescore {storage.rescore}" if storage.rescore else "")


def main(out: Path) -> None:
    material, settings = help_material(), Settings()
    out.mkdir(parents=True, exist_ok=True)
    base, data = untrained_model(material, settings).save_pretrained(out / "base"), out / "supervised.jsonl"
    write_examples(data, material.supervised)
    results: dict[str, dict[str, float]] = {}
    print("| trained with | " + " | ".join(map(name, STORAGES)) + " |")
    print("| --- |" + " --- |" * len(STORAGES))
    for training, loss in TRAININGS.items():
        folder = trained(base, data, out / training.replace(", ", "-").replace(" ", "-"), material, settings, loss)
        results[training] = by_storage(folder, material)
        print(
            f"| {training} | " + " | ".join(f"{value:.3f}" for value in results[training].values()) + " |", flush=True
        )
        (out / "quantization.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
