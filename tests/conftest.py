"""Shared fixtures: a seed for every test, and the devices that this machine has."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda":
        pytest.skip("CUDA kernels are not part of this version")
    return request.param
