"""The template of run.toml knows every key; doctor tells the truth; completion is a script."""

import json
import re
import subprocess
import sys

import pytest
import torch
from pydantic import BaseModel

from pyqemb.cli import VERBS, main
from pyqemb.cli.init import _TEMPLATE
from pyqemb.training import load_config
from pyqemb.training.config import LoraSection, TrainConfig

SAMPLE = {"GroupSection"}


def test_the_template_is_a_run(tmp_path, capsys):
    assert main(["init", str(tmp_path / "new"), "--model", 'a"b', "--task", "rerank"]) == 0
    path = tmp_path / "new" / "run.toml"
    config = load_config(path)
    assert config.model.base == 'a"b'
    assert config.task == "rerank"
    assert main(["init", str(tmp_path / "new")]) == 2
    assert "run.toml: exists already; remove it, or give another folder" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "other")]) == 0
    plain = load_config(tmp_path / "other" / "run.toml")
    defaults = TrainConfig(model={"base": "Qwen/Qwen3-0.6B-Base"}, data=[{"path": "pairs.jsonl"}])
    assert plain == defaults  # what it sets are the defaults


def test_every_key_is_in_it_and_is_a_key(tmp_path):
    text = re.sub(r"^# (?=\[|\w+ = )", "", _TEMPLATE.read_text(), flags=re.MULTILINE)
    path = tmp_path / "run.toml"
    path.write_text(text.replace("@TASK@", "embedding").replace("@MODEL@", "base"))
    config = load_config(path)
    assert isinstance(config.lora, LoraSection)
    sections = {
        name: value[0] if isinstance(value, tuple) else value
        for name, value in config
        if not isinstance(value, str | int)
    }
    for name, section in sections.items():
        assert isinstance(section, BaseModel), name
        keys = {key for key, field in type(section).model_fields.items() if not field.exclude}  # rows: from Python
        assert keys == section.model_fields_set, name
    # What is commented out stands at its default, unless the default is that it is absent.
    required = {
        "model": {"base": "base"},
        "data": [{"path": "pairs.jsonl"}],
        "teacher": {"model": config.teacher.model},
        "guide": {"model": config.guide.model},
    }
    defaults = TrainConfig(**required, lora={})
    for name, section in sections.items():
        usual = getattr(defaults, name)
        usual = usual[0] if isinstance(usual, tuple) else usual
        for key in type(section).model_fields:
            if getattr(usual, key) is not None:
                assert getattr(section, key) == getattr(usual, key), f"{name}.{key}"


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.replace("│", " ").split())
    assert "attention, head_dim 128" in words
    assert "FAILED" not in shown
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["facts"]["threads"] == torch.get_num_threads()
    assert len(report["self-test"]) >= 4
    assert all(test["passed"] for test in report["self-test"])


def test_doctor_names_the_kernels_of_hopper(monkeypatch, capsys):
    monkeypatch.setattr("pyqemb.ops.cuda_is_built", lambda: True)
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert facts["kernels on Hopper"].startswith("those of sm_80 (auto: Hopper's own kernels have not passed")


def test_doctor_tests_what_hopper_has_kernels_for(monkeypatch):
    """On a GPU attention, info_nce and top_k get half types, and the first two run backward too."""
    from pyqemb import ops
    from pyqemb.cli import doctor

    def spy(name):
        real = getattr(ops, name)

        def call(first, *args, **options):
            seen.add((name, first.dtype, first.requires_grad))
            return real(first, *args, **options)

        monkeypatch.setattr(ops, name, call)

    seen = set()
    for name in ("varlen_attention", "info_nce", "top_k"):
        spy(name)
    move = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, to: self if to == "cuda" else move(self, to))
    tests = doctor._tests_on("cuda", "cuda")
    assert all(test["passed"] for test in tests), tests
    assert seen == {
        ("varlen_attention", torch.bfloat16, True),
        ("info_nce", torch.float32, True),
        ("info_nce", torch.bfloat16, True),
        ("top_k", torch.bfloat16, False),
    }


def test_doctor_gives_up_on_a_kernel_that_hangs(monkeypatch):
    from pyqemb.cli import doctor

    monkeypatch.setattr(doctor, "_TIMEOUT", 0.1)
    assert doctor._tests_in_a_process("80") == [
        {"name": "cuda, kernels of sm_80", "passed": False, "detail": "no answer within 0.1 s"}
    ]


def test_doctor_finds_a_broken_kernel(monkeypatch, capsys):
    from pyqemb import ops

    real = ops.top_k
    monkeypatch.setattr(ops, "top_k", lambda q, d, k: (real(q, d, k)[0] + 1, None))
    monkeypatch.setattr(ops, "last_token_pool", lambda *_: 1 / 0)
    assert main(["doctor", "--json"]) == 1
    broken = {t["name"]: t["detail"] for t in json.loads(capsys.readouterr().out)["self-test"] if not t["passed"]}
    assert set(broken) >= {"top-k, cpu", "pooling, cpu"}
    assert "ZeroDivisionError" in broken["pooling, cpu"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS)
    assert "rows-per-part" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_every_verb_explains_itself_quickly():
    code = (
        "import sys, pyqemb.cli as c; [c.import_module(f'pyqemb.cli.{v}') for v in c.VERBS]; c.whole_parser(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
