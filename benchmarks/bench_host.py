"""Host time of a call of an op, split by layer: binding, allocation, autograd, the op's own Python.

    python benchmarks/bench_host.py

On a GPU these layers run while earlier kernels do; a step is bound by the host where a kernel takes less than its call.
Each layer contains those above it. The kernels do next to nothing: one token, or two queries and three documents (1 us
for attention, 6 us for info_nce). Figures are microseconds of processor time of one thread, the least of many short
rounds. Machines differ by far more than changes of the code, so compare two commits on one machine, in turn; the time
of torch.empty_like says how fast the machine is at the moment.
"""

import argparse
import time
from collections.abc import Callable

import torch

from pyqemb import _C, ops
from pyqemb.ops import attention
from pyqemb.ops.groups import Options

_CHAINED = 33


def microseconds(work: Callable[[], object], calls: int = 40, rounds: int = 120) -> float:
    least = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            work()
        least = min(least, (time.thread_time() - start) / calls * 1e6)
    return least


def without_gradients(work: Callable[[], object]) -> float:
    with torch.no_grad():
        return microseconds(work)


def attention_layers() -> dict[str, float]:
    q, k, v = (torch.randn(1, heads, 16) for heads in (2, 1, 1))
    cu = torch.tensor([0, 1], dtype=torch.int32)
    plan = ops.attention_plan(cu)
    out, lse, dout = torch.empty_like(q), torch.empty(1, 2), torch.ones(1, 2, 16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    fixed = dict(out=out, lse=lse, scale=0.25, causal=True, plan=None, sizes=plan.sizes)
    gradients = dict(zip(("dq", "dk", "dv"), (torch.empty_like(x) for x in (q, k, v)), strict=True))
    problem = q, k, v, cu, cu, None, plan.sizes, 0.25, True

    def forward() -> torch.Tensor:
        return ops.varlen_attention(*leaves, None, plan=plan, causal=True)

    def chain(count: int) -> torch.Tensor:
        x = leaves[0]
        for _ in range(count):
            x = ops.varlen_attention(x, *leaves[1:], None, plan=plan, causal=True)
        return x

    def backward(x: torch.Tensor, calls: int) -> float:
        return microseconds(lambda: torch.autograd.grad(x, leaves[0], dout, retain_graph=True), calls)

    one, many = backward(chain(1), 40), backward(chain(_CHAINED), 2)
    return {
        "forward: binding": microseconds(lambda: _C.attention_forward(q, k, v, cu, cu, **fixed)),
        "forward: with allocation": microseconds(lambda: attention._forward.raw(*problem)),
        "forward: varlen_attention, no_grad": without_gradients(forward),
        "forward: varlen_attention": microseconds(forward),
        "backward: binding": microseconds(
            lambda: _C.attention_backward(q, k, v, cu, cu, dout=dout, **gradients, **fixed)
        ),
        "backward: with allocation": microseconds(lambda: attention._gradient.raw(*problem, out, lse, dout)),
        "backward: one more call in a graph": (many - one) / (_CHAINED - 1),
        "backward: torch.autograd.grad of one call": one,
    }


def info_nce_layers() -> dict[str, float]:
    queries, documents = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (2, 3))
    positive, owner = torch.arange(2), torch.tensor([0, 1, 0])
    leaves = [x.clone().requires_grad_() for x in (queries, documents)]
    loss = ops.info_nce(*leaves, positive)
    options = Options.of("qwen3", None, 0.1, None, "joint", 0.0, 0.02, 0.5)
    absent = ("query_text", "document_text", "role", "owner", "own_starts", "own_documents", "d_temperature")
    arguments = dict(
        queries=queries, documents=documents, positive=positive, first_row=0, num_rows=2, first_column=0, dims=(),
        dim_weights=(), loss=torch.empty(2, dtype=torch.float64), stats=torch.empty(5, dtype=torch.float64),
        d_queries=torch.empty_like(queries), d_documents=torch.empty_like(documents), log_negatives=None,
        log_negatives_given=False, adds_positive=True, **dict.fromkeys(absent),
    )  # fmt: skip
    return {
        "forward: binding": microseconds(lambda: _C.info_nce(options.native(), **arguments)),
        "forward: no_grad": without_gradients(lambda: ops.info_nce(queries, documents, positive)),
        "forward": microseconds(lambda: ops.info_nce(*leaves, positive)),
        "forward, with owners": microseconds(lambda: ops.info_nce(*leaves, positive, owner=owner)),
        "backward": microseconds(lambda: torch.autograd.grad(loss, leaves, retain_graph=True)),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    x = torch.empty(4)
    print(f"| torch.empty_like | | {microseconds(lambda: torch.empty_like(x)):.1f} |")
    for op, layers in (("varlen_attention", attention_layers()), ("info_nce", info_nce_layers())):
        for layer, value in layers.items():
            print(f"| {op} | {layer} | {value:.1f} |")


if __name__ == "__main__":
    main()
