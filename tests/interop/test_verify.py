"""A folder that works passes; each way to spoil one is found."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyqemb import Embedder, Reranker
from pyqemb.cli import main
from pyqemb.interop.texts import sample_texts
from pyqemb.interop.verify import verify
from pyqemb.interop.verify_reranker import verify_reranker
from pyqemb.interop.verify_source import verify_source
from pyqemb.model import embedder
from pyqemb.model.lora import LoraConfig, add_lora, save_adapter
from pyqemb.testing.tiny import tiny_embedder, write_tiny_folder

pytest.importorskip("sentence_transformers")


def loud(**changes):
    model = tiny_embedder(**changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def outcomes(folder):
    return {check.name.split(" ")[0]: (check.outcome, check.detail) for check in verify(folder)}


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**values, **changes}.items() if value is not None}))


def test_texts_are_many_and_differ():
    texts = sample_texts()
    assert len(texts) == 200
    assert len(set(texts)) > 100
    assert max(map(len, texts)) > 500


@pytest.mark.parametrize("changes", [{}, {"is_causal": False}, {"pooling": "mean"}, {"model_type": "llama"}], ids=str)
def test_what_we_write_passes(tmp_path, changes):
    found = outcomes(loud(**changes).save_pretrained(tmp_path / "model"))
    assert {outcome for outcome, _ in found.values()} == {"passed"}, found
    assert len(found) == 5, found


def test_a_folder_with_truncate_dim_passes(tmp_path):
    """transformers knows no truncate_dim, and the truncated vectors are not of length 1."""
    folder = loud().save_pretrained(tmp_path / "model")
    edit(folder / "config_sentence_transformers.json", truncate_dim=8)
    found = outcomes(folder)
    assert {outcome for outcome, _ in found.values()} == {"passed"}, found
    assert "at least 0.99" in found["float16"][1] or "at least 1.00" in found["float16"][1]


def test_an_export_of_what_sentence_transformers_wrote_passes(tmp_path):
    """Its folders name the class of the body, Qwen3Model; an export names the one that the released models name."""
    source = loud().save_pretrained(tmp_path / "source")
    edit(source / "config.json", architectures=["Qwen3Model"])
    found = outcomes(Embedder.from_pretrained(source).save_pretrained(tmp_path / "out"))
    assert {outcome for outcome, _ in found.values()} == {"passed"}, found
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_what_is_spoilt_is_found(tmp_path):
    folder = loud().save_pretrained(tmp_path / "model")
    edit(folder / "1_Pooling" / "config.json", pooling_mode_cls_token=None)
    edit(folder / "sentence_bert_config.json", do_lower_case=None)
    edit(folder / "config.json", eos_token_id=None, head_dim=16)
    found = outcomes(folder)
    assert found["vLLM's"] == (
        "failed",
        "ValueError: sentence_bert_config.json: max_seq_length and do_lower_case; 1_Pooling/config.json: "
        "pooling_mode_cls_token",
    )
    assert found["TEI's"][0] == "failed"
    assert "config.json: eos_token_id None" in found["TEI's"][1]
    folder = loud().save_pretrained(tmp_path / "other")
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit(folder / "config_sentence_transformers.json", prompts={"query": "other: ", "document": "d: "})
    assert {outcomes(folder)[name][0] for name in ("sentence-transformers", "transformers")} == {
        "passed"
    }  # all read the same files


def test_vectors_that_differ_fail(tmp_path, monkeypatch):
    folder = loud().save_pretrained(tmp_path / "model")
    real = Embedder.encode_document
    monkeypatch.setattr(Embedder, "encode_document", lambda self, texts: real(self, texts) + 2e-5)
    found = outcomes(folder)
    assert found["sentence-transformers"][0] == found["transformers"][0] == "failed"
    assert "results differ by 2.0e-05 at most" in found["transformers"][1]


def test_overflow_in_half_precision_warns(tmp_path):
    folder = loud().save_pretrained(tmp_path / "model")
    (folder / "pyqemb.json").unlink()
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "up_proj" in name or "down_proj" in name:
            weights[name] = weights[name] * 300
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    outcome, detail = outcomes(folder)["float16"]
    assert outcome == "warned"
    assert "overflow" in detail


def with_adapter(folder):
    adapted = Embedder.from_pretrained(folder)
    add_lora(adapted.model, LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
    return adapted


def test_export(tmp_path, capsys):
    base = loud().save_pretrained(tmp_path / "base")
    adapted = with_adapter(base)
    adapter = save_adapter(adapted.model, tmp_path / "adapter")
    out = tmp_path / "out"
    arguments = ["export", str(base), "--out", str(out), "--adapter", str(adapter), "--dtype", "float32", "--verify"]
    assert main(arguments) == 0
    assert "passed" in (shown := capsys.readouterr().out)
    assert "failed" not in shown
    texts = sample_texts(20)
    assert abs(Embedder.from_pretrained(out).encode(texts) - adapted.encode(texts)).max() < 1e-5
    assert json.loads((out / "pyqemb.json").read_text())["provenance"]["adapter"] == str(adapter)
    assert main(["export", str(base), "--out", str(base)]) == 2
    assert "is the model itself" in capsys.readouterr().err
    assert main(["export", str(base), "--out", str(tmp_path / "half")]) == 0
    assert load_file(tmp_path / "half" / "model.safetensors")["norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["causal-lm", "seq-cls"])
def test_rerankers(tmp_path, capsys, format):
    base = write_tiny_folder(tmp_path / "base", max_position_embeddings=4096, prefix=True)
    model = Reranker.from_pretrained(base, device="cpu", max_length=4096)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    folder = model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["export", str(folder), "--out", str(out), "--format", format, "--dtype", "float32", "--verify"]
    assert main(arguments) == 0
    assert (shown := capsys.readouterr().out).count("passed") == 4
    assert "source" in shown
    misread = Reranker.from_pretrained(folder, device="cpu")
    misread.default_instruction = "Is this another task?"
    other = misread.save_pretrained(tmp_path / "other", "float32", format=format)
    check = verify_source(other, folder, misread)
    assert check.outcome != "passed", check
    assert "source by sentence-transformers" in check.detail, check
    template = out / "chat_template.jinja"
    template.write_text(template.read_text().replace("<Document>", "<document>"))
    found = {check.name.split(" ")[0]: check.outcome for check in verify_reranker(out)}
    assert found == {"sentence-transformers": "failed", "transformers": "passed", "float16": "passed"}


def test_rerankers_shorter_than_the_longest_pairs(tmp_path, capsys):
    base = write_tiny_folder(tmp_path / "base", max_position_embeddings=4096, prefix=True)
    folder = Reranker.from_pretrained(base, device="cpu", max_length=700).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert main(["export", str(folder), "--out", str(out), "--dtype", "float32", "--verify"]) == 0
    assert capsys.readouterr().out.count("passed") == 4


def test_source_folders_of_other_layouts_pass(tmp_path):
    source = loud(pooling="mean").save_pretrained(tmp_path / "source")
    (source / "pyqemb.json").unlink()
    (source / "1_Pooling").rename(source / "own_pooling")
    modules = json.loads((source / "modules.json").read_text())
    modules[1]["path"] = "own_pooling"
    (source / "modules.json").write_text(json.dumps(modules))
    prompts = {"query": "find: ", "document": "passage: ", "code": "code: "}
    edit(source / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="code", truncate_dim=8)
    edit(source / "sentence_bert_config.json", max_seq_length=20, do_lower_case=True)
    for dtype in ("float32", "bfloat16"):  # the weights are rounded on both sides
        out = tmp_path / dtype
        Embedder.from_pretrained(source).save_pretrained(out, dtype)
        check = verify_source(out, source, Embedder.from_pretrained(source))
        assert check.outcome == "passed", check
        assert "source by sentence-transformers" in check.detail, check


@pytest.mark.parametrize(
    "misread",
    [
        {"pooling": "last"},
        {"prompts": {"query": "", "document": "d: "}},
        {"prompts": {"query": "q: ", "document": ""}},
        {"normalize": False},
        {"truncate_dim": 8},
    ],
    ids=lambda misread: "-".join(misread),
)
def test_a_misread_source_fails(tmp_path, capsys, monkeypatch, misread):
    model = loud(pooling="mean")
    model.prompts = {"query": "q: ", "document": "d: "}
    source = model.save_pretrained(tmp_path / "source")
    read = embedder.read_sentence_settings
    monkeypatch.setattr(embedder, "read_sentence_settings", lambda *given: replace(read(*given), **misread))
    out = tmp_path / "out"
    if "pooling" in misread:
        assert main(["export", str(source), "--out", str(out), "--dtype", "float32", "--verify"]) == 3
        assert capsys.readouterr().out.count("failed") == 1  # nothing else finds it
    else:
        Embedder.from_pretrained(source).save_pretrained(out, "float32")
    check = verify_source(out, source, Embedder.from_pretrained(source))
    assert check.outcome == "failed", check
    assert "source by sentence-transformers" in check.detail, check


def test_a_misread_source_fails_under_an_adapter(tmp_path, monkeypatch):
    source = loud(pooling="mean").save_pretrained(tmp_path / "source")
    read = embedder.read_sentence_settings
    for pooling, outcome in (("mean", "passed"), ("last", "failed")):
        monkeypatch.setattr(
            embedder, "read_sentence_settings", lambda *given, pooling=pooling: replace(read(*given), pooling=pooling)
        )
        adapted = with_adapter(source)
        out = adapted.save_pretrained(tmp_path / pooling, "bfloat16")
        check = verify_source(out, source, adapted)
        assert check.outcome == outcome, check
        assert "an adapter was folded in" in check.detail, check


def test_a_source_without_modules_is_read_by_pyqemb(tmp_path):
    source = write_tiny_folder(tmp_path / "base")
    out = Embedder.from_pretrained(source).save_pretrained(tmp_path / "out", "bfloat16")
    check = verify_source(out, source, Embedder.from_pretrained(source))
    assert check.outcome == "passed", check
    assert "source by pyqemb (it has no modules.json)" in check.detail, check


def test_a_source_that_sentence_transformers_cannot_open_warns(tmp_path, monkeypatch):
    from pyqemb.interop import verify_source as module

    source = loud().save_pretrained(tmp_path / "source")
    out = Embedder.from_pretrained(source).save_pretrained(tmp_path / "out", "float32")
    real = module.open_sentence_transformer

    def refuse(folder):
        if folder == source:
            raise KeyError("a newer module")
        return real(folder)

    monkeypatch.setattr(module, "open_sentence_transformer", refuse)
    check = verify_source(out, source, Embedder.from_pretrained(source))
    assert check.outcome == "warned", check
    assert "source by pyqemb (cannot be opened" in check.detail, check
