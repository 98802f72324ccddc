"""Golden vectors: what three tiny models give, so that a release does not move the numbers of its users unsaid.

    python tests/golden/make.py

Each form (`FORMS`) is a base model, two training runs of three steps on it, and their merge. The weights of a base
model come from the raw bits of PCG64, whose stream NumPy guarantees, and the tokenizer is tokenizer.json beside this
file; so a base model is the same on every machine and with every version of a library.

The script writes golden.json if a value has moved by more than `TOLERANCE`, and says what then belongs in CHANGELOG.md.
"""

import hashlib
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import pyqemb
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.model.embedder import Embedder
from pyqemb.model.families import FAMILIES
from pyqemb.training import stage2

HERE = Path(__file__).parent
STORE, TOKENIZER, CHANGELOG = HERE / "golden.json", HERE / "tokenizer.json", HERE.parents[1] / "CHANGELOG.md"
TOLERANCE = 1e-6

TEXTS = [
    "The capital of China is Beijing.",
    "Gravity attracts two bodies towards each other.",
    "Wie drucke ich ein Dokument?",
    "选择“文件”菜单中的“打印”。",
    "def slerp(a, b, t):\n    return a * (1 - t) + b * t",
    "x",
    "",
]
PAIRS = [
    ("What is the capital of China?", "The capital of China is Beijing.", "Shanghai is a port of China."),
    ("What is gravity?", "Gravity attracts two bodies towards each other.", "Magnets attract iron."),
    ("How do I print a document?", "Open the file menu and choose print.", "Open the file menu and choose save."),
    ("Wie drucke ich ein Dokument?", "Im Menü Datei auf Drucken klicken.", "Im Menü Datei auf Schließen klicken."),
    ("who wrote Faust", "Faust is a play by Goethe.", "Hamlet is a play by Shakespeare."),
    ("spherical interpolation", "slerp follows the great circle between two points.", "lerp follows the chord."),
    ("怎样打印文件?", "选择“文件”菜单中的“打印”。", "选择“文件”菜单中的“关闭”。"),
    ("largest planet", "Jupiter is the largest planet.", "Mercury is the smallest planet."),
]

# By name: the model, what `train` is told beyond `run` below, and what is measured.
FORMS: dict[str, dict[str, Any]] = {
    "causal": {
        "about": "Qwen3, causal, last token; the loss at two Matryoshka dimensions",
        "model": {"model_type": "qwen3", "tie_word_embeddings": True},
        "config": {"loss": {"matryoshka": [32, 8]}},
        "dims": [None, 8],
    },
    "bidirectional": {
        "about": "Llama, bidirectional, mean of all tokens; another loss, and gradients in several chunks",
        "model": {"model_type": "llama"},
        "config": {
            "model": {"attention": "bidirectional", "pooling": "mean"},
            "loss": {"preset": "mnrl"},
            "train": {"tokens_per_chunk": 60, "memory": None},
        },
        "dims": [None],
    },
    "reranker": {
        "about": "Mistral as a reranker, trained with adapters (LoRA)",
        "model": {"model_type": "mistral", "max_position_embeddings": 1024},
        "config": {"task": "rerank", "model": {"max_length": 400}, "lora": {"rank": 2, "alpha": 8.0}},
    },
}


def uniform(seed: int, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
    """Float32 values of mean 0 from the raw bits of PCG64."""
    bits = np.random.PCG64(seed).random_raw(math.prod(shape)) >> np.uint64(40)
    unit = (bits.astype(np.float64) + 0.5) / 2**23 - 1
    return torch.from_numpy((unit * deviation * math.sqrt(3)).astype(np.float32).reshape(shape))


def write_base(folder: Path, model_type: str, max_position_embeddings: int = 256, **changes: Any) -> Path:
    """A base model as it is downloaded: config.json, model.safetensors, tokenizer.json."""
    sizes = dict(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=max_position_embeddings, rope_theta=10_000.0,
    )  # fmt: skip
    backend = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    reranks = model_type == "mistral"
    if reranks:  # a causal language model: no end token is appended, and it has an lm_head
        backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        backend.add_tokens(["yes", "no"])
    tokenizer = Tokenizer(backend, None)
    config = FAMILIES[model_type].config(**{**sizes, **changes, "eos_token_id": tokenizer.end_id})
    names = Embedder.from_config(config, tokenizer).model.state_dict()
    weights = {}
    for seed, (name, tensor) in enumerate(sorted(names.items())):
        norm = tensor.ndim == 1
        weights[name] = uniform(seed, tuple(tensor.shape), 0.1 if norm else 0.05) + (1 if norm else 0)
    if reranks:
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
        weights["lm_head.weight"] = uniform(1000, tuple(weights["model.embed_tokens.weight"].shape), 0.05)
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def train(folder: Path, seed: int, **sections: dict[str, Any]) -> tuple[Path, list[float]]:
    """The final model and the losses of three steps."""
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for query, positive, negative in PAIRS:
            file.write(json.dumps({"query": query, "positive": positive, "negatives": [negative]}) + "\n")
    # A learning rate that turns tensors far enough for slerp; an epsilon and a temperature that do not magnify the
    # rounding of another instruction set.
    given = {
        "model": {"base": str(folder / "base")},
        "data": [{"path": str(folder / "pairs.jsonl"), "instruction": "Given a question, retrieve its answer"}],
        "train": {
            "steps": 3, "global_batch_size": 4, "num_negatives": 1, "learning_rate": 2e-3, "schedule": "constant",
            "warmup": 0, "epsilon": 1e-4, "seed": seed, "precision": "float32", "device": "cpu",
        },
        "save": {"dir": str(folder / f"run{seed}")},
        "loss": {"temperature": 0.4},
    }  # fmt: skip
    for name, section in sections.items():
        given[name] = {**given.get(name, {}), **section} if isinstance(section, dict) else section
    if given.get("task") == "rerank":
        del given["loss"]
    result = pyqemb.train(stage2(**given))
    return result.folder, [row["loss"] for row in result.metrics]


def measured(form: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The vectors of texts, or the margins of pairs."""
    if form["config"].get("task") == "rerank":
        model = pyqemb.Reranker.from_pretrained(folder, device="cpu")
        return {"margins": model.margins([(query, text) for query, *texts in PAIRS for text in texts])}
    model = pyqemb.Embedder.from_pretrained(folder, device="cpu", **form["config"].get("model", {}))
    vectors = {f"vectors of {dim or 'all'} dimensions": model.encode(TEXTS, truncate_dim=dim) for dim in form["dims"]}
    return {**vectors, "vectors of queries": model.encode_query([query for query, *_ in PAIRS[:4]])}


def sampled(tensor: torch.Tensor) -> list[float]:
    """Five values of a tensor, and its norm."""
    flat = tensor.flatten().double()
    return [*flat[torch.linspace(0, len(flat) - 1, 5).long()].tolist(), float(flat.norm())]


def values_of(name: str) -> dict[str, Any]:
    """All values of a form, computed now."""
    form = FORMS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_base(folder / "base", **form["model"])
        (first, losses), (second, others) = (train(folder, seed, **form["config"]) for seed in (0, 1))
        report = pyqemb.merge([first, second], method="slerp", weights=[1, 2], out=folder / "merged")
        tensors = load_file(folder / "merged" / "model.safetensors")
        found = {
            "base": measured(form, folder / "base"),
            "losses": {"of seed 0": losses, "of seed 1": others},
            "merged": measured(form, folder / "merged"),
            "tensors that slerp turned": sum(not each.lerp for each in report.tensors),  # and did not blend linearly
            "tensors of the merged model": {key: sampled(tensor) for key, tensor in sorted(tensors.items())},
        }
    return json.loads(json.dumps(found, default=lambda array: array.tolist()), parse_float=rounded)


def rounded(text: str) -> float:
    return round(float(text), 9)


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number with its place."""
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from leaves(value, f"{path}[{key}]" if isinstance(values, list) else f"{path} / {key}".strip(" /"))
    else:
        yield path, values


def moved(old: Any, new: Any) -> list[str]:
    """What differs by more than the tolerance, the largest first; or what is not in both."""
    before, now = dict(leaves(old)), dict(leaves(new))
    if before.keys() != now.keys():
        return [f"not in both: {', '.join(sorted(before.keys() ^ now.keys())[:10])}"]
    apart = {place: abs(now[place] - value) for place, value in before.items()}
    apart = {place: by for place, by in apart.items() if not by <= TOLERANCE}  # NaN too
    return [
        f"{place}: was {before[place]:.9g}, now {now[place]:.9g}, by {by:.2e}"
        for place, by in sorted(apart.items(), key=lambda each: -each[1])
    ]


def digest(values: Any) -> str:
    """Eight digits that identify golden values; the changelog names them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def section_of(changelog: str, digits: str) -> tuple[str, str] | None:
    """(version, heading) of the changelog's line about the golden vectors of this digest; "Unreleased" comes first."""
    version = heading = ""
    for line in changelog.splitlines():
        if found := re.match(r"## \[(.+?)\]", line):
            version, heading = found[1], ""
        elif line.startswith("### "):
            heading = line[4:].strip()
        elif "olden vectors" in line and digits in line:
            return version, heading
    return None


def versions(changelog: str) -> list[str]:
    """Those of the changelog, the latest first."""
    return re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)


def main() -> None:
    new = {name: values_of(name) for name in FORMS}
    old = json.loads(STORE.read_text(encoding="utf-8"))["values"] if STORE.exists() else {}
    changes = moved(old, new)
    if not changes:
        sys.exit(f"every value is within {TOLERANCE:g} of {STORE.name}: nothing is written")
    print("\n".join(changes[:20]))
    lines = json.dumps({"version": pyqemb.__version__, "digest": digest(new), "values": new}, indent=1)
    lines = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda row: "[" + re.sub(r"\s+", " ", row[1]) + "]", lines)
    STORE.write_text(lines + "\n", encoding="utf-8")
    print(
        f"\n{STORE.name} is written. Say in CHANGELOG.md, under [Unreleased], Changed, what users will see and why:\n"
        f"- Embeddings and losses change in the last digits (golden vectors {digest(new)}): ..."
    )


if __name__ == "__main__":
    main()
