"""nDCG@10 by dimension, with and without Matryoshka dimensions in training: the plot of docs/concepts/matryoshka.md.

Stage 2 of `pyqemb demo` alone, on the LibreOffice help: one layer, 192 features. `python benchmarks/matryoshka.py
FOLDER` trains both models into FOLDER, writes FOLDER/matryoshka.json and draws docs/assets/plots/matryoshka.svg.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from help_models import prepared, scores, trained

from pyqemb.evaluation import rank

DIMS = (192, 96, 48, 24, 12)
PLOT = Path(__file__).parents[1] / "docs" / "assets" / "plots" / "matryoshka.svg"


def search(dim: int, questions: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search with the first `dim` features, normalized again."""
    short = [np.ascontiguousarray(vectors[:, :dim]) for vectors in (questions, documents)]
    first, second = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in short)
    return rank(first, second, k)


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
    material, settings, base, data = prepared(out)
    results: dict[str, dict[int, float]] = {}
    losses: dict[str, dict[str, Any]] = {
        "trained with Matryoshka dimensions": {"matryoshka": DIMS[:-1]},
        "trained without": {},
    }
    for name, loss in losses.items():
        folder = trained(base, data, out / name.replace(" ", "-"), material, settings, loss)
        results[name] = scores(folder, material, {dim: partial(search, dim) for dim in DIMS})
        print(name, results[name], flush=True)
        (out / "matryoshka.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
