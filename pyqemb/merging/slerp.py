"""Interpolation of tensors, each treated as one vector: linear, spherical, and the weighted Karcher mean.

Dot products and angles are summed in float64, in pieces, for any dtype.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PARALLEL = 0.9995  # |cos| above which lerp replaces slerp; the difference is below 1e-4 of the angle
_PIECE = 1 << 20  # elements held in float64 at a time


@dataclass(frozen=True)
class Blend:
    """A merged tensor.

    It is float32, or float64 if an input is. `angle` is the largest angle, in degrees; `lerp` says whether linear
    interpolation was used instead of slerp.
    """

    tensor: Tensor
    angle: float
    lerp: bool


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Blend:
    """sum_k w_k x_k with the weights scaled to sum to 1. The reported angle is the largest to the first tensor."""
    normalized = _normalized(weights)
    angles = [angle(tensors[0], other) for other in tensors[1:]]
    return Blend(_combine(tensors, normalized), max(angles, default=0.0), False)


def slerp(a: Tensor, b: Tensor, t: float) -> Blend:
    """sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, where w is the angle between a and b (Shoemake 1985).

    The tensors are not normalized before they are combined. t = 0 and t = 1 give a and b exactly. Nearly parallel
    tensors (|cos| > 0.9995) and tensors of zeros are interpolated linearly. Opposite tensors raise a ValueError,
    because the path between them is not unique.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t must be from 0 to 1, got {t}")
    cosine = _cosine(a, b)
    degrees = math.degrees(math.acos(cosine)) if cosine is not None else 0.0
    if t in (0.0, 1.0):
        return Blend((b if t else a).clone(), degrees, False)
    if cosine is None or cosine > _PARALLEL:
        return Blend(_combine([a, b], [1 - t, t]), degrees, True)
    if cosine < -_PARALLEL:
        raise ValueError(
            f"the tensors point in opposite directions ({degrees:.3f} degrees), so the path between them is not unique"
        )
    omega = math.acos(cosine)
    return Blend(
        _combine([a, b], [math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)]),
        degrees,
        False,
    )


def fold(tensors: Iterator[Tensor], weights: Sequence[float]) -> Blend:
    """Slerp of several tensors in order: the k-th joins the previous result with t_k = w_k / (w_1 + ... + w_k).

    Only two tensors are held at a time. For more than two the result depends slightly on the order, unlike `karcher`.
    """
    normalized = _normalized(weights)
    result, total, widest, lerp = next(tensors), normalized[0], 0.0, False
    for weight, tensor in zip(normalized[1:], tensors, strict=True):
        total += weight
        step = slerp(result, tensor, weight / total if total else 0.0)
        result, widest, lerp = step.tensor, max(widest, step.angle), lerp or step.lerp
    return Blend(result, widest, lerp)


def karcher(
    tensors: Sequence[Tensor], weights: Sequence[float], iterations: int = 50, tolerance: float = 1e-10
) -> Blend:
    """The weighted Karcher mean of the directions of the tensors, times the weighted mean of their norms.

    The mean is the point of the sphere that minimizes the weighted sum of squared angles to the tensors' directions.
    The algorithm iterates m <- exp_m(sum_k w_k log_m(u_k)) from the direction of the weighted mean (Karcher 1977) until
    the step is below `tolerance` radians. The mean is in the span of the tensors, so the iteration uses coefficients
    and the Gram matrix, without copies of the tensors. A tensor of zeros has no influence on the direction.

    Args:
        tensors: tensors of one shape.
        weights: one for each tensor, not negative; they are scaled to sum to 1.
        iterations: the maximum number of iterations (default 50).
        tolerance: the length of the last step, in radians (default 1e-10).

    Raises:
        ValueError: a tensor is opposite to the mean, or the tensors cancel each other.
    """
    normalized = _normalized(weights)
    gram = _gram(tensors)
    norms = gram.diagonal().clamp_min(0).sqrt()
    size = float(torch.tensor(normalized, dtype=torch.float64) @ norms)
    live = [k for k in range(len(tensors)) if norms[k] > 0 and normalized[k] > 0]
    widest = max(
        (_degrees(gram, norms, 0, k) for k in range(1, len(tensors)) if norms[0] > 0 and norms[k] > 0), default=0.0
    )
    if not live:
        return Blend(_combine(tensors, normalized), widest, True)
    unit = gram[live][:, live] / torch.outer(norms[live], norms[live])
    weight = torch.tensor([normalized[k] for k in live], dtype=torch.float64)
    weight = weight / weight.sum()
    mean = _unit(weight, unit)
    for _ in range(iterations):
        cosines = (unit @ mean).clamp(-1, 1)
        if cosines.min() < -_PARALLEL:
            raise ValueError("a tensor is opposite to the mean of the others, so the path between them is not unique")
        angles = torch.acos(cosines)
        scale = torch.where(angles > 1e-12, angles / torch.sin(angles).clamp_min(1e-300), torch.ones_like(angles))
        # log_m(u_k) = scale_k (u_k - cos_k m), in coefficients over the u.
        step = weight * scale - (weight * scale * cosines).sum() * mean
        length = float((step @ unit @ step).clamp_min(0).sqrt())
        if length < tolerance:
            break
        mean = _unit(math.cos(length) * mean + math.sin(length) / length * step, unit)
    coefficients = [0.0] * len(tensors)
    for place, k in enumerate(live):
        coefficients[k] = size * float(mean[place]) / float(norms[k])
    return Blend(_combine(tensors, coefficients), widest, False)


def angle(a: Tensor, b: Tensor) -> float:
    """The angle between two tensors in degrees; 0 if one of them is zero."""
    cosine = _cosine(a, b)
    return 0.0 if cosine is None else math.degrees(math.acos(cosine))


def _normalized(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    if not weights or not math.isfinite(total) or total <= 0 or min(weights) < 0:
        raise ValueError(f"weights must be finite, not negative and not all zero, got {list(weights)}")
    return [weight / total for weight in weights]


def _pieces(*tensors: Tensor) -> Iterator[list[Tensor]]:
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _PIECE):
        yield [x[start : start + _PIECE].double() for x in flat]


def _gram(tensors: Sequence[Tensor]) -> Tensor:
    """The dot products, float64 [n, n]."""
    gram = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for pieces in _pieces(*tensors):
        stacked = torch.stack(pieces)
        gram += stacked @ stacked.T
    return gram


def _cosine(a: Tensor, b: Tensor) -> float | None:
    """The cosine, clamped to [-1, 1] because of rounding; None if one of the tensors is zero."""
    gram = _gram([a, b])
    norms = math.sqrt(float(gram[0, 0])) * math.sqrt(float(gram[1, 1]))
    return max(-1.0, min(1.0, float(gram[0, 1]) / norms)) if norms > 0 else None


def _degrees(gram: Tensor, norms: Tensor, i: int, j: int) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, float(gram[i, j] / (norms[i] * norms[j]))))))


def _unit(coefficients: Tensor, gram: Tensor) -> Tensor:
    length = float((coefficients @ gram @ coefficients).clamp_min(0).sqrt())
    if length < 1e-12:
        raise ValueError("the tensors cancel each other out: they have no mean direction")
    return coefficients / length


def _combine(tensors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """sum_k factor_k x_k, each piece summed in float64."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    out = torch.empty(tensors[0].shape, dtype=wide)
    flat = out.reshape(-1)
    for number, pieces in enumerate(_pieces(*tensors)):
        total = pieces[0] * factors[0]
        for factor, piece in zip(factors[1:], pieces[1:], strict=True):
            total.add_(piece, alpha=factor)
        flat[number * _PIECE : number * _PIECE + len(total)] = total
    return out
