"""A long job in a process of its own, which measures itself.

    python driver.py train FOLDER STEPS [LEAK]      prints a JSON object: samples, seconds of each step, checkpoints
    python driver.py ask FOLDER URL SECONDS RATE    the same of requests to a server

LEAK plants a fault: "memory" (4 KiB a step), "descriptor" (one in 50 steps) or "thread" (one in 50 steps).
"""

import asyncio
import gc
import json
import os
import sys
import threading
import time
from pathlib import Path

from measure import sample

SAVES = 20
ENOUGH = 150  # questions, after which the server has failed in every way


def train(folder, steps, leak=None):
    import pyqemb
    from pyqemb.testing.tiny import write_tiny_folder
    from pyqemb.training import stage2

    folder, steps, kept = Path(folder), int(steps), []
    write_tiny_folder(folder / "base")
    rows = [{"query": f"q {i}", "positive": f"d {i * i}", "negatives": [f"n {i}"]} for i in range(400)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, times, at = [], [], [time.perf_counter()]

    def on_step(row):
        times.append(time.perf_counter() - at[0])
        if leak == "memory":
            kept.append(os.urandom(4096))
        elif leak == "descriptor" and row["step"] % 50 == 0:
            kept.append(os.open(os.devnull, os.O_RDONLY))
        elif leak == "thread" and row["step"] % 50 == 0:
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        if row["step"] % max(1, steps // 200) == 0:
            samples.append([row["step"], *sample()])
        at[0] = time.perf_counter()

    config = stage2(
        model={"base": str(folder / "base")}, data=[{"path": str(folder / "pairs.jsonl")}],
        train={"steps": steps, "global_batch_size": 4, "num_negatives": 1, "learning_rate": 1e-4, "device": "cpu",
            "memory": None},
        save={"dir": str(folder / "run"), "every": steps // SAVES, "keep": 3},
    )  # fmt: skip
    pyqemb.train(config, on_step=on_step)
    left = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    return {"samples": samples, "times": times, "left": left}


def ask(folder, url, seconds, rate):
    from pyqemb.llm import Asker, Endpoint, Request, Store, run_in_order

    end, samples, given = time.monotonic() + float(seconds), [], 0
    start = time.monotonic()
    store = Store(Path(folder) / "answers.sqlite")
    endpoint = Endpoint(model="m", base_url=url, timeout=10.0, retries=12, max_wait=0.05, concurrency=16)

    def questions():
        """Each number, and half of the numbers again, at once and much later."""
        number = 0
        while time.monotonic() < end or number < ENOUGH:
            yield from (number, number, number // 2)
            number += 1

    async def run():
        nonlocal given
        asker, next_sample = Asker(endpoint, store), 0.0

        async def one(number):
            return (await asker(Request((("user", f"text {number}"),)))).text

        async for number, text in run_in_order(questions(), one, 64):
            assert text == f"TEXT {number}", (number, text)  # nothing is lost, nothing is another's
            given += 1
            now = time.monotonic() - start
            if now < given / float(rate):
                await asyncio.sleep(given / float(rate) - now)
            if now >= next_sample:
                next_sample = now + float(seconds) / 200
                samples.append([round(now, 2), *sample()])
        await asker.close()
        return asker.usage

    before = sample()
    usage = asyncio.run(run())
    after = sample()
    stored = len(store)
    store.close()
    return {
        "samples": samples, "before": before, "after": after, "given": given, "asked": usage.asked, "stored": stored,
        "retries": dict(usage.retries),
    }  # fmt: skip


if __name__ == "__main__":
    result = {"train": train, "ask": ask}[sys.argv[1]](*sys.argv[2:])
    gc.collect()
    print(json.dumps(result))
