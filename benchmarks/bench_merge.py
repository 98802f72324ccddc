"""The memory and the time of `pyqemb merge` on two sharded checkpoints of 4B shapes in bfloat16, 8 GB each.

    python benchmarks/bench_merge.py --folder /big/disk

It needs 25 GB of disk, which are free again at the end. `RssAnon` is the memory of the process itself; the pages of the
mapped weight files, which the system takes back when it needs them, are counted apart.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pyqemb.model.checkpoint import INDEX
from pyqemb.model.config import DecoderConfig
from pyqemb.model.families import FAMILIES, build_decoder
from pyqemb.testing.tiny import tiny_tokenizer

SHAPE = Path(__file__).parent / "shapes" / "Qwen3-4B.json"


def write_checkpoint(folder: Path, config: DecoderConfig, seed: int, bytes_per_file: int = 10**9) -> Path:
    """A model folder with random bfloat16 weights in several files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    (folder / "tokenizer.json").write_text(tiny_tokenizer().backend.to_str(), encoding="utf-8")
    with torch.device("meta"):
        model = build_decoder(config)
    generator, weight_map = torch.Generator().manual_seed(seed), {}
    for number, names in enumerate(_files(model, bytes_per_file)):
        file = f"model-{number:05}.safetensors"
        tensors = {
            name: torch.empty(parameter.shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02, generator=generator)
            for name, parameter in names.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def _files(model: nn.Module, bytes_per_file: int) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters of each file."""
    names: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        names[name] = parameter
        if sum(2 * each.numel() for each in names.values()) >= bytes_per_file:
            yield names
            names = {}
    if names:
        yield names


def peak_of(command: list[str]) -> dict[str, float]:
    """Run a command; its seconds, and the most bytes of its own memory and of mapped files that it held."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status, peak = Path(f"/proc/{process.pid}/status"), {"RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        for line in status.read_text(encoding="ascii").splitlines():
            name, _, size = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(size.split()[0]) * 1024)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {"seconds": time.monotonic() - start, **peak}


def merge_peak(folder: Path, config: DecoderConfig, bytes_per_file: int = 10**9) -> dict[str, float]:
    """Merge two checkpoints of these shapes: `peak_of`, and the float32 bytes of the largest tensor."""
    with torch.device("meta"):
        largest = max(4 * parameter.numel() for parameter in build_decoder(config).parameters())
    sources = [write_checkpoint(folder / name, config, seed, bytes_per_file) for seed, name in enumerate("ab")]
    command = [sys.executable, "-m", "pyqemb", "merge", *map(str, sources), "--out", str(folder / "merged")]
    return {**peak_of(command), "largest_tensor": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go (default: the temporary folder)")
    place = parser.parse_args().folder
    if shutil.disk_usage(place or tempfile.gettempdir()).free < 25e9:
        raise SystemExit("25 GB of free disk are needed; choose another --folder")
    config = FAMILIES["qwen3"].config.from_dict(json.loads(SHAPE.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(dir=place) as folder:
        found = merge_peak(Path(folder), config)
        base = peak_of([sys.executable, "-c", "import pyqemb.merging, pyqemb.cli"])
    own = found["RssAnon"] - base["RssAnon"]
    print(
        f"{found['seconds']:.0f} s; {own / 1e9:.2f} GB of own memory above the imports' {base['RssAnon'] / 1e9:.2f} GB"
    )
    print(
        f"largest tensor {found['largest_tensor'] / 1e9:.2f} GB in float32: {own / found['largest_tensor']:.2f} of it"
    )
    print(f"mapped files {found['RssFile'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
