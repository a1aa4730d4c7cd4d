"""Producer: what services send messages with. The drivers only differ in their Sink."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar

from kser import results
from kser.batches import SERVED_EVERY, Batch, Lane, LaneBatch, SharedBatch, become
from kser.controller import BaseController
from kser.entry import result_extra
from kser.errors import ConfigurationError, DeliveryError, Error, ValidationError
from kser.headers import Headers
from kser.results import Result
from kser.schemas import Message
from kser.sequencing.itinerary import key_bytes, message_key
from kser.sequencing.plain_launch import within_batch
from kser.sequencing.sequencer import MAX_MESSAGE_BYTES, encode
from kser.transport import OutRecord, Sink
from kser.transport.names import TOPIC_NAME_RULE, is_topic_name

__all__ = ["BaseProducer", "max_message_bytes"]

logger = logging.getLogger(__name__)

#: Batches under way at the same time that have a sink of their own, with a client and its threads each.
_LANES = 4
#: Names of topics that are remembered as good.
_TOPICS = 1000


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


class BaseProducer(BaseController):
    """Sends messages and waits until the broker has confirmed them.

    May be shared by threads. Hooks: onmessage(), onsuccess(), onerror(), as for a Controller.

    Args:
        sink: where records go; the producer owns it and closes it.
        lane: makes a sink like it with ``failures_only``. With it batches and bulk_send() go through such sinks, opened
            when they are needed first and kept for the next ones: one for each that is under way at the same time, up
            to four. They are quicker by a third.
    """

    _logger: ClassVar[logging.Logger] = logger

    def __init__(self, sink: Sink, lane: Callable[[], Sink] | None = None) -> None:
        self._sink = sink
        self._new_lane_sink = lane
        self._limit = max_message_bytes()
        self._local = threading.local()
        #: (topic, key, value, tell, index): writes a record, and calls tell(index, error) when that is known.
        self._produce: _Produce = getattr(sink, "produce_at", None) or _by_record(sink)
        #: For what follows. A signal handler may send a message within it, so the same thread may take it again.
        self._lock = threading.RLock()
        #: Batches under way in the shared sink, of all threads.
        self._opened: set[Batch] = set()
        self._lanes: list[Lane] = []
        self._idle: list[Lane] = []
        self._closed = False
        #: Topics whose names are known to be good.
        self._topics: set[str] = set()

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
            settled in place at its end. Else it failed: 413 too large and not sent, 400 not JSON or a wrong argument
            and not sent, 504 not confirmed in time (it may still have arrived; sending it again with the same uuid is
            what uuids are for). Never raises because of the broker or the message.
        """
        batch: Batch | None = getattr(self._local, "batch", None)
        if not isinstance(kmsg, Message) or not _is_seconds(timeout):
            error = _no_message("send()", kmsg) if not isinstance(kmsg, Message) else _no_seconds(timeout)
            return self._refused(kmsg, error) if batch is None else batch.refuse(kmsg, error)
        if batch is not None:
            return self._post(batch, topic, kmsg, key, headers)
        batch = self._shared_batch()
        try:
            result = self._post(batch, topic, kmsg, key, headers, lone=True)
            batch.wait(timeout)
        finally:
            self._release(batch)
        batch.settle()
        return result

    def _post(
        self, batch: Batch, topic: str, kmsg: Message, key: str | None, headers: Headers, *, lone: bool = False
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
        if len(batch.results) % SERVED_EVERY == 0:
            batch.look_after()
        return result

    def bulk_send(self, topic: str, kmsgs: Iterable[Message], timeout: float = 60) -> Result:
        """Send ready messages, and wait once until all are confirmed.

        Inside ``with batch()`` what the batch has handed over is waited for first, so that the order is kept.

        Returns: a Result with stdout ``{n} message(s) sent``; a failed one has the uuids that may not have arrived in
            ``retval["failed"]`` and those that have in ``retval["sent"]``. Never raises because of the broker. What
            ``kmsgs`` raises passes through, after what was handed over has been waited for.
        """
        try:
            if not _is_seconds(timeout):
                raise _no_seconds(timeout)
            todo = _iterator(kmsgs)
        except ValidationError as exc:
            return results.from_exception(exc, "")
        around: Batch | None = getattr(self._local, "batch", None)
        if isinstance(around, LaneBatch):
            with suppress(Error):  # closed: the messages are refused, and told so
                around.catch_up(timeout)
        batch = self._many()
        try:
            for given in todo:
                self._post_one(batch, topic, given)
        except BaseException as exc:
            self._conclude(batch, timeout)
            count, failed = len(batch.results), batch.failed
            exc.add_note(f"bulk_send(): {count} message(s) came before this; not sent of these: {failed or 'none'}")
            raise
        self._conclude(batch, timeout)
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

    def _post_one(self, batch: Batch, topic: str, given: Any) -> None:
        """One message of bulk_send()."""
        index = len(batch.results)
        if not isinstance(given, Message):
            error = _no_message(f"bulk_send(), at index {index}", given)
            batch.fail(topic, Result().uuid, type(given).__name__, error)
            return
        kmsg = self._onmessage(given)
        try:
            self._hand_over(batch, topic, kmsg, None)
        except Error as exc:
            batch.fail(topic, kmsg.uuid, kmsg.entrypoint, exc)
        batch.kmsgs[index] = kmsg
        if (index + 1) % SERVED_EVERY == 0:
            batch.look_after()

    @contextmanager
    def batch(self, timeout: float = 60) -> Iterator["BaseProducer"]:
        """Within the block this thread's sends and launches do not wait; the end of the block waits for all of them.

        Each send returns a Result with retcode 202, which becomes the final one in place at the end. An exception in
        the block passes through, after what was handed over has been waited for.

        Raises:
            DeliveryError: at the end, with the uuids that may not have arrived in ``extra["uuids"]``.
            ConfigurationError: a batch of this producer is open in this thread already.
            ValidationError: ``timeout`` is no number of seconds.
        """
        if not _is_seconds(timeout):
            raise _no_seconds(timeout)
        if getattr(self._local, "batch", None) is not None:
            raise ConfigurationError("A batch of this producer is open in this thread already: end it first")
        batch = self._local.batch = self._many()
        try:
            with within_batch(batch):
                yield self
        finally:
            self._local.batch = None
            self._conclude(batch, timeout)
        failed = [*batch.refused, *batch.failed]
        if failed:
            count = len(batch.refused) + len(batch.results)
            first = batch.refusal or batch.errors[min(batch.errors)]
            raise DeliveryError(
                f"{len(failed)} of {count} messages of the batch were not confirmed within {timeout} s: "
                f"{', '.join(failed[:10])}{' ...' if len(failed) > 10 else ''}; the first because: {first.message}",
                extra={"uuids": failed},
            )

    def close(self, timeout: float = 10) -> None:
        """Wait for what is under way, up to ``timeout`` seconds, and let go of the broker. A second call does nothing.

        Raises ValidationError when ``timeout`` is no number of seconds.
        """
        if not _is_seconds(timeout):
            raise _no_seconds(timeout)
        end = time.monotonic() + timeout
        with self._lock:
            self._closed = True
            lanes, self._lanes, self._idle = self._lanes, [], []
        for lane in lanes:
            lane.close(max(end - time.monotonic(), 0))
        self._sink.close(max(end - time.monotonic(), 0))

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

    def _sends_plainly(self) -> bool:
        """Nobody overrode send()."""
        return type(self).send is BaseProducer.send and "send" not in self.__dict__

    def _shared_batch(self) -> SharedBatch:
        batch = SharedBatch(self)
        with self._lock:
            self._opened.add(batch)
        return batch

    def _many(self) -> Batch:
        """A batch for many messages, in a lane if there can be one."""
        with self._lock:
            lane = self._idle.pop() if self._idle else None
            if lane is None and self._new_lane_sink is not None and len(self._lanes) < _LANES and not self._closed:
                try:
                    lane = Lane(self._new_lane_sink())
                except Error as exc:
                    self._logger.warning("A batch takes the shared sink, another one cannot be opened: %s", exc.message)
                else:
                    self._lanes.append(lane)
        return LaneBatch(self, lane) if lane is not None else self._shared_batch()

    def _conclude(self, batch: Batch, timeout: float) -> None:
        """Wait for a batch, then make its Results final."""
        try:
            batch.wait(timeout)
        finally:
            self._release(batch)
        batch.settle()

    def _release(self, batch: Batch) -> None:
        """The batch is not under way any more; its lane is for the next one."""
        lane = batch.lane if isinstance(batch, LaneBatch) else None
        with self._lock:
            self._opened.discard(batch)
            if lane is None or lane not in self._lanes:
                return
            if not lane.spent:
                self._idle.append(lane)
                return
            self._lanes.remove(lane)
        lane.close(0)

    def _drop_queued(self, batch: Batch) -> None:
        """Give up what is queued in the shared sink, unless some of it belongs to a batch of another thread."""
        with self._lock:  # nobody begins one meanwhile
            if self._opened <= {batch}:
                with suppress(Error):  # closed, which drops it too
                    self._sink.drop_queued()

    def _hand_over(self, batch: Batch, topic: str, kmsg: Message, key: str | None, headers: Headers = ()) -> Result:
        if type(topic) is not str or topic not in self._topics:
            self._check_topic(topic, kmsg)
        if key is not None and not isinstance(key, str):
            raise ValidationError(
                f"key={_brief(key)} of message {kmsg.entrypoint}[{kmsg.uuid}]: give a str, which is sent as UTF-8, or "
                "None for the key of its operation",
                extra={"uuid": kmsg.uuid},
            )
        raw = encode(kmsg, self._limit)
        return batch.hand_over(topic, key_bytes(key or message_key(kmsg)), raw, kmsg.uuid, kmsg.entrypoint, headers)

    def _check_topic(self, topic: str, kmsg: Message) -> None:
        if not topic or not isinstance(topic, str):
            raise ValidationError(f"No topic for message {kmsg.entrypoint}[{kmsg.uuid}]: name one")
        if not self._is_topic(topic):
            raise ValidationError(
                f"Message {kmsg.entrypoint}[{kmsg.uuid}] cannot be sent: {_brief(topic)} {TOPIC_NAME_RULE}",
                extra={"uuid": kmsg.uuid},
            )

    def _is_topic(self, topic: str) -> bool:
        good = is_topic_name(topic)
        if good and len(self._topics) < _TOPICS:
            self._topics.add(topic)
        return good

    def _refused(self, kmsg: Any, error: Error) -> Result:
        """The final Result of a message that was not handed over."""
        if isinstance(kmsg, Message):
            result = Result(uuid=kmsg.uuid)
            self._failed(result, kmsg, error)
            return result
        result = results.from_exception(error, "")
        self._logger.error("%s.Failed: %s", type(self).__name__, result, extra=result_extra(result))
        return result

    def _failed(self, result: Result, kmsg: Message, error: Error) -> None:
        """Make ``result`` the final one of a message that failed; log it and call the hook."""
        failure = results.from_exception(error, kmsg.uuid)
        result.retcode, result.stdout = failure.retcode, ""
        result.stderr, result.retval = failure.stderr, failure.retval
        become(result, self._onerror(kmsg, result))


#: As long as this writes a message, whoever knows its parts may write it too.
_TO_BYTES = Message.to_bytes


_Produce = Callable[[str, bytes, bytes, Callable[[int, Error | None], None], int], None]


def _by_record(sink: Sink) -> _Produce:
    def produce(topic: str, key: bytes, raw: bytes, tell: Callable[[int, Error | None], None], index: int) -> None:
        sink.produce(OutRecord(topic, key, raw), partial(tell, index))

    return produce


def _is_seconds(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return float(value) >= 0  # NaN is not
    except OverflowError:
        return False


def _no_seconds(timeout: Any) -> ValidationError:
    return ValidationError(f"timeout={_brief(timeout)}: give a number of seconds, 0 or more")


def _no_message(where: str, value: Any) -> ValidationError:
    return ValidationError(
        f"{where}: {_brief(value)} is a {type(value).__name__} and no Message: give Message(uuid=..., entrypoint=...), "
        "or call send() of a task"
    )


def _iterator(kmsgs: Any) -> Iterator[Message]:
    try:
        return iter(kmsgs)
    except TypeError:
        raise ValidationError(
            f"bulk_send(): {_brief(kmsgs)} is a {type(kmsgs).__name__}: give a list, or anything else that can be "
            "iterated, of messages"
        ) from None


def _brief(value: Any) -> str:
    shown = results.shown(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


#: Characters of a wrong argument that an error quotes.
_SHOWN = 100
