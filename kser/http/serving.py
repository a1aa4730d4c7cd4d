"""Server: a WSGI program on a port, served by waitress with a bounded number of threads."""

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import waitress
from waitress import wasyncore

from kser.errors import ConfigurationError
from kser.http.guard import check_listen
from kser.http.wire import MAX_BODY_BYTES

__all__ = ["DEFAULT_PORT", "Server"]

logger = logging.getLogger(__name__)

DEFAULT_PORT: Final = 5000
#: Longest wait for something to happen on a connection, and at the end for answers to leave, in seconds.
_TURN_S: Final = 1.0
#: Connections at a time; those of callers who are not being answered cost next to nothing.
_CONNECTIONS: Final = 1000


class Server:
    """Serves a WSGI program in threads of its own, until stop().

    Args:
        app: the program.
        host: address to listen on; one that others can reach needs a token.
        port: TCP port; 0 takes a free one.
        token: the one that ``app`` asks for; None: it asks for none.
        threads: requests that are answered at a time; others wait.
        on_stop: called first of all by stop(), so that endless answers can end.

    Raises ConfigurationError when it may not, or cannot, listen there. It listens from then on.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        *,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        token: str | None = None,
        threads: int = 16,
        on_stop: Callable[[], object] = lambda: None,
    ) -> None:
        check_listen(host, token)
        self._socket = _listen(host, port)
        self._on_stop = on_stop
        self._map: dict[int, Any] = {}
        self._server = waitress.create_server(
            app,
            map=self._map,
            sockets=[self._socket],
            threads=threads,
            max_request_body_size=MAX_BODY_BYTES,
            channel_request_lookahead=1,  # so that a caller who went away is noticed while it is answered
            connection_limit=_CONNECTIONS,
            ident="kser",
        )
        self._thread = threading.Thread(target=self._serve, name="kser-web", daemon=True)
        self._ended = threading.Event()
        self._started = False

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """Where it can be called from this machine."""
        host = str(self._socket.getsockname()[0])
        if host in ("0.0.0.0", "::"):  # noqa: S104 - it is compared, not listened on
            host = "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def start(self) -> None:
        """Answer requests."""
        self._started = True
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    def stop(self, timeout_s: float = 10) -> None:
        """Begin nothing more, and let what is being answered end, for some seconds. A second call does nothing."""
        self._on_stop()
        if self._ended.is_set():
            return
        self._server.task_dispatcher.shutdown(timeout=timeout_s)
        self._ended.set()
        if self._started:
            self._server.pull_trigger()
            self._thread.join(2 * _TURN_S)
        wasyncore.close_all(self._map)

    def _serve(self) -> None:
        # Not by run() of waitress, which nobody can end from outside.
        while not self._ended.is_set():
            wasyncore.loop(_TURN_S, True, self._map, 1)
        end = time.monotonic() + _TURN_S
        while self._leaving() and time.monotonic() < end:
            wasyncore.loop(0.05, True, self._map, 1)

    def _leaving(self) -> bool:
        """Whether there are answers that have not left yet."""
        return any(channel.total_outbufs_len for channel in list(self._server.active_channels.values()))

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family)
    except (OSError, OverflowError) as exc:
        raise ConfigurationError(
            f"Cannot listen on {host}:{port}: {getattr(exc, 'strerror', None) or exc}; give another --port or --host",
            extra={"host": host, "port": port},
        ) from exc
