"""report.html: one self-contained file, well-formed XML so that any tool can read it."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from pyqemb.data.files import atomic_file
from pyqemb.demo import plots
from pyqemb.demo.results import BM25, METRICS, NDCG, UNTRAINED, Found, Results

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
body { overflow-wrap: break-word; }
.result { font-size: 1.2rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-size: 14px; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.n small { color: #777; display: block; } tr.last td { font-weight: 600; }
img { display: block; width: 100%; max-width: 44rem; } pre { background: #f4f4f4; padding: 0.8rem; overflow-x: auto; }
details { border-left: 3px solid #ddd; padding-left: 0.8rem; margin: 0.6rem 0; }
.hit { color: #00734d; } .miss { color: #555; }
"""


def write_report(path: Path, results: Results) -> None:
    """Write the report, completely or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(render(results), encoding="utf-8")


def render(results: Results) -> str:
    """The report as well-formed HTML; all texts of the data are escaped."""
    title = f"pyqemb demo: {results.data}"
    body = "\n".join(_body(results, title))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _body(results: Results, title: str) -> Iterable[str]:
    yield f"<h1>{escape(title)}</h1>"
    yield f'<p class="result">{escape(headline(results))}</p>'
    yield _image(plots.table_plot(results), f"{NDCG} of every row with its interval")
    yield (
        f"<p>Mean over {escape(', '.join(results.groups))}; the intervals are 95 % bootstrap intervals over the "
        "questions.</p>"
    )
    yield "<h2>Scores</h2>"
    for metric in METRICS:
        for corpus in results.corpora:
            yield f"<h3>{escape(metric)}, {escape(corpus)}</h3>"
            yield _score_table(results, metric, corpus)
    if results.curves:
        yield "<h2>Training</h2>"
        yield _image(plots.loss_plot(results.curves), "loss by step")
        yield "<p>Mean similarity in the batch: positives (full lines), negatives that were kept (dashed).</p>"
        yield _image(plots.similarity_plot(results.curves), "similarity by step")
    for heading, found in (("Ten best questions", results.best), ("Ten worst questions", results.worst)):
        yield f"<h2>{heading} of the merged model</h2>"
        yield from map(_found, found)
    yield "<h2>Time and memory</h2>"
    yield _step_table(results)
    yield "<h2>Data and environment</h2>"
    yield _pairs_table({**results.facts, **results.environment})
    yield "<h2>Use the model</h2>"
    yield f"<pre>{escape(how_to(results))}</pre>"


def headline(results: Results) -> str:
    """The result in one sentence: the last row compared with the untrained rows."""
    row = results.rows[-1].name
    names = {row.name for row in results.rows}
    others = [f"{name}: {results.mean(name).value:.3f}" for name in (UNTRAINED, BM25) if name in names]
    against = f" ({', '.join(others)})" if others else ""
    return f"The {row} model reaches {NDCG} {results.mean(row)} on {results.corpora[0]}{against}."


def how_to(results: Results) -> str:
    """The model folder, and how to load and query the model."""
    return (
        f"{results.model}\n\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({results.model!r})\n"
        'model.similarity(model.encode_query(["..."]), model.encode_document(["..."]))\n\n'
        f'pyqemb demo --out {Path(results.model).parent} --ask "..."'
    )


def _score_table(results: Results, metric: str, corpus: str) -> str:
    columns = results.columns()
    head = "".join(f'<th class="n">{escape(column)}</th>' for column in columns)
    lines = []
    for row in results.rows:
        scores = [row.scores[corpus].get(column, {}).get(metric) for column in columns]
        cells = "".join(
            '<td class="n"></td>'
            if s is None
            else f'<td class="n">{s.value:.3f}<small>{s.low:.3f}-{s.high:.3f}</small></td>'
            for s in scores
        )
        last = ' class="last"' if row is results.rows[-1] else ""
        lines.append(f"<tr{last}><td>{escape(row.name)}</td>{cells}</tr>")
    return _table(f"<tr><th></th>{head}</tr>{''.join(lines)}")


def _step_table(results: Results) -> str:
    lines = [
        f'<tr><td>{escape(s.name)}</td><td class="n">{s.seconds:.1f}</td><td class="n">{s.memory:.2f}</td>'
        f"<td>{escape(s.remark)}</td></tr>"
        for s in results.steps
    ]
    total = sum(step.seconds for step in results.steps)
    peak = max((step.memory for step in results.steps), default=0.0)
    lines.append(
        f'<tr class="last"><td>total</td><td class="n">{total:.1f}</td><td class="n">{peak:.2f}</td><td></td></tr>'
    )
    head = '<tr><th>step</th><th class="n">seconds</th><th class="n">peak memory so far, GiB</th><th></th></tr>'
    return _table(head + "".join(lines))


def _table(rows: str) -> str:
    """A table that scrolls separately on narrow screens."""
    return f'<div class="wide"><table>{rows}</table></div>'


def _pairs_table(pairs: dict[str, object]) -> str:
    lines = [f'<tr><td>{escape(key)}</td><td class="n">{escape(str(value))}</td></tr>' for key, value in pairs.items()]
    return _table("".join(lines))


def _found(found: Found) -> str:
    lines = "".join(
        f'<li class="{"hit" if hit else "miss"}">{score:.3f} <code>{escape(source)}</code> {_text(text)}</li>'
        for score, source, text, hit in found.returned
    )
    return (
        f"<details><summary>[{escape(found.group)}] {_text(found.question)}</summary>"
        f"<p>Answer, at rank {found.rank}: {_text(found.answer)}</p><ol>{lines}</ol></details>"
    )


def _text(text: str, longest: int = 400) -> str:
    """The escaped text, without the control characters that XML forbids, truncated if it is long."""
    shown = text if len(text) <= longest else text[:longest] + "..."
    return escape("".join(letter for letter in shown if letter.isprintable() or letter in "\n\t"))


def _image(svg: str, description: str) -> str:
    # As an image, not inline, because the ids in several SVGs would collide.
    return (
        f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"/>'
    )


def summary(results: Results, names: Sequence[str]) -> str:
    """One line per row: the mean over the first corpus."""
    return "\n".join(f"{name}: {results.mean(name)}" for name in names)
