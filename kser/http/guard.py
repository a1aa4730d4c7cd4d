"""Who may call the API: whoever has the token; without one, this machine, but no foreign web page in its browser."""

import hmac
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from flask import Request, Response

from kser.errors import ConfigurationError
from kser.http.problems import problem

__all__ = ["check_listen", "guard", "is_loopback"]

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def is_loopback(host: str) -> bool:
    """Whether this name or address is of this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check_listen(host: str, token: str | None) -> None:
    """Raise ConfigurationError for an address that others can reach, unless there is a token."""
    if token is not None and not token.strip():
        raise ConfigurationError("The token is empty: give a long random text, as `openssl rand -hex 32` makes")
    if token is None and not is_loopback(host):
        raise ConfigurationError(
            f"Listening on {host} lets other machines in: set a token (--token, KSER_WEB_TOKEN), or listen on 127.0.0.1"
        )


def guard(token: str | None) -> Callable[[Request], Response | None]:
    """A check of requests: None when one may pass, else the answer that refuses it.

    Args:
        token: what follows ``Authorization: Bearer``. None: no token is asked for, and then only requests from this
            machine pass, for a name of this machine, so that no web site can have its name point here (DNS rebinding).

    A request that changes something and comes from a web page of another site is refused in any case.
    """
    wanted = None if token is None else token.encode()

    def check(request: Request) -> Response | None:
        if wanted is None and request.remote_addr and not is_loopback(request.remote_addr):
            return problem(403, f"Without a token only this machine may call, not {request.remote_addr}")
        if wanted is None and not is_loopback(_name(request.host)):
            return problem(403, f"Without a token only requests for this machine's own name pass, not {request.host!r}")
        if wanted is not None:
            kind, _, given = request.headers.get("Authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), wanted)
            if kind.lower() != "bearer" or not same:
                return problem(
                    401,
                    "A token is needed: send the header Authorization: Bearer TOKEN",
                    {"WWW-Authenticate": 'Bearer realm="kser"'},
                )
        origin = request.headers.get("Origin")
        if request.method not in _READING and origin is not None and urlsplit(origin).netloc != request.host:
            return problem(403, f"A web page of {origin} may not do this")
        return None

    return check


def _name(host: str) -> str:
    """The name in ``name:port`` or ``[::1]:port``."""
    return host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
