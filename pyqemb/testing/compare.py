"""The tolerance of a kernel: at most twice the error that torch makes with the same formula in the same precision."""

import torch
from torch import Tensor

_FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def assert_close_as(actual: Tensor, low: Tensor, truth: Tensor, name: str = "value", factor: float = 2.0) -> None:
    """Fail when `actual` is farther from the float64 `truth` than `factor` times the low-precision `low` is.

    The floor is one rounding of the storage dtype at the size of the truth, or of unit inputs where the truth cancels
    to zero.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(truth.shape)}"
    if not actual.numel():
        return
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    error = (actual.double() - truth).abs()
    allowed = factor * (low.double() - truth).abs().max() + _FLOOR[actual.dtype] * truth.abs().max().clamp_min(1.0)
    worst = int(error.argmax())
    assert error.max() <= allowed, (
        f"{name}: error {error.max():.3e} at flat index {worst} (got {actual.flatten()[worst]:.6g}, "
        f"truth {truth.flatten()[worst]:.6g}), allowed {allowed:.3e}"
    )
