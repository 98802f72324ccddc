import json

from pyqemb.cli import main
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


def test_bad_data_exits_with_3(tmp_path, capsys):
    write_tiny_folder(tmp_path / "model")
    assert main(["evaluate", str(tmp_path / "model"), str(tmp_path / "nowhere")]) == 3
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "sts.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "score": 1}\n')
    assert main(["evaluate", str(tmp_path / "no model"), str(tmp_path)]) in (2, 3)
