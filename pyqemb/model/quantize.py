"""Quantization of vectors to one byte or one bit per feature, as in sentence-transformers.

Legend: N vectors, E features.
"""

from typing import Literal, get_args

import numpy as np

from pyqemb.errors import ConfigError

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def quantize(vectors_NE: np.ndarray, precision: str, ranges_2E: np.ndarray | None = None) -> np.ndarray:
    """Convert float32 vectors to another precision.

    int8, uint8: 256 steps between the minimum and the maximum of each feature, `ranges_2E` or those of these vectors.
    Use the same ranges for queries and documents that are compared. binary, ubinary: the signs, eight features per
    byte, [N, ceil(E / 8)], as int8 (minus 128) or uint8.

    Raises ConfigError: an unknown precision, ranges of another shape.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "float32":
        return vectors_NE.astype(np.float32, copy=False)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors_NE > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    ranges_2E = value_ranges(vectors_NE) if ranges_2E is None else np.asarray(ranges_2E, dtype=np.float32)
    if ranges_2E.shape != (2, vectors_NE.shape[-1]):
        raise ConfigError(f"ranges must have shape [2, {vectors_NE.shape[-1]}], got {list(ranges_2E.shape)}")
    steps_E = (ranges_2E[1] - ranges_2E[0]) / 255
    steps_E = np.where(steps_E == 0, 1, steps_E)
    places_NE = np.clip(np.floor((vectors_NE - ranges_2E[0]) / steps_E), 0, 255)
    return places_NE.astype(np.uint8) if precision == "uint8" else (places_NE - 128).astype(np.int8)


def value_ranges(vectors_NE: np.ndarray) -> np.ndarray:
    """float32 [2, E]: the minimum and the maximum of each feature."""
    if not len(vectors_NE):
        return np.zeros((2, vectors_NE.shape[-1]), dtype=np.float32)
    return np.stack([vectors_NE.min(axis=0), vectors_NE.max(axis=0)])
