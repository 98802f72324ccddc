import logging
from types import SimpleNamespace

import pytest
import torch

from pyqemb import ops
from pyqemb.errors import ConfigError
from pyqemb.model import device
from pyqemb.model.device import pick_device, search_device
from pyqemb.testing.tiny import tiny_config


def pretend(monkeypatch, gpu=True, built=True, capability=(9, 0), shared=232_448):
    """What torch and the native library say of a GPU that is not here."""
    found = SimpleNamespace(
        name="Some GPU", major=capability[0], minor=capability[1], shared_memory_per_block_optin=shared
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(ops, "cuda_is_built", lambda: built)
    device._warn.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "built", "head_dim", "expected"),
    [(True, True, 64, "cuda"), (True, True, 16, "cpu"), (True, False, 64, "cpu"), (False, True, 64, "cpu")],
)
def test_a_gpu_is_chosen_where_it_can_run_the_model(monkeypatch, gpu, built, head_dim, expected):
    pretend(monkeypatch, gpu, built)
    for name in (None, "auto"):
        assert pick_device(name, tiny_config(head_dim=head_dim)) == torch.device(expected)
    assert pick_device("cpu", tiny_config()) == torch.device("cpu")


@pytest.mark.parametrize(
    ("gpu", "message"), [(False, "torch finds no CUDA device"), (True, "pyqemb was built without CUDA")]
)
def test_a_gpu_that_is_not_there_is_an_error(monkeypatch, gpu, message):
    pretend(monkeypatch, gpu, built=False)
    with pytest.raises(ConfigError, match=f"'cuda:1' was requested, but {message}"):
        pick_device("cuda:1", tiny_config())
    with pytest.raises(ConfigError, match="expected 'auto', 'cpu' or 'cuda'"):
        pick_device("gpu", tiny_config())


@pytest.mark.parametrize(
    ("capability", "shared", "obstacle"),
    [
        ((7, 5), 65_536, r"Some GPU has compute capability 7\.5; the CUDA kernels need 8\.0 or newer"),
        ((7, 0), 98_304, r"Some GPU has compute capability 7\.0; the CUDA kernels need 8\.0 or newer"),
        ((8, 6), 65_536, "Some GPU has 65536 bytes of shared memory a block; the CUDA kernels need 101376"),
    ],
)
def test_a_gpu_that_the_kernels_do_not_run_on(monkeypatch, caplog, capability, shared, obstacle):
    """`auto` takes the CPU and says why, once; `cuda` is an error; a search stays on the CPU."""
    pretend(monkeypatch, capability=capability, shared=shared)
    with caplog.at_level(logging.WARNING, "pyqemb"):
        for _ in range(2):
            assert pick_device("auto", tiny_config(head_dim=64)) == torch.device("cpu")
    assert len(caplog.records) == 1
    assert caplog.text.count("device: the CPU is used: Some GPU has") == 1
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=f"'{name}' was requested, but {obstacle}"):
            pick_device(name, tiny_config(head_dim=64))
    assert search_device(SimpleNamespace(device="cuda")) == torch.device("cpu")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_a_gpu_that_the_kernels_run_on(monkeypatch, capability):
    pretend(monkeypatch, capability=capability, shared=101_376)
    assert pick_device("auto", tiny_config(head_dim=128)) == torch.device("cuda")
    assert pick_device("cuda:1", tiny_config()) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="'cuda:2' was requested, but torch finds 2 CUDA devices"):
        pick_device("cuda:2", tiny_config())


def test_search_is_on_the_cpu_for_anything_but_a_gpu():
    class Model:
        device = "mps"

    assert search_device(Model()) == search_device(object()) == torch.device("cpu")
