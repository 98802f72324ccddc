"""metrics.jsonl on a disk that is full."""

import pytest

from pyqemb.errors import MachineError
from pyqemb.training.progress import Progress


def test_a_row_that_cannot_be_written_is_an_error_of_the_machine(tmp_path):
    with Progress(tmp_path, steps=2) as progress:
        progress._file.close()
        progress._file = open("/dev/full", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        with pytest.raises(MachineError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
            progress.log({"step": 1, "loss": 1.0})
        progress.sync()  # a checkpoint can still be saved
