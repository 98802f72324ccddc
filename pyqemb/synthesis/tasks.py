"""The requests that make an example from a passage, for each task."""

import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pyqemb.data.example import Example
from pyqemb.llm import Answer, Asker, MalformedAnswerError, Request, parse
from pyqemb.llm.prompt import prompt
from pyqemb.synthesis.config import SynthesisConfig, draw
from pyqemb.synthesis.kinds import (
    QUESTION_TYPES,
    SCORES,
    Configuration,
    Labelled,
    Passage,
    Query,
    Reply,
    Sentences,
    Translation,
)  # fmt: skip
from pyqemb.synthesis.passages import Source

R = TypeVar("R", bound=Reply)
_ANYONE = "Somebody who needs what this passage says"
_MOST_WORDS = 3  # times the requested number

OnMalformed = Callable[[str, MalformedAnswerError], None]  # (name of the prompt, error)


class Writer:
    """Writes the examples of one configuration.

    Each malformed answer is passed to `on_malformed` before the request is repeated.
    """

    def __init__(self, config: SynthesisConfig, ask: Asker, on_malformed: OnMalformed):
        self.config, self._ask, self._on_malformed = config, ask, on_malformed

    async def write(self, source: Source, number: int = 0) -> Example:
        """The `number`th example of a passage; random choices depend only on the seed, the passage and `number`.

        Raises MalformedAnswerError if an answer is still unusable after all attempts.
        """
        generator = random.Random(f"{self.config.seed} {number} {source.text}")
        task = draw(self.config.tasks, generator)
        tasks: dict[str, Callable[[Source, random.Random], Awaitable[Example]]] = {
            "retrieval": self._retrieval, "bitext": self._bitext, "sts": self._sts,
            "classification": self._classification,
        }  # fmt: skip
        return await tasks[task](source, generator)

    async def _retrieval(self, source: Source, generator: random.Random) -> Example:
        config = self.config
        language, length = draw(config.languages, generator), draw(config.lengths, generator)
        # The model chooses among kinds sampled by weight; with equal weights it gets all of them.
        offered = _offered(config.types, generator)
        levels = _offered(config.difficulties, generator)
        personas = source.personas or (_ANYONE,)
        chosen = await self._reply(
            "retrieval_configuration", Configuration, generator,
            types="\n".join(f"   - {name}: {QUESTION_TYPES[name]}" for name in offered), difficulties=", ".join(levels),
            personas="\n".join(f"- {persona}" for persona in personas), passage=source.text,
            check=lambda c: (
                _among("question_type", c.question_type, offered) or _among("difficulty", c.difficulty, levels)
            ),
        )  # fmt: skip
        written = await self._reply(
            "retrieval_generation", Query, generator,
            character=chosen.character, type=chosen.question_type, meaning=QUESTION_TYPES[chosen.question_type],
            difficulty=chosen.difficulty, length=length, language=language, of_language=_of(source),
            passage=source.text, check=lambda reply: _query_reason(reply.query, source.text, length),
        )  # fmt: skip
        negatives: list[str] = []
        for _ in range(config.negatives):
            negative = await self._reply(
                "hard_negative", Passage, generator, query=written.query, passage=source.text,
                check=lambda reply: "passage is the positive" if _same(reply.passage, source.text) else None,
            )  # fmt: skip
            if negative.passage not in negatives:
                negatives.append(negative.passage)
        return Example(written.query, source.text, tuple(negatives), config.instruction, "retrieval")

    async def _bitext(self, source: Source, generator: random.Random) -> Example:
        languages = {name: share for name, share in self.config.languages.items() if name != source.language}
        if not any(languages.values()):
            raise MalformedAnswerError("no other language to translate into")
        reply = await self._reply(
            "bitext", Translation, generator, language=draw(languages, generator), of_language=_of(source),
            passage=source.text,
            check=lambda reply: "translation is the text" if _same(reply.translation, source.text) else None,
        )  # fmt: skip
        return Example(source.text, reply.translation, instruction="Retrieve parallel sentences", task="bitext")

    async def _sts(self, source: Source, generator: random.Random) -> Example:
        config = self.config
        score = draw(config.scores, generator)
        reply = await self._reply(
            "sts", Sentences, generator, language=draw(config.languages, generator),
            length=draw(config.lengths, generator), score=score, meaning=SCORES[score], passage=source.text,
            check=lambda reply: "sentences are the same" if _same(reply.sentence1, reply.sentence2) else None,
        )  # fmt: skip
        instruction = "Retrieve semantically similar text"
        return Example(reply.sentence1, reply.sentence2, (), instruction, "sts", float(score))

    async def _classification(self, source: Source, generator: random.Random) -> Example:
        config = self.config
        reply = await self._reply(
            "classification", Labelled, generator, language=draw(config.languages, generator),
            length=draw(config.lengths, generator), count=config.wrong_labels,
            difficulty=draw(config.difficulties, generator), passage=source.text,
            check=_label_reason,
        )  # fmt: skip
        wrong = tuple(dict.fromkeys(reply.wrong_labels))[: config.wrong_labels]
        return Example(reply.text, reply.label, wrong, reply.task, "classification")

    async def _reply(
        self, name: str, kind: type[R], generator: random.Random, check: Callable[[R], str | None], **fields: Any
    ) -> R:
        """The checked answer to a prompt. `check` returns a reason to reject it."""
        messages = prompt("pyqemb.synthesis", name, fields)
        seed = generator.randrange(2**31)
        for attempt in range(self.config.attempts):
            request = Request(messages, seed + attempt, kind.schema_of_answer())
            try:
                answer: Answer = await self._ask(request)
                reply = parse(answer, kind)
                if reason := check(reply):
                    raise MalformedAnswerError(reason, answer.text)
                return reply
            except MalformedAnswerError as error:
                last = MalformedAnswerError(error.reason, error.text, request.key(self._ask.endpoint))
                self._on_malformed(name, last)
        raise last


def _offered(shares: dict[str, float], generator: random.Random) -> tuple[str, ...]:
    weights = {name: share for name, share in shares.items() if share > 0}
    return tuple(weights) if len(set(weights.values())) == 1 else (draw(weights, generator),)


def _among(field: str, value: str, offered: tuple[str, ...]) -> str | None:
    return None if value in offered else f"{field} not one of those offered"


def _of(source: Source) -> str:
    return f" (in {source.language})" if source.language else ""


def _same(first: str, second: str) -> bool:
    return first.split() == second.split()


def _query_reason(query: str, passage: str, length: str) -> str | None:
    longest = max((int(word) for word in length.split() if word.isdigit()), default=30)
    if len(query.split()) > _MOST_WORDS * longest:
        return "query too long"
    if len(query.split()) > 5 and " ".join(query.split()) in " ".join(passage.split()):
        return "query copies the passage"
    return None


def _label_reason(reply: Labelled) -> str | None:
    wrong = {label.casefold() for label in reply.wrong_labels}
    if not wrong:
        return "no wrong labels"
    return "label among the wrong ones" if reply.label.casefold() in wrong else None
