import json

from pyqemb.cli import main
from pyqemb.data.strict_json import parse
from pyqemb.testing.tiny import write_tiny_folder


def test_prints_a_table_and_writes_the_report(tmp_path, capsys):
    write_tiny_folder(tmp_path / "model")
    (tmp_path / "task").mkdir()
    rows = [{"sentence1": x, "sentence2": x} for x in ("one", "two", "three")]
    (tmp_path / "task" / "bitext.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = main(["evaluate", str(tmp_path / "model"), str(tmp_path / "task"), "--json", str(tmp_path / "report.json")])
    assert code == 0
    assert "accuracy" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["metrics"]["accuracy"]["value"] == 1


def test_a_correlation_that_is_not_defined_is_null(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_folder(tmp_path / "model")
    (tmp_path / "task").mkdir()
    rows = [{"sentence1": x, "sentence2": "two", "score": 1} for x in ("one", "two", "three")]
    (tmp_path / "task" / "sts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["evaluate", "model", "task", "--bootstrap", "5", "--json", "report.json"]) == 0
    said = capsys.readouterr().out
    assert "none" in said
    assert "nan" not in said
    metrics = parse((tmp_path / "report.json").read_bytes(), "report.json")["metrics"]
    assert metrics["spearman"] == {"value": None, "low": None, "high": None}


def test_bad_data_exits_with_3(tmp_path, capsys):
    write_tiny_folder(tmp_path / "model")
    assert main(["evaluate", str(tmp_path / "model"), str(tmp_path / "nowhere")]) == 3
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "sts.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "score": 1}\n')
    assert main(["evaluate", str(tmp_path / "no model"), str(tmp_path)]) in (2, 3)
