"""Runs the steps over a stream of examples and writes the results."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pyqemb.curation.config import CurateConfig
from pyqemb.curation.ledger import Ledger
from pyqemb.curation.report import write_report
from pyqemb.curation.spool import run_folder
from pyqemb.data.arguments import checked
from pyqemb.data.example import Example, check_source, read_examples, to_row
from pyqemb.data.files import atomic_file
from pyqemb.data.machine import writing

Progress = Callable[[list[Ledger]], None]
_EVERY = 256  # examples read between two calls of `on_progress`


@dataclass(frozen=True, repr=False)
class Curated:
    """The result of `curate`.

    Attributes:
        folder: the folder with kept.jsonl, dropped.jsonl (each row with its step and reason), report.json and
            report.html.
        seen: the number of examples read.
        kept: the number of examples that passed all steps.
        ledgers: the statistics of each step, in order.
    """

    folder: Path
    seen: int
    kept: int
    ledgers: list[Ledger]

    def __repr__(self) -> str:
        dropped = "".join(f", {sum(ledger.dropped.values())} dropped by {ledger.name}" for ledger in self.ledgers)
        return f"Curated({self.kept} of {self.seen} examples kept{dropped}; results in {self.folder})"

    @property
    def dropped(self) -> dict[str, dict[str, int]]:
        """The number of examples that each step dropped: {step: {reason: count}}."""
        return {ledger.name: dict(ledger.dropped) for ledger in self.ledgers}


@checked
def curate(config: CurateConfig | dict[str, Any], *, on_progress: Progress | None = None) -> Curated:
    """Pass every example through the steps in order. Examples are streamed, so memory does not grow with their texts.

    The results are written when all steps are done; those of an earlier run are kept until then.

    Args:
        config: the inputs (paths, or data in memory, as for `read_examples`), the output folder and the steps, as a
            CurateConfig or a dict of its fields.
        on_progress: called with the ledgers of all steps after every 256 examples and at the end (default: not called).

    Returns:
        The output folder, the counts, and the ledger of each step.

    Raises:
        ConfigError: a setting is invalid, a model or package is missing, or another process is curating to `out`.
        DataError: an input cannot be read or is empty.
        MachineError: the disk is full, or another error of the machine.

    Example:
        >>> rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in (1, 2, 2)]
        >>> pyqemb.curate({"input": [rows], "out": "curated", "step": [{"kind": "exact"}]})
        Curated(2 of 3 examples kept, 1 dropped by exact; results in curated)
    """
    config = config if isinstance(config, CurateConfig) else CurateConfig(**config)
    out = config.out
    for source in config.input:
        check_source(source, "input")
    with (
        writing(out),
        run_folder(out) as work,
        atomic_file(out / "kept.jsonl") as kept,
        atomic_file(out / "dropped.jsonl") as dropped,
    ):
        with dropped.open("wb") as losses, kept.open("wb") as file:
            source, ledgers = Ledger("input"), _ledgers(config, losses, work)
            examples: Iterator[Example] = _read(config, source, ledgers, on_progress)
            for step, ledger in zip(config.step, ledgers, strict=True):
                examples = step.run(examples, ledger)
            for example in examples:
                _write(file, to_row(example))
        result = Curated(out, source.kept, ledgers[-1].kept, ledgers)
        if on_progress is not None:
            on_progress(ledgers)
        write_report(out, config, ledgers)
    return result


def _ledgers(config: CurateConfig, losses: IO[bytes], work: Path) -> list[Ledger]:
    """One ledger for each step, named by its kind, with a number if a kind is used several times."""
    kinds = [step.kind for step in config.step]
    ledgers = []
    for index, kind in enumerate(kinds):
        name = f"{kind} {kinds[:index].count(kind) + 1}" if kinds.count(kind) > 1 else kind

        def on_drop(example: Example, reason: str, values: dict[str, float], name: str = name) -> None:
            measured = {key: round(value, 4) for key, value in values.items()}
            _write(losses, {**to_row(example), "dropped_by": name, "reason": reason, **measured})

        ledgers.append(Ledger(name, config.out, on_drop, config.samples, config.seed, work=work))
    return ledgers


def _read(
    config: CurateConfig, source: Ledger, ledgers: list[Ledger], on_progress: Progress | None
) -> Iterator[Example]:
    for given in config.input:
        for example in read_examples(given, config.split, columns=config.columns, allow_empty=True):
            source.counts["kept"] += 1
            if on_progress is not None and source.kept % _EVERY == 0:
                on_progress(ledgers)
            yield example


def _write(file: IO[bytes], row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
