"""nDCG@10 by precision of the stored vectors, with and without quantization in training: docs/concepts/quantization.md.

Stage 2 of `pyqemb demo` alone, on the LibreOffice help: one layer, 192 features. `python benchmarks/quantization.py
FOLDER` trains the models into FOLDER, prints a table in Markdown, and writes FOLDER/quantization.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from help_models import prepared, scores, trained

from pyqemb.evaluation.storage import Storage

TRAININGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, int8": {"precisions": ("float32", "int8")},
    "float32, binary": {"precisions": ("float32", "binary")},
    "binary": {"precisions": ("binary",)},
    "float32, spread_out 1": {"spread_out": 1.0},
}
STORAGES = (Storage(), Storage("int8"), Storage("binary"), Storage("binary", rescore=40))


def name(storage: Storage) -> str:
    return storage.precision + (f", rescore {storage.rescore}" if storage.rescore else "")


def main(out: Path) -> None:
    material, settings, base, data = prepared(out)
    results: dict[str, dict[str, float]] = {}
    print("| trained with | " + " | ".join(map(name, STORAGES)) + " |")
    print("| --- |" + " --- |" * len(STORAGES))
    for training, loss in TRAININGS.items():
        folder = trained(base, data, out / training.replace(", ", "-").replace(" ", "-"), material, settings, loss)
        results[training] = scores(folder, material, {name(storage): storage.search for storage in STORAGES})
        print(
            f"| {training} | " + " | ".join(f"{value:.3f}" for value in results[training].values()) + " |", flush=True
        )
        (out / "quantization.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
