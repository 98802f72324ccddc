"""config.resolved.json and env.json: the configuration and the environment of a run."""

import json
import platform
import sys
from pathlib import Path

import torch

from pyqemb import __version__
from pyqemb.data.files import atomic_file
from pyqemb.training.config import TrainConfig

SETTINGS_FILE = "config.resolved.json"


def write_notes(folder: Path, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Write both files to the run folder."""
    environment = {
        "pyqemb": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device),
        "precision": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "arguments": sys.argv,
    }
    for name, content in {SETTINGS_FILE: config.model_dump(mode="json"), "env.json": environment}.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
