"""nDCG@10 by dimension, with and without Matryoshka dimensions in training: the plot of docs/concepts/matryoshka.md.

Stage 2 of `pyqemb demo` alone, on the LibreOffice help: one layer, 192 features. `python benchmarks/matryoshka.py
FOLDER` trains both models into FOLDER, writes FOLDER/matryoshka.json and draws docs/assets/plots/matryoshka.svg.
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
from pyqemb.evaluation import rank
from pyqemb.model.embedder import Embedder
from pyqemb.training import stage2, train

DIMS = (192, 96, 48, 24, 12)
PLOT = Path(__file__).parents[1] / "docs" / "assets" / "plots" / "matryoshka.svg"


def trained(base: Path, data: Path, out: Path, material: Material, settings: Settings, dims: Sequence[int]) -> Path:
    """The final folder of a run of stage 2 with these Matryoshka dimensions, or none."""
    loss: dict[str, Any] = {"temperature": settings.temperature_stage2}
    config = stage2(
        model={"base": str(base), "max_length": material.max_length},
        data=[{"path": str(data)}],
        loss={**loss, "matryoshka": tuple(dims)} if dims else loss,
        train={
            "steps": settings.steps_stage2, "global_batch_size": settings.batch, "num_negatives": 0,
            "learning_rate": settings.rate_stage2, "betas": (0.9, 0.95), "log_every": 20, "schedule": "linear",
            "tokens_per_chunk": 65536,
        },
        save={"dir": str(out), "every": None},
    )  # fmt: skip
    return train(config).folder


def by_dimension(folder: Path, material: Material) -> dict[int, float]:
    """The mean nDCG@10 over the languages on the held-out pages, for each dimension."""
    embedder = Embedder.from_pretrained(folder)
    texts = {document.text for document in next(iter(material.corpora.values()))}
    vectors = dict(zip(texts, embedder.encode_document(list(texts)), strict=True))

    def search(dim: int) -> Callable[[Sequence[str], Sequence[Document], int], tuple[np.ndarray, np.ndarray]]:
        def cut(found: np.ndarray) -> np.ndarray:
            short = np.ascontiguousarray(found[:, :dim])
            return short / np.linalg.norm(short, axis=1, keepdims=True)

        def one(questions: Sequence[str], corpus: Sequence[Document], k: int) -> tuple[np.ndarray, np.ndarray]:
            documents = np.stack([vectors[document.text] for document in corpus])
            return rank(cut(embedder.encode_query(list(questions))), cut(documents), k)

        return one

    held_out = next(iter(material.corpora))
    only = replace(material, corpora={held_out: material.corpora[held_out]})
    return {dim: measure(str(dim), search(dim), only).scores[held_out][MEAN][NDCG].value for dim in DIMS}


def plot(results: dict[str, dict[int, float]]) -> None:
    """Draw the results."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 13, "svg.hashsalt": "0"})
    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    for (name, values), color in zip(results.items(), ("#3f51b5", "#546e7a"), strict=True):
        axes.plot(list(values), list(values.values()), marker="o", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(DIMS, [str(dim) for dim in DIMS])
    axes.minorticks_off()
    axes.set(xlabel="features kept", ylabel="nDCG@10", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None, "Creator": None})


def main(out: Path) -> None:
    material, settings = help_material(), Settings()
    out.mkdir(parents=True, exist_ok=True)
    base, data = untrained_model(material, settings).save_pretrained(out / "base"), out / "supervised.jsonl"
    write_examples(data, material.supervised)
    results = {}
    for name, dims in (("trained with Matryoshka dimensions", DIMS[:-1]), ("trained without", ())):
        folder = trained(base, data, out / name.replace(" ", "-"), material, settings, dims)
        results[name] = by_dimension(folder, material)
        print(name, results[name], flush=True)
        (out / "matryoshka.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
