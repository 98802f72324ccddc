"""Records of adapters and of quantization."""

import math

import numpy as np
import torch
from arguments_place import DTYPES, FOLDERS, NO_FOLDER, Place, Records, matrix, options, some

from pyqemb.model import lora, quantize
from pyqemb.testing.tiny import tiny_embedder


def add(records: Records, place: Place) -> None:
    record = records.record
    decoder = place.embedder.model
    record(
        "model.lora.LoraConfig",
        lora.LoraConfig,
        lambda r: options(r, rank=r.randint(1, 9), alpha=2.0, dropout=0.1, targets=("q_proj",), rank_stabilized=True),
        dict(rank=[0, -1], targets=[(), ("x",), ["x"]], dropout=[1, -0.1, 1.5]),
    )
    fresh = lambda: tiny_embedder().model  # noqa: E731
    adapted = fresh()
    lora.add_lora(adapted, lora.LoraConfig(rank=2))
    record(
        "model.lora.add_lora",
        lora.add_lora,
        lambda r: dict(model=fresh(), config=lora.LoraConfig(rank=2)) | options(r, seed=3),
        dict(model=[adapted]),
        names=dict(model=r"\bmodel\b"),
        cheap=False,
    )
    record("model.lora.reset_lora", lora.reset_lora, lambda r: dict(model=adapted) | options(r, seed=3), cheap=False)
    record("model.lora.adapted", lora.adapted, lambda r: dict(model=adapted))
    record("model.lora.merge_lora", lora.merge_lora, lambda r: dict(model=fresh()))
    record("model.lora.MergedParameters", lora.MergedParameters, lambda r: dict(model=adapted))
    record(
        "model.lora.save_adapter",
        lora.save_adapter,
        lambda r: dict(model=adapted, folder=place.new()) | options(r, base="b", dtype=torch.bfloat16),
        dict(model=[decoder], folder=[place.file, place.model], task_type=["X", ""], dtype=DTYPES[4:]),
        names=dict(model=r"\bmodel\b", folder=r"\bfolder\b|exists|at-all|refus"),
        fine=dict(folder=["", "text", "\0"]),
        cheap=False,
    )
    record(
        "model.lora.load_adapter",
        lora.load_adapter,
        lambda r: dict(model=fresh(), folder=place.adapters[0]),
        dict(model=[adapted], folder=[*FOLDERS, place.model]),
        names=dict(folder=rf"\bfolder\b|{NO_FOLDER}|adapter"),
        cheap=False,
    )
    record(
        "model.lora.read_adapter",
        lora.read_adapter,
        lambda r: dict(folder=place.adapters[0]),
        dict(folder=[*FOLDERS, place.model]),
        names=dict(folder=rf"\bfolder\b|{NO_FOLDER}|adapter"),
    )
    record(
        "model.lora.merge_adapters",
        lora.merge_adapters,
        lambda r: dict(folders=place.adapters, out=place.new()) | options(r, weights=[0.5, -1], rank=r.randint(1, 4)),
        dict(
            folders=[[], place.adapters[:1], [place.adapters[0], "no-such"]],
            weights=[[1], [math.nan, 1], [1, 2, 3]],
            out=[place.file, place.model],
        ),
        names=dict(folders=rf"\b(folders|adapters?)\b|{NO_FOLDER}", out=r"\bout\b|exists|refus|at-all"),
        cheap=False,
        fine=dict(out=["", "text", "\0"]),
    )
    odd_vectors = [np.zeros(4), np.zeros((2, 4), dtype=np.int64), np.array([["a"]]), np.zeros((1, 2, 4)), np.array(5.0)]
    record(
        "model.quantize.quantize",
        quantize.quantize,
        lambda r: dict(vectors_NE=matrix(r, 3), precision=some(r, "float32", "int8", "binary")),
        dict(vectors_NE=odd_vectors, precision=["int4", ""]),
    )
    record(
        "model.quantize.quantize ranges",
        lambda ranges_2E: quantize.quantize(np.zeros((2, 4), dtype=np.float32), "int8", ranges_2E),
        lambda r: dict(ranges_2E=np.zeros((2, 4))),
        dict(
            ranges_2E=[5, "text", np.zeros(4), np.zeros((2, 3)), np.full((2, 4), math.nan), np.array([["a"] * 4] * 2)]
        ),
    )
    codes = np.zeros((2, 4), dtype=np.uint8)
    record(
        "model.quantize.dequantize",
        quantize.dequantize,
        lambda r: dict(codes=codes, precision="uint8", dim=4, ranges_2E=np.zeros((2, 4))),
        dict(
            codes=[codes[0], codes.astype(np.int8), codes[:, :3].astype(np.float32)],
            precision=["int4", "", "int8", "float32"],
            dim=[3, 5],
            ranges_2E=[None, np.zeros(4), np.zeros((2, 3)), np.full((2, 4), math.nan), np.array([["a"] * 4] * 2)],
        ),
        names=dict(precision=r"\bprecision\b|\bcodes\b", dim=r"\bdim\b|ranges"),
    )
    record(
        "model.quantize.check_precision",
        quantize.check_precision,
        lambda r: dict(precision="int8"),
        dict(precision=["int4", ""]),
    )
    record("model.quantize.bytes_per_vector", quantize.bytes_per_vector, lambda r: dict(precision="int8", dim=3))
    record(
        "model.quantize.value_ranges",
        quantize.value_ranges,
        lambda r: dict(vectors_NE=matrix(r, 3)),
        dict(vectors_NE=odd_vectors),
    )
    record(
        "model.lora.MergedParameters.shape",
        lora.MergedParameters(adapted).shape,
        lambda r: dict(name=next(iter(lora.MergedParameters(adapted)))),
        dict(name=["", "absent"]),
    )
