"""Model folders of any size that take no room: headers without weights."""

import json
import math
from pathlib import Path

import torch

from pyqemb.model.checkpoint import DTYPES, WEIGHTS
from pyqemb.model.config import DecoderConfig
from pyqemb.model.families import build_decoder
from pyqemb.testing.tiny import tiny_tokenizer

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_hollow_folder(folder: str | Path, config: DecoderConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write config.json, the tiny tokenizer, and a weight file with a whole header and a hole where the weights are.

    Reading a weight gives zeros.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    (folder / "tokenizer.json").write_text(tiny_tokenizer().backend.to_str(), encoding="utf-8")
    with torch.device("meta"):
        model = build_decoder(config)
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        start, end = end, end + math.prod(parameter.shape) * dtype.itemsize
        stored = model.family.stored_name(name)
        header[stored] = {"dtype": _NAMES[dtype], "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder
