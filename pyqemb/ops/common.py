"""Shared code of the ops: memory for results, and the registration of native functions as torch ops."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyqemb import _C
from pyqemb.ops.checks import has_no_values, tensor

_LARGE = 1 << 20  # bytes
_LIBRARY = torch.library.Library("pyqemb", "DEF")


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the kernels compute in for a storage dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result; large results on the CPU come from the buffer cache."""
    size = math.prod(shape)
    if device.type != "cpu" or size * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_C.Block(size * dtype.itemsize), dtype=dtype).view(shape)


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`empty` of the shape and device of x, contiguous; dtype: that of x if None."""
    if x.is_cpu and x.nbytes >= _LARGE // 2:  # dtype may be twice as wide
        return empty(x.shape, dtype or x.dtype, x.device)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)  # faster than torch.empty(shape)


def at_kernels(op: str, name: str, cu_seqlens: Any, tokens: int, of: str, device: torch.device) -> Tensor:
    """Return cu_seqlens in memory that the kernels of `device` can read.

    It is checked when it is copied from the CPU to a GPU. On the GPU a check would make the host wait.
    """
    cu_seqlens = tensor(op, name, cu_seqlens).contiguous()
    if device.type == "cpu" or cu_seqlens.device.type != "cpu":
        return cu_seqlens.cpu() if device.type == "cpu" else cu_seqlens
    if has_no_values():
        return cu_seqlens.to(device)
    _C.check_cu_seqlens(op, name, cu_seqlens, tokens, of)
    return cu_seqlens.pin_memory().to(device, non_blocking=True)


class Native(NamedTuple):
    """A function that allocates its results and calls the native module, directly and as torch.ops.pyqemb.<name>.

    Outside a compiled graph the ops call `raw`, because torch's dispatcher would take several times as long as the rest
    of the call.
    """

    raw: Callable[..., Any]
    op: Any

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, or the torch op if tensors have no values."""
        return (self.op if has_no_values() else self.raw)(*arguments)


def native(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Native]:
    """Register the decorated function for the CPU and for CUDA; `fake` returns results of the same shapes."""
    name = schema.split("(")[0]

    def register(raw: Callable[..., Any]) -> Native:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, raw, key)
        torch.library.register_fake(f"pyqemb::{name}", fake, lib=_LIBRARY)
        return Native(raw, getattr(torch.ops.pyqemb, name).default)

    return register


def differentiable(
    name: str,
    forward: Native,
    gradient: Native | None,
    keep: Callable[..., None],
    backward: Callable[..., Any],
    *,
    inputs: int,
    results: int = 1,
) -> Callable[..., Any]:
    """`forward` as a function that is differentiable once.

    The first `inputs` arguments may get a gradient, and the first `results` of what `forward` returns are the results;
    the others are only there to be kept. `keep(ctx, arguments, output)` saves what `backward(gradient, ctx, *grads)`
    needs, which takes the gradients of the results and returns those of the inputs. Both are used in eager calls and
    compiled graphs. In eager calls autograd sees no more than inputs and results: each further tensor or argument
    costs host time.
    """

    def returned(output: Tensor | tuple[Tensor, ...]) -> Any:
        if isinstance(output, Tensor):
            return output
        return output[0] if results == 1 else output[:results]

    def guarded(call: Any, ctx: Any, *grads: Any) -> Any:
        # (torch's once_differentiable checks only incoming gradients that require grad, not saved inputs.)
        if torch.is_grad_enabled():
            raise RuntimeError(f"[{name}] is differentiable once: its gradient cannot be taken with create_graph=True")
        return backward(call, ctx, *grads[:results])

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            arguments = given[:-1] + given[-1]
            output = forward.raw(*arguments)
            keep(ctx, arguments, output)
            return returned(output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *guarded(gradient and gradient.raw, ctx, *grads), None

    others = (None,) * (len(forward.op._schema.arguments) - inputs)

    def compiled_backward(ctx: Any, *grads: Any) -> Any:
        return *guarded(gradient and gradient.op, ctx, *grads), *others

    torch.library.register_autograd(forward.op, compiled_backward, setup_context=keep, lib=_LIBRARY)
    named: Any = type(name, (Eager,), {})  # torch derives the name of the node in a graph from it

    def call(*arguments: Any) -> Any:
        if has_no_values():
            return returned(forward.op(*arguments))
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:  # half of the host time of an Eager call
            return returned(forward.raw(*arguments))
        return named.apply(*arguments[:inputs], arguments[inputs:])

    return call


def new(x: Tensor) -> Tensor:
    """An empty contiguous tensor of the shape and dtype of x, for fake implementations."""
    return x.new_empty(x.shape)


def new_rows(x: Tensor) -> Tensor:
    """An empty tensor with one number of the arithmetic dtype for each row of x."""
    return x.new_empty(tuple(x.shape[:-1]), dtype=arithmetic(x.dtype))  # a torch.Size takes 0.9 us longer


def new_gradient(weight: Tensor, wanted: bool) -> Tensor:
    """The buffer in which a kernel sums the gradient of a weight; without elements if it is not needed."""
    return weight.new_empty(weight.shape if wanted else (0,), dtype=arithmetic(weight.dtype))


def rounded(dweight: Tensor, weight: Tensor, wanted: bool) -> Tensor | None:
    """The gradient of a weight in the weight's dtype; None if it is not needed."""
    return dweight.to(weight.dtype) if wanted else None
