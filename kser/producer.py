"""Producer: what services send messages with. The drivers only differ in their Sink."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

from kser import results
from kser.controller import BaseController
from kser.errors import ConfigurationError, DeliveryError, Error, ValidationError
from kser.headers import Headers
from kser.results import Result
from kser.schemas import Message
from kser.sequencing.itinerary import key_bytes, message_key
from kser.sequencing.plain_launch import within_batch
from kser.sequencing.sequencer import MAX_MESSAGE_BYTES, encode
from kser.transport import OutRecord, Sink

__all__ = ["BaseProducer", "max_message_bytes"]

logger = logging.getLogger(__name__)

#: Longest time one thread serves callbacks before it looks whether its own message was confirmed by another thread.
_SLICE_S = 0.05
#: Messages a batch may have open before it waits for some: bounds memory, and what a dead broker can hold back.
_OPEN_IN_BATCH = 50_000
#: After so many messages of a batch callbacks are served.
_SERVED_EVERY = 1000
_HANDED_OVER = "Handed over, not yet confirmed"


def max_message_bytes() -> int:
    """Largest message that is sent: KSER_MAX_MESSAGE_BYTES, default 900 KiB. Raises ConfigurationError."""
    text = os.environ.get("KSER_MAX_MESSAGE_BYTES", "")
    if not text:
        return MAX_MESSAGE_BYTES
    try:
        limit = int(text)
    except ValueError:
        limit = 0
    if limit < 1024:
        raise ConfigurationError(
            f"KSER_MAX_MESSAGE_BYTES={text!r}: give a whole number of bytes, 1024 or more", extra={"value": text}
        )
    return limit


class _Batch:
    """Messages that are handed over and then waited for together: many, or one.

    What belongs to one message is at one index of the lists: a batch of many makes few objects for the garbage
    collector to look at. Thread rule: of the thread that sends; on_delivery() may be called in any.
    """

    __slots__ = ("entrypoints", "errors", "kmsgs", "over", "plain", "producer", "refused", "results", "told", "topics",
                 "uuids")  # fmt: skip

    def __init__(self, producer: "BaseProducer") -> None:
        self.producer = producer
        #: Nobody wants to see a message, unless the log does.
        self.plain = producer._is_plain()
        self.results: list[Result] = []
        self.uuids: list[str] = []
        self.entrypoints: list[str] = []
        self.topics: list[str] = []
        #: Those messages that a hook or the log wants at the end.
        self.kmsgs: dict[int, Message] = {}
        #: What was confirmed or failed. add() of a set is atomic, so any thread may call it.
        self.told: set[int] = set()
        self.errors: dict[int, Error] = {}
        #: Uuids of messages that were not handed over.
        self.refused: list[str] = []
        #: What is told from now on comes too late.
        self.over = False

    def add(self, topic: str, uuid: str, entrypoint: str, result: Result) -> int:
        """One more message; its index."""
        index = len(self.results)
        self.results.append(result)
        self.uuids.append(uuid)
        self.entrypoints.append(entrypoint)
        self.topics.append(topic)
        return index

    def hand_over(
        self, topic: str, key: bytes, raw: bytes, uuid: str, entrypoint: str, headers: Headers = ()
    ) -> Result:
        """Hand one message to the sink; its Result, not yet final. Raises Error when it is refused."""
        result = Result(results.ACCEPTED, _HANDED_OVER, "", None, uuid)
        index = self.add(topic, uuid, entrypoint, result)
        try:
            if headers:
                self.producer._sink.produce(OutRecord(topic, key, raw, headers), partial(self.on_delivery, index))
            else:
                self.producer._produce(topic, key, raw, self.on_delivery, index)
        except Error:
            for of_each in (self.results, self.uuids, self.entrypoints, self.topics):
                of_each.pop()
            raise
        except BaseException:
            error = f"Message {entrypoint}[{uuid}] was interrupted while it was handed over, it may have been sent"
            self.on_delivery(index, DeliveryError(error, extra={"uuids": [uuid]}))
            raise
        return result

    def send_plain(self, topic: str, key: bytes, raw: bytes, uuid: str, entrypoint: str) -> Result | None:
        """What send() of the producer does for a message that nobody wants to see; None where that is not all.

        See kser.sequencing.plain_launch.PlainBatch.
        """
        producer = self.producer
        if (
            len(raw) > producer._limit
            or type(topic) is not str
            or type(producer).send is not BaseProducer.send
            or "send" in producer.__dict__
            or producer._logger.isEnabledFor(logging.INFO)
        ):
            return None
        try:
            result = self.hand_over(topic, key, raw, uuid, entrypoint)
        except Error as exc:
            return self.refuse(Message(uuid, entrypoint), exc)
        if len(self.results) % _SERVED_EVERY == 0:
            self.look_after()
        return result

    def refuse(self, kmsg: Message, error: Error) -> Result:
        """The final Result of a message that was not handed over."""
        self.refused.append(kmsg.uuid)
        result = Result(uuid=kmsg.uuid)
        self.producer._failed(result, kmsg, error)
        return result

    def look_after(self) -> None:
        """Serve callbacks; wait when too many are open, so that a long batch needs bounded memory in the client."""
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

    def give_up(self, timeout: float) -> None:
        """Fail what is open."""
        self.over = True
        for index in set(range(len(self.results))) - self.told:
            uuid = self.uuids[index]
            self.errors[index] = DeliveryError(
                f"Message {self.entrypoints[index]}[{uuid}] was not confirmed by the broker within {timeout} s: "
                "is it reachable?",
                extra={"uuids": [uuid]},
            )

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
                _become(result, self.producer._onsuccess(kmsg, result))

    @property
    def failed(self) -> list[str]:
        """Uuids of those that may not have arrived, in the order they were handed over."""
        return [self.uuids[index] for index in sorted(self.errors)]


class BaseProducer(BaseController):
    """Sends messages and waits until the broker has confirmed them.

    May be shared by threads. Hooks: onmessage(), onsuccess(), onerror(), as for a Controller.

    Args:
        sink: where records go; the producer owns it and closes it.
    """

    _logger: ClassVar[logging.Logger] = logger

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._limit = max_message_bytes()
        self._local = threading.local()
        #: (topic, key, value, tell, index): writes a record, and calls tell(index, error) when that is known.
        self._produce: _Produce = getattr(sink, "produce_at", None) or _by_record(sink)
        #: Batches under way, of all threads.
        self._opened: set[_Batch] = set()

    def send(
        self, topic: str, kmsg: Message, timeout: float = 60, *, key: str | None = None, headers: Headers = ()
    ) -> Result:
        """Send one message and wait until it is confirmed.

        Args:
            topic: a Kafka topic.
            kmsg: the message.
            timeout: seconds to wait for the confirmation.
            key: record key; default the key of the message's operation, else its uuid.
            headers: of the record.

        Returns: a Result with the message's uuid. retcode 0: the broker has it. retcode 202: inside ``with batch()``,
            settled in place at its end. Else it failed: 413 too large and not sent, 400 not JSON and not sent, 504 not
            confirmed in time (it may still have arrived; sending it again with the same uuid is what uuids are for).
            Never raises because of the broker or the message.
        """
        batch: _Batch | None = getattr(self._local, "batch", None)
        if batch is not None:
            return self._post(batch, topic, kmsg, key, headers)
        batch = _Batch(self)
        self._opened.add(batch)
        try:
            result = self._post(batch, topic, kmsg, key, headers, lone=True)
            self._await(batch, timeout)
        finally:
            self._opened.discard(batch)
        batch.settle()
        return result

    def _post(
        self, batch: _Batch, topic: str, kmsg: Message, key: str | None, headers: Headers, *, lone: bool = False
    ) -> Result:
        """Hand over one message; its Result, not yet final unless it was refused."""
        if not batch.plain or self._logger.isEnabledFor(logging.DEBUG):
            kmsg = self._onmessage(kmsg)
        try:
            result = self._hand_over(batch, topic, kmsg, key, headers)
        except Error as exc:
            return batch.refuse(kmsg, exc)
        if lone or not batch.plain or self._logger.isEnabledFor(logging.INFO):
            batch.kmsgs[len(batch.results) - 1] = kmsg
        if len(batch.results) % _SERVED_EVERY == 0:
            batch.look_after()
        return result

    def bulk_send(self, topic: str, kmsgs: Iterable[Message], timeout: float = 60) -> Result:
        """Send ready messages, and wait once until all are confirmed.

        Returns: a Result with stdout ``{n} message(s) sent``; a failed one has the uuids that may not have arrived in
            ``retval["failed"]`` and those that have in ``retval["sent"]``. Never raises because of the broker.
        """
        batch = _Batch(self)
        self._opened.add(batch)
        try:
            for given in kmsgs:
                kmsg = self._onmessage(given)
                try:
                    self._hand_over(batch, topic, kmsg, None)
                except Error as exc:
                    index = batch.add(topic, kmsg.uuid, kmsg.entrypoint, Result(uuid=kmsg.uuid))
                    batch.on_delivery(index, exc)
                batch.kmsgs[len(batch.results) - 1] = kmsg
                if len(batch.results) % _SERVED_EVERY == 0:
                    batch.look_after()
            self._await(batch, timeout)
        finally:
            self._opened.discard(batch)
        batch.settle()
        count, failed = len(batch.results), batch.failed
        if not failed:
            return Result(stdout=f"{count} message(s) sent")
        first = batch.errors[min(batch.errors)]
        return Result(
            retcode=first.code or 1,
            stdout=f"{count - len(failed)} message(s) sent",
            stderr=f"{len(failed)} of {count} message(s) not sent, the first because: {first.message}",
            retval={
                "failed": failed,
                "sent": [uuid for index, uuid in enumerate(batch.uuids) if index not in batch.errors],
            },
        )

    @contextmanager
    def batch(self, timeout: float = 60) -> Iterator["BaseProducer"]:
        """Within the block this thread's sends and launches do not wait; the end of the block waits for all of them.

        Each send returns a Result with retcode 202, which becomes the final one in place at the end. An exception in
        the block passes through, after what was handed over has been waited for.

        Raises:
            DeliveryError: at the end, with the uuids that may not have arrived in ``extra["uuids"]``.
            ConfigurationError: a batch of this producer is open in this thread already.
        """
        if getattr(self._local, "batch", None) is not None:
            raise ConfigurationError("A batch of this producer is open in this thread already: end it first")
        batch = self._local.batch = _Batch(self)
        self._opened.add(batch)
        try:
            with within_batch(batch):
                yield self
        finally:
            self._local.batch = None
            try:
                self._await(batch, timeout)
            finally:
                self._opened.discard(batch)
            batch.settle()
        failed = [*batch.refused, *batch.failed]
        if failed:
            count = len(batch.refused) + len(batch.results)
            raise DeliveryError(
                f"{len(failed)} of {count} messages of the batch were not confirmed within {timeout} s: "
                f"{', '.join(failed[:10])}{' ...' if len(failed) > 10 else ''}",
                extra={"uuids": failed},
            )

    def close(self, timeout: float = 10) -> None:
        """Wait for what is under way, up to ``timeout`` seconds, and let go of the broker."""
        self._sink.close(timeout)

    def __enter__(self) -> "BaseProducer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _is_plain(self) -> bool:
        """Nobody overrode a hook, nor how messages are written: their bytes are all that matters."""
        cls = type(self)
        return Message.to_bytes is _TO_BYTES and all(
            getattr(getattr(cls, hook), "__func__", None) is getattr(BaseController, hook).__func__
            for hook in ("onmessage", "onsuccess", "onerror")
        )

    def _hand_over(self, batch: _Batch, topic: str, kmsg: Message, key: str | None, headers: Headers = ()) -> Result:
        if not topic or not isinstance(topic, str):
            raise ValidationError(f"No topic for message {kmsg.entrypoint}[{kmsg.uuid}]: name one")
        raw = encode(kmsg, self._limit)
        return batch.hand_over(topic, key_bytes(key or message_key(kmsg)), raw, kmsg.uuid, kmsg.entrypoint, headers)

    def _await(self, batch: _Batch, timeout: float) -> None:
        """Serve callbacks until all of the batch are told; those that are not after ``timeout`` get a DeliveryError."""
        end = time.monotonic() + timeout
        while batch.open:
            left = end - time.monotonic()
            if left <= 0:
                break
            self._sink.flush(min(left, _SLICE_S))
        if batch.open:
            # Not when another thread still waits for some of what is queued.
            alone = not any(other.open for other in self._opened.copy() if other is not batch)
            batch.give_up(timeout)
            if alone:
                self._sink.drop_queued()

    def _failed(self, result: Result, kmsg: Message, error: Error) -> None:
        """Make ``result`` the final one of a message that failed; log it and call the hook."""
        failure = results.from_exception(error, kmsg.uuid)
        result.retcode, result.stdout = failure.retcode, ""
        result.stderr, result.retval = failure.stderr, failure.retval
        _become(result, self._onerror(kmsg, result))


#: As long as this writes a message, whoever knows its parts may write it too.
_TO_BYTES = Message.to_bytes


_Produce = Callable[[str, bytes, bytes, Callable[[int, Error | None], None], int], None]


def _by_record(sink: Sink) -> _Produce:
    def produce(topic: str, key: bytes, raw: bytes, tell: Callable[[int, Error | None], None], index: int) -> None:
        sink.produce(OutRecord(topic, key, raw), partial(tell, index))

    return produce


def _become(result: Result, final: Result) -> None:
    """What a hook gave takes the place of ``result``, which its user may hold already."""
    if final is not result:
        result.retcode, result.stdout, result.stderr = final.retcode, final.stdout, final.stderr
        result.retval, result.uuid = final.retval, final.uuid
