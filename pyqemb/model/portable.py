"""The model folder that sentence-transformers, transformers, vLLM and TEI all load.

The layout is the oldest one that all of them still read: module names and pooling keys of sentence-transformers before
5.4, the rotary base under both of its names, weights without prefix, a tokenizer.json that appends the end token. Older
installations would reject or silently misread newer names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyqemb import __version__
from pyqemb.data.files import atomic_folder
from pyqemb.data.folder import member
from pyqemb.data.tokenizer import TEMPLATE, Tokenizer
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.checkpoint import Tensors, sha256, widest_dtype
from pyqemb.model.config import DecoderConfig
from pyqemb.model.model_card import contract, model_card, write_json_files
from pyqemb.model.sentence import CONTRACT, MODE_KEYS, POOLINGS, SETTINGS, SentenceSettings, read_contract

# Writes the files of a model folder except its weights, given the folder, the model's name, the dtype and the digests
# of the weight files by name.
WriteFiles = Callable[[Path, str, torch.dtype, Mapping[str, str]], None]


@contextmanager
def model_folder(target: str | Path, write_files: WriteFiles) -> Iterator[Path]:
    """Yield a temporary folder into which the caller writes the weights; then complete it and rename it to `target`.

    An existing model folder is replaced only once the new one is complete and on the disk; any other non-empty folder
    is an error.
    """
    target = Path(target)
    check_replaceable(target)
    with atomic_folder(target) as folder:
        yield folder
        tensors = Tensors(folder, heads=())
        write_files(folder, target.name, widest_dtype(tensors), {path.name: sha256(path) for path in tensors.files})


def write_portable_files(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    digests: Mapping[str, str],
    *,
    config: DecoderConfig,
    tokenizer: Tokenizer,
    settings: SentenceSettings,
    matryoshka: Sequence[int] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of an embedding model, see WriteFiles; `provenance` is stored in pyqemb.json."""
    max_length = tokenizer.max_length or config.max_tokens
    # Older versions of sentence-transformers count positions from the first column, which must be the first token.
    right = config.is_encoder or settings.pooling in ("cls", "weighted_mean")
    tokenizer.with_max_length(max_length).save(folder, "right" if right else "left", own_padding=config.is_encoder)
    facts = {
        "pooling": settings.pooling,
        "attention": "causal" if config.is_causal else "bidirectional",
        "dims": list(matryoshka or [config.hidden_size]),
        "end_token": tokenizer.end_token,
        "end_token_id": tokenizer.end_id,
        "query_template": TEMPLATE,
        "max_length": max_length,
    }
    files = {
        "config.json": _config_json(config, tokenizer.end_id, str(dtype).removeprefix("torch."), matryoshka),
        "modules.json": _modules_json(settings.normalize),
        "1_Pooling/config.json": _pooling_json(config.hidden_size, settings.pooling),
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": tokenizer.lower_case},
        SETTINGS: _settings_json(settings),
        CONTRACT: contract(digests, provenance, facts),
    }
    if settings.normalize:
        (folder / "2_Normalize").mkdir()
    write_json_files(folder, files)
    body = _card_body(name, config, settings.prompts, tokenizer.end_token, matryoshka)
    card = model_card(name, "feature-extraction", ("feature-extraction",), body, provenance or {})
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_digests(folder: Path) -> None:
    """Compare the weight files with the digests that pyqemb.json recorded, if there is one."""
    digests = read_contract(folder).get("sha256") or {}
    if not isinstance(digests, dict):
        raise CheckpointError(f"{folder / CONTRACT}: sha256 must map file names to digests")
    for name, digest in digests.items():
        path = member(folder, Path(name).name)
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though {CONTRACT} names it")
        if sha256(path) != digest:
            raise CheckpointError(
                f"{path}: its content is not what {CONTRACT} recorded: damaged, or written by another tool "
                f"(in that case remove {CONTRACT})"
            )


def check_replaceable(target: Path) -> None:
    """ConfigError unless `target` is new, empty or a model folder."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target}: is a file; a model folder cannot take its place")
    if any(target.iterdir()) and not ((target / "config.json").is_file() and any(target.glob("*.safetensors"))):
        raise ConfigError(f"{target}: is not empty and not a model folder; refusing to replace it")


def _config_json(config: DecoderConfig, end_id: int, dtype: str, matryoshka: Sequence[int] | None) -> dict[str, Any]:
    own: dict[str, Any] = {"dtype": dtype, "torch_dtype": dtype}
    if config.eos_token_id is None and not config.is_encoder:
        own["eos_token_id"] = end_id
    if matryoshka:
        own |= {"is_matryoshka": True, "matryoshka_dimensions": sorted(matryoshka, reverse=True)}
    return with_last(config.to_dict(), own)


def with_last(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The values with `own` replaced and moved to the end, so that reading and writing a folder does not change it."""
    return {**{key: value for key, value in values.items() if key not in own}, **own}


def _modules_json(normalize: bool) -> list[dict[str, Any]]:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    return [
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{name}"}
        for idx, (path, name) in enumerate(modules)
    ]


def _pooling_json(hidden_size: int, pooling: str) -> dict[str, Any]:
    modes = {key: mode == POOLINGS[pooling] for mode, key in MODE_KEYS.items()}
    return {"word_embedding_dimension": hidden_size, **modes, "include_prompt": True}


def _settings_json(settings: SentenceSettings) -> dict[str, Any]:
    return {
        "__version__": {"sentence_transformers": "5.1.2", "transformers": "4.57.1", "pytorch": "2.8.0"},
        "prompts": dict(settings.prompts),
        "default_prompt_name": settings.default_prompt_name,
        "similarity_fn_name": settings.similarity_fn_name,
        **({} if settings.truncate_dim is None else {"truncate_dim": settings.truncate_dim}),
    }


def _card_body(
    name: str, config: DecoderConfig, prompts: Mapping[str, str], end_token: str, matryoshka: Sequence[int] | None
) -> str:
    attention = "causal" if config.is_causal else "bidirectional"
    shorter = sorted(matryoshka or (), reverse=True)
    dims = truncated = ""
    if shorter:
        dims = f" (or {', '.join(map(str, shorter))})"
        truncated = f"For shorter embeddings, pass `truncate_dim={shorter[-1]}` to `SentenceTransformer`.\n"
    return f"""This is a text embedding model with {attention} attention.
Its embeddings have {config.hidden_size} dimensions{dims}. It was saved by pyqemb {__version__}.

## Usage

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode_query(["How do I print a page?"])
documents = model.encode_document(["Open the Print dialog and choose the pages."])
print(model.similarity(queries, documents))
```

{_prompts(prompts)}
The tokenizer appends `{end_token}` to each text.
{truncated}{"" if config.is_causal or config.is_encoder else BIDIRECTIONAL}"""


def _prompts(prompts: Mapping[str, str]) -> str:
    """The sentences about the prompts of queries and documents."""
    found = [(kind, prompts.get(kind)) for kind in ("query", "document")]
    lines = [
        f"`encode_{kind}` puts the prompt `{prompt!r}` before each {kind}." if prompt
        else f"`encode_{kind}` uses no prompt." for kind, prompt in found
    ]  # fmt: skip
    return "\n".join(lines)


BIDIRECTIONAL = """
Each token attends to the whole text, because config.json sets `is_causal: false` (and
`use_bidirectional_attention: true`). vLLM reads this setting, and transformers does from version 5.3 on. A library
that ignores it computes wrong embeddings without an error.
"""
