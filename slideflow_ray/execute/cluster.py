"""A Ray cluster from the driver's side: joining it, what it has, and whether it still answers."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.util.client
from ray.exceptions import RayError

from slideflow_ray.errors import InfrastructureError
from slideflow_ray.specs import ExecutorSpec

HEAD_S = 5.0
"""How often the driver looks whether the head, and its own node, still answer."""
HEAD_LOST_S = 30.0
"""How long a head may be away, as one is that starts anew; after a minute Ray ends the driver without a word."""
CONNECT_TIMEOUT_S = 10
ANSWER_S = 2.0
HEADLESS = "Start the cluster again, or use another (or --executor inline), and run the same command again: it resumes."


def connect(spec: ExecutorSpec) -> bool:
    """Connect to the cluster that is named, else start a local Ray; return whether it was started here.

    The address is always explicit, because a bare ``ray.init()`` joins whatever cluster it finds.
    """
    if ray.is_initialized():
        _check_joined(spec.address)
        return False
    address = spec.address or os.environ.get("RAY_ADDRESS") or "local"
    _check_reachable(address)
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        options |= {"include_dashboard": False, "num_cpus": spec.workers or None}
    try:
        ray.init(**options)
    except Exception as error:  # a head that dies meanwhile comes out as a bare Exception too
        raise InfrastructureError(f"No Ray at {address}: {first_line(error)}") from error
    _protect_token()
    return True


def _check_joined(address: str | None) -> None:
    """Refuse to run on the cluster that this process has joined where another one is named."""
    joined = ray.get_runtime_context().gcs_address
    if address in (None, "auto", "local", joined) or address.startswith("ray://"):
        return
    _check_reachable(address)
    raise InfrastructureError(
        f"This process has joined the Ray at {joined}; {address} is another.",
        next_step="Leave --address out, or start a process for the other cluster.",
    )


def _check_reachable(address: str) -> None:
    """Say within seconds that nobody listens, where Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise InfrastructureError(
            f"No Ray at {address}: {error}.", next_step="Check --address (or RAY_ADDRESS) and that the cluster is up."
        ) from error


def _protect_token() -> None:
    """Ray writes the token of a local cluster readable for everyone; take that back."""
    token = Path.home() / ".ray" / "auth_token"
    if token.exists() and stat.S_IMODE(token.stat().st_mode) & 0o077:
        token.chmod(0o600)


def resources() -> dict[str, float]:
    """Return what the cluster has: CPU, GPU, memory, ..."""
    with asked():
        found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


class Head:
    """The cluster's head and the driver's own node: whether they still answer.

    Ray ends a driver without a word when its node is gone and it asks for anything, or a minute after the head.
    """

    def __init__(self) -> None:
        self._watched = not ray.util.client.ray.is_connected()  # type: ignore[no-untyped-call]
        if not self._watched:  # through ray:// neither can be reached from here
            return
        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        self._head = (host, int(port))
        own = (known for known in nodes() if known["NodeID"] == context.get_node_id())
        self._own = next(((known["NodeManagerAddress"], known["NodeManagerPort"]) for known in own), None)
        self._looked = self._heard = time.monotonic()

    @property
    def answers(self) -> bool:
        """Whether the head answered when it was last looked at: what is asked of one that is away is waited for."""
        return not self._watched or self._heard == self._looked

    def look(self, now: bool = False) -> None:
        """Raise InfrastructureError when one of them is gone; looks every HEAD_S, or `now`."""
        moment = time.monotonic()
        if not self._watched or (moment - self._looked < HEAD_S and not now):
            return
        if self._own is not None and not _answers(*self._own):
            raise InfrastructureError("This machine's part of the Ray cluster is gone.", next_step=HEADLESS)
        if _answers(*self._head) or moment - self._looked > HEAD_LOST_S:  # the driver itself was stopped
            self._heard = moment
        self._looked = moment
        if moment - self._heard >= HEAD_LOST_S:
            where, silent = ":".join(map(str, self._head)), moment - self._heard
            said = f"The head of the Ray cluster is gone: nobody has answered at {where} for {silent:.0f} s."
            raise InfrastructureError(said, next_step=HEADLESS)


def is_gone(node: str) -> bool:
    """Whether nobody answers where a node was: Ray itself takes half a minute to say so."""
    for known in nodes() if node else ():
        if known["NodeID"] == node:
            return not known["Alive"] or not _answers(known["NodeManagerAddress"], known["NodeManagerPort"])
    return False


def nodes() -> list[dict[str, Any]]:
    """Return Ray's table of nodes, those that are gone included."""
    with asked():
        found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found


@contextlib.contextmanager
def asked() -> Iterator[None]:
    """Raise InfrastructureError where the cluster does not answer what it is asked."""
    try:
        yield
    except (RayError, ConnectionError) as error:
        raise InfrastructureError(
            f"The Ray cluster does not answer: {first_line(error)}", next_step=HEADLESS
        ) from error


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text: Ray adds tracebacks."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
