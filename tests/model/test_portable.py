"""The exported folder in the real sentence-transformers and transformers, and its safety as a folder."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from pyqemb.data import files
from pyqemb.data.tokenizer import END_TOKEN, Tokenizer
from pyqemb.errors import CheckpointError, ConfigError, DataError
from pyqemb.model.embedder import Embedder
from pyqemb.testing.tiny import TEXTS, tiny_embedder, tiny_tokenizer, write_tiny_folder

VARIED = [*TEXTS, "word " * 200, "ends with the token <|endoftext|>", "tab\tand\r\nnew line", "café café"]


@pytest.fixture(scope="module")
def sentence_transformers():
    return pytest.importorskip("sentence_transformers")


def loud_embedder(**changes) -> Embedder:
    """Untrained weights are so small that attention hardly matters; these are larger."""
    return tiny_embedder(seed=3, initializer_range=0.4, **changes)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_sentence_transformers_gives_equal_vectors(sentence_transformers, tmp_path, is_causal, pooling):
    model = loud_embedder(is_causal=is_causal, pooling=pooling)
    model.default_instruction = "Find the paragraph: {odd}"
    folder = model.save_pretrained(tmp_path / "model")
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    ours = model.encode(VARIED)
    assert np.abs(theirs.encode(VARIED) - ours).max() < 1e-5
    assert np.abs(theirs.encode_query(VARIED) - model.encode_query(VARIED)).max() < 1e-5
    assert np.abs(theirs.encode_document(VARIED) - model.encode_document(VARIED)).max() < 1e-5
    assert np.abs(model.encode_query(VARIED) - ours).max() > 1e-2
    assert theirs.max_seq_length == model.tokenizer.max_length
    flipped = Embedder.from_pretrained(folder, attention="bidirectional" if is_causal else "causal")
    assert np.abs(flipped.encode(VARIED) - ours).max() > 1e-2


def test_transformers_loads_it_without_a_word(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = loud_embedder().save_pretrained(tmp_path / "model", dtype="bfloat16")
    theirs, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.dtype == torch.bfloat16
    assert theirs.config.rope_parameters["rope_theta"] == 10_000.0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(VARIED)["input_ids"] == Tokenizer.from_folder(folder, max_length=100_000).encode_documents(VARIED)
    assert tokenizer.pad_token == END_TOKEN
    assert tokenizer.padding_side == "left"


def test_a_qwen_tokenizer_keeps_its_class_and_its_ids(tmp_path):
    """The released checkpoints say Qwen2Tokenizer, which transformers 5 rebuilds; the end token must stay."""
    transformers = pytest.importorskip("transformers")
    base = write_tiny_folder(tmp_path / "base")
    backend = transformers.Qwen2Tokenizer(**_vocabulary(base / "tokenizer.json")).backend_tokenizer
    (base / "tokenizer.json").write_text(backend.to_str())
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": END_TOKEN})
    )
    model = Embedder.from_pretrained(base)
    folder = model.save_pretrained(tmp_path / "model")
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"
    again = transformers.AutoTokenizer.from_pretrained(folder)
    ids = model.tokenizer.with_max_length(100_000).encode_documents(VARIED)
    assert again(VARIED)["input_ids"] == ids
    assert all(row[-1] == model.tokenizer.end_id for row in ids)


def _vocabulary(path):
    model = json.loads(path.read_text())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def test_every_file_has_the_exact_keys(tmp_path):
    model = tiny_embedder()
    model.matryoshka = (32, 16)
    folder = model.save_pretrained(tmp_path / "model", dtype="bfloat16", provenance={"base": "none"})

    def read(name):
        return json.loads((folder / name).read_text())

    modules = read("modules.json")
    assert [entry["type"] for entry in modules] == [
        f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")
    ]
    assert [entry["path"] for entry in modules] == ["", "1_Pooling", "2_Normalize"]
    pooling = read("1_Pooling/config.json")
    assert pooling.pop("word_embedding_dimension") == 32
    assert pooling.pop("include_prompt") is True
    assert {key for key, value in pooling.items() if value} == {"pooling_mode_lasttoken"}
    assert {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} < pooling.keys()
    assert read("sentence_bert_config.json") == {"max_seq_length": 128, "do_lower_case": False}
    assert read("config_sentence_transformers.json")["prompts"] == {
        "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
        "document": "",
    }
    config = read("config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["matryoshka_dimensions"] == [32, 16]
    assert config["is_matryoshka"] is True
    assert config["is_causal"] is True
    assert "use_bidirectional_attention" not in config
    assert isinstance(config["eos_token_id"], int)
    assert config["use_sliding_window"] is False
    contract = read("pyqemb.json")
    assert contract["pooling"] == "last"
    assert contract["attention"] == "causal"
    assert contract["dims"] == [32, 16]
    assert contract["provenance"] == {"base": "none"}
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: sentence-transformers\n")
    assert Embedder.from_pretrained(folder).matryoshka == (32, 16)


def test_the_base_config_keeps_its_other_keys(tmp_path):
    base = write_tiny_folder(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"max_window_layers": 28, "bos_token_id": 5}
    (base / "config.json").write_text(json.dumps(config))
    saved = json.loads((Embedder.from_pretrained(base).save_pretrained(tmp_path / "out") / "config.json").read_text())
    assert saved["max_window_layers"] == 28
    assert saved["bos_token_id"] == 5


def test_an_existing_model_is_replaced_and_anything_else_is_not(tmp_path):
    folder = tiny_embedder(seed=1).save_pretrained(tmp_path / "model")
    (folder / "stale").touch()
    tiny_embedder(seed=2).save_pretrained(folder)
    assert not (folder / "stale").exists()
    assert np.array_equal(Embedder.from_pretrained(folder).encode(["x"]), tiny_embedder(seed=2).encode(["x"]))
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter").write_text("years of work")
    with pytest.raises(ConfigError, match="thesis: is not empty and not a model folder"):
        tiny_embedder().save_pretrained(other)
    with pytest.raises(ConfigError, match="is a file"):
        tiny_embedder().save_pretrained(other / "chapter")
    assert (other / "chapter").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "thesis"]


@pytest.mark.parametrize("broken", ["save", "write_text", "fsync_file", "_replace_folder"])
def test_a_failed_save_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch, broken):
    folder = tiny_embedder(seed=1).save_pretrained(tmp_path / "model")
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    owner = {"save": Tokenizer, "write_text": type(folder)}.get(broken, files)
    monkeypatch.setattr(owner, broken, full)
    with pytest.raises((OSError, CheckpointError), match="No space left"):
        tiny_embedder(seed=2).save_pretrained(folder)
    monkeypatch.undo()
    assert before == {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_with_nan_are_not_saved(tmp_path):
    model = tiny_embedder()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"norm\.weight holds NaN"):
        model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    with pytest.raises(CheckpointError, match=r"infinity as torch\.float16"):
        model.save_pretrained(tmp_path / "model", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_changed_weights_are_noticed(tmp_path):
    folder = tiny_embedder().save_pretrained(tmp_path / "model")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its content is not what pyqemb\.json recorded"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1_Pooling/config.json", '{"pooling_mode": "max"}', "pooling must be one of lasttoken, mean"),
        ("1_Pooling/config.json", "{", "cannot be read as JSON"),
        ("1_Pooling/config.json", '{"pooling_mode": [["x"]]}', "pooling must be one of"),
        ("config_sentence_transformers.json", '{"prompts": {"query": 3}}', "prompts must map"),
        ("config_sentence_transformers.json", "[]", "expected a JSON object"),
        ("sentence_bert_config.json", '{"max_seq_length": "long"}', "max_seq_length must be a positive number"),
        ("pyqemb.json", '{"sha256": 3}', "sha256 must map"),
        ("tokenizer.json", "{}", "not a tokenizer"),
    ],
)
def test_damaged_side_files_are_named(tmp_path, name, content, message):
    folder = tiny_embedder().save_pretrained(tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Embedder.from_pretrained(folder)
    assert name in str(error.value)
    assert isinstance(error.value, DataError)


def test_both_spellings_of_the_pooling_are_read(tmp_path):
    folder = tiny_embedder().save_pretrained(tmp_path / "model")
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 32, "pooling_mode": "mean"}')
    assert Embedder.from_pretrained(folder).pooling == "mean"
    assert Embedder.from_pretrained(folder, pooling="last").pooling == "last"


def test_leftovers_of_a_dead_writer_are_removed(tmp_path):
    dead = tmp_path / ".999999999.partial.model"
    dead.mkdir()
    tiny_embedder().save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_appends_already_is_left_alone(tmp_path):
    tiny_tokenizer().save(tmp_path)
    first = (tmp_path / "tokenizer.json").read_text()
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a").ids[-1] == 0
    Tokenizer.from_folder(tmp_path).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == first


def test_the_card_tells_where_a_model_comes_from_and_what_it_does(tmp_path):
    import yaml

    provenance = {"base": "Qwen/Qwen3-0.6B-Base", "step": 7, "data": "0" * 64, "results": {"ndcg@10": 0.51234}}
    model = tiny_embedder(is_causal=False)
    model.matryoshka = (32, 16)
    card = (model.save_pretrained(tmp_path / "model", provenance=provenance) / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "Qwen/Qwen3-0.6B-Base"
    assert "pyqemb" in head["tags"]
    parts = "is_causal: false", "- step: `7`", "| ndcg@10 | 0.5123 |", "(or 32, 16)", "pass `truncate_dim=16`"
    for part in parts:
        assert part in card
    plain = (
        tiny_embedder().save_pretrained(tmp_path / "plain", provenance={"base": "/work/base"}) / "README.md"
    ).read_text()
    assert "base_model" not in plain.split("---")[1]
    assert "is_causal" not in plain
    assert "## Results" not in plain
    assert "truncate_dim" not in plain
    assert "`encode_query` puts the prompt `'Instruct: " in plain
    assert "`encode_document` uses no prompt." in plain


def test_the_code_of_the_card_runs(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    tiny_embedder().save_pretrained("model")
    (code,) = re.findall(r"^```python\n(.*?)^```$", Path("model", "README.md").read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(code, "README.md", "exec"), {})
