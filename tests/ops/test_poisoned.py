"""The tests of the ops in random order, with memory that nothing has written full of NaN."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyqemb.ops.common import empty

HERE = Path(__file__).parent
PART = ["test_small_ops.py", "test_last_token_pool.py"]


def run(files, seed):
    """The names of the tests in the order in which they ran; all have passed."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", *files, __file__, "--poison", f"--shuffle={seed}", "-v", "-m", "not deep",
            "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not child", "-W", "ignore::UserWarning",
        ],
        # glibc fills what malloc returns with 0xFE: workspaces of the kernels, as floats -1.7e38.
        env={
            **os.environ, "MALLOC_PERTURB_": "1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
            "OMP_WAIT_POLICY": "passive",
        },
        capture_output=True, text=True, timeout=3000, cwd=HERE.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return re.findall(r"^tests/ops/(\S+\.py)::(\S+).* PASSED", done.stdout, re.MULTILINE)


@pytest.mark.promise("R16", "the tests of small ops in random order with poisoned memory")
def test_a_part_in_a_child():
    ran = run([HERE / name for name in PART], seed=0)
    assert {name for name, _ in ran} == {*PART, Path(__file__).name}
    assert len(ran) > 100
    order = [name for name, _ in ran]
    assert sum(a != b for a, b in zip(order, order[1:], strict=False)) > 30, "not in random order"


@pytest.mark.deep
@pytest.mark.promise("R16", "the tests of all ops, the decoder and gradient caching, three orders, poisoned memory")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_all_in_a_child(seed):
    others = ["model/test_decoder.py", "model/test_neighbors_in_a_batch.py", "training/test_grad_cache.py"]
    files = [path for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__)]
    assert len(run([*files, *(HERE.parent / name for name in others)], seed)) > 1000


@pytest.fixture
def only_poisoned(request):
    if not request.config.getoption("poison"):
        pytest.skip("runs in the child")


def test_memory_is_poisoned(only_poisoned):
    assert torch.empty(100).isnan().all()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert empty((1 << 20,), dtype, torch.device("cpu")).isnan().all()
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    for size in (1000, 1 << 16, 1 << 24):
        assert set(ctypes.string_at(libc.malloc(size), size)) == {0xFE}
