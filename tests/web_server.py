"""A web server on 127.0.0.1 for files of one folder: with ETags and ranges, or without, slow, or elsewhere.

obstore's own requests decide what is asked; the server does what RFC 9110 says of them, or what it is told to.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@dataclass
class Web:
    """What the server does. `asked` are (method, path, range) in order; `moved` answers a path with a redirect."""

    folder: Path
    ranges: bool = True
    tags: bool = True
    weak: bool = False
    dates: bool = True
    conditions: bool = True
    latency_s: float = 0.0
    bytes_per_s: float = float("inf")
    moved: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    before: Callable[[str], None] = lambda path: None
    count: Any = None  # multiprocessing.Array of requests and bytes, where the server is a process of its own


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    web: Web

    def do_HEAD(self) -> None:
        """Answer without the body."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Answer with what was asked for."""
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        wanted = self.headers.get("Range", "")
        self.web.asked.append((self.command, self.path, wanted))
        self.web.before(self.path)
        time.sleep(self.web.latency_s)
        path = self.web.folder / unquote(self.path).lstrip("/")
        if self.path in self.web.moved:
            self._send(302, b"", {"Location": self.web.moved[self.path]}, body)
        elif not path.is_file():
            self._send(404, b"", {}, body)
        else:
            self._file(path, wanted, body)

    def _file(self, path: Path, wanted: str, body: bool) -> None:
        data = path.read_bytes() if self.web.count is None else _held(path)
        tag = f'"{_tag(path, data)}"'
        headers = {"ETag": f"W/{tag}" if self.web.weak else tag} if self.web.tags else {}
        if self.web.dates:
            headers["Last-Modified"] = formatdate(path.stat().st_mtime, usegmt=True)
        if self.web.conditions and self.headers.get("If-Match", tag) != tag:  # what begins with W/ matches nothing
            self._send(412, b"", {}, body)
            return
        if self.web.ranges:
            headers["Accept-Ranges"] = "bytes"
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) if self.web.ranges else None
        if found is None:
            self._send(200, data, headers, body)
            return
        first, last = int(found[1]), min(int(found[2]), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, data[first : last + 1], headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        step = 2**18
        for start in range(0, len(data) if body else 0, step):
            time.sleep(len(data[start : start + step]) / self.web.bytes_per_s)
            try:
                self.wfile.write(data[start : start + step])
            except OSError:  # who asked has gone
                return
        if self.web.count is not None:
            with self.web.count.get_lock():
                self.web.count[0] += 1
                self.web.count[1] += len(data) if body else 0

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


_FILES: dict[Path, bytes] = {}


def _held(path: Path) -> bytes:
    """A file that does not change, read once: so a small part of it does not cost a whole reading."""
    if path not in _FILES:
        _FILES[path] = path.read_bytes()
    return _FILES[path]


def _tag(path: Path, data: bytes) -> str:
    return path.name if path in _FILES else hashlib.md5(data, usedforsecurity=False).hexdigest()


@contextmanager
def web_server(folder: Path) -> Iterator[tuple[str, Web]]:
    """Serve a folder; give the server's address and what it does, which may be changed as it goes."""
    web = Web(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Mine", (Handler,), {"web": web}))
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _serve(folder: Path, latency_s: float, bytes_per_s: float, count: Any, ready: Any) -> None:
    with web_server(folder) as (url, web):
        web.latency_s, web.bytes_per_s, web.count = latency_s, bytes_per_s, count
        ready.send(url)
        ready.recv()


@contextmanager
def own_process(folder: Path, latency_s: float, bytes_per_s: float) -> Iterator[tuple[str, Any]]:
    """Serve a folder whose files do not change from a process of its own; give its address, and requests and bytes."""
    context = multiprocessing.get_context("spawn")
    count = context.Array("q", 2)
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(folder, latency_s, bytes_per_s, count, there), daemon=True)
    process.start()
    try:
        yield here.recv(), count
    finally:
        here.send("end")
        process.join()
