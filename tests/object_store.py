"""An object store on 127.0.0.1 (moto's S3 server) that fails as real ones do, when told to."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "bucket"


class Faults:
    """What goes wrong, by the number of the request: every n-th is answered with 503, cut short, or not at all."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app
        self.kinds = ("503", "short", "reset", "429")
        self._turn = itertools.count()
        self.calm()

    def calm(self) -> None:
        """Let nothing go wrong, and forget what did."""
        self.every = 0
        self.counts: dict[str, int] = {}
        self.before: Callable[[dict[str, Any]], str | None] = lambda environ: None  # a status to answer with, or None
        self.sent: Callable[[dict[str, Any], int], None] = lambda environ, size: None  # told of each body that is whole

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        if status := self.before(environ):
            start(status, [])
            return [b""]
        turn = next(self._turn)
        if not self.every or turn % self.every:
            whole = list(self.app(environ, start))
            if environ["REQUEST_METHOD"] == "GET":
                self.sent(environ, sum(len(piece) for piece in whole))
            return whole
        kind = self.kinds[turn // self.every % len(self.kinds)]
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if kind == "short" and environ["REQUEST_METHOD"] != "GET":
            kind = "503"
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind == "reset":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        if kind in ("503", "429"):
            status = "503 Slow Down" if kind == "503" else "429 Too Many Requests"
            start(status, [("Content-Type", "application/xml"), ("Retry-After", "0")])
            return [b"<Error><Code>SlowDown</Code></Error>"]
        body = b"".join(self.app(environ, start))
        return [body[: len(body) // 2]]  # the header promised all of it


@contextmanager
def object_store() -> Iterator[tuple[str, Faults]]:
    """Serve one empty bucket; give the server's address and its faults."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT")):
            pass
        yield url, faults
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
