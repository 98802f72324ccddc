"""The table of promises, made of what tests recorded."""

import importlib.util
import json
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("reliability", Path(__file__).parents[1] / "reliability.py")
reliability = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reliability)

RUN = """<testsuites><testsuite timestamp="2026-01-02T03:04:05">
<testcase classname="tests.data.test_blocks" name="test_a[x]"><properties><property name="R5" value="9 bits"/>
</properties></testcase>
<testcase classname="tests.data.test_blocks" name="test_a[y]"><properties><property name="R5" value="9 bits"/>
</properties></testcase>
<testcase classname="tests.data.test_blocks" name="test_b"><properties><property name="R9" value="2 runs"/>
</properties><failure message="no"/></testcase></testsuite></testsuites>"""


def test_what_passed_is_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(reliability, "STORE", tmp_path / "store.json")
    monkeypatch.setattr(reliability, "PAGE", tmp_path / "page.md")
    (tmp_path / "run.xml").write_text(RUN)
    reliability.main(str(tmp_path / "run.xml"))
    rows = {line.split(" | ")[0]: line for line in (tmp_path / "page.md").read_text().splitlines() if "| R" in line}
    assert len(rows) == len(reliability.PROMISES) == 30
    assert rows["| R5"].endswith("| `data/test_blocks.py` | 9 bits |  | 2026-01-02 |")
    assert rows["| R9"].endswith("| none |  |  |  |")  # its test failed
    # A deep run is another column; what it does not say stays.
    (tmp_path / "deep.xml").write_text(RUN.replace("9 bits", "all bits").replace("01-02T", "01-09T"))
    reliability.main("nowhere.xml", str(tmp_path / "deep.xml"))
    assert "| 9 bits | all bits | 2026-01-09 |" in (tmp_path / "page.md").read_text()
    assert json.loads((tmp_path / "store.json").read_text())["fast"]["R5"]["figures"] == ["9 bits"]


def test_an_unknown_promise_is_named(tmp_path):
    (tmp_path / "run.xml").write_text(RUN.replace("R9", "R99").replace('<failure message="no"/>', ""))
    with pytest.raises(SystemExit, match="test_b records 'R99', which is no promise"):
        reliability.main(str(tmp_path / "run.xml"))


def test_the_page_is_that_of_the_store():
    assert reliability.PAGE.read_text() == reliability.page(json.loads(reliability.STORE.read_text()))
