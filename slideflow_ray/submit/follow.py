"""Submitting a parcel, and following, stopping and listing jobs, through Ray's own job client.

Submission ids are deterministic: the same parcel has the same id, and each further attempt a number behind it. So
submitting again finds the attempt that runs, says that one is finished, or begins the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from slideflow_ray.errors import ConfigError, InfrastructureError, SlideflowError
from slideflow_ray.exits import EXIT_CONFIG, EXIT_DRIFT, EXIT_FAILURES, EXIT_INFRA, EXIT_INTERRUPTED, EXIT_VERIFY
from slideflow_ray.submit.cluster import ADDRESSES, PORT, Cluster, refused
from slideflow_ray.submit.parcel import KINDS, PROBE, Parcel, version
from slideflow_ray.submit.probe import JOB

PREFIX = "sfr-"
REQUEST_S = 60.0
"""How long an upload or a request may be without a sign of the cluster."""
QUIET_S = 15.0
"""How long a log may be silent before the job's state is asked for."""
LOST_S = 45.0
"""How long a cluster may be away while a job is followed."""
DEFAULT_LIMIT = 100 * 2**20
"""What a cluster takes as an upload where this Ray does not say (the smallest of all versions)."""
PACKED = 0.9
"""Of that limit what is used: packing adds names, and the request its own."""
AGAIN = "Submit it again: it resumes where it stopped."
OURS = (0, EXIT_CONFIG, EXIT_FAILURES, EXIT_INFRA, EXIT_VERIFY, EXIT_DRIFT, 70)
NOT_FOUND = 127

for _name_of in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
    logging.getLogger(_name_of).setLevel(logging.WARNING)  # they announce every upload and every closed socket

State = Literal["started", "running", "finished"]


@dataclass(frozen=True)
class Submitted:
    """A job on a cluster: its name there, and whether it was started now, runs already or had finished."""

    job: str
    state: State
    attempt: int


class Client(JobSubmissionClient):
    """Ray's client with a token of ours, requests that end, and errors that say what to do.

    Ray's own takes the address from the environment whatever it is told, so the environment is hidden from it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        try:
            with _hidden(*ADDRESSES):
                super().__init__(cluster.address, headers=cluster.headers)
        except RuntimeError as error:
            if isinstance(error, SlideflowError):
                raise
            raise ConfigError(f"{cluster.address} answers, but takes no jobs.", next_step=PORT) from error

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        try:
            found: requests.Response = super()._do_request(method, endpoint, **{"timeout": REQUEST_S, **kwargs})
        except AuthenticationError as error:
            raise refused(self.cluster) from error
        except requests.RequestException as error:
            cause = type(error).__name__
            raise InfrastructureError(f"{self.cluster.address} does not answer: {cause}.", next_step=AGAIN) from error
        return found

    def info(self, job: str) -> JobDetails | None:
        """Return what the cluster knows of a job, None where it knows none of that name."""
        if not job:
            return None  # Ray would list all
        answer = self._do_request("GET", f"/api/jobs/{quote(job, safe='')}")
        if answer.status_code == 404:
            return None
        if answer.status_code != 200:
            raise InfrastructureError(f"{self.cluster.address} answers HTTP {answer.status_code}.", next_step=AGAIN)
        return JobDetails(**answer.json())

    def known(self, job: str) -> JobDetails:
        """Return what the cluster knows of a job. Raises ConfigError where it knows none of that name."""
        found = self.info(job)
        if found is None:
            raise ConfigError(
                f"{self.cluster.address} knows no job {job!r}; a head that was started anew has forgotten all.",
                next_step="slideflow-ray jobs list",
            )
        return found


@contextlib.contextmanager
def _hidden(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


# submitting


def upload_limit() -> int:
    """Return the bytes that this Ray takes as an upload."""
    try:
        from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE
    except ImportError:
        return int(DEFAULT_LIMIT * PACKED)
    return int(GCS_STORAGE_MAX_SIZE * PACKED)


def check_size(parcel: Parcel, most: int) -> None:
    """Raise ConfigError for a parcel above `most` bytes, or above what Ray takes, naming what is largest in it."""
    limit = min(most, upload_limit())
    if parcel.size <= limit:
        return
    sizes = {name: data.stat().st_size for name, data in parcel.files.items() if isinstance(data, Path)}
    name = max(sizes, key=lambda name: sizes[name])
    raise ConfigError(
        f"{parcel.size / 2**20:,.0f} MB would be uploaded, {sizes[name] / 2**20:,.0f} of them {name}; "
        f"the limit is {limit / 2**20:,.0f} MB.",
        next_step="Put the bundle where the cluster's nodes see it (a shared folder, s3://...) and give that path.",
    )


def submit(
    client: Client,
    parcel: Parcel,
    *,
    check: bool = True,
    again: bool = False,
    gpus: float = 0,
    any_version: bool = False,
) -> Submitted:
    """Submit a parcel, or find it running or finished.

    check : the first step looks at what is named. again : begin a new attempt though one has finished.
    """
    attempt, last = _last_attempt(client, parcel.submission_id)
    if last is not None and not last.status.is_terminal():
        return Submitted(_name(parcel.submission_id, attempt), "running", attempt)
    if last is not None and last.status == JobStatus.SUCCEEDED and not (again or KINDS[parcel.kind].repeats):
        return Submitted(_name(parcel.submission_id, attempt), "finished", attempt)
    attempt += 1
    job = _name(parcel.submission_id, attempt)
    with tempfile.TemporaryDirectory(prefix="slideflow-ray-") as folder:
        parcel.unpack(Path(folder), check=check, any_version=any_version)
        try:
            client.submit_job(
                entrypoint=shlex.join([client.cluster.python, PROBE, parcel.script, *parcel.arguments]),
                submission_id=job,
                runtime_env={"working_dir": folder, "env_vars": {JOB: job}},
                metadata={"slideflow_ray": version(), "kind": parcel.kind, "out": parcel.out},
            )
        except RuntimeError as error:
            if isinstance(error, InfrastructureError) or client.info(job) is None:
                raise InfrastructureError(f"{client.cluster.address} did not take the job: {_short(error)}.") from error
            return Submitted(job, "running", attempt)  # somebody submitted the same at the same moment
    return Submitted(job, "started", attempt)


def _last_attempt(client: Client, base: str) -> tuple[int, JobDetails | None]:
    """The number of the latest attempt, and what the cluster knows of it; 0 where it knows none."""
    attempt, last = 0, None
    while (found := client.info(_name(base, attempt + 1))) is not None:
        attempt, last = attempt + 1, found
    return attempt, last


def _name(base: str, attempt: int) -> str:
    return base if attempt == 1 else f"{base}-{attempt}"


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300].rstrip(". ")


# following


def follow(client: Client, job: str, write: Callable[[str], object]) -> int:
    """Write a job's log as it grows, from its beginning, and return the job's exit code.

    Raises InfrastructureError when the cluster is away for `LOST_S`; the job may go on without a follower.
    """
    log = _Log(write)
    heard = time.monotonic()
    while True:
        try:
            asyncio.run(_tail(client, job, log))
            found = client.known(job)
            heard = time.monotonic()
            if found.status.is_terminal():
                return exit_code(found)
        except (InfrastructureError, OSError, RuntimeError) as error:
            if isinstance(error, ConfigError):
                raise
            if time.monotonic() - max(heard, log.heard) > LOST_S:
                said = f"{client.cluster.address} has not answered for {LOST_S:g} s while {job} was followed."
                raise InfrastructureError(said, next_step=f"Start the cluster again if it is gone. {AGAIN}") from error
        time.sleep(1.0)


class _Log:
    """Writes what is new of a log that is told from its beginning each time."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write
        self.shown = 0
        self.heard = time.monotonic()

    def told(self, text: str, at: int) -> int:
        """Take the text that begins at character `at`; return where it ends."""
        new = text[max(0, self.shown - at) :]
        if new:
            self.write(new)
        self.heard = time.monotonic()
        self.shown = max(self.shown, at + len(text))
        return at + len(text)


async def _tail(client: Client, job: str, log: _Log) -> None:
    """Follow the log until it ends, or until the job has while the log is silent."""
    lines = client.tail_job_logs(job).__aiter__()
    at = 0
    waiting: asyncio.Future[str] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(_next(lines))
            done, _ = await asyncio.wait({waiting}, timeout=QUIET_S)
            if done:
                try:
                    at = log.told(waiting.result(), at)
                except StopAsyncIteration:
                    return
                waiting = None
            elif (await asyncio.to_thread(client.known, job)).status.is_terminal():
                return
            else:
                log.heard = time.monotonic()
    finally:
        if waiting is not None:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await waiting


async def _next(lines: Any) -> str:
    found: str = await lines.__anext__()
    return found


def exit_code(found: JobDetails) -> int:
    """Return the exit code of a job that has ended: its own, or that of what befell it.

    >>> exit_code(JobDetails(type="SUBMISSION", status="FAILED", entrypoint="", driver_exit_code=3))
    3
    """
    if found.status == JobStatus.SUCCEEDED:
        return 0
    if found.status == JobStatus.STOPPED:
        return EXIT_INTERRUPTED
    code = found.driver_exit_code
    if code == NOT_FOUND:
        return EXIT_CONFIG
    return code if code in OURS and code is not None else EXIT_INFRA


def ended(found: JobDetails, code: int) -> str:
    """Return a line on how a job ended, and what to do."""
    if found.status == JobStatus.SUCCEEDED:
        return f"{found.submission_id}: done"
    if found.status == JobStatus.STOPPED:
        return f"{found.submission_id}: stopped. Next: {AGAIN}"
    if found.driver_exit_code == NOT_FOUND:
        return f"{found.submission_id}: its interpreter is not on the cluster. Next: give --python its path there."
    if code == EXIT_FAILURES:
        return f"{found.submission_id}: ended with failures (exit code 3). Next: see the log above."
    if code == EXIT_DRIFT:
        return f"{found.submission_id}: finished, and what came in has drifted (exit code 6). Next: see the log above."
    if found.driver_exit_code == code:
        return f"{found.submission_id}: failed (exit code {code}). Next: see the log above."
    cause = (found.message or "no reason given").splitlines()[0][:300]
    return f"{found.submission_id}: lost ({cause}). Next: {AGAIN}"


def ours(client: Client) -> list[JobDetails]:
    """Return the jobs that this package has submitted, the latest last."""
    found = [job for job in client.list_jobs() if str(job.submission_id or "").startswith(PREFIX)]
    return sorted(found, key=lambda job: job.start_time or 0)


def report(client: Client, job: str) -> bytes:
    """Return the report that a finished job left with the job server.

    Raises ConfigError where there is none: the job has not ended, wrote none, or its head is another by now.
    """
    node = client.known(job).driver_node_id
    query = f"node_id={node}&filename=report-{quote(job, safe='')}.html&lines=-1&download_file=true"
    answer = client._do_request("GET", f"/api/v0/logs/file?{query}") if node else None
    if answer is None or answer.status_code != 200 or not answer.content.lstrip().startswith(b"<"):
        raise ConfigError(
            f"{job} has left no report.",
            next_step="Wait until it has ended; or open report.html in its output folder.",
        )
    return answer.content
