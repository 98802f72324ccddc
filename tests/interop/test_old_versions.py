"""What we write, read by sentence-transformers 5.1 with transformers 4.57, in a process that sees those alone: equal to
1e-5.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from pyqemb import Reranker
from pyqemb.testing.tiny import TEXTS, tiny_embedder, write_tiny_folder

OLD = [
    "sentence-transformers==5.1.2", "transformers==4.57.1", "huggingface_hub==0.36.0", "tokenizers==0.22.1", "requests",
    "urllib3", "certifi", "idna", "charset-normalizer",
]  # fmt: skip
NEWER = (
    "sentence_transformers",
    "transformers",
    "huggingface_hub",
    "tokenizers",
    "datasets",
    "peft",
    "accelerate",
    "mteb",
)
TEXTS = [text for text in TEXTS if text]
ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "build" / "old-versions"  # kept from run to run

EMBED = """
import numpy, sentence_transformers, sys, transformers
assert (sentence_transformers.__version__, transformers.__version__) == ("5.1.2", "4.57.1")
folder, out, *texts = sys.argv[1:]
model = sentence_transformers.SentenceTransformer(folder, device="cpu", local_files_only=True)
numpy.savez(out, query=model.encode_query(texts), document=model.encode_document(texts))
"""
RERANK = """
import numpy, sentence_transformers, sys, transformers
folder, out, *texts = sys.argv[1:]
model = sentence_transformers.CrossEncoder(folder, device="cpu", local_files_only=True)
roles = [[{"role": "query", "content": texts[0]}, {"role": "document", "content": text}] for text in texts[1:]]
rendered = model.tokenizer.apply_chat_template(roles, tokenize=False)
features = model.tokenizer(rendered, padding=True, return_tensors="pt")
numpy.savez(out, scores=model.model(**features).logits[:, 0].sigmoid().detach().numpy())
"""


@pytest.fixture(scope="session")
def old_versions(tmp_path_factory):
    """(script, *arguments) -> None, run where those versions are installed, beside torch and what both share."""
    if not (PACKAGES / "sentence_transformers").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PACKAGES), *OLD]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"the old versions cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    shared = tmp_path_factory.mktemp("shared")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.replace("-", "_").startswith(NEWER):
            (shared / path.name).symlink_to(path)

    def run(script, *arguments):
        environment = {"PYTHONPATH": f"{PACKAGES}:{shared}:{ROOT}", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, "-S", "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]

    return run


@pytest.mark.parametrize(
    ("model_type", "pooling"),
    [
        ("qwen3", "last"),
        ("llama", "mean"),
        pytest.param("qwen3", "mean", marks=pytest.mark.deep),
        pytest.param("llama", "last", marks=pytest.mark.deep),
        pytest.param("qwen2", "last", marks=pytest.mark.deep),
        pytest.param("qwen2", "mean", marks=pytest.mark.deep),
    ],
)
def test_embedders(old_versions, tmp_path, model_type, pooling):
    model = tiny_embedder(model_type=model_type, pooling=pooling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = model.save_pretrained(tmp_path / "model")
    old_versions(EMBED, folder, tmp_path / "out.npz", *TEXTS)
    theirs = np.load(tmp_path / "out.npz")
    assert np.abs(theirs["query"] - model.encode_query(TEXTS)).max() < 1e-5
    assert np.abs(theirs["document"] - model.encode_document(TEXTS)).max() < 1e-5


def test_rerankers(old_versions, tmp_path):
    base = write_tiny_folder(tmp_path / "base", max_position_embeddings=1024, prefix=True)
    model = Reranker.from_pretrained(base, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = model.save_pretrained(tmp_path / "model", format="seq-cls")
    old_versions(RERANK, folder, tmp_path / "out.npz", *TEXTS)
    scores = model.score([(TEXTS[0], text) for text in TEXTS[1:]])
    assert np.abs(np.load(tmp_path / "out.npz")["scores"] - scores).max() < 1e-5


ATTEND = """
import sys, torch, transformers, pyqemb
assert transformers.__version__ == "4.57.1"
pyqemb.register_transformers()
ids = torch.arange(1, 61).view(3, 20)
padding = torch.arange(20) >= torch.tensor([[0], [13], [19]])
for name in ("llama", "qwen3", "qwen2", "mistral"):
    answers, hidden = [], []
    for implementation in ("eager", "pyqemb"):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            name, vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=None, pad_token_id=0,
        )
        config._attn_implementation = implementation
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        out = model.model(ids, attention_mask=padding.long()).last_hidden_state * padding[..., None]
        out.square().sum().backward()
        hidden.append((out.detach(), model.model.layers[0].self_attn.k_proj.weight.grad))
        answers.append(model.generate(ids, attention_mask=padding.long(), max_new_tokens=6, do_sample=False))
    for a, b in zip(*hidden):
        assert (a - b).abs().max() < 1e-4 * max(1, float(a.abs().max())), name
    assert torch.equal(*answers), name
"""


def test_attention(old_versions):
    old_versions(ATTEND)
