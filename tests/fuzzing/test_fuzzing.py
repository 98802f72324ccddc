"""Every reader of bytes takes changed, cut and invented bytes: it reads them, or its error names the file.

`make test-deep` has a hundred times as many. corpus/ has the inputs of past finds, TARGET-anything.
"""

import importlib.util
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("fuzzing_harness", HERE / "harness.py")
harness = importlib.util.module_from_spec(spec)
spec.loader.exec_module(harness)
targets = harness.targets

FAST = 20_000  # executions of all targets
DEEP, DEEP_SECONDS = 2_000_000, 4 * 3600.0  # seconds
GUIDED, GUIDED_SECONDS = 20_000, 120  # of each target, whichever is first
EACH = -(-FAST // len(targets.TARGETS))
CORPUS = sorted((HERE / "corpus").iterdir())


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("CRITICAL", logger="pyqemb")


@pytest.mark.promise("R19", f"{EACH * len(targets.TARGETS):,} changed inputs of {len(targets.TARGETS)} readers")
@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeded_inputs(name, tmp_path):
    target = targets.make(name, tmp_path)
    done, finds = 0, {}
    for done, data, found in harness.run(target, 0, EACH):
        if found:
            finds.setdefault(harness.kind_of(found), (done - 1, found, data[:200]))
    assert not finds, "\n".join(f"seed {seed}: {found} {data!r}" for seed, found, data in finds.values())
    assert done == EACH


def test_valid_inputs_are_read(tmp_path):
    """Else the others would show nothing."""
    refused = []
    for number, name in enumerate(targets.TARGETS):
        (tmp_path / str(number)).mkdir()
        target = targets.make(name, tmp_path / str(number))
        for seed in target.seeds:
            try:
                with suppress(*target.allowed):
                    target.read(seed)
            except harness.PyqembError as error:
                refused.append(f"{name}: {error}")
    assert not refused, "\n".join(refused)


@pytest.mark.promise("R19", f"{len(CORPUS)} inputs of past finds")
@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_past_finds(path, tmp_path):
    name, _, _ = path.name.rpartition("-")
    assert harness.fault(targets.make(name, tmp_path), path.read_bytes()) is None


def test_faults_are_seen(tmp_path):
    """A reader that does each of the things that a reader must not do."""

    def raises(error):
        def read(data):
            raise error

        return read

    def sleep(data):
        end = time.process_time() + 1.1
        while time.process_time() < end:
            pass

    for read, words in (
        (raises(KeyError("x")), "KeyError"),
        (raises(MemoryError()), "MemoryError"),
        (raises(RecursionError()), "RecursionError"),
        (raises(harness.PyqembError("bad")), "does not name the file"),
        (sleep, "takes 1"),
        (lambda data: bytearray(400 << 20)[::4096].count(1), "MiB"),
    ):
        assert words in harness.fault(targets.Target([b""], read, ("rows.csv",)), b"")
    assert harness.fault(targets.Target([b""], raises(harness.PyqembError("rows.csv: x")), ("rows.csv",)), b"") is None


def test_inputs_are_the_same_for_a_seed():
    for form in harness.mutate.FORMS:
        seeds = [b'{"a": [1, 2.5, "x"], "b": {"c": null}}\n{"a": 1}', b"[]"]
        made = [harness.mutate.mutate(seed, seeds, form) for seed in range(300)]
        assert made == [harness.mutate.mutate(seed, seeds, form) for seed in range(300)]
        assert len(set(made)) > 200


@pytest.mark.deep
@pytest.mark.parametrize("name", targets.TARGETS)
def test_inputs_that_follow_the_coverage(name, tmp_path, record_property):
    pytest.importorskip("atheris", reason="atheris is not installed (pip install atheris)")
    options = [f"-runs={GUIDED}", f"-max_total_time={GUIDED_SECONDS}", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, str(HERE / "guided.py"), name, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GUIDED_SECONDS + 300)
    assert done.returncode == 0, done.stderr[-4000:]
    record_property("R19", f"up to {GUIDED:,} inputs of each reader that follow the coverage")


@pytest.mark.deep
@pytest.mark.promise("R19", f"{DEEP:,} changed inputs of {len(targets.TARGETS)} readers")
def test_many_inputs():
    """In a process of its own, which a crash may end; then another one continues with the next target."""
    each, waiting, wrong = -(-DEEP // len(targets.TARGETS)), list(targets.TARGETS), []
    while waiting:
        command = [sys.executable, str(HERE / "harness.py"), str(each), *waiting, "--from", str(EACH)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEEP_SECONDS)
        wrong += [line for line in done.stdout.splitlines() if " seed " in line]
        last = [line for line in done.stderr.splitlines() if line.endswith(" starts")][-1].removesuffix(" starts")
        if done.returncode not in (0, 1):
            wrong.append(f"{last}: exit status {done.returncode}\n{done.stderr[-2000:]}")
        waiting = waiting[waiting.index(last) + 1 :]
    assert not wrong, "\n".join(wrong)
