"""The base class of objectives: settings, required columns, the loss of a batch and its statistics.

Legend: B queries, M documents, R queries of this rank, S texts of this rank, E dimension.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from pyqemb.data.arguments import checked
from pyqemb.data.batch import to_device
from pyqemb.data.example import Example
from pyqemb.data.loader import TrainingBatch, build_batch
from pyqemb.data.shards import Shards, Summary
from pyqemb.errors import DataError
from pyqemb.model.protocols import TextEncoder
from pyqemb.ops.prefixes import is_ordered, over_prefixes, prefixes
from pyqemb.training.objectives.fake_quantize import TrainingPrecision
from pyqemb.training.parallel.ring import Ring
from pyqemb.training.section import Section

if TYPE_CHECKING:
    from pyqemb.training.config import LossSection


class LossPart(NamedTuple):
    """This rank's part of the loss and the statistics; the parts of all ranks are summed."""

    loss: Tensor  # scalar, differentiable
    totals: Tensor  # float64 [n], the input of `Objective.stats`


class EmbeddingSection(Section):
    """Settings of all objectives for embeddings."""

    temperature: float = Field(
        0.02,
        gt=0,
        description="Temperature of the softmax over cosine similarities.",
        examples=[0.05],
    )
    learn_temperature: bool = Field(
        False, description="Train the temperature too. `temperature` is its first value.", examples=[True]
    )
    matryoshka: tuple[int, ...] | None = Field(
        None,
        description="Dimensions of Matryoshka training, rising or falling (default: the full dimension alone). The "
        "loss is the weighted sum over the normalized prefixes of these dimensions.",
        examples=[[1024, 512, 256, 128]],
    )
    matryoshka_weights: tuple[float, ...] | None = Field(
        None,
        description="Weights of the Matryoshka dimensions (default: equal weights that add up to 1).",
        examples=[[1.0, 1.0, 1.0, 1.0]],
    )

    precisions: tuple[TrainingPrecision, ...] = Field(
        ("float32",),
        description="Quantization-aware training: the loss is the mean over the vectors in these precisions. `int8` "
        "and `binary` are for an index that stores such vectors; list `float32` too, to keep the quality of the full "
        "vectors.",
        examples=[["float32", "binary"]],
    )
    spread_out: float = Field(
        0.0,
        ge=0,
        description="Weight of the spread-out regularizer: the mean squared cosine of the queries among each other, "
        "plus that of the documents, is added to the loss. Vectors that use all directions lose less by quantization.",
        examples=[1.0],
    )

    @field_validator("precisions")
    @classmethod
    def _each_once(cls, precisions: tuple[TrainingPrecision, ...]) -> tuple[TrainingPrecision, ...]:
        if not precisions or len(set(precisions)) < len(precisions):
            raise ValueError("expected at least one precision, each once")
        return precisions

    @field_validator("matryoshka")
    @classmethod
    def _in_order(cls, dims: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if dims is not None and not is_ordered(dims):
            raise ValueError("expected dimensions of at least 1 that rise or fall, each once")
        return dims

    @model_validator(mode="after")
    def _as_many_weights(self) -> "EmbeddingSection":
        weights = self.matryoshka_weights
        if weights is not None and (len(weights) != len(self.matryoshka or ()) or min(weights) < 0):
            raise ValueError(
                f"matryoshka_weights: expected {len(self.matryoshka or ())} numbers of at least 0, one a dimension"
            )
        return self


class LossParameters(torch.nn.Module):
    """Parameters of the loss itself: the logarithm of its temperature, and the projection to a teacher, if any."""

    @checked
    def __init__(self, section: EmbeddingSection, projection_FE: Tensor | None = None):
        super().__init__()
        if section.learn_temperature:
            self.log_temperature = torch.nn.Parameter(torch.tensor(section.temperature).log())
        self.projection = None if projection_FE is None else torch.nn.Parameter(projection_FE)


class Objective:
    """The base class of objectives; `register_objective` registers a subclass under its name.

    Attributes:
        name: the name in `[loss.tasks]` and in messages.
        tasks: the `task` of examples that are trained with this objective unless `[loss.tasks]` says otherwise.
        model: the kind of model that it trains, which is the `task` of the configuration.
        columns: the columns of an example that it uses, besides query, positive and instruction. Other columns are
            reported.
        positive_pairs: whether every row is treated as a positive pair; a row with a score of 0 is then an error.
        with_in_batch_negatives: the objectives for `in_batch_negatives = true` and `false`; empty: it does not use
            negatives.
        several_positives: whether it uses `batch.more_positives`, for `group_positives = true`.
        guided: whether it uses `batch.guide`, for a `[guide]`.
        can_ring: whether `ring_loss` exists, for `train.documents = "ring"`.
        statistics: the columns of metrics.jsonl that it reports.
        Settings: the class of its settings; those of a registered objective are in `[loss.objectives.NAME]`.

    Args:
        loss: the section `loss` of the configuration.
        parameters: trainable parameters of the loss, shared by the objectives of a run.
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]] = ()
    model: ClassVar[str] = "embedding"
    columns: ClassVar[tuple[str, ...]] = ()
    positive_pairs: ClassVar[bool] = True
    with_in_batch_negatives: ClassVar[Mapping[bool, str]] = {}
    several_positives: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    can_ring: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ()
    Settings: ClassVar[type[Section]] = Section

    def __init__(self, loss: "LossSection", parameters: LossParameters | None = None):
        if not isinstance(loss, Section):
            raise TypeError(f"[Objective] loss must be the loss section of a TrainConfig, got {type(loss).__name__}")
        if parameters is not None and not isinstance(parameters, LossParameters):
            raise TypeError(f"[Objective] parameters must be LossParameters, got {type(parameters).__name__}")
        own = isinstance(loss, self.Settings)
        self.settings: Any = loss if own else self.Settings(**(loss.objectives or {}).get(self.name, {}))
        self.section = loss
        self.parameters = parameters or LossParameters(loss)

    @classmethod
    def chosen(cls, loss: "LossSection") -> str:
        """The name of the objective that the settings select: this one, or another that a setting replaces it with."""
        return cls.name

    @classmethod
    def missing(cls, example: Example) -> str | None:
        """What an example lacks, as the end of a sentence ("has no negatives, which ..."), or None."""
        return None

    @classmethod
    def missing_in(cls, examples: Sequence[Example]) -> str | None:
        """What a dataset lacks as a whole, or None."""
        return None

    @classmethod
    def may_miss(cls, summary: Summary) -> bool:
        """Whether shards with these counts may hold a row for which `missing` returns a text.

        If False, they are not read for `check`.
        """
        return True

    @classmethod
    def check(cls, dataset: str, examples: Sequence[Example]) -> None:
        """Raise a DataError that names the dataset and the first incomplete row."""
        if isinstance(examples, Shards) and not cls.may_miss(examples.summary):
            return
        for number, example in enumerate(examples, start=1):
            if (missing := cls.missing(example)) is not None:
                raise DataError(f"dataset {dataset!r}: example {number} {missing}")
        if (missing := cls.missing_in(examples)) is not None:
            raise DataError(f"dataset {dataset!r}: {missing}")

    @classmethod
    def build_batch(cls, examples: Sequence[Example], model: TextEncoder) -> TrainingBatch:
        """Build the batch of a step: its texts, and which documents belong to which query."""
        return build_batch(examples, model.tokenizer)

    def can_learn(self, batch_size: int, negatives: int, example: Example) -> bool:
        """Whether the loss of a batch depends on the model.

        It gets the largest number of negatives of a row, and one row of the dataset.
        """
        return True

    def loss(self, batch: TrainingBatch, queries_BE: Tensor, documents_ME: Tensor, rows: slice) -> LossPart:
        """This rank's part of the loss, given the unit vectors of all queries and documents of the batch.

        Args:
            batch: `positive` and `candidates` say which documents belong to a query, `examples` are the rows.
            queries_BE: the vectors of all queries of the batch.
            documents_ME: the vectors of all documents of the batch; equal texts are one document.
            rows: this rank's queries, possibly none. Usually the part is the sum of their losses, divided by the number
                of all queries.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def ring_loss(self, ring: Ring, own_SE: Tensor) -> LossPart:
        """`loss` without gathering: for the queries that this rank has encoded, given the vectors of its own texts."""
        raise NotImplementedError(f"{type(self).__name__} cannot run around a ring")

    def stats(self, totals: Tensor, num_queries: int) -> dict[str, float]:
        """The statistics of a batch of `num_queries`, given the totals of all ranks: their means over the queries."""
        return {name: total / max(num_queries, 1) for name, total in zip(self.statistics, totals.tolist(), strict=True)}

    @property
    def temperature(self) -> float | Tensor:
        """The configured temperature, or the learned one."""
        learned = getattr(self.parameters, "log_temperature", None)
        return self.section.temperature if learned is None else learned.exp()

    def over_prefixes(self, part: Callable[..., LossPart], *vectors: Tensor) -> LossPart:
        """Compute `part` for the vectors; with Matryoshka dimensions, the weighted sum over the normalized prefixes.

        Args:
            part: computes the part from vectors of any dimension.
            vectors: [n, E] each.

        Returns:
            The loss of all prefixes, and the totals of the longest one.
        """
        dims, weights = self.section.matryoshka, self.section.matryoshka_weights
        if dims is None:
            return part(*vectors)
        parts: list[LossPart] = []

        def loss(*prefixes: Tensor) -> Tensor:
            parts.append(part(*prefixes))
            return parts[-1].loss

        total = over_prefixes(loss, *prefixes(dims, weights, vectors[0].shape[1]), *vectors)
        return LossPart(total, parts[-1].totals)


def zero_of(queries_BE: Tensor, documents_ME: Tensor) -> Tensor:
    """A loss of 0 that depends on the vectors, so that a rank without queries takes part in the backward pass."""
    return 0 * (queries_BE.sum() + documents_ME.sum())


def number(temperature: float | Tensor) -> float:
    """The temperature as a number, without a gradient."""
    return float(temperature.detach()) if isinstance(temperature, Tensor) else temperature


def positive_totals(batch: TrainingBatch, queries_BE: Tensor, documents_ME: Tensor, rows: slice) -> Tensor:
    """The sum of the cosines of this rank's queries with their positives, float64 [1]."""
    positives_BE = documents_ME[to_device(batch.positive, documents_ME.device)]
    with torch.no_grad():
        return (queries_BE[rows] * positives_BE[rows]).sum().double().reshape(1)
