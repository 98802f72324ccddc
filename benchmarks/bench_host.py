"""Host time of a call of an op, split by layer: binding, the op's own Python, autograd. The kernels do next to nothing.

    python benchmarks/bench_host.py

On a GPU these layers run while earlier kernels do; a step is bound by the host where a kernel takes less than its call.
Figures are medians in microseconds on one thread; machines differ by far more than changes of the code, so compare two
commits on one machine, in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pyqemb import _C, ops
from pyqemb.ops import attention


def microseconds(work: Callable[[], object], calls: int = 200, rounds: int = 15) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def attention_layers() -> dict[str, float]:
    q, k, v = (torch.randn(1, heads, 16) for heads in (2, 1, 1))
    cu = torch.tensor([0, 1], dtype=torch.int32)
    plan = ops.attention_plan(cu)
    out, lse, sizes = torch.empty_like(q), torch.empty(1, 2), plan.sizes
    grads = [torch.empty_like(x) for x in (q, k, v)]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    loss, dout = ops.varlen_attention(*leaves, None, plan=plan), torch.ones(1, 2, 16)
    options = {"scale": 0.25, "causal": True, "plan": None, "sizes": sizes}

    def backward() -> object:
        return _C.attention_backward(
            q, k, v, cu, cu, out=out, lse=lse, dout=dout, dq=grads[0], dk=grads[1], dv=grads[2], **options
        )

    return {
        "forward: binding": microseconds(lambda: _C.attention_forward(q, k, v, cu, cu, out=out, lse=lse, **options)),
        "forward: with allocation": microseconds(
            lambda: attention._forward.raw(q, k, v, cu, cu, None, sizes, 0.25, True)
        ),
        "forward: varlen_attention, no gradient": microseconds(
            lambda: ops.varlen_attention(q, k, v, None, plan=plan, causal=True)
        ),
        "forward: varlen_attention": microseconds(lambda: ops.varlen_attention(*leaves, None, plan=plan, causal=True)),
        "backward: binding": microseconds(backward),
        "backward: with allocation": microseconds(
            lambda: attention._gradient.raw(q, k, v, cu, cu, None, sizes, 0.25, True, out, lse, dout)
        ),
        "backward: torch.autograd.grad": microseconds(
            lambda: torch.autograd.grad(loss, leaves, dout, retain_graph=True)
        ),
    }


def info_nce_layers() -> dict[str, float]:
    queries, documents = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (2, 3))
    positive, owner = torch.arange(2), torch.tensor([0, 1, 0])
    leaves = [x.clone().requires_grad_() for x in (queries, documents)]
    loss = ops.info_nce(*leaves, positive)
    return {
        "forward: no gradient": microseconds(lambda: ops.info_nce(queries, documents, positive)),
        "forward": microseconds(lambda: ops.info_nce(*leaves, positive)),
        "forward, with owners": microseconds(lambda: ops.info_nce(*leaves, positive, owner=owner)),
        "backward": microseconds(lambda: torch.autograd.grad(loss, leaves, retain_graph=True)),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    for op, layers in (("varlen_attention", attention_layers()), ("info_nce", info_nce_layers())):
        for layer, value in layers.items():
            print(f"| {op} | {layer} | {value:.1f} |")


if __name__ == "__main__":
    main()
