"""InfoNCE over the groups of a preset; classification is InfoNCE over the query's own negatives."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pyqemb import ops
from pyqemb.data.batch import to_device
from pyqemb.data.example import Example
from pyqemb.data.loader import TrainingBatch, build_batch
from pyqemb.data.shards import Summary
from pyqemb.model.protocols import TextEncoder
from pyqemb.ops.groups import GROUPS, PRESETS, Options
from pyqemb.ops.info_nce import Stats
from pyqemb.training.objectives.base import EmbeddingSection, LossPart, Objective, number
from pyqemb.training.parallel.ring import Ring
from pyqemb.training.section import Section, one_of

if TYPE_CHECKING:
    from pyqemb.training.config import LossSection

_IN_BATCH = {True: "info_nce", False: "classification"}


class GroupSection(Section):
    """How a group of candidates takes part in InfoNCE: pyqemb.ops.Group."""

    mask: Literal["own", "query_document", False] = "own"
    margin: float | None = None
    relative: bool = False
    hardness: float = 0.0


class InfoNCESection(EmbeddingSection):
    """Settings of InfoNCE: pyqemb.ops.info_nce."""

    preset: Annotated[str, one_of(PRESETS)] = "qwen3"
    # changes to the preset; false: off
    groups: dict[Annotated[str, one_of(GROUPS)], bool | GroupSection] = Field(default_factory=dict)
    softmax: Literal["joint", "split"] = "joint"
    focal: float = Field(0.0, ge=0)
    margin: float | None = 0.1  # a negative above the positive's score plus this is taken for a false one; None: off


class InfoNCE(Objective):
    """Queries against their positive, their hard negatives and, as the preset says, those of other queries."""

    name = "info_nce"
    columns = ("negatives",)
    with_in_batch_negatives: ClassVar[Mapping[bool, str]] = _IN_BATCH
    can_ring = True
    statistics = ("positive", "negative", "masked")
    Settings = InfoNCESection

    @classmethod
    def chosen(cls, loss: "LossSection") -> str:
        return Classification.name if loss.preset == "classification" else cls.name

    @classmethod
    def may_miss(cls, summary: Summary) -> bool:
        return False

    @property
    def preset(self) -> str:
        return self.settings.preset

    def options(self) -> dict[str, Any]:
        """The options of ops.info_nce that the configuration gives."""
        settings = self.settings
        return dict(
            preset=self.preset,
            groups={name: _group(value) for name, value in settings.groups.items()},
            margin=settings.margin,
            softmax=settings.softmax,
            focal=settings.focal,
        )

    def can_learn(self, batch_size: int, negatives: int, example: Example) -> bool:
        preset, changes = PRESETS[self.preset], self.settings.groups
        on = {name for name in GROUPS if changes.get(name, name in preset)}
        in_batch = {"batch_positive", "query_query", "doc_positive"} | (
            {"batch_hard", "doc_hard"} if negatives else set()
        )
        return bool(negatives and on & {"own_hard", "doc_own"}) or bool(batch_size > 1 and on & in_batch)

    def loss(self, batch: TrainingBatch, queries_BE: Tensor, documents_ME: Tensor, rows: slice) -> LossPart:
        positive, owner, ids = (
            to_device(x, queries_BE.device) for x in (batch.positive, batch.owner, batch.document_text)
        )
        loss, stats = ops.info_nce(
            queries_BE, documents_ME, positive, owner=owner, document_ids=ids, temperature=self.temperature,
            matryoshka=self.section.matryoshka, matryoshka_weights=self.section.matryoshka_weights,
            rows=(rows.start, rows.stop - rows.start), return_stats=True, **self.options(),
        )  # fmt: skip
        return LossPart(loss, stats.totals)

    def ring_loss(self, ring: Ring, own_SE: Tensor) -> LossPart:
        tau = self.temperature
        options = Options.of(**self.options(), doc_mask=None, temperature=number(tau), scale=1 / ring.num_queries)

        def once(vectors_SE: Tensor) -> LossPart:
            return LossPart(*ring.loss(vectors_SE, options, tau if isinstance(tau, Tensor) else None))

        return self.over_prefixes(once, own_SE)

    def stats(self, totals: Tensor, num_queries: int) -> dict[str, float]:
        return dict(Stats(totals, num_queries))


class Classification(InfoNCE):
    """Queries against their positive and their own negatives, the wrong labels: other items' labels may be right."""

    name = "classification"
    tasks = ("classification",)

    @classmethod
    def missing(cls, example: Example) -> str | None:
        return None if example.negatives else "has no negatives, the only ones that classification has"

    @classmethod
    def may_miss(cls, summary: Summary) -> bool:
        return summary.negatives < summary.rows

    @classmethod
    def build_batch(cls, examples: Sequence[Example], model: TextEncoder) -> TrainingBatch:
        return build_batch(examples, model.tokenizer, own_rows=True)

    @property
    def preset(self) -> str:
        return "classification"


def _group(value: bool | GroupSection) -> bool | ops.Group:
    if isinstance(value, bool):
        return value
    return ops.Group(value.mask or None, value.margin, value.relative, value.hardness)
