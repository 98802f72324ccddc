"""The names of the package itself."""

import pyqemb


def test_every_public_name_is_listed_and_loads():
    assert set(pyqemb.__all__) <= set(dir(pyqemb))
    for name in pyqemb.__all__:
        assert getattr(pyqemb, name) is not None


def test_configurations_come_from_the_package():
    from pyqemb import TrainConfig, stage1, stage2

    sections = {"model": {"base": "base"}, "data": [{"path": "pairs.jsonl"}]}
    assert isinstance(stage1(**sections), TrainConfig)
    assert isinstance(stage2(**sections), TrainConfig)
