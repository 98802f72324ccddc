"""Check the similarities of a released Qwen3-Embedding model: `python -m pyqemb.interop.released FOLDER`.

The model card of the 0.6B model has four similarities; those of the larger models are close to them.
"""

import sys
from pathlib import Path

import numpy as np

from pyqemb.errors import PyqembError
from pyqemb.model.embedder import Embedder
from pyqemb.model.sentence import DEFAULT_INSTRUCTION

QUERIES = ("What is the capital of China?", "Explain gravity")
DOCUMENTS = (
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects and is "
    "responsible for the movement of planets around the sun.",
)
EXPECTED = np.array([[0.7646, 0.1414], [0.1355, 0.6000]])
TOLERANCE = 0.005


def similarities(model: Embedder) -> np.ndarray:
    """The similarity of each query with each document, float32 [2, 2]."""
    return model.similarity(model.encode(QUERIES, instruction=DEFAULT_INSTRUCTION), model.encode(DOCUMENTS)).numpy()


def check(folder: str | Path, device: str | None = None) -> list[tuple[str, str, float, float, bool]]:
    """(query, document, expected, found, whether they agree within TOLERANCE) of each pair.

    CheckpointError: no such model.
    """
    found = similarities(Embedder.from_pretrained(folder, device=device))
    return [
        (
            query,
            document,
            float(EXPECTED[i, j]),
            float(found[i, j]),
            abs(float(found[i, j] - EXPECTED[i, j])) <= TOLERANCE,
        )
        for i, query in enumerate(QUERIES)
        for j, document in enumerate(DOCUMENTS)
    ]


def main(arguments: list[str]) -> int:
    """Exit code 0: all agree, 1: some differ, 2: no folder was given, 3: it cannot be loaded."""
    from rich.console import Console
    from rich.table import Table

    if len(arguments) != 1:
        print("usage: python -m pyqemb.interop.released FOLDER", file=sys.stderr)
        return 2
    try:
        rows = check(arguments[0])
    except PyqembError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    table = Table("query", "document", "model card", "found", f"within {TOLERANCE}", title=arguments[0])
    for query, document, expected, found, good in rows:
        table.add_row(query, document[:40], f"{expected:.4f}", f"{found:.4f}", "yes" if good else "NO")
    Console().print(table)
    return 0 if all(row[-1] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
