"""Which cluster to submit to, and whether it can be talked to: a few requests, each answered or refused in seconds.

The token leaves this machine only for a cluster that asks for one. No Ray is imported here.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slideflow_ray.errors import ConfigError, InfrastructureError
from slideflow_ray.specs import Spec, relative_to
from slideflow_ray.texts import read_bytes, read_toml

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Environment variables with the job server's address, in the order in which Ray's own client takes them."""
ANSWER_S = 5.0
"""How long a cluster may take to answer."""
NODES_S = 8.0
"""How long a head that has just started may take to know its nodes."""
MAX_ANSWER_BYTES = 2**24
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT = "Give http://HEAD:8265 (or https://...): the dashboard's address, not the cluster's port 6379."
CHECK = "Check the address, that the head is up, and that the tunnel to it is open."


class Profile(Spec):
    """A cluster by name, from a profile file. The token never stands there, only where its file is.

    address : of the job server, http(s)://HEAD:8265. token_path : the token's file.
    out : what a relative output folder is relative to, on the cluster's side. slides : where that lies on the
    cluster's side which lies beside the cohort here. python : the interpreter on the head.
    """

    address: str
    token_path: str | None = None
    out: str | None = None
    slides: str | None = None
    python: str = "python"


@dataclass(frozen=True)
class Cluster:
    """A job server and what opens it. `token` is "" where none is configured; `allow_open`: none is needed."""

    address: str
    token: str = ""
    allow_open: bool = False
    out: str | None = None
    slides: str | None = None
    python: str = "python"

    def __repr__(self) -> str:
        return f"Cluster({self.address!r})"  # never the token

    @property
    def headers(self) -> dict[str, str]:
        """What each request carries."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


@dataclass(frozen=True)
class About:
    """What a cluster says of itself. `gpus` and `cpus` are those of the nodes that are there now."""

    address: str
    ray: str
    nodes: int
    cpus: float
    gpus: float
    open: bool

    def summary(self) -> str:
        """Return one line for people."""
        auth = "WITHOUT authentication" if self.open else "token accepted"
        gpus = f"{self.gpus:g} GPUs" if self.gpus else "no GPUs"
        nodes = f"{self.nodes} node{'s' * (self.nodes > 1)} with {self.cpus:g} cores and {gpus}"
        return f"{self.address}: Ray {self.ray}, {auth}, {nodes if self.nodes else 'no nodes yet'}"


# which cluster


def profiles_file() -> Path:
    """Return where profiles are kept unless told otherwise."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "slideflow-ray" / "profiles.toml"


def find_cluster(profile: str | None = None, address: str | None = None, *, allow_open: bool = False) -> Cluster:
    """Return the cluster that an address, a profile or the environment names, in this order.

    profile : a name in the profile file; NAME@FILE or a FILE with one profile for another file.

    Raises ConfigError where nothing names one, or the token's file can be read by others.
    """
    found = _profile(profile) if profile else None
    named = address or (found.address if found else None) or _from_environment()
    if named is None:
        raise ConfigError(
            "No cluster is named.",
            next_step=f"export {ADDRESSES[0]}=http://HEAD:8265, give --address, or a profile in {profiles_file()}.",
        )
    cluster = Cluster(_checked(named), _token(found.token_path if found else None), allow_open)
    if found is None:
        return cluster
    return replace(cluster, out=found.out, slides=found.slides, python=found.python)


def _from_environment() -> str | None:
    return next((os.environ[name] for name in ADDRESSES if os.environ.get(name)), None)


def _profile(named: str) -> Profile:
    name, _, file = named.partition("@")
    if not file and named.endswith(".toml"):
        name, file = "", named
    path = Path(file).expanduser() if file else profiles_file()
    try:
        tables = read_toml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as profiles: {error}.") from error
    if not name and len(tables) == 1:
        name = next(iter(tables))
    if not isinstance(tables.get(name), dict):
        known = ", ".join(tables) or "none"
        raise ConfigError(f"{path} has no profile {name!r}; it has: {known}.")
    values = dict(tables[name])
    if isinstance(values.get("token_path"), str):
        values["token_path"] = relative_to(path.resolve().parent, str(Path(values["token_path"]).expanduser()))
    return Profile.parse(values, f"{path} [{name}]")


def _checked(address: str) -> str:
    """The address without a slash at its end. Raises ConfigError for what is no job server's."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{address!r} is no job server's address.",
            next_step=PORT,
        )
    if parts.username or parts.password:
        raise ConfigError("The address holds credentials.", next_step="Keep the token in a file, RAY_AUTH_TOKEN_PATH.")
    return address.rstrip("/")


def _token(path: str | None) -> str:
    """The token, from the profile's file or the environment, "" where there is none. Raises ConfigError."""
    if path is None and os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    if path is None and os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return ""
    named = path or os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    if not named and not file.exists():
        return ""
    try:
        token = read_bytes(file, 2**16).decode().strip()
        mode = stat.S_IMODE(file.stat().st_mode)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The token's file {file} cannot be read: {error}.") from error
    if mode & 0o077:
        raise ConfigError(f"The token's file {file} can be read by others.", next_step=f"chmod 600 {file}")
    if not token.isascii() or not token.isprintable() or not token:
        raise ConfigError(f"{file} holds no token.", next_step="ray get-auth-token --generate, or copy the cluster's.")
    return token


# whether it can be talked to


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def look(cluster: Cluster, *, any_version: bool = False, gpus: float = 0) -> About:
    """Ask a cluster who it is. Raises ConfigError and InfrastructureError, each saying the cause and the next step.

    any_version : another Ray than the one installed here will do. gpus : how many must be there.
    """
    is_open = enter(cluster)
    version = str(_asked(cluster, "/api/version").get("ray_version"))
    mine = importlib.metadata.version("ray")
    if version != mine and not any_version:
        raise ConfigError(
            f"{cluster.address} runs Ray {version}, and Ray {mine} is installed here.",
            next_step="Install the cluster's version (requirements.lock.txt has the pins), or pass --any-version.",
        )
    nodes = _nodes(cluster)
    have = {kind: sum(node.get("resources_total", {}).get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    if have["GPU"] < gpus:
        raise ConfigError(
            f"{cluster.address} has {have['GPU']:g} GPUs now, and --gpus asks for {gpus:g}.",
            next_step="Wait for its nodes or add some; without --gpus the job starts with what is there.",
        )
    return About(cluster.address, version, len(nodes), have["CPU"], have["GPU"], is_open)


def enter(cluster: Cluster) -> bool:
    """Return whether a cluster is open. Raises ConfigError for one that may not be, or that wants a token we lack."""
    is_open = _is_open(cluster)
    if is_open and not cluster.allow_open:
        raise ConfigError(
            f"{cluster.address} runs jobs for whoever reaches it: it has no authentication.",
            next_step="Start the cluster with RAY_AUTH_MODE=token (cluster/README.md), or pass --allow-open.",
        )
    if not is_open and not cluster.token:
        raise ConfigError(
            f"{cluster.address} asks for a token, and none is configured.",
            next_step="Copy the cluster's token to ~/.ray/auth_token (chmod 600), or set RAY_AUTH_TOKEN_PATH.",
        )
    return is_open


def warn_of(cluster: Cluster) -> str:
    """Return what should be said of the way to a cluster, "" where there is nothing."""
    parts = urlsplit(cluster.address)
    if parts.scheme == "https" or parts.hostname in LOOPBACK or not cluster.token:
        return ""
    return (
        f"{cluster.address}: the token and all else travel unencrypted; on a network that is not your own, use an "
        "ssh tunnel or https."
    )


def _is_open(cluster: Cluster) -> bool:
    """Whether it asks for no token. One that cannot say so is older than authentication, or something else."""
    status, answer = _get(cluster.address + "/api/authentication_mode", {})
    if status == 200 and isinstance(answer, dict) and "authentication_mode" in answer:
        return bool(answer["authentication_mode"] == "disabled")
    if status in (401, 403):
        return False
    raise ConfigError(
        f"{cluster.address} answers, but not as Ray with authentication does (HTTP {status}).",
        next_step="Give the address of the job server (port 8265) of a cluster of Ray 2.60 or newer.",
    )


def _asked(cluster: Cluster, path: str) -> dict[str, Any]:
    status, answer = _get(cluster.address + path, cluster.headers)
    if status in (401, 403):
        raise refused(cluster, f" (HTTP {status})")
    if status != 200 or not isinstance(answer, dict):
        raise InfrastructureError(f"{cluster.address}{path} answers HTTP {status}.", next_step=CHECK)
    return answer


def refused(cluster: Cluster, why: str = "") -> ConfigError:
    """Return the error of a cluster that does not take our token."""
    return ConfigError(
        f"{cluster.address} refuses the token{why}.",
        next_step="Copy the cluster's token anew: it is another one, or this file is of another cluster.",
    )


def _get(url: str, headers: Mapping[str, str]) -> tuple[int, Any]:
    """The status of a GET and the JSON it gives, None where it is none.

    Raises InfrastructureError where nobody answers, ConfigError for what is no web server.
    """
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310 - http or https, see _checked
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=ANSWER_S) as answer:
            return answer.status, _json(answer.read(MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, None
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        where = "{0.scheme}://{0.netloc}".format(urlsplit(url))
        if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
            said = f"{where} is no job server's: what answers does not speak HTTP."
            raise ConfigError(said, next_step=PORT) from error
        reason = " ".join(str(getattr(error, "reason", error)).split())[:300] or type(error).__name__
        raise InfrastructureError(f"{where} does not answer: {reason}.", next_step=CHECK) from error


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _nodes(cluster: Cluster) -> list[dict[str, Any]]:
    """The nodes that are alive; a head that has just started knows none for a while."""
    deadline = time.monotonic() + NODES_S
    while True:
        answer = _asked(cluster, "/api/v0/nodes?detail=1&limit=10000")
        found = (answer.get("data") or {}).get("result") or {}
        alive = [node for node in found.get("result") or () if node.get("state") == "ALIVE"]
        if alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.5)
