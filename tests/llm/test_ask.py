"""Asking a real server on this machine that answers well, slowly, wrongly, or not at all."""

import asyncio
import json
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest
from pydantic import BaseModel

from pyqemb.errors import ConfigError, DataError, MachineError
from pyqemb.llm import Answer, Asker, Endpoint, MalformedAnswerError, Request, Store, parse, run_in_order


def ask_all(server, tmp_path, requests, **settings):
    """[answer or MalformedAnswerError], the asker"""
    options = {"model": "m", "base_url": server.url, "timeout": 1.0, "retries": 3, "max_wait": 0.05, **settings}
    store = Store(tmp_path / "answers.sqlite")

    async def run():
        ask = Asker(Endpoint(**options), store)

        async def one(request):
            try:
                return (await ask(request)).text
            except MalformedAnswerError as error:
                return error.reason

        try:
            return [x async for _, x in run_in_order(requests, one, 100)], ask
        finally:
            await ask.close()
            store.close()

    return asyncio.run(run())


def say(text, seed=0, schema=None):
    return Request((("user", text),), seed, schema)


def echo(messages):
    return messages[-1]["content"].upper()


def test_answers_come_in_order_and_are_asked_once(serve, tmp_path):
    server = serve(echo, delay=0.01)
    requests = [say(f"text {i % 20}") for i in range(40)]
    answers, ask = ask_all(server, tmp_path, requests, concurrency=4)
    assert answers == [f"TEXT {i % 20}" for i in range(40)]
    assert len(server.seen) == ask.usage.asked == 20
    assert 1 < server.most <= 4
    assert (ask.usage.prompt_tokens, ask.usage.completion_tokens) == (2000, 200)
    again, ask = ask_all(server, tmp_path, requests)
    assert again == answers
    assert len(server.seen) == 20
    assert (ask.usage.asked, ask.usage.stored) == (0, 40)
    # Another seed, or another temperature, is another question.
    ask_all(server, tmp_path, [say("text 0", seed=1)])
    ask_all(server, tmp_path, [say("text 0")], temperature=0.1)
    assert len(server.seen) == 22


@pytest.mark.parametrize(
    "trouble", [429, 500, 503, "slow", "silent", "cut", "cut body", "not json", "no choices"], ids=str
)
def test_trouble_is_lived_through(serve, tmp_path, trouble):
    server = serve(echo, script=[trouble, "ok", trouble, trouble])
    answers, ask = ask_all(server, tmp_path, [say("a"), say("b")], concurrency=1)
    assert answers == ["A", "B"]
    assert ask.usage.retries.total() == (0 if trouble == "slow" else 3)


def test_a_request_without_an_answer_is_counted_and_the_rest_goes_on(serve, tmp_path):
    server = serve(echo, script=[500] * 4)
    answers, _ = ask_all(server, tmp_path, [say("a"), say("b")], concurrency=1)
    assert answers == ["no answer: status 500", "B"]
    assert ask_all(server, tmp_path, [say("a")])[0] == ["A"]


def test_a_server_that_never_answers_ends_the_job(serve, tmp_path):
    server = serve(echo, script=["ok"] + ["silent"] * 50)
    ask_all(server, tmp_path, [say("0")])
    with pytest.raises(
        DataError, match=r"does not answer \(no answer: timeout\): 3 requests in a row, each tried 2 times"
    ):
        ask_all(
            server, tmp_path, [say(str(i)) for i in range(9)], timeout=0.1, retries=1, give_up_after=3, concurrency=1
        )
    assert len(Store(tmp_path / "answers.sqlite")) == 1


def test_nobody_there(tmp_path):
    class Nowhere:
        url = "http://127.0.0.1:9/v1"

    with pytest.raises(DataError, match=r"127\.0\.0\.1:9.*does not answer.*connection"):
        ask_all(Nowhere, tmp_path, [say(str(i)) for i in range(20)], give_up_after=2, retries=1)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_told_at_once(serve, tmp_path, status, monkeypatch):
    monkeypatch.setenv("MY_KEY", "wrong")
    server = serve(echo, script=[status] * 9)
    with pytest.raises(ConfigError, match=f"refuses \\(status {status}\\): error {status}"):
        ask_all(server, tmp_path, [say("a")], api_key_env="MY_KEY")
    assert len(server.seen) == 1
    assert server.headers[0]["authorization"] == "Bearer wrong"


def test_a_key_is_wanted_where_no_server_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    class Hosted:
        url = None

    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        ask_all(Hosted, tmp_path, [say("a")])


@pytest.mark.parametrize(
    ("known", "used"),
    [
        (["json_schema"], ["json_schema"] * 2),
        (["json_object"], ["json_schema", "json_object", "json_object"]),
        ([], ["json_schema", "json_object", None, None]),
    ],
)
@pytest.mark.parametrize("status", [400, 422, 500])  # llama.cpp's Python server says 500
def test_structured_output_falls_back_once(serve, tmp_path, known, used, status):
    server = serve(echo, structured=known, unknown=status)
    schema = {"type": "object", "properties": {}}
    assert ask_all(server, tmp_path, [say("a", schema=schema), say("b", schema=schema)], concurrency=1)[0] == ["A", "B"]
    assert [body.get("response_format", {}).get("type") for body in server.seen] == used


def test_a_full_disk_keeps_what_is_stored(tmp_path):
    store = Store(tmp_path / "s" / "answers.sqlite")
    store.put("k", {}, Answer("x"))
    store._connection.execute(f"pragma max_page_count = {store._connection.execute('pragma page_count').fetchone()[0]}")
    with pytest.raises(MachineError, match="full; the answers stored so far are kept"):
        store.put("l", {}, Answer("y" * 100_000))
    assert store.get("k") == Answer("x")
    assert [key for key, _, _ in store] == ["k"]


def test_no_store(tmp_path):
    (tmp_path / "s").write_text("this is not a database, and longer than a header" * 9)
    with pytest.raises(DataError, match="s: cannot be used as a store of answers"):
        Store(tmp_path / "s")


class Reply(BaseModel):
    query: str
    level: int = 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"query": "a"}', "a"),
        ('Sure!\n```json\n{"query": "a"}\n```\nHope it helps {x}', "a"),
        ('<think>{"query": "no"}</think> {"query": "a"} {"query": "b"}', "b"),
        ('{"query": "a"} {"example": "b"}', "a"),
        ('<think>{"query": "no"}', "no JSON"),
        ('{"query": "no"}</think>{"query": "a"}', "a"),
        ('{"query": "no"}</think>', "no JSON"),
        ('<think>x<think>y</think>{"query": "no"}</think>{"query": "a"}', "a"),
        ('<THINKING>{"query": "no"}</THINKING>{"query": "a"}', "a"),
        ('<thought>{"query": "no"}</thought>\n```json\n{"query": "a"}\n```', "a"),
        ('<reflection>{"query": "no"}</reflection>{"query": "a"}', "a"),
        ('<seed:think>{"query": "no"}</seed:think>{"query": "a"}', "a"),
        ('[THINK]{"query": "no"}[/THINK]{"query": "a"}', "a"),
        ('\u25c1think\u25b7{"query": "no"}\u25c1/think\u25b7{"query": "a"}', "a"),
        ('<|begin_of_thought|>{"query": "no"}<|end_of_thought|>{"query": "a"}', "a"),
        ('<|channel>thought\n{"query": "no"}<channel|>{"query": "a"}', "a"),
        ('<|channel|>analysis<|message|>{"query": "no"}', "no JSON"),
        (
            '<|channel|>analysis<|message|>{"query": "no"}<|end|><|channel|>final<|message|>{"query": "a"}',
            "a",
        ),
        ('{"query": "a"} <think>or {"query": "no"}</think>', "a"),
        ('{"query": "what is <think> for"}', "what is <think> for"),
        ('<think>{"query": "</think>"} {"query": "no"}</think>{"query": "a"}', "a"),
        ('{"query": "a", "query": "b"}', "no JSON"),
        ('{"query": "\\ud800"}', "no JSON"),
        ('{broken {"query": "two\nlines"}', "two\nlines"),
        ("", "empty"),
        ("   ", "empty"),
        ("I cannot.", "no JSON"),
        ('{"query": "a', "no JSON"),
        ('["query"]', "no object"),
        ('{"queri": "a"}', "query missing"),
        ('{"query": 3}', "query wrong"),
        ('{"query": "a", "level": "high"}', "level wrong"),
    ],
)
def test_parse(text, expected):
    try:
        found = parse(Answer(text), Reply).query, text
    except MalformedAnswerError as error:
        found = error.reason, error.text
    assert found == (expected, text)


@pytest.mark.parametrize("text", ['{"query": "a', "", '<think>{"query": "no"}', '{"query": "a"} Better: {"query": "b'])
def test_an_answer_that_was_cut_off(text):
    with pytest.raises(MalformedAnswerError, match="cut off"):
        parse(Answer(text, finish="length"), Reply)


@pytest.mark.parametrize("piece", ["{", '{"', '{"a":', '{"a":"', "{ ", "<think", "<|channel|>", '{"a":['])
def test_a_hostile_answer_takes_no_minutes(piece):
    start = time.perf_counter()
    with pytest.raises(MalformedAnswerError):
        parse(Answer(piece * (1_000_000 // len(piece))), Reply)
    assert time.perf_counter() - start < 20


def respond(serve, tmp_path, body, **settings):
    """[the answer or the reason] to one request that the server answers with `body`."""
    server = serve(echo, script=[body] * 9)
    return ask_all(server, tmp_path, [say("a")], retries=1, give_up_after=1, **settings)[0]


def chat(message, finish="stop"):
    return {"choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "b"}], "b"),
        ([], ""),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "content of type image_url"),
        ([{"type": "text"}], "content part without text"),
        (5, "content of type int"),
    ],
)
def test_content_in_parts(serve, tmp_path, content, expected):
    assert respond(serve, tmp_path, chat({"content": content})) == [expected]


@pytest.mark.parametrize(
    "message", [{"content": None, "refusal": "I cannot"}, {"content": [{"type": "refusal", "refusal": "I cannot"}]}]
)
def test_a_refusal_is_malformed_with_its_words(serve, tmp_path, message):
    respond(serve, tmp_path, chat(message))
    ((_, _, answer),) = Store(tmp_path / "answers.sqlite")
    with pytest.raises(MalformedAnswerError, match=r"^refused$") as error:
        parse(answer, Reply)
    assert error.value.text == "I cannot"


def test_thoughts_without_an_answer(serve, tmp_path):
    respond(serve, tmp_path, chat({"content": None, "reasoning_content": "let me think"}, "length"))
    ((_, _, answer),) = Store(tmp_path / "answers.sqlite")
    with pytest.raises(MalformedAnswerError, match="cut off"):
        parse(answer, Reply)


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ({"error": {"message": "No\x1b[1m credits\nleft", "code": 402}}, ConfigError,
         r"refuses \(code 402\): No \[1m credits left"),
        ({"error": "busy"}, DataError, "the server says: busy"),
        ({"object": "error", "message": "busy" * 999}, DataError, r"the server says: (busy)+\.\.\."),
        ({"choices": [{"error": {"message": "upstream", "code": 502}}]}, DataError, "the server says: upstream"),
    ],
)  # fmt: skip
def test_an_error_under_status_200_shows_its_words(serve, tmp_path, body, error, words):
    with pytest.raises(error, match=words):
        respond(serve, tmp_path, body)


@pytest.mark.parametrize("field", ["max_tokens", "seed", "temperature", "top_p"])
def test_a_field_that_the_server_does_not_take_is_named_and_can_be_omitted(serve, tmp_path, field):
    server, schema = serve(echo, unsupported=field), {"type": "object", "properties": {}}
    with pytest.raises(
        ConfigError, match=rf"'{field}'; tried with response_format json_schema, .*omit = \[\"{field}\"\]"
    ):
        ask_all(server, tmp_path, [say("a", schema=schema)])
    assert len(server.seen) == 1
    assert ask_all(server, tmp_path, [say("a", schema=schema)], omit=[field])[0] == ["A"]
    assert field not in server.seen[-1]
    assert server.seen[-1]["response_format"]["type"] == "json_schema"


def test_further_fields_of_the_body(serve, tmp_path):
    server, extra = serve(echo), {"chat_template_kwargs": {"enable_thinking": False}}
    ask_all(server, tmp_path, [say("a")], extra_body=extra)
    assert server.seen[0]["chat_template_kwargs"] == extra["chat_template_kwargs"]
    for name in ("model", "stream", "seed"):
        with pytest.raises(ValueError, match=f"extra_body: {name} cannot be set there"):
            Endpoint(model="m", extra_body={name: 1})
    with pytest.raises(ValueError, match="are for a server"):
        Endpoint(model="m", backend="transformers", omit=["seed"])


def test_an_error_of_a_later_item_is_raised_at_once():
    started, ended = [], []

    async def work(item):
        started.append(item)
        if item == 3:
            raise DataError("the third fails")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(item)

    async def run():
        return [pair async for pair in run_in_order(range(50), work, 10)]

    with pytest.raises(DataError, match="the third fails"):
        asyncio.run(asyncio.wait_for(run(), 30))
    assert len(started) <= 10
    assert ended == [item for item in started if item != 3]


def test_run_in_order_has_no_more_than_its_window_under_way():
    under_way, most = 0, 0

    async def work(item):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001 * (item % 7))
        under_way -= 1
        return -item

    async def run():
        return [pair async for pair in run_in_order(range(50), work, 5)]

    assert asyncio.run(run()) == [(i, -i) for i in range(50)]
    assert most == 5


def test_a_store_that_two_jobs_share(tmp_path):
    one, two = (Store(tmp_path / "answers.sqlite") for _ in "ab")
    one.put("k", {"a": 1}, Answer("x"))
    assert two.get("k") == Answer("x")
    assert two.get("other") is None
    two.put("l", {}, Answer("y"))
    assert len(one) == 2
    assert isinstance(one._connection, sqlite3.Connection)


FLIPS = """
    import random, sys
    from pathlib import Path
    from pyqemb.errors import DataError
    from pyqemb.llm import Answer, Store
    path = Path(sys.argv[1])
    raw, right, refused, lost = path.read_bytes(), 0, 0, 0
    for at in random.Random(0).sample(range(len(raw)), 700):
        for other in path.parent.iterdir():
            other.unlink()
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        try:
            store = Store(path)
            for number in range(40):
                found = store.get(f"key {number}")
                lost += found is None
                right += found is not None
                assert found in (None, Answer(f"answer {number} é" * 5)), found
            for key, request, found in store:
                assert found == Answer(f"answer {request['n']} é" * 5) and key == f"key {request['n']}"
            store.put("new", {}, Answer("x"))
            store.close()
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    print(right, refused, lost)
"""


def test_damage_to_a_store_is_found(tmp_path):
    store = Store(tmp_path / "s" / "answers.sqlite")
    for number in range(40):
        store.put(f"key {number}", {"n": number}, Answer(f"answer {number} é" * 5))
    store.close()
    command = [sys.executable, "-c", textwrap.dedent(FLIPS), str(store.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    right, refused, lost = map(int, done.stdout.split())
    assert right > 0
    assert refused > 0
    assert lost > 0


def test_a_store_without_digests_is_given_them(tmp_path):
    path = tmp_path / "answers.sqlite"
    connection = sqlite3.connect(path)
    connection.execute(
        "create table answers (key text primary key, request text not null, answer text not null) without rowid"
    )
    connection.execute("insert into answers values ('k', '{}', ?)", (json.dumps(Answer("x").row()),))
    connection.commit()
    connection.close()
    one, two = Store(path), Store(path)
    assert one.get("k") == two.get("k") == Answer("x")
    assert [key for key, _, _ in one] == ["k"]
    one._connection.execute("pragma user_version = 3")
    with pytest.raises(DataError, match="has version 3, this version reads 2"):
        Store(path)
