"""InfoNCE over the groups of a preset; classification is InfoNCE over the query's own negatives."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from pyqemb import ops
from pyqemb.data.batch import to_device
from pyqemb.data.example import Example
from pyqemb.data.loader import TrainingBatch, build_batch
from pyqemb.data.settings import wrong_value
from pyqemb.data.shards import Summary
from pyqemb.model.protocols import TextEncoder
from pyqemb.ops.groups import GROUPS, PRESETS, WITHOUT_DOCUMENT, Options
from pyqemb.ops.info_nce import Stats
from pyqemb.training.objectives.base import EmbeddingSection, LossPart, Objective, number
from pyqemb.training.parallel.ring import Ring
from pyqemb.training.section import OneOf, Section

if TYPE_CHECKING:
    from pyqemb.training.config import LossSection

_IN_BATCH = {True: "info_nce", False: "classification"}


class GroupSection(Section):
    """How a group of candidates takes part in InfoNCE. docs/concepts/info-nce.md explains the groups."""

    mask: Literal["own", "query_document", False] = Field(
        "own",
        description="Score that is compared with the limit of false negatives. `own`: the candidate's; "
        "`query_document`: for the groups of document pairs, that of the query and the other document; false: no "
        "candidate of the group is masked.",
        examples=["own"],
    )
    margin: float | None = Field(
        None,
        description="Margin of the limit (default: loss.margin). A candidate above the positive's score plus the "
        "margin is masked as a false negative.",
        examples=[-0.05],
    )
    relative: bool = Field(
        False, description="Multiply the margin by the absolute value of the positive's score.", examples=[True]
    )
    hardness: float = Field(
        0.0,
        description="Add this times the score to the logit, so that hard candidates count more. The added term has no "
        "gradient.",
        examples=[5.0],
    )


class InfoNCESection(EmbeddingSection):
    """Settings of InfoNCE: pyqemb.ops.info_nce."""

    preset: Annotated[str, OneOf(tuple(PRESETS))] = Field(
        "qwen3",
        description="Published version of InfoNCE, which chooses the groups of candidates. docs/concepts/info-nce.md "
        "explains them.",
        examples=["mnrl"],
    )
    groups: dict[Annotated[str, OneOf(GROUPS)], bool | GroupSection] = Field(
        {},
        description="Changes to the preset, by group of candidates. false turns a group off, true turns it on, and a "
        "table sets its mask.",
        examples=[{"query_query": False, "batch_hard": {"margin": -0.05}}],
    )
    softmax: Literal["joint", "split"] = Field(
        "joint",
        description="One softmax over all groups (`joint`) or one for each kind of score (`split`).",
        examples=["split"],
    )
    focal: float = Field(
        0.0, ge=0, description="Focal exponent; above 0, queries with a low loss count less.", examples=[0.5]
    )
    tau_plus: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Debiased loss: the probability that a text of the batch is another positive of the query. That "
        "share is subtracted from the negatives. `classification` does not use it.",
        examples=[0.001],
    )
    margin: float | None = Field(
        0.1,
        description="A negative that scores above the positive plus this margin is masked as a false negative. null "
        "turns the mask off.",
        examples=[0.05],
    )

    @model_validator(mode="after")
    def _has_unlabeled_candidates(self) -> "InfoNCESection":
        if self.tau_plus and self.preset == "classification":
            raise wrong_value(
                "the negatives of preset 'classification' are wrong labels, which need no debiasing; expected 0",
                "tau_plus", self.tau_plus,
            )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _has_groups_of_info_nce(self) -> "InfoNCESection":
        for name, group in self.groups.items():
            if isinstance(group, bool):
                continue
            if group.mask == "query_document" and name in WITHOUT_DOCUMENT:
                raise wrong_value(
                    "this group has no score of a query and a document; expected 'own' or false", f"groups.{name}.mask",
                    group.mask,
                )  # fmt: skip
            if self.learn_temperature and group.hardness < 0:
                raise wrong_value(
                    "must exceed -1 / temperature, whatever temperature is learned; expected at least 0 with "
                    "loss.learn_temperature", f"groups.{name}.hardness", group.hardness,
                )  # fmt: skip
            if group.hardness <= -1 / self.temperature:
                raise wrong_value(
                    f"expected more than -1 / loss.temperature, {-1 / self.temperature:g}; logits would fall as scores "
                    "rise", f"groups.{name}.hardness", group.hardness,
                )  # fmt: skip
        return self


class InfoNCE(Objective):
    """Queries against their positive, their hard negatives and, depending on the preset, other texts of the batch."""

    name = "info_nce"
    columns = ("negatives",)
    with_in_batch_negatives: ClassVar[Mapping[bool, str]] = _IN_BATCH
    several_positives = True
    guided = True
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
        """The options of ops.info_nce from the configuration."""
        settings = self.settings
        return dict(
            preset=self.preset,
            groups={name: _group(value) for name, value in settings.groups.items()},
            margin=settings.margin,
            softmax=settings.softmax,
            focal=settings.focal,
            tau_plus=settings.tau_plus,
        )

    def can_learn(self, batch_size: int, negatives: int, example: Example) -> bool:
        preset, changes = PRESETS[self.preset], self.settings.groups
        on = {name for name in GROUPS if changes.get(name, name in preset)}
        in_batch = {"batch_positive", "query_query", "doc_positive", "doc_query"} | (
            {"batch_hard", "doc_hard"} if negatives else set()
        )
        return bool(negatives and on & {"own_hard", "doc_own"}) or bool(batch_size > 1 and on & in_batch)

    def loss(self, batch: TrainingBatch, queries_BE: Tensor, documents_ME: Tensor, rows: slice) -> LossPart:
        positive, owner, ids = (
            to_device(x, queries_BE.device) for x in (batch.positive, batch.owner, batch.document_text)
        )
        guide: dict[str, Any] = {}
        if batch.guide is not None:
            vectors_SF = batch.guide.vectors_SF
            sides = [vectors_SF[to_device(x, vectors_SF.device)] for x in (batch.query_text, batch.document_text)]
            guide = dict(guide=sides, guide_margin=batch.guide.margin, guide_relative=batch.guide.relative)
        loss, stats = ops.info_nce(
            queries_BE, documents_ME, positive, owner=owner, document_ids=ids,
            more_positives=batch.more_positives if len(batch.more_positives) else None, temperature=self.temperature,
            matryoshka=self.section.matryoshka, matryoshka_weights=self.section.matryoshka_weights,
            rows=(rows.start, rows.stop - rows.start), return_stats=True, **guide, **self.options(),
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
    """Queries against their positive and their own negatives (wrong labels); labels of other items may be correct."""

    name = "classification"
    tasks = ("classification",)
    guided = False  # the negatives are labels that are known to be wrong

    @classmethod
    def missing(cls, example: Example) -> str | None:
        return None if example.negatives else "has no negatives, which classification requires"

    @classmethod
    def may_miss(cls, summary: Summary) -> bool:
        return summary.negatives < summary.rows

    @classmethod
    def build_batch(cls, examples: Sequence[Example], model: TextEncoder) -> TrainingBatch:
        return build_batch(examples, model.tokenizer, own_rows=True)

    @property
    def preset(self) -> str:
        return "classification"

    def options(self) -> dict[str, Any]:
        return {**super().options(), "tau_plus": 0.0}  # the negatives are labels that are known to be wrong


def _group(value: bool | GroupSection) -> bool | ops.Group:
    if isinstance(value, bool):
        return value
    return ops.Group(value.mask or None, value.margin, value.relative, value.hardness)
