"""The whole of `pyqemb curate`: files in, files out, nothing lost, memory that does not grow."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest

from pyqemb.cli import main
from pyqemb.curation import CurateConfig, curate
from pyqemb.data.example import Example, read_examples, write_examples
from pyqemb.errors import ConfigError, DataError

EXAMPLES = [
    Example("the first query", "its <b>positive</b>", ("a negative",)), Example("", "empty query"),
    Example("The FIRST query", "its b positive b"), Example("second", "third"), Example("x" * 50, "too long"),
]  # fmt: skip


@pytest.fixture
def config(tmp_path):
    write_examples(tmp_path / "in.jsonl", EXAMPLES)
    (tmp_path / "c.toml").write_text(
        f'input = "{tmp_path}/in.jsonl"\nout = "{tmp_path}/out"\n'
        '[[step]]\nkind = "length"\nmax_query = 40\n[[step]]\nkind = "exact"\n[[step]]\nkind = "exact"\non = "query"\n'
    )
    return tmp_path / "c.toml"


def test_command_line_writes_kept_dropped_and_report(config, tmp_path, capsys):
    assert main(["curate", str(config)]) == 0
    out = tmp_path / "out"
    assert list(read_examples(out / "kept.jsonl")) == [EXAMPLES[0], EXAMPLES[3]]
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert sorted((row["query"], row["dropped_by"], row["reason"]) for row in dropped) == [
        ("", "length", "query shorter than 1"),
        ("The FIRST query", "exact 1", "pair there already"),
        ("x" * 50, "length", "query longer than 40"),
    ]
    report = json.loads((out / "report.json").read_text())
    assert (report["seen"], report["kept"]) == (5, 2)
    assert [step["dropped"] for step in report["steps"]] == [
        {"query shorter than 1": 1, "query longer than 40": 1}, {"pair there already": 1}, {},
    ]  # fmt: skip
    assert report["steps"][0]["settings"] == {"max_query": 40}
    assert sum(row["kept"] for row in report["steps"][0]["histograms"]["query_length"] if "kept" in row) == 3
    page = (out / "report.html").read_text()
    assert "its &lt;b&gt;positive&lt;/b&gt;" in page
    assert "<b>positive" not in page
    assert page.count("<svg") == 2
    assert "2 of 5 examples kept" in page
    assert "kept 2 of 5" in capsys.readouterr().out
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_what_a_killed_run_left_is_removed_and_what_a_running_one_uses_is_not(config, tmp_path):
    config.write_text(config.read_text() + '[[step]]\nkind = "near"\n')
    code = """
import os, signal, sys
import pyqemb.curation.dedup as dedup
from pyqemb.cli import main
dedup.clusters = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(["curate", sys.argv[1]])
"""
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", code, str(config)], check=False).returncode == -9
    killed = {path.name for path in (out / ".work").rglob("*")}
    assert {".lock", "examples.jsonl", "signatures.u32"} < killed

    def second(ledgers):
        used = {path.name for path in (out / ".work").rglob("*")}
        assert used == {".lock"}
        with pytest.raises(ConfigError, match=rf"work: another curation is running here: pid {os.getpid()} on "):
            curate(CurateConfig.from_file(config))
        assert {path.name for path in (out / ".work").rglob("*")} == used

    assert curate(CurateConfig.from_file(config), on_progress=second).kept == 2
    assert sorted(path.name for path in out.iterdir()) == ["dropped.jsonl", "kept.jsonl", "report.html", "report.json"]


def test_nothing_is_replaced_before_all_is_done(config, tmp_path):
    assert main(["curate", str(config)]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "in.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": broken\n')
    assert main(["curate", str(config)]) == 3
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": []}, ConfigError, "step: "),
        ({"step": [{"kind": "lenght"}]}, ConfigError, "lenght"),
        ({"step": [{"kind": "length", "max_qery": 4}]}, ConfigError, "step.0.length.max_qery: unknown key"),
        ({"step": [{"kind": "length", "min_query": 9, "max_query": 4}]}, ConfigError,
         "min_query must not be above max_query, got 9 and 4"),
        ({"step": [{"kind": "similarity"}]}, ConfigError, "step.0.similarity.model: missing"),
        ({"step": [{"kind": "similarity", "model": "m", "min_sim": 0.9, "max_sim": 0.8}]}, ConfigError,
         "min_sim must not be above max_sim"),
        ({"step": [{"kind": "near", "threshold": 0}]}, ConfigError, "threshold: input should be greater than 0, got 0"),
        ({"input": []}, ConfigError, "input: "),
        ({"input": "nowhere.jsonl"}, DataError, "nowhere.jsonl: no such file or folder"),
        ({"colour": 1}, ConfigError, "colour: unknown key"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(tmp_path, change, error, message):
    write_examples(tmp_path / "in.jsonl", EXAMPLES)
    values = {"input": tmp_path / "in.jsonl", "out": tmp_path / "out", "step": [{"kind": "exact"}], **change}
    with pytest.raises(error, match=re.escape(message)):
        curate(values)
    assert not (tmp_path / "out").exists()


def test_several_inputs_and_progress(tmp_path):
    for name in "ab":
        write_examples(tmp_path / name, [Example(f"{name}{i}", "p") for i in range(600)])
    seen = []
    config = CurateConfig(input=[tmp_path / "a", tmp_path / "b"], out=tmp_path / "out", step=[{"kind": "exact"}])
    result = curate(config, on_progress=lambda ledgers: seen.append(ledgers[0].counts.total()))
    assert (result.seen, result.kept, result.dropped) == (1200, 1200, {"exact": {}})
    assert seen == sorted(seen)
    assert seen[-1] == 1200


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(tmp_path):
    program = """
        import resource, sys
        from pyqemb.curation.ledger import Ledger
        from pyqemb.curation.dedup import Exact, Near
        from pyqemb.curation.text import Length
        from pyqemb.data.example import Example
        from pathlib import Path
        def examples(count):
            for i in range(count):
                yield Example(f"query {i}", " ".join(f"w{(i * 7919 + j * j) % 100_003}" for j in range(60)))
        def peak(count):
            ledgers = [Ledger(str(n), work=Path(sys.argv[1])) for n in range(3)]
            stream = examples(count)
            for step, ledger in zip((Length(), Exact(), Near(num_hashes=64)), ledgers):
                stream = step.run(stream, ledger)
            assert sum(1 for _ in stream) > count * 0.9
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        first = peak(10_000)
        print(peak(60_000) - first)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, check=True
    )
    # 50,000 further examples of 400 characters are 20 MB, in Python objects 40; their hashes and places 5. Signatures
    # lie on disk.
    assert int(done.stdout) < 16_000
