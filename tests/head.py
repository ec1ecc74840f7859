"""Ray clusters of the tests' own on 127.0.0.1: a head and nodes on free ports, ended by recorded process ids.

Never `ray stop`, which ends every Ray on the machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
RAY = Path(sys.executable).with_name("ray")
OBJECTS_BYTES = 150_000_000
WORKER_PORTS = range(10002, 20000)
"""Ray gives these to workers and refuses them for anything else."""


@dataclass
class Node:
    """A `ray start --block` and all that it started."""

    process: subprocess.Popen[bytes]

    def end(self) -> None:
        """Kill it, children first, and wait until nothing is left."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            self.process.kill()
            psutil.wait_procs(family, timeout=20)
        self.process.wait(timeout=20)


@dataclass
class Head:
    """A head: the address of its job server, and of the cluster. `env` is what clients need, token included."""

    address: str
    gcs: str
    folder: Path
    env: dict[str, str]
    nodes: list[Node] = field(default_factory=list)

    def add_node(self, cpus: int = 1) -> Node:
        """Join a further node with `cpus` cores.

        Its folder is its own: nodes that share one delete each other's copies of what a job has sent.
        """
        command = [RAY, "start", "--block", f"--address={self.gcs}", f"--num-cpus={cpus}", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", f"--object-store-memory={OBJECTS_BYTES}"]
        (agent,) = free_ports(1)
        command += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={self.folder}/n{len(self.nodes)}"]
        node = _started(command, self.env, self.folder / f"node-{len(self.nodes)}.log")
        self.nodes.append(node)
        return node

    def end(self) -> None:
        """End all nodes, the head last."""
        for node in reversed(self.nodes):
            node.end()
        self.nodes = []


@contextlib.contextmanager
def started_head(token: Path | None, cpus: int = 2, **more: str) -> Iterator[Head]:
    """Start a head and end it, its nodes and its files with the block; without a token it is an open cluster.

    more : environment of the head, its nodes and their jobs.
    """
    folder = Path(tempfile.mkdtemp(prefix="sfr-", dir="/tmp"))  # short: Ray puts sockets below it
    gcs, dashboard, agent, client = free_ports(4)
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
    command += [f"--num-cpus={cpus}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--temp-dir={folder}", f"--dashboard-agent-listen-port={agent}", "--include-dashboard=true"]
    command += [f"--ray-client-server-port={client}", f"--object-store-memory={OBJECTS_BYTES}", "--disable-usage-stats"]
    env = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    if token is not None:
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", folder, env)
    head.nodes.append(_started(command, env | more, folder / "head.log"))
    try:
        _wait_until_up(head, token.read_text() if token else "")
        yield head
    finally:
        head.end()
        shutil.rmtree(folder, ignore_errors=True)


def _started(command: list[str | Path], env: dict[str, str], log: Path) -> Node:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as file:
        return Node(subprocess.Popen(command, env=own | env, stdout=file, stderr=file, start_new_session=True))


def _wait_until_up(head: Head, token: str) -> None:
    log, deadline = head.folder / "head.log", time.monotonic() + 120
    while status_of(f"{head.address}/api/jobs/", token) != 200:
        assert head.nodes[0].process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


def free_ports(n: int) -> list[int]:
    """Ports that are free now, outside Ray's range of worker ports."""
    sockets: list[socket.socket] = []
    try:
        while sum(s.getsockname()[1] not in WORKER_PORTS for s in sockets) < n:
            sockets.append(socket.socket())
            sockets[-1].bind(("127.0.0.1", 0))
        return [port for s in sockets if (port := s.getsockname()[1]) not in WORKER_PORTS]
    finally:
        for s in sockets:
            s.close()


def status_of(url: str, token: str = "") -> int:
    """The HTTP status of a GET; 0 while nobody listens."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (urllib.error.URLError, ConnectionError):
        return 0
