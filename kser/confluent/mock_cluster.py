"""The child process of `kser.confluent.embedded`: librdkafka's mock cluster, steered by JSON lines.

A script, never imported: it is started by its path with ``-I -S``, so that it needs neither site-packages nor kser and
is up in some 50 ms. It speaks on stdin and stdout, one JSON object a line:

1. It first says ``{"id": 0, "ok": {"bootstrap_servers": ..., "version": ...}}``, or ``{"id": 0, "error": TEXT, "kind":
   KIND}`` and ends.
2. It reads ``{"id": N, "call": NAME, "args": [...]}`` and answers each with ``{"id": N, "ok": null}`` or ``{"id": N,
   "error": TEXT, "kind": KIND}``.
3. It ends at the call "close", when stdin ends, or when its owner is gone. The topics go with it.

KIND is "missing" (this librdkafka has no mock cluster) or "refused" (by the mock cluster).

Source: librdkafka's rdkafka_mock.h, which the library inside the confluent-kafka wheel exports. That header calls
itself experimental, hence the look at each symbol before the first call.
"""

import ctypes
import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import Any

_POINTER, _STRING, _INT, _INT16, _INT32 = (
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_int16,
    ctypes.c_int32,
)

#: Name of the C function: its result and its arguments.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "rd_kafka_version_str": (_STRING, []),
    "rd_kafka_err2str": (_STRING, [_INT]),
    "rd_kafka_new": (_POINTER, [_INT, _POINTER, _STRING, ctypes.c_size_t]),
    "rd_kafka_set_log_level": (None, [_POINTER, _INT]),
    "rd_kafka_mock_cluster_new": (_POINTER, [_POINTER, _INT]),
    "rd_kafka_mock_cluster_bootstraps": (_STRING, [_POINTER]),
    "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [_POINTER, _INT32]),
    "rd_kafka_mock_set_group_consumer_heartbeat_interval_ms": (None, [_POINTER, _INT]),
    "rd_kafka_mock_set_group_consumer_session_timeout_ms": (None, [_POINTER, _INT]),
    "rd_kafka_mock_topic_create": (_INT, [_POINTER, _STRING, _INT, _INT]),
    "rd_kafka_mock_push_request_errors_array": (None, [_POINTER, _INT16, ctypes.c_size_t, _POINTER]),
    "rd_kafka_mock_clear_request_errors": (None, [_POINTER, _INT16]),
    "rd_kafka_mock_broker_set_down": (_INT, [_POINTER, _INT32]),
    "rd_kafka_mock_broker_set_up": (_INT, [_POINTER, _INT32]),
    "rd_kafka_mock_broker_set_rtt": (_INT, [_POINTER, _INT32, _INT]),
}

_PRODUCER = 0
_LOG_ERRORS = 3
#: A second member of a KIP-848 group gets its share within one heartbeat, so a short one makes quick demos and tests.
_HEARTBEAT_MS = 300
_SESSION_MS = 6000
#: How often a child whose stdin is kept open by somebody else (a forked process) looks whether its owner still lives.
_OWNER_CHECK_S = 0.5


class _MissingError(Exception):
    """This librdkafka cannot do it."""


class _RefusedError(Exception):
    """The mock cluster says no."""


class _Cluster:
    def __init__(self, library: str, brokers: int) -> None:
        self._library = self._load(library)
        error = ctypes.create_string_buffer(512)
        client = self._library.rd_kafka_new(_PRODUCER, None, error, len(error))
        if not client:
            raise _RefusedError(error.value.decode(errors="replace"))
        self._library.rd_kafka_set_log_level(client, _LOG_ERRORS)
        self._cluster = self._library.rd_kafka_mock_cluster_new(client, brokers)
        if not self._cluster:
            raise _RefusedError(f"no mock cluster of {brokers} brokers could be made")
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)
        self._library.rd_kafka_mock_set_group_consumer_heartbeat_interval_ms(self._cluster, _HEARTBEAT_MS)
        self._library.rd_kafka_mock_set_group_consumer_session_timeout_ms(self._cluster, _SESSION_MS)

    @staticmethod
    def _load(path: str) -> ctypes.CDLL:
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise _MissingError(f"{path} cannot be loaded: {error}") from error
        for name, (result, arguments) in _FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise _MissingError(f"the librdkafka of {path} has no function {name}") from None
            function.restype, function.argtypes = result, arguments
        return library

    def describe(self) -> dict[str, str]:
        return {
            "bootstrap_servers": self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode(),
            "version": self._library.rd_kafka_version_str().decode(),
        }

    def create_topic(self, name: str, partitions: int, replication: int) -> None:
        self._check(
            self._library.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, replication),
            f"topic {name}",
        )

    def fail_next(self, api_key: int, errors: list[int]) -> None:
        codes = (ctypes.c_int * len(errors))(*errors)
        self._library.rd_kafka_mock_push_request_errors_array(self._cluster, api_key, len(errors), codes)

    def clear_failures(self, api_key: int) -> None:
        self._library.rd_kafka_mock_clear_request_errors(self._cluster, api_key)

    def broker_down(self, broker: int) -> None:
        self._check(self._library.rd_kafka_mock_broker_set_down(self._cluster, broker), f"broker {broker}")

    def broker_up(self, broker: int) -> None:
        self._check(self._library.rd_kafka_mock_broker_set_up(self._cluster, broker), f"broker {broker}")

    def rtt(self, broker: int, milliseconds: int) -> None:
        self._check(self._library.rd_kafka_mock_broker_set_rtt(self._cluster, broker, milliseconds), f"broker {broker}")

    def _check(self, code: int, what: str) -> None:
        if code:
            raise _RefusedError(f"{what}: {self._library.rd_kafka_err2str(code).decode(errors='replace')}")


def _lines(owner: int) -> Iterator[bytes]:
    """What the owner writes, line by line, until it closes its end or is gone."""
    buffer = b""
    while True:
        readable, _, _ = select.select([0], [], [], _OWNER_CHECK_S)
        if not readable:
            # A process that the owner forked holds the other end of stdin too, and would keep it open for ever.
            if os.getppid() != owner:
                return
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from lines


def _serve(answers: int, owner: int, library: str, brokers: int) -> int:
    def answer(number: int, **fields: Any) -> None:
        os.write(answers, json.dumps({"id": number, **fields}).encode() + b"\n")

    try:
        cluster = _Cluster(library, brokers)
    except (_MissingError, _RefusedError) as error:
        answer(0, error=str(error), kind="missing" if isinstance(error, _MissingError) else "refused")
        return 1
    answer(0, ok=cluster.describe())
    for line in _lines(owner):
        request = json.loads(line)
        if request["call"] == "close":
            break
        try:
            getattr(cluster, request["call"])(*request["args"])
        except _RefusedError as error:
            answer(request["id"], error=str(error), kind="refused")
        else:
            answer(request["id"], ok=None)
    return 0


def _main() -> int:
    # Ctrl-C is for the owner, which ends this process when it has ended its own work on the cluster.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    owner, library, brokers = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    # Whatever the library may print goes to stderr, so that nothing but answers is on the answers' pipe.
    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        return _serve(answers, owner, library, brokers)
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    # Destroying the cluster would only free what goes with the process anyway.
    os._exit(_main())
