"""`pyqemb.train` and `pyqemb.sweep`: training together with evaluation. `pyqemb.finish`: the end of a job of tasks."""

from collections.abc import Mapping, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyqemb import training
from pyqemb.data.arguments import Count, NotNegative, check_call, checked
from pyqemb.data.files import check_writable, locked
from pyqemb.errors import ConfigError, DataError
from pyqemb.jobs.folder import digest_of, parts_folder, read_manifest, read_output
from pyqemb.training import TrainConfig, TrainResult, load_config
from pyqemb.training.preflight import check_evaluation
from pyqemb.training.sweeps import SweepReport, trials
from pyqemb.training.sweeps import sweep as run_trials

if TYPE_CHECKING:
    from pyqemb.curation.mining import Mined
    from pyqemb.encoding.job import Encoded

_FINISH = {"encode": "pyqemb.encoding.job", "mine": "pyqemb.curation.mining_tasks"}  # each has a function `finish`


@wraps(training.train)
def train(config: Any, *, evaluate: Any = None, **options: Any) -> TrainResult:
    """`training.train` with evaluation on the datasets of the `eval` section, or on those of `evaluate`."""
    check_call(training.train, "train", config, **options)
    config = config if isinstance(config, TrainConfig) else load_config(config)
    return training.train(config, evaluate=_evaluation(config, evaluate), **options)


@checked
def sweep(
    config: TrainConfig | str | Path,
    over: Mapping[str, Sequence[Any]],
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    data: Any = None,
    evaluate: Any = None,
    tasks: Count = 1,
    task: NotNegative = 0,
    progress: Literal["auto", "json", "off"] = "auto",
) -> SweepReport:
    """Train every combination of some settings, each in its own folder, and compare them by their evaluations.

    Finished runs are not repeated, and an interrupted run continues, so the same call completes a sweep. A run that
    fails, for example because its loss is not finite, is reported, and the others are run.

    Args:
        config: a TrainConfig, or a TOML or YAML file.
        over: the values of each key, {"train.learning_rate": [1e-5, 2e-5]}.
        out: the folder of the sweep (default: save.dir). Each run has a folder in it, called like learning_rate=1e-05.
        overrides: `section.key=value` for all runs (default: none).
        data: the training data, as for `train`.
        evaluate: as for `train` (default: the datasets of the `eval` section).
        tasks: the number of tasks that share the runs (default 1); each is a call of its own.
        task: the number of this task, from 0.
        progress: as for `train`.

    Returns:
        The runs, the best first: their settings, their best and their last evaluation.

    Raises:
        ConfigError: a key is unknown or must not be swept, a configuration is invalid, a folder has a run with other
            settings, or nothing is evaluated; nothing was trained.
        Interrupted, MachineError: as for `train`; the same call continues.

    Example:
        >>> from pyqemb.testing.tiny import write_tiny_folder
        >>> rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(8)]
        >>> settings = {"steps": 1, "global_batch_size": 4, "device": "cpu"}
        >>> config = pyqemb.stage1(
        ...     model={"base": str(write_tiny_folder("base"))}, data=rows, train=settings, save={"dir": "sweep"}
        ... )
        >>> pyqemb.sweep(config, {"train.learning_rate": [1e-3, 1e-4]}, evaluate=rows, progress="off")
        SweepReport(2 runs, 0 pending; the best is learning_rate=..., ndcg@10 ...; folders in sweep)
    """
    if task >= tasks:
        raise ConfigError(f"[sweep] task must be below tasks, {tasks}, got {task}")
    runs = trials(config, over, out, overrides)
    evaluation = _evaluation(runs[0].config, evaluate)
    if evaluation is None:
        raise ConfigError("eval.data: missing; the runs of a sweep are compared by their evaluations")
    check_evaluation(runs[0].config, evaluation)
    return run_trials(
        runs,
        lambda one: training.train(one, data=data, evaluate=evaluation, resume="auto", progress=progress),
        tasks,
        task,
    )


@checked
def finish(out: str | Path) -> "Encoded | Mined":
    """Write the output of a job whose parts were made by tasks, and remove the folder of the parts.

    All parts are verified before anything is written. Their folder OUT.parts is kept after an error.

    Args:
        out: the output that the tasks were given, as `out` of `pyqemb.encoding.encode_file` or
            `pyqemb.curation.mine_task`.

    Returns:
        What `encode_file` or `pyqemb.mine` returns without tasks.

    Raises:
        ConfigError: a task is still running, or none has ended.
        DataError: there is no such job, a part is missing or damaged (the error names the parts and their tasks), or
            the input has changed.
        MachineError: the disk is full, or another error of the machine.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> from pyqemb.encoding import encode_file
        >>> from pyqemb.testing.tiny import write_tiny_folder
        >>> model = write_tiny_folder("base")
        >>> rows = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
        >>> _ = Path("texts.json").write_text(json.dumps(rows))
        >>> for task in (1, 0):
        ...     _ = encode_file(model, "texts.json", "vectors.npy", rows_per_part=1, tasks=2, task=task)
        >>> pyqemb.finish("vectors.npy")
        Encoded(out=PosixPath('vectors.npy'), rows=3, dim=32, resumed=3)
    """
    out = Path(out)
    folder = parts_folder(out)
    if not folder.is_dir():
        done = f"; {out} exists, so the job may be finished already" if out.exists() else ""
        raise DataError(f"{folder}: no such folder of parts{done}")
    check_writable(out)
    with locked(folder, "job"):
        facts = read_manifest(folder)
        job = digest_of(facts)
        kind, settings = read_output(folder, job)
        if kind not in _FINISH:
            raise DataError(f"{folder}: parts of an unknown kind of job, {kind!r}")
        return import_module(_FINISH[kind]).finish(out, folder, job, facts, settings)


def _evaluation(config: TrainConfig, evaluate: Any) -> Any:
    """The function that evaluates a run; None if it has no evaluation."""
    if config.eval.has_data if evaluate is None else not callable(evaluate):
        from pyqemb.evaluation import DevSets  # not needed without evaluation

        return DevSets(config.eval, config.task, evaluate)
    return evaluate
