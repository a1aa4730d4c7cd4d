"""A proxy between Kafka clients and brokers, for tests of what a client does when an answer never comes.

It stands before every broker of a cluster, on ports of its own, and rewrites the brokers' addresses in what they
answer, so that a client that was given ``proxy.bootstrap_servers`` never meets a broker directly. It understands as
much of the protocol as it must: frames, the type of a request (its api key) and the correlation id, by which an answer
belongs to its request. Rules say what is lost on the way:

with KafkaProxy(kafka.bootstrap_servers) as proxy:
    rule = proxy.lose_answer("EndTxn")    # the broker commits, and nobody is told
    ...
    assert rule.hits == 1
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal, Self

from kser.confluent.embedded import REQUESTS

__all__ = ["KafkaProxy", "Rule", "wait_hit"]

#: How long a thread may take to see that it is to end.
_SLICE_S = 0.1
_CONNECT_S = 10.0
_CHUNK = 65536

Direction = Literal["request", "answer"]


class Rule:
    """Requests, or answers to requests, of one type that are lost; made by KafkaProxy.

    Args:
        api: name of the request type, e.g. "EndTxn".
        direction: what is lost.
        first: how many of them pass before the rule begins.
        count: how many are lost; None: all from then on, until end().
        cut: the connection is closed instead of left waiting.
        then: called once, at the first loss, with the port of the broker; in a thread of the proxy, which passes on
            nothing of this connection meanwhile.
    """

    def __init__(
        self,
        api: str,
        direction: Direction,
        *,
        first: int = 0,
        count: int | None = 1,
        cut: bool = False,
        then: Callable[[int], object] | None = None,
    ) -> None:
        if api not in REQUESTS:
            raise ValueError(f"unknown request type {api!r}: take one of {', '.join(REQUESTS)}")
        self.api = REQUESTS[api]
        self.direction = direction
        self.cut = cut
        self._first = first
        self._count = count
        self._then = then
        self._seen = 0
        self._lock = threading.Lock()
        #: How many were lost so far.
        self.hits = 0

    def takes(self, api: int, direction: Direction, port: int) -> bool:
        """Whether this one, to or from the broker on this port, is lost; counts it."""
        if api != self.api or direction != self.direction:
            return False
        with self._lock:
            self._seen += 1
            if self._seen <= self._first or (self._count is not None and self.hits >= self._count):
                return False
            self.hits += 1
            then, self._then = self._then, None
        if then is not None:
            then(port)
        return True

    def end(self) -> None:
        """Lose no more."""
        with self._lock:
            self._count = self.hits


class KafkaProxy:
    """Stands before each broker of a cluster, until close(). May be shared by threads.

    Args:
        bootstrap_servers: host:port of every broker, separated by commas, by address as the brokers tell it.
    """

    def __init__(self, bootstrap_servers: str) -> None:
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._pairs: set[_Pair] = set()
        self._closed = False
        brokers = [address.rpartition(":") for address in bootstrap_servers.split(",")]
        if any(host != "127.0.0.1" for host, _, _ in brokers):
            raise ValueError(
                f"{bootstrap_servers}: a proxy stands before brokers of 127.0.0.1, which is its own address"
            )
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in brokers]
        #: What brokers write of themselves in their answers, host and port -> what the client is to read.
        self.addresses = {
            _written(host, int(port)): _written("127.0.0.1", listener.getsockname()[1])
            for (host, _, port), listener in zip(brokers, self._listeners, strict=True)
        }
        self._threads = [
            threading.Thread(target=self._accept, args=[listener, (host, int(port))], name="proxy", daemon=True)
            for (host, _, port), listener in zip(brokers, self._listeners, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def bootstrap_servers(self) -> str:
        """What to give to clients: the proxy's address for each broker, separated by commas."""
        return ",".join(f"127.0.0.1:{listener.getsockname()[1]}" for listener in self._listeners)

    # -- what is lost ------------------------------------------------------------------------------------------------

    def lose_answer(
        self,
        api: str,
        *,
        first: int = 0,
        count: int | None = 1,
        cut: bool = False,
        then: Callable[[int], object] | None = None,
    ) -> Rule:
        """The broker does what it is asked, and nobody is told. Arguments: see Rule."""
        return self._add(Rule(api, "answer", first=first, count=count, cut=cut, then=then))

    def lose_request(
        self,
        api: str,
        *,
        first: int = 0,
        count: int | None = 1,
        cut: bool = False,
        then: Callable[[int], object] | None = None,
    ) -> Rule:
        """The broker is never asked. Arguments: see Rule."""
        return self._add(Rule(api, "request", first=first, count=count, cut=cut, then=then))

    def cut_all(self) -> int:
        """Close every connection there is; how many. Clients may connect again."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.close()
        return len(pairs)

    def close(self) -> None:
        """Close all connections and listen no more. A second call does nothing."""
        self._closed = True
        for thread in self._threads:
            thread.join(_CONNECT_S)
        for listener in self._listeners:
            listener.close()
        self.cut_all()

    def _add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules = [*self._rules, rule]
        return rule

    # -- inside ------------------------------------------------------------------------------------------------------

    def lost(self, api: int, direction: Direction, port: int) -> Rule | None:
        """The rule that takes this request or answer, or None."""
        return next((rule for rule in self._rules if rule.takes(api, direction, port)), None)

    def readable(self, frame: bytes) -> bytes:
        """An answer with the brokers' addresses replaced: a client must not learn of a way around the proxy."""
        for written, replacement in self.addresses.items():
            if written in frame:
                frame = frame.replace(written, replacement)
        return frame

    def ended(self, pair: "_Pair") -> None:
        """A connection is closed."""
        with self._lock:
            self._pairs.discard(pair)

    def _accept(self, listener: socket.socket, broker: tuple[str, int]) -> None:
        listener.settimeout(_SLICE_S)
        while not self._closed:
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(broker, _CONNECT_S)
            except OSError:  # the broker is down: as it would be without a proxy
                client.close()
                continue
            pair = _Pair(self, client, server)
            with self._lock:
                self._pairs.add(pair)
            pair.start()


class _Pair:
    """One connection of a client, and the one to the broker behind it."""

    def __init__(self, proxy: KafkaProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._port: int = server.getpeername()[1]
        #: Correlation id -> api key, of requests whose answer is awaited.
        self._asked: dict[int, int] = {}
        self._closed = threading.Event()
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.settimeout(None)

    def start(self) -> None:
        """Pass on what comes, in a thread for each direction."""
        for run in (self._requests, self._answers):
            threading.Thread(target=run, name="proxy-connection", daemon=True).start()

    def close(self) -> None:
        """Close both sides. A second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        for one in (self._client, self._server):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._proxy.ended(self)

    def _requests(self) -> None:
        with contextlib.suppress(OSError), contextlib.closing(self):
            for frame in _frames(self._client):
                api, _, correlation = struct.unpack_from(">hhi", frame, 4)
                rule = self._proxy.lost(api, "request", self._port)
                if rule is not None:
                    if rule.cut:
                        return
                    continue
                self._asked[correlation] = api
                self._server.sendall(frame)

    def _answers(self) -> None:
        with contextlib.suppress(OSError), contextlib.closing(self):
            for frame in _frames(self._server):
                (correlation,) = struct.unpack_from(">i", frame, 4)
                api = self._asked.pop(correlation, -1)
                rule = self._proxy.lost(api, "answer", self._port)
                if rule is not None:
                    if rule.cut:
                        return
                    continue
                self._client.sendall(self._proxy.readable(frame))


def _frames(connection: socket.socket) -> Iterator[bytes]:
    """Frames as they come: four bytes that say how long, and what follows. Ends when the other side closes."""
    buffer = bytearray()
    while True:
        while len(buffer) >= 4:
            (size,) = struct.unpack_from(">i", buffer)
            if len(buffer) < 4 + size:
                break
            yield bytes(buffer[: 4 + size])
            del buffer[: 4 + size]
        chunk = connection.recv(_CHUNK)
        if not chunk:
            return
        buffer += chunk


def _written(host: str, port: int) -> bytes:
    """An address as every version of every answer has it: a string, which ends with the host, and the port."""
    return host.encode() + struct.pack(">i", port)


def wait_hit(rule: Rule, within_s: float = 30) -> None:
    """Return once the rule has taken something. Raises AssertionError when that takes too long."""
    until = time.monotonic() + within_s
    while not rule.hits:
        if time.monotonic() > until:
            raise AssertionError(f"no request of api {rule.api} came within {within_s} s")
        time.sleep(0.02)
