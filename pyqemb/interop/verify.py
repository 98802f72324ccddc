"""Check that other libraries load a model folder and give the same results.

The folder is loaded in other libraries, its keys are compared with those that servers read, and it is run in float16.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pyqemb.data.arguments import checked
from pyqemb.errors import PyqembError
from pyqemb.interop.texts import sample_texts
from pyqemb.model.embedder import Embedder
from pyqemb.model.families import FAMILIES

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TOLERANCE = 1e-5  # for the components of a float32 vector
_BIDIRECTIONAL = (5, 3)  # the first version of transformers that reads is_causal in config.json

_TEI_DECODER = (
    "hidden_size", "eos_token_id", "head_dim", "rope_theta", "max_position_embeddings", "num_key_value_heads",
)  # fmt: skip
_TEI_DISTILBERT = "dim", "hidden_dim", "n_layers", "n_heads", "max_position_embeddings", "pad_token_id"
_TEI_ENCODER = (
    "hidden_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_dropout_prob",
    "pad_token_id",
)  # fmt: skip
_POOL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "last": lambda x_TE: x_TE[-1],
    "mean": lambda x_TE: x_TE.mean(0),
    "cls": lambda x_TE: x_TE[0],
    "weighted_mean": lambda x_TE: torch.arange(1.0, len(x_TE) + 1) @ x_TE / (len(x_TE) * (len(x_TE) + 1) / 2),
}


@dataclass(frozen=True)
class Check:
    """The result of a check. `warned`: it works, but not everywhere; `skipped`: the library is not installed."""

    name: str
    outcome: Literal["passed", "failed", "warned", "skipped"]
    detail: str


@checked
def verify(folder: str | Path) -> list[Check]:
    """Check the folder of an embedding model.

    sentence-transformers and transformers load it and must return Embedder's vectors of 200 texts within 1e-5
    (float32); the keys that vLLM and TEI read must be present; float16 must not overflow.

    Raises CheckpointError: Embedder itself cannot load it.
    """
    folder = Path(folder)
    ours, texts = Embedder.from_pretrained(folder, dtype="float32", device="cpu"), sample_texts()
    documents, queries = ours.encode_document(texts), ours.encode_query(texts)
    checks: dict[str, Callable[[], Check | str]] = {
        "sentence-transformers": lambda: _sentence_transformers(folder, texts, documents, queries),
        "transformers": lambda: _transformers(folder, ours, texts, documents),
        "vLLM's keys": lambda: _missing(_vllm(folder)),
        "TEI's keys": lambda: _missing(_tei(folder)),
        "float16": lambda: _half(folder, texts, documents),
    }
    return [run_check(name, check) for name, check in checks.items()]


@checked
def run_check(name: str, check: Callable[[], Check | str]) -> Check:
    """Run a check; an exception is a failure, and a missing library skips it."""
    try:
        found = check()
    except ModuleNotFoundError as error:
        return Check(name, "skipped", f"not installed: {error.name}")
    except Exception as error:  # users of the other library would see the same error
        return Check(name, "failed", f"{type(error).__name__}: {error}")
    return found if isinstance(found, Check) else Check(name, "passed", found)


@checked
def compared(name: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Check:
    """Compare results of another library with ours."""
    shapes = [(theirs.shape, ours.shape) for theirs, ours in pairs if theirs.shape != ours.shape]
    if shapes:
        return Check(name, "failed", "results of shape {} and {}".format(*map(list, shapes[0])))
    worst = float(np.max([np.abs(theirs - ours).max() for theirs, ours in pairs]))  # NaN if a difference is NaN
    count = sum(len(ours) for _, ours in pairs)
    outcome: Any = "passed" if worst <= TOLERANCE else "failed"
    return Check(name, outcome, f"{count} results differ by {worst:.1e} at most")


@checked
def open_sentence_transformer(folder: Path) -> "SentenceTransformer":
    """A SentenceTransformer in float32 on the CPU, from local safetensors only."""
    from sentence_transformers import SentenceTransformer

    weights = {"dtype": torch.float32, "use_safetensors": True}
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs=weights)


def _sentence_transformers(folder: Path, texts: list[str], documents: np.ndarray, queries: np.ndarray) -> Check:
    from sentence_transformers import __version__

    model = open_sentence_transformer(folder)
    pairs = [(model.encode_document(texts), documents), (model.encode_query(texts), queries)]
    return compared(f"sentence-transformers {__version__}", pairs)


def _transformers(folder: Path, ours: Embedder, texts: list[str], documents: np.ndarray) -> Check:
    from transformers import AutoModel, AutoTokenizer, __version__

    name = f"transformers {__version__}"
    needs_is_causal = ours.attention == "bidirectional" and not ours.config.is_encoder
    if needs_is_causal and tuple(int(part) for part in __version__.split(".")[:2]) < _BIDIRECTIONAL:
        return Check(name, "warned", "bidirectional attention needs 5.3 or later")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    prefix, rows = ours.prompts.get("document", ""), []
    for text in texts:
        ids = tokenizer(prefix + text, truncation=True, max_length=ours.tokenizer.max_length, return_tensors="pt")
        with torch.inference_mode():
            hidden_TE = model(**ids).last_hidden_state[0]
        pooled = _POOL[ours.pooling](hidden_TE)
        vector = torch.nn.functional.normalize(pooled, dim=0) if ours.normalize else pooled
        rows.append(vector[: ours.truncate_dim].numpy())
    return compared(name, [(np.stack(rows), documents)])


def _half(folder: Path, texts: list[str], documents: np.ndarray) -> Check:
    """Check float16, which some servers use and in which Qwen3-Embedding-8B is known to overflow."""
    try:
        model = Embedder.from_pretrained(folder, dtype="float16", device="cpu")
    except PyqembError as error:
        return Check("float16", "warned", str(error))
    vectors = model.encode_document(texts)
    bad = int((~np.isfinite(vectors).all(axis=1)).sum())
    if bad:
        return Check("float16", "warned", f"{bad} of {len(texts)} texts overflow: serve it in bfloat16 or float32")
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(documents, axis=1)  # not 1 after truncate_dim
    cosine = float(((vectors * documents).sum(axis=1) / lengths).min())
    return Check("float16", "passed" if cosine > 0.99 else "warned", f"cosine to float32 at least {cosine:.4f}")


def _vllm(folder: Path) -> Iterator[str]:
    config = _json(folder, "config.json")
    if config.get("architectures") not in [[family.config.architectures[0]] for family in FAMILIES.values()]:
        yield f"config.json: architectures {config.get('architectures')}"
    types = [module.get("type") for module in _json(folder, "modules.json")]
    if types != [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]:
        yield f"modules.json: {types}"
    if not {"max_seq_length", "do_lower_case"} <= _json(folder, "sentence_bert_config.json").keys():
        yield "sentence_bert_config.json: max_seq_length and do_lower_case"
    if "matryoshka_dimensions" in config and not config.get("is_matryoshka"):
        yield "config.json: is_matryoshka"
    yield from _pooling(folder)


def _tei(folder: Path) -> Iterator[str]:
    config = _json(folder, "config.json")
    model_type = str(config.get("model_type"))
    encoder = model_type in FAMILIES and FAMILIES[model_type].config.is_encoder
    names = _TEI_DISTILBERT if model_type == "distilbert" else _TEI_ENCODER if encoder else _TEI_DECODER
    for name in names:
        if isinstance(config.get(name), bool) or not isinstance(config.get(name), int | float):
            yield f"config.json: {name} {config.get(name)!r}"
    if not isinstance(_json(folder, "sentence_bert_config.json").get("max_seq_length"), int):
        yield "sentence_bert_config.json: max_seq_length"
    if not isinstance(_json(folder, "config_sentence_transformers.json").get("prompts", {}), dict):
        yield "config_sentence_transformers.json: prompts"
    yield from _pooling(folder)


def _pooling(folder: Path) -> Iterator[str]:
    pooling = _json(folder, "1_Pooling/config.json")
    for name in ("pooling_mode_cls_token", "pooling_mode_mean_tokens"):
        if not isinstance(pooling.get(name), bool):
            yield f"1_Pooling/config.json: {name}"
    if not any(pooling.get(f"pooling_mode_{mode}") for mode in ("lasttoken", "mean_tokens", "cls_token")):
        yield "1_Pooling/config.json: last, mean or cls pooling"


def _missing(problems: Iterator[str]) -> str:
    found = list(problems)
    if found:
        raise ValueError("; ".join(found))
    return "all there"


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))
