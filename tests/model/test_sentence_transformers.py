"""The same calls on SentenceTransformer(folder) and Embedder.from_pretrained(folder), CrossEncoder and Reranker: types,
shapes, dtypes, values.
"""

import json
import random

import numpy as np
import pytest
import torch

from pyqemb import Embedder, Reranker
from pyqemb.errors import ConfigError
from pyqemb.testing.tiny import TEXTS, tiny_embedder, write_tiny_folder

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.0")
PROMPTS = {"query": "Q: ", "document": "D: ", "code": "def "}
NUMBERS = [f"{text} {number}" for number in range(3) for text in TEXTS]
CALLS = {
    "list": lambda m: m.encode(TEXTS),
    "tuple": lambda m: m.encode(tuple(TEXTS)),
    "array of texts": lambda m: m.encode(np.array(TEXTS)),
    "one": lambda m: m.encode(TEXTS[0]),
    "empty text": lambda m: m.encode(""),
    "none": lambda m: m.encode([]),
    "none, tensor": lambda m: m.encode([], convert_to_tensor=True),
    "none, list": lambda m: m.encode([], convert_to_numpy=False),
    "none, query": lambda m: m.encode_query([]),
    "none, details": lambda m: m.encode([], output_value=None),
    "none, int8": lambda m: m.encode([], precision="int8"),
    "prompt_name in second place": lambda m: m.encode(TEXTS, "query"),
    "prompt in third place": lambda m: m.encode(TEXTS, None, "x: "),
    "all in their places": lambda m: m.encode(
        TEXTS, None, "x", 4, False, "sentence_embedding", "float32", False, True, None, True, 8, None, None
    ),
    "query, in their places": lambda m: m.encode_query(TEXTS, "code", None, 4, False, "sentence_embedding", "float32"),
    "document, in their places": lambda m: m.encode_document(TEXTS, None, "p", 4),
    "sentences=": lambda m: m.encode(sentences=TEXTS),
    "inputs=": lambda m: m.encode(inputs=TEXTS),
    "query, sentences=": lambda m: m.encode_query(sentences=TEXTS),
    "query": lambda m: m.encode_query(TEXTS),
    "document": lambda m: m.encode_document(TEXTS),
    "document, other prompt": lambda m: m.encode_document(TEXTS, prompt_name="code"),
    "query, empty prompt": lambda m: m.encode_query(TEXTS, prompt=""),
    "prompt wins over prompt_name": lambda m: m.encode(TEXTS, prompt_name="query", prompt="x"),
    "unnormalized": lambda m: m.encode(TEXTS, normalize_embeddings=False),
    "normalized": lambda m: m.encode(TEXTS, normalize_embeddings=True),
    "truncated": lambda m: m.encode(TEXTS, truncate_dim=8),
    "truncated, one": lambda m: m.encode(TEXTS[0], truncate_dim=8),
    "truncated, unnormalized": lambda m: m.encode(TEXTS, truncate_dim=8, normalize_embeddings=False),
    "truncated, normalized": lambda m: m.encode(TEXTS, truncate_dim=8, normalize_embeddings=True),
    "truncated beyond the width": lambda m: m.encode(TEXTS, truncate_dim=1000),
    "tensor": lambda m: m.encode(TEXTS, convert_to_tensor=True),
    "tensor, one": lambda m: m.encode(TEXTS[0], convert_to_tensor=True),
    "tensor wins over numpy": lambda m: m.encode(TEXTS, convert_to_numpy=True, convert_to_tensor=True),
    "list of tensors": lambda m: m.encode(TEXTS, convert_to_numpy=False),
    "list of tensors, one": lambda m: m.encode(TEXTS[0], convert_to_numpy=False),
    "no precision": lambda m: m.encode(TEXTS, precision=None),
    "binary": lambda m: m.encode(TEXTS, precision="binary"),
    "ubinary, one, tensor": lambda m: m.encode(TEXTS[0], precision="ubinary", convert_to_tensor=True),
    "binary, list": lambda m: m.encode(TEXTS, precision="binary", convert_to_numpy=False),
    "device": lambda m: m.encode(TEXTS, device="cpu"),
    "torch device": lambda m: m.encode(TEXTS, device=torch.device("cpu")),
    "tokens": lambda m: m.encode(TEXTS, output_value="token_embeddings", batch_size=1),
    "tokens, one": lambda m: m.encode(TEXTS[0], output_value="token_embeddings"),
    "details": lambda m: [common(d) for d in m.encode(TEXTS, output_value=None, batch_size=1)],
    "details, one": lambda m: common(m.encode(TEXTS[0], output_value=None, truncate_dim=8)),
    "dimension": lambda m: m.get_embedding_dimension(),
    "context": lambda m: in_context(m, lambda: (m.encode(TEXTS), m.get_embedding_dimension())),
    **{
        f"similarity, {name}": lambda m, name=name: similarities(m, name)
        for name in ("cosine", "dot", "euclidean", "manhattan", None)
    },
}
REFUSED = {
    "unknown prompt": lambda m: m.encode(TEXTS, prompt_name="nobody"),
    "unknown precision": lambda m: m.encode(TEXTS, precision="int4"),
    "int8 of one": lambda m: m.encode(TEXTS[0], precision="int8"),
    "batch_size": lambda m: m.encode(TEXTS, batch_size=0),
    "similarity_fn_name": lambda m: setattr(m, "similarity_fn_name", "maxsim"),
    "None among texts": lambda m: m.encode(["a", None]),
}


def common(details):
    """Without what sentence-transformers 6 keeps for its own modules."""
    return {name: value for name, value in details.items() if name not in ("modality", "prompt_length")}


def in_context(model, call):
    with model.truncate_embeddings(8):
        return call()


def similarities(model, name):
    before = model.similarity_fn_name
    model.similarity_fn_name = name
    a, b = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
    tensors = list(torch.from_numpy(b))
    found = [
        model.similarity(a, b[:3]), model.similarity(a[0], tensors), model.similarity_pairwise(a, b),
        model.similarity_pairwise(a[0], b[0]), model.similarity(torch.from_numpy(a), b), model.similarity_fn_name,
    ]  # fmt: skip
    model.similarity_fn_name = before
    return found


def same(ours, theirs):
    assert type(ours) is type(theirs), (type(ours), type(theirs))
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            same(ours[name], theirs[name])
    elif isinstance(theirs, (np.ndarray, np.generic, torch.Tensor)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if theirs.dtype in (np.int8, np.uint8, torch.int8, torch.uint8):
            assert (ours == theirs).all()
        else:
            np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-5)
    else:
        assert ours == theirs if not isinstance(theirs, float) else abs(ours - theirs) < 1e-5


@pytest.fixture(
    scope="module",
    params=[
        "normalize",
        "mean",
        *(pytest.param(x, marks=pytest.mark.deep) for x in ("no-normalize", "truncate", "default-prompt")),
    ],
)
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model = tiny_embedder(pooling="mean" if request.param == "mean" else "last")
    with torch.no_grad():  # vectors that differ, and lengths that are not one
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.prompts = dict(PROMPTS)
    model.save_pretrained(folder)
    edits = {
        "no-normalize": ("modules.json", lambda modules: modules[:2]),
        "truncate": ("config_sentence_transformers.json", lambda config: {**config, "truncate_dim": 12}),
        "default-prompt": (
            "config_sentence_transformers.json",
            lambda config: {**config, "default_prompt_name": "code", "similarity_fn_name": "dot"},
        ),
    }
    if request.param in edits:
        name, edit = edits[request.param]
        (folder / name).write_text(json.dumps(edit(json.loads((folder / name).read_text()))))
    ours = Embedder.from_pretrained(folder, device="cpu")
    ours.normalize = request.param != "no-normalize"
    if request.param == "truncate":
        ours.truncate_dim = 12
    if request.param == "default-prompt":
        ours.default_prompt_name, ours.similarity_fn_name = "code", "dot"
    return ours, sentence_transformers.SentenceTransformer(str(folder), local_files_only=True, device="cpu")


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_same(models, name):
    ours, theirs = models
    same(CALLS[name](ours), CALLS[name](theirs))


@pytest.mark.parametrize("name", REFUSED)
def test_what_both_refuse(models, name):
    for model in models:
        with pytest.raises((ValueError, TypeError)):
            REFUSED[name](model)


def test_int8_of_both_is_the_same_but_for_rounding(models):
    ours, theirs = (model.encode(NUMBERS, precision="int8").astype(int) for model in models)
    assert np.abs(ours - theirs).max() <= 1


def test_settings_of_both_are_the_same(models):
    ours, theirs = models
    for name in ("similarity_fn_name", "truncate_dim", "default_prompt_name", "max_seq_length"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.get_sentence_embedding_dimension() == theirs.get_embedding_dimension()
    before = ours.max_seq_length
    for model in models:
        model.max_seq_length = 9
    same(ours.encode(TEXTS), theirs.encode(TEXTS))
    for model in models:
        model.max_seq_length = before


def test_a_base_model_is_normalized_unless_told_otherwise(tmp_path):
    folder = write_tiny_folder(tmp_path / "base")
    ours = Embedder.from_pretrained(folder, device="cpu")
    unit, raw = ours.encode(TEXTS), ours.encode(TEXTS, normalize_embeddings=False)
    assert np.allclose(np.linalg.norm(unit, axis=1), 1)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit, atol=1e-5)
    np.testing.assert_allclose(ours.encode(TEXTS, normalize_embeddings=False, truncate_dim=8), raw[:, :8], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: m.encode(TEXTS, normalise=True), TypeError, "unexpected keyword argument 'normalise'"),
        (lambda m: m.encode_query(TEXTS, processing_kwargs={}), TypeError, "argument 'processing_kwargs'"),
        (
            lambda m: m.encode(TEXTS, sentences=TEXTS),
            TypeError,
            r"multiple values for argument 'texts' \('sentences'\)",
        ),
        (lambda m: m.encode(TEXTS, output_value="tokens"), ConfigError, "output_value must be one of .*, got 'tokens'"),
        (lambda m: m.encode(TEXTS, truncate_dim=0), ConfigError, "truncate_dim must be a positive number, got 0"),
        (lambda m: m.encode(TEXTS, dim=8, truncate_dim=8), ConfigError, "dim and truncate_dim exclude each other"),
        (lambda m: m.encode(TEXTS, prompt=b"x"), TypeError, "prompt must be text or None, got b'x' of type bytes"),
        (lambda m: m.encode(None), TypeError, "texts must be text or a list of text, got None"),
        (lambda m: m.encode({"a": 1}), TypeError, "texts must be text or a list of text, got .* of type dict"),
        (
            lambda m: m.encode(iter(TEXTS)),
            TypeError,
            "texts must be text or a list of text, got .* of type tuple_iterator",
        ),
        (lambda m: m.encode(b"ab"), TypeError, "texts must be text or a list of text, got b'ab'"),
        (lambda m: m.encode(TEXTS, device=[]), ConfigError, "target_devices must name at least one device"),
        (lambda m: m.encode(TEXTS, device="gpu"), ConfigError, "device: expected 'auto', 'cpu' or 'cuda', got 'gpu'"),
        (lambda m: m.encode(TEXTS, device=["cpu"], chunk_size=0), ConfigError, "chunk_size must be at least 1, got 0"),
        (
            lambda m: m.encode(TEXTS, output_value=None, precision="int8"),
            ConfigError,
            "precision must be float32 for output_value None, got 'int8'",
        ),
    ],
)
def test_what_is_refused_by_name(call, kind, message):
    with pytest.raises(kind, match=message):
        call(tiny_embedder())


def test_the_progress_bar_is_on_stderr(capsys):
    tiny_embedder().encode(TEXTS, show_progress_bar=True)
    assert "Texts" in capsys.readouterr().err
    tiny_embedder().encode(TEXTS)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_processes_give_what_one_gives():
    model = tiny_embedder()
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        for options in ({}, {"truncate_dim": 8}, {"dim": 8}, {"convert_to_tensor": True}, {"precision": "binary"}):
            same(model.encode(NUMBERS, pool=pool, chunk_size=7, **options), model.encode(NUMBERS, **options))
        same(model.encode_query(TEXTS, pool=pool), model.encode_query(TEXTS))
        for output_value in ("token_embeddings", None):
            one = model.encode(TEXTS, output_value=output_value)
            same(model.encode(TEXTS, output_value=output_value, pool=pool), one)
        assert model.encode([], pool=pool).shape == (0,)
        assert model.encode("x", pool=pool).shape == (32,)
        with pytest.raises(RuntimeError, match="a worker process failed: "):
            model.encode(["no character: \ud800"], pool=pool)
        same(model.encode(TEXTS, pool=pool), model.encode(TEXTS))
        pool["processes"][0].kill(), pool["processes"][1].kill()
        with pytest.raises(RuntimeError, match="worker processes died"):
            model.encode(TEXTS, pool=pool)
    finally:
        model.stop_multi_process_pool(pool)


# Rerankers

PAIRS = [(query, document) for query in TEXTS[:3] for document in TEXTS[3:]]
PREDICTIONS = {
    "list": lambda m: m.predict(PAIRS),
    "lists": lambda m: m.predict([list(pair) for pair in PAIRS]),
    "array": lambda m: m.predict(np.array(PAIRS)),
    "one": lambda m: m.predict(PAIRS[0]),
    "one, list": lambda m: m.predict(list(PAIRS[0])),
    "one, tensor": lambda m: m.predict(PAIRS[0], convert_to_tensor=True),
    "none": lambda m: m.predict([]),
    "none, tensor": lambda m: m.predict([], convert_to_tensor=True),
    "none, list": lambda m: m.predict([], convert_to_numpy=False),
    "sentences=": lambda m: m.predict(sentences=PAIRS),
    "inputs=": lambda m: m.predict(inputs=PAIRS),
    "in their places": lambda m: m.predict(PAIRS, None, "Find", 4, False, torch.nn.Identity(), True, False, True),
    "prompt": lambda m: m.predict(PAIRS, prompt="Find"),
    "margins": lambda m: m.predict(PAIRS, activation_fn=torch.nn.Identity()),
    "tensor": lambda m: m.predict(PAIRS, convert_to_tensor=True),
    "list of tensors": lambda m: m.predict(PAIRS, convert_to_numpy=False),
    "device": lambda m: m.predict(PAIRS, device="cpu", apply_softmax=True),
    "rank": lambda m: m.rank(TEXTS[0], TEXTS[3:]),
    "rank, in their places": lambda m: m.rank(TEXTS[0], TEXTS[3:], 2, True, None, "Find", 4, False),
    "rank, none": lambda m: m.rank(TEXTS[0], []),
    "num_labels": lambda m: m.num_labels,
}


@pytest.fixture(scope="module")
def rerankers(tmp_path_factory):
    base = write_tiny_folder(tmp_path_factory.mktemp("reranker") / "base", prefix=True, max_position_embeddings=1024)
    ours = Reranker.from_pretrained(base, device="cpu")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    saved = ours.save_pretrained(base.parent / "saved")
    return ours, sentence_transformers.CrossEncoder(str(saved), local_files_only=True, device="cpu")


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_prediction_is_the_same(rerankers, name):
    ours, theirs = rerankers
    same(PREDICTIONS[name](ours), PREDICTIONS[name](theirs))


def test_predictions_that_are_refused(rerankers):
    ours, theirs = rerankers
    for model in rerankers:
        with pytest.raises(ValueError, match=r"(?i)^prompt.name"):
            model.predict(PAIRS, prompt_name="query")
        with pytest.raises(ValueError, match="batch_size"):
            model.predict(PAIRS, batch_size=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'instruct'"):
        ours.predict(PAIRS, instruct="x")
    with pytest.raises(TypeError, match=r"pairs\[1\]\[1\] must be text, got None"):
        ours.predict([("a", "b"), ("a", None)])


# What sentence-transformers itself does with a model


def evaluators():
    from sentence_transformers.sentence_transformer import evaluation

    rng = random.Random(0)
    documents = {f"d{i}": text for i, text in enumerate(NUMBERS)}
    queries = {f"q{i}": text for i, text in enumerate(TEXTS)}
    relevant = {f"q{i}": {f"d{i}"} for i in range(len(TEXTS))}
    first, second = NUMBERS[:20], NUMBERS[5:25]
    samples = [{"query": t, "positive": [t + "!"], "negative": ["other", "b"]} for t in TEXTS[:4]]
    return [
        evaluation.InformationRetrievalEvaluator(queries, documents, relevant, write_csv=False),
        evaluation.InformationRetrievalEvaluator(queries, documents, relevant, truncate_dim=8, write_csv=False),
        evaluation.EmbeddingSimilarityEvaluator(first, second, [rng.random() for _ in first], write_csv=False),
        evaluation.BinaryClassificationEvaluator(first, second, [i % 2 for i in range(20)], write_csv=False),
        evaluation.TripletEvaluator(first, second, NUMBERS[10:], write_csv=False),
        evaluation.RerankingEvaluator(samples, write_csv=False, show_progress_bar=False),
        evaluation.TranslationEvaluator(first, second, write_csv=False),
        evaluation.ParaphraseMiningEvaluator(documents, [("d0", "d10"), ("d1", "d11")], write_csv=False),
    ]


def test_their_evaluators_measure_the_same(models):
    ours, theirs = models
    for evaluator in evaluators():
        found, expected = evaluator(ours), evaluator(theirs)
        assert found == pytest.approx(expected, abs=1e-4), type(evaluator).__name__
        assert set(found) <= set(ours.model_card_data.metrics)


def test_their_evaluators_of_rerankers_measure_the_same(rerankers):
    from sentence_transformers.cross_encoder import evaluation

    ours, theirs = rerankers
    samples = [{"query": t, "positive": [t + "!"], "documents": ["other", "b", t + "!"]} for t in TEXTS[:4]]
    for evaluator in (
        evaluation.CrossEncoderRerankingEvaluator(samples, write_csv=False, show_progress_bar=False),
        evaluation.CrossEncoderCorrelationEvaluator(
            PAIRS, [i / len(PAIRS) for i in range(len(PAIRS))], write_csv=False
        ),
        evaluation.CrossEncoderClassificationEvaluator(PAIRS, [i % 2 for i in range(len(PAIRS))], write_csv=False),
    ):
        assert evaluator(ours) == pytest.approx(evaluator(theirs), abs=1e-4), type(evaluator).__name__


def test_they_mine_hard_negatives_with_it(models, rerankers):
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.util import mine_hard_negatives

    pairs = datasets.Dataset.from_dict({"query": NUMBERS[:20], "answer": [text + "!" for text in NUMBERS[:20]]})
    ours, theirs = (
        mine_hard_negatives(pairs, model, num_negatives=2, range_max=8, verbose=False, output_scores=True).to_list()
        for model in models
    )
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert a == {**b, "scores": pytest.approx(b["scores"], abs=1e-4)}
    rescored = mine_hard_negatives(
        pairs, models[0], cross_encoder=rerankers[0], num_negatives=1, range_max=4, max_score=0.99, verbose=False
    )
    assert len(rescored)
