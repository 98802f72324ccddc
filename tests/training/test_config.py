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
    assert config.stage == 1
    assert config.train.learning_rate == 5e-6
    assert config.train.num_negatives == 0
    assert config.train.steps == 7
    assert config.loss.temperature == 0.05


def test_losses_and_memory_from_a_file(tmp_path):
    text = (
        TOML
        + """
memory = "1.5GiB"
skip_gradients = 0.005
documents = "ring"
[loss]
preset = "ms_swift"
softmax = "split"
focal = 0.5
learn_temperature = true
matryoshka = [32, 128]
matryoshka_weights = [0.5, 1]
[loss.groups]
query_query = false
own_hard = { mask = false, hardness = 5.0 }
batch_hard = { margin = -0.05, relative = true }
[loss.tasks]
"my set" = "cosent"
"""
    )
    config = load_config(write(tmp_path, text))
    assert config.train.memory == 3 * 2**29
    assert config.loss.matryoshka == (32, 128)
    assert config.loss.groups["query_query"] is False
    assert config.loss.groups["own_hard"].hardness == 5.0
    assert config.loss.groups["batch_hard"].relative
    assert config.loss.tasks == {"my set": "cosent"}
    sizes = {"12GB": 12 * 10**9, "auto": "auto", 1000: 1000, "500 MB": 5 * 10**8, None: None}
    for given, expected in sizes.items():
        assert stage1(**MINIMAL, train={"memory": given}).train.memory == expected


def test_yaml_numbers_without_a_point(tmp_path):
    text = "model: {base: m}\ndata:\n  - path: d\ntrain: {learning_rate: 5e-6}\n"
    assert load_config(write(tmp_path, text, "run.yaml")).train.learning_rate == 5e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"learning_rat": 1}}, "train.learning_rat: unknown key; did you mean 'learning_rate'"),
        ({"trian": {}}, "trian: unknown key; did you mean 'train'"),
        ({"parallel": {"reshard": "always"}}, "parallel.reshard: .*did you mean 'reshard_after_forward'"),
        ({"parallel": {"shard": True}}, r"^parallel\.shard: expected a number, got True$"),
        ({"train": {"temperature": 0.1}}, "train.temperature: unknown key.*"),
        ({"loss": {"temperature": 0}}, "loss.temperature: .*greater than 0, got 0"),
        ({"loss": {"temperature": float("nan")}}, "loss.temperature"),
        ({"loss": {"preset": "best"}}, "loss.preset"),
        ({"loss": {"matryoshka": []}}, "loss.matryoshka"),
        (
            {"loss": {"matryoshka": [64, 16, 32]}},
            "loss.matryoshka: expected dimensions of at least 1 that rise or fall",
        ),
        ({"loss": {"matryoshka": [8, 8]}}, "loss.matryoshka"),
        ({"loss": {"matryoshka": [8, 4], "matryoshka_weights": [1.0]}}, "matryoshka_weights: expected 2 numbers"),
        ({"loss": {"groups": {"best": True}}}, "loss.groups.best"),
        ({"loss": {"groups": {"own_hard": {"mask": "all"}}}}, "loss.groups.own_hard"),
        ({"loss": {"softmax": "both"}}, "loss.softmax"),
        (
            {"loss": {"groups": {"doc_query": {"mask": "query_document"}}}},
            r"^loss\.groups\.doc_query\.mask: this group has no score of a query and a document; .* 'query_document'$",
        ),
        ({"loss": {"groups": {"query_query": {"mask": "query_document"}}}}, r"^loss\.groups\.query_query\.mask: "),
        (
            {"loss": {"groups": {"own_hard": {"hardness": -50.0}}}},
            r"^loss\.groups\.own_hard\.hardness: expected more than -1 / loss\.temperature, -50; .* got -50\.0$",
        ),
        (
            {"loss": {"learn_temperature": True, "groups": {"own_hard": {"hardness": -1.0}}}},
            r"^loss\.groups\.own_hard\.hardness: .* expected at least 0 with loss\.learn_temperature, got -1\.0$",
        ),
        ({"loss": {"preset": "classification", "tau_plus": 0.1}}, r"^loss\.tau_plus: the negatives .*, got 0\.1$"),
        ({"loss": {"precisions": "binary"}}, r"^loss\.precisions: expected a list, got 'binary'$"),
        ({"train": {"freeze": "norm"}}, r"^train\.freeze: expected a list, got 'norm'$"),
        ({"train": {"freeze": []}}, r"^train\.freeze: expected at least 1, has 0, got \[\]$"),
        ({"teacher": "folder"}, r"^teacher: expected a table, got 'folder'$"),
        ({"task": "rerank", "loss": {"spread_out": 1.0}}, r"^task 'rerank' has no loss\.spread_out$"),
        ({"eval": {"data": "a", "patience": 1}}, r"^eval: patience counts evaluations while training: it needs every$"),
        ({"loss": {"focal": -1}}, "loss.focal: .*greater than or equal to 0, got -1"),
        ({"loss": {"tasks": {"sts": "best"}}}, "loss.tasks.sts"),
        (
            {"train": {"memory": "lots"}},
            "train.memory: expected 'auto', a number of bytes or a size like '12GB', got 'lots'",
        ),
        ({"train": {"memory": 0}}, "train.memory"),
        ({"train": {"memory": "0GB"}}, "train.memory: expected at least one byte, got '0GB'"),
        ({"train": {"skip_gradients": 1.0}}, "train.skip_gradients"),
        ({"train": {"documents": "all"}}, "train.documents"),
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
        ("run.yaml", "model: {base: a}\nmodel: {base: b}\n", "'model' appears twice"),
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
