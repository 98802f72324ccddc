"""info_nce, loss and gradients, against the formula in torch, memeff and Inf-CL; top_k against torch."""

import pytest
import torch
import torch.nn.functional as F

from pyqemb import ops
from pyqemb.ops.groups import PRESETS
from pyqemb.testing import reference
from pyqemb.testing.device_bench import OURS

TAU = 0.02


def with_gradients(loss, vectors):
    """Prepares the loss, then takes it with both gradients."""

    def prepare():
        function = loss()

        def work():
            value = function(*vectors)
            return value.detach(), *torch.autograd.grad(value, vectors)

        return work

    return prepare


def naive(positive, groups):
    return lambda q, d: reference.info_nce(q, d, positive, positive, temperature=TAU, groups=groups).float()


def memeff(everything):
    from memeff import MemoryEfficientQwen3Loss

    return MemoryEfficientQwen3Loss(
        temperature=TAU, margin=0.1, use_qq_negatives=everything, use_dd_negatives=everything, normalized_inputs=True,
        stable=False,
    )  # fmt: skip


def inf_cl():
    from inf_cl import cal_flash_loss

    return lambda q, d: cal_flash_loss(q, d, scale=1 / TAU).mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("preset", ["qwen3_stage2", "memeff"])
def test_info_nce(measure, device, sizes, compiled, preset, dtype):
    rows, dim = sizes.loss_rows, sizes.hidden
    vectors = [F.normalize(torch.randn(rows, dim, device=device), dim=1).to(dtype).requires_grad_() for _ in range(2)]
    positive, everything = torch.arange(rows, device=device), preset == "memeff"

    def ours(q, d):
        return ops.info_nce(q, d, positive, owner=positive, preset=preset, temperature=TAU)

    peers = {
        "naive torch": lambda: naive(positive, PRESETS[preset]),
        "naive torch.compile": lambda: compiled(naive(positive, PRESETS[preset])),
        "memeff": lambda: memeff(everything),
    }
    if not everything:
        peers["Inf-CL"] = inf_cl
    products = 3 * (3 if everything else 1)  # scores and both gradients, for each group
    measure(
        f"info_nce, {preset}, {rows} x {dim} {str(dtype).removeprefix('torch.')}",
        {name: with_gradients(loss, vectors) for name, loss in {OURS: lambda: ours, **peers}.items()},
        dtype=dtype, gflop=2 * products * rows * rows * dim / 1e9,
    )  # fmt: skip


@pytest.mark.parametrize("preset", ["qwen3_stage2", "memeff"])
def test_info_nce_of_many(measure, device, sizes, preset):
    """Where the score matrix no longer fits; and seven prefixes in one call against none."""
    rows, dim = sizes.many_rows, sizes.hidden
    vectors = [
        F.normalize(torch.randn(rows, dim, device=device), dim=1).to(torch.bfloat16).requires_grad_() for _ in range(2)
    ]
    positive, everything = torch.arange(rows, device=device), preset == "memeff"

    def ours(matryoshka=None):
        return lambda q, d: ops.info_nce(
            q, d, positive, owner=positive, preset=preset, temperature=TAU, matryoshka=matryoshka
        )

    prefixes = [dim // divisor for divisor in (32, 16, 8, 4, 2)] + [3 * dim // 4, dim]
    contenders = {OURS: ours, "memeff": lambda: memeff(everything)}
    if not everything:
        contenders["Inf-CL"] = inf_cl
    products = 3 * (3 if everything else 1)
    for name, losses in {"": contenders, ", seven prefixes": {OURS: lambda: ours(prefixes)}}.items():
        measure(
            f"info_nce, {preset}, {rows} x {dim} bfloat16{name}",
            {who: with_gradients(loss, vectors) for who, loss in losses.items()},
            dtype=torch.bfloat16, gflop=2 * products * rows * rows * dim / 1e9, rounds=5, host_calls=2,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_top_k(measure, meter, device, sizes, dtype):
    (count, corpus), k, block = sizes.search, min(100, sizes.search[1]), 1 << 17
    queries, documents = (torch.randn(n, sizes.hidden, device=device).to(dtype) for n in (count, corpus))

    def theirs():
        """In blocks, merged: all scores at once would take 16 GB."""
        best = None
        for first in range(0, corpus, block):
            scores, indices = (queries @ documents[first : first + block].T).float().topk(min(k, corpus - first))
            found = scores, indices + first
            if best is not None:
                scores, indices = (torch.cat(pair, dim=1) for pair in zip(best, found, strict=True))
                scores, order = scores.topk(k)
                found = scores, indices.gather(1, order)
            best = found
        return best[0]

    measure(
        f"top_k, {count} x {corpus} x {sizes.hidden} {str(dtype).removeprefix('torch.')}, k = {k}",
        {OURS: lambda: lambda: ops.top_k(queries, documents, k)[0], "torch matmul + topk": lambda: theirs},
        dtype=dtype, gflop=2 * count * corpus * sizes.hidden / 1e9, rounds=min(5, meter.rounds),
    )  # fmt: skip
