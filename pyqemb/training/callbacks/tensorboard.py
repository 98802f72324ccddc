"""TensorBoard, on request (`train.tensorboard`)."""

from typing import TYPE_CHECKING

from pyqemb.errors import ConfigError
from pyqemb.training.callbacks.base import Row, RowLogger, TrainInfo

if TYPE_CHECKING:
    from pyqemb.training.trainer import TrainResult


class TensorBoard(RowLogger):
    """Writes the numbers of each row to the folder `tensorboard` of the run.

    ConfigError where TensorBoard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("train.tensorboard needs TensorBoard: pip install 'pyqemb[tensorboard]'") from error
        self._make_writer = SummaryWriter

    def on_train_begin(self, info: TrainInfo) -> None:
        super().on_train_begin(info)
        self._writer = self._make_writer(str(info.folder / "tensorboard"))

    def log(self, row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def on_train_end(self, result: "TrainResult | None") -> None:
        self._writer.close()
