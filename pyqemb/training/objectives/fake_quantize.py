"""Quantization-aware training: the loss sees vectors as they are after quantization.

Legend: S texts, E dimension.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

TrainingPrecision = Literal["float32", "int8", "binary"]
TRAINING_PRECISIONS: tuple[str, ...] = get_args(TrainingPrecision)


def fake_quantize(vectors_SE: Tensor, precision: TrainingPrecision) -> Tensor:
    """Quantize vectors, normalize them, and pass the gradient on as if neither had happened (straight-through).

    Each vector is quantized alone, so the result does not depend on the batch or the number of ranks.

    Args:
        vectors_SE: [S, E] unit vectors of a floating dtype.
        precision: float32 (the vectors themselves), int8 (whole steps of 1/127 of the largest absolute value of the
            vector) or binary (the signs).

    Source: Bengio, Leonard and Courville (arXiv 1308.3432), the straight-through estimator.

    Example:
        >>> fake_quantize(torch.tensor([[0.6, -0.8]]), "binary")
        tensor([[ 0.7071, -0.7071]])
    """
    if precision == "float32":
        return vectors_SE
    with torch.no_grad():
        if precision == "binary":
            quantized_SE = torch.where(vectors_SE > 0, 1.0, -1.0).to(vectors_SE.dtype)
        else:
            step_S1 = vectors_SE.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(vectors_SE.dtype).tiny) / 127
            quantized_SE = torch.round(vectors_SE / step_S1)
        change_SE = F.normalize(quantized_SE, dim=1) - vectors_SE
    return vectors_SE + change_SE
