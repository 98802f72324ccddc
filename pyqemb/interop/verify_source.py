"""Check that an exported folder gives the results of its source.

sentence-transformers loads both, if it can open the source.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyqemb.data.folder import read_object
from pyqemb.interop.texts import sample_texts
from pyqemb.interop.verify import Check, compared, open_sentence_transformer, run_check
from pyqemb.interop.verify_reranker import open_cross_encoder, sample_pairs
from pyqemb.model.embedder import Embedder
from pyqemb.model.lora import adapted, merge_lora
from pyqemb.model.reranker import Reranker
from pyqemb.model.safety import check_safe
from pyqemb.model.sentence import CONTRACT, read_contract
from pyqemb.model.source import named_dtype

_ROUNDED = 0.01  # tolerance of a score, because the classifier's row is the rounded difference of two rows


def verify_source(folder: str | Path, source: str | Path, model: Embedder | Reranker) -> Check:
    """Compare the results of an exported folder with those of the folder that it was exported from, within 1e-5.

    sentence-transformers loads both. If it cannot open the source, `model` is used instead, and the check reports this.
    The weights of the source are rounded to the dtype of the export before the comparison.

    Args:
        folder: the exported folder.
        source: the folder that it was exported from.
        model: the source as pyqemb read it, on the CPU, with its adapter. Its adapter is merged, and its weights are
            rounded.
    """
    return run_check("source", lambda: _compare(Path(folder), Path(source), model))


def _compare(folder: Path, source: Path, model: Embedder | Reranker) -> Check:
    from sentence_transformers import __version__

    reranks = isinstance(model, Reranker)
    if reranks and int(__version__.split(".")[0]) < 6:
        return Check("source", "warned", "sentence-transformers renders pairs by the chat template from 6.0 on")
    exported = _open(folder, reranks)
    theirs, reason = _open_source(source, model, exported)
    library = f"sentence-transformers {__version__}"
    if theirs is None:
        theirs, reader = _own(model), f"pyqemb ({reason})"
    else:
        reader = library + (", with the exported weights (an adapter was folded in)" if adapted(model) else "")
    _round(theirs, _stored_dtype(folder))
    texts = sample_pairs(model) if isinstance(model, Reranker) else sample_texts()
    pairs = list(zip(_results(exported, texts), _results(theirs, texts), strict=True))
    check = compared("source", pairs)
    classifies = reranks and read_contract(folder).get("format") == "seq-cls"
    if classifies and check.outcome == "failed" and np.abs(pairs[0][0] - pairs[0][1]).max() <= _ROUNDED:
        check = replace(check, outcome="warned")
    if reason.startswith("cannot be opened") and check.outcome == "passed":
        check = replace(check, outcome="warned")
    return replace(check, detail=f"{check.detail}; export read by {library}, source by {reader}")


def _open(folder: Path, reranks: bool) -> Any:
    return open_cross_encoder(folder) if reranks else open_sentence_transformer(folder)


def _open_source(source: Path, model: Embedder | Reranker, exported: nn.Module) -> tuple[nn.Module | None, str]:
    """The source in sentence-transformers, or None and the reason why it is not used."""
    reranks = isinstance(model, Reranker)
    if not (source / "modules.json").is_file() and not (reranks and (source / CONTRACT).is_file()):
        return None, "it has no modules.json"
    if reranks and adapted(model):
        return None, "an adapter was folded in"
    check_safe(source)
    try:
        theirs = _open(source, reranks)
    except Exception as error:  # sentence-transformers raises various exceptions for unknown folders
        return None, f"cannot be opened by sentence-transformers: {type(error).__name__}: {error}"
    if adapted(model):
        theirs.load_state_dict(exported.state_dict())
    return theirs, ""


def _own(model: Embedder | Reranker) -> nn.Module:
    merge_lora(model.model)
    return model.to(torch.float32)


def _round(module: nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))


def _stored_dtype(folder: Path) -> torch.dtype:
    return named_dtype(read_object(folder, "config.json")["dtype"]) or torch.float32


def _results(model: Any, texts: list[Any]) -> list[np.ndarray]:
    """Scores of pairs, or vectors of queries, of documents, and of texts with the default prompt."""
    if isinstance(model, Reranker):
        return [model.score(texts)]
    if hasattr(model, "predict"):
        return [model.predict(texts, show_progress_bar=False)]
    return [
        encode(texts, show_progress_bar=False) for encode in (model.encode_query, model.encode_document, model.encode)
    ]
