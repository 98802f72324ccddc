"""Files of settings: what can be wrong is one line that names the file, and exit code 2."""

import numpy as np
import pytest

from pyqemb.cli import main
from pyqemb.curation.config import CurateConfig
from pyqemb.errors import ConfigError
from pyqemb.synthesis.config import SynthesisConfig
from pyqemb.training.config import load_config, stage2

LOADERS = {"train": load_config, "curate": CurateConfig.from_file, "synthesize": SynthesisConfig.from_file}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = [
    ("x.toml", b"seed = " + b"9" * 5000),
    ("x.toml", b"seed = 1" + b"0" * 30),
    ("x.toml", b"seed = " + b"[" * 100_000),
    ("x.toml", b"[" + b".".join([b"a"] * 5000) + b"]"),
    ("x.toml", b"seed = 2026-01-01"),
    ("x.toml", b"seed = 2026-01-01T10:00:00Z"),
    ("x.toml", b"seed = nan"),
    ("x.toml", b"seed = -inf"),
    ("x.toml", b"seed = 1e999"),
    ("x.toml", b"seed = 1\nseed = 2"),
    ("x.toml", b"\xff\xfe"),
    ("x.toml", b"# " + b"x" * (2 << 20)),
    ("x.yaml", b"seed: " + b"9" * 5000),
    ("x.yaml", b"seed: " + b"[" * 5000),
    ("x.yaml", b"seed: 2026-01-01"),
    ("x.yaml", b"seed: 2026-13-45"),
    ("x.yaml", b"seed: .inf"),
    ("x.yaml", b"1: a"),
    ("x.yaml", b"? [a, b]\n: c"),
    ("x.yaml", b"a: 1\na: 2"),
    ("x.yaml", b"a:\n\t- b"),
    ("x.yaml", b"a: &a [*a]"),
    ("x.yaml", b"- 1"),
    ("x.yaml", b""),
    ("x.yaml", b"a: 1\n---\nb: 2"),
    ("x.yaml", b"a: !!bool x"),
    ("x.yaml", b"a: !!timestamp x"),
    ("x.yaml", b"a: !!set {b}"),
    ("x.yaml", b"a: !!binary aGk="),
    ("x.yaml", b"a: !!python/name:os.system"),
    ("x.yaml", BOMB.encode()),
    ("x.yaml", MERGES.encode()),
    ("x.yaml", b"\x00"),
    ("x.json", b'{"seed": 1, "seed": 2}'),
    ("x.json", b'{"seed": NaN}'),
    ("x.json", b"[]"),
    ("x.ini", b""),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_files(tmp_path, number, capsys):
    name, content = BAD[number]
    path = tmp_path / name
    path.write_bytes(content)
    for verb, load in LOADERS.items():
        with pytest.raises(ConfigError, match=name) as error:
            load(path)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 900
        assert main([verb, str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_byte_order_mark_is_skipped(tmp_path):
    for name, text in (
        ("a.toml", '[model]\nbase = "m"\n[[data]]\npath = "d"\n'),
        ("a.yaml", "model: &m {base: m}\ndata: [{path: d}]\n"),
        ("a.json", '{"model": {"base": "m"}, "data": [{"path": "d"}]}'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert load_config(tmp_path / name).model.base == "m"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"steps": True}, "steps: expected a number, got True"),
        ("train", {"batch_size": True}, "global_batch_size: expected a number, got True"),
        ("train", {"learning_rate": False}, "learning_rate: expected a number"),
        ("train", {"betas": [0.9, True]}, "betas: expected a number"),
        ("train", {"memory": True}, "memory: expected a number"),
        ("train", {"steps": 10**30}, "steps: expected a number of at most 64 bits, got an integer of 100 bits"),
        ("loss", {"matryoshka": [True]}, "matryoshka: expected a number"),
        ("eval", {"every": True}, "every: expected a number"),
        ("train", {"betas": np.array([0.9, 0.99])}, "betas: expected text, a number, true or false, a list or a table"),
        ("train", {"optimizer": np.array(["lion", "adamw"])}, "optimizer: expected text, a number"),
        ("train", {"freeze": {"norm"}}, "freeze: expected text, a number, true or false, a list or a table"),
        ("train", {"freeze": iter(["norm"])}, "freeze: expected text, a number, true or false, a list or a table"),
        ("loss", {"groups": {5: True}}, "groups: expected text, a number, .* with names as keys, got {5: True}"),
        ("loss", {"groups": {"own_hard": 1}}, "groups: expected true or false, not a number"),
        ("loss", {"groups": {"own_hard": {"mask": 0}}}, "mask: expected true or false, not a number, got 0"),
    ],
)
def test_values_are_not_converted(section, values, message):
    with pytest.raises(ConfigError, match=message) as error:
        stage2(model={"base": "m"}, data=[{"path": "d"}], **{section: values})
    assert "\n" not in str(error.value)


def test_a_stage_is_no_truth_value():
    with pytest.raises(ConfigError, match="stage: expected a number, got True"):
        type(stage2(model={"base": "m"}, data=[{"path": "d"}]))(stage=True, model={"base": "m"}, data=[{"path": "d"}])
    with pytest.raises(ConfigError, match="ngram: expected a number"):
        CurateConfig(input="a", out="b", step=[{"kind": "decontaminate", "folders": ["c"], "ngram": True}])


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 3000, "2026-01-01", ".nan", "!!bool x", "1" + "0" * 30, "a: b: c"])
def test_bad_overrides(tmp_path, value):
    (tmp_path / "run.toml").write_text('[model]\nbase = "m"\n[[data]]\npath = "d"\n')
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.toml", [f"train.steps={value}"])
    assert "\n" not in str(error.value)


def test_a_wrong_item_of_a_list_is_one_error(tmp_path):
    (tmp_path / "x.toml").write_text('[model]\nbase = "b"\n[[data]]\npath = "p"\nweigth = 1\n')
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "x.toml")
    assert str(caught.value).endswith("x.toml: data.0.weigth: unknown key; did you mean 'weight'?")
    (tmp_path / "x.toml").write_text('[model]\nbase = "b"\n[train]\nseed = -1\n[[data]]\nsplit = "train"\n')
    with pytest.raises(ConfigError, match=r"x\.toml: data\.0\.path: missing; train\.seed: [^;]*$"):
        load_config(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_text('data = []\n[model]\nbase = "b"\n')
    with pytest.raises(ConfigError, match=r"x\.toml: data: "):
        load_config(tmp_path / "x.toml")


@pytest.mark.parametrize("verb", LOADERS)
def test_a_file_that_is_not_there_is_named_once(tmp_path, verb):
    with pytest.raises(ConfigError) as caught:
        LOADERS[verb](tmp_path / "none.toml")
    assert str(caught.value) == f"{tmp_path}/none.toml: cannot be read: No such file or directory"
