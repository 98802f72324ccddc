"""The pages of the results: tables between the marks of a page, and plots.

python benchmarks/quality/report.py quality RESULTS.json        # docs/dev/quality.md
python benchmarks/quality/report.py ablations RESULTS.json      # docs/dev/ablations.md
"""

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablations import RUNS, experiments
from results import NDCG, Results, interval, values_of

from pyqemb.evaluation.metrics import Interval

DOCS = Path(__file__).parents[2] / "docs"
PLOTS = DOCS / "assets" / "plots"
OURS, PEER = "pyqemb", "sentence-transformers"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def quality(results: Results) -> str:
    """A table for each start, and the plot."""
    rows: dict[str, list[tuple[str, dict[str, Interval]]]] = {}
    lines: list[str] = []
    names = [name.split(" | ") for name in results.cells]
    for start in dict.fromkeys(parts[1] for parts in names if "final" in parts):
        lines += [
            f"\n**{start}**\n",
            "| data | pairs | BM25 | trainer | recipe | pairs/s | pairs seen | CPU s | nDCG@10 | difference |",
            "| --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for task in dict.fromkeys(parts[0] for parts in names):
            cells = {t: _finals(results, f"{task} | {start} | {t}") for t in (OURS, PEER)}
            seeds = min(map(len, cells.values()))
            if not seeds:
                continue
            values = {trainer: values_of(found[:seeds]) for trainer, found in cells.items()}
            gap = interval(values[OURS] - values[PEER])
            scores = {trainer: interval(found) for trainer, found in values.items()}
            rows.setdefault(start, []).append((task, scores))
            bm25 = results.cells[f"{task} | bm25"]
            for trainer, found in cells.items():
                first = found[0]
                recipe = f"{first['loss']}, batch {first['batch']}, rate {first['rate']:g}"
                mean = {key: float(np.mean([cell[key] for cell in found[:seeds]])) for key in ("pairs/s", "seconds")}
                head = (task, f"{bm25['pairs']:,}", f"{bm25[NDCG]:.3f}") if trainer == OURS else ("", "", "")
                best = gap.low > 0 if trainer == OURS else gap.high < 0
                shown = _shown(scores[trainer])
                cols = [
                    *head, trainer, recipe, f"{mean['pairs/s']:.0f}", f"{first['steps'] * first['batch']:,}",
                    f"{mean['seconds']:.1f}", f"**{shown}**" if best else shown, _shown(gap) if trainer == OURS else "",
                ]  # fmt: skip
                lines.append(f"| {' | '.join(cols)} |")
    lines += _search(results)
    if results.content.get("skipped"):
        lines.append(f"\nSkipped, because the machine lacks them: {', '.join(results.content['skipped'])}.")
    lines.append(f"\n{_environment(results)}")
    if rows:
        _bars(rows)
    return "\n".join(lines)


def _search(results: Results) -> Iterator[str]:
    """The recipes that were tried on the dev tasks, the best of each trainer in bold."""
    yield "\n**The search**: one run of each recipe, measured on the dev task\n"
    yield "| data | start | trainer | loss | batch | rate | steps | CPU s | pairs/s | nDCG@10 |"
    yield "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    tried = [(name.split(" | "), cell) for name, cell in results.cells.items() if " | search | " in name]
    for names in dict.fromkeys(tuple(parts[:3]) for parts, _ in tried):
        found = [cell for parts, cell in tried if tuple(parts[:3]) == names]
        best = max(cell[NDCG] for cell in found)
        for cell in found:
            score = f"**{cell[NDCG]:.3f}**" if cell[NDCG] == best else f"{cell[NDCG]:.3f}"
            shown = *names, *(cell[key] for key in ("loss", "batch", "rate", "steps", "seconds", "pairs/s")), score
            yield f"| {' | '.join(map(str, shown))} |"


def ablations(results: Results) -> str:
    """A table for each experiment, and the plots of merging, batch size and temperature."""
    lines: list[str] = []
    for title, rows in _ablation_rows(results):
        if len(rows) < 2:
            continue
        reference = rows[0][1]
        lines += [f"\n**{title}**\n", "| variant | nDCG@10 | difference |", "| --- | ---: | ---: |"]
        for name, values in rows:
            seeds = min(len(values), len(reference))
            gap = interval(values[:seeds] - reference[:seeds])
            note = f" ({seeds} seeds)" if seeds != 5 else ""
            text = "" if values is reference else _shown(gap, signed=True)
            bold = f"**{text}**" if text and gap.low * gap.high > 0 else text
            lines.append(f"| {name}{note} | {_shown(interval(values))} | {bold} |")
        _plot_rows(title, rows)
    lines.append(f"\n{_environment(results)}")
    return "\n".join(lines)


def _ablation_rows(results: Results) -> Iterator[tuple[str, list[tuple[str, np.ndarray]]]]:
    """The experiments, with nDCG@10 [seeds, queries] of each variant that was run."""
    merges = [f"{method} of {count}" for method in ("slerp", "linear", "karcher") for count in (2, 3, RUNS)]
    listed = {name: [(v.name, v.name) for v in variants] for name, variants in experiments().items()}
    listed["merging"] = [("one run", "continued, run 100"), *((name, name) for name in merges)]
    for title, names in listed.items():
        found = [(shown, _seeds(results, name)) for shown, name in names]
        yield title, [(shown, values_of(cells)) for shown, cells in found if cells]


def _finals(results: Results, name: str) -> list[dict[str, Any]]:
    return _seeds(results, f"{name} | final")


def _seeds(results: Results, name: str) -> list[dict[str, Any]]:
    """The cells `NAME | 0`, `NAME | 1`, ... up to the first that is missing."""
    found = []
    while (key := f"{name} | {len(found)}") in results.cells:
        found.append(results.cells[key])
    return found


def _shown(at: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{at.value:{sign}.3f} [{at.low:{sign}.3f}, {at.high:{sign}.3f}]"


def _environment(results: Results) -> str:
    text = "Versions: " + ", ".join(f"{key} {value}" for key, value in results.content["environment"].items()) + "."
    return textwrap.fill(text, 100)


def _bars(rows: dict[str, list[tuple[str, dict[str, Interval]]]]) -> None:
    """nDCG@10 of both trainers with intervals, a group of bars for each set."""
    groups = [(f"{task}\n{start}", scores) for start, found in rows.items() for task, scores in found]
    figure = _figure(1.6 * len(groups) + 2)
    axes = figure.subplots()
    for place, (trainer, color) in enumerate(((OURS, "#3f51b5"), (PEER, "#90a4ae"))):
        at = [scores[trainer] for _, scores in groups]
        axes.bar(
            np.arange(len(groups)) + 0.4 * place, [a.value for a in at], 0.38, color=color, label=trainer,
            yerr=[[a.value - a.low for a in at], [a.high - a.value for a in at]], capsize=3,
        )  # fmt: skip
    axes.set_xticks(np.arange(len(groups)) + 0.2, [name for name, _ in groups])
    axes.set(ylabel="nDCG@10", ylim=(0, 1))
    axes.legend(frameon=False)
    _save(figure, "quality")


def _plot_rows(title: str, rows: Sequence[tuple[str, np.ndarray]]) -> None:
    """A point with its interval for each variant."""
    figure = _figure(7, 0.35 * len(rows) + 1.2)
    axes = figure.subplots()
    for place, (_, values) in enumerate(rows):
        at = interval(values)
        axes.errorbar(
            at.value, -place, xerr=[[at.value - at.low], [at.high - at.value]], fmt="o", capsize=3,
            color="#90a4ae" if place == 0 else "#3f51b5",
        )  # fmt: skip
    axes.set_yticks([-i for i in range(len(rows))], [name for name, _ in rows])
    axes.set(xlabel="nDCG@10")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, "ablations-" + title.replace(",", "").replace(" ", "-"))


def _figure(width: float, height: float = 3.5) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pyqemb", "font.size": 10})
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, name: str) -> None:
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=("quality", "ablations"))
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    tables = {"quality": quality, "ablations": ablations}[args.page](Results(args.results))
    page = DOCS / "dev" / f"{args.page}.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{tables}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
