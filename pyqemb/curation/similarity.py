"""A step that drops pairs whose query and positive are too dissimilar or too similar."""

from array import array
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pyqemb.curation.ledger import Ledger
from pyqemb.curation.mining import embed_documents, embed_queries
from pyqemb.curation.spool import Spool, windows, work_folder
from pyqemb.curation.steps import WINDOW, Instruction, Step, encoder, model_field
from pyqemb.data.example import Example


class Similarity(Step):
    """Keep a pair if the similarity of query and positive lies between the bounds.

    The default of 0.7 is that of the Qwen3 Embedding report (arXiv 2506.05176, section 3.3). The scale depends on the
    model: for another model, choose bounds from the histogram in the report, or use quantiles. `min_quantile = 0.2`
    drops the fifth of the pairs with the lowest similarity; all pairs are scored first.
    """

    kind: Literal["similarity"] = "similarity"
    model: Any = model_field("Embedding model that scores.")
    min_sim: float | None = Field(
        None, description="Lowest similarity that is kept (default: 0.7 if no bound is set).", examples=[0.7]
    )
    max_sim: float | None = Field(
        None, description="Highest similarity that is kept (default: no limit).", examples=[0.95]
    )
    min_quantile: float | None = Field(
        None, ge=0, le=1, description="Lowest quantile of the data that is kept (default: no limit).", examples=[0.2]
    )
    max_quantile: float | None = Field(
        None, ge=0, le=1, description="Highest quantile of the data that is kept (default: no limit).", examples=[0.99]
    )
    instruction: Instruction = None

    @model_validator(mode="before")
    @classmethod
    def _default_bound(cls, values: Any) -> Any:
        bounds = ("min_sim", "max_sim", "min_quantile", "max_quantile")
        return values if any(name in values for name in bounds) else {**values, "min_sim": 0.7}

    @model_validator(mode="after")
    def _ordered(self) -> "Similarity":
        for name in ("sim", "quantile"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{name} must not be above max_{name}, got {low} and {high}")
        return self

    def run(self, examples: Iterable[Example], ledger: Ledger) -> Iterator[Example]:
        """Yield the examples whose similarity is between the bounds, in order."""
        scored = self._scored(examples)
        if self.min_quantile is None and self.max_quantile is None:
            yield from self._judge(scored, ledger, self.min_sim, self.max_sim)
            return
        with work_folder(ledger.work) as folder:
            spool, scores = Spool(folder), array("f")
            scores.extend(score for _, score in self._scored(spool.fill(examples)))
            if not len(spool):
                return
            found = np.frombuffer(scores, dtype=np.float32)
            low, high = (
                max(
                    (x for x in (bound, None if q is None else float(np.quantile(found, q))) if x is not None),
                    key=sign, default=None,
                )
                for bound, q, sign in (
                    (self.min_sim, self.min_quantile, lambda x: x), (self.max_sim, self.max_quantile, lambda x: -x),
                )
            )  # fmt: skip
            ledger.notes.update({"min_sim": low, "max_sim": high})
            yield from self._judge(zip(spool, scores, strict=True), ledger, low, high)

    def _scored(self, examples: Iterable[Example]) -> Iterator[tuple[Example, float]]:
        model = encoder(self.model)
        for window in windows(examples, WINDOW):
            yield from zip(window, pair_scores(model, window, self.instruction).tolist(), strict=True)

    def _judge(
        self, scored: Iterable[tuple[Example, float]], ledger: Ledger, low: float | None, high: float | None
    ) -> Iterator[Example]:
        for example, score in scored:
            reason = None
            if low is not None and score < low:
                reason = f"similarity below {low:.3g}"
            elif high is not None and score > high:
                reason = f"similarity above {high:.3g}"
            if ledger.judge(example, reason, similarity=score):
                yield example
        if low is not None and sum(n for reason, n in ledger.dropped.items() if "below" in reason) > ledger.kept:
            ledger.notes["hint"] = (
                "more than half is below min_sim; what a score means depends on the model (docs/data.md)"
            )


def pair_scores(model: Any, examples: list[Example], instruction: str | None = None) -> np.ndarray:
    """The similarity of query and positive of each example, float32 [N]."""
    documents = {text: row for row, text in enumerate(dict.fromkeys(example.positive for example in examples))}
    rows, queries = embed_queries(model, examples, instruction)
    vectors = embed_documents(model, list(documents))
    return (queries[rows] * vectors[[documents[example.positive] for example in examples]]).sum(axis=1)
