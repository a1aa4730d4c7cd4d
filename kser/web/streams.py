"""Streams of events to browsers and programs, as server-sent events: one reader for each group, however many listen.

Each stream holds a thread of the server as long as it lasts, so there are only so many at a time, and each ends after
some time; whoever listens calls again, with the id of the last event it has.
"""

import itertools
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Final, NamedTuple

from kser.errors import Error, NotFound, ValidationError
from kser.events import Event, OperationView, events_topic
from kser.masking import mask
from kser.results import json_safe
from kser.schemas import parse
from kser.sequencing.itinerary import key_bytes
from kser.transport import Partition, Reader, Record, Transport
from kser.transport.partitioner import partition_of

__all__ = ["BusyError", "EventStream", "Streams"]

logger = logging.getLogger(__name__)

#: A sign of life is sent so often, in seconds; it also tells that the listener has gone.
_ALIVE_S: Final = 10.0
#: Longest wait between two looks whether the stream is to end, in seconds.
_LOOK_S: Final = 0.5
#: A reader nobody listens to is kept for so long, in seconds.
_KEPT_S: Final = 10.0
#: Events that wait for a slow listener; with more its stream ends.
_BEHIND: Final = 2000


class BusyError(Error):
    """There are as many streams as there may be."""

    MSGID = "ERR-42901"
    CODE = 429


class _Listener:
    """Takes the records of one key, or all."""

    def __init__(self, key: bytes | None) -> None:
        self.key = key
        self.records: queue.Queue[Record] = queue.Queue(_BEHIND)
        #: Why nothing more comes; "" while something may.
        self.ended = ""

    def offer(self, record: Record) -> None:
        if self.key is None or record.key == self.key:
            try:
                self.records.put_nowait(record)
            except queue.Full:
                self.ended = f"more than {_BEHIND} events wait to be taken"


class _Hub:
    """Reads the newest records of a group for all who listen. Its thread ends when nobody has for a while."""

    def __init__(self, transport: Transport, group: str, closing: threading.Event) -> None:
        self._transport = transport
        self._topics = [events_topic(group), f"{group}.telemetry"]
        self._closing = closing
        self._listeners: set[_Listener] = set()
        self._lock = threading.Lock()
        self._reader: Reader | None = None

    def join(self, listener: _Listener, timeout_s: float) -> None:
        """From now on ``listener`` is told. Raises TransportError when the broker does not answer."""
        with self._lock:
            if self._reader is None:
                # So that a broker that is away is told now: the reader would wait for its own time.
                self._transport.admin().describe(self._topics[:1], timeout_s)
                self._reader = self._transport.reader(self._topics, start="end")
                threading.Thread(target=self._read, args=[self._reader], name="kser-events", daemon=True).start()
            self._listeners.add(listener)

    def leave(self, listener: _Listener) -> None:
        """It is told nothing more."""
        with self._lock:
            self._listeners.discard(listener)

    def _read(self, reader: Reader) -> None:
        why, idle_since = "the server stops", time.monotonic()
        try:
            while not self._closing.is_set():
                records = reader.poll(_LOOK_S)
                with self._lock:
                    listeners = tuple(self._listeners)
                for record in records:
                    for listener in listeners:
                        listener.offer(record)
                if listeners:
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > _KEPT_S and self._retire():
                    return
        except Error as exc:
            why = str(exc.message)
        except Exception:
            logger.exception("The events of %s cannot be read", self._topics[0])
            why = "the events cannot be read"
        finally:
            with self._lock:
                if self._reader is reader:  # else it was retired, and there may be another one already
                    self._reader = None
                    for listener in self._listeners:
                        listener.ended = why
            reader.close()

    def _retire(self) -> bool:
        with self._lock:
            if not self._listeners:
                self._reader = None
            return self._reader is None


class Streams:
    """The streams of one program. May be shared by threads.

    Args:
        transport: the broker.
        most: how many there may be at a time.
        lasting_s: longest time one lasts, in seconds.
        timeout_s: longest wait for the broker, in seconds.
    """

    def __init__(self, transport: Transport, *, most: int, lasting_s: float, timeout_s: float) -> None:
        self._transport = transport
        self._free = threading.BoundedSemaphore(most)
        self._most = most
        self._lasting_s = lasting_s
        self._timeout_s = timeout_s
        self._closing = threading.Event()
        self._hubs: dict[str, _Hub] = {}
        self._lock = threading.Lock()

    def open(
        self,
        group: str,
        uuid: str | None = None,
        *,
        follow: bool = True,
        after: str = "",
        gone: Callable[[], bool] = lambda: False,
    ) -> "EventStream":
        """A stream of what happens in a group, or to one operation or lone task: then with all that happened before.

        Args:
            group: the group.
            uuid: of the root operation, or of a lone task.
            follow: go on as something happens, until the operation has ended, and wait for one that nothing is told of
                yet; else end with what there is.
            after: id of the last event the caller has: those before it are left out.
            gone: tells that the caller has gone, when the server knows such a thing.

        Raises BusyError when there are enough already, TransportError when the broker does not answer, and NotFound
        when it is not to follow and nothing is told of ``uuid``.
        """
        if not self._free.acquire(blocking=False):
            raise BusyError(f"{self._most} streams are open, and there are no more: try again later")
        listener = _Listener(None if uuid is None else key_bytes(uuid))
        with self._lock:
            hub = self._hubs.setdefault(group, _Hub(self._transport, group, self._closing))
        past = iter(()) if uuid is None else self._past(group, uuid)
        try:
            if follow:
                hub.join(listener, self._timeout_s)  # before the history is read, so that nothing is missed between
            elif uuid is not None:
                past = _begun(past, uuid, group)
            else:
                self._transport.admin().describe([events_topic(group)], self._timeout_s)
        except BaseException:
            self._free.release()
            raise

        def done() -> None:
            hub.leave(listener)
            self._free.release()

        end = time.monotonic() + self._lasting_s
        return EventStream(
            _Source(past, listener, follow, after, uuid, end, lambda: gone() or self._closing.is_set()), done
        )

    def _past(self, group: str, uuid: str) -> Iterator[Record]:
        """What happened to it: in its home partition, or in the others when partitions were added since."""
        key, topic = key_bytes(uuid), events_topic(group)
        info = self._transport.admin().describe([topic], self._timeout_s).get(topic)
        count = info.partitions if info is not None else 0
        home = partition_of(key, count) if count else 0
        for numbers in ([home], [number for number in range(count) if number != home]):
            found = False
            partitions = [Partition(topic, number) for number in numbers if number < count]
            for batch in self._transport.read(partitions, self._timeout_s) if partitions else ():
                for record in batch:
                    if record.key == key:
                        found = True
                        yield record
            if found:
                return

    def close(self) -> None:
        """End all streams, soon."""
        self._closing.set()


def _begun(past: Iterator[Record], uuid: str, group: str) -> Iterator[Record]:
    """``past``, which has a record. Raises NotFound."""
    for first in past:
        return itertools.chain([first], past)
    raise NotFound(
        f"{events_topic(group)} tells nothing of {uuid}: no worker of group {group} has met it yet, or there is no "
        "such operation, or task that belongs to none",
        extra={"uuid": uuid},
    )


class _Source(NamedTuple):
    """Where the events of one stream come from."""

    past: Iterator[Record]
    listener: _Listener
    follow: bool
    after: str
    #: Of the operation; None: the group's.
    uuid: str | None
    #: When it ends at the latest, by the monotonic clock.
    end: float
    #: Tells that nobody wants more.
    over: Callable[[], bool]


class EventStream:
    """The body of an answer, chunk by chunk. close() frees what it holds, also when nothing was taken of it."""

    def __init__(self, source: _Source, done: Callable[[], None]) -> None:
        self._chunks = _chunks(source)
        self._done: Callable[[], None] | None = done

    def __iter__(self) -> "EventStream":
        return self

    def __next__(self) -> bytes:
        return next(self._chunks)

    def close(self) -> None:
        """It is over. A second call does nothing."""
        done, self._done = self._done, None
        if done is not None:
            self._chunks.close()
            done()


def _chunks(source: _Source) -> Generator[bytes, None, None]:
    """The stream as bytes."""
    yield b"retry: 3000\n\n"
    view = OperationView(source.uuid or "")
    try:
        for record in source.past:
            if chunk := _told(record, view, source):
                yield chunk
    except Error as exc:
        yield _chunk("problem", {"detail": str(exc.message)})
        return
    if source.follow:
        yield from _news(source, view)
    if source.uuid is not None and (view.ended or not source.follow):
        yield _chunk("end", {"status": view.status})


def _news(source: _Source, view: OperationView) -> Iterator[bytes]:
    listener, told = source.listener, time.monotonic()
    while not (view.ended and source.uuid is not None) and not source.over():
        left = source.end - time.monotonic()
        if left <= 0:
            return
        try:
            chunk = _told(listener.records.get(timeout=min(left, _LOOK_S)), view, source)
        except queue.Empty:
            if listener.ended and not source.over():
                yield _chunk("problem", {"detail": f"The stream ends: {listener.ended}"})
                return
            chunk = b": \n\n" if time.monotonic() - told > _ALIVE_S else b""
        if chunk:
            told = time.monotonic()
            yield chunk


def _told(record: Record, view: OperationView, source: _Source) -> bytes:
    """The chunk that tells this record; empty when it tells nothing new."""
    try:
        data = parse(record.value or b"")
        kind = str(data["type"])
    except (ValidationError, TypeError, KeyError):
        return b""
    if not record.topic.endswith(".telemetry"):
        if source.uuid is not None and not _applied(record, view):
            return b""
        if _seen(record, source.after):
            return b""
        return _chunk(kind, data, f"{record.partition}:{record.offset}")
    return _chunk(kind, data)


def _applied(record: Record, view: OperationView) -> bool:
    """Take the event in; False when it is none, or a redelivery's repetition."""
    try:
        return view.apply(Event.loads(record.value))
    except ValidationError:
        return False


def _seen(record: Record, after: str) -> bool:
    """Whether the caller has it: it lies in the same partition, not behind the last one it has."""
    partition, _, offset = after.partition(":")
    return partition == str(record.partition) and offset.isdecimal() and record.offset <= int(offset)


def _chunk(kind: str, data: Any, number: str = "") -> bytes:
    head = f"id: {number}\n" if number else ""
    name = kind.replace("\r", " ").replace("\n", " ")
    return f"{head}event: {name}\ndata: ".encode() + json.dumps(json_safe(mask(data))).encode() + b"\n\n"
