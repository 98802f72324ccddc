"""Runs jobs in forked children, in which calls fail, and which are killed or get signals. It is started once, with
shim.c preloaded and one thread; a child then costs a tenth of a second.

    python fork_server.py

reads a JSON object a line, {"mode": ..., "job": ..., "place": ..., ...}, and prints one: what it did, and under "wrong"
what did not hold.
"""

import ctypes
import errno
import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from jobs import JOBS, contents, leftovers
from power import read, states

import pyqemb.cli
from pyqemb.errors import PyqembError
from pyqemb.training.state import checkpoints

FAULTS = {"kill": -signal.SIGKILL, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
WRITES, READS = 1, 2  # of shim.c
BROKEN = 99  # the exit status of an error that is none of pyqemb's
PATIENCE = 900  # seconds until a child that hangs is killed, on a machine that is very busy

shim = ctypes.CDLL(None)
shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_long]
shim.fault_space.argtypes = [ctypes.c_long]
shim.fault_record.argtypes = [ctypes.c_int]
shim.fault_calls.restype = ctypes.c_long
shim.fault_names.restype = ctypes.c_char_p
shim.fault_place.restype = ctypes.c_char_p


class Child:
    """A forked process that does `work` in a folder; its output is in `log`."""

    def __init__(self, folder, log, work, environment=(), lenient=False):
        self.log, self.status, known = log, None, set(sys.modules)
        reading, writing = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            status = BROKEN
            try:
                os.close(reading)
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                os.environ.update(environment)
                signal.alarm(PATIENCE)
                os.chdir(folder)
                status = self._outcome(work, lenient)
                calls = shim.fault_calls(), shim.fault_names().decode().split(), shim.fault_place().decode()
                report = [*calls, [name for name in sys.modules if name not in known]]
                shim.fault_arm(b"", 0, 0, -1)
                os.write(writing, json.dumps(report).encode())
            finally:
                os._exit(status)
        os.close(writing)
        self._pipe = reading

    @staticmethod
    def _outcome(work, lenient):
        try:
            return work() or 0
        except PyqembError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            return error.exit_code
        except OSError as error:
            if error.errno != errno.EIO or error.filename is None or not lenient:
                traceback.print_exc()
                return BROKEN
            print(f"OSError: {error.filename}: {error.strerror}", flush=True)
            return 74
        except BaseException:
            traceback.print_exc()
            return BROKEN

    def wait(self):
        """The exit status (of a signal: negative)."""
        with os.fdopen(self._pipe) as pipe:
            report = pipe.read()  # until the child ends
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        self.calls, self.names, self.place, self.modules = json.loads(report) if report else (0, [], "", [])
        return self.status

    def send(self, number):
        os.kill(self.process, number)  # not reaped yet, so the number is no other process's

    @property
    def said(self):
        return self.log.read_text(errors="replace")


class Case:
    """A job with its template: inputs, and the output of an earlier run."""

    def __init__(self, job, place, earlier=True, **_):
        self.job = JOBS[job]()
        self.place = Path(place)
        self.template, self.work, self.log = (self.place / name for name in ("template", "work", "log"))
        self.template.mkdir(parents=True)
        self.must(self.template, lambda: self.job.prepare(earlier))
        self.job.argv = getattr(self.job, "argv", None) or ["train", "run.json", "--resume", "auto", "--quiet"]
        self.job.before = self.job.result(self.template)
        self.wrong, self.children, self.statuses = [], 0, {}

    def must(self, folder, work):
        child = Child(folder, self.log, work)
        assert child.wait() == 0, child.said
        threads = os.listdir("/proc/self/task")
        for name in child.modules:  # once, instead of in each child
            with suppress(Exception):
                importlib.import_module(name)
        assert os.listdir("/proc/self/task") == threads, "an import has started a thread"
        return child

    def fresh(self):
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.template, self.work)
        self.job.begin()

    def counted(self, what=WRITES):
        """Run the job once undisturbed; the child, which knows its calls."""
        self.fresh()
        child = self.must(self.work, lambda: self.armed(what, 0, -1))
        self.job.wanted = self.job.result(self.work)
        self.names = {path.name for path in self.work.rglob("*")}
        assert self.job.wanted
        assert self.job.wanted != self.job.before
        self.inputs = self.digests()
        return child

    def digests(self):
        return {name: contents(self.work / name) for name in self.job.inputs}

    def armed(self, what, fault, at, below=""):
        shim.fault_arm(os.fsencode(self.work / below if below else self.work), what, fault, at)
        self.job.run()

    def run(self, work, lenient=False):
        """The ended child. `lenient`: an OSError that names its file counts as an error of pyqemb."""
        child = Child(self.work, self.log, work, lenient=lenient)
        child.wait()
        self.count(child)
        return child

    def count(self, child):
        self.children += 1
        self.statuses[str(child.status)] = self.statuses.get(str(child.status), 0) + 1

    def goes_on(self):
        """The next run succeeds, with the result of an undisturbed one."""
        child = Child(self.work, self.log, self.job.run)
        assert child.wait() == 0, ("the next run fails", child.status, child.said[-1500:])
        found = self.job.result(self.work)
        assert found == self.job.wanted, ("the next run has another result", differing(found, self.job.wanted))
        assert not leftovers(self.work), leftovers(self.work)
        assert self.digests() == self.inputs, "an input was changed"
        self.job.ended()

    def check(self, where, checks):
        try:
            checks()
        except (AssertionError, PyqembError, OSError, ValueError) as error:
            self.wrong.append(f"{where}: {type(error).__name__}: {error}")

    def report(self, **facts):
        if hasattr(self.job, "close"):
            self.job.close()
        shutil.rmtree(self.place)
        used = os.times()
        return {**facts, "children": self.children, "statuses": self.statuses, "wrong": self.wrong,
                "seconds": used.user + used.system + used.children_user + used.children_system}  # fmt: skip


def differing(a, b):
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))[:5]


def one_line(said):
    """The error of a run, which must be one line after the log."""
    assert "Traceback" not in said, said[-1500:]
    return said.splitlines()[-1]


def writes(request, case):
    """Kill before, and errors of, every `every`-th call that changes the folder."""
    names = case.counted().names
    assert len(names) > 10, names
    for number, at in enumerate(range(request.get("first", 0), len(names), request["every"])):
        for fault in request.get("faults") or ([*FAULTS][number % 3 :][:1] if request.get("rotate") else FAULTS):

            def checks(fault=fault, at=at):
                case.fresh()
                child = case.run(lambda: case.armed(WRITES, FAULTS[fault], at))
                if fault == "kill":
                    assert child.status == -signal.SIGKILL
                else:
                    assert child.status in (0, 3, 74), (child.status, child.said[-1500:])
                if child.status == 0:
                    assert case.job.result(case.work) == case.job.wanted, "another result, without an error"
                elif child.status > 0:
                    one_line(child.said)
                case.job.holds(case.work)
                case.goes_on()

            case.check(f"{fault} at call {at}, {names[at]}", checks)
    return {"calls": len(names)}


def reads(request, case):
    """EIO of every `every`-th call that opens, reads or maps a file, or lists a folder."""
    names = case.counted(READS).names
    before = {}
    for at in range(request.get("first", 0), len(names), request["every"]):

        def checks(at=at):
            case.fresh()
            before.update(contents(case.work))
            child = case.run(lambda: case.armed(READS, errno.EIO, at), lenient=True)
            place = Path(child.place)
            assert child.status in (0, 3, 74), (child.status, place.name, child.said[-1500:])
            if child.status == 0:
                assert case.job.result(case.work) == case.job.wanted, "another result, without an error"
            else:
                line = one_line(child.said)
                own = [path.name for path in (place, *place.parents) if path.is_relative_to(case.work)]
                named = [re.sub(r"^\.\d+\.partial\.", "", name) for name in own[:-1]]
                assert not named or any(name in line for name in named), f"{place} is not named: {line}"
                # SQLite calls an error that does not come again damage.
                assert "nput/output error" in line or (place.suffix == ".sqlite" and "malformed" in line), (
                    f"{place}: {child.said[-1500:]}"
                )
            case.job.holds(case.work)
            case.goes_on()

        case.check(f"EIO at call {at}, {names[at]}", checks)
    return {"calls": len(names)}


def space(request, case):
    """The disk is full after 0 bytes, ..., all bytes that the run writes."""
    record = case.place / "record"
    case.counted()
    case.fresh()
    case.must(case.work, lambda: recorded(case, record))
    size = sum(len(call[-1]) for call in read(record, case.work) if call[0] == "write")
    record.unlink()
    sizes = request["sizes"]
    for number in range(sizes):
        enough = number == sizes - 1
        left = 2 * size if enough else size * number // (sizes - 1)  # the seconds in a log may have more digits

        def checks(left=left, enough=enough):
            case.fresh()
            before = contents(case.work / "run" / "checkpoints")

            def work():
                shim.fault_space(left)
                case.armed(WRITES, 0, -1)

            child = case.run(work)
            assert child.status in (0, 74), (child.status, child.said[-1500:])
            if child.status == 0:
                assert enough or not case.job.same_bytes, f"{left} of {size} bytes are enough"
                assert case.job.result(case.work) == case.job.wanted
            else:
                line = one_line(child.said)
                assert "No space left on device" in line or "database or disk is full" in line, line
                assert any(name in line for name in case.names), line
            assert not leftovers(case.work), leftovers(case.work)
            case.job.holds(case.work)
            after = contents(case.work / "run" / "checkpoints")
            newest = max((name.partition("/")[0] for name in before), default="")
            if not any(name.partition("/")[0] > newest for name in after):  # else the run has deleted it
                assert after == before, "the previous checkpoint has changed"
            case.goes_on()

        case.check(f"{left} of {size} bytes", checks)
    return {"bytes": size}


def recorded(case, record):
    descriptor = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    shim.fault_record(descriptor)
    case.armed(WRITES, 0, -1)


def power(request, case):
    """Every `every`-th of the states that a power failure may leave; every `resume`-th is continued."""
    record, job = case.place / "record", case.job
    case.counted()
    if hasattr(job, "holds_after_power_failure"):
        case.fresh()
        case.must(case.work, job.run_and_list)
        job.model, job.saved = contents(case.work / "run" / "final"), json.loads((case.work / "saved.json").read_text())
    case.fresh()
    case.must(case.work, lambda: recorded(case, record))
    calls = read(record, case.work)
    found = 0
    for number, state in enumerate(states(case.template, calls)):
        done = state.calls == len(calls)
        if number % request["every"] and not done:
            continue
        found += 1

        def checks(state=state, number=number, done=done):
            shutil.rmtree(case.work)
            case.work.mkdir()
            state.write(case.work)
            for name in job.inputs:  # a power failure changes no time of a file that is only read
                for path in [case.template / name, *(case.template / name).rglob("*")]:
                    shutil.copystat(path, case.work / path.relative_to(case.template))
            if hasattr(job, "holds_after_power_failure"):
                least, most = (
                    max([int(path[-8:]) for path in paths if path.startswith("run/checkpoints/step_")], default=None)
                    for paths in (state.complete, state.begun)
                )
                first = max(
                    [int(path.name[5:]) for path in checkpoints(case.template / "run" / "checkpoints")], default=None
                )
                job.holds_after_power_failure(case.work, done, least or first, most or first or 0)
            elif done:
                assert job.result(case.work) == job.wanted, "the result of a finished run is lost"
            else:
                job.holds(case.work)
            if number % request.get("resume", 10**9) == 0:
                job.begin()
                case.goes_on()

        before = call_of(calls, state.calls)
        case.check(f"after call {state.calls}, {before}: {state.what}", checks)
    return {"calls": len(calls), "states": found}


def call_of(calls, number):
    call, _, path, other, _ = calls[number - 1]
    return f"{call} {path} {other}".strip()


def kills(request, case):
    """Runs that are killed again and again: at random times, and at random calls of a save."""
    dice = random.Random(request["seed"])
    start = time.monotonic()
    save_calls = case.counted_below("run/checkpoints")
    seconds = time.monotonic() - start
    runs = often = total = in_save = 0
    while total < request["kills"]:
        case.fresh()
        aims, killed = dice.choice((2, 3, 4, 5, 6)), 0
        for _ in range(20):
            if killed == aims:
                break
            at_call = dice.random() < 0.5
            number = dice.randrange(save_calls // 2) if at_call else -1
            fault = -signal.SIGKILL if at_call else 0
            child = Child(case.work, case.log, lambda f=fault, n=number: case.armed(WRITES, f, n, "run/checkpoints"))
            if not at_call:
                time.sleep(dice.random() * seconds * 0.7)
                child.send(signal.SIGKILL)
            child.wait()
            case.count(child)
            if child.status == 0:
                break
            if child.status != -signal.SIGKILL:
                case.wrong.append(f"run {runs}: exit status {child.status}: {child.said[-1500:]}")
                break
            killed += 1
            in_save += any((case.work / "run" / "checkpoints").glob(".*.partial.*"))
        total, runs, often = total + killed, runs + 1, often + (killed >= 3)
        case.check(f"run {runs}, killed {killed} times", case.goes_on)
    return {"kills": total, "runs": runs, "often": often, "in_save": in_save}


def signals(request, case):
    """SIGTERM and SIGINT at random times and calls, to the command line."""
    dice = random.Random(request["seed"])
    case.counted()
    case.fresh()
    start = time.monotonic()
    child = case.must(case.work, lambda: command(case, WRITES | READS, 0, -1))
    seconds, names, slowest = time.monotonic() - start, child.names, 0.0
    resumable = case.job.argv[0] == "train"
    for number in range(request["signals"]):
        name, at_call = dice.choice((signal.SIGTERM, signal.SIGINT)), number % 2
        at, moment, twice = dice.randrange(len(names)), dice.random() * seconds, number % 10 == 8
        case.fresh()

        def checks(name=name, at_call=at_call, at=at, moment=moment, twice=twice):
            nonlocal slowest
            fault = -name if at_call else 0
            child = Child(case.work, case.log, lambda: command(case, WRITES | READS, fault, at))
            if not at_call:
                time.sleep(moment)
                child.send(name)
                if twice:
                    time.sleep(0.002)
                    child.send(name)
            sent = time.monotonic()
            child.wait()
            slowest = max(slowest, time.monotonic() - sent)
            case.count(child)
            stopped = {0, 75 if resumable else 128 + name} | ({128 + name, 75} if twice else set())
            assert child.status in stopped, (child.status, child.said[-1500:])
            if child.status and not twice:
                assert f"stopped by {name.name}" in one_line(child.said), child.said
            if child.status == 75 and " saved; continue" in child.said:
                step = int(child.said.split("after step ")[1].split()[0])
                newest = checkpoints(case.work / "run" / "checkpoints")[-1].name
                assert newest == f"step_{step:08}", (newest, child.said)
            if child.status == 0:
                assert case.job.result(case.work) == case.job.wanted
                written = at_call and resumable and names[at] in ("write", "fsync")
                if written and (step := re.search(r"step_(\d+)", child.place)):
                    assert int(step[1]) == case.job.steps, f"the run went on after a signal at {child.place}"
            else:
                case.job.holds(case.work)
            case.goes_on()

        what = f"at call {at}" if at_call else f"after {moment:.3f} s{' twice' if twice else ''}"
        case.check(f"{name.name} {what}", checks)
    return {"slowest": round(slowest, 2), "calls": len(names)}


def command(case, what, fault, at):
    """The job as its command line, with the signal handlers of a new process."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)
    shim.fault_arm(os.fsencode(case.work), what, fault, at)
    return pyqemb.cli.main(case.job.argv)


def ranks(request, case):
    """A sharded run: a kill of one rank at, or an error of, every `every`-th of its calls."""
    size, calls, slowest = request["ranks"], {}, 0.0

    def start(faulty=-1, fault=0, at=-1):
        """The ended children, one for each rank."""
        with socket.create_server(("localhost", 0)) as server:
            port = str(server.getsockname()[1])

        def work(rank):
            chosen = rank == faulty
            case.armed(WRITES, fault if chosen else 0, at if chosen else -1)

        children = []
        for rank in range(size):
            names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
                     "MASTER_PORT": port}  # fmt: skip
            children.append(Child(case.work, case.place / f"log{rank}", lambda r=rank: work(r), names))
        for child in children:
            child.wait()
        return children

    def must():
        children = start()
        for child in children:
            assert child.status == 0, (child.status, child.said[-1500:])
        return children

    case.fresh()
    for rank, child in enumerate(must()):
        calls[rank] = child.names
    case.job.wanted, case.inputs = case.job.result(case.work), case.digests()
    for faulty, every in request["every"].items():
        names = calls[int(faulty)]
        for number, at in enumerate(range(request.get("first", 0), len(names), every)):
            fault = [*FAULTS][number % 3]

            def checks(faulty=int(faulty), at=at, fault=fault):
                nonlocal slowest
                case.fresh()
                begin = time.monotonic()
                children = start(faulty, FAULTS[fault], at)
                slowest = max(slowest, time.monotonic() - begin)
                for rank, child in enumerate(children):
                    case.count(child)
                    allowed = (0, 69, 74) if fault == "kill" else (0, 3, 74)
                    if rank == faulty and fault == "kill":
                        allowed = (-signal.SIGKILL,)
                    assert child.status in allowed, (f"rank {rank}", child.status, child.said[-1500:])
                    assert "Traceback" not in child.said, child.said[-1500:]
                codes = {child.status for child in children}
                assert fault == "kill" or len(codes) == 1, f"ranks end with {codes}"
                case.job.holds(case.work)
                for child in must():
                    assert child.status == 0
                found = case.job.result(case.work)
                assert found == case.job.wanted, ("another result", differing(found, case.job.wanted))
                assert not leftovers(case.work), leftovers(case.work)

            case.check(f"{fault} of rank {faulty} at call {at}, {names[at]}", checks)
    return {"calls": sum(map(len, calls.values())), "slowest": round(slowest, 1)}


def counted_below(case, below):
    """The number of calls below a folder of an undisturbed run."""
    case.fresh()
    child = case.must(case.work, lambda: case.armed(WRITES, 0, -1, below))
    case.job.wanted, case.inputs = case.job.result(case.work), case.digests()
    return child.calls


Case.counted_below = counted_below
MODES = {mode.__name__: mode for mode in (writes, reads, space, power, kills, signals, ranks)}


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            case = Case(**request)
            report = case.report(**MODES[request["mode"]](request, case))
        except BaseException:
            report = {"wrong": [traceback.format_exc()]}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
