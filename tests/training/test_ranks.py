"""A rank that is missing, stopped, killed or fails is named, and nobody waits for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch.distributed as dist

from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage2
from pyqemb.training.state import checkpoints, verify

TIMEOUT = 6

# What a run does with its ranks, without a model: a sum for each step, and rank 0 measures while the others wait.
STEPS = """
    import os, signal, sys, time
    import torch
    from pyqemb.errors import DataError, PyqembError
    from pyqemb.training.parallel.world import joined
    case, timeout = sys.argv[1], float(sys.argv[2])
    torch.set_num_threads(1)

    def misfortune(rank):
        if case == f"kill {rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        elif case == f"stop {rank}":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif case == f"fail {rank}":
            raise DataError(f"pairs.jsonl:{rank}: no text")
        elif case == f"bug {rank}":
            raise RuntimeError("out of something")
        elif case == f"slow {rank}":
            time.sleep(2 * timeout)
        elif case == "all fail":
            time.sleep(rank / 2)
            raise DataError("the same for all")

    try:
        with joined("cpu", timeout) as (world, device):
            world.check_equal({"steps": 5 + world.rank * (case == "differ")})
            for step in range(3):
                world.all_reduce_(torch.ones(3))
                if step == 1:
                    misfortune(world.rank)
            world.barrier()
    except PyqembError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
"""


# `pyqemb train`, with a misfortune of a rank before its second step, when the first is saved.
RUN = """
    import errno, os, resource, signal, sys
    import torch
    from pyqemb.cli import main
    from pyqemb.training import trainer
    case = sys.argv[1]
    torch.set_num_threads(1)
    real = trainer.Run.train_step

    def train_step(self):
        if self.step == 1:
            if case in (f"disk {self.world.rank}", f"metrics {self.world.rank}"):
                size = 20_000 if "disk" in case else 100  # bytes of a file, at most; a checkpoint's, or any, has more
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            elif case == f"read {self.world.rank}":
                raise OSError(errno.EIO, os.strerror(errno.EIO), "pairs.jsonl")
            elif case == f"terminate {self.world.rank}":
                os.kill(os.getpid(), signal.SIGTERM)
            elif case == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    trainer.Run.train_step = train_step
    sys.exit(main(["train", "run.json", "--resume", "auto"]))
"""


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(case, size, ranks, timeout=TIMEOUT, script=STEPS, folder=None, port=None):
    port = str(port or free_port())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), case, str(timeout)], cwd=folder,
            env={**environment, "WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in ranks
    ]  # fmt: skip


def finish(jobs, without=(), seconds=60):
    """(exit code, stderr) of each rank but those that are left alone."""
    done = {}
    end = time.monotonic() + seconds
    for rank, job in enumerate(jobs):
        if rank not in without:
            _, said = job.communicate(timeout=end - time.monotonic())
            done[rank] = (job.returncode, said)
    for rank in without:
        jobs[rank].kill()
        jobs[rank].communicate()
    return done


@pytest.mark.promise("R26", "a killed rank")
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named(lost):
    done = finish(start(f"kill {lost}", 3, range(3)))
    assert done.pop(lost)[0] == -signal.SIGKILL
    for code, said in done.values():
        assert code == 69, said
        assert f"rank {lost} (" in said, said
        assert "died" in said, said


@pytest.mark.promise("R26", "a stopped rank")
@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.deep)])
def test_a_stopped_rank_is_named(lost):
    done = finish(start(f"stop {lost}", 3, range(3)), without=[lost])
    for rank, (code, said) in done.items():
        assert code == 69, said
        assert f"rank {lost} (" in said, said
        assert "is stopped or its machine is gone" in said, said
        assert f"rank {rank} stops; continue from the last checkpoint with --resume auto" in said


@pytest.mark.promise("R26", "a rank that never starts")
@pytest.mark.parametrize("missing", [pytest.param(0, marks=pytest.mark.deep), 2])
def test_a_rank_that_never_starts_is_named(missing):
    done = finish(start("none", 3, [rank for rank in range(3) if rank != missing], timeout=10))
    for code, said in done.values():
        assert code == 69, said
        assert f"RankError: rank {missing} " in said, said
        assert "start" in said, said


@pytest.mark.parametrize("failed", [0, 1])
def test_the_error_of_a_rank_is_told_to_the_others(failed):
    done = finish(start(f"fail {failed}", 3, range(3)))
    code, said = done.pop(failed)
    assert code == 3
    assert said.endswith(f"DataError: pairs.jsonl:{failed}: no text\n")
    for code, said in done.values():
        assert code == 3, said
        assert "left with DataError: pairs.jsonl" in said, said
        assert f"rank {failed} (" in said, said


def test_an_error_that_is_nobody_elses_stays_what_it_is():
    done = finish(start("bug 1", 2, range(2)))
    assert done[1][0] == 1
    assert "RuntimeError: out of something" in done[1][1]
    assert done[0][0] == 1
    assert "left with RuntimeError: out of something" in done[0][1]


def test_an_error_of_all_is_everybodys_own():
    for code, said in finish(start("all fail", 2, range(2))).values():
        assert code == 3
        assert "DataError: the same for all" in said


def test_a_rank_that_takes_long_is_waited_for():
    for code, said in finish(start("slow 0", 2, range(2))).values():
        assert code == 0, said


def test_ranks_that_differ_are_named():
    for code, said in finish(start("differ", 3, range(3))).values():
        assert code == 2
        assert "ConfigError: rank 1 has steps = 6, rank 0 has 5" in said


def test_all_stopped_and_continued_go_on():
    jobs = start("slow 0", 2, range(2))
    time.sleep(12)
    for job in jobs:
        job.send_signal(signal.SIGSTOP)
    time.sleep(2 * TIMEOUT)
    for job in jobs:
        job.send_signal(signal.SIGCONT)
    for code, said in finish(jobs).values():
        assert code == 0, said


def test_ranks_meet_in_a_store_that_has_seen_earlier_starts(monkeypatch):
    """That of torchrun, whose agents on several machines may count the restarts differently."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for counts in ((0, 0), (0, 1)):
        jobs = []
        for rank, count in enumerate(counts):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
            jobs += start("none", 2, [rank], timeout=60, port=port)
        for code, said in finish(jobs, seconds=200).values():
            assert code == 0, said
    assert store.check(["pyqemb/meeting"])


def test_variables_that_are_missing_are_named():
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_ADDR")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STEPS), "none", "4"],
        env={**environment, "WORLD_SIZE": "2"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "ConfigError: the environment variable RANK is not set" in done.stderr


@pytest.mark.parametrize(
    ("case", "code", "words", "saved"),
    [
        ("disk 0", 74, ("step_00000002: could not be written: File too large", "rank 0 failed with"), [1]),
        pytest.param(
            "metrics 0",
            74,
            ("metrics.jsonl: cannot be written: File too large", "rank 0 failed with MachineError"),
            [1],
            marks=pytest.mark.deep,
        ),
        pytest.param("read 1", 74, ("rank 1 (", "pairs.jsonl: Input/output error"), [1], marks=pytest.mark.deep),
        ("terminate 1", 75, ("stopped by a signal after step 2", "stopped by SIGTERM after step 2"), [1, 2]),
        pytest.param(
            "interrupt", 75, ("stopped by SIGINT after step 2 of 4, saved",) * 2, [1, 2], marks=pytest.mark.deep
        ),
    ],
)
def test_the_misfortune_of_a_rank_ends_all_with_one_code_and_costs_no_checkpoint(tmp_path, case, code, words, saved):
    write_tiny_folder(tmp_path / "base")
    rows = [{"query": f"q {i}", "positive": f"d {i}"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = stage2(
        model={"base": "base"}, data=[{"path": "pairs.jsonl"}], save={"dir": "run", "every": 1, "keep": 4},
        train={"steps": 4, "global_batch_size": 4, "num_negatives": 0, "device": "cpu"},
    )  # fmt: skip
    (tmp_path / "run.json").write_text(settings.model_dump_json())
    done = finish(start(case, 2, range(2), script=RUN, folder=tmp_path), seconds=240)
    assert [done[rank][0] for rank in range(2)] == [code, code], done
    for rank in range(2):
        last = done[rank][1].strip().splitlines()[-1]
        assert words[rank] in last, done
    assert [verify(each) for each in checkpoints(tmp_path / "run" / "checkpoints")] == saved
    done = finish(start("none", 2, range(2), script=RUN, folder=tmp_path), seconds=240)
    assert [done[rank][0] for rank in range(2)] == [0, 0], done
    assert (tmp_path / "run" / "final").is_dir()
