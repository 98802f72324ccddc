"""Tables of runs.jsonl: means over seeds with 95 % intervals (Student's t), and differences to the first variant,
paired by seed.

python benchmarks/data_selection/table.py runs.jsonl
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import t


def interval(values: list[float]) -> str:
    mean, count = np.mean(values), len(values)
    if count < 2:
        return f"{mean:.3f}"
    half = t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5
    return f"{mean:.3f} ± {half:.3f}"


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    experiments = dict.fromkeys((row["experiment"], row["tasks"]) for row in rows)
    for experiment, tasks in experiments:
        own = [row for row in rows if (row["experiment"], row["tasks"]) == (experiment, tasks)]
        names = list(own[0]["ndcg@10"])
        scores: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
        for row in own:
            scores[row["variant"]][row["seed"]] = row["ndcg@10"]
        extra = [name for name in ("rows", "caught", "lost") if name in own[0]] if len(names) == 1 else []
        columns = [*names, *(["mean"] if len(names) > 1 else []), "difference", *extra]
        seeds = max(map(len, scores.values()))
        print(f"\n{experiment}: {tasks}, {seeds} seeds\n\n| variant | {' | '.join(columns)} |")
        print("|" + " --- |" * (1 + len(columns)))
        first = next(iter(scores.values()))
        for variant, by_seed in scores.items():
            facts = next(row for row in own if row["variant"] == variant)
            cells = [interval([found[name] for found in by_seed.values()]) for name in names]
            means = {seed: float(np.mean(list(found.values()))) for seed, found in by_seed.items()}
            if len(names) > 1:
                cells.append(interval(list(means.values())))
            paired = [mean - np.mean(list(first[seed].values())) for seed, mean in means.items() if seed in first]
            cells.append(interval([float(x) for x in paired]) if by_seed is not first else "")
            cells += [f"{facts[name]:,}" if name == "rows" else f"{facts.get(name, 0):.0%}" for name in extra]
            print(f"| {variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
