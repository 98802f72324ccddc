"""A sweep: runs of one configuration that differ in some keys, each in a folder, compared by their evaluations."""

import gc
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyqemb.data.files import atomic_file
from pyqemb.data.machine import is_out_of_memory, reason, unreadable
from pyqemb.data.strict_json import parse
from pyqemb.errors import ConfigError, Interrupted, MachineError, PyqembError
from pyqemb.jobs.tasks import slurm_task
from pyqemb.model.sentence import read_contract
from pyqemb.training.config import TrainConfig, load_config, overridden
from pyqemb.training.notes import SETTINGS_FILE
from pyqemb.training.resume import differences
from pyqemb.training.trainer import TrainResult

_log = logging.getLogger("pyqemb")
_DONE = "sweep.json"  # in the folder of a finished run
_SWEPT = {"eval.every", "eval.patience", "eval.weights", "save.weights"}  # of these sections, only these keys
_FREE = {
    "save.dir", "save.every", "save.keep", "save.background", "log", "train.log_every", "train.tensorboard",
    "train.max_bad_steps", "train.token_cache", "train.rank_timeout", "teacher.cache", "guide.cache",
}  # fmt: skip
_LONGEST = 120  # characters of a folder's name


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep.

    Attributes:
        name: the name of its folder in the folder of the sweep, e.g. learning_rate=1e-5.
        folder: the run folder.
        settings: the swept keys with their values, as text.
        status: "done", "failed" or "pending" (not run yet, interrupted, or run by another task).
        value: the metric of the best evaluation; None if it was never finite.
        step: the step of the best evaluation.
        last: the metric of the last evaluation.
        error: the message of a failed run; exit_code: that of its error.
    """

    name: str
    folder: str
    settings: dict[str, str]
    status: str = "pending"
    value: float | None = None
    step: int | None = None
    last: float | None = None
    error: str | None = None
    exit_code: int = 0


@dataclass(frozen=True, repr=False)
class SweepReport:
    """The runs of a sweep, the best first.

    Attributes:
        folder: the folder of the sweep.
        metric: the metric that they are compared by; None if no run is done.
        mode: "max" or "min": whether higher or lower values are better.
        runs: the runs: those that are done by their value, then the others.
    """

    folder: str
    metric: str | None
    mode: str
    runs: list[SweepRun]

    @property
    def best(self) -> SweepRun | None:
        """The best run; None if no run has a value."""
        return self.runs[0] if self.runs and self.runs[0].value is not None else None

    @property
    def num_pending(self) -> int:
        """The number of runs that are not finished."""
        return sum(run.status == "pending" for run in self.runs)

    @property
    def exit_code(self) -> int:
        """That of the first failed run; 0 if none failed."""
        return next((run.exit_code for run in self.runs if run.status == "failed"), 0)

    def table(self) -> str:
        """The runs as a table."""
        keys = list(self.runs[0].settings) if self.runs else []
        names = [key.rpartition(".")[2] for key in keys]
        head = [*(names if len(set(names)) == len(names) else keys), self.metric or "metric", "step", "last", ""]
        rows = [
            [*run.settings.values(), _number(run.value), "-" if run.step is None else str(run.step), _number(run.last),
             "" if run.status == "done" else run.status if run.error is None else f"failed: {run.error}"]
            for run in self.runs
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "best": None if self.best is None else self.best.name}

    def __repr__(self) -> str:
        best = self.best
        found = "none has a value" if best is None else f"the best is {best.name}, {self.metric} {_number(best.value)}"
        return f"SweepReport({len(self.runs)} runs, {self.num_pending} pending; {found}; folders in {self.folder})"


class Trial(NamedTuple):
    """A run before it starts: its name, its settings by key, and its configuration."""

    name: str
    settings: dict[str, str]
    config: TrainConfig


def trials(
    config: TrainConfig | str | Path,
    over: Mapping[str, Sequence[Any]],
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> list[Trial]:
    """The runs of a sweep: every combination of the values, in order, the last key varying fastest.

    Args:
        config: a configuration, or its file.
        over: the values of each key. Text is parsed as YAML, as with --set.
        out: the folder of the sweep (default: save.dir).
        overrides: `key=value` for all runs.

    Raises:
        ConfigError: a key is unknown, is not one to sweep over, or has no values; two runs have the same name; a
            configuration is invalid.
    """
    for key, values in over.items():
        section = key.partition(".")[0]
        if section in ("save", "eval", "log") and key not in _SWEPT:
            raise ConfigError(f"--over {key}: is the same for all runs of a sweep, which are compared by it; use --set")
        if isinstance(values, str) or not values:
            raise ConfigError(f"--over {key}: expected one or more values, got {values!r}")
        try:
            json.dumps(values)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"--over {key}: expected values as in a configuration file: {error}") from error
    if not over:
        raise ConfigError("--over: expected KEY=VALUE,VALUE")
    make = _maker(config, overrides)
    folder = Path(make([]).save.dir if out is None else out)
    shown = {key: [value if isinstance(value, str) else json.dumps(value) for value in over[key]] for key in over}
    last = [key.rpartition(".")[2] for key in over]
    labels = last if len(set(last)) == len(last) else list(over)
    found: list[Trial] = []
    names: dict[str, str] = {}  # by the configuration
    for chosen in product(*shown.values()):
        name = ",".join(f"{label}={_plain(value)}" for label, value in zip(labels, chosen, strict=True))
        if name in {trial.name for trial in found}:
            raise ConfigError(f"--over: two runs would be called {name}; give each value once")
        if len(name) > _LONGEST:
            raise ConfigError(f"--over: {name[:_LONGEST]}... is too long for the name of a folder; use shorter values")
        settings = dict(zip(over, chosen, strict=True))
        changes = [f"{key}={value}" for key, value in settings.items()]
        found.append(Trial(name, settings, make([*changes, f"save.dir={json.dumps(str(folder / name))}"])))
        config_values = found[-1].config.model_dump(mode="json")
        del config_values["save"]["dir"]
        if (first := names.setdefault(json.dumps(config_values, sort_keys=True), name)) != name:
            raise ConfigError(f"--over: {first} and {name} are the same run; give each value once")
    return found


def _maker(config: TrainConfig | str | Path, overrides: Sequence[str]) -> Callable[[list[str]], TrainConfig]:
    if isinstance(config, TrainConfig):
        return lambda changes: overridden(config, [*overrides, *changes])
    return lambda changes: load_config(config, [*overrides, *changes])


def split_values(text: str) -> list[str]:
    """The values of `--over KEY=VALUE,VALUE`: split at commas outside of brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and not depth:
            values.append("")
            continue
        values[-1] += letter
    return [value.strip() for value in values]


def _plain(value: str) -> str:
    """A value as a part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", re.sub(r"[\[\]{}\"' ]", "", value))


def task_of(tasks: int | None, task: int | None) -> tuple[int, int]:
    """The number of tasks and the number of this one, from 0; those of a Slurm array if not given, otherwise (1, 0).

    Raises:
        ConfigError: only one of them is given, or the task does not exist.
    """
    if tasks is None and task is None and (own := slurm_task()) is not None:
        return own.tasks, own.number
    if (tasks is None) != (task is None):
        raise ConfigError("--tasks and --task belong together: give both, or none of them")
    if tasks is None or task is None:
        return 1, 0
    if not 0 <= task < tasks:
        raise ConfigError(f"--task: expected 0 to {tasks - 1} with --tasks {tasks}, got {task}")
    return tasks, task


def sweep(
    runs: Sequence[Trial], train_one: Callable[[TrainConfig], TrainResult], tasks: int = 1, task: int = 0
) -> SweepReport:
    """Run every `tasks`-th trial from `task` on that is not finished, and compare all that are.

    Args:
        runs: the trials, see `trials`.
        train_one: trains a configuration; it continues a run that was interrupted.
        tasks: the number of tasks that share the trials.
        task: the number of this task, from 0.

    Raises:
        ConfigError: a folder has a run with other settings; nothing was trained.
        Interrupted, MachineError: the sweep stopped; the same call continues it.
    """
    for trial in runs:
        _check_folder(trial)
    failed: dict[str, SweepRun] = {}
    for number, trial in enumerate(runs[task::tasks]):
        if _read(trial).status == "done":
            _log.info("sweep: %s is finished already", trial.name)
            continue
        _log.info("sweep: run %d of %d, %s", number + 1, len(runs[task::tasks]), trial.name)
        try:
            _record(trial, train_one(trial.config))
        except Interrupted as stopped:
            raise Interrupted(f"{trial.name}: stopped; the same command continues the sweep") from stopped
        except MachineError:
            raise
        except (PyqembError, MemoryError, torch.OutOfMemoryError) as error:
            if not isinstance(error, PyqembError) and not is_out_of_memory(error):
                raise
            _log.error("sweep: %s failed: %s", trial.name, error)
            code = getattr(error, "exit_code", 74)
            failed[trial.name] = replace(_of(trial), status="failed", error=str(error) or repr(error), exit_code=code)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return _report(runs, failed)


def _of(trial: Trial) -> SweepRun:
    return SweepRun(trial.name, trial.config.save.dir, trial.settings)


def _check_folder(trial: Trial) -> None:
    """ConfigError if the folder has a run with other settings."""
    path = Path(trial.config.save.dir) / SETTINGS_FILE
    before = _json(path)
    if before is not None and (changed := differences(before, trial.config.model_dump(mode="json"), _FREE)):
        raise ConfigError(
            f"{path.parent}: was run with other settings: {'; '.join(changed)}; choose another folder with --out, or "
            "delete it"
        )


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if the file does not exist."""
    try:
        value = parse(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error, ConfigError) from error
    except ValueError as error:
        raise ConfigError(f"{path}: damaged: {reason(error)}; delete its folder") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: damaged: expected an object; delete its folder")
    return value


def _record(trial: Trial, result: TrainResult) -> None:
    """Write the results of a finished run into its folder."""
    final = _results(result.folder)
    best = final if result.best is None else _results(result.best)
    names = best["results"] or final["results"]
    metric = trial.config.eval.metric or next(iter(names), None)
    values = {
        "metric": metric,
        "value": None if metric is None or result.best is None else best["results"].get(metric),
        "step": None if result.best is None else best["step"],
        "last": None if metric is None else final["results"].get(metric),
        "data": final["data"],
    }
    with atomic_file(Path(trial.config.save.dir) / _DONE) as temporary:
        temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")


def _results(folder: Path) -> dict[str, Any]:
    """The step, the metrics and the digest of the training data that a model folder was saved with."""
    provenance: dict[str, Any] = read_contract(folder)["provenance"]
    return {key: provenance[key] for key in ("step", "results", "data")}


def _read(trial: Trial) -> SweepRun:
    """The run with its results, if it is finished."""
    values = _json(Path(trial.config.save.dir) / _DONE)
    if values is None:
        return _of(trial)
    return replace(_of(trial), status="done", value=values["value"], step=values["step"], last=values["last"])


def _report(runs: Sequence[Trial], failed: Mapping[str, SweepRun]) -> SweepReport:
    mode = runs[0].config.eval.mode
    sign = -1 if mode == "max" else 1
    found = [failed.get(trial.name) or _read(trial) for trial in runs]
    ranked = sorted(found, key=lambda run: (run.value is None, sign * (run.value or 0.0)))
    done = [_json(Path(run.folder) / _DONE) for run in found if run.status == "done"]
    data = {values["data"] for values in done if values and "data" in values}
    if len(data) > 1 and not any(key.partition(".")[0] == "data" for key in runs[0].settings):
        _log.warning(
            "sweep: the training data changed between the finished runs, so their values do not compare the settings; "
            "delete the folders of the old ones in %s", Path(runs[0].config.save.dir).parent,
        )  # fmt: skip
    metric = next((values["metric"] for values in done if values and values["metric"]), runs[0].config.eval.metric)
    return SweepReport(str(Path(runs[0].config.save.dir).parent), metric, mode, ranked)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
