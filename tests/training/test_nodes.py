"""Several machines: torchrun on two nodes, two loopback addresses or network namespaces of this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from safetensors.torch import load_file

from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import load_config, stage2, train

# As in docs/how-to/several-machines.md: else a torchrun that was started again waits for an address until it gives up.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
WITHIN = 60  # seconds within which the ranks leave that wait for a lost one

# `pyqemb train`; once, after a step, a node's rank or its agent is killed.
SCRIPT = """
import os, signal, sys, time
import torch
from pyqemb.cli import main
from pyqemb.training import trainer
torch.set_num_threads(1)
victim, mark = sys.argv[1:3]
real = trainer.Run.train_step
def train_step(self):
    result = real(self)
    if self.step == 3 and not os.path.exists(mark) and self.world.rank == 1 and victim != "nobody":
        open(mark, "w").close()
        os.kill(os.getppid() if victim == "agent" else os.getpid(), signal.SIGKILL)
        time.sleep(60)
    return result
trainer.Run.train_step = train_step
sys.exit(main(["train", *sys.argv[3:]]))
"""


def place(folder):
    """What a machine has: the model, the data and the configuration of the run."""
    write_tiny_folder(folder / "base")
    rows = [{"query": f"q {i}", "positive": f"d {i}"} for i in range(32)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = stage2(
        model={"base": "base"}, data=[{"path": "pairs.jsonl"}], save={"dir": "run", "every": 2},
        train={
            "steps": 5, "global_batch_size": 8, "num_negatives": 0, "learning_rate": 1e-4, "epsilon": 1e-4,
            "device": "cpu", "rank_timeout": 60,
        },
    )  # fmt: skip
    (folder / "run.json").write_text(settings.model_dump_json())
    (folder / "script.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights that one process trains."""
    folder = place(tmp_path_factory.mktemp("alone"))
    home = os.getcwd()
    os.chdir(folder)
    try:
        train(load_config("run.json"))
    finally:
        os.chdir(home)
    return load_file(folder / "run" / "final" / "model.safetensors")


@contextmanager
def loopback():
    """What precedes the command of each node, and the nodes' addresses."""
    yield ([], []), ("127.0.0.1", "127.0.0.2")


@contextmanager
def namespaces():
    """Two network namespaces with a cable between them."""
    names = [f"qemb{os.getpid()}{side}" for side in "ab"]
    addresses = "10.213.7.1", "10.213.7.2"
    try:
        for name in names:
            done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
        cables = [f"q{os.getpid()}{side}" for side in "ab"]
        commands = [["ip", "link", "add", cables[0], "type", "veth", "peer", "name", cables[1]]]
        for name, cable, address in zip(names, cables, addresses, strict=True):
            commands += [
                ["ip", "link", "set", cable, "netns", name],
                ["ip", "-n", name, "address", "add", f"{address}/24", "dev", cable],
                ["ip", "-n", name, "link", "set", cable, "up"],
                ["ip", "-n", name, "link", "set", "lo", "up"],
            ]
        for command in commands:
            subprocess.run(command, check=True)
        prefixes = (  # the name of this machine leads gloo to the loopback interface
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={cable}"]
            for name, cable in zip(names, cables, strict=True)
        )
        yield tuple(prefixes), addresses
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


class Nodes:
    """The agents of torchrun, one for each node, in their own folders or in a shared one."""

    def __init__(self, folders, prefixes, addresses, victim="nobody", max_restarts=0):
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.folders, self.prefixes, self.addresses = folders, prefixes, addresses
        self.victim, self.max_restarts = victim, max_restarts
        self.agents = [self.start(0)]
        self.wait_for_the_store()
        self.agents.append(self.start(1))

    def start(self, node):
        folder = self.folders[node]
        command = [
            *self.prefixes[node], sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={self.addresses[0]}:{self.port}", "--rdzv-id=run",
            f"--rdzv-conf=is_host={1 - node}", f"--local-addr={self.addresses[node]}",
            f"--max-restarts={self.max_restarts}", "script.py", self.victim,
            str(self.folders[0] / "mark"), "run.json", "--resume", "auto",
        ]  # fmt: skip
        with (folder / f"log{node}").open("a") as log:
            return subprocess.Popen(command, cwd=folder, stderr=log, stdout=log, env={**os.environ, **ENVIRONMENT})

    def wait_for_the_store(self):
        """The agent that comes first holds the rendezvous."""
        end = time.monotonic() + 120
        probe = f"import socket; socket.create_connection(('{self.addresses[0]}', {self.port}), 1)"
        while subprocess.run([*self.prefixes[0], sys.executable, "-c", probe], capture_output=True).returncode:
            assert time.monotonic() < end, self.log(0)
            time.sleep(0.2)

    def log(self, node):
        return (self.folders[node] / f"log{node}").read_text()

    def wait(self, node, seconds=300):
        """The exit code of an agent; its log."""
        try:
            return self.agents[node].wait(seconds), self.log(node)
        finally:
            self.agents[node].kill()

    def wait_for(self, node, words, seconds):
        end = time.monotonic() + seconds
        while words not in self.log(node):
            assert time.monotonic() < end, self.log(node)
            time.sleep(0.2)


def folders(tmp_path, shared):
    first = place(tmp_path / "a")
    return [first, first if shared else place(tmp_path / "b")]


def assert_same(folder, alone):
    ours = load_file(folder / "run" / "final" / "model.safetensors")
    assert ours.keys() == alone.keys()
    assert max(float((ours[name] - alone[name]).abs().max()) for name in alone) < 1e-6


@pytest.mark.parametrize("network", [loopback, pytest.param(namespaces, marks=pytest.mark.deep)])
def test_two_nodes_that_share_nothing_train_what_one_process_does(tmp_path, alone, network):
    """And only the first rank reports."""
    with network() as (prefixes, addresses):
        nodes = Nodes(folders(tmp_path, shared=False), prefixes, addresses)
        ends = [nodes.wait(node) for node in range(2)]
    assert [code for code, _ in ends] == [0, 0], "\n\n".join(log for _, log in ends)
    assert_same(tmp_path / "a", alone)
    assert not (tmp_path / "b" / "run").exists()
    (_, first), (_, second) = ends
    for words in ("save.dir: rank 1 does not see", "gradient cache:", "step 5/5", "trained 5 steps"):
        assert words in first
        assert words not in second


@pytest.mark.deep
@pytest.mark.parametrize("shared", [True, False])
def test_a_killed_rank_is_named_and_torchrun_continues(tmp_path, alone, shared):
    with loopback() as (prefixes, addresses):
        nodes = Nodes(folders(tmp_path, shared), prefixes, addresses, "rank", max_restarts=1)
        ends = [nodes.wait(node) for node in range(2)]
    assert [code for code, _ in ends] == [0, 0], "\n\n".join(log for _, log in ends)
    assert (tmp_path / "a" / "mark").exists(), "nobody was killed"
    assert "rank 1 (" in ends[0][1]
    assert "died: its connection is closed; rank 0 stops; continue from the last checkpoint" in ends[0][1]
    assert_same(tmp_path / "a", alone)


@pytest.mark.deep
def test_the_ranks_of_a_killed_agent_stop_and_the_node_may_come_again(tmp_path, alone):
    with loopback() as (prefixes, addresses):
        nodes = Nodes(folders(tmp_path, shared=True), prefixes, addresses, "agent", max_restarts=1)
        assert nodes.agents[1].wait(300) == -signal.SIGKILL
        for node in range(2):
            nodes.wait_for(node, f"died (torchrun, pid {nodes.agents[1].pid}); rank {node} stops", WITHIN)
        nodes.agents[1] = nodes.start(1)
        ends = [nodes.wait(node) for node in range(2)]
    assert [code for code, _ in ends] == [0, 0], "\n\n".join(log for _, log in ends)
    assert_same(tmp_path / "a", alone)


@pytest.mark.deep
def test_a_signal_to_the_agent_of_one_node_stops_all(tmp_path):
    """All ranks leave after the same step, which is saved."""
    home = folders(tmp_path, shared=True)
    with loopback() as (prefixes, addresses):
        nodes = Nodes(home, prefixes, addresses)
        nodes.wait_for(0, "step 1/5", 300)
        nodes.agents[1].send_signal(signal.SIGTERM)
        said = [nodes.wait(node)[1] for node in range(2)]
    assert "saved; continue with --resume auto" in said[0], said[0]
