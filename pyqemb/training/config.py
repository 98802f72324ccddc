"""The training configuration: every hyper-parameter and its default, from Python, TOML or YAML.

The class defaults are those of stage 2 (hard negatives, task-pure batches); `stage = 1` puts STAGE_1 under what is
given.
"""

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)  # fmt: skip
from pydantic.json_schema import SkipJsonSchema

from pyqemb.data.arguments import Count, checked
from pyqemb.data.columns import ColumnMap, Columns
from pyqemb.data.layouts import Example
from pyqemb.data.settings import check_plain, explain, explain_all, missing, parse_yaml, read_settings, wrong_value
from pyqemb.data.tables import is_table
from pyqemb.errors import ConfigError, did_you_mean
from pyqemb.model.lora import TARGETS
from pyqemb.training.objectives.distillation import DistillationSection
from pyqemb.training.objectives.info_nce import InfoNCESection
from pyqemb.training.objectives.registry import check_name, check_settings
from pyqemb.training.section import ALIASES, SIZE_PATTERN, Section, canonical, size_in_bytes

STAGE_1: dict[str, dict[str, Any]] = {
    "loss": {"preset": "qwen3"},
    "train": {"global_batch_size": 4096, "learning_rate": 2e-5, "num_negatives": 0},
}


def _known_columns(columns: Columns | None) -> Columns | None:
    try:
        ColumnMap(columns or {})
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("columns: ")) from error
    return columns


_ColumnsOfRows = Annotated[dict[str, str | tuple[str, ...]] | None, AfterValidator(_known_columns)]


class ModelSection(Section):
    """The model that training starts from."""

    base: str = Field(
        description="Base model: a local folder or a Hugging Face hub id.",
        examples=["Qwen/Qwen3-0.6B-Base"],
    )
    attention: Literal["causal", "bidirectional"] | None = Field(
        None,
        description="Attention mask, `causal` or `bidirectional` (default: as stored with the base model). With "
        "`causal`, a token attends to itself and the tokens before it; with `bidirectional`, to all tokens of its "
        "text.",
        examples=["causal"],
    )
    pooling: Literal["last", "mean", "cls", "weighted_mean"] | None = Field(
        None,
        description="Embedding from the `last` token, the first (`cls`), the `mean` of all, or the `weighted_mean` "
        "(default: as stored with the base model). `cls` needs bidirectional attention; the weights of "
        "`weighted_mean` are 1, 2, 3, ... in the order of the tokens.",
        examples=["last"],
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Maximum tokens per text, with the end token (default: the base model's limit). Longer texts are "
        "truncated.",
        examples=[512],
    )
    instruction: str | None = Field(
        None,
        description="Task instruction in the query prompt saved with the model (default: that of the data). The "
        "default applies if all data share one instruction. An empty string saves a model without a query prompt.",
        examples=["Given a question, retrieve passages that answer it"],
    )


class DataSet(Section):
    """One source of examples. Each task in it becomes a dataset of its own; a batch never mixes datasets."""

    model_config = ConfigDict(json_schema_extra={"required": ["path"]})  # of files; Python has `rows` too

    path: str | None = Field(
        None,
        description="JSONL, CSV or Parquet file, a folder, or a dataset on the Hub (hub://ORG/NAME). Rows have "
        "`query`, `positive` and optional `negatives`, or another layout that docs/how-to/data-formats.md lists.",
        examples=["pairs.jsonl"],
    )
    rows: SkipJsonSchema[Any] = Field(None, exclude=True, repr=False)  # from Python, instead of path: rows in memory
    split: str | None = Field(
        None,
        description="Split of a folder or a Hub dataset (default: train, or the only split).",
        examples=["train"],
    )
    columns: _ColumnsOfRows = Field(
        None,
        description="Columns of the rows, by the names of pyqemb (default: by their own names). `ignore` lists columns "
        "that are not read.",
        examples=[{"query": "question", "ignore": ["id"]}],
    )
    name: str | None = Field(
        None,
        description="Name of the dataset in logs and metrics (default: the file name).",
        examples=["pairs"],
    )
    instruction: str | None = Field(
        None,
        description="Instruction for queries without their own (default: none).",
        examples=["Given a question, retrieve passages that answer it"],
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="Sampling weight (default: `rows ** train.mixing_alpha`). The weight is set for every "
        "dataset or for none.",
        examples=[1.0],
    )
    max_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Maximum share of the steps (default: no limit). The steps above it go to the other datasets.",
        examples=[0.3],
    )
    max_epochs: float | None = Field(
        None,
        gt=0,
        description="Maximum passes over the dataset in the whole run (default: no limit).",
        examples=[2.0],
    )
    in_batch_negatives: bool | None = Field(
        None,
        description="Whether documents of other queries are negatives (default: by task). Only classification has no "
        "in-batch negatives by default.",
        examples=[True],
    )
    group_positives: bool = Field(
        False,
        description="Make the rows of a query, with the same instruction, one example with several positives (default: "
        "each row is an example). Its loss is the mean over the positives, and none of them is a negative of another.",
        examples=[True],
    )
    objective_weight: float = Field(
        1.0, ge=0, description="Weight of the objective's loss in the batches of the dataset.", examples=[0.5]
    )
    teacher_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of the teacher's loss in the batches of the dataset (default: teacher.weight).",
        examples=[2.0],
    )

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    @model_validator(mode="after")
    def _one_source(self) -> "DataSet":
        if self.path is None and self.rows is None:
            raise missing("path")  # or `rows`, which only Python has
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
    """Train low-rank adapters instead of all weights.

    Without this section all weights are trained. The run also writes the adapters, in peft's format, to
    save.dir/adapter.
    """

    rank: int = Field(16, ge=1, description="Rank of the adapters.", examples=[16])
    alpha: float = Field(
        32.0,
        description="Scale of the adapters. Their output is multiplied by `alpha / rank`.",
        examples=[32.0],
    )
    targets: tuple[str, ...] = Field(
        TARGETS,
        description="Linear layers that get an adapter.",
        examples=[["q_proj", "v_proj"]],
        json_schema_extra={"items": {"enum": [*TARGETS]}},
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout on the input of the adapters. The masks, and so the results, depend on the number of "
        "ranks and on `train.tokens_per_chunk`.",
        examples=[0.05],
    )
    rank_stabilized: bool = Field(
        False,
        description="Multiply the adapters' output by `alpha / sqrt(rank)` instead (rsLoRA).",
        examples=[True],
    )

    @field_validator("targets")
    @classmethod
    def _known(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets or set(targets) - set(TARGETS):
            raise ValueError(f"expected some of {', '.join(TARGETS)}")
        return targets


class LossSection(InfoNCESection, DistillationSection):
    """The training objectives and their settings."""

    objective: Annotated[str, AfterValidator(check_name)] | None = Field(
        None,
        description="Objective for examples whose task has none (default: info_nce). It is `info_nce`, "
        "`classification`, `cosent`, `distillation` or the name of a registered objective.",
        examples=["info_nce"],
    )
    tasks: dict[str, Annotated[str, AfterValidator(check_name)]] = Field(
        {},
        description="Objective by task of the examples. Tasks that are not listed keep their objective.",
        examples=[{"my_pairs": "cosent"}],
    )
    objectives: dict[str, dict[str, Any]] | None = Field(
        None,
        description="Settings of registered objectives, by name (default: none).",
        examples=[{}],
    )

    @field_validator("objectives")
    @classmethod
    def _known_settings(cls, objectives: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        for name, settings in (objectives or {}).items():
            check_settings(name, settings)
        return objectives


class TeacherSection(Section):
    """Distillation: the model also learns the vectors of another embedding model.

    The loss of a step is the objective's, plus `weight` times the mean over all texts of the batch of
    `cosine * (1 - cosine similarity) + mse * mean squared error`, between the teacher's vector of a text and the
    model's. docs/how-to/distill.md explains it.
    """

    model: str = Field(
        description="The teacher: a folder that pyqemb or sentence-transformers loads, or a Qwen3 model on the Hub.",
        examples=["Qwen/Qwen3-Embedding-4B"],
    )
    weight: float = Field(1.0, ge=0, description="Weight of the teacher's loss. The objective's is 1.", examples=[0.5])
    cosine: float = Field(1.0, ge=0, description="Weight of the cosine distance.", examples=[1.0])
    mse: float = Field(0.0, ge=0, description="Weight of the mean squared error of the features.", examples=[1.0])
    projection: bool = Field(
        True,
        description="Learn a linear map from the model's vectors to the teacher's dimension. It is written to "
        "save.dir/teacher, apart from the model. false: the teacher's vectors are truncated to the model's dimension.",
        examples=[False],
    )
    cache: str | None = Field(
        None,
        min_length=1,
        description="Folder of the teacher's vectors (default: save.dir/teacher/vectors). Several runs may share one, "
        "so that each text is encoded once.",
        examples=["teacher-vectors"],
    )

    @model_validator(mode="after")
    def _has_a_term(self) -> "TeacherSection":
        if not self.cosine and not self.mse:
            raise wrong_value("cosine and mse are both 0; expected a weight above 0 for one of them", "mse", self.mse)
        return self


class GuideSection(Section):
    """A guide: another embedding model decides which candidates of InfoNCE are false negatives.

    A candidate is masked if the guide's score for it exceeds the guide's score of the positive by more than `margin`.
    The margin of `loss` masks by the model's own scores, besides. docs/concepts/info-nce.md explains it.
    """

    model: str = Field(
        description="The guide: a folder that pyqemb or sentence-transformers loads, or a Qwen3 model on the Hub.",
        examples=["Qwen/Qwen3-Embedding-4B"],
    )
    margin: float = Field(
        0.0,
        description="Margin of the limit. Below 0, candidates that are almost as close as the positive are masked too.",
        examples=[-0.05],
    )
    relative: bool = Field(
        False, description="Multiply the margin by the absolute value of the positive's score.", examples=[True]
    )
    cache: str | None = Field(
        None,
        min_length=1,
        description="Folder of the guide's vectors (default: save.dir/guide/vectors). Several runs may share one, so "
        "that each text is encoded once.",
        examples=["guide-vectors"],
    )


class TrainSection(Section):
    """Batches, optimizer, schedule, precision and memory."""

    seed: int = Field(
        0,
        ge=0,
        description="Seed of batches, sampled negatives and dropout.",
        examples=[0],
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="Number of optimizer steps (default: `epochs` passes over the data).",
        examples=[1000],
    )
    epochs: float = Field(
        1.0,
        gt=0,
        description="Passes over the data. Ignored if `steps` is set. A pass is rounded up to whole batches, and the "
        "last one is filled from the next pass: 300 rows in batches of 32 are 10 steps, so 20 epochs are shown as "
        "21.33.",
        examples=[2.0],
    )
    global_batch_size: int = Field(
        512,
        ge=1,
        description="Queries per step, over all ranks. GPU memory does not depend on it: gradients are cached. "
        "The default of stage 1 is 4096.",
        examples=[512],
    )
    num_negatives: int = Field(
        7,
        ge=0,
        description="Hard negatives per query. If a query has more, each epoch samples this many. The default of "
        "stage 1 is 0.",
        examples=[7],
    )
    mixing_alpha: float = Field(
        1.0,
        ge=0,
        description="Datasets are sampled in proportion to `rows ** mixing_alpha`. 1 samples every row equally often, "
        "0 every dataset.",
        examples=[0.5],
    )
    rank_timeout: float = Field(
        45.0,
        ge=3,
        description="Seconds without a heartbeat after which a rank counts as lost.",
        examples=[120.0],
    )
    token_cache: str | None = Field(
        None,
        description="Folder that keeps token ids for later epochs and runs (default: in memory, for this run).",
        examples=["tokens"],
    )
    optimizer: Literal["adamw", "muon", "lion"] = Field(
        "adamw",
        description="Optimizer: `adamw`, `muon` or `lion`. `muon` orthogonalizes the updates of the matrices of the "
        "layers (`torch.optim.Muon`); embeddings, norms and a head are trained with AdamW. It takes the learning rate "
        "and the weight decay of AdamW, and needs whole matrices, so it excludes `parallel.shard`. `lion` needs the "
        "extra pyqemb[lion], and a learning rate 3 to 10 times smaller. Both keep one moment instead of two.",
        examples=["muon"],
    )
    learning_rate: float = Field(
        1e-5,
        gt=0,
        description="Peak learning rate. The default of stage 1 is 2e-5.",
        examples=[1e-5],
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Layer-wise decay of the learning rate (default: the same rate for all layers). The last layer "
        "gets `layer_decay` times the rate, each layer below it `layer_decay` times that of the layer above, and the "
        "embeddings that of a layer below the first. The head and the final norm get the full rate.",
        examples=[0.9],
    )
    embedding_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of the token embeddings (default: `learning_rate`, with `layer_decay`). It "
        "follows the same schedule.",
        examples=[1e-6],
    )
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of a reranker's head, if it is not tied to the embeddings (default: "
        "`learning_rate`). It follows the same schedule.",
        examples=[1e-4],
    )
    freeze: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Parameters that are not trained: glob patterns of their names in model.safetensors (default: "
        "none). The name of a module, such as `layers.0`, stands for all of its parameters; the prefix `model.` is "
        "optional. A frozen parameter has no gradient, no optimizer state and no place in checkpoints.",
        examples=[["embed_tokens", "layers.[0-3]"]],
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine",
        description="Learning rate after the warmup: `cosine`, `linear` or `constant`. `cosine` and `linear` decay it "
        "to `final_share` of its peak.",
        examples=["linear"],
    )
    warmup: float = Field(
        0.05,
        ge=0,
        description="Linear warmup: a fraction of the steps if below 1, otherwise a number of steps.",
        examples=[100.0],
    )
    final_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Learning rate of the last step, as a fraction of the peak.",
        examples=[0.1],
    )
    weight_decay: float = Field(
        0.01, ge=0, description="Weight decay of the matrices, decoupled as in AdamW.", examples=[0.1]
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Momentum (Nesterov) of Muon.", examples=[0.9])
    betas: tuple[float, float] = Field(
        (0.9, 0.999),
        description="Betas of AdamW and Lion. The default of Lion is 0.9 and 0.99.",
        examples=[[0.9, 0.98]],
    )
    epsilon: float = Field(1e-8, gt=0, description="Epsilon of AdamW.", examples=[1e-6])
    ema_decay: float | None = Field(
        None,
        gt=0,
        le=0.99999,
        description="Decay of an exponential moving average (EMA) of the trained weights (default: no average). After "
        "step n it is at most `(1 + n) / (10 + n)`, so that early averages are not those of the start. The average is "
        "float32 and takes 4 bytes for each trained parameter, also in checkpoints; `eval.weights` and `save.weights` "
        "select where it is used.",
        examples=[0.999],
    )
    max_grad_norm: float | None = Field(
        1.0,
        gt=0,
        description="Gradient clipping: maximum norm of the gradient. null turns it off.",
        examples=[1.0],
    )
    max_bad_steps: int = Field(
        10,
        ge=1,
        description="Steps in a row without a finite loss or gradient, after which the run stops.",
        examples=[3],
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Data type of the computation; `auto`: bfloat16 on a GPU, float32 on the CPU. Weights are stored "
        "and updated in float32.",
        examples=["bfloat16"],
    )
    device: str = Field(
        "auto",
        description="Device: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes a GPU if one can run the model.",
        examples=["cuda:0"],
    )
    tokens_per_chunk: int = Field(
        16384,
        ge=1,
        description="Maximum tokens per forward pass. It changes memory and speed, not the result.",
        examples=[8192],
    )
    memory: Literal["auto"] | int | None = Field(
        "auto",
        description='Memory budget of a step: "auto", a size like "12GB", or "none". The chunk size and the graphs '
        "kept for the backward pass are planned for it. `auto` takes nine tenths of the free memory; an integer is a "
        "number of bytes; `none` plans nothing and uses chunks of `tokens_per_chunk` tokens.",
        examples=["12GB"],
        json_schema_extra={
            "anyOf": [
                {"enum": ["auto", "none", None]},
                {"type": "integer", "exclusiveMinimum": 0},
                {"type": "string", "pattern": SIZE_PATTERN},
            ]
        },
    )
    activation_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, more time.",
        examples=[True],
    )
    skip_gradients: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the cached gradients' norm whose texts skip the second pass. 0 gives the exact gradient; "
        "larger values give an approximate one in less time.",
        examples=[0.01],
    )
    documents: Literal["gather", "ring"] = Field(
        "gather",
        description="How ranks exchange embeddings: `gather` (every rank holds all) or `ring` (passed from rank to "
        "rank). The ring needs less memory.",
        examples=["ring"],
    )
    log_every: int = Field(1, ge=1, description="Steps between two lines of metrics.", examples=[10])
    tensorboard: bool = Field(False, description='Same as log.to = ["tensorboard"].', examples=[True])

    @model_validator(mode="before")
    @classmethod
    def _with_betas_of_lion(cls, values: Any) -> Any:
        given = values.get("optimizer") if isinstance(values, Mapping) else None
        if isinstance(given, str) and given == "lion":
            return {"betas": (0.9, 0.99), **values}
        return values

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
    """How the ranks of a run (torchrun) shard weights, gradients and optimizer state.

    By default every rank holds all of them. shard x replicate is the number of ranks.
    """

    shard: int = Field(
        1,
        ge=-1,
        description="Number of ranks that shard one copy; 1: every rank holds a copy, -1: all ranks. With `replicate`, "
        "-1 means all ranks of a replica.",
        examples=[8],
        json_schema_extra={"not": {"const": 0}},
    )
    replicate: int | None = Field(
        None, ge=1, description="Number of copies (default: number of ranks / shard).", examples=[1]
    )
    reshard_after_forward: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Free gathered weights after each block (`always`) or after the step (`never`). `always` needs the "
        "least memory, `never` one all-gather per step; `auto` is `never` if memory allows.",
        examples=["always"],
    )

    @field_validator("shard")
    @classmethod
    def _not_zero(cls, shard: int) -> int:
        if shard == 0:
            raise ValueError("expected a number of ranks, or -1 for all of them")
        return shard

    @checked
    def mesh(self, ranks: Count) -> tuple[int, int]:
        """The number of replicas, and of the ranks that share each.

        ConfigError if their product is not the number of ranks.
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
    """One of several evaluation datasets. Its metrics are called NAME/METRIC."""

    path: str = Field(description="Evaluation folder or examples, as in eval.data.", examples=["dev-de"])
    name: str | None = Field(None, description="Name in metrics (default: the folder name).", examples=["de"])
    split: str | None = Field(
        None, description="Split of the folder (default: dev, or test if there is no dev).", examples=["dev"]
    )
    columns: _ColumnsOfRows = Field(
        None,
        description="Columns of examples, as in data.columns (default: by their own names).",
        examples=[{"query": "question", "positive": "answer"}],
    )
    instruction: str | None = Field(
        None,
        min_length=1,
        description="Instruction for queries without their own (default: eval.instruction).",
        examples=["Given a question, retrieve passages that answer it"],
    )


class EvalSection(Section):
    """Evaluation while training."""

    @property
    def has_data(self) -> bool:
        """Whether it names what is measured."""
        return self.data is not None or bool(self.datasets)

    data: str | None = Field(
        None,
        description="Evaluation folder or examples, as for `pyqemb evaluate` (default: none). For a reranker, examples "
        "with negatives.",
        examples=["dev"],
    )
    datasets: tuple[EvalDataset, ...] = Field(
        (),
        description="Several evaluation datasets instead of `data`. Metrics are called NAME/ndcg@10; of two or more "
        "datasets, ndcg@10 is the mean.",
        examples=[[{"path": "dev-de", "name": "de"}, {"path": "dev-en", "name": "en"}]],
    )
    instruction: str | None = Field(
        None,
        min_length=1,
        description="Instruction for queries without their own (default: that of the model). That is "
        "model.instruction, or the instruction of the data if all data share one.",
        examples=["Given a question, retrieve passages that answer it"],
    )
    every: int | None = Field(
        None, ge=1, description="Steps between evaluations (default: only at the end).", examples=[200]
    )
    metric: str | None = Field(
        None,
        description="Metric that selects the best model (default: the first reported). The best model is kept in "
        "save.dir/best.",
        examples=["ndcg@10"],
    )
    mode: Literal["max", "min"] = Field(
        "max", description="Whether higher (`max`) or lower (`min`) values of the metric are better.", examples=["min"]
    )
    weights: Literal["ema", "trained"] | None = Field(
        None,
        description="Weights that are evaluated, and kept as the best model: the average (`ema`) or the `trained` ones "
        "(default: `ema` with `train.ema_decay`).",
        examples=["trained"],
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many evaluations in a row without a better value (default: never).",
        examples=[5],
    )

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
    """The run folder and its checkpoints."""

    dir: str = Field("runs/run", description="Folder of the run.", examples=["runs/run"])
    every: int | None = Field(
        500,
        ge=1,
        description="Steps between checkpoints. null: only when the run is interrupted, and at the end.",
        examples=[500],
    )
    keep: int = Field(2, ge=1, description="Number of checkpoints kept; older ones are deleted.", examples=[2])
    weights: Literal["ema", "trained"] | None = Field(
        None,
        description="Weights of the final model: the average (`ema`) or the `trained` ones (default: `ema` with "
        "`train.ema_decay`). Checkpoints hold both.",
        examples=["trained"],
    )
    background: bool = Field(
        False,
        description="Write checkpoints while training continues. Memory then holds a copy of the checkpoint.",
        examples=[True],
    )


class LogSection(Section):
    """Loggers of the run, beside metrics.jsonl."""

    to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (),
        description="Loggers of metrics: `tensorboard`, `wandb` (Weights & Biases), `mlflow`, `trackio`. Each needs "
        "the extra of its name, for example pyqemb[wandb].",
        examples=[["tensorboard", "wandb"]],
    )
    project: str = Field(
        "pyqemb",
        min_length=1,
        description="Project of W&B and trackio, experiment of MLflow. The run has the name of its folder save.dir.",
        examples=["pyqemb"],
    )


# Settings that a task does not have. Of `loss`, a reranker has only those of registered objectives.
_NOT_OF = {
    "embedding": (),
    "rerank": (
        *(f"loss.{key}" for key in LossSection.model_fields if key != "objectives"),
        "model.pooling",
        "train.documents",
    ),
}


class TrainConfig(Section):
    """The configuration of a training run. docs/reference/configuration.md describes each key.

    Usually `stage1`, `stage2` or `pyqemb.training.load_config` makes one. It is frozen.

    Args:
        task: "embedding" (default) or "rerank".
        stage: 1 or 2 (default), which sets defaults.
        model: the base model.
        data: the datasets, with `path` or `rows`.
        lora: adapters (default: all weights are trained).
        loss: the objectives.
        teacher: a model whose vectors are learned too (default: none).
        guide: a model that decides which candidates are false negatives (default: none).
        train: batches, optimizer, schedule, precision and memory.
        parallel: sharding.
        eval: evaluation while training.
        log: experiment trackers.
        save: the run folder and its checkpoints.

    Raises:
        ConfigError: a key is unknown, missing or wrong; it is named.

    Example:
        >>> config = pyqemb.TrainConfig(model={"base": "base"}, data=[{"path": "pairs.jsonl"}])
        >>> config.train.learning_rate
        1e-05
    """

    model_config = ConfigDict(json_schema_extra={"required": ["model", "data"]})  # of files; `train` also takes data

    task: Literal["embedding", "rerank"] = Field(
        "embedding",
        description="What is trained: `embedding`, or `rerank` (yes or no for a query and a document).",
        examples=["rerank"],
    )
    stage: Literal[1, 2] = Field(
        2,
        description="Defaults of stage 1 (large batches, in-batch negatives) or 2 (hard negatives). Stage 1 is for "
        "weakly supervised pairs; a key that is set overrides the default of either stage.",
        examples=[1],
    )
    model: ModelSection
    data: tuple[DataSet, ...] = Field((), min_length=1)  # omitted if data is passed to `train`
    lora: LoraSection | None = None
    loss: LossSection = Field(default_factory=lambda: LossSection())
    teacher: TeacherSection | None = None
    guide: GuideSection | None = None
    train: TrainSection = Field(default_factory=lambda: TrainSection())
    parallel: ParallelSection = Field(default_factory=lambda: ParallelSection())
    eval: EvalSection = Field(default_factory=lambda: EvalSection())
    save: SaveSection = Field(default_factory=lambda: SaveSection())
    log: LogSection = Field(default_factory=lambda: LogSection())

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain_all(error, _explain)) from error

    @model_validator(mode="after")
    def _fits_the_task(self) -> "TrainConfig":
        for name in self.other_models if self.task == "rerank" else ():
            raise ValueError(f"task 'rerank' has no {name}")
        for name in _NOT_OF[self.task]:
            section_name, _, key = name.partition(".")
            section = getattr(self, section_name)
            if getattr(section, key) != type(section).model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"task {self.task!r} has no {name}")
        return self

    @model_validator(mode="after")
    def _each_dataset_trains(self) -> "TrainConfig":
        for number, entry in enumerate(self.data):
            key = f"data.{number}"
            if self.teacher is None and entry.teacher_weight is not None:
                raise wrong_value("is set, but there is no [teacher]", f"{key}.teacher_weight", entry.teacher_weight)
            weight = 0.0 if self.teacher is None else self.teacher.weight
            if entry.teacher_weight is not None:
                weight = entry.teacher_weight
            if not (entry.objective_weight or weight or self.loss.spread_out):
                lacks = "there is no [teacher]" if self.teacher is None else "the weight of the teacher's loss is 0 too"
                raise wrong_value(
                    f"{lacks}, so the dataset trains nothing; expected more than 0", f"{key}.objective_weight",
                    entry.objective_weight,
                )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _gathers_what_a_ring_lacks(self) -> "TrainConfig":
        if self.train.documents == "ring" and self.guide is not None:
            raise wrong_value(
                "a guide's mask needs the vectors of all ranks; expected 'gather'", "train.documents", "ring"
            )
        if self.train.documents == "ring" and any(entry.group_positives for entry in self.data):
            raise wrong_value(
                "a ring takes one positive a query, and a dataset has group_positives = true; expected 'gather'",
                "train.documents",
                "ring",
            )
        return self

    @model_validator(mode="after")
    def _has_whole_matrices(self) -> "TrainConfig":
        if self.train.optimizer == "muon" and self.parallel.shard != 1:
            raise wrong_value(
                "muon orthogonalizes whole matrices, and parallel.shard divides them among ranks; expected 'adamw', or "
                "parallel.shard = 1",
                "train.optimizer",
                "muon",
            )
        return self

    @model_validator(mode="after")
    def _has_an_average(self) -> "TrainConfig":
        for name, section in (("eval", self.eval), ("save", self.save)):
            if section.weights == "ema" and self.train.ema_decay is None:
                raise wrong_value("the average of the weights needs train.ema_decay", f"{name}.weights", "ema")
        return self

    def uses_average(self, section: EvalSection | SaveSection) -> bool:
        """Whether the average of the weights is used (`train.ema_decay`).

        Args:
            section: `eval` or `save`, whose `weights` chooses.

        Returns:
            True for the average, False for the trained weights.
        """
        return self.train.ema_decay is not None and section.weights != "trained"

    @property
    def other_models(self) -> dict[str, TeacherSection | GuideSection]:
        """The sections of the models besides the trained one, by name."""
        sections = {"teacher": self.teacher, "guide": self.guide}
        return {name: section for name, section in sections.items() if section is not None}

    @property
    def keeps_base(self) -> bool:
        """Whether some weights of the base model are not trained, so that checkpoints do not hold them."""
        return self.lora is not None or bool(self.train.freeze)

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
    "teacher": TeacherSection,
    "guide": GuideSection,
    "train": TrainSection,
    "parallel": ParallelSection,
    "eval": EvalSection,
    "save": SaveSection,
    "log": LogSection,
}


def stage1(**sections: Any) -> TrainConfig:
    """Configure stage 1: large batches with in-batch negatives only.

    Args:
        sections: the sections of a run, `model={"base": ...}, train={"lr": 1e-4}`; `data` may also be data as people
            have it: see `as_data`.

    Returns:
        The configuration, with the defaults of stage 1.

    Raises:
        ConfigError: a key is unknown, missing or wrong; it is named.

    Example:
        >>> config = pyqemb.stage1(model={"base": "m"}, data={"faq": [{"query": "q", "positive": "p"}]})
        >>> config.data[0].label
        'faq'
    """
    return _stage(1, sections)


def stage2(**sections: Any) -> TrainConfig:
    """Configure stage 2: smaller batches of one task each, with hard negatives.

    Args:
        sections: as for `stage1`.

    Returns:
        The configuration, with the defaults of stage 2.

    Raises:
        ConfigError: a key is unknown, missing or wrong; it is named.

    Example:
        >>> config = pyqemb.stage2(model={"base": "base"}, data="pairs.jsonl", loss={"temperature": 0.05})
        >>> config.train.num_negatives
        7
    """
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
            - a list of paths and tables, or of entries with the keys of `[[data]]`, `{"path": ..., "weight": 2}`; an
              entry may have `rows` instead of `path`, and be a value of {name: ...} too.

    Example:
        >>> as_data("pairs.jsonl")
        [{'path': 'pairs.jsonl'}]
        >>> as_data({"faq": [{"query": "q", "positive": "p"}]})
        [{'rows': [{'query': 'q', 'positive': 'p'}], 'name': 'faq'}]
    """
    if isinstance(data, Mapping) and not is_table(data) and not _is_entry(data):
        return [_entry(value, name) for name, value in data.items()]
    if isinstance(data, list | tuple) and not any(isinstance(item, Example) or _is_row(item) for item in data):
        return [_entry(item) for item in data]
    return [_entry(data)]


@checked
def with_data(config: TrainConfig, data: Any = None) -> TrainConfig:
    """The configuration with `data`, as for `as_data`. ConfigError: both have data, or neither."""
    if data is None:
        if not config.data:
            raise ConfigError("data: missing; expected [[data]] with a path, or train(data=...)")
        return config
    if config.data:
        raise ConfigError("data: is in the configuration and given to train(data=...) too; give one of them")
    given = {name: getattr(config, name) for name in config.model_fields_set if name != "data"}
    return TrainConfig(**given, data=as_data(data))


def _is_entry(data: Any) -> bool:
    """Whether it is an entry of the `data` section, no row."""
    return isinstance(data, DataSet) or (isinstance(data, dict) and bool({"path", "rows"} & data.keys()))


def _is_row(item: Any) -> bool:
    return isinstance(item, dict) and not is_table(item) and not _is_entry(item)


def _entry(data: Any, name: str | None = None) -> Any:
    named = {} if name is None else {"name": name}
    if isinstance(data, DataSet):
        return data.model_copy(update=named)
    if _is_entry(data):
        return {**data, **named}
    return {"path" if isinstance(data, str | Path) else "rows": data, **named}


@checked
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


def overridden(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """The configuration with `section.key=value` replaced, as for `load_config`."""
    values = {**config.model_dump(exclude_unset=True), "data": list(config.data)}
    for override in overrides:
        _override(values, override)
    return TrainConfig(**{key: value for key, value in values.items() if key != "data" or value})


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


# Arguments of transformers' Trainer, and ours.
_THEIR_NAMES = {
    "per_device_train_batch_size": "global_batch_size",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "eval_steps": "every",
    "save_steps": "every",
    "metric_for_best_model": "metric",
    "save_total_limit": "keep",
    "output_dir": "dir",
    "logging_steps": "log_every",
    "bf16": "precision",
}


def _plain(section: Any) -> Any:
    return section.model_dump(exclude_unset=True) if isinstance(section, BaseModel) else section


def _explain(error: Any) -> str:
    """One pydantic error in a user's words."""
    where = ".".join(str(part) for part in error["loc"]) or "configuration"
    *parents, key = error["loc"] or ("",)
    if error["type"] == "extra_forbidden":
        section = _SECTIONS.get(str(parents[0])) if parents else TrainConfig
        names = [*section.model_fields, *ALIASES] if section else []
        meant = str(key)
        if _THEIR_NAMES.get(meant) in names:
            meant = _THEIR_NAMES[meant]
        elif len(meant) > 2:
            meant = next((name for name in names if name.startswith(meant)), meant)
        homes = [home for home, fields in _SECTIONS.items() if key in fields.model_fields]
        belongs = f"; it belongs in {homes[0]!r}" if homes else ""
        return f"{where}: unknown key{did_you_mean(meant, names) or belongs}"
    if error["type"] == "missing":
        return f"{where}: missing"
    if error["type"] == "value_error" and isinstance(error["input"], Mapping) and _is_section(error["loc"]):
        return f"{where}: {error['ctx']['error']}" if error["loc"] else str(error["ctx"]["error"])  # without the table
    return explain(error)


def _is_section(loc: Sequence[Any]) -> bool:
    """Whether an error is that of the whole configuration, a section, or an entry of `data`."""
    return not loc or (loc[0] in _SECTIONS and (len(loc) == 1 or isinstance(loc[-1], int)))


__all__ = [
    "TrainConfig",
    "load_config",
    "stage1",
    "stage2",
    *(kind.__name__ for kind in typing.cast(Any, _SECTIONS).values()),
]
