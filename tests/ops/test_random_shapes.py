"""Every op and loss at random shapes: errors beside torch's own, gradients by finite differences, bits on any number of
threads.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyqemb import ops
from pyqemb.testing.random_calls import OPS, random_call

LOW = [torch.float32, torch.bfloat16, torch.float16]
# What an error may be whatever torch's is, as a share of the largest value: one rounding of the result.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def errors(op, dtype, shapes):
    """For the output and for each gradient: (root mean square, largest) of our error and of torch's, over all shapes.

    Each is a share of the largest value of its tensor. Single shapes have too few elements for a ratio of maxima.
    """
    sums: dict[int, list[float]] = {}
    for seed in range(shapes):
        call = random_call(op, seed, dtype)
        ours, low = call.results(call.ours, dtype), call.results(call.naive, dtype)
        truth = call.results(call.naive, torch.float64)
        terms = max((float(x.abs().max()) for x in truth if x.numel()), default=0.0) or 1.0
        for place, (a, b, exact) in enumerate(zip(ours, low, truth, strict=True)):
            place = min(place, 2)  # output, first gradient, all others
            assert a.shape == exact.shape
            if not exact.numel():
                continue
            assert a.isfinite().all(), call.about
            size = float(exact.abs().max())
            # A gradient of terms that cancel to zero, as that of the score of a lone key: as large as what cancels.
            size = size if size > 1e-9 else terms
            row = sums.setdefault(place, [0.0] * 5)
            for at, x in ((0, a), (1, b)):
                # (Where torch's own result is no number, it is no measure: the error is then held to the floor.)
                apart = ((x.double() - exact) / size).nan_to_num(0.0, 0.0, 0.0)
                row[at] += float(apart.square().sum())
                row[at + 2] = max(row[at + 2], float(apart.abs().max()))
            row[4] += exact.numel()
    return {
        name: ((row[0] / row[4]) ** 0.5, (row[1] / row[4]) ** 0.5, row[2], row[3])
        for name, row in zip(("output", "first gradient", "other gradients"), sums.values(), strict=False)
    }


def check_errors(op, dtype, shapes):
    found = errors(op, dtype, shapes)
    assert found
    for name, (rms, torch_rms, largest, torch_largest) in found.items():
        floor = FLOOR[dtype]
        assert rms <= max(1.25 * torch_rms, floor), f"{name}: RMS {rms:.3e}, torch's {torch_rms:.3e}"
        assert largest <= max(2 * torch_largest, floor), f"{name}: largest {largest:.3e}, torch's {torch_largest:.3e}"


@pytest.mark.promise("R11", "13 ops and losses at 8 random shapes in 3 dtypes: RMS at most 1.25, largest at most 2")
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_errors_are_those_of_torch(op, dtype):
    check_errors(op, dtype, 8)


@pytest.mark.deep
@pytest.mark.promise("R11", "13 ops and losses at 200 random shapes in 3 dtypes: RMS at most 1.25, largest at most 2")
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_errors_are_those_of_torch_at_200_shapes(op, dtype):
    check_errors(op, dtype, 200)


def strided(x, kind):
    """The same values with other strides."""
    if not kind or x.dim() < 2:  # weights are contiguous
        return x
    return torch.stack((x, x.detach()), -1)[..., 0] if kind == 1 else torch.cat((x.detach(), x), 0)[len(x) :]


def check_gradients(op, fast):
    for seed in range(20):
        call = random_call(op, seed, torch.float64, small=True)
        leaves = [x.requires_grad_() for x in call.tensors]

        def ours(*xs, call=call, kind=seed % 3):
            return call.ours(*(strided(x, kind) for x in xs))

        if not any(x.numel() for x in leaves):
            continue
        torch.testing.assert_close(ours(*leaves), call.naive(*leaves), rtol=1e-9, atol=1e-11)
        assert torch.autograd.gradcheck(ours, leaves, nondet_tol=0.0, fast_mode=fast), call.about


@pytest.mark.promise("R10", "13 ops and losses at 20 small shapes, random projections of the gradient")
@pytest.mark.parametrize("op", OPS)
def test_gradients_by_finite_differences(op):
    check_gradients(op, fast=True)


@pytest.mark.deep
@pytest.mark.promise("R10", "13 ops and losses at 20 small shapes, each element of the gradient")
@pytest.mark.parametrize("op", OPS)
def test_each_element_of_the_gradients_by_finite_differences(op):
    check_gradients(op, fast=False)


def test_every_differentiable_op_is_here():
    functions = {name for name in ops.__all__ if name.islower()}
    others = {"attention_plan", "cuda_is_built", "min_hash", "shingles", "top_k"}  # give no gradient
    assert functions - others == set(OPS) - {"add_rms_norm"}


TORCHS = {"linear", "cosent", "distill_scores", "distill_embeddings", "yes_no"}  # composed of torch's functions


@pytest.mark.promise("R10", "the gradient of a gradient: right, or an error")
@pytest.mark.parametrize("op", OPS)
def test_the_gradient_of_a_gradient_is_right_or_refused(op):
    call = next(c for c in (random_call(op, s, torch.float64, small=True) for s in range(9)) if c.tensors[0].numel())
    leaves = [x.requires_grad_() for x in call.tensors]
    if op in TORCHS:
        assert torch.autograd.gradgradcheck(call.ours, leaves, fast_mode=True)
        return
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(call.ours(*leaves).sum(), leaves, create_graph=True)


def digests_of(threads, in_one_process):
    """By number of threads, what tests/ops/digests.py prints."""
    found = {}
    for group in [threads] if in_one_process else [[count] for count in threads]:
        child = subprocess.run(
            [sys.executable, Path(__file__).with_name("digests.py"), *map(str, group)],
            env={**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(max(group))},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert child.returncode == 0, child.stderr[-2000:]
        for line in child.stdout.splitlines():
            count, rest = line.split(maxsplit=1)
            found.setdefault(count, []).append(rest)
    return found


@pytest.mark.promise("R14", "9 ops, forward and backward, on 1, 2, 3 and 8 threads")
def test_same_bits_on_1_2_3_and_8_threads():
    found = digests_of([1, 2, 3, 8], in_one_process=True)
    assert found.keys() == {"1", "2", "3", "8"}
    for count in "238":
        assert found[count] == found["1"]


@pytest.mark.deep
@pytest.mark.promise("R14", "9 ops, forward and backward, in a process for each of 1, 2, 3 and 8 threads, twice")
def test_same_bits_in_other_processes():
    runs = [digests_of([1, 2, 3, 8], in_one_process=False) for _ in range(2)]
    assert len({tuple(lines) for run in runs for lines in run.values()}) == 1
