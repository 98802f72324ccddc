"""Folders of sentence-transformers: vectors equal to its own, or refused naming file, key and value."""

import json

import numpy as np
import pytest
import torch

from pyqemb import Embedder, Reranker
from pyqemb.cli import main
from pyqemb.errors import CheckpointError
from pyqemb.model.encoder import open_encoder
from pyqemb.model.sentence import read_sentence_settings
from pyqemb.testing.tiny import tiny_embedder, write_tiny_folder

TEXTS = ["Hello World", "The capital of China is Beijing, and gravity is a force.", "BERLIN"]


@pytest.fixture
def folder(tmp_path):
    model = tiny_embedder(initializer_range=0.4)
    return model.save_pretrained(tmp_path / "model")


def edit(path, **changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**values, **changes}))


def move_pooling(folder):
    (folder / "1_Pooling").rename(folder / "pooling")
    (folder / "pooling" / "config.json").write_text('{"embedding_dimension": 32, "pooling_mode": "mean"}')
    text = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(text.replace("1_Pooling", "pooling"))


def new_names(folder):
    text = (folder / "modules.json").read_text()
    for old, new in (
        ("models.Transformer", "base.modules.transformer.Transformer"),
        ("models.Pooling", "sentence_transformer.modules.pooling.Pooling"),
        ("models.Normalize", "base.modules.normalize.Normalize"),
    ):
        text = text.replace(f"sentence_transformers.{old}", f"sentence_transformers.{new}")
    (folder / "modules.json").write_text(text)


def short_texts(folder):
    (folder / "sentence_bert_config.json").unlink()
    edit(folder / "tokenizer_config.json", model_max_length=8)


def no_end_token(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: edit(folder / "sentence_bert_config.json", do_lower_case=True),
        lambda folder: edit(folder / "config_sentence_transformers.json", prompts={}),
        lambda folder: edit(folder / "config_sentence_transformers.json", prompts={"query": "q: ", "passage": "p: "}),
        lambda folder: (folder / "config_sentence_transformers.json").unlink(),
        lambda folder: edit(folder / "1_Pooling" / "config.json", include_prompt=False),
        move_pooling,
        new_names,
        short_texts,
        no_end_token,
    ],
    ids=[
        "lower-case", "no-prompts", "passage", "no-settings", "include-prompt", "pooling-path", "new-names",
        "max-length", "no-end",
    ],
)  # fmt: skip
def test_vectors_are_those_of_sentence_transformers(folder, tmp_path, change):
    st = pytest.importorskip("sentence_transformers")
    change(folder)
    theirs = st.SentenceTransformer(str(folder), device="cpu")
    ours = Embedder.from_pretrained(folder, device="cpu")
    again = Embedder.from_pretrained(ours.save_pretrained(tmp_path / "again"), device="cpu")
    for side in ("encode_query", "encode_document"):
        expected = getattr(theirs, side)(TEXTS)
        assert np.abs(getattr(ours, side)(TEXTS) - expected).max() < 1e-5
        assert np.abs(getattr(again, side)(TEXTS) - expected).max() < 1e-5


def test_settings_are_read_and_written_again(folder, tmp_path):
    edit(folder / "config_sentence_transformers.json", truncate_dim=8, default_prompt_name="query")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    model = Embedder.from_pretrained(folder, device="cpu")
    assert (model.truncate_dim, model.default_prompt_name, model.normalize) == (8, "query", False)
    assert read_sentence_settings(model.save_pretrained(tmp_path / "again"), 32) == model.settings


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("sentence_bert_config.json", {"query_length": 8}, "query_length 8 is not supported"),
        ("sentence_bert_config.json", {"model_args": {"rank": 3}}, "model_args .* is not supported"),
        ("sentence_bert_config.json", {"new_setting": 1}, "the setting 'new_setting' is not known, got 1"),
        ("1_Pooling/config.json", {"include_prompt": False, "pooling_mode": "mean"}, "include_prompt False"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 64}, "word_embedding_dimension 64"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True}, "pooling must be one of lasttoken, mean"),
        ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}, "similarity_fn_name 'maxsim'"),
        ("config_sentence_transformers.json", {"truncate_dim": "8"}, "truncate_dim must be a positive whole number"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "default_prompt_name must be one of"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type 'SparseEncoder'"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side 'left' is not supported"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens True"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": "evil.T"}}, "'auto_map' is refused"),
        ("config.json", {"embedding_multiplier": 12.0}, "'embedding_multiplier' is not known, got 12.0"),
        ("config.json", {"num_hidden_layers": 10_000_000}, "num_hidden_layers must be at most"),
        ("config.json", {"num_hidden_layers": 3}, "num_hidden_layers is 3, the weights hold 2 layers"),
        ("config.json", {"hidden_size": 2**30}, "embed_tokens.weight has shape"),
        ("config.json", {"layer_types": 5}, "layer_types must be a list of names, got 5"),
        ("config.json", {"architectures": ["EvilModel"]}, "architectures must be among"),
        ("config.json", {"is_causal": False, "use_bidirectional_attention": "false"},
         "attention must be true or false"),
        ("config.json", {"use_bidirectional_attention": True},
         "is_causal True contradicts use_bidirectional_attention"),
        ("config.json", {"eos_token_id": "2"}, "eos_token_id must be a token id or a list of them, got '2'"),
        ("config.json", {"eos_token_id": [2, 1.5]}, "eos_token_id must be a token id or a list of them"),
        ("config.json", {"attn_implementation": "somebody/kernel"}, "'attn_implementation' is refused"),
        ("config.json", {"_attn_implementation": {"text_config": "a/b"}}, "'_attn_implementation' is refused"),
        ("1_Pooling/config.json", {"pooling_mode": "mean"},
         "pooling_mode_lasttoken true contradicts pooling_mode 'mean'"),
        ("pyqemb.json", {"atention": "causal"}, "the setting 'atention' is not known, got 'causal'"),
        ("pyqemb.json", {"kind": "embeder"}, "kind 'embeder' is not supported"),
        ("adapter_config.json", {"peft_type": "LORA"}, "--adapter folds it into the weights of its base model"),
    ],
)  # fmt: skip
def test_what_cannot_be_honored_is_refused_by_name(folder, file, change, message):
    edit(folder / file, **change)
    with pytest.raises(CheckpointError, match=message) as error:
        Embedder.from_pretrained(folder)
    assert file.split("/")[-1] in str(error.value) or "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"is_llama_config": True, "rope_interleaved": False, "_flash_attn_2_enabled": True}),
        ("config.json", {"neftune_noise_alpha": None, "method": "from_2_way_softmax", "attn_implementation": None}),
        ("config.json", {"_attn_implementation": "flash_attention_2", "eos_token_id": [2, 3]}),
        ("config.json", {"is_causal": False, "use_bidirectional_attention": True}),
        ("generation_config.json", {"attn_implementation": "sdpa"}),
        ("tokenizer_config.json", {"device_map": "auto", "token": None, "cache_dir": None}),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}),
    ],
)
def test_what_well_known_folders_hold_beside_is_accepted(folder, tmp_path, file, change):
    edit(folder / file, **change)
    again = Embedder.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "again")
    assert "attn_implementation" not in (again / "config.json").read_text()


@pytest.mark.parametrize("path", ["1_Pooling\0", "x" * 300, "a/" * 2500 + "b", "", "."])
def test_a_module_needs_a_folder_of_its_own_inside(folder, path):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"path must lie inside|must have a folder of its own"):
        Embedder.from_pretrained(folder)


def test_positions_that_are_no_number_beside_a_window(tmp_path):
    folder = write_tiny_folder(tmp_path / "base")
    edit(folder / "config.json", model_type="mistral", sliding_window=4096, max_position_embeddings="x")
    with pytest.raises(CheckpointError, match="sliding_window is not supported, got 4096"):
        Embedder.from_pretrained(folder)


def test_other_modules_are_refused_by_name(folder):
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(
        CheckpointError, match=r"modules\.json: expected .*, got Transformer, Pooling, Normalize, Dense"
    ):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}]),
        ("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}]),
        ("modules.json", [{"idx": 0, "name": "0", "path": "../x", "type": "sentence_transformers.models.Dense"}]),
        ("config.json", {"model_type": "bert", "auto_map": {"AutoModel": "evil.Evil"}}),
        ("config.json", {"model_type": "bert", "_attn_implementation_internal": "org/kernel"}),
        ("sentence_bert_config.json", {"model_args": {"trust_remote_code": True}}),
        ("2_Dense/config.json", {"activation_function": "evil.Evil"}),
    ],
)
def test_no_code_of_a_folder_is_run(tmp_path, capsys, monkeypatch, file, content):
    """A teacher of another make: refused before sentence-transformers sees the folder."""
    folder, canary = tmp_path / "teacher", tmp_path / "canary"
    write_tiny_folder(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    place = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    entries = [{"idx": i, "name": str(i), "path": p, "type": f"{place}.{t}"} for i, (p, t) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    (folder / "2_Dense").mkdir()
    (folder / file).write_text(json.dumps(content))
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(CheckpointError, match=file.split("/")[-1]):
        open_encoder(folder)
    assert not canary.exists()


def test_a_reranker_is_no_embedder_and_the_reverse(folder, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"is an embedding model \(pyqemb\.json says so\), not a reranker"):
        Reranker.from_pretrained(folder)
    edit(folder / "pyqemb.json", kind="reranker")
    texts = tmp_path / "texts.txt"
    texts.write_text("one\ntwo\n")
    assert main(["encode", str(folder), str(texts), "-o", str(tmp_path / "x.npy")]) == 3
    assert "is a reranker (pyqemb.json says so), not an embedding model" in capsys.readouterr().err
    (folder / "pyqemb.json").unlink()
    edit(folder / "config_sentence_transformers.json", model_type="CrossEncoder")
    with pytest.raises(CheckpointError, match="is a reranker"):
        open_encoder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "modules.json"])
def test_links_out_of_the_folder_are_refused_and_the_hub_cache_is_not(folder, tmp_path, name):
    blob = tmp_path / "models--x" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    (folder / name).rename(blob)
    (folder / name).symlink_to(blob)
    with pytest.raises(CheckpointError, match=f"{name}: is a link that leaves the folder"):
        Embedder.from_pretrained(folder)
    snapshot = blob.parent.parent / "snapshots" / "abc"
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    assert Embedder.from_pretrained(snapshot).encode(["x"]).shape == (1, 32)


def test_buffers_of_old_checkpoints_are_ignored(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_tiny_folder(tmp_path / "old", prefix=True)
    expected = Embedder.from_pretrained(folder).encode(TEXTS)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = weights["model.rotary_emb.inv_freq"] = torch.ones(8)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    assert np.array_equal(Embedder.from_pretrained(folder).encode(TEXTS), expected)


def test_what_transformers_5_writes_of_a_tokenizer_is_written_as_4_reads_it(tmp_path):
    base = write_tiny_folder(tmp_path / "base")
    names = {"backend": "tokenizers", "is_local": True, "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    (base / "tokenizer_config.json").write_text(json.dumps({**names, "tokenizer_class": "TokenizersBackend"}))
    out = Embedder.from_pretrained(base).save_pretrained(tmp_path / "out")
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "extra_special_tokens"} & written.keys()
