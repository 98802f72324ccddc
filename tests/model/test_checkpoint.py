"""Weights in every layout that is met, and every way in which a checkpoint can be wrong or hostile."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyqemb.data.folder import member
from pyqemb.errors import CheckpointError, MachineError
from pyqemb.model import checkpoint
from pyqemb.model.checkpoint import (
    Stored,
    Tensors,
    check_sizes,
    check_weights,
    file_order,
    load_rows,
    load_weights,
    read_tensors,
    stream_safetensors,
    widest_dtype,
    write_safetensors,
)
from pyqemb.model.decoder import Decoder
from pyqemb.model.embedder import Embedder
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
@pytest.mark.parametrize("name", ["/", "/etc/hosts", "../other", "a/../../b"])
def test_a_name_outside_of_the_folder_is_refused(tmp_path, name):
    assert message(member, tmp_path, name) == f"{tmp_path}: may name files of its own folder only, got {name!r}"
    assert member(tmp_path, "a/../b") == tmp_path / "a/../b"


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


# The mapping of names to tensors


def message(call, *args, error=CheckpointError, **options):
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert type(caught.value) is error
    return str(caught.value)


A, B, HEAD = torch.arange(6.0).view(3, 2), torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, 2)


@pytest.fixture
def two(tmp_path):
    """A folder of two files with an index."""
    files = {"one.safetensors": {"model.a": A, "lm_head.weight": HEAD}, "two.safetensors": {"b": B}}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_tensors_by_name(two):
    tensors = Tensors(str(two))
    assert tensors.folder == two
    assert list(tensors) == ["a", "b"]
    assert len(tensors) == 2
    assert "a" in tensors
    assert "model.a" not in tensors
    assert "lm_head.weight" not in tensors
    assert tensors["a"].equal(A)
    assert tensors["b"].equal(B)
    assert tensors.rows("a", slice(1, 3)).equal(A[1:3])
    assert tensors.head("lm_head.weight").equal(HEAD)
    assert tensors.head("score.weight") is None
    assert tensors.files == [two / "one.safetensors", two / "two.safetensors"]
    assert (tensors.file("a"), tensors.file("b")) == tuple(tensors.files)
    assert (tensors.shape("a"), tensors.shape("b")) == ((3, 2), (2,))
    assert (tensors.dtype("a"), tensors.dtype("b")) == (torch.float32, torch.bfloat16)
    assert widest_dtype(tensors) == torch.float32
    with pytest.raises(KeyError):
        _ = tensors["absent"]


def test_heads_and_files_are_chosen(two):
    tensors = Tensors(two, heads=())
    assert list(tensors) == ["lm_head.weight", "a", "b"]
    assert tensors.head("lm_head.weight") is None
    tensors = Tensors(two, heads=("a", "b"), file="two.safetensors")
    assert list(tensors) == []
    assert tensors.head("b").equal(B)
    assert tensors.files == [two / "two.safetensors"]
    assert widest_dtype(tensors) == torch.bfloat16
    assert message(Tensors, two, file="three.safetensors") == f"{two}: has no three.safetensors"
    assert message(Tensors, two / "absent") == f"{two / 'absent'}: no such folder"


def test_one_file_has_priority_over_an_index(two):
    save_file({"x": A}, two / "model.safetensors")
    assert list(Tensors(two)) == ["x"]


def test_buffers_of_old_versions_are_left_out(tmp_path):
    names = [
        "rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "layers.11.self_attn.rotary_emb.cos_cached",
        "layers.0.self_attn.rotary_emb.sin_cached",
    ]
    kept = ["layers.0.rotary_emb.inv_freq", "rotary_emb.inv_freqs", "x.rotary_emb.inv_freq"]
    save_file({name: torch.ones(1) for name in (*names, *kept)}, tmp_path / "model.safetensors")
    assert sorted(read_tensors(tmp_path)) == sorted(kept)


def test_names_that_appear_twice(two):
    save_file({"a": A.clone(), "b": B}, two / "two.safetensors")
    weight_map = {
        "model.a": "one.safetensors",
        "lm_head.weight": "one.safetensors",
        "a": "two.safetensors",
        "b": "two.safetensors",
    }
    (two / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert message(Tensors, two) == f"{two / 'two.safetensors'}: a appears twice"


def test_an_index_that_does_not_match_its_files(two):
    (two / INDEX).write_text(
        json.dumps({"weight_map": {"model.a": "one.safetensors", "z": "one.safetensors", "y": "one.safetensors"}})
    )
    assert message(Tensors, two) == (
        f"{two / 'one.safetensors'}: does not match {INDEX}: missing y, z, surplus lm_head.weight"
    )
    (two / INDEX).write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    assert message(Tensors, two) == f"{two / 'absent.safetensors'}: missing, though {INDEX} names it"
    (two / INDEX).write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    assert message(Tensors, two) == (
        f"{two / INDEX}: weight_map may name .safetensors files of its own folder only, got 'x.bin'"
    )
    (two / INDEX).write_text("{}")
    assert (
        message(Tensors, two) == f"{two / INDEX}: expected a weight_map of tensor name to file: KeyError('weight_map')"
    )
    (two / INDEX).unlink()
    assert message(Tensors, two) == f"{two}: has neither model.safetensors nor {INDEX}"
    for name in ("b.pth", "a.pt", "c.ckpt", "d.bin"):
        (two / name).touch()
        first = min(path.name for path in two.iterdir() if path.suffix != ".safetensors")
        assert message(Tensors, two) == (
            f"{two}: has neither model.safetensors nor {INDEX}; {first} is a pickle, which can run code: "
            "convert it to safetensors"
        )


def test_a_dtype_that_is_not_supported(tmp_path):
    save_file({"a": torch.ones(1, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert message(Tensors(tmp_path).dtype, "a") == (
        f"{tmp_path / 'model.safetensors'}: a is stored as I8; expected one of F64, F32, BF16, F16"
    )


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (OSError(5, "Input/output error"), MachineError, "cannot be read: Input/output error"),
        (checkpoint.SafetensorError("bad\n header"), CheckpointError, "a cannot be read: bad header"),
        (FileNotFoundError(2, "No such file"), CheckpointError, "a cannot be read: No such file or directory"),
        (RuntimeError("shape is invalid\nframe #0"), CheckpointError, "a cannot be read: shape is invalid"),
    ],
)
def test_errors_of_reading_name_the_file(tmp_path, failure, kind, words):
    path = tmp_path / "model.safetensors"
    save_file({"a": A}, path)
    tensors = Tensors(tmp_path)

    class Failing:
        def get_tensor(self, name):
            raise failure

        get_slice = get_tensor

    tensors._open[path] = Failing()
    for call in (lambda: tensors["a"], lambda: tensors.rows("a", slice(0, 1))):
        assert message(call, error=kind) == f"{path}: {words}"


def test_a_failed_allocation_is_no_damage(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    tensors = Tensors(tmp_path)

    class Full:
        def get_tensor(self, name):
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    tensors._open[tmp_path / "model.safetensors"] = Full()
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        tensors["a"]


def test_a_shape_that_torch_cannot_hold(tmp_path):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    words = message(lambda: Tensors(tmp_path)["a"])
    assert words.startswith(f"{path}: a cannot be read: ")
    assert "\n" not in words


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    words = message(checkpoint.open_safetensors, path)
    assert words.startswith(f"{path}: damaged, cut short or not safetensors: Error while deserializing header")

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "safe_open", fail)
    assert (
        message(checkpoint.open_safetensors, path, error=MachineError) == f"{path}: cannot be read: Input/output error"
    )


def test_a_file_that_safetensors_does_not_find(tmp_path, monkeypatch):
    """It says so of every file that the system does not open."""
    path = tmp_path / "model.safetensors"

    def fail(*_, **__):
        raise FileNotFoundError("No such file or directory: model.safetensors")

    monkeypatch.setattr(checkpoint, "safe_open", fail)
    words = message(checkpoint.open_safetensors, path)
    assert words.startswith(f"{path}: damaged, cut short or not safetensors: ")
    path.write_bytes(b"x")
    words = message(checkpoint.open_safetensors, path, error=MachineError)
    assert words == f"{path}: cannot be read: Input/output error"
    monkeypatch.setattr(Path, "open", lambda *_: open(tmp_path / "none" / "x"))  # noqa: SIM115
    assert message(checkpoint.open_safetensors, path).startswith(f"{path}: damaged")


# Weights and their configuration


def test_sizes_are_compared_before_anything_is_allocated(tmp_path):
    tensors = read_tensors(write_tiny_folder(tmp_path))
    family = empty_model().family
    check_sizes(tiny_config(), family, tensors)
    words = f"{tmp_path / 'config.json'}: num_hidden_layers is 3, the weights hold 2 layers"
    assert message(check_sizes, tiny_config(num_hidden_layers=3), family, tensors) == words
    file = tmp_path / "model.safetensors"
    for change, name, stored, wanted in (
        ({"vocab_size": 400}, "embed_tokens.weight", [384, 32], [400, 32]),
        ({"hidden_size": 64}, "embed_tokens.weight", [384, 32], [384, 64]),
        ({"num_attention_heads": 8}, "layers.0.self_attn.q_proj.weight", [64, 32], [128, 32]),
        ({"head_dim": 8}, "layers.0.self_attn.q_proj.weight", [64, 32], [32, 32]),
        ({"num_key_value_heads": 1}, "layers.0.self_attn.k_proj.weight", [32, 32], [16, 32]),
        ({"intermediate_size": 65}, "layers.0.mlp.gate_proj.weight", [64, 32], [65, 32]),
    ):
        assert message(check_sizes, tiny_config(**change), family, tensors) == (
            f"{file}: {name} has shape {stored}, config.json asks for {wanted}"
        )


def test_a_tensor_that_is_missing_is_not_compared(tmp_path):
    folder = write_tiny_folder(tmp_path)
    edit(folder, lambda weights: weights.pop("embed_tokens.weight"))
    check_sizes(tiny_config(), empty_model().family, read_tensors(folder))


def test_names_are_compared_with_the_model(tmp_path):
    folder, model = write_tiny_folder(tmp_path), empty_model()
    names = check_weights(model, read_tensors(folder))
    assert names == {name: name for name, _ in model.named_parameters()}
    edit(folder, lambda weights: (weights.pop(Q), weights.pop("norm.weight"), weights.update(y=A, x=B)))
    assert message(check_weights, model, read_tensors(folder)) == (
        f"{folder}: the weights are not those of config.json: missing {Q}, norm.weight, surplus x, y"
    )


def test_adapters_are_not_weights(tmp_path):
    from pyqemb.model.lora import LoraConfig, add_lora

    folder = write_tiny_folder(tmp_path)
    model = build_decoder(tiny_config())
    add_lora(model, LoraConfig(rank=2))
    before = {name: x.clone() for name, x in model.named_parameters() if ".lora." in name}
    assert before
    load_rows(model, read_tensors(folder))
    assert set(check_weights(model, read_tensors(folder))) == {
        name for name, _ in model.named_parameters() if ".lora." not in name
    }
    expected = tiny_embedder().model.state_dict()
    for name, x in model.named_parameters():
        assert x.equal(before[name] if ".lora." in name else expected[name]), name


def test_rows_are_loaded_in_place(tmp_path):
    folder, model = write_tiny_folder(tmp_path), build_decoder(tiny_config())
    places = {name: x.data_ptr() for name, x in model.named_parameters()}
    load_rows(model, read_tensors(folder))
    expected = tiny_embedder().model.state_dict()
    assert all(x.equal(expected[name]) for name, x in model.state_dict().items())
    assert {name: x.data_ptr() for name, x in model.named_parameters()} == places
    assert checkpoint._finite(read_tensors(folder), Q, slice(1, 3)).equal(expected[Q][1:3])
    edit(folder, lambda weights: weights[Q].view(-1)[:1].fill_(float("nan")))
    assert checkpoint._finite(read_tensors(folder), Q, slice(1, 3)).equal(expected[Q][1:3])
    for call in (load_rows, load_weights):
        assert (
            message(call, model, read_tensors(folder)) == f"{folder / 'model.safetensors'}: {Q} holds NaN or infinity"
        )
    edit(folder, lambda weights: weights.pop(Q))
    with pytest.raises(CheckpointError, match=f"missing {Q}"):
        load_rows(model, read_tensors(folder))


# Writing


def test_the_order_in_a_file():
    stored = {
        name: Stored(dtype, (1,))
        for name, dtype in (
            ("b", torch.float32),
            ("c", torch.bfloat16),
            ("a", torch.float16),
            ("d", torch.float64),
            ("aa", torch.float32),
        )
    }
    assert file_order(stored) == ["d", "aa", "b", "a", "c"]


def test_tensors_are_written_one_at_a_time(tmp_path):
    path = tmp_path / "file"
    stored = {"b": Stored(torch.float32, (2, 3)), "a": Stored(torch.bfloat16, [2])}
    values, seen = {"b": torch.arange(6.0).view(3, 2).T, "a": torch.ones(2, dtype=torch.bfloat16).requires_grad_()}, []

    def tensors():
        for name in ("b", "a"):
            seen.append(path.exists())
            yield values[name]

    digest = stream_safetensors(path, stored, tensors(), {"x": "y"})
    assert seen == [True, True]
    assert digest == checkpoint.sha256(path)
    assert all(load_file(path)[name].equal(values[name]) for name in stored)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert size % 8 == 0
    assert raw[8 : 8 + size].rstrip(b" ") == (
        b'{"__metadata__":{"format":"pt","x":"y"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"a":{"dtype":"BF16","shape":[2],"data_offsets":[24,28]}}'
    )
    for wrong in (A.T.double(), A.T[:1]):
        with pytest.raises(AssertionError, match="b"):
            stream_safetensors(path, stored, iter([wrong]))
    with pytest.raises(ValueError, match="shorter"):
        stream_safetensors(path, stored, iter([values["b"]]))


def test_names_of_any_language_are_written(tmp_path):
    write_safetensors(tmp_path / "file", {"\u00fc": A})
    assert load_file(tmp_path / "file")["\u00fc"].equal(A)
    assert "\u00fc".encode() in (tmp_path / "file").read_bytes()


def test_errors_of_writing_name_the_file(tmp_path):
    path = tmp_path / "absent" / "file"
    assert message(stream_safetensors, path, {}, iter([]), error=MachineError) == (
        f"{path}: cannot be written: No such file or directory"
    )


def test_the_digest_of_a_large_file(tmp_path):
    import hashlib

    content = bytes(range(256)) * (1 << 14) + b"x"  # more than is read at once
    (tmp_path / "file").write_bytes(content)
    assert checkpoint.sha256(str(tmp_path / "file")) == hashlib.sha256(content).hexdigest()
    (tmp_path / "file").write_bytes(b"")
    assert checkpoint.sha256(tmp_path / "file") == hashlib.sha256().hexdigest()


def test_names_in_an_error():
    assert checkpoint._some([]) == "none"
    assert checkpoint._some("edcba") == "a, b, c, d, e"
    assert checkpoint._some("fedcba") == "a, b, c, d, e and 1 more"


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "modules.json"])
def test_a_pipe_is_no_file_of_a_model(tmp_path, file):
    write_tiny_folder(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / file)
    with pytest.raises(CheckpointError, match=rf"{file}: is a device or a pipe; expected a file"):
        Embedder.from_pretrained(tmp_path)
