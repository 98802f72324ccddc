"""The Python of README.md runs as it stands, on a tiny model and tiny data."""

import json
import re
from pathlib import Path

from pyqemb.testing.tiny import write_tiny_folder

ROOT = Path(__file__).parent.parent


def test_the_ten_lines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny_folder("base")
    rows = [{"query": f"query {i}", "positive": f"document {i * i}"} for i in range(20)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    beir = Path("my-beir-folder")
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text(
        "\n".join(json.dumps({"_id": str(i), "text": r["positive"]}) for i, r in enumerate(rows))
    )
    (beir / "queries.jsonl").write_text('{"_id": "q", "text": "query 3"}\n')
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t3\t1\n")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "value" in capsys.readouterr().out
    assert (tmp_path / "my-model" / "modules.json").is_file()
