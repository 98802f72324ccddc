"""The loggers of `log.to`: TensorBoard, Weights & Biases, MLflow and trackio."""

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pyqemb.data.files import atomic_file
from pyqemb.errors import ConfigError
from pyqemb.training.callbacks.base import Row, RowLogger, TrainInfo
from pyqemb.training.config import TrainConfig

if TYPE_CHECKING:
    from pyqemb.training.trainer import TrainResult


_RUN_ID = re.compile(r"[\w.-]{1,200}", re.ASCII)  # as every package makes them


def make_loggers(config: TrainConfig) -> list["Logger"]:
    """The loggers of `log.to` and `train.tensorboard`. ConfigError if a package is not installed."""
    names = [*config.log.to, *["tensorboard"] * config.train.tensorboard]
    return [LOGGERS[name]() for name in dict.fromkeys(names)]


class Logger(RowLogger):
    """Sends the scalars of each row to a package, which is imported when the first instance is created.

    Values of an evaluation are called eval/NAME. A resumed run continues the run of the package.
    """

    name: ClassVar[str]  # the name in log.to, and of the extra
    module: ClassVar[str]

    def __init__(self) -> None:
        try:
            self.package = import_module(self.module)
            if self.package.__file__ is None:  # a folder of this name, written by the package
                raise ImportError(self.module)
        except ImportError as error:
            raise ConfigError(
                f"log.to: {self.name} needs the extra {self.name}: pip install 'pyqemb[{self.name}]'"
            ) from error

    def on_train_begin(self, info: TrainInfo) -> None:
        super().on_train_begin(info)
        try:
            self.start(info)
        except Exception as error:
            raise ConfigError(f"log.to: {self.name} could not start: {error}") from error

    def log(self, row: Row) -> None:
        self.log_scalars(dict(scalars(row)), row["step"])

    def start(self, info: TrainInfo) -> None:
        """Begin a run, or continue it if `info.step` is above 0. Subclasses define this and the next two methods."""
        raise NotImplementedError

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        """Log the values of a step, by name."""
        raise NotImplementedError

    def on_train_end(self, result: "TrainResult | None") -> None:
        raise NotImplementedError


class TensorBoard(Logger):
    """Writes to the folder `tensorboard` of the run."""

    name, module = "tensorboard", "torch.utils.tensorboard"

    def start(self, info: TrainInfo) -> None:
        purge_step = info.step + 1 if info.step else None
        self._writer = self.package.SummaryWriter(str(info.folder / "tensorboard"), purge_step=purge_step)

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def on_train_end(self, result: "TrainResult | None") -> None:
        self._writer.close()


class WandB(Logger):
    """Weights & Biases. The files of the package are in the folder `wandb` of the run."""

    name = module = "wandb"

    def start(self, info: TrainInfo) -> None:
        run_id = read_run_id(info, self.name)
        self._run = self.package.init(
            project=info.config.log.project, name=info.folder.name, dir=str(info.folder), id=run_id,
            resume="allow" if run_id else None, config=info.config.model_dump(mode="json"),
        )  # fmt: skip
        write_run_id(info, self.name, self._run.id)

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def on_train_end(self, result: "TrainResult | None") -> None:
        self._run.finish(exit_code=int(result is None))


class MLflow(Logger):
    """MLflow, on the server or in the database of MLFLOW_TRACKING_URI. `log.project` is the experiment."""

    name = module = "mlflow"

    def start(self, info: TrainInfo) -> None:
        self._client = self.package.MlflowClient()
        run_id = read_run_id(info, self.name)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
        else:
            experiment = self.package.set_experiment(info.config.log.project)
            run_id = self._client.create_run(experiment.experiment_id, run_name=info.folder.name).info.run_id
            self._log_parameters(run_id, info.config.model_dump(mode="json"))
            write_run_id(info, self.name, run_id)
        self._run_id = run_id

    def _log_parameters(self, run_id: str, config: Mapping[str, Any]) -> None:
        param = self.package.entities.Param
        params = [param(name, str(value)[:_LONGEST_PARAM]) for name, value in flat(config)]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        """Log the values. MLflow does not allow "@" and some other characters in names: ndcg@10 becomes ndcg_at_10."""
        now, metric = int(time.time() * 1000), self.package.entities.Metric
        names = {name: re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_")) for name in values}
        metrics = [metric(names[name], value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def on_train_end(self, result: "TrainResult | None") -> None:
        self._client.set_terminated(self._run_id, "FAILED" if result is None else "FINISHED")


class Trackio(Logger):
    """trackio, which continues a run by its name."""

    name = module = "trackio"

    def start(self, info: TrainInfo) -> None:
        self._run = self.package.init(
            project=info.config.log.project, name=info.folder.name, config=info.config.model_dump(mode="json"),
            resume="allow" if info.step else "never",
        )  # fmt: skip

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def on_train_end(self, result: "TrainResult | None") -> None:
        self._run.finish()


LOGGERS: dict[str, type[Logger]] = {logger.name: logger for logger in (TensorBoard, WandB, MLflow, Trackio)}
_PARAMS_PER_CALL, _LONGEST_PARAM = 100, 6000  # limits of MLflow


def scalars(row: Row) -> Iterator[tuple[str, float]]:
    """The numbers of a row of metrics.jsonl by name; those of an evaluation are called eval/NAME."""
    values = {name: value for name, value in row.items() if name not in ("step", "eval")}
    values |= {f"eval/{name}": value for name, value in row.get("eval", {}).items()}
    for name, value in values.items():
        if isinstance(value, int | float):
            yield name, value


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a configuration with dots, and their values; lists as JSON."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value) if isinstance(value, list) else value


def read_run_id(info: TrainInfo, logger: str) -> str | None:
    """The id that a logger gave to the resumed run; None for a new run, and with a warning if its file is damaged."""
    path = _run_id_path(info, logger)
    if not info.step or not path.exists():
        return None
    run_id = path.read_text(encoding="utf-8", errors="replace").strip()
    if _RUN_ID.fullmatch(run_id):
        return run_id
    logging.getLogger("pyqemb").warning("%s: damaged; the resumed run is logged as a new one", path)
    return None


def write_run_id(info: TrainInfo, logger: str, run_id: str) -> None:
    """Store the id for `read_run_id`."""
    with atomic_file(_run_id_path(info, logger)) as temporary:
        temporary.write_text(run_id + "\n", encoding="utf-8")


def _run_id_path(info: TrainInfo, logger: str) -> Path:
    return info.folder / f"{logger}_run_id"
