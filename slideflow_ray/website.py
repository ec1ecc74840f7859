"""Files on the web, where they are allowed: only what one may ask for, wherever a server sends us on to.

obstore's client follows redirects to anywhere. Here each step is checked as the first address was, and the
address that a name turned out to be is checked when the connection stands, before anything is asked.
The functions answer, and raise, as obstore's do.
"""

from __future__ import annotations

import http.client
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from obstore.exceptions import GenericError, NotSupportedError, PermissionDeniedError, PreconditionError

from slideflow_ray.uris import WEB, check_uri, is_forbidden

TIMEOUT_S = 60.0
REDIRECTS = 5


@dataclass(frozen=True)
class Website:
    """Files below ``https://host``. `schemes` are those that a redirect may lead to."""

    root: str
    schemes: tuple[str, ...]

    def head(self, key: str) -> dict[str, Any]:
        """Return path, size and e_tag of a file. Raises as `get` does."""
        with self._ask("HEAD", key, {}) as answer:
            return _about(key, answer)

    def get(self, key: str, options: dict[str, Any]) -> Answer:
        """Return a file, or the `range` (start, end) of it, if it is still the one that `if_match` names.

        Raises FileNotFoundError, PreconditionError, NotSupportedError (no ranges), PermissionDeniedError, GenericError.
        """
        headers = {"If-Match": str(options["if_match"])} if options.get("if_match") else {}
        if part := options.get("range"):
            headers["Range"] = f"bytes={part[0]}-{part[1] - 1}"
        answer = self._ask("GET", key, headers)
        if part and answer.status != 206:
            answer.close()
            raise NotSupportedError(f"{self.root} gives no part of a file.")
        return Answer(_about(key, answer), answer)

    def _ask(self, method: str, key: str, headers: dict[str, str]) -> Any:
        request = urllib.request.Request(f"{self.root}/{quote(key, safe='/%')}", headers=headers, method=method)  # noqa: S310 - http(s)
        opener = urllib.request.build_opener(_Http, _Https, _Redirects(self.schemes))
        try:
            return opener.open(request, timeout=TIMEOUT_S)
        except HTTPError as error:
            error.close()
            _refuse(error)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(reason := getattr(error, "reason", error), Forbidden):
                raise reason from None
            raise GenericError(f"{self.root} does not answer: {error}") from error


def post(url: str, data: bytes, timeout_s: float) -> int:
    """Send JSON to an address and return the status; a redirect is an answer, and not followed.

    Raises ValueError for an address that nothing may be sent to, OSError where nobody answers.
    """
    check_address(url)
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - checked above
    try:
        with urllib.request.build_opener(_Http, _Https, _Stay).open(request, timeout=timeout_s) as answer:
            return int(answer.status)
    except HTTPError as error:
        error.close()
        return error.code
    except http.client.HTTPException as error:
        raise OSError(f"no answer in HTTP: {type(error).__name__}") from error


def check_address(url: str) -> None:
    """Raise ValueError for an address that is not http(s), or that nothing may be sent to."""
    check_uri(url.partition("?")[0])
    if urlsplit(url).scheme not in WEB or not url.isascii() or " " in url:
        raise ValueError("is no address as https://host/path")
    if urlsplit(url).port == 0:
        raise ValueError("has port 0")


class _Stay(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class Forbidden(PermissionDeniedError, OSError):
    """A server, or its name, led to where nothing is asked."""


@dataclass(frozen=True)
class Answer:
    """A file, or a part of it, that is still to be read."""

    meta: dict[str, Any]
    _body: Any

    def stream(self, min_chunk_size: int) -> Iterator[bytes]:
        """Give it piece by piece. Raises GenericError where it breaks off."""
        expected, came = int(self._body.headers["Content-Length"]), 0
        with self._body:
            while came < expected:
                try:
                    piece = self._body.read(min(min_chunk_size, expected - came))
                except (OSError, http.client.HTTPException) as error:
                    raise GenericError(f"The answer broke off: {error}") from error
                if not piece:
                    raise GenericError(f"{expected:,} bytes were promised and {came:,} came.")
                came += len(piece)
                yield piece

    def bytes(self) -> bytes:
        """Return all of it. Raises GenericError where it breaks off."""
        return b"".join(self.stream(2**20))


def _about(key: str, answer: Any) -> dict[str, Any]:
    size = answer.headers["Content-Length"]
    if size is None:
        answer.close()
        raise NotSupportedError(f"The server does not say how long {key} is.")
    modified = answer.headers["Last-Modified"]
    return {"path": key, "size": int(size), "e_tag": answer.headers["ETag"], "last_modified": modified}


def _refuse(error: HTTPError) -> NoReturn:
    kinds: dict[int, type[Exception]] = {
        401: PermissionDeniedError,
        403: PermissionDeniedError,
        404: FileNotFoundError,
        410: FileNotFoundError,
        412: PreconditionError,
        416: NotSupportedError,
    }
    kinds |= dict.fromkeys((301, 302, 303, 307, 308), PermissionDeniedError)  # in circles, or to another scheme
    raise kinds.get(error.code, GenericError)(f"The server says {error.code} {error.reason}") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Goes on only to what a cohort might name."""

    max_redirections = REDIRECTS

    def __init__(self, schemes: tuple[str, ...]) -> None:
        self._schemes = schemes

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        with fp:
            self._check(newurl)
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            new.method = req.get_method()
        return new

    def _check(self, url: str) -> None:
        try:
            check_uri(url.partition("?")[0])
        except ValueError as error:
            raise Forbidden(f"It sends on to an address that {error}") from error
        scheme = urlsplit(url).scheme
        if scheme not in WEB or scheme not in self._schemes:
            raise Forbidden(f"It sends on to {scheme}://, which is not allowed")


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self)


class _TlsConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self)


def _check_peer(connection: http.client.HTTPConnection) -> None:
    address = str(connection.sock.getpeername()[0])
    if is_forbidden(address):
        connection.close()
        raise Forbidden(f"{connection.host} is the link-local address {address}, which is not allowed")


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_TlsConnection, req)
