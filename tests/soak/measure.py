"""What a process holds, from Linux's /proc, and how that changes over time."""

import os
from pathlib import Path


def anonymous(pid="self"):
    """MB of a process that no file backs: what it allocated. Mapped files come and go with the page cache."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"no RssAnon of {pid}")


def sample(pid="self"):
    """MB, descriptors, threads."""
    count = [len(os.listdir(f"/proc/{pid}/{name}")) for name in ("fd", "task")]
    return [round(anonymous(pid), 3), *count]


def slope(xs, ys):
    """Of the least squares line, per unit of x."""
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)


def after_warm_up(samples, share=0.3):
    return samples[int(len(samples) * share) :]


def growth(samples, column):
    """How much the lowest value of a column grew from the first quarter to the last; a save in between may add to it
    for a moment.
    """
    quarter = len(samples) // 4
    first, last = ([row[column] for row in part] for part in (samples[:quarter], samples[-quarter:]))
    return min(last) - min(first)
