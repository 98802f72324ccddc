"""The reranker against transformers and sentence-transformers on the same folder; its template; what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyqemb import Reranker
from pyqemb.data.batch import PackedBatch
from pyqemb.data.pairs import PREFIX, SUFFIX, PairTokenizer, format_pair
from pyqemb.errors import CheckpointError, ConfigError, DataError
from pyqemb.testing.tiny import TEXTS, answering_tokenizer, tiny_tokenizer, write_tiny_folder

PAIRS = [(query, document) for query in TEXTS[:3] for document in TEXTS[3:]]


def causal_folder(folder, tied=True, seed=0, **changes):
    """A causal language model as it comes, with a head of its own where it is not tied."""
    write_tiny_folder(folder, seed, prefix=True, tie_word_embeddings=tied, max_position_embeddings=1024, **changes)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in weights.items():
        if tensor.ndim > 1:
            weights[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    if tied:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    return causal_folder(tmp_path / "base", request.param)


def rendered(pairs, instruction="Given a web search query, retrieve relevant passages that answer the query"):
    """The official template, spelled out once more."""
    return [
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        "provided. Note that "
        'the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        for query, document in pairs
    ]


def their_scores(folder, texts):
    """As the model card does it: softmax over the two logits of the last position."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scores = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        answers = torch.stack([logits[tokenizer.convert_tokens_to_ids(word)] for word in ("no", "yes")])
        scores.append(float(answers.softmax(0)[1]))
    return np.array(scores)


def test_scores_are_those_of_the_model_card(folder, tmp_path):
    reranker = Reranker.from_pretrained(folder, device="cpu")
    found = reranker.score(PAIRS, tokens_per_chunk=1000)
    saved = reranker.save_pretrained(tmp_path / "saved")
    assert np.abs(found - their_scores(saved, rendered(PAIRS))).max() < 1e-5
    assert found.std() > 0.01
    assert (Reranker.from_pretrained(saved, device="cpu").score(PAIRS, tokens_per_chunk=1000) == found).all()
    told = reranker.score(PAIRS, instruction="Find")
    assert np.abs(told - their_scores(saved, rendered(PAIRS, "Find"))).max() < 1e-5
    each = reranker.score(PAIRS[:2], instruction=["Find", None])
    assert abs(each[0] - told[0]) < 1e-6
    assert abs(each[1] - found[1]) < 1e-6


def test_the_template_is_the_official_one_byte_for_byte():
    assert [PREFIX + format_pair(*pair) + SUFFIX for pair in PAIRS] == rendered(PAIRS)
    assert [PREFIX + format_pair(*pair, "Find {query}") + SUFFIX for pair in PAIRS] == rendered(PAIRS, "Find {query}")
    tokenizer = PairTokenizer(answering_tokenizer())
    whole = tokenizer.backend.encode_batch(rendered(PAIRS), add_special_tokens=False)
    assert tokenizer.encode_documents([format_pair(*pair) for pair in PAIRS]) == [text.ids for text in whole]


def test_only_the_body_is_cut():
    tokenizer = PairTokenizer(answering_tokenizer(), max_length=300)
    short, long = tokenizer.encode_documents([format_pair("q", "d"), format_pair("q", "word " * 500)])
    fixed = [tokenizer.backend.encode(text, add_special_tokens=False).ids for text in (PREFIX, SUFFIX)]
    assert len(long) == 300
    assert len(short) < 300
    for ids in (short, long):
        assert ids[: len(fixed[0])] == fixed[0]
        assert ids[-len(fixed[1]) :] == fixed[1]
    with pytest.raises(ConfigError, match=r"max_length must leave room for a pair beside \d+ fixed tokens, got 20"):
        PairTokenizer(answering_tokenizer(), max_length=20)


@pytest.mark.parametrize("format", ["causal-lm", "seq-cls"])
def test_sentence_transformers_scores_the_same(folder, tmp_path, format):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    reranker = Reranker.from_pretrained(folder, device="cpu")
    saved = reranker.save_pretrained(tmp_path / "saved", format=format)
    theirs = sentence_transformers.CrossEncoder(str(saved), local_files_only=True, device="cpu")
    assert np.abs(theirs.predict(PAIRS, batch_size=4) - reranker.score(PAIRS)).max() < 1e-5
    told = theirs.predict(PAIRS, prompt="Find", batch_size=4)
    assert np.abs(told - reranker.score(PAIRS, instruction="Find")).max() < 1e-5


def test_a_classifier_is_loaded_and_written_again(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    reranker = Reranker.from_pretrained(folder, device="cpu")
    saved = reranker.save_pretrained(tmp_path / "seq", format="seq-cls")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    batch = tokenizer(rendered(PAIRS), padding=True, return_tensors="pt")
    with torch.no_grad():
        margins = theirs(**batch).logits[:, 0].numpy()
    assert np.abs(margins - reranker.margins(PAIRS)).max() < 1e-4
    again = Reranker.from_pretrained(saved, device="cpu")
    assert np.abs(again.margins(PAIRS) - reranker.margins(PAIRS)).max() < 1e-4
    with pytest.raises(ConfigError, match="has no language-model head to write; use 'seq-cls'"):
        again.save_pretrained(tmp_path / "causal")
    assert not (tmp_path / "causal").exists()
    assert (
        np.abs(
            Reranker.from_pretrained(again.save_pretrained(tmp_path / "twice", format="seq-cls"), device="cpu").margins(
                PAIRS
            )
            - margins
        ).max()
        < 1e-4
    )


def test_the_gradient_reaches_two_rows_of_the_head(folder):
    reranker = Reranker.from_pretrained(folder, device="cpu", dtype=torch.float64)
    batch = PackedBatch.pack(reranker.tokenizer.encode_documents(reranker.format(PAIRS[:3])))
    logits = reranker(batch)
    assert logits.shape == (3, 2)
    assert logits.dtype == torch.float64
    (logits[:, 0] - logits[:, 1]).sum().backward()
    assert all(p.grad is not None for p in reranker.parameters())
    head = reranker.head if reranker.head is not None else reranker.model.embed_tokens.weight
    rows = [0, 1] if reranker.head is not None else [reranker.tokenizer.yes_id, reranker.tokenizer.no_id]
    assert head.grad[rows].abs().min() > 0
    assert torch.allclose(head.grad[rows[0]], -head.grad[rows[1]]) or reranker.head is None


def test_rerank_sorts():
    class Length(Reranker):
        def __init__(self):
            torch.nn.Module.__init__(self)

        def score(self, pairs, instruction=None, tokens_per_chunk=None):
            return np.array([len(document) % 4 for _, document in pairs], dtype=np.float32)

    assert Length().rerank("q", ["a", "abc", "abcd", "xyz", "b"], top_k=3) == [(1, 3.0), (3, 3.0), (0, 1.0)]


def test_what_is_refused(tmp_path):
    folder = causal_folder(tmp_path / "base")
    reranker = Reranker.from_pretrained(folder, device="cpu")
    with pytest.raises(TypeError, match=r"pairs\[1\] must be \(text, text\), got 'ab'"):
        reranker.score([("a", "b"), "ab"])
    with pytest.raises(ValueError, match="expected one instruction for each of 1 pairs, got 2"):
        reranker.score([("a", "b")], instruction=["x", "y"])
    with pytest.raises(ConfigError, match="format must be one of causal-lm, seq-cls, got 'onnx'"):
        reranker.save_pretrained(tmp_path / "out", format="onnx")
    assert reranker.score([]).shape == (0,)
    tiny_tokenizer().backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match=r"the tokenizer makes . tokens of 'yes'; a reranker needs one"):
        Reranker.from_pretrained(folder)
    untied = causal_folder(tmp_path / "untied", tied=False)
    weights = load_file(untied / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, untied / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing, and config\.json says that it is not tied"):
        Reranker.from_pretrained(untied)
    weights["score.weight"] = torch.zeros(3, 32)
    save_file(weights, untied / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"score\.weight has shape \[3, 32\], expected \[1, 32\]"):
        Reranker.from_pretrained(untied)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
