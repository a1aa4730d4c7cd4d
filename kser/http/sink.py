"""HttpSink: writes records by posting them to the REST API, as many at a time as have come meanwhile."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn

import orjson

from kser.errors import DeliveryError, Error, TransportError, ValidationError
from kser.http.client import ApiClient, error_of
from kser.http.wire import MAX_BODY_BYTES, MAX_MESSAGES, MESSAGES_PATH
from kser.schemas import parse
from kser.tracebacks import log_raised
from kser.transport import DeliveryCallback, GroupMember, OutRecord, Position

__all__ = ["HttpSink", "record_as_json"]

logger = logging.getLogger(__name__)

#: Records that wait to be posted, beyond which produce() waits for room.
_QUEUE: Final = 10_000
#: Bytes of records in one request: half of what the server reads, for what is around them.
_BATCH_BYTES: Final = MAX_BODY_BYTES // 2


class _Item(NamedTuple):
    """One record on its way."""

    document: bytes
    tell: DeliveryCallback


class HttpSink:
    """A writer of records over HTTP: see `kser.transport.Sink`; it has no transactions. May be shared by threads.

    One thread of its own posts, one request at a time, so what is handed over arrives in that order.

    Args:
        client: the API.
        request_s: longest wait for the answer to one request.
    """

    def __init__(self, client: ApiClient, request_s: float = 30) -> None:
        self._client = client
        self._request_s = request_s
        self._queue: deque[_Item] = deque()
        #: Handed over and neither confirmed nor failed.
        self._open = 0
        #: How often some were.
        self._told = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def produce(self, record: OutRecord, on_delivery: DeliveryCallback | None = None) -> None:
        """Hand over one record; ``on_delivery`` is called in the sink's own thread.

        Raises ValidationError when it is no message in JSON, or has a header that is no text: HTTP carries nothing
        else; TransportError when the sink is closed, or stays full.
        """
        item = _Item(record_as_json(record), on_delivery or partial(_complain, record.topic))
        end = time.monotonic() + self._request_s
        with self._changed:
            while len(self._queue) >= _QUEUE and not self._closed and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._closed:
                raise TransportError("This producer is closed")
            if len(self._queue) >= _QUEUE:
                raise TransportError(f"{_QUEUE} messages wait to be posted to {self._client.url}", retriable=True)
            self._queue.append(item)
            self._open += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="kser-http", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def produce_all(self, records: Sequence[OutRecord]) -> NoReturn:
        """Not for a sink without transactions."""
        raise _no_transactions("produce_all()", len(records))

    def deliver(self, records: Sequence[OutRecord], timeout_s: float = 30) -> list[tuple[int, Error]]:
        """Write all of these and give the failures, by index; see `kser.transport.Sink.deliver`."""
        told: dict[int, Error | None] = {}
        for index, record in enumerate(records):
            try:
                self.produce(record, partial(told.__setitem__, index))
            except Error as exc:
                if self._closed:
                    raise
                told[index] = exc
        if self.flush(timeout_s):
            self.drop_queued()
        late = DeliveryError(f"Not confirmed by {self._client.url} within {timeout_s:g} s")
        answers = dict(told)
        return [(at, error) for at in range(len(records)) if (error := answers.get(at, late)) is not None]

    def poll(self, timeout_s: float) -> int:  # noqa: ARG002 - callbacks come by themselves
        """Nothing to be served: callbacks are called as the answers come."""
        return 0

    def flush(self, timeout_s: float) -> int:
        """Wait until everything handed over is confirmed or failed; the number still open after ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open, timeout_s)
            return self._open

    def await_news(self, timeout_s: float) -> None:
        """Wait until something is confirmed or failed, nothing is open, or ``timeout_s`` is over."""
        with self._changed:
            told = self._told
            self._changed.wait_for(lambda: not self._open or self._told != told, timeout_s)

    def drop_queued(self) -> None:
        """Give up what was not posted yet: its callbacks get a DeliveryError."""
        with self._changed:
            items = list(self._queue)
            self._queue.clear()
        self._tell(items, [DeliveryError(f"Given up before it was posted to {self._client.url}")] * len(items))

    def begin(self) -> NoReturn:
        """There are no transactions."""
        raise _no_transactions("begin()")

    def send_offsets(self, positions: Sequence[Position], member: GroupMember) -> NoReturn:
        """There are no transactions."""
        raise _no_transactions("send_offsets()", len(positions), member)

    def commit(self, timeout_s: float = 30) -> NoReturn:
        """There are no transactions."""
        raise _no_transactions("commit()", timeout_s)

    def abort(self, timeout_s: float = 30) -> NoReturn:
        """There are no transactions."""
        raise _no_transactions("abort()", timeout_s)

    def close(self, timeout_s: float = 10) -> None:
        """Post what is left within ``timeout_s``, and let go of the connection. A second call does nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self.flush(timeout_s)
        self.drop_queued()
        self._client.close()

    # -- the thread that posts -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while items := self._take():
            try:
                answers = self._post(items)
            except Error as exc:
                answers = [exc] * len(items)
            except Exception as exc:
                logger.exception("A request to %s failed", self._client.url)
                answers = [DeliveryError(f"It is not known whether {self._client.url} has it: {exc!r}")] * len(items)
            self._tell(items, answers)

    def _take(self) -> list[_Item]:
        """The next request's records; none once the sink is closed and has no more."""
        items: list[_Item] = []
        size = 0
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            while self._queue and len(items) < MAX_MESSAGES:
                size += len(self._queue[0].document)
                if items and size > _BATCH_BYTES:
                    break
                items.append(self._queue.popleft())
            self._changed.notify_all()
        return items

    def _post(self, items: Sequence[_Item]) -> list[Error | None]:
        """What became of each."""
        body = b'{"messages":[' + b",".join(item.document for item in items) + b"]}"
        status, document = self._client.post(MESSAGES_PATH, body, self._request_s)
        found = document.get("results")
        if not isinstance(found, list) or len(found) != len(items):
            error = error_of(status, document)
            if status < 400:
                error = DeliveryError(f"{self._client.url} does not say what became of each message: is it kser's?")
            return [error] * len(items)
        return [_error_in(result) for result in found]

    def _tell(self, items: Sequence[_Item], answers: Sequence[Error | None]) -> None:
        for item, error in zip(items, answers, strict=True):
            try:
                item.tell(error)
            except Exception:  # noqa: BLE001 - the caller's code
                log_raised(logger, "A delivery callback raised; it must not")
        with self._changed:
            self._open -= len(items)
            self._told += 1
            self._changed.notify_all()


def record_as_json(record: OutRecord) -> bytes:
    """A record as a JSON object. Raises ValidationError for what JSON cannot carry."""
    raw = record.value or b""
    try:
        data = parse(raw)
    except ValidationError:
        data = None
    if not isinstance(data, dict):
        raise ValidationError("What is posted over HTTP is a JSON object: a message of another form needs Kafka itself")
    try:
        around = {
            "topic": record.topic,
            "message": orjson.Fragment(raw),
            "key": None if record.key is None else record.key.decode(),
            "headers": [[name, None if value is None else value.decode()] for name, value in record.headers],
        }
        return orjson.dumps(around)
    except (UnicodeDecodeError, TypeError) as exc:
        raise ValidationError(f"Keys and headers are posted over HTTP as text: {exc}") from exc


def _error_in(result: Any) -> Error | None:
    """The error in one entry of the answer; None when the message was taken."""
    retcode = result.get("retcode") if isinstance(result, dict) else None
    if retcode == 0:
        return None
    if not isinstance(retcode, int):
        return DeliveryError(f"The answer for a message cannot be read: {result!r}")
    return error_of(retcode, {"detail": result.get("stderr")})


def _complain(topic: str, error: Error | None) -> None:
    if error is not None:
        logger.warning("A record for %s was not written: %s", topic, error.message)


def _no_transactions(what: str, *_: object) -> TransportError:
    return TransportError(f"{what}: there are no transactions over HTTP")
