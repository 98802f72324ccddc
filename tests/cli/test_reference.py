"""What is made from the descriptions of the settings: each key has one, and pages, template, schema and help agree."""

import json
import re

import pytest

from pyqemb.cli import main
from pyqemb.cli.init import _TEMPLATE
from pyqemb.cli.reference import _texts
from pyqemb.cli.schema import SETTINGS, settings_class
from pyqemb.data.settings import StrictModel, read_settings
from pyqemb.data.settings_keys import json_schema, tables
from pyqemb.errors import ConfigError
from pyqemb.llm import Endpoint
from pyqemb.training.config import TrainConfig
from pyqemb.training.objectives.registry import objective_class

REQUIRED = {
    "train": {"model": {"base": "b"}, "data": [{"path": "d"}]},
    "curate": {"input": ["a"], "out": "b", "step": [{"kind": "length"}]},
    "synthesize": {"passages": "p", "out": "o", "endpoint": {"model": "m"}},
}
BESIDE = {  # what a key, or each key of a kind of step, needs beside itself and the required keys of its table
    "loss.matryoshka_weights": "matryoshka = [8, 4, 2, 1]",
    "eval.patience": "every = 1",
    "data.teacher_weight": '[teacher]\nmodel = "m"',
    "relabel": 'endpoint.model = "m"',
}


@pytest.mark.parametrize("verb", SETTINGS)
def test_every_key_and_table_is_described_with_an_example(verb):
    for table in tables(settings_class(verb)):
        assert table.description, table.header
        for key in table.keys:
            assert re.match(r"[A-Z`].*\.$", key.description, re.DOTALL), f"{key.name}: {key.description!r}"
            assert key.example is not None, key.name
            assert key.type != "any value", key.name


def test_a_key_without_a_description_is_found():
    class Bare(StrictModel):
        steps: int = 1

    (table,) = tables(Bare)
    assert table.keys[0].description == ""


def test_every_setting_of_an_objective_is_a_key_of_loss():
    names = {key.last for table in tables(TrainConfig) if table.name == "loss" for key in table.keys}
    for name in ("info_nce", "classification", "cosent", "distillation", "rerank"):
        assert set(objective_class(name).Settings.model_fields) <= names
    assert {key.last for table in tables(Endpoint) for key in table.keys} == set(Endpoint.model_fields)


@pytest.mark.parametrize(("path", "text"), _texts(), ids=lambda value: getattr(value, "name", ""))
def test_what_is_committed_is_what_the_descriptions_make(path, text):
    assert path.read_text(encoding="utf-8") == text, "run: python -m pyqemb.cli.reference"


@pytest.mark.parametrize("verb", SETTINGS)
def test_every_example_is_accepted(verb, tmp_path):
    """By the class and by the schema."""
    validate = _validator(settings_class(verb))
    path = tmp_path / "example.toml"
    for table in tables(settings_class(verb)):
        above = ['[[step]]\nkind = "relabel"'] if table.name == "step.endpoint" else []
        kind = [f'kind = "{table.kind}"', BESIDE.get(table.kind, "")] if table.kind else []
        for key in table.keys:
            needed = [f"{each.last} = {each.example}" for each in table.keys if each is key or each.default is None]
            header = table.header.replace("NAME", "own_hard")
            path.write_text("\n".join([*above, header, *kind, *needed, BESIDE.get(key.name, "")]))
            values = REQUIRED[verb] | read_settings(path)
            settings_class(verb)(**values)
            assert not validate(values), key.name


def _validator(settings):
    """The errors of values as an editor finds them; none where jsonschema is missing."""
    try:
        from jsonschema import Draft202012Validator
    except ModuleNotFoundError:
        return lambda values: []
    schema = json_schema(settings)
    Draft202012Validator.check_schema(schema)
    return lambda values: [error.message for error in Draft202012Validator(schema).iter_errors(values)]


def test_the_schema_takes_the_template_and_refuses_what_the_configuration_refuses(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    out = tmp_path / "schema.json"
    assert main(["schema", "--out", str(out)]) == 0
    validator = jsonschema.Draft202012Validator(json.loads(out.read_text()))
    whole = re.sub(r"^# (?=\[|\w+ = )", "", _TEMPLATE.read_text(), flags=re.MULTILINE).replace("@TASK@", "embedding")
    path = tmp_path / "run.toml"
    path.write_text(whole)
    values = read_settings(path)
    assert not list(validator.iter_errors(values))
    good = [
        {"train": {"lr": 1e-3, "memory": "1.5 GiB"}}, {"train": {"memory": None}}, {"parallel": {"shard": -1}},
        {"loss": {"mrl_dims": [8, 4], "groups": {"own_hard": {"mask": False}}}},
    ]  # fmt: skip
    bad = [
        {"trian": {}}, {"train": {"learning_rat": 1.0}}, {"train": {"learning_rate": 0}}, {"train": {"memory": "lots"}},
        {"train": {"steps": "many"}}, {"parallel": {"shard": 0}}, {"loss": {"preset": "best"}}, {"data": []},
        {"loss": {"groups": {"best": True}}}, {"lora": {"targets": ["head"]}}, {"model": {}}, {"stage": 3},
    ]  # fmt: skip
    minimal = REQUIRED["train"]
    for change in good:
        assert TrainConfig(**minimal | change)
        assert not list(validator.iter_errors(minimal | change)), change
    for change in bad:
        with pytest.raises(ConfigError):
            TrainConfig(**minimal | change)
        assert list(validator.iter_errors(minimal | change)), change


@pytest.mark.parametrize("verb", SETTINGS)
def test_schema_is_printed(verb, capsys):
    assert main(["schema", verb]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, "train.warmup  "),
        ("train", "train.warmup  "),
        ("train.lr", "train.learning_rate: number > 0; default: 1e-5; also called lr"),
        ("warmup", "train.warmup: number >= 0; default: 0.05"),
        ("save.dir", 'example: dir = "runs/run"'),
    ],
)
def test_help_config(wanted, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help-config", *filter(None, [wanted])])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert expected in shown
    assert ("save.keep" in shown) == (wanted is None)


def test_help_config_of_an_unknown_key(capsys):
    assert main(["train", "--help-config", "train.warmpu"]) == 2
    assert "unknown key 'train.warmpu'; did you mean 'train.warmup'?" in capsys.readouterr().err
