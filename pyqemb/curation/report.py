"""report.json and report.html: the statistics of each step, with histograms and sample examples."""

from html import escape
from pathlib import Path
from typing import Any

from pyqemb.curation.config import CurateConfig
from pyqemb.curation.ledger import KEPT, Histogram, Ledger, Sample
from pyqemb.data.files import atomic_file
from pyqemb.data.strict_json import dumps
from pyqemb.data.tables import source_name

_COLORS = ["#3b6ea5", "#c8553d", "#e0a458", "#7a5c99", "#6b8f71", "#999999"]  # of kept examples, then of the reasons
_WIDTH, _HEIGHT = 720, 160
_LONGEST = 600  # characters of a text that are shown
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right}h2{margin-top:2em;border-top:1px solid #ccc;padding-top:.8em}
.pair{margin:.5em 0;padding:.5em .7em;background:#f6f6f4;border-left:4px solid}
.pair p{margin:.1em 0;overflow-wrap:anywhere}
.small{color:#666;font-size:13px}summary{cursor:pointer;margin:.4em 0}svg text{font:11px system-ui,sans-serif;fill:#555}
"""


def write_report(out: Path, config: CurateConfig, ledgers: list[Ledger]) -> None:
    """Write report.json and report.html into `out`. `ledgers` holds one ledger for each step of `config`."""
    settings = [step.model_dump(mode="json", exclude_defaults=True, fallback=_name) for step in config.step]
    record = {
        "input": [source_name(source) for source in config.input],
        "seen": ledgers[0].counts.total(),
        "kept": ledgers[-1].kept,
        "steps": [{**ledger.summary(), "settings": own} for ledger, own in zip(ledgers, settings, strict=True)],
    }
    with atomic_file(out / "report.json") as path:
        path.write_text(dumps(record, indent=1) + "\n", encoding="utf-8")
    with atomic_file(out / "report.html") as path:
        path.write_text(_page(record, ledgers), encoding="utf-8", errors="replace")


def _name(value: Any) -> str:
    return type(value).__name__


def _page(record: dict[str, Any], ledgers: list[Ledger]) -> str:
    seen, kept = record["seen"], record["kept"]
    rows = "".join(
        f'<tr><td><a href="#{index}">{escape(ledger.name)}</a><td class="n">{ledger.counts.total():,}'
        f'<td class="n">{ledger.kept:,}'
        f'<td class="n">{_share(ledger.kept, ledger.counts.total())}<td class="n">{_share(ledger.kept, seen)}'
        for index, ledger in enumerate(ledgers)
    )
    steps = "".join(
        _section(index, ledger, step["settings"])
        for index, (ledger, step) in enumerate(zip(ledgers, record["steps"], strict=True))
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Curation</title><style>{_STYLE}</style>'
        f"<h1>{kept:,} of {seen:,} examples kept ({_share(kept, seen)})</h1>"
        f'<p class="small">from {escape(", ".join(record["input"]))}</p>'
        '<table><tr><th>step<th class="n">examples<th class="n">kept<th class="n">of its own<th class="n">of all</tr>'
        f"{rows}</table>{steps}</html>\n"
    )


def _section(index: int, ledger: Ledger, settings: dict[str, Any]) -> str:
    outcomes = [KEPT, *(reason for reason, _ in ledger.dropped.most_common())]
    colors = {outcome: _COLORS[min(place, len(_COLORS) - 1)] for place, outcome in enumerate(outcomes)}
    summary = ", ".join(f"{key} = {value}" for key, value in {**settings, **ledger.notes}.items() if key != "kind")
    counts = "".join(
        f'<tr><td><span style="color:{colors[outcome]}">&#9632;</span> {escape(outcome)}'
        f'<td class="n">{ledger.counts[outcome]:,}'
        f'<td class="n">{_share(ledger.counts[outcome], ledger.counts.total())}'
        for outcome in outcomes
    )
    charts = "".join(_chart(name, histogram, colors) for name, histogram in ledger.histograms.items())
    samples = "".join(
        f"<details><summary>{escape(outcome)}: {len(ledger.drawn[outcome])} to read</summary>"
        + "".join(_pair(sample, colors[outcome]) for sample in _ordered(ledger.drawn[outcome]))
        + "</details>"
        for outcome in outcomes
        if ledger.drawn.get(outcome)
    )
    return (
        f'<h2 id="{index}">{escape(ledger.name)}</h2><p class="small">{escape(summary)}</p><table>{counts}'
        f"</table>{charts}{samples}"
    )


def _chart(name: str, histogram: Histogram, colors: dict[str, str]) -> str:
    """A histogram with stacked bars of all outcomes."""
    first, last = min(histogram.counts), max(histogram.counts)
    tallest = max(counts.total() for counts in histogram.counts.values())
    width = _WIDTH / (last - first + 1)
    bars = []
    for index, counts in histogram.counts.items():
        top = float(_HEIGHT)
        for outcome, color in colors.items():
            if not counts[outcome]:
                continue
            height = _HEIGHT * counts[outcome] / tallest
            top -= height
            bars.append(
                f'<rect x="{(index - first) * width:.1f}" y="{top:.1f}" width="{max(width - 0.5, 0.5):.1f}" '
                f'height="{height:.1f}" '
                f'fill="{color}"><title>from {histogram.start_of(index):.3g}: {counts[outcome]:,} {escape(outcome)}'
                "</title></rect>"
            )
    marks = "".join(
        f'<text x="{(index - first) * width:.1f}" y="{_HEIGHT + 14}">{histogram.start_of(index):.3g}</text>'
        for index in range(first, last + 1, max(1, (last - first + 1) // 12))
    )
    label = escape(name.replace("_", " "))
    return (
        f'<p class="small">{label}, most in a bar: {tallest:,}</p>'
        f'<svg viewBox="0 0 {_WIDTH + 30} {_HEIGHT + 20}" width="100%" '
        f'role="img" aria-label="histogram of {label}">{"".join(bars)}{marks}</svg>'
    )


def _ordered(samples: list[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: list(sample.values.values()))


def _pair(sample: Sample, color: str) -> str:
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in sample.values.items())
    example = sample.example
    texts = [("", example.query), ("", example.positive), *(("negative: ", text) for text in example.negatives[:3])]
    shown = "".join(f"<p>{label}{escape(_cut(text))}</p>" for label, text in texts)
    return f'<div class="pair" style="border-color:{color}">{shown}<p class="small">{escape(measured)}</p></div>'


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
