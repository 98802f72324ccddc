"""Similarities of vectors, named as in sentence-transformers. Legend: M, N vectors, E features."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pyqemb.errors import ConfigError

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_NORMS = {"euclidean": 2.0, "manhattan": 1.0}  # their similarity is the negative distance


def check_similarity(name: Any) -> str:
    """Return the name, which may be given as an enum member; None is "cosine". ConfigError: an unknown name."""
    value = "cosine" if name is None else getattr(name, "value", name)
    if value not in SIMILARITIES:
        raise ConfigError(f"similarity_fn_name must be one of {', '.join(SIMILARITIES)}, got {value!r}")
    return value


def similarity(name: str, a: Any, b: Any) -> torch.Tensor:
    """[M, N] of each vector of `a` with each of `b`."""
    a_ME, b_NE = (torch.atleast_2d(x) for x in _tensors(a, b))
    for at, x in (("embeddings1", a_ME), ("embeddings2", b_NE)):
        if x.ndim > 2:
            raise ConfigError(f"[similarity] {at} must have at most two dimensions, got shape {[*x.shape]}")
    if a_ME.shape[1] != b_NE.shape[1]:
        raise ConfigError(
            f"[similarity] embeddings1 and embeddings2 must have as many features, got {a_ME.shape[1]} and "
            f"{b_NE.shape[1]}"
        )
    if name in _NORMS:
        return -torch.cdist(a_ME, b_NE, p=_NORMS[name])
    if name == "cosine":
        a_ME, b_NE = F.normalize(a_ME, dim=-1), F.normalize(b_NE, dim=-1)
    return a_ME @ b_NE.T


def similarity_pairwise(name: str, a: Any, b: Any) -> torch.Tensor:
    """[N] of each vector of `a` with the vector of `b` in the same row."""
    a_NE, b_NE = _tensors(a, b)
    if a_NE.shape != b_NE.shape:
        raise ConfigError(
            f"[similarity_pairwise] embeddings1 and embeddings2 must have one shape, got {[*a_NE.shape]} and "
            f"{[*b_NE.shape]}"
        )
    if name in _NORMS:
        return -torch.linalg.vector_norm(a_NE - b_NE, ord=_NORMS[name], dim=-1)
    if name == "cosine":
        a_NE, b_NE = F.normalize(a_NE, dim=-1), F.normalize(b_NE, dim=-1)
    return (a_NE * b_NE).sum(dim=-1)


def _tensors(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as floats of one dtype, at least float32."""
    a, b = _tensor("embeddings1", a), _tensor("embeddings2", b)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


def _tensor(name: str, x: Any) -> torch.Tensor:
    try:
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], torch.Tensor):
            x = torch.stack(list(x))
        elif not isinstance(x, torch.Tensor):
            x = torch.as_tensor(np.asarray(x))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array or a tensor, got {type(x).__name__}: {error}") from error
    if x.dtype == torch.bool or x.is_complex() or x.is_quantized or x.layout is not torch.strided or not x.ndim:
        raise TypeError(f"{name} must be a dense array or tensor of numbers, got {x.dtype} of shape {[*x.shape]}")
    return x
