"""Quantization of vectors to one byte or one bit per feature, as in sentence-transformers.

Legend: N vectors, E features.
"""

from typing import Literal, get_args

import numpy as np

from pyqemb.data.arguments import Count, checked
from pyqemb.errors import ConfigError

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


@checked
def quantize(vectors_NE: np.ndarray, precision: str, ranges_2E: np.ndarray | None = None) -> np.ndarray:
    """Convert float32 vectors to another precision.

    int8, uint8: 256 steps between the minimum and the maximum of each feature, `ranges_2E` or those of these vectors.
    Use the same ranges for queries and documents that are compared. binary, ubinary: the signs, eight features per
    byte, [N, ceil(E / 8)], as int8 (minus 128) or uint8.

    Raises ConfigError: an unknown precision, ranges of another shape.
    """
    check_precision(precision)
    _check_vectors("quantize", vectors_NE)
    if precision == "float32":
        return vectors_NE.astype(np.float32, copy=False)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors_NE > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    ranges_2E = value_ranges(vectors_NE) if ranges_2E is None else ranges_2E
    ranges_2E = _checked_ranges(ranges_2E, vectors_NE.shape[-1])
    steps_E = _steps(ranges_2E)
    steps_E = np.where(steps_E == 0, 1, steps_E)
    places_NE = np.clip(np.floor((vectors_NE - ranges_2E[0]) / steps_E), 0, 255)
    return places_NE.astype(np.uint8) if precision == "uint8" else (places_NE - 128).astype(np.int8)


@checked
def dequantize(codes: np.ndarray, precision: str, dim: Count, ranges_2E: np.ndarray | None = None) -> np.ndarray:
    """The float32 vectors [N, dim] that the result of `quantize` represents.

    int8, uint8: the middle of each step. binary, ubinary: -1 and 1, so that the dot product of two vectors is
    dim - 2 * (their Hamming distance).

    Args:
        codes: the result of `quantize`.
        precision: its precision.
        dim: the number of features E; binary codes are padded to whole bytes.
        ranges_2E: the ranges that `quantize` used; int8 and uint8 need them.

    Raises ConfigError: an unknown precision, no ranges, ranges of another shape.

    Example:
        >>> vectors = np.array([[0.6, -0.8], [-1.0, 0.0]], dtype=np.float32)
        >>> dequantize(quantize(vectors, "ubinary"), "ubinary", 2).tolist()
        [[1.0, -1.0], [-1.0, -1.0]]
    """
    check_precision(precision)
    _check_codes(codes, precision, dim)
    if precision == "float32":
        return codes.astype(np.float32, copy=False)
    if precision in ("binary", "ubinary"):
        bits = codes if precision == "ubinary" else (codes.astype(np.int16) + 128).astype(np.uint8)
        return np.unpackbits(bits, axis=-1, count=dim).astype(np.float32) * 2 - 1
    if ranges_2E is None:
        raise ConfigError(f"ranges: {precision} needs those of the call of quantize")
    ranges_2E = _checked_ranges(ranges_2E, dim)
    places = codes.astype(np.float32) + (128.5 if precision == "int8" else 0.5)
    return (ranges_2E[0] + places * _steps(ranges_2E)).astype(np.float32, copy=False)


@checked
def check_precision(precision: str) -> None:
    """Raise ConfigError unless `precision` is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


@checked
def bytes_per_vector(precision: str, dim: Count) -> int:
    """The size of a stored vector of `dim` features."""
    check_precision(precision)
    return {"float32": 4 * dim, "int8": dim, "uint8": dim}.get(precision, -(-dim // 8))


@checked
def value_ranges(vectors_NE: np.ndarray) -> np.ndarray:
    """float32 [2, E]: the minimum and the maximum of each feature."""
    _check_vectors("value_ranges", vectors_NE)
    if not len(vectors_NE):
        return np.zeros((2, vectors_NE.shape[-1]), dtype=np.float32)
    return np.stack([vectors_NE.min(axis=0), vectors_NE.max(axis=0)])


def _checked_ranges(ranges_2E: np.ndarray, dim: int) -> np.ndarray:
    if not np.issubdtype(ranges_2E.dtype, np.number):
        raise TypeError(f"ranges must be numbers, got {ranges_2E.dtype}")
    if ranges_2E.shape != (2, dim):
        raise ConfigError(f"ranges must have shape [2, {dim}], got {list(ranges_2E.shape)}")
    if not np.isfinite(ranges_2E).all():
        raise ConfigError("ranges must be finite, got NaN or infinity")
    return np.asarray(ranges_2E, dtype=np.float32)


def _steps(ranges_2E: np.ndarray) -> np.ndarray:
    return (ranges_2E[1] - ranges_2E[0]) / 255


def _check_vectors(function: str, vectors_NE: np.ndarray) -> None:
    if vectors_NE.ndim != 2 or not np.issubdtype(vectors_NE.dtype, np.floating):
        raise TypeError(
            f"[{function}] vectors must be floats with two dimensions, got {vectors_NE.dtype} of shape "
            f"{[*vectors_NE.shape]}"
        )


def _check_codes(codes: np.ndarray, precision: str, dim: int) -> None:
    kinds = {"float32": np.floating, "int8": np.int8, "binary": np.int8}
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, kinds.get(precision, np.uint8)):
        raise TypeError(
            f"[dequantize] codes must be those of {precision} with two dimensions, got {codes.dtype} of shape "
            f"{[*codes.shape]}"
        )
    size = -(-dim // 8) if precision in ("binary", "ubinary") else dim
    if codes.shape[1] != size:
        raise ConfigError(f"[dequantize] dim: {dim} features of {precision} are {size} codes, got {codes.shape[1]}")
