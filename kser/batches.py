"""Batches of a producer: messages that are handed over first and waited for together, and the lanes they go through."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from kser import results
from kser.errors import DeliveryError, Error
from kser.headers import Headers
from kser.results import Result
from kser.schemas import Message
from kser.transport import OutRecord, Sink

if TYPE_CHECKING:
    from kser.producer import BaseProducer

__all__ = ["SERVED_EVERY", "Batch", "Lane", "LaneBatch", "Numbered", "SharedBatch", "become"]

#: Longest time one thread serves callbacks before it looks whether its own message was confirmed by another thread.
_SLICE_S = 0.05
#: Longest part of a timeout that is left for giving up, in seconds.
_GIVING_UP_S = 0.15
#: Longest time a batch that has a sink of its own serves callbacks before it looks whether it is time to give up.
_LANE_SLICE_S = 0.25
#: Messages a batch may have open before it waits for some: bounds memory, and what a dead broker can hold back.
_OPEN_IN_BATCH = 50_000
#: After so many messages of a batch callbacks are served.
SERVED_EVERY = 1000
_HANDED_OVER = "Handed over, not yet confirmed"


class Numbered(Protocol):
    """Writes records under numbers, through a sink that is told of failures only."""

    #: (topic, key, value, number): hands over one record, as Sink.produce() does.
    produce: Callable[[str, bytes, bytes, int], None]

    @property
    def doubts(self) -> int:
        """Changes when something that failed may have gone untold."""

    def answered(self) -> None:
        """Take note that something was stored."""


class _ByRecord:
    """Numbered, for any sink."""

    doubts = 0

    def __init__(self, sink: Sink, tell: Callable[[int, Error], None]) -> None:
        def produce(topic: str, key: bytes, value: bytes, number: int) -> None:
            sink.produce(OutRecord(topic, key, value), partial(failed, number))

        def failed(number: int, error: Error | None) -> None:
            if error is not None:
                tell(number, error)

        self.produce = produce

    def answered(self) -> None:
        """Sinks of failures only know that by themselves."""


class Lane:
    """A sink of its own for one batch at a time. It tells of failures only: what succeeds costs nothing more.

    Its records are numbered through all of its batches, so that one of an earlier batch is not taken for one of this.
    Thread rule: of the thread whose batch has it; flush() and close() may be called by others.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        #: Number -> why it failed.
        self.failed: dict[int, Error] = {}
        numbered: Callable[[Callable[[int, Error], None]], Numbered] | None = getattr(sink, "numbered", None)
        tell = self.failed.__setitem__
        self._writer = numbered(tell) if numbered is not None else _ByRecord(sink, tell)
        self.produce = self._writer.produce
        #: Number of the batch's first record, and one entry for each that was handed over.
        self.base = 0
        self._rows: list[Any] = []
        #: All below this number that are not in ``failed`` and ``doubted`` are stored.
        self.settled = 0
        #: Numbers of those that were under way when the client broke.
        self.doubted: list[range] = []
        #: Something was given up: it is of no more use.
        self.spent = False
        self._doubts = self._writer.doubts

    @property
    def handed(self) -> int:
        """All below this number were handed over."""
        return self.base + len(self._rows)

    def begin(self, rows: list[Any]) -> None:
        """For a new batch; it puts something into ``rows`` whenever it handed over one record."""
        self.base = self.settled = self.handed
        self._rows = rows
        self.failed.clear()
        self.doubted.clear()
        self._doubts = self._writer.doubts

    def produce_with(self, headers: Headers, topic: str, key: bytes, value: bytes, number: int) -> None:
        """produce() of a record that has headers."""
        failed = self.failed

        def told(error: Error | None) -> None:
            if error is not None:
                failed[number] = error

        self.sink.produce(OutRecord(topic, key, value, headers), told)

    def flush(self, timeout_s: float) -> int:
        """As Sink.flush()."""
        handed = self.handed
        left = self.sink.flush(timeout_s)
        if self._writer.doubts != self._doubts:
            self._doubts = self._writer.doubts
            self.doubted.append(range(self.settled, handed))
        elif not left and handed - self.base > len(self.failed):
            self._writer.answered()
        if not left:
            self.settled = max(self.settled, handed)
        return left

    def give_up(self) -> None:
        """End what is under way: it fails, unless it is told stored.

        The Kafka client may get round to it later than it says, and then takes records on their way with it that were
        handed over since: confluent-kafka 2.16 does not wait for its threads. So there is no next batch for this lane.
        """
        self.spent = True
        self.sink.deliver((), 0)
        self.flush(0)

    def close(self, timeout_s: float) -> None:
        """Wait for what is under way, and let go of the broker."""
        with suppress(Error):  # closed already
            self.flush(timeout_s)
        self.sink.close(0)


class Batch(ABC):
    """Messages that are handed over and then waited for together: many, or one.

    What belongs to one message is at one index of the lists: a batch of many makes few objects for the garbage
    collector to look at. Thread rule: of the thread that sends.
    """

    def __init__(self, producer: "BaseProducer") -> None:
        self.producer = producer
        #: Nobody wants to see a message, unless the log does.
        self.plain = producer._is_plain()
        #: Nor how it is sent: bytes will do.
        self._flat = self.plain and producer._sends_plainly()
        self.results: list[Result] = []
        self.uuids: list[str] = []
        self.entrypoints: list[str] = []
        self.topics: list[str] = []
        #: Those messages that a hook or the log wants at the end.
        self.kmsgs: dict[int, Message] = {}
        self.errors: dict[int, Error] = {}
        #: Uuids of messages that were not handed over.
        self.refused: list[str] = []
        #: Why the first of them was not.
        self.refusal: Error | None = None

    # -- how it is written: the two kinds of batches -------------------------------------------------------------------

    @abstractmethod
    def write(self, topic: str, key: bytes, raw: bytes, index: int, headers: Headers = ()) -> None:
        """Hand the record of the message at ``index`` to the sink. Raises Error when it is refused."""

    @abstractmethod
    def look_after(self) -> None:
        """Serve callbacks; wait when too many are open, so that a long batch needs bounded memory in the client."""

    @abstractmethod
    def wait(self, timeout: float) -> None:
        """Until all are confirmed or failed; those that are not after ``timeout`` get a DeliveryError."""

    # -- handing over --------------------------------------------------------------------------------------------------

    def add(self, topic: str, uuid: str, entrypoint: str, result: Result) -> int:
        """One more message; its index."""
        self.results.append(result)
        self.uuids.append(uuid)
        self.entrypoints.append(entrypoint)
        self.topics.append(topic)
        return len(self.results) - 1

    def hand_over(
        self, topic: str, key: bytes, raw: bytes, uuid: str, entrypoint: str, headers: Headers = ()
    ) -> Result:
        """Hand one message to the sink; its Result, not yet final. Raises Error when it is refused."""
        result = Result(results.ACCEPTED, _HANDED_OVER, "", None, uuid)
        index = len(self.results)
        try:
            self.write(topic, key, raw, index, headers)
            self.results.append(result)
            self.uuids.append(uuid)
            self.entrypoints.append(entrypoint)
            self.topics.append(topic)
        except Error:
            raise
        except BaseException:
            for of_each in (self.results, self.uuids, self.entrypoints, self.topics):
                del of_each[index:]
            error = f"Message {entrypoint}[{uuid}] was interrupted while it was handed over, it may have been sent"
            self.fail(topic, uuid, entrypoint, DeliveryError(error, extra={"uuids": [uuid]}))
            raise
        return result

    def fail(self, topic: str, uuid: str, entrypoint: str, error: Error) -> None:
        """One more message, which failed already."""
        self.errors[self.add(topic, str(uuid), entrypoint, Result(uuid=uuid))] = error

    def send_plain(self, topic: str, key: bytes, raw: bytes, uuid: str, entrypoint: str) -> Result | None:
        """What send() of the producer does for a message that nobody wants to see; None where that is not all.

        See kser.sequencing.plain_launch.PlainBatch.
        """
        producer = self.producer
        if (
            not self._flat
            or len(raw) > producer._limit
            or type(topic) is not str
            or (topic not in producer._topics and not producer._is_topic(topic))
            or producer._logger.isEnabledFor(logging.INFO)
        ):
            return None
        try:
            result = self.hand_over(topic, key, raw, uuid, entrypoint)
        except Error as exc:
            return self.refuse(Message(uuid, entrypoint), exc)
        if len(self.results) % SERVED_EVERY == 0:
            self.look_after()
        return result

    def refuse(self, kmsg: Message, error: Error) -> Result:
        """The final Result of a message that was not handed over."""
        result = self.producer._refused(kmsg, error)
        self.refusal = self.refusal or error
        self.refused.append(str(result.uuid))
        return result

    # -- at the end ----------------------------------------------------------------------------------------------------

    def unconfirmed(self, index: int, why: str) -> DeliveryError:
        """The error of a message of which it is not known whether it arrived."""
        uuid = self.uuids[index]
        return DeliveryError(f"Message {self.entrypoints[index]}[{uuid}] {why}", extra={"uuids": [uuid]})

    def settle(self) -> None:
        """Make the Results final, in place; log them and call the hooks."""
        if not self.errors and not self.kmsgs:
            for result, entrypoint, uuid, topic in zip(
                self.results, self.entrypoints, self.uuids, self.topics, strict=True
            ):
                result.retcode = 0
                result.stdout = f"Message {entrypoint}[{uuid}] sent in {topic}"
            return
        for index, result in enumerate(self.results):
            kmsg, error = self.kmsgs.get(index), self.errors.get(index)
            uuid, entrypoint = self.uuids[index], self.entrypoints[index]
            if error is not None:
                self.producer._failed(result, kmsg or Message(uuid, entrypoint), error)
                continue
            result.retcode = 0
            result.stdout = f"Message {entrypoint}[{uuid}] sent in {self.topics[index]}"
            if kmsg is not None:
                become(result, self.producer._onsuccess(kmsg, result))

    @property
    def failed(self) -> list[str]:
        """Uuids of those that may not have arrived, in the order they were handed over."""
        return [self.uuids[index] for index in sorted(self.errors)]


class SharedBatch(Batch):
    """Through the sink that all threads share, which tells of each message.

    Thread rule: on_delivery() may be called in any thread.
    """

    def __init__(self, producer: "BaseProducer") -> None:
        super().__init__(producer)
        #: What was confirmed or failed. add() of a set is atomic, so any thread may call it.
        self.told: set[int] = set()
        #: What is told from now on comes too late.
        self.over = False

    def write(self, topic: str, key: bytes, raw: bytes, index: int, headers: Headers = ()) -> None:
        """See Batch."""
        if headers:
            self.producer._sink.produce(OutRecord(topic, key, raw, headers), partial(self.on_delivery, index))
        else:
            self.producer._produce(topic, key, raw, self.on_delivery, index)

    def look_after(self) -> None:
        """See Batch."""
        with suppress(Error):  # closed meanwhile: the next message is refused, and wait() says it of these
            self.producer._sink.poll(0)
            if self.open >= _OPEN_IN_BATCH:
                self.producer._sink.flush(1)

    def on_delivery(self, index: int, error: Error | None) -> None:
        """A message was confirmed, or failed."""
        if not self.over:  # else given up already, or dropped from the queue after that
            if error is not None:
                self.errors[index] = error
            self.told.add(index)

    @property
    def open(self) -> int:
        """How many are neither confirmed nor failed."""
        return len(self.results) - len(self.told)

    def fail(self, topic: str, uuid: str, entrypoint: str, error: Error) -> None:
        """See Batch."""
        super().fail(topic, uuid, entrypoint, error)
        self.told.add(len(self.results) - 1)

    def wait(self, timeout: float) -> None:
        """See Batch."""
        end = time.monotonic() + timeout - _giving_up_s(timeout)
        why = _too_late(timeout)
        try:
            while self.open and (left := end - time.monotonic()) > 0:
                self._await_news(min(left, _SLICE_S))
        except Error as exc:
            why = f"was not confirmed: {exc.message}"
        if self.open:
            self.over = True
            for index in set(range(len(self.results))) - self.told:
                self.errors[index] = self.unconfirmed(index, why)
            self.producer._drop_queued(self)

    def _await_news(self, timeout_s: float) -> None:
        """Wait for a confirmation. flush() waits for what other threads have under way, too: only where it must do."""
        sink = self.producer._sink
        wait: Callable[[float], object] = getattr(sink, "await_news", None) or sink.flush
        wait(timeout_s)


class LaneBatch(Batch):
    """Through a lane of its own."""

    def __init__(self, producer: "BaseProducer", lane: Lane) -> None:
        super().__init__(producer)
        self.lane = lane
        lane.begin(self.results)
        self._produce = lane.produce
        self._base = lane.base

    def write(self, topic: str, key: bytes, raw: bytes, index: int, headers: Headers = ()) -> None:
        """See Batch."""
        if headers:
            self.lane.produce_with(headers, topic, key, raw, self._base + index)
        else:
            self._produce(topic, key, raw, self._base + index)

    def look_after(self) -> None:
        """See Batch."""
        with suppress(Error):  # as above
            if self.lane.flush(0) >= _OPEN_IN_BATCH:
                self.lane.flush(1)

    def catch_up(self, timeout: float) -> None:
        """Wait until nothing is under way, for up to ``timeout`` seconds."""
        begun = time.monotonic()
        while True:
            passed = time.monotonic() - begun
            # The client does not wake up for the last success, it looks after each wait: of whole milliseconds.
            if not self.lane.flush(max(min(timeout - passed, max(passed / 4, 0.001), _LANE_SLICE_S), 0)):
                return
            if passed >= timeout:
                return

    def wait(self, timeout: float) -> None:
        """See Batch."""
        lane, base, why, known = self.lane, self.lane.base, _too_late(timeout), None
        try:
            self.catch_up(timeout - _giving_up_s(timeout))
            if lane.settled < lane.handed:
                known = set(lane.failed)
                lane.give_up()
        except Error as exc:
            why = f"was not confirmed: {exc.message}"
        for number, error in lane.failed.copy().items():
            if number >= base:
                given_up = known is not None and number not in known and isinstance(error, DeliveryError)
                self.errors.setdefault(number - base, self.unconfirmed(number - base, why) if given_up else error)
        for numbers in lane.doubted:
            self._fail_unless_told(numbers, "may not have been stored: the client had a fatal error")
        self._fail_unless_told(range(lane.settled, lane.handed), why)

    def _fail_unless_told(self, numbers: range, why: str) -> None:
        for number in numbers:
            index = number - self.lane.base
            if index not in self.errors:
                self.errors[index] = self.unconfirmed(index, why)


def _giving_up_s(timeout: float) -> float:
    """The part of a timeout that is left for giving up: the client takes a tenth of a second to drop what it has."""
    return min(_GIVING_UP_S, timeout / 8)


def become(result: Result, final: Result) -> None:
    """What a hook gave takes the place of ``result``, which its user may hold already."""
    if final is not result:
        result.retcode, result.stdout, result.stderr = final.retcode, final.stdout, final.stderr
        result.retval, result.uuid = final.retval, final.uuid


def _too_late(timeout: float) -> str:
    return f"was not confirmed by the broker within {timeout} s: is it reachable?"
