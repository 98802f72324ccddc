"""The plots of the report as SVG texts. matplotlib is used without a display and imported only here."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from pyqemb.demo.results import MEAN, NDCG, Results
from pyqemb.errors import ConfigError

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_POINTS = 400  # points of one curve; more are not visible and only enlarge the file


def loss_plot(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The training loss of each run by step, smoothed, with faint raw values."""
    figure, axes = _figure(height=3.6)
    for colour, (run, curve) in zip(_COLOURS, curves.items(), strict=False):
        steps, losses = _values(curve, "loss")
        axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=colour, linewidth=1.5, label=run)
    axes.set(xlabel="step", ylabel="loss")
    _legend(axes)
    return _svg(figure)


def similarity_plot(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The mean similarity of positives (solid) and of negatives that are not masked (dashed) by step."""
    figure, axes = _figure(height=3.6)
    for colour, (run, curve) in zip(_COLOURS, curves.items(), strict=False):
        for name, style in (("positive", "-"), ("negative", "--")):
            steps, values = _values(curve, name)
            axes.plot(steps, _smooth(values), style, color=colour, linewidth=1.2, label=run if style == "-" else None)
    axes.set(xlabel="step", ylabel="cosine similarity")
    _legend(axes)
    return _svg(figure)


def table_plot(results: Results) -> str:
    """The mean nDCG@10 of every row with its interval, with a color for each corpus."""
    figure, axes = _figure(height=1.2 + 0.34 * len(results.rows))
    names = [row.name for row in results.rows]
    for number, corpus in enumerate(results.corpora):
        shift = 0.12 if number == 0 else -0.12
        scores = [row.scores[corpus][MEAN][NDCG] for row in results.rows]
        values = [score.value for score in scores]
        bars = [[s.value - s.low for s in scores], [s.high - s.value for s in scores]]
        heights = [len(names) - 1 - index + shift for index in range(len(names))]
        axes.errorbar(
            values, heights, xerr=bars, fmt="o", color=_COLOURS[number], markersize=5, capsize=2, label=corpus
        )
    axes.set(xlim=(0, 1), xlabel=NDCG)
    axes.set_yticks(range(len(names)), reversed(names))
    axes.grid(axis="x", alpha=0.3)
    _legend(axes)
    return _svg(figure)


def _figure(*, height: float) -> tuple[Any, Any]:
    """A figure narrow enough that its text, which scales with it, is readable on a phone."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("the report's plots need matplotlib: pip install 'pyqemb[demo]'") from error
    figure = Figure(figsize=(5.4, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Any) -> None:
    """Put the legend above the axes, where it covers no data."""
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    # Text instead of outlines: smaller and searchable.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pyqemb"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _values(curve: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(point["step"], point[name]) for point in curve if name in point]
    points = points[:: max(1, len(points) // _POINTS)]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float], keep: float = 0.85) -> list[float]:
    """Exponential moving average with bias correction."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
