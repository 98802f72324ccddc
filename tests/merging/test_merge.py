import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyqemb
from pyqemb.cli import main
from pyqemb.errors import CheckpointError, ConfigError, DataError
from pyqemb.merging.slerp import slerp
from pyqemb.testing.tiny import TEXTS, tiny_embedder


@pytest.fixture
def models(tmp_path):
    """Three models around a base, as fine-tuning leaves them."""
    base = tiny_embedder(seed=0)
    base.save_pretrained(tmp_path / "base")
    for number, name in enumerate("abc", start=1):
        model = tiny_embedder(seed=0)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path / name)
    return tmp_path


def edit(folder, change):
    """Change the tensors of a model behind the back of its digests."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "pyqemb.json").unlink()


@pytest.mark.promise("R29", "slerp of two models")
def test_merged_folder_is_a_model_between_its_parts(models):
    report = pyqemb.merge([models / "a", models / "b"], weights=[1, 3], out=models / "out")
    a, b, out = (load_file(models / name / "model.safetensors") for name in ("a", "b", "out"))
    assert out.keys() == a.keys() == {tensor.name for tensor in report.tensors}
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, slerp(a[name], b[name], 0.75).tensor)
    vectors = pyqemb.Embedder.from_pretrained(models / "out").encode(TEXTS)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert json.loads((models / "out" / "merge_report.json").read_text())["weights"] == [0.25, 0.75]
    assert json.loads((models / "out" / "pyqemb.json").read_text())["provenance"]["merged"]["method"] == "slerp"
    assert report.max_angle > 0


@pytest.mark.parametrize("method", ["slerp", "linear", "karcher"])
def test_all_weight_on_one_gives_that_one(models, method):
    pyqemb.merge([models / x for x in "abc"], method, weights=[0, 1, 0], out=models / "out")
    vectors = [pyqemb.Embedder.from_pretrained(models / name).encode(TEXTS) for name in ("b", "out")]
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-6


def test_base_blends_the_differences(models):
    pyqemb.merge([models / "a", models / "b"], base=models / "base", out=models / "out")
    base, a, b, out = (load_file(models / name / "model.safetensors") for name in ("base", "a", "b", "out"))
    name = "layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(out[name], base[name] + slerp(a[name] - base[name], b[name] - base[name], 0.5).tensor)


def test_dtype_of_the_first_is_kept(models):
    tiny_embedder(seed=1).save_pretrained(models / "narrow", dtype=torch.bfloat16)
    pyqemb.merge([models / "narrow", models / "a"], out=models / "out")
    assert {t.dtype for t in load_file(models / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_rounded_models_are_merged_from_their_float32_weights(models):
    """As long as those are what the model was rounded from."""
    base, a, b = (load_file(models / name / "model.safetensors") for name in ("base", "a", "b"))
    for run, exact in (("a", a), ("b", b)):
        model = pyqemb.Embedder.from_pretrained(models / run)
        model.save_pretrained(models / run / "final", dtype=torch.bfloat16, provenance={"step": 3})
        checkpoint = models / run / "checkpoints" / "step_00000003"
        checkpoint.mkdir(parents=True)
        stored = {f"model.{name}": tensor for name, tensor in exact.items()}
        if run == "a":
            stored["model.norm.weight"] = exact["norm.weight"] + 1  # of another model, it seems
        save_file(stored, checkpoint / "model.safetensors")
    pyqemb.merge([models / "a" / "final", models / "b" / "final"], base=models / "base", out=models / "out")
    a["norm.weight"] = a["norm.weight"].bfloat16().float()
    for name, tensor in load_file(models / "out" / "model.safetensors").items():
        expected = base[name] + slerp(a[name] - base[name], b[name] - base[name], 0.5).tensor
        assert torch.equal(tensor, expected.bfloat16()), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "slurp"}, "must be one of slerp, linear, karcher, got 'slurp'; did you mean 'slerp'"),
        ({"weights": [1]}, "one for each of the 2 checkpoints is needed, got 1"),
        ({"weights": [0, 0]}, "not all zero"),
        ({"weights": [1, -1]}, "not negative"),
        ({"weights": [1, float("nan")]}, "finite"),
        ({"checkpoints": ["a"]}, "two or more"),
        ({"out": "a"}, "is one of the checkpoints"),
        ({"out": "."}, "not a model folder"),
        ({"checkpoints": ["a", "wide"]}, "wide: intermediate_size is 96, 64"),
        ({"checkpoints": ["a", "both ways"]}, "is_causal"),
        ({"checkpoints": ["a", "mean"]}, "pooling is 'mean', 'last'"),
    ],
)
def test_what_does_not_fit_is_refused(models, options, message):
    tiny_embedder(intermediate_size=96).save_pretrained(models / "wide")
    tiny_embedder(is_causal=False).save_pretrained(models / "both ways")
    tiny_embedder(pooling="mean").save_pretrained(models / "mean")
    options = {"checkpoints": ["a", "b"], "out": "out", **options}
    folders, out = [models / name for name in options.pop("checkpoints")], models / options.pop("out")
    with pytest.raises(ConfigError, match=message):
        pyqemb.merge(folders, out=out, **options)
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), r"missing \['norm.weight'\]"),
        (lambda t: t.update(extra=torch.zeros(1)), r"surplus \['extra'\]"),
        (lambda t: t.update({"norm.weight": torch.zeros(7)}), "norm.weight has shape"),
        (lambda t: t["norm.weight"].fill_(torch.nan), "norm.weight holds NaN"),
        (lambda t: t["layers.1.mlp.up_proj.weight"].neg_(), "layers.1.mlp.up_proj.weight: .*opposite"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_left(models, change, message):
    shutil.copytree(models / "a", models / "bad")
    edit(models / "bad", change)
    with pytest.raises(CheckpointError, match=message):
        pyqemb.merge([models / "a", models / "bad"], out=models / "out")
    assert not (models / "out").exists()
    assert not list(models.glob(".*"))


def test_streams(models, tmp_path):
    """The peak of a merge is a few tensors, not the models."""
    import tracemalloc

    big = {"vocab_size": 60000}
    for seed, name in enumerate(("big a", "big b")):
        tiny_embedder(seed=seed, num_hidden_layers=1, **big).save_pretrained(models / name)
    tracemalloc.start()
    pyqemb.merge([models / "big a", models / "big b"], out=models / "out")
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()


def test_command_line(models, capsys):
    folders = [str(models / name) for name in "abc"]
    assert (
        main(["merge", *folders, "--method", "karcher", "--weights", "1", "2", "1", "--out", str(models / "out")]) == 0
    )
    out = capsys.readouterr().out
    assert "angles up to" in out
    assert "karcher of a 0.250, b 0.500, c 0.250" in out
    assert main(["merge", folders[0], str(models / "none"), "--out", str(models / "x")]) in (2, 3)
    assert "none" in capsys.readouterr().err
    assert main(["merge", *folders, "--method", "sphere", "--out", str(models / "x")]) == 2


def test_missing_folder(models):
    with pytest.raises(DataError, match="nowhere"):
        pyqemb.merge([models / "a", models / "nowhere"], out=models / "out")


def test_models_of_the_same_name_are_told_apart(models, capsys):
    for name in ("a", "b"):
        (models / f"run {name}").mkdir()
        (models / name).rename(models / f"run {name}" / "final")
    folders = [str(models / f"run {name}" / "final") for name in ("a", "b")]
    assert main(["merge", *folders, "--out", str(models / "out")]) == 0
    assert f"slerp of {folders[0]} 0.500, {folders[1]} 0.500" in capsys.readouterr().out
