"""The objective of one batch: its structure and the configuration make a function of the vectors alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyqemb import ops
from pyqemb.data.batch import to_device
from pyqemb.data.example import Example
from pyqemb.data.loader import TrainingBatch
from pyqemb.data.shards import Shards, Summary
from pyqemb.errors import ConfigError, DataError
from pyqemb.ops.groups import Options
from pyqemb.ops.infonce import Stats
from pyqemb.ops.prefixes import over_prefixes, prefixes
from pyqemb.training.config import GroupSection, LossSection
from pyqemb.training.ring import Ring

# What a task is trained with, by the `task` of its examples; any other: InfoNCE. The recipe's retrieval and bitext are that too.
TASKS: Mapping[str, str] = {"sts": "cosent", "classification": "classification", "distillation": "distillation"}


def objective_of(task: str | None, config: LossSection) -> str:
    """The objective of a task: as the configuration says, then TASKS, then InfoNCE with the configured preset."""
    name = {**TASKS, **config.tasks}.get(task or "", "info_nce")
    return "classification" if name == "info_nce" and config.preset == "classification" else name


def with_in_batch_negatives(name: str, objective: str, wanted: bool | None) -> str:
    """The objective of a set that asks for in-batch negatives, or for none. ConfigError where it has no negatives at all."""
    if wanted is None:
        return objective
    if objective not in ("info_nce", "classification"):
        raise ConfigError(f"data: in_batch_negatives: set {name!r} is trained by {objective}, which knows no negatives")
    return "info_nce" if wanted else "classification"


def check_examples(name: str, examples: Sequence[Example], objective: str) -> None:
    """DataError naming the set and what an example lacks for its objective."""
    if isinstance(examples, Shards) and not _lacks(examples.summary, objective):
        return
    for number, example in enumerate(examples, start=1):
        if objective == "cosent" and example.score is None:
            raise DataError(f"set {name!r}: example {number} has no score, which CoSENT compares")
        if objective == "classification" and not example.negatives:
            raise DataError(f"set {name!r}: example {number} has no negatives, the only ones that classification has")
        if objective == "distillation" and not (example.scores or example.query_embedding):
            raise DataError(f"set {name!r}: example {number} has neither scores nor query_embedding of a teacher")
    if objective == "rerank" and not any(example.negatives for example in examples):
        raise DataError(f"set {name!r}: no example has negatives: every answer would be yes")
    if objective == "distillation" and len({bool(example.scores) for example in examples}) > 1:
        raise DataError(f"set {name!r}: some examples have a teacher's scores and some not; they cannot share a batch")


def _lacks(summary: Summary, objective: str) -> bool:
    """Whether some row lacks what the objective needs."""
    rows = summary.rows
    if objective == "cosent":
        return summary.score < rows
    if objective == "classification":
        return summary.negatives < rows
    if objective == "rerank":
        return summary.negatives == 0
    return (
        objective == "distillation" and summary.scores < rows and (summary.scores > 0 or summary.query_embedding < rows)
    )


class LossParameters(torch.nn.Module):
    """What the loss learns itself: nothing, or the logarithm of its temperature."""

    def __init__(self, config: LossSection):
        super().__init__()
        if config.learn_temperature:
            self.log_temperature = torch.nn.Parameter(torch.tensor(config.temperature).log())


class BatchLoss:
    """The loss of a batch, called with queries_BE and documents_ME.

    `totals` holds the sums of ops.info_nce's statistics over the anchors of the last call, float64 [5]; those of processes add up.
    """

    def __init__(
        self,
        batch: TrainingBatch,
        config: LossSection,
        objective: str = "info_nce",
        parameters: LossParameters | None = None,
        rows: tuple[int, int] | None = None,
    ):
        self.batch, self.config, self.objective = batch, config, objective
        self.parameters = parameters or LossParameters(config)
        self.rows = (0, len(batch.positive)) if rows is None else rows
        self.totals = torch.zeros(5, dtype=torch.float64)

    def __call__(self, queries_BE: Tensor, documents_ME: Tensor) -> Tensor:
        """This process's part of the mean over all queries."""
        if self.objective == "cosent":
            return self._over_prefixes(self._cosent, queries_BE, documents_ME)
        if self.objective == "distillation":
            return self._over_prefixes(self._distillation, queries_BE, documents_ME)
        if self.objective == "rerank":
            return self._yes_no(documents_ME)
        return self._info_nce(queries_BE, documents_ME)

    def around(self, ring: Ring, own_SE: Tensor) -> Tensor:
        """The same for InfoNCE without gathering: of this process's queries, given the vectors of its own texts."""
        tau = self.temperature
        options = Options.of(
            **self.info_nce_options(), doc_mask=None, temperature=_number(tau), scale=1 / ring.num_queries
        )

        def once(vectors_SE: Tensor) -> Tensor:
            loss, self.totals = ring.loss(vectors_SE, options, tau if isinstance(tau, Tensor) else None)
            return loss

        return self._over_prefixes(once, own_SE)

    @property
    def temperature(self) -> float | Tensor:
        learned = getattr(self.parameters, "log_temperature", None)
        return self.config.temperature if learned is None else learned.exp()

    def info_nce_options(self) -> dict[str, Any]:
        """The options of ops.info_nce that the configuration gives."""
        config = self.config
        return dict(
            preset="classification" if self.objective == "classification" else config.preset,
            groups={str(name): _group(value) for name, value in config.groups.items()},
            margin=config.margin,
            softmax=config.softmax,
            focal=config.focal,
        )

    def _info_nce(self, queries_BE: Tensor, documents_ME: Tensor) -> Tensor:
        batch, config = self.batch, self.config
        positive, owner, ids = (
            to_device(x, queries_BE.device) for x in (batch.positive, batch.owner, batch.document_text)
        )
        loss, stats = ops.info_nce(
            queries_BE, documents_ME, positive, owner=owner, document_ids=ids, temperature=self.temperature,
            matryoshka=config.matryoshka, matryoshka_weights=config.matryoshka_weights, rows=self.rows, return_stats=True,
            **self.info_nce_options(),
        )  # fmt: skip
        self.totals = stats.totals
        return loss

    def _over_prefixes(self, loss: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
        """The loss, or its weighted sum over the Matryoshka prefixes."""
        config = self.config
        if config.matryoshka is None:
            return loss(*vectors)
        return over_prefixes(
            loss, *prefixes(config.matryoshka, config.matryoshka_weights, vectors[0].shape[1]), *vectors
        )

    def _cosent(self, queries_BE: Tensor, documents_ME: Tensor) -> Tensor:
        """One loss of all pairs: the first process has it, the others nothing."""
        positives_BE = documents_ME[to_device(self.batch.positive, documents_ME.device)]
        self._count(queries_BE, positives_BE)
        if self.rows[0] > 0 or self.rows[1] == 0:
            return 0 * (queries_BE.sum() + documents_ME.sum())
        scores_B = torch.tensor([example.score for example in self.batch.examples], dtype=torch.float64)
        return ops.cosent(queries_BE, positives_BE, to_device(scores_B, queries_BE.device), _number(self.temperature))

    def _distillation(self, queries_BE: Tensor, documents_ME: Tensor) -> Tensor:
        batch, rows = self.batch, slice(self.rows[0], sum(self.rows))
        examples, device = batch.examples[rows], queries_BE.device
        self._count(queries_BE, documents_ME[to_device(batch.positive, device)])
        if not examples:
            return 0 * (queries_BE.sum() + documents_ME.sum())
        share = 1 / len(batch.examples)
        candidates_BK = to_device(batch.candidates[rows], device)
        if examples[0].scores:
            teacher_BK = torch.zeros(candidates_BK.shape, dtype=torch.float64)
            for row, example in enumerate(examples):
                teacher_BK[row, : len(example.scores)] = torch.tensor(example.scores, dtype=torch.float64)
            return share * ops.distill_scores(
                queries_BE[rows], documents_ME, candidates_BK, to_device(teacher_BK, device), _number(self.temperature),
                self.config.teacher_temperature, reduction="sum",
            )  # fmt: skip
        sides = [(queries_BE[rows], [e.query_embedding for e in examples])]
        if examples[0].positive_embedding:
            sides.append((documents_ME[candidates_BK[:, 0]], [e.positive_embedding for e in examples]))
        losses = [
            ops.distill_embeddings(student, to_device(torch.tensor(vectors), device), reduction="sum")
            for student, vectors in sides
        ]
        return share * torch.stack(losses).mean()

    def _yes_no(self, logits_M2: Tensor) -> Tensor:
        """The mean over all pairs; of this process those of its queries."""
        batch, device = self.batch, logits_M2.device
        first, count = self.rows
        mine = (batch.owner >= first) & (batch.owner < first + count)
        labels_M = torch.zeros(len(batch.owner), dtype=torch.int64)
        labels_M[batch.positive] = 1
        positive_B2 = logits_M2.detach()[to_device(batch.positive[first : first + count], device)].double()
        probability = torch.sigmoid(positive_B2[:, 0] - positive_B2[:, 1]).sum()
        self.totals = torch.stack([probability, *probability.new_zeros(4)])
        if not bool(mine.any()):
            return 0 * logits_M2.sum()
        own = to_device(mine, device)
        return ops.yes_no(logits_M2[own], to_device(labels_M, device)[own], reduction="sum") / len(labels_M)

    def _count(self, queries_BE: Tensor, positives_BE: Tensor) -> None:
        rows = slice(self.rows[0], sum(self.rows))
        with torch.no_grad():
            positive = (queries_BE[rows] * positives_BE[rows]).sum().double()
        self.totals = torch.stack([positive, *positive.new_zeros(4)])


def stats_of(totals: Tensor, num_queries: int) -> dict[str, float]:
    """positive, negative and masked, as ops.info_nce names them."""
    return dict(Stats(totals, num_queries))


def _group(value: bool | GroupSection) -> bool | ops.Group:
    return (
        value
        if isinstance(value, bool)
        else ops.Group(value.mask or None, value.margin, value.relative, value.hardness)
    )


def _number(temperature: float | Tensor) -> float:
    return float(temperature.detach()) if isinstance(temperature, Tensor) else temperature
