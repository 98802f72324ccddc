"""The training configuration: every hyper-parameter and its default, from Python, TOML or YAML.

The class defaults are those of stage 2 (hard negatives, task-pure batches); `stage = 1` puts STAGE_1 under what is
given.
"""

import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from pyqemb.data.columns import ColumnMap, Columns
from pyqemb.data.settings import check_plain, explain, explain_all, parse_yaml, read_settings
from pyqemb.data.tables import is_table
from pyqemb.errors import ConfigError
from pyqemb.model.lora import TARGETS
from pyqemb.training.objectives.distillation import DistillationSection
from pyqemb.training.objectives.info_nce import InfoNCESection
from pyqemb.training.objectives.registry import check_name, check_settings
from pyqemb.training.section import ALIASES, Section, canonical, size_in_bytes

STAGE_1: dict[str, dict[str, Any]] = {
    "loss": {"preset": "qwen3"},
    "train": {"global_batch_size": 4096, "learning_rate": 2e-5, "num_negatives": 0},
}


class ModelSection(Section):
    """Where training starts."""

    base: str  # a model folder or hub id
    attention: Literal["causal", "bidirectional"] | None = None  # None: what the checkpoint says
    pooling: Literal["last", "mean"] | None = None
    max_length: int | None = Field(None, ge=2)  # tokens of a text, with the end token
    # Task sentence in the query prompt that is saved with the model; "": no prompt. None: the one instruction of the
    # data
    instruction: str | None = None


class DataSet(Section):
    """One source of examples. Each task in it becomes a dataset of its own: no batch mixes datasets."""

    path: str | None = None  # a file, a folder, or a dataset of the hub: hub://ORG/NAME
    rows: Any = Field(None, exclude=True, repr=False)  # from Python, in place of path: a table or list in memory
    split: str | None = None  # of a folder, a hub dataset or a DatasetDict; None: train, or the only one there
    # the columns of the rows by pyqemb's names, { query = "question" }; ignore = ["id"] leaves some out
    columns: dict[str, str | tuple[str, ...]] | None = None
    name: str | None = None  # None: the file's name
    instruction: str | None = None  # for examples that bring none
    weight: float | None = Field(None, gt=0)  # share of the steps; None: rows ** train.mixing_alpha
    max_share: float | None = Field(None, gt=0, le=1)  # of the steps, at most; the rest goes to the other datasets
    max_epochs: float | None = Field(None, gt=0)  # passes over it in the whole run, at most
    in_batch_negatives: bool | None = None  # None: by task; classification has none

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: Columns | None) -> Columns | None:
        try:
            ColumnMap(columns or {})
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("columns: ")) from error
        return columns

    @model_validator(mode="after")
    def _one_source(self) -> "DataSet":
        if self.path is None and self.rows is None:
            raise ValueError("expected a path (or rows, from Python)")
        if self.path is not None and self.rows is not None:
            raise ValueError("path and rows exclude each other")
        return self

    @property
    def source(self) -> Any:
        """What `read_examples` reads."""
        return self.path if self.rows is None else self.rows

    @property
    def label(self) -> str:
        """What the dataset is called: its name, or that of its file."""
        return self.name or ("data" if self.path is None else Path(self.path).name.split(".")[0])


class LoraSection(Section):
    """Train low-rank adapters in place of all weights.

    The run also writes them, in peft's form, to save.dir/adapter.
    """

    rank: int = Field(16, ge=1)
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    dropout: float = Field(0.0, ge=0, lt=1)
    rank_stabilised: bool = False

    @field_validator("targets")
    @classmethod
    def _known(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets or set(targets) - set(TARGETS):
            raise ValueError(f"expected some of {', '.join(TARGETS)}")
        return targets


class LossSection(InfoNCESection, DistillationSection):
    """The settings of the objectives, and which objective a task is trained with."""

    # of examples whose task has no objective; None: info_nce
    objective: Annotated[str, AfterValidator(check_name)] | None = None
    tasks: dict[str, Annotated[str, AfterValidator(check_name)]] = Field(default_factory=dict)  # objectives of tasks
    objectives: dict[str, dict[str, Any]] | None = None  # settings of registered objectives, by name

    @field_validator("objectives")
    @classmethod
    def _known_settings(cls, objectives: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        for name, settings in (objectives or {}).items():
            check_settings(name, settings)
        return objectives


class TrainSection(Section):
    """Batches, optimiser, schedule."""

    seed: int = Field(0, ge=0)
    steps: int | None = Field(None, ge=1)  # None: `epochs` times the data
    epochs: float = Field(1.0, gt=0)
    global_batch_size: int = Field(512, ge=1)  # queries a step
    num_negatives: int = Field(7, ge=0)  # hard negatives a query, chosen anew each time when there are more
    mixing_alpha: float = Field(1.0, ge=0)  # 1: datasets in proportion to their rows, 0: all alike
    rank_timeout: float = Field(45.0, ge=3)  # seconds without a sign of life after which a rank counts as lost
    token_cache: str | None = None  # a folder that keeps token ids for later epochs and runs; None: in memory
    tokens_per_chunk: int = Field(16384, ge=1)  # of one forward pass, at most; memory, not results, depends on it
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0)  # below 1: share of the steps; from 1 on: steps
    final_share: float = Field(0.0, ge=0, le=1)  # learning rate of the last step, as a share of the highest
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    max_bad_steps: int = Field(10, ge=1)  # steps in a row with a loss or gradient that is not finite, before it stops
    # What the model computes in; weights are kept and updated in float32. auto: bfloat16 on a GPU, float32 on the CPU
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"  # auto: a GPU where there is one that can run the model
    activation_checkpointing: bool = False
    # What a step may take: "auto" (nine tenths of what is free), bytes, or a size like "12GB"; chunks are planned and
    # graphs kept for it. None or "none": chunks of tokens_per_chunk, nothing kept
    memory: Literal["auto"] | int | None = "auto"
    skip_gradients: float = Field(
        0.0, ge=0, lt=1
    )  # share of the cached gradients' norm whose texts go without a second pass
    documents: Literal["gather", "ring"] = "gather"  # with several processes: all vectors everywhere, or passed round
    log_every: int = Field(1, ge=1)
    tensorboard: bool = False

    @field_validator("betas")
    @classmethod
    def _in_unit_interval(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("expected two numbers from 0 to below 1")
        return betas

    @field_validator("memory", mode="before")
    @classmethod
    def _in_bytes(cls, size: Any) -> Any:
        found = size_in_bytes(size) if isinstance(size, str) else None
        if found is not None:
            return found
        if size == "none":
            return None
        if size not in (None, "auto") and not (type(size) is int and size > 0):
            raise ValueError("expected 'auto', a number of bytes or a size like '12GB'")
        return size

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise ValueError("expected 'auto', 'cpu' or 'cuda'")
        return device


class ParallelSection(Section):
    """How the ranks of a run share the weights, gradients and moments. shard x replicate is the number of ranks."""

    # ranks that share one copy; 1: every rank holds all; -1: all ranks, or all of a replica where `replicate` is given
    shard: int = Field(1, ge=-1)
    replicate: int | None = Field(None, ge=1)  # copies; None: ranks / shard
    # whether the gathered weights are freed after each block (always: least memory) or kept through a step (never:
    # one all-gather a step); auto: kept where memory allows
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"

    @field_validator("shard")
    @classmethod
    def _not_zero(cls, shard: int) -> int:
        if shard == 0:
            raise ValueError("expected a number of ranks, or -1 for all of them")
        return shard

    def mesh(self, ranks: int) -> tuple[int, int]:
        """The number of replicas, and of the ranks that share each.

        ConfigError where they do not make up all ranks.
        """
        replicas = self.replicate or (1 if self.shard == -1 else max(ranks // self.shard, 1))
        shard = max(ranks // replicas, 1) if self.shard == -1 else self.shard
        if replicas * shard != ranks:
            given = f"parallel.shard is {self.shard}"
            if self.replicate is not None:
                given += f" and parallel.replicate {self.replicate}"
            raise ConfigError(
                f"{given}: shard x replicate must be the number of ranks: expected {replicas * shard} of them "
                f"(torchrun --nproc-per-node={replicas * shard}), got {ranks}"
            )
        return replicas, shard


class EvalDataset(Section):
    """One of several evaluation datasets; its metrics are called NAME/METRIC."""

    path: str  # as eval.data
    name: str | None = None  # None: the folder's name
    split: str | None = None  # None: dev, or test where there is no dev
    instruction: str | None = Field(None, min_length=1)  # None: eval.instruction


class EvalSection(Section):
    """Measuring while training. `every` None: at the end only."""

    data: str | None = None  # a folder that `pyqemb evaluate` reads; examples with negatives for a reranker
    datasets: tuple[EvalDataset, ...] = ()  # several, in place of `data`
    # Of queries that bring none. None: model.instruction, or the one instruction of the data
    instruction: str | None = Field(None, min_length=1)
    every: int | None = Field(None, ge=1)
    metric: str | None = None  # selects the best model. None: the first one reported
    mode: Literal["max", "min"] = "max"  # whether higher or lower values of the metric are better
    patience: int | None = Field(None, ge=1)  # stop after so many evaluations in a row without a better value

    @model_validator(mode="after")
    def _consistent(self) -> "EvalSection":
        if self.data is not None and self.datasets:
            raise ValueError("data and datasets exclude each other")
        names = [dataset.name or Path(dataset.path).name.split(".")[0] for dataset in self.datasets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"datasets: two are called {min(twice)!r}; give one of them another name")
        if self.patience is not None and self.every is None:
            raise ValueError("patience counts evaluations while training: it needs every")
        return self


class SaveSection(Section):
    """The run folder and its checkpoints. `every` None: only when interrupted and at the end."""

    dir: str = "runs/run"
    every: int | None = Field(500, ge=1)
    keep: int = Field(2, ge=1)
    background: bool = False  # write checkpoints, of which memory holds a copy, while training goes on


# Settings that a task does not have.
_NOT_OF = {
    "embedding": (),
    "rerank": ("loss.objective", "loss.tasks", "loss.matryoshka", "model.pooling", "train.documents"),
}


class TrainConfig(Section):
    """A whole training run. ConfigError names the key that is unknown or wrong."""

    task: Literal["embedding", "rerank"] = "embedding"  # rerank: yes or no for each pair of query and document
    stage: Literal[1, 2] = 2
    model: ModelSection
    data: tuple[DataSet, ...] = Field((), min_length=1)  # may be left out where `train` is given data
    lora: LoraSection | None = None
    loss: LossSection = Field(default_factory=lambda: LossSection())
    train: TrainSection = Field(default_factory=lambda: TrainSection())
    parallel: ParallelSection = Field(default_factory=lambda: ParallelSection())
    eval: EvalSection = Field(default_factory=lambda: EvalSection())
    save: SaveSection = Field(default_factory=lambda: SaveSection())

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain_all(error, _explain)) from error

    @model_validator(mode="after")
    def _fits_the_task(self) -> "TrainConfig":
        for name in _NOT_OF[self.task]:
            section_name, _, key = name.partition(".")
            section = getattr(self, section_name)
            if getattr(section, key) != type(section).model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"task {self.task!r} has no {name}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _with_stage_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or str(values.get("stage")) != "1":
            return values
        merged = dict(values, stage=1)
        for name, defaults in STAGE_1.items():
            given = _plain(values.get(name, {}))
            if isinstance(given, Mapping):
                merged[name] = {**defaults, **canonical(_SECTIONS[name], given)}
        return merged


_SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "data": DataSet,
    "lora": LoraSection,
    "loss": LossSection,
    "train": TrainSection,
    "parallel": ParallelSection,
    "eval": EvalSection,
    "save": SaveSection,
}


def stage1(**sections: Any) -> TrainConfig:
    """Large batches, in-batch negatives only.

    Args:
        sections: the sections of a run, `model={"base": ...}, train={"lr": 1e-4}`; `data` may also be data as people
            have it: see `as_data`.

    Example:
        >>> config = stage1(model={"base": "m"}, data={"faq": [{"query": "q", "positive": "p"}]})
        >>> config.data[0].label
        'faq'
    """
    return _stage(1, sections)


def stage2(**sections: Any) -> TrainConfig:
    """Smaller task-pure batches with hard negatives; sections as for stage1."""
    return _stage(2, sections)


def _stage(stage: int, sections: dict[str, Any]) -> TrainConfig:
    data = {"data": as_data(sections["data"])} if "data" in sections else {}
    return TrainConfig(**{**sections, **data, "stage": stage})


def as_data(data: Any) -> list[Any]:
    """The entries of the `data` section for what a caller has.

    Args:
        data: one or several of these:

            - a path, "hub://ORG/NAME", or rows in memory, as for `pyqemb.read_examples`: one dataset;
            - {name: any of these}: several datasets;
            - a list of paths, or of entries with the keys of `[[data]]`, `{"path": ..., "weight": 2}`; an entry may
              have `rows` in place of `path`, and be a value of {name: ...} too.

    Example:
        >>> as_data("pairs.jsonl")
        [{'path': 'pairs.jsonl'}]
        >>> as_data({"faq": [{"query": "q", "positive": "p"}]})
        [{'rows': [{'query': 'q', 'positive': 'p'}], 'name': 'faq'}]
    """
    if isinstance(data, Mapping) and not is_table(data) and not _is_entry(data):
        return [_entry(value, name) for name, value in data.items()]
    if isinstance(data, list | tuple) and all(isinstance(item, str | Path) or _is_entry(item) for item in data):
        return [_entry(item) for item in data]
    return [_entry(data)]


def with_data(config: TrainConfig, data: Any = None) -> TrainConfig:
    """The configuration with `data`, as for `as_data`. ConfigError: both have data, or neither."""
    if data is None:
        if not config.data:
            raise ConfigError("data: missing; expected [[data]] with a path, or train(data=...)")
        return config
    if config.data:
        raise ConfigError("data: is in the configuration and given to train(data=...) too; give one of them")
    return config.model_copy(update={"data": TrainConfig(model=config.model, data=as_data(data)).data})


def _is_entry(data: Any) -> bool:
    """Whether it is an entry of the `data` section, no row."""
    return isinstance(data, DataSet) or (isinstance(data, dict) and bool({"path", "rows"} & data.keys()))


def _entry(data: Any, name: str | None = None) -> Any:
    named = {} if name is None else {"name": name}
    if isinstance(data, DataSet):
        return data.model_copy(update=named)
    if _is_entry(data):
        return {**data, **named}
    return {"path" if isinstance(data, str | Path) else "rows": data, **named}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML or YAML file; each override is `section.key=value`, the value written as in YAML.

    Raises ConfigError naming the file and the key for anything that cannot be read or does not belong there.
    """

    def change(values: dict[str, Any]) -> None:
        for override in overrides:
            _override(values, override)

    values = read_settings(path, change)
    try:
        return TrainConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _override(values: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    *parents, last = name.strip().split(".")
    if not equals or not last:
        raise ConfigError(f"expected section.key=value, got {text!r}")
    place: Any = values
    try:
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        key: Any = int(last) if isinstance(place, list) else ALIASES.get(last, last)
        if isinstance(place, dict):
            for alias, canonical in ALIASES.items():
                if canonical == key:
                    place.pop(alias, None)
        item = parse_yaml(value)
        check_plain({key: item})
        place[key] = item
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot set {text!r}: {error}") from error


def _plain(section: Any) -> Any:
    return section.model_dump(exclude_unset=True) if isinstance(section, BaseModel) else section


def _explain(error: Any) -> str:
    """One pydantic error in a user's words."""
    where = ".".join(str(part) for part in error["loc"]) or "configuration"
    *parents, key = error["loc"] or ("",)
    if error["type"] == "extra_forbidden":
        section = _SECTIONS.get(str(parents[0])) if parents else TrainConfig
        names = [*section.model_fields, *ALIASES] if section else []
        close = [name for name in names if len(str(key)) > 2 and name.startswith(str(key))]
        close = close or difflib.get_close_matches(str(key), names, n=1)
        known = [home for home, fields in _SECTIONS.items() if key in fields.model_fields]
        hint = f"did you mean {close[0]!r}?" if close else f"it belongs in {known[0]!r}" if known else ""
        return f"{where}: unknown key" + (f"; {hint}" if hint else "")
    if error["type"] == "missing":
        return f"{where}: missing"
    return explain(error)


__all__ = [
    "TrainConfig",
    "load_config",
    "stage1",
    "stage2",
    *(kind.__name__ for kind in typing.cast(Any, _SECTIONS).values()),
]
