"""A step in which a language model judges whether suspected hard negatives are relevant."""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, Field

from pyqemb.curation.ledger import Ledger
from pyqemb.curation.mining import embed_documents, embed_queries
from pyqemb.curation.spool import windows, work_folder
from pyqemb.curation.steps import Instruction, Step, encoder, model_field
from pyqemb.data.example import Example
from pyqemb.llm import Asker, Endpoint, MalformedAnswerError, Request, Store, parse, run_in_order
from pyqemb.llm.prompt import prompt

_WINDOW = 512  # examples judged together


class Judgement(BaseModel):  # noqa: D101  a docstring would become part of the schema that the model is sent
    relevant: bool


class Relabel(Step):
    """Ask a language model which negatives are relevant, and correct those examples.

    With a `model`, only negatives whose score is at least `suspect` times that of the positive are judged. A negative
    without a well-formed answer is left as it is. Answers are stored in the output folder, so a second run asks only
    for new ones.

    Source: RLHN (arXiv 2505.16967), which found promoting better than dropping.
    """

    kind: Literal["relabel"] = "relabel"
    endpoint: Endpoint
    model: Any = model_field("Embedding model that selects the negatives to judge (default: all are judged).", None)
    suspect: float = Field(
        0.9,
        description="A negative is judged if its score is at least this times that of the positive.",
        examples=[0.95],
    )
    action: Literal["promote", "remove", "drop"] = Field(
        "promote",
        description="What happens with a relevant negative. `promote` makes it the positive of one more example, "
        "`remove` takes it out of the negatives, `drop` drops the example.",
        examples=["remove"],
    )
    attempts: int = Field(2, ge=1, description="Requests per negative until the answer is well formed.", examples=[3])
    instruction: Instruction = None

    def run(self, examples: Iterable[Example], ledger: Ledger) -> Iterator[Example]:
        """Yield the examples after the language model has judged their suspected negatives."""
        ledger.notes.update({"judged": 0, "relevant": 0, "malformed": 0})
        loop = asyncio.new_event_loop()
        with work_folder(ledger.work) as temporary:
            store = Store((ledger.folder or temporary) / "relabel.sqlite")
            ask = Asker(self.endpoint, store)
            try:
                for window in windows(examples, _WINDOW):
                    found = loop.run_until_complete(self._judge(ask, window, self._suspects(window), ledger))
                    for example, relevant in zip(window, found, strict=True):
                        yield from self._apply(example, relevant, ledger)
            finally:
                if pending := asyncio.all_tasks(loop):
                    for task in pending:
                        task.cancel()
                    loop.run_until_complete(asyncio.wait(pending))
                loop.run_until_complete(ask.close())
                loop.close()
                store.close()

    def _suspects(self, window: list[Example]) -> list[list[str]]:
        if self.model is None:
            return [list(example.negatives) for example in window]
        model = encoder(self.model)
        rows, queries = embed_queries(model, window, self.instruction)
        texts = list(dict.fromkeys(text for e in window for text in (e.positive, *e.negatives)))
        place, vectors = {text: row for row, text in enumerate(texts)}, embed_documents(model, texts)
        suspects = []
        for example, row in zip(window, rows, strict=True):
            scores = vectors[[place[text] for text in (example.positive, *example.negatives)]] @ queries[row]
            suspects.append(
                [text for text, x in zip(example.negatives, scores[1:], strict=True) if x >= self.suspect * scores[0]]
            )
        return suspects

    async def _judge(
        self, ask: Asker, window: list[Example], suspects: list[list[str]], ledger: Ledger
    ) -> list[set[str]]:
        found: list[set[str]] = [set() for _ in window]
        pairs = [(row, text) for row, texts in enumerate(suspects) for text in texts]

        async def one(pair: tuple[int, str]) -> bool:
            return await self._relevant(ask, window[pair[0]], pair[1], ledger)

        async for (row, text), relevant in run_in_order(pairs, one, 4 * self.endpoint.concurrency):
            ledger.notes["judged"] += 1
            if relevant:
                ledger.notes["relevant"] += 1
                found[row].add(text)
        return found

    async def _relevant(self, ask: Asker, example: Example, passage: str, ledger: Ledger) -> bool:
        fields = {"query": example.query, "positive": example.positive, "passage": passage}
        messages = prompt("pyqemb.curation", "relabel", fields)
        for attempt in range(self.attempts):
            request = Request(messages, attempt, Judgement.model_json_schema())
            try:
                return parse(await ask(request), Judgement).relevant
            except MalformedAnswerError:
                ledger.notes["malformed"] += 1
        return False

    def _apply(self, example: Example, relevant: set[str], ledger: Ledger) -> Iterator[Example]:
        if not relevant:
            yield ledger.keep(example)
            return
        if self.action == "drop":
            ledger.drop(example, "a negative is relevant")
            return
        # A teacher's scores belong to the original negatives.
        left = replace(example, negatives=tuple(text for text in example.negatives if text not in relevant), scores=())
        yield ledger.keep(left)
        if self.action == "promote":
            for text in dict.fromkeys(text for text in example.negatives if text in relevant):
                yield ledger.keep(replace(left, positive=text, positive_embedding=()))
