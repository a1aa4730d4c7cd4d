"""Health of a worker over HTTP, for Kubernetes and its like: is it alive, can it take more.

GET /healthz is 200 while the loop makes progress, GET /readyz while it is in the group, has something free to run its
classes, and is neither paused nor draining; else 503. Both give JSON: ``{"status", "reasons", "worker", ...}``.
"""

import json
import logging
import socketserver
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from kser.errors import ConfigurationError

__all__ = ["HealthServer", "HealthStatus", "RunningTask"]

logger = logging.getLogger(__name__)

#: A loop that has not turned for so long, in seconds, hangs.
STALE_S: Final = 30.0
#: Longest wait for a request to arrive, in seconds.
_REQUEST_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class RunningTask:
    """One task that is being run."""

    entrypoint: str
    uuid: str
    #: Seconds since it began, and since its last heartbeat(); None: none yet.
    seconds: float
    heartbeat_s_ago: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthStatus:
    """How a worker is doing."""

    worker: str
    group: str
    #: Why it can take nothing; empty when it can.
    reasons: tuple[str, ...] = ()
    #: Seconds since the loop turned last.
    polled_s_ago: float = 0.0
    running: tuple[RunningTask, ...] = ()
    #: Messages taken and not run; and run, but not settled.
    in_flight: int = 0
    unsettled: int = 0
    free_executors: int = 0
    #: What it owns: topic -> numbers of partitions.
    assigned: Mapping[str, Sequence[int]] = field(default_factory=dict)
    draining: bool = False

    @property
    def partitions(self) -> int:
        """How many partitions it owns."""
        return sum(map(len, self.assigned.values()))

    @property
    def alive(self) -> bool:
        """Whether the loop makes progress."""
        return self.polled_s_ago < STALE_S

    def report(self, *, ready: bool) -> tuple[bool, dict[str, Any]]:
        """Whether the answer is good, and what to say."""
        reasons = [] if self.alive else [f"the loop has not turned for {self.polled_s_ago:.0f} s"]
        if ready:
            reasons += self.reasons
        return not reasons, {
            "status": "ok" if not reasons else "unavailable",
            "reasons": reasons,
            "worker": self.worker,
            "group": self.group,
            "polled_s_ago": round(self.polled_s_ago, 3),
            "in_flight": self.in_flight,
            "unsettled": self.unsettled,
            "free_executors": self.free_executors,
            "partitions": self.partitions,
            "draining": self.draining,
            "running": [
                {
                    "entrypoint": task.entrypoint,
                    "uuid": task.uuid,
                    "seconds": round(task.seconds, 3),
                    "heartbeat_s_ago": None if task.heartbeat_s_ago is None else round(task.heartbeat_s_ago, 3),
                }
                for task in self.running
            ],
        }


class _Server(ThreadingHTTPServer):
    """http.server's, without its look-up of the host's name, which may take long, and its tracebacks on stderr."""

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the interface of socketserver
        logger.debug("Health: a request was not answered: %r", sys.exc_info()[1])


class HealthServer:
    """Serves /healthz and /readyz in a thread of its own.

    Args:
        port: TCP port; 0 takes a free one.
        status: gives the status; called from the server's threads.
        host: address to listen on.
    """

    def __init__(self, port: int, status: Callable[[], HealthStatus], host: str = "127.0.0.1") -> None:
        self._status = status
        self._address = (host, port)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1]) if self._server is not None else self._address[1]

    def start(self) -> None:
        """Listen. Raises ConfigurationError when that cannot be done, because the port is taken for example."""
        try:
            self._server = _Server(self._address, self._handler())
        except (OSError, OverflowError) as exc:
            raise ConfigurationError(
                f"The health page cannot listen on {self._address[0]}:{self._address[1]}: "
                f"{getattr(exc, 'strerror', None) or exc}; give another port (--health), or leave it out",
                extra={"port": self._address[1]},
            ) from exc
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.2], name="kser-health", daemon=True)
        self._thread.start()
        logger.info("Health on http://%s:%s/healthz and /readyz", self._address[0], self.port)

    def stop(self) -> None:
        """Listen no more. A second call does nothing."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        status = self._status

        class Handler(BaseHTTPRequestHandler):
            timeout = _REQUEST_S
            server_version = "kser"
            sys_version = ""

            def do_GET(self) -> None:
                path = self.path.partition("?")[0].rstrip("/")
                if path not in ("/healthz", "/readyz"):
                    self._answer(HTTPStatus.NOT_FOUND, {"error": "there are /healthz and /readyz"})
                    return
                try:
                    good, said = status().report(ready=path == "/readyz")
                except Exception:
                    logger.exception("The health of the worker cannot be told")
                    self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "the status failed; the log says why"})
                    return
                self._answer(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, said)

            do_HEAD = do_GET  # noqa: N815

            def _refuse(self) -> None:
                self._answer(HTTPStatus.METHOD_NOT_ALLOWED, {"error": "only GET and HEAD"})

            def __getattr__(self, name: str) -> Any:
                # http.server looks for a do_METHOD, and answers 501 where there is none.
                if name.startswith("do_"):
                    return self._refuse
                raise AttributeError(name)

            def _answer(self, code: HTTPStatus, said: dict[str, Any]) -> None:
                body = json.dumps(said).encode() + b"\n"
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                if code is HTTPStatus.METHOD_NOT_ALLOWED:
                    self.send_header("Allow", "GET, HEAD")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the interface of http.server
                logger.debug("Health: " + format, *args)

        return Handler
