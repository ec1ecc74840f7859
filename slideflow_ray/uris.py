"""Which addresses a cohort may name: schemes from a list, no chains, no credentials, no link-local hosts."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import unquote, urlsplit

SCHEMES = ("file", "s3", "gs")
"""What uris may begin with."""

WEB = ("https", "http")
"""What a cohort may name besides; opened only where the environment variable `storage.ALLOW` says so."""

MAX_URI = 4096

METADATA = frozenset(("metadata", "metadata.google.internal", "metadata.goog", "instance-data"))
"""Names of the services that give machines in a cloud their credentials."""

METADATA_NETWORKS = tuple(ipaddress.ip_network(text) for text in ("fd00:ec2::254/128", "100.100.100.200/32"))


def check_uri(uri: str) -> str:
    """Return `uri`, a path or an address, or raise ValueError saying what is wrong with it.

    >>> check_uri("s3://bucket/a.svs")
    's3://bucket/a.svs'
    """
    if len(uri) > MAX_URI:
        raise ValueError(f"has {len(uri):,} characters; at most {MAX_URI:,} would do")
    if not uri.isprintable():
        raise ValueError("must be printable")
    if "://" not in uri:
        return uri
    if "::" in uri.split("://", 1)[0] or uri.count("://") > 1:
        raise ValueError("chains protocols, which is not allowed")
    parts = urlsplit(uri)
    if parts.scheme not in (*SCHEMES, *WEB):
        raise ValueError(f"has the scheme {parts.scheme!r}; allowed are paths and {', '.join((*SCHEMES, *WEB))}")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ValueError("names another machine; write file:///path")
        return uri
    _check_address(parts.hostname, parts.username, parts.password)
    if parts.scheme in WEB and (parts.query or parts.fragment):
        raise ValueError("has a query, which may be a signature; name the file alone, or use s3:// or gs://")
    if ".." in unquote(parts.path).split("/"):
        raise ValueError("leads out of its folder by '..'")
    return uri


def _check_address(host: str | None, user: str | None, password: str | None) -> None:
    if user or password:
        raise ValueError("holds credentials; they come from the environment, never from a cohort")
    if not host:
        raise ValueError("names no host or bucket")
    if host.rstrip(".") in METADATA or is_forbidden(host):
        raise ValueError("names a link-local or metadata address, which is not allowed")


def is_forbidden(host: str) -> bool:
    """Whether a host is an address, in any spelling that the resolver takes (decimal, hex, octal), that is refused."""
    try:
        address = ipaddress.ip_address(socket.inet_ntoa(socket.inet_aton(host)))
    except (OSError, UnicodeEncodeError):
        try:
            address = ipaddress.ip_address(host.split("%")[0])
        except ValueError:
            return False
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    known = any(address.version == net.version and address in net for net in METADATA_NETWORKS)
    return address.is_link_local or address.is_unspecified or address.is_multicast or known
