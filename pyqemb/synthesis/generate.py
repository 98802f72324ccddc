"""Runs a synthesis: writes examples for passages, and stores every answer."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyqemb.data.arguments import checked
from pyqemb.data.example import Example, to_row
from pyqemb.data.files import atomic_file, locked
from pyqemb.data.machine import writing
from pyqemb.llm import Asker, MalformedAnswerError, Store, run_in_order
from pyqemb.llm.ask import Usage
from pyqemb.synthesis.config import SynthesisConfig
from pyqemb.synthesis.passages import Source, read_sources
from pyqemb.synthesis.tasks import Writer

ANSWERS, EXAMPLES, MALFORMED, REPORT = "answers.sqlite", "examples.jsonl", "malformed.jsonl", "report.json"
_AHEAD = 4  # examples started per concurrent request, so that a slow request does not block the others


@dataclass(repr=False)
class Synthesis:
    """The result of a synthesis.

    `folder` holds examples.jsonl, malformed.jsonl (reason, prompt, text), report.json and answers.sqlite (all requests
    and answers).
    """

    folder: Path
    examples: int = 0
    failed: int = 0  # examples given up
    malformed: Counter[str] = field(default_factory=Counter)  # malformed answers, by reason
    refusal: str = ""  # the text of the first refusal
    by_task: Counter[str] = field(default_factory=Counter)
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0

    def __repr__(self) -> str:
        return (
            f"Synthesis({self.examples} examples, {self.failed} given up, "
            f"{sum(self.malformed.values())} malformed answers, {self.seconds:.1f} s; results in {self.folder})"
        )

    def report(self, config: SynthesisConfig) -> dict[str, Any]:
        """Return the content of report.json: counts, tokens, cost, seconds and the configuration."""
        usage = self.usage
        return {
            "examples": self.examples, "by task": dict(self.by_task), "given up": self.failed,
            "malformed answers": dict(self.malformed.most_common()), "asked": usage.asked,
            "from the store": usage.stored, "retries": dict(usage.retries), "prompt tokens": usage.prompt_tokens,
            "completion tokens": usage.completion_tokens, "cost": round(usage.cost(config.endpoint), 6),
            "seconds": round(self.seconds, 1), "config": config.model_dump(mode="json"),
        }  # fmt: skip


@checked
def synthesize(
    config: SynthesisConfig | dict[str, Any], *, on_progress: Callable[[Synthesis], None] | None = None
) -> Synthesis:
    """Generate `per_passage` examples for each passage, in the order of the passages.

    A run after a killed one makes the same requests, and takes the answers that exist already from the store. With more
    `attempts`, only malformed answers are requested again.

    Args:
        config: the passages, the output folder, the endpoint and the tasks, as a SynthesisConfig or a dict of its
            fields.
        on_progress: called with the result so far after each example (default: not called).

    Returns:
        The output folder, and the counts of examples, answers and tokens.

    Raises:
        ConfigError: a setting is invalid, another process writes to the folder, or the server rejects the key, the
            model or the request.
        DataError: passages or personas cannot be read, or the server does not answer.
        MachineError: the disk is full, or another error of the machine.

    All answers are stored, also after an error or a KeyboardInterrupt.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("passages.txt").write_text("The bridge was built in 1894 and is 244 meters long, with two towers.")
        >>> endpoint = {"model": "Qwen/Qwen3-32B", "base_url": "http://localhost:8000/v1"}
        >>> pyqemb.synthesize({"passages": "passages.txt", "out": "synthetic", "endpoint": endpoint})
        Synthesis(1 examples, 0 given up, 0 malformed answers, ... s; results in synthetic)
    """
    config = config if isinstance(config, SynthesisConfig) else SynthesisConfig(**config)
    with writing(config.out), locked(config.out, "synthesis"):
        return asyncio.run(_synthesize(config, on_progress))


async def _synthesize(config: SynthesisConfig, on_progress: Callable[[Synthesis], None] | None) -> Synthesis:
    start = time.monotonic()
    sources = read_sources(config)
    first = next(sources)  # invalid input is reported before anything is written or requested
    store = Store(config.out / ANSWERS)
    ask = Asker(config.endpoint, store)
    result = Synthesis(config.out, usage=ask.usage)
    try:
        with atomic_file(config.out / EXAMPLES) as kept, atomic_file(config.out / MALFORMED) as failed:
            with (
                kept.open("w", encoding="utf-8", errors="replace") as file,
                failed.open("w", encoding="utf-8", errors="replace") as bad,
            ):

                def on_malformed(prompt: str, error: MalformedAnswerError) -> None:
                    result.malformed[error.reason] += 1
                    if error.reason == "refused":
                        result.refusal = result.refusal or error.text
                    row = {"reason": error.reason, "prompt": prompt, "key": error.key, "text": error.text}
                    bad.write(json.dumps(row, ensure_ascii=False) + "\n")

                writer = Writer(config, ask, on_malformed)

                async def write(item: tuple[Source, int]) -> Example | None:
                    try:
                        return await writer.write(*item)
                    except MalformedAnswerError:
                        return None

                window = max(_AHEAD * config.endpoint.concurrency, 1)
                async for _, example in run_in_order(_items(first, sources, config.per_passage), write, window):
                    if example is None:
                        result.failed += 1
                    else:
                        result.examples += 1
                        result.by_task[example.task or ""] += 1
                        file.write(json.dumps(to_row(example), ensure_ascii=False) + "\n")
                    result.seconds = time.monotonic() - start
                    if on_progress is not None:
                        on_progress(result)
            with atomic_file(config.out / REPORT) as path:
                path.write_text(
                    json.dumps(result.report(config), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
                )
    finally:
        await ask.close()
        store.close()
    return result


def _items(first: Source, others: Iterator[Source], each: int) -> Iterator[tuple[Source, int]]:
    for number in range(each):
        yield first, number
    for source in others:
        for number in range(each):
            yield source, number
