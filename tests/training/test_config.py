import pytest

from pyqemb.errors import ConfigError
from pyqemb.training.config import load_config, stage1, stage2

MINIMAL = {"model": {"base": "m"}, "data": [{"path": "d.jsonl"}]}


def write(folder, text, name="run.toml"):
    path = folder / name
    path.write_text(text)
    return path


TOML = 'stage = 1\n[model]\nbase = "m"\n[[data]]\npath = "d.jsonl"\n[train]\nlr = 5e-6\n'


def test_stages_differ_and_files_override(tmp_path):
    assert stage1(**MINIMAL).train.num_negatives == 0 < stage2(**MINIMAL).train.num_negatives
    config = load_config(write(tmp_path, TOML), ["train.steps=7", "loss.temperature=0.05"])
    assert config.stage == 1 and config.train.learning_rate == 5e-6 and config.train.num_negatives == 0
    assert config.train.steps == 7 and config.loss.temperature == 0.05


def test_yaml_numbers_without_a_point(tmp_path):
    text = "model: {base: m}\ndata:\n  - path: d\ntrain: {learning_rate: 5e-6}\n"
    assert load_config(write(tmp_path, text, "run.yaml")).train.learning_rate == 5e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"learning_rat": 1}}, "train.learning_rat: unknown key; did you mean 'learning_rate'"),
        ({"trian": {}}, "trian: unknown key; did you mean 'train'"),
        ({"train": {"temperature": 0.1}}, "train.temperature: unknown key.*"),
        ({"loss": {"temperature": 0}}, "loss.temperature: .*greater than 0, got 0"),
        ({"loss": {"temperature": float("nan")}}, "loss.temperature"),
        ({"loss": {"preset": "best"}}, "loss.preset"),
        ({"loss": {"matryoshka": []}}, "loss.matryoshka"),
        ({"train": {"global_batch_size": 0}}, "train.global_batch_size"),
        ({"train": {"lr": 1.0, "learning_rate": 1.0}}, "give one of them"),
        ({"train": {"device": "tpu"}}, "train.device"),
        ({"model": {}}, "model.base: missing"),
        ({"data": []}, "data"),
        ({"stage": 3}, "stage"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        stage2(**{**MINIMAL, **changes}) if "stage" not in changes else type(stage2(**MINIMAL))(
            **{**MINIMAL, **changes}
        )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.toml", "a = ", "run.toml"),
        ("run.yaml", "model: {base: a}\nmodel: {base: b}\n", "'model' is there twice"),
        ("run.yaml", "- 1\n", "expected sections"),
        ("run.yaml", "!!python/object/apply:os.system ['true']", "run.yaml"),
        ("run.txt", "", "expected a .toml"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text, name))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml")


def test_bad_overrides(tmp_path):
    path = write(tmp_path, TOML)
    for override, message in (("train.steps", "expected section.key=value"), ("train.stepz=1", "did you mean 'steps'")):
        with pytest.raises(ConfigError, match=message):
            load_config(path, [override])


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        stage1(**MINIMAL).stage = 2
