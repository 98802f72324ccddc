"""Fuzzing of one target that follows the coverage of pyqemb's lines, with atheris (pip install atheris).

    python tests/fuzzing/guided.py "rows.csv" -runs=100000 -max_total_time=600

The options are libFuzzer's. A find ends it with the bytes in a file crash-...
"""

import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

try:
    import atheris
except ModuleNotFoundError:
    sys.exit("guided.py needs atheris: pip install atheris")

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["pyqemb"]):
    import harness
import torch


def main(name: str, *options: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("pyqemb").setLevel(logging.CRITICAL)
    with TemporaryDirectory() as folder, TemporaryDirectory() as corpus:
        target = harness.targets.make(name, Path(folder))
        for number, seed in enumerate(target.seeds):
            (Path(corpus) / str(number)).write_bytes(seed)

        def one(data: bytes) -> None:
            if found := harness.fault(target, data):
                raise AssertionError(found)

        def changed(data: bytes, size: int, seed: int) -> bytes:
            # Half of the inputs are changed by libFuzzer, which knows the constants that the code compares with.
            return atheris.Mutate(data, size) if seed % 2 else harness.mutate.mutate(seed, [data], target.form)[:size]

        atheris.Setup(["guided", corpus, "-max_len=65536", *options], one, custom_mutator=changed)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
