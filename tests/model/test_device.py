import pytest
import torch

from pyqemb import ops
from pyqemb.errors import ConfigError
from pyqemb.model.device import pick_device, search_device
from pyqemb.testing.tiny import tiny_config


@pytest.mark.parametrize(
    ("gpu", "built", "head_dim", "expected"),
    [(True, True, 64, "cuda"), (True, True, 16, "cpu"), (True, False, 64, "cpu"), (False, True, 64, "cpu")],
)
def test_a_gpu_is_chosen_where_it_can_run_the_model(monkeypatch, gpu, built, head_dim, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(ops, "cuda_is_built", lambda: built)
    for name in (None, "auto"):
        assert pick_device(name, tiny_config(head_dim=head_dim)) == torch.device(expected)
    assert pick_device("cpu", tiny_config()) == torch.device("cpu")


@pytest.mark.parametrize(
    ("gpu", "message"), [(False, "torch finds no CUDA device"), (True, "pyqemb was built without CUDA")]
)
def test_a_gpu_that_is_not_there_is_an_error(monkeypatch, gpu, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(ops, "cuda_is_built", lambda: False)
    with pytest.raises(ConfigError, match=f"'cuda:1' was requested, but {message}"):
        pick_device("cuda:1", tiny_config())
    with pytest.raises(ConfigError, match="expected 'auto', 'cpu' or 'cuda'"):
        pick_device("gpu", tiny_config())


def test_search_is_on_the_cpu_for_anything_but_a_gpu():
    class Model:
        device = "mps"

    assert search_device(Model()) == search_device(object()) == torch.device("cpu")
