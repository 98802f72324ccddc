"""`verify` for the folder of a reranker: compares scores of other libraries, and checks float16."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyqemb.data.arguments import checked
from pyqemb.data.pairs import PREFIX, SUFFIX
from pyqemb.errors import ConfigError
from pyqemb.interop.texts import sample_texts
from pyqemb.interop.verify import Check, compared, run_check
from pyqemb.model.reranker import Reranker

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder


@checked
def verify_reranker(folder: str | Path) -> list[Check]:
    """Check that other libraries return Reranker's scores within 1e-5, and that float16 does not overflow.

    Up to 50 pairs are scored by sentence-transformers (CrossEncoder) and transformers.

    Raises:
        CheckpointError: Reranker itself cannot load the folder.
    """
    folder = Path(folder)
    ours = Reranker.from_pretrained(folder, dtype="float32", device="cpu")
    pairs = sample_pairs(ours)
    scores = ours.score(pairs)
    return [
        run_check("sentence-transformers", lambda: _cross_encoder(folder, pairs, scores)),
        run_check("transformers", lambda: _transformers(folder, ours, pairs, scores)),
        run_check("float16", lambda: _half(folder, pairs, scores)),
    ]


def sample_pairs(model: Reranker) -> list[tuple[str, str]]:
    """Return up to 50 pairs of texts that are not truncated.

    The libraries truncate long texts differently.
    """
    texts = sample_texts(100)
    pairs = list(zip(texts[:50], texts[50:], strict=True))
    limit = model.tokenizer.max_length or math.inf
    lengths = [len(ids) for ids in model.tokenizer.encode_documents(model.format(pairs))]
    whole = [pair for pair, length in zip(pairs, lengths, strict=True) if length < limit]
    if not whole:
        raise ConfigError(f"max_length {limit} is too short for any of the pairs to verify it by")
    return whole


def open_cross_encoder(folder: Path) -> "CrossEncoder":
    """A CrossEncoder in float32 on the CPU, from local safetensors only."""
    from sentence_transformers import CrossEncoder

    weights = {"dtype": torch.float32, "use_safetensors": True}
    return CrossEncoder(str(folder), device="cpu", local_files_only=True, model_kwargs=weights)


def _cross_encoder(folder: Path, pairs: list[tuple[str, str]], scores: np.ndarray) -> Check:
    from sentence_transformers import __version__

    name = f"sentence-transformers {__version__}"
    if int(__version__.split(".")[0]) < 6:
        return Check(
            name, "warned", "renders pairs by the chat template from 6.0 on; before, the text has to be rendered first"
        )
    return compared(name, [(open_cross_encoder(folder).predict(pairs, show_progress_bar=False), scores)])


def _transformers(folder: Path, ours: Reranker, pairs: list[tuple[str, str]], scores: np.ndarray) -> Check:
    import transformers as theirs

    classifies = theirs.AutoConfig.from_pretrained(folder).architectures[0].endswith("ForSequenceClassification")
    kind = theirs.AutoModelForSequenceClassification if classifies else theirs.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = theirs.AutoTokenizer.from_pretrained(folder)
    found = []
    for body in ours.format(pairs):
        ids = tokenizer(PREFIX + body + SUFFIX, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**ids).logits
        yes_no = (
            [logits[0, -1, i] for i in (ours.tokenizer.yes_id, ours.tokenizer.no_id)]
            if not classifies
            else [logits[0, 0], 0]
        )
        found.append(float(torch.sigmoid(yes_no[0] - yes_no[1])))
    return compared(f"transformers {theirs.__version__}", [(np.array(found), scores)])


def _half(folder: Path, pairs: list[tuple[str, str]], scores: np.ndarray) -> Check:
    found = Reranker.from_pretrained(folder, dtype="float16", device="cpu").score(pairs)
    bad = int((~np.isfinite(found)).sum())
    if bad:
        return Check("float16", "warned", f"{bad} of {len(pairs)} pairs overflow: serve it in bfloat16 or float32")
    worst = float(np.abs(found - scores).max())
    return Check("float16", "passed" if worst < 0.01 else "warned", f"scores differ by {worst:.4f} at most")
