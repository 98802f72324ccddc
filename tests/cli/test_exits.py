"""How commands end: exit codes, one line for an error, signals, a closed or full standard output."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyqemb import cli
from pyqemb.cli import exits, main
from pyqemb.cli.exits import EXIT_CODES
from pyqemb.errors import ConfigError
from pyqemb.testing.tiny import write_tiny_folder

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exits")
    write_tiny_folder(folder / "model")
    rows = [
        {"query": f"query {i}", "positive": f"passage {i} " * 20, "text": f"passage {i} " * 20} for i in range(4000)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "curate.toml").write_text('input = ["rows.jsonl"]\nout = "c"\n[[step]]\nkind = "exact"\n')
    endpoint = '[endpoint]\nmodel = "m"\nbase_url = "http://127.0.0.1:9/v1"\n'
    (folder / "synthesize.toml").write_text(f'passages = "rows.jsonl"\nout = "s"\n{endpoint}')
    return folder


def ended(monkeypatch, capsys, error, *arguments):
    """(exit code, standard error) of a command that raises `error`."""

    def run(_):
        raise error

    monkeypatch.setattr("pyqemb.cli.init.run", run)
    return main(["init", *arguments]), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("a\nb\x1b[31m"), 2, r"pyqemb init: a\nb\x1b[31m"),
        (OSError(errno.ENOSPC, "No space left on device"), 74, "pyqemb init: No space left on device"),
        (PermissionError(errno.EACCES, "x", "/a/b"), 74, "pyqemb init: /a/b: Permission denied"),
        (MemoryError(), 74, "pyqemb init: out of memory"),
        (RuntimeError("CUDA out of memory. Tried"), 74, "pyqemb init: out of memory: CUDA out of memory. Tried"),
        (KeyboardInterrupt(), 130, "pyqemb init: stopped by SIGINT; outputs are written in full or not at all"),
    ],
)
def test_an_error_is_one_line(monkeypatch, capsys, error, code, line):
    assert ended(monkeypatch, capsys, error) == (code, line + "\n")
    again, text = ended(monkeypatch, capsys, error, "--debug")
    assert again == code
    assert text.startswith("Traceback")
    assert text.endswith(line + "\n")


def test_a_fault_of_pyqemb_names_its_place(monkeypatch, capsys):
    monkeypatch.setattr("pyqemb.cli.init.json", None, raising=False)
    monkeypatch.setattr("pyqemb.cli.init._TEMPLATE", None)
    code, text = main(["init", "nowhere"]), capsys.readouterr().err
    assert code == 1
    assert re.fullmatch(
        r"pyqemb init: internal error: AttributeError: .* \(pyqemb/cli/init\.py:\d+\); --debug shows the traceback\n",
        text,
    )


def test_debug_stands_before_or_after_the_verb(capsys):
    for arguments in (["--debug", "evaluate", "nowhere", "x"], ["evaluate", "nowhere", "x", "--debug"]):
        assert main(arguments) == 3
        assert "Traceback" in capsys.readouterr().err


def test_help_and_page_list_every_code(capsys, request):
    with pytest.raises(SystemExit):
        main(["--help"])
    text, page = capsys.readouterr().out, (request.config.rootpath / "docs/how-to/exit-codes.md").read_text()
    for code, meaning in EXIT_CODES.items():
        assert re.search(rf"^ +{code}  {re.escape(meaning)}", text, re.MULTILINE)
        assert f"\n| {code} | " in page


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "pyqemb", *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        **options
    )  # fmt: skip


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_or_closed_standard_output(buffered):
    with open("/dev/full", "w") as full:
        process = command("completion", "bash", stdout=full)
        assert (
            process.communicate()[1]
            == "pyqemb completion: standard output: cannot be written: No space left on device\n"
        )
        assert process.returncode == 74
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": buffered}
    result = subprocess.run(
        [sys.executable, "-m", "pyqemb", "completion", "bash"], stdout=writer, stderr=subprocess.PIPE, env=environment
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.parametrize(
    "arguments",
    [
        ["init", "{out}"],
        ["encode", "model", "rows.jsonl", "--out", "{out}/x.npy"],
        ["encode", "model", "rows.jsonl", "--out", "{out}/x.parquet"],
        ["mine", "model", "rows.jsonl", "--out", "{out}/x.jsonl"],
        ["merge", "model", "model", "--out", "{out}/m"],
        ["export", "model", "--out", "{out}/m"],
        ["evaluate", "model", "beir", "--json", "{out}/x.json"],
        ["rerank", "model", "rows.jsonl", "--out", "{out}/x.jsonl"],
        ["demo", "--quick", "--out", "{out}/d"],
        ["curate", "curate.toml", "--out", "{out}/c"],
        ["synthesize", "synthesize.toml", "--out", "{out}/s"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_output_that_cannot_be_written(folder, monkeypatch, capsys, arguments):
    monkeypatch.chdir(folder)
    assert main([argument.format(out="/proc/none") for argument in arguments]) == 74
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "/proc/none" in text
    assert "cannot be written" in text


def test_a_file_size_limit_leaves_nothing_behind(folder, tmp_path):
    import resource

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    shutil.copytree(folder / "model", tmp_path / "m")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    process = command("export", folder / "model", "--out", tmp_path / "m", stdout=subprocess.PIPE, preexec_fn=limit)
    _, text = process.communicate()
    assert process.returncode == 74
    assert text == f"pyqemb export: {tmp_path}/m/model.safetensors: cannot be written: File too large\n"
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def wait_for(condition, process):
    end = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, process.communicate()
        time.sleep(0.02)


@pytest.mark.promise("R8", "signals while modules are imported")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_during_imports(folder, number):
    process = command("mine", "model", "rows.jsonl", "--out", "x.jsonl", cwd=folder, stdout=subprocess.PIPE)
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert text == f"pyqemb mine: stopped by {number.name}; nothing is kept; --cache keeps the vectors\n"
    assert not (folder / "x.jsonl").exists()


@pytest.mark.promise("R8", "signals to a job with worker processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_a_job_with_worker_processes(folder, tmp_path, number):
    out = tmp_path / "x.npy"
    arguments = [
        "encode",
        folder / "model",
        folder / "rows.jsonl",
        "--out",
        out,
        "--processes",
        2,
        "--rows-per-part",
        8,
    ]
    process = command(*arguments, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for((tmp_path / "x.npy.parts" / "00000003.npy").exists, process)
    # Ctrl-C reaches the whole group, `kill PID` one process.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    words = f"finished parts are in {out}.parts; the same command continues from there"
    assert text == f"pyqemb encode: stopped by {number.name}; {words}\n"
    end = time.monotonic() + 10
    while session(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not session(process.pid)


@pytest.mark.promise("R8", "signals while a server is asked")
@pytest.mark.parametrize("verb", ["curate", "synthesize"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_a_server_is_asked(serve, tmp_path, verb, number):
    server = serve(delay=5.0)
    rows = [{"query": f"q {i}", "positive": f"positive {i}" * 9, "negatives": [f"n {i}"]} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    step = '[[step]]\nkind = "relabel"\n[step.endpoint]'
    head = {
        "curate": f'input = ["{tmp_path}/rows.jsonl"]\nout = "{tmp_path}/out"\n{step}',
        "synthesize": f'passages = "{tmp_path}/rows.jsonl"\nout = "{tmp_path}/out"\n[endpoint]',
    }
    (tmp_path / "c.toml").write_text(f'{head[verb]}\nmodel = "m"\nbase_url = "{server.url}"\n')
    process = command(verb, tmp_path / "c.toml", stdout=subprocess.DEVNULL)
    wait_for(lambda: server.seen, process)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert text.count("\n") == 1
    assert text.startswith(f"pyqemb {verb}: stopped by {number.name}; ")
    assert not [path for path in (tmp_path / "out").glob("[!.]*") if ".sqlite" not in path.name]


def session(number):
    """The processes of a session."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, _, owner = file.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == number and state != "Z":
            found.append(int(name))
    return found


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with exits.StopSignals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cli.KEPT


def test_bad_arguments_show_no_progress_bar(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    assert main(["encode", "model", "rows.jsonl", "--out", "x.txt"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("pyqemb encode: x.txt")


def test_progress_is_for_terminals_alone(folder, tmp_path, capsys):
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    assert main(["encode", str(folder / "model"), str(tmp_path / "x.txt"), "--out", str(tmp_path / "x.npy")]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("2 texts, vectors of")
    assert printed.err == ""


def test_an_output_that_is_a_link_stays_one(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "store").mkdir()
    for name in ("x.npy", "m"):
        (tmp_path / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    for _ in range(2):
        assert main(["encode", "model", str(tmp_path / "x.txt"), "-o", str(tmp_path / "x.npy")]) == 0
        assert main(["export", "model", "-o", str(tmp_path / "m")]) == 0
    assert (tmp_path / "x.npy").is_symlink()
    assert (tmp_path / "m").is_symlink()
    assert {"x.npy", "m"} <= {path.name for path in (tmp_path / "store").iterdir()}
    assert not [path for path in tmp_path.rglob("*") if ".partial." in path.name]
