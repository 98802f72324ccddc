"""The check of a released checkpoint, on a folder of the same layout: random weights, and the real Qwen3 tokenizer
built from its ranks.
"""

import base64
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from pyqemb import Embedder
from pyqemb.interop import released
from pyqemb.testing.tiny import write_tiny_folder

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip


def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    hidden = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that a token was made of: what BPE with the ranks below its own leaves of its bytes."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, at = min(pairs)
        if rank >= limit:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def qwen3_tokenizer() -> tokenizers.Tokenizer:
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        pytest.skip("not installed: dashscope, which carries the ranks of the Qwen3 tokenizer")
    file = Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, file.read_text().splitlines())}
    letters = byte_letters()

    def shown(token):
        return "".join(letters[byte] for byte in token)

    ordered = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    merges = [merge for token in ordered if (merge := merge_of(token, ranks)) is not None]
    backend = tokenizers.Tokenizer(
        models.BPE({shown(token): rank for token, rank in ranks.items()}, [(shown(a), shown(b)) for a, b in merges])
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder, backend.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_tiny_folder(tmp_path_factory.mktemp("released") / "Qwen3-Embedding", vocab_size=151_669)
    qwen3_tokenizer().save(str(path / "tokenizer.json"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": 151_643}))
    return path


def test_the_tokenizer_is_the_real_one(folder):
    tokenizer = Embedder.from_pretrained(folder, device="cpu").tokenizer
    assert tokenizer.encode_documents(["Hello, world!"]) == [[9707, 11, 1879, 0, 151_643]]
    ids = {
        token: tokenizer.backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>", "<think>", "yes", "no")
    }
    assert ids == {"<|im_start|>": 151_644, "<|im_end|>": 151_645, "<think>": 151_667, "yes": 9693, "no": 2152}
    assert tokenizer.vocab_size == 151_669


def test_random_weights_do_not_pass(folder, capsys):
    rows = released.check(folder, device="cpu")
    assert len(rows) == 4
    assert not all(row[-1] for row in rows)
    assert [row[2] for row in rows] == [0.7646, 0.1414, 0.1355, 0.6]
    assert released.main([str(folder)]) == 1
    assert "NO" in (shown := capsys.readouterr().out)
    assert "0.7646" in shown


def test_the_right_similarities_pass(folder, monkeypatch):
    monkeypatch.setattr(
        released, "similarities", lambda model: released.EXPECTED + np.array([[0.004, -0.004], [0, 0.001]])
    )
    assert released.main([str(folder)]) == 0
    monkeypatch.setattr(released, "similarities", lambda model: released.EXPECTED + 0.006)
    assert released.main([str(folder)]) == 1


def test_no_model(tmp_path, capsys):
    assert released.main([]) == 2
    assert released.main([str(tmp_path / "none")]) == 3
    assert "no such model folder" in capsys.readouterr().err
