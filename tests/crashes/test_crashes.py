"""Kills, failing calls, full disks, power failures and signals, at many points of the jobs that write: the old result
or the new one is left, never a mixture; the next run goes on and ends with the same bytes; errors are one line.
"""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
JOBS = ["train", "merge", "export", "encode", "curate", "mine", "synthesize"]
TASKS = ["encode-tasks", "mine-tasks"]  # only in `make test-deep`
# The distance of the calls that are tried in `make test`.
WRITES = {"train": 29, "merge": 17, "export": 19, "encode": 23, "curate": 11, "mine": 9, "synthesize": 41}
READS = {"train": 67, "merge": 101, "export": 67, "encode": 61, "curate": 23, "mine": 71, "synthesize": 41}
POWER = {"train": 199, "merge": 31, "export": 31, "encode": 61, "curate": 11, "mine": 11, "synthesize": 61}
FRESH = {"train": 397, "curate": 11, "synthesize": 61}  # in an empty folder


def load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = load("server").build_shim(tmp_path_factory.mktemp("shim"))
    if library is None:
        pytest.skip("needs Linux and a C compiler for the library that lets system calls fail")
    return library


@pytest.fixture(scope="module")
def server(shim):
    with load("server").ForkServer(shim) as running:
        yield running


@pytest.fixture
def ask(server):
    """The report of a request in which everything held."""

    def ask(**request):
        if request["job"] == "synthesize":
            pytest.importorskip("openai", reason="openai is not installed (pip install 'pyqemb[data]')")
        report = server.ask(**request)
        assert not report["wrong"], "\n".join(report["wrong"])
        return report

    return ask


def tiers(fast, deep):
    """Parameters of `make test`, then those that only `make test-deep` runs."""
    return [*fast, *(pytest.param(*values, marks=pytest.mark.deep, id=f"{values[0]}-all") for values in deep)]


def every(distances):
    return tiers(distances.items(), [(job, 1) for job in [*distances, *TASKS]])


@pytest.mark.parametrize(("job", "every"), every(WRITES))
def test_every_call_may_be_the_last(ask, record_property, job, every):
    report = ask(mode="writes", job=job, every=every)
    assert report["statuses"]["-9"] == -(-report["calls"] // every)
    assert report["statuses"].get("74")
    record_property("R2", f"{job}: kill, ENOSPC and EIO at {report['children'] // 3} of {report['calls']} calls")


@pytest.mark.parametrize(("job", "every"), every(READS))
def test_a_call_that_reads_may_fail(ask, record_property, job, every):
    report = ask(mode="reads", job=job, every=every)
    assert report["statuses"].get("74")
    record_property("R2", f"{job}: EIO at {report['children']} of {report['calls']} calls that read")


@pytest.mark.parametrize(
    ("job", "sizes"),
    tiers(
        [("train", 3), ("merge", 16)],
        [(job, 16) for job in [*JOBS, "train-background", "train-lora"] if job != "merge"],
    ),
)
def test_a_disk_that_is_full_after_so_many_bytes(ask, record_property, job, sizes):
    report = ask(mode="space", job=job, sizes=sizes)
    assert report["statuses"]["74"] >= (sizes // 2 if job == "synthesize" else sizes - 1)
    assert set(report["statuses"]) == {"74", "0"}
    record_property("R4", f"{job}: room for {sizes} sizes from 0 to {report['bytes']} bytes")


@pytest.mark.parametrize(
    ("job", "earlier", "every"),
    tiers(
        [*((job, True, distance) for job, distance in POWER.items()),
         *((job, False, distance) for job, distance in FRESH.items())],
        [(job, earlier, 1) for job in [*JOBS, *TASKS] for earlier in (True, False)],
    ),
)  # fmt: skip
def test_what_a_power_failure_may_leave(ask, record_property, job, earlier, every):
    report = ask(mode="power", job=job, earlier=earlier, every=every, resume=every * 100)
    assert report["states"] > 1
    where = "over an earlier result" if earlier else "in an empty folder"
    record_property("R3", f"{job} {where}: {report['states']} states after {report['calls']} calls")


@pytest.mark.parametrize(
    ("job", "kills"), tiers([("long-lora", 8)], [("long", 70), ("long-background", 70), ("long-lora", 70)])
)
def test_a_run_that_is_killed_again_and_again(ask, record_property, job, kills):
    report = ask(mode="kills", job=job, kills=kills, seed=kills)
    assert report["kills"] >= kills
    if kills > 50:
        assert report["often"] >= 0.3 * report["runs"]
        assert report["in_save"] >= 14
    record_property(
        "R1",
        f"{job}: {report['kills']} kills, {report['in_save']} of them in a save; {report['often']} of {report['runs']} "
        "runs killed three or more times",
    )


@pytest.mark.parametrize(
    ("job", "signals"),
    tiers([("train", 6), ("merge", 2), ("mine", 2)], [("train-lora", 60), ("merge", 20), ("mine", 20)]),
)
def test_signals_at_random_moments(ask, record_property, job, signals):
    report = ask(mode="signals", job=job, signals=signals, seed=signals)
    assert report["slowest"] < 100  # seconds; one or two on a machine that does nothing else
    record_property("R8", f"{job}: {signals} signals")


@pytest.mark.parametrize(
    ("ranks", "every"), tiers([(2, {"0": 301, "1": 61})], [(2, {"0": 5, "1": 2}), (4, {"0": 41, "3": 9})])
)
def test_ranks_that_are_killed_or_cannot_write(ask, record_property, ranks, every):
    report = ask(mode="ranks", job="train-sharded", ranks=ranks, every=every)
    assert report["slowest"] < 300  # seconds, also on a busy machine
    record_property("R2", f"one of {ranks} ranks: {report['children'] // ranks} kills and errors")


def bugs():
    return [pytest.param(bug, marks=[] if bug.quick else pytest.mark.deep, id=bug.why) for bug in load("planted").BUGS]


@pytest.mark.parametrize("bug", bugs())
def test_planted_bugs_are_found(shim, tmp_path, bug):
    with load("server").ForkServer(shim, load("planted").plant(bug, tmp_path)) as server:
        assert server.ask(**bug.request)["wrong"]
