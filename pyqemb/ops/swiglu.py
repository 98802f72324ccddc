"""SwiGLU: one pass over memory forward and one backward."""

from typing import Any

from torch import Tensor

from pyqemb import _C
from pyqemb.ops.checks import tensor
from pyqemb.ops.common import differentiable, empty_like, native, new


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element, differentiable once.

    Args:
        gate: a tensor of any shape, float32, bfloat16, float16 or float64.
        up: a tensor of the same shape and dtype.

    Returns:
        The shape and dtype of the arguments.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ValueError: different shapes.

    Example:
        >>> pyqemb.ops.swiglu(torch.zeros(2), torch.ones(2))
        tensor([0., 0.])

    Source: Shazeer 2020, equation 6.
    """
    gate, up = tensor("swiglu", "gate", gate), tensor("swiglu", "up", up)
    return _swiglu(gate.contiguous(), up.contiguous())


@native("swiglu(Tensor gate, Tensor up) -> Tensor", lambda gate, up: new(gate))
def _swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    y = empty_like(gate)
    _C.swiglu_forward(gate, up, y)
    return y


@native(
    "swiglu_backward(Tensor gate, Tensor up, Tensor dy) -> (Tensor, Tensor)", lambda gate, up, dy: (new(gate), new(up))
)
def _swiglu_gradient(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = empty_like(gate), empty_like(up)
    _C.swiglu_backward(gate, up, dy.contiguous(), dgate, dup)
    return dgate, dup


def _keep_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(gradient: Any, ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return gradient(*ctx.saved_tensors, dy)


_swiglu = differentiable("swiglu", _swiglu_forward, _swiglu_gradient, _keep_swiglu, _swiglu_backward, inputs=2)
