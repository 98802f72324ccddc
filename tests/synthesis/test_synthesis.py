"""Synthesis against a server on this machine that writes what it is asked for, or nearly."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from pyqemb.cli import main
from pyqemb.data.example import read_examples
from pyqemb.data.files import locked
from pyqemb.errors import ConfigError, DataError
from pyqemb.synthesis import SynthesisConfig, synthesize

PASSAGES = [
    f"Passage number {i} tells how the bridge of {1800 + i} was built, by whom, and why it still stands."
    for i in range(12)
]
PERSONAS = ["An engineer", "A nurse", "A child", "A historian", "A cook", "A pilot", "A poet"]


def write(messages):
    """What a good model would answer, told by the prompt."""
    prompt = messages[-1]["content"]
    number = re.search(r"Passage number (\d+)", prompt)[1]
    if "question_type:" in prompt:
        offered = re.search(r"   - (\w+):", prompt)[1]
        level = re.search(r"One of: (\w+)", prompt)[1]
        person = re.search(r"People:\n- (.+)", prompt)[1]
        return json.dumps({"Character": person, "Question_Type": offered, "Difficulty": level})
    if "Write the query" in prompt:
        return f'Here it is:\n```json\n{{"query": "bridge question {number}"}}\n```'
    if "Right passage" in prompt:
        return json.dumps({"passage": f"Another bridge, near {number}."})
    if "Translate" in prompt:
        return json.dumps({"translation": f"Übersetzung {number}"})
    if "sentence1" in prompt:
        return json.dumps({"sentence1": f"First {number}.", "sentence2": f"Second {number}."})
    return json.dumps(
        {
            "task": "Classify it",
            "text": f"text {number}",
            "label": "good",
            "wrong_labels": ["bad", "worse", "bad", "worst"],
        }
    )


@pytest.fixture
def server(serve):
    return serve(write)


@pytest.fixture
def settings(tmp_path, server):
    (tmp_path / "passages.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*PASSAGES, PASSAGES[0], "short"])
    )
    (tmp_path / "personas.txt").write_text("\n".join(PERSONAS))
    return {
        "passages": tmp_path / "passages.jsonl", "out": tmp_path / "out",
        "personas": {"file": tmp_path / "personas.txt"},
        "endpoint": {"model": "m", "base_url": server.url, "timeout": 2, "price_in": 1.0, "price_out": 2.0},
    }  # fmt: skip


def test_two_calls_a_passage(settings, server):
    result = synthesize(settings)
    examples = list(read_examples(settings["out"] / "examples.jsonl"))
    assert [e.positive for e in examples] == PASSAGES
    assert [e.query for e in examples] == [f"bridge question {i}" for i in range(12)]
    assert {e.task for e in examples} == {"retrieval"}
    assert all(e.instruction for e in examples)
    assert len(server.seen) == result.usage.asked == 24
    assert not result.malformed
    report = json.loads((settings["out"] / "report.json").read_text())
    assert (report["examples"], report["prompt tokens"], report["cost"]) == (12, 2400, pytest.approx(24 * 120 / 1e6))
    first, second = (
        next(b for b in server.seen if key in b["messages"][1]["content"]) for key in ("People:", "Write the query")
    )
    offered = re.search(r"People:\n((?:- .+\n){5})\n", first["messages"][1]["content"])[1]
    assert len(set(offered.split("\n- "))) == 5
    assert all(p.strip("- \n") in PERSONAS for p in offered.split("\n") if p)
    assert "Language of the query: English" in second["messages"][1]["content"]
    assert first["response_format"]["json_schema"]["schema"]["required"] == ["character", "question_type", "difficulty"]


def test_draws_follow_their_weights_and_the_seed(settings, server):
    wanted = {
        "languages": {"German": 1, "French": 0},
        "types": {"yes_or_no": 1, "keywords": 0},
        "difficulties": {"phd": 3},
        "lengths": {"7 to 9": 1},
    }
    synthesize({**settings, **wanted})
    prompts = [body["messages"][1]["content"] for body in server.seen]
    plans, queries = [p for p in prompts if "People:" in p], [p for p in prompts if "Write the query" in p]
    assert all("- yes_or_no:" in p and "keywords" not in p and "One of: phd." in p for p in plans)
    assert all("in German" in p and "Length: 7 to 9 words" in p and "yes_or_no" in p for p in queries)
    many = {"per_passage": 20, "languages": {"German": 3, "French": 1}}
    before = len(server.seen)
    synthesize({**settings, **many, "out": settings["out"] / "b"})
    drawn = [re.search("Language of the query: (.+)", b["messages"][1]["content"]) for b in server.seen[before:]]
    drawn = [match[1] for match in drawn if match]
    assert len(drawn) == 240
    assert 0.65 < drawn.count("German") / 240 < 0.85
    bodies = sorted(json.dumps(b, sort_keys=True) for b in server.seen[before:])
    before = len(server.seen)
    synthesize({**settings, **many, "out": settings["out"] / "c"})
    assert sorted(json.dumps(b, sort_keys=True) for b in server.seen[before:]) == bodies


def test_every_task_and_hard_negatives(settings):
    tasks = dict.fromkeys(("retrieval", "bitext", "sts", "classification"), 1)
    result = synthesize({**settings, "tasks": tasks, "per_passage": 6, "negatives": 1, "languages": {"German": 1}})
    examples = {e.task: e for e in read_examples(settings["out"] / "examples.jsonl")}
    assert result.examples == 72
    assert set(result.by_task) == set(examples) == set(tasks)
    assert examples["retrieval"].negatives[0].startswith("Another bridge")
    assert examples["bitext"].query in PASSAGES
    assert examples["bitext"].positive.startswith("Übersetzung")
    assert examples["sts"].score in range(6)
    assert examples["sts"].positive.startswith("Second")
    assert examples["classification"].negatives == ("bad", "worse", "worst")
    assert examples["classification"].positive == "good"


def test_malformed_answers_are_counted_asked_again_and_kept(settings, server):
    server.script = ["prose", "ok", "prose", "prose"]  # the first example at its second try; the next not at all
    one = {**settings["endpoint"], "concurrency": 1}
    result = synthesize({**settings, "endpoint": one, "attempts": 2})
    assert result.malformed == {"no JSON": 3}
    assert (result.examples, result.failed) in ((11, 1), (12, 0))
    rows = [json.loads(line) for line in (settings["out"] / "malformed.jsonl").read_text().splitlines()]
    assert {row["text"] for row in rows} == {"I would rather not."}
    assert all(len(row["key"]) == 64 for row in rows)
    asked = len(server.seen)
    again = synthesize({**settings, "endpoint": one, "attempts": 2})
    assert len(server.seen) == asked
    assert again.examples == result.examples
    more = synthesize({**settings, "endpoint": one, "attempts": 3})
    assert more.examples == 12
    assert len(server.seen) == asked + 2 * result.failed


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"query": "word " * 200}, "query too long"),
        ({"query": PASSAGES[0][:60]}, "query copies the passage"),
        ({"queries": "a"}, "query missing"),
    ],
)
def test_queries_that_do_not_count(settings, server, reply, reason):
    server.reply = lambda messages: (
        json.dumps(reply) if "Write the query" in messages[1]["content"] else write(messages)
    )
    result = synthesize({**settings, "limit": 1, "lengths": {"5": 1}})
    assert result.malformed == {reason: 2}
    assert (result.examples, result.failed) == (0, 1)


def test_relevant_personas_are_offered(settings, server, tmp_path):
    from pyqemb.testing.tiny import write_tiny_folder

    write_tiny_folder(tmp_path / "model")
    personas = {"file": tmp_path / "personas.txt", "model": str(tmp_path / "model"), "top": 2}
    synthesize({**settings, "personas": personas, "limit": 3})
    from pyqemb.model.embedder import Embedder

    model = Embedder.from_pretrained(tmp_path / "model")
    scores = model.encode_document(PASSAGES[:3]) @ model.encode_document(PERSONAS).T
    for body in server.seen:
        if found := re.search(r"People:\n- (.+)\n- (.+)\n", body["messages"][1]["content"]):
            number = int(re.search(r"Passage number (\d+)", body["messages"][1]["content"])[1])
            assert list(found.groups()) == [PERSONAS[i] for i in (-scores[number]).argsort()[:2]]
    assert len(list(settings["out"].glob("personas-*.npy"))) == 1


def test_a_killed_job_goes_on_and_asks_nothing_twice(settings, server, tmp_path):
    server.delay = 0.05
    config = tmp_path / "c.toml"
    config.write_text(
        f'passages = "{settings["passages"]}"\nout = "{settings["out"]}"\nper_passage = 4\n'
        f'[endpoint]\nmodel = "m"\nbase_url = "{server.url}"\nconcurrency = 2\n'
    )
    command = [sys.executable, "-m", "pyqemb", "synthesize", str(config)]
    job = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while len(server.seen) < 30 and job.poll() is None:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    time.sleep(0.2)
    before = len(server.seen)
    assert main(["synthesize", str(config)]) == 0
    bodies = [json.dumps(body, sort_keys=True) for body in server.seen]
    repeated = len(bodies) - len(set(bodies))
    assert repeated <= 2, "only what was under way when it was killed is asked again"  # its answers never arrived
    assert len(set(bodies)) == 96
    assert before >= 30
    assert len(list(read_examples(settings["out"] / "examples.jsonl"))) == 48


def test_command_line(settings, tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text(
        f'passages = "{settings["passages"]}"\nout = "{settings["out"]}"\n[endpoint]\nmodel = "m"\nbase_url = '
        f'"{settings["endpoint"]["base_url"]}"\n'
    )
    assert main(["synthesize", str(config), "--limit", "2", "--out", str(tmp_path / "other")]) == 0
    out = capsys.readouterr().out
    assert "2 examples, 0 given up" in out
    assert "4 requests, 0 answers from the store" in out
    assert len(list(read_examples(tmp_path / "other" / "examples.jsonl"))) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tasks": {"rerank": 1}}, ConfigError, "tasks: 'rerank' is none of retrieval"),
        ({"types": {}}, ConfigError, "types: expected at least one name"),
        ({"lengths": {"5": -1}}, ConfigError, "lengths: expected at least one name with a weight above 0"),
        ({"endpoint": {"model": "m", "url": "x"}}, ConfigError, "endpoint.url: unknown key"),
        ({"passages": "nowhere.jsonl"}, DataError, "nowhere.jsonl: no such file"),
        ({"personas": {"file": "nowhere.txt"}}, DataError, "nowhere.txt: no such file"),
        ({"min_characters": 4000}, DataError, "holds no passage of at least 4000 characters"),
    ],
)
def test_bad_settings_are_named_before_anything_is_asked(settings, server, change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        synthesize({**settings, **change})
    assert not server.seen
    assert not settings["out"].exists()


@pytest.mark.promise("R9", "two synthesis jobs in one folder")
def test_two_jobs_do_not_share_a_folder(settings, server):
    with locked(settings["out"], "synthesis"), pytest.raises(ConfigError, match="another synthesis is running here"):
        synthesize(settings)
    assert not server.seen
    synthesize(settings)


def test_a_persona_file_without_personas(settings, tmp_path, server):
    (tmp_path / "personas.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"personas\.txt: holds no personas"):
        synthesize(settings)
    (tmp_path / "p.jsonl").write_text('{"name": "x"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:1: expected a persona under 'persona'"):
        synthesize({**settings, "personas": {"file": tmp_path / "p.jsonl"}})
    assert not server.seen


def test_what_was_written_stays_when_the_server_goes(settings, server):
    synthesize(settings)
    before = (settings["out"] / "examples.jsonl").read_bytes()
    server.close()
    quick = {**settings["endpoint"], "retries": 0, "give_up_after": 2}
    with pytest.raises(DataError, match="does not answer"):
        synthesize({**settings, "seed": 5, "endpoint": quick})
    assert (settings["out"] / "examples.jsonl").read_bytes() == before
    assert SynthesisConfig(**settings).seed == 0
