"""NVIDIA's compute-sanitizer over a small run of every op, forward and backward: accesses out of bounds, races in
shared memory.
"""

import glob
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

from pyqemb import _C

WHEEL = f"{sysconfig.get_path('purelib')}/nvidia/cu*/bin/compute-sanitizer"  # of PyPI's nvidia-cuda-sanitizer-api
SANITIZER = shutil.which("compute-sanitizer") or next(iter(glob.glob(WHEEL)), None)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.skipif(not _C.cuda_is_built(), reason="pyqemb was built without CUDA"),
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer was not found"),
]

RUN = """
import sys, torch
import torch.nn.functional as F
from pyqemb import ops

def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)

def back(out):
    out.float().sum().backward()

DEVICE = sys.argv[1]
lengths = [3, 40, 128, 0, 150, 17]
cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
one = torch.arange(len(lengths) + 1, dtype=torch.int32)
tokens = sum(lengths)
for causal in (False, True):
    back(ops.varlen_attention(randn(tokens, 4, 64), randn(tokens, 2, 64), randn(tokens, 2, 64), cu, causal=causal))
    back(ops.varlen_attention(randn(6, 4, 64), randn(tokens, 2, 64), randn(tokens, 2, 64), one, cu_seqlens_k=cu))
hidden = randn(tokens, 256)
back(ops.rms_norm(hidden, randn(256)))
back(ops.swiglu(randn(tokens, 256), randn(tokens, 256)))
back(ops.last_token_pool(hidden, cu, norm_weight=randn(256)))
angles = torch.randn(tokens, 32, device=DEVICE)
back(ops.qk_norm_rope(randn(tokens, 4, 64), randn(64), angles.cos(), angles.sin()))
for dtype in (torch.bfloat16, torch.float32):
    queries, documents = (F.normalize(randn(n, 72, dtype=dtype), dim=1) for n in (37, 90))
    back(ops.info_nce(queries, documents, torch.arange(37, device=DEVICE)))
    ops.top_k(queries.detach(), documents.detach(), 5)
if DEVICE == "cuda":
    torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_small_run_is_clean(tool):
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", RUN, "cuda"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
