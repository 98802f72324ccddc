"""metrics.jsonl on a disk that is full."""

import json

import pytest

import pyqemb
from pyqemb.errors import MachineError
from pyqemb.model.embedder import Embedder
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage1
from pyqemb.training.callbacks import MetricsFile, TrainInfo
from pyqemb.training.state import checkpoints, verify


def test_a_row_that_cannot_be_written_is_an_error_of_the_machine(tmp_path):
    metrics = MetricsFile()
    metrics.on_train_begin(TrainInfo(stage1(model={"base": "m"}, data=[{"path": "d"}]), tmp_path, 2))
    metrics._file.close()
    metrics._file = open("/dev/full", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    with pytest.raises(MachineError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
        metrics.on_step_end({"step": 1, "loss": 1.0})
    metrics.sync()  # a checkpoint can still be saved
    metrics.on_train_end(None)


@pytest.mark.parametrize("full", ["metrics", "final"])
def test_a_full_disk_loses_no_step(tmp_path, monkeypatch, full):
    write_tiny_folder(tmp_path / "base")
    rows = [{"query": f"q {i}", "positive": f"d {i}"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = stage1(
        model={"base": str(tmp_path / "base")}, data=[{"path": str(tmp_path / "pairs.jsonl")}],
        train={"steps": 3, "global_batch_size": 8}, save={"dir": str(tmp_path / "run")},
    )  # fmt: skip
    log = MetricsFile.log

    def log_to_full_disk(self, row):
        if row["step"] == 2:
            self._file.close()
            self._file = open("/dev/full", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        log(self, row)

    def no_room(self, folder, **_):
        raise MachineError(f"{folder}: cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        if full == "metrics":
            patch.setattr(MetricsFile, "log", log_to_full_disk)
        else:
            patch.setattr(Embedder, "save_pretrained", no_room)
        with pytest.raises(MachineError, match="cannot be written"):
            pyqemb.train(config)
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert verify(saved) == (2 if full == "metrics" else 3)
    assert (pyqemb.train(config, resume="auto").folder / "model.safetensors").is_file()
