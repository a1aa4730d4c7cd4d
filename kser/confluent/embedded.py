"""The embedded broker: librdkafka's mock cluster, a Kafka broker with nothing to install.

It runs in a child process, is reachable by any Kafka client on 127.0.0.1, and keeps everything in memory. It is for
demos, development and tests: at most 5 MB or 100,000 records a partition are kept, then the oldest go silently, and
transactions are not isolated, so work on it is at_least_once. Consumer groups balance at once with
``group.protocol=consumer`` (KIP-848); a classic group needs about 5 s for its second member.

Clients cannot create topics on it (a CreateTopics request gets no answer): whoever starts it does, and the first use
of any other topic name makes that topic with DEFAULT_PARTITIONS partitions.
"""

import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from kser.errors import ConfigurationError, TransportError
from kser.transport.names import TOPIC_NAME_RULE, is_topic_name

__all__ = ["DEFAULT_PARTITIONS", "REQUESTS", "EmbeddedBroker"]

#: Partitions of a topic that nobody created: its first use on the embedded broker makes it. Fixed in librdkafka.
DEFAULT_PARTITIONS: Final = 4

#: Requests that EmbeddedBroker.fail_next() can make fail: their names and Kafka's api keys.
REQUESTS: Final[Mapping[str, int]] = {
    "Produce": 0,
    "Fetch": 1,
    "ListOffsets": 2,
    "Metadata": 3,
    "OffsetCommit": 8,
    "OffsetFetch": 9,
    "FindCoordinator": 10,
    "JoinGroup": 11,
    "Heartbeat": 12,
    "LeaveGroup": 13,
    "SyncGroup": 14,
    "ApiVersions": 18,
    "InitProducerId": 22,
    "AddPartitionsToTxn": 24,
    "AddOffsetsToTxn": 25,
    "EndTxn": 26,
    "TxnOffsetCommit": 28,
    "ConsumerGroupHeartbeat": 68,
}

_CHILD: Final = Path(__file__).with_name("mock_cluster.py")
_MAX_REPLICATION: Final = 3
_COMMAND_TIMEOUT_S: Final = 10.0
_END_TIMEOUT_S: Final = 5.0


class EmbeddedBroker:
    """A Kafka broker of its own, up when this returns, gone at close().

    Its process ends with the one that made it, however that one ends, kill -9 included, and ignores Ctrl-C, which is
    for its owner. May be shared by threads. A forked copy of the owner can use the address, but not this object.

    Args:
        topics: topics to create, name to number of partitions.
        brokers: how many brokers the cluster has; their ids are 1 to ``brokers``.
        start_timeout_s: how long it may take to come up; it usually takes 0.1 s.

    Raises:
        ConfigurationError: an argument is wrong, or confluent-kafka's librdkafka is missing or has no mock cluster.
        TransportError: it did not come up.
    """

    def __init__(
        self, topics: Mapping[str, int] | None = None, *, brokers: int = 1, start_timeout_s: float = 10
    ) -> None:
        topics = dict(topics or {})
        _check_number("brokers", brokers, 1)
        for name, partitions in topics.items():
            _check_topic(name, partitions)
        self._brokers = brokers
        self._lock = threading.Lock()
        self._closed = False
        self._owner = os.getpid()
        self._buffer = b""
        self._calls = 0
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        try:
            self._process = self._start()
        except BaseException:
            self._words.close()
            raise
        try:
            about = self._answer(start_timeout_s, "start")
            self._bootstrap_servers: str = about["bootstrap_servers"]
            self._version: str = about["version"]
            for name, partitions in topics.items():
                self.create_topic(name, partitions)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"pid {self.pid}"
        return f"<EmbeddedBroker {self._bootstrap_servers} {state}>"

    @property
    def bootstrap_servers(self) -> str:
        """The addresses for clients: host:port of each broker, separated by commas."""
        return self._bootstrap_servers

    @property
    def librdkafka_version(self) -> str:
        """The version of the library that plays the broker, e.g. "2.16.0"."""
        return self._version

    @property
    def pid(self) -> int:
        """The id of the broker's process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """False once the broker's process has ended, by close() or by itself."""
        return not self._closed and self._process.poll() is None

    def create_topic(self, name: str, partitions: int) -> None:
        """Make a topic, with a copy on each broker, on three at most.

        Raises:
            ConfigurationError: a wrong name or number.
            TransportError: it exists already, or the broker has ended.
        """
        _check_topic(name, partitions)
        self._call("create_topic", name, partitions, min(self._brokers, _MAX_REPLICATION))

    def fail_next(self, api: str, *errors: int) -> None:
        """Let the next requests of this type fail, one with each of ``errors``, in that order, whoever sends them.

        Args:
            api: a name of REQUESTS, e.g. "Produce".
            errors: Kafka's error codes, e.g. ``KafkaError.NOT_LEADER_FOR_PARTITION``. ``KafkaError._TRANSPORT`` cuts
                the connection instead of answering; 0 lets that request pass.
        """
        key = _api_key(api)
        for code in errors:
            if not isinstance(code, int) or isinstance(code, bool):
                raise ConfigurationError(f"error {code!r} is not a Kafka error code: pass a whole number")
        self._call("fail_next", key, list(errors))

    def clear_failures(self, api: str) -> None:
        """Forget the errors of fail_next() for this type of request that no request has got yet."""
        self._call("clear_failures", _api_key(api))

    def broker_down(self, broker: int) -> None:
        """Cut the connections of this broker and refuse new ones. Its partitions keep it as their leader."""
        self._call("broker_down", self._check_broker(broker))

    def broker_up(self, broker: int) -> None:
        """Let this broker take connections again; what it held is still there."""
        self._call("broker_up", self._check_broker(broker))

    def rtt(self, broker: int, milliseconds: int) -> None:
        """Let each answer of this broker take ``milliseconds``; 0 is as fast as it can."""
        _check_number("milliseconds", milliseconds, 0)
        self._call("rtt", self._check_broker(broker), milliseconds)

    def close(self) -> None:
        """End the broker's process; all its topics are gone. A second call does nothing."""
        # In a forked copy of the owner this object is not the owner's: the broker is still in use there.
        if self._owner != os.getpid():
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        if os.name != "posix":
            raise ConfigurationError("the embedded broker runs on Linux and macOS only: use a real Kafka here")
        if not sys.executable:
            raise ConfigurationError("the embedded broker needs sys.executable, the path of Python, and it is empty")
        command = [sys.executable, "-I", "-S", str(_CHILD), str(self._owner), _library(), str(self._brokers)]
        # A session of its own: Ctrl-C and a signal to the owner's process group are the owner's business, who may
        # need the broker to end its work. Descriptors are closed, so that the child keeps nobody's pipe open.
        return subprocess.Popen(  # noqa: S603 - our own script and checked numbers
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            bufsize=0,
            start_new_session=True,
        )

    def _call(self, name: str, *args: Any) -> None:
        if self._owner != os.getpid():
            raise TransportError(f"{self!r} belongs to process {self._owner}: only there it can be steered")
        with self._lock:
            if self._closed:
                raise TransportError(f"the embedded broker {self._bootstrap_servers} is closed: start a new one")
            # An earlier call may have been interrupted before its answer came: the number tells answers apart.
            self._calls += 1
            self._send({"id": self._calls, "call": name, "args": args})
            self._answer(_COMMAND_TIMEOUT_S, name)

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        # A child that is gone is told of by _answer(), with its last words.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def _answer(self, timeout_s: float, what: str) -> Any:
        deadline = time.monotonic() + timeout_s
        answer: dict[str, Any] = {"id": None}
        while answer["id"] != self._calls:
            line = self._read_line(deadline)
            if line is None:
                raise TransportError(f"the embedded broker (pid {self.pid}) did not answer {what} within {timeout_s} s")
            if not line:
                raise TransportError(
                    f"the embedded broker (pid {self.pid}) has ended with exit code {self._wait()}, its topics are "
                    f"lost: start a new one{self._last_words()}"
                )
            answer = json.loads(line)
        if "error" not in answer:
            return answer["ok"]
        if answer["kind"] == "missing":
            raise ConfigurationError(
                f"no embedded broker: {answer['error']}; install a confluent-kafka wheel of version 2.15 or later"
            )
        raise TransportError(f"the embedded broker refused {what}: {answer['error']}")

    def _read_line(self, deadline: float) -> bytes | None:
        """One line; b"" when the child closed its end, None when the deadline passed."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                chunk = os.read(self._process.stdout.fileno(), 65536)
                if not chunk:
                    return b""
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _end(self) -> None:
        self._send({"id": self._calls + 1, "call": "close", "args": []})
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._wait()
        self._process.stdout.close()
        self._words.close()

    def _wait(self) -> int:
        try:
            return self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _last_words(self) -> str:
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return f" (its last words: {lines[-1]})" if lines else ""

    def _check_broker(self, broker: int) -> int:
        if not isinstance(broker, int) or not 1 <= broker <= self._brokers:
            raise ConfigurationError(f"there is no broker {broker!r}: the ids are 1 to {self._brokers}")
        return broker


def _library() -> str:
    """The path of something that is linked to the librdkafka of confluent_kafka, in whatever way it was installed.

    Its extension module is: looking a function up in it finds those of the libraries it needs too.
    """
    spec = importlib.util.find_spec("confluent_kafka")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("cimpl.*")):
            if path.suffix == ".so":
                return str(path)
    raise ConfigurationError("no embedded broker: confluent-kafka is not installed; run: pip install confluent-kafka")


def _api_key(api: str) -> int:
    if api not in REQUESTS:
        raise ConfigurationError(f"unknown request type {api!r}: take one of {', '.join(REQUESTS)}")
    return REQUESTS[api]


def _check_topic(name: str, partitions: int) -> None:
    if not is_topic_name(name):
        raise ConfigurationError(f"{name!r} {TOPIC_NAME_RULE}")
    _check_number(f"partitions of topic {name}", partitions, 1)


def _check_number(what: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{what} is {value!r}: pass a whole number, {least} or more")
