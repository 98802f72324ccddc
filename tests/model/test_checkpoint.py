"""Weights in every layout that is met, and every way in which a checkpoint can be wrong or hostile."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyqemb.errors import CheckpointError, MachineError
from pyqemb.model import checkpoint
from pyqemb.model.checkpoint import load_weights, read_tensors, write_safetensors
from pyqemb.model.decoder import Decoder
from pyqemb.model.families import build_decoder
from pyqemb.testing.tiny import tiny_config, tiny_embedder, write_tiny_folder

INDEX = "model.safetensors.index.json"


def empty_model(**changes) -> Decoder:
    with torch.device("meta"):
        return build_decoder(tiny_config(**changes))


def edit(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("prefix", [False, True], ids=["plain", "prefix"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_loads(tmp_path, prefix, shards):
    folder = write_tiny_folder(tmp_path, prefix=prefix, shards=shards)
    model = empty_model()
    load_weights(model, folder)
    expected = tiny_embedder().model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert set(read_tensors(folder)) == set(expected)  # lm_head left out


@pytest.mark.parametrize("vocab_size", [361, 384, 1000])
def test_any_vocabulary(tmp_path, vocab_size):
    model = empty_model(vocab_size=vocab_size)
    load_weights(model, write_tiny_folder(tmp_path, vocab_size=vocab_size))
    assert model.embed_tokens.weight.shape == (vocab_size, 32)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [None, torch.float32])
def test_dtypes(tmp_path, stored, wanted):
    model = empty_model()
    load_weights(model, write_tiny_folder(tmp_path, dtype=stored), wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted or stored}


def test_mixed_dtypes_become_the_widest(tmp_path):
    folder = write_tiny_folder(tmp_path, dtype=torch.bfloat16)
    edit(folder, lambda weights: weights.update({"norm.weight": weights["norm.weight"].float()}))
    model = empty_model()
    load_weights(model, folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_headers_are_read_without_the_data(tmp_path):
    tensors = read_tensors(write_tiny_folder(tmp_path))
    assert tensors.shape("embed_tokens.weight") == (384, 32)
    assert tensors.dtype("embed_tokens.weight") == torch.float32
    assert len(tensors) == len(list(tensors)) == 24
    assert "lm_head.weight" not in tensors


def test_the_model_does_not_live_in_the_file(tmp_path):
    folder = write_tiny_folder(tmp_path)
    model = empty_model()
    load_weights(model, folder)
    before = model.norm.weight.clone()
    (folder / "model.safetensors").write_bytes(b"\x55" * (folder / "model.safetensors").stat().st_size)
    assert torch.equal(model.norm.weight, before)


Q = "layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(Q), rf"missing {Q}, surplus none"),
        (lambda w: w.update(extra=torch.ones(2)), "missing none, surplus extra"),
        (lambda w: w.update({Q: w[Q][:-1].clone()}), rf"model\.safetensors: {Q} has shape \[63, 32\], .* \[64, 32\]"),
        (lambda w: w.update({Q: w[Q].T.contiguous()}), rf"{Q} has shape \[32, 64\]"),
        (lambda w: w[Q].view(-1)[77:78].fill_(float("nan")), rf"model\.safetensors: {Q} holds NaN"),
        (lambda w: w[Q].view(-1)[77:78].fill_(float("-inf")), rf"{Q} holds NaN or infinity"),
        (lambda w: w.update({Q: w[Q].to(torch.int8)}), rf"{Q} is stored as I8"),
        (lambda w: w.update({f"model.{Q}": w[Q].clone()}), rf"{Q} appears twice"),
        (lambda w: w.clear(), r"missing embed_tokens\.weight, .* and 19 more"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    folder = write_tiny_folder(tmp_path)
    edit(folder, change)
    model = empty_model()
    for dtype in (None, torch.float32):
        with pytest.raises(CheckpointError, match=message):
            load_weights(model, folder, dtype)
    assert model.norm.weight.is_meta  # nothing touched


@pytest.mark.slow
@pytest.mark.promise("R19", "300 flipped bits in a header of safetensors")
def test_truncation_and_header_damage_are_named(tmp_path):
    folder = write_tiny_folder(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    expected = tiny_embedder().model.state_dict()
    rng = random.Random(0)
    damaged = [whole[:size] for size in (0, 5, 8, 100, header, header + 1, len(whole) - 1)] + [whole + b"x"]
    for _ in range(300):
        position, bit = rng.randrange(header), 1 << rng.randrange(8)
        damaged.append(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
    refused = []
    for content in damaged:
        path.write_bytes(content)
        model = empty_model()
        try:
            load_weights(model, folder)
        except CheckpointError as error:
            refused.append(str(error))
        else:  # only a flip that changes nothing that counts, as in the metadata, may pass
            assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert len(refused) > 280
    assert all(str(folder) in message for message in refused)


@pytest.mark.promise("R27", "an index that leaves its folder")
@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "w.bin", 3, ""]
)
def test_an_index_stays_in_its_folder(tmp_path, file):
    folder = write_tiny_folder(tmp_path / "model", shards=2)
    (tmp_path / "secret.safetensors").write_bytes(b"")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"norm.weight": file}}))
    with pytest.raises(CheckpointError, match=r"may name \.safetensors files of its own folder only"):
        read_tensors(folder)


@pytest.mark.promise("R27", "links that leave their folder")
def test_a_link_out_of_the_folder_is_refused_except_into_the_hub_cache(tmp_path):
    folder = write_tiny_folder(tmp_path / "models--org--name" / "snapshots" / "abc", shards=2)
    shard = sorted(folder.glob("model-*"))[0]
    for place, allowed in (("blobs", True), ("elsewhere", False)):
        target = tmp_path / "models--org--name" / place / "hash"
        target.parent.mkdir()
        shard.rename(target)
        shard.symlink_to(target)
        if allowed:
            load_weights(empty_model(), folder)
            target.rename(shard)
        else:
            with pytest.raises(CheckpointError, match="is a link that leaves the folder"):
                read_tensors(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
def test_a_damaged_index_is_named(tmp_path, content):
    folder = write_tiny_folder(tmp_path, shards=2)
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: expected a weight_map"):
        read_tensors(folder)


def test_missing_and_mixed_up_shards_are_named(tmp_path):
    folder = write_tiny_folder(tmp_path, shards=2)
    first, second = sorted(folder.glob("model-*"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(
        CheckpointError, match=rf"{second.name}: does not match model\.safetensors\.index\.json: missing"
    ):
        read_tensors(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"{second.name}: missing"):
        read_tensors(folder)


@pytest.mark.promise("R27", "pickles")
def test_pickles_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        read_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, .*convert it to safetensors"):
        read_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_tensors(tmp_path / "absent")


def test_write_replaces_at_the_end_only(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    weight = torch.arange(12.0, requires_grad=True).view(3, 4)
    write_safetensors(path, {"a": weight.T, "b": weight}, {"step": "3"})
    assert torch.equal(load_file(path)["a"], weight.T)
    (tmp_path / "x").touch()
    assert path.stat().st_mode == (tmp_path / "x").stat().st_mode
    before = path.read_bytes()

    def full(file, *rest):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "stream_safetensors", full)
    with pytest.raises(MachineError, match=r"model\.safetensors: cannot be written: No space left"):
        write_safetensors(path, {"a": weight})
    assert path.read_bytes() == before
    assert {item.name for item in tmp_path.iterdir()} == {"model.safetensors", "x"}


def test_written_files_are_those_of_safetensors(tmp_path):
    """Byte by byte; the digest that is returned is the file's."""
    tensors = {
        "narrow": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(6.0).view(2, 3), "a": torch.tensor(7.0),
        "none": torch.zeros(0, 4), "double": torch.ones(1, dtype=torch.float64),
    }  # fmt: skip
    digest = write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == checkpoint.sha256(tmp_path / "theirs")
    write_safetensors(tmp_path / "more", tensors, {"step": "\u00fc"})
    with safe_open(tmp_path / "more", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "\u00fc"}


def test_syncs_come_before_the_rename(tmp_path, monkeypatch):
    from pyqemb.data import files

    order = []
    for module, name in ((files.os, "replace"), (files, "fsync_file"), (files, "fsync_folder")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    assert order == ["fsync_file", "replace", "fsync_folder"]
