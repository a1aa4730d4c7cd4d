"""Producer: what services send messages with. The drivers only differ in their Sink."""

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from kser import results
from kser.controller import BaseController
from kser.errors import ConfigurationError, DeliveryError, Error, ValidationError
from kser.results import Result
from kser.schemas import Message
from kser.sequencing.itinerary import key_bytes, message_key
from kser.sequencing.sequencer import MAX_MESSAGE_BYTES, encode
from kser.transport import OutRecord, Sink

__all__ = ["BaseProducer", "max_message_bytes"]

logger = logging.getLogger(__name__)

#: Longest time one thread serves callbacks before it looks whether its own message was confirmed by another thread.
_SLICE_S = 0.05
#: Messages a batch may have open before it waits for some: bounds memory, and what a dead broker can hold back.
_OPEN_IN_BATCH = 50_000


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


class _Shipment:
    """One message between produce() and its confirmation."""

    __slots__ = ("done", "entrypoint", "error", "kmsg", "opened", "result", "topic", "uuid")

    def __init__(self, topic: str, kmsg: Message, opened: "set[_Shipment]") -> None:
        self.topic = topic
        #: None once nobody needs it any more: a batch of many messages then holds little.
        self.kmsg: Message | None = kmsg
        self.uuid = kmsg.uuid
        self.entrypoint = kmsg.entrypoint
        self.opened = opened
        self.done = False
        self.error: Error | None = None
        self.result = Result(uuid=kmsg.uuid, retcode=results.ACCEPTED)

    def delivered(self, error: Error | None) -> None:
        if not self.done:  # given up already, or dropped from the queue after that
            self.error = error
            self.done = True
            self.opened.discard(self)


class _Batch:
    """What was sent inside ``with producer.batch()``, in order."""

    def __init__(self) -> None:
        self.shipments: list[_Shipment] = []
        self.refused: list[str] = []


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
        self._opened: set[_Shipment] = set()
        #: Nobody overrode the hooks: there is nobody to show a message to, unless the log wants it.
        self._plain = all(
            getattr(getattr(type(self), hook), "__func__", None) is getattr(BaseController, hook).__func__
            for hook in ("onmessage", "onsuccess", "onerror")
        )

    def send(self, topic: str, kmsg: Message, timeout: float = 60, *, key: str | None = None) -> Result:
        """Send one message and wait until it is confirmed.

        Args:
            topic: a Kafka topic.
            kmsg: the message.
            timeout: seconds to wait for the confirmation.
            key: record key; default the key of the message's operation, else its uuid.

        Returns: a Result with the message's uuid. retcode 0: the broker has it. retcode 202: inside ``with batch()``,
            settled in place at its end. Else it failed: 413 too large and not sent, 400 not JSON and not sent, 504 not
            confirmed in time (it may still have arrived; sending it again with the same uuid is what uuids are for).
            Never raises because of the broker or the message.
        """
        if not self._plain or self._logger.isEnabledFor(logging.DEBUG):
            kmsg = self._onmessage(kmsg)
        shipment = _Shipment(topic, kmsg, self._opened)
        batch: _Batch | None = getattr(self._local, "batch", None)
        try:
            self._hand_over(shipment, key)
        except Error as exc:
            self._settle(shipment, exc)
            if batch is not None:
                batch.refused.append(kmsg.uuid)
            return shipment.result
        if batch is not None:
            shipment.result.stdout = "Handed over, not yet confirmed"
            if self._plain and not self._logger.isEnabledFor(logging.INFO):
                shipment.kmsg = None
            batch.shipments.append(shipment)
            if len(batch.shipments) % 1000 == 0:
                self._sink.poll(0)
                self._bound(batch)
            return shipment.result
        self._await([shipment], timeout)
        self._settle(shipment, shipment.error)
        return shipment.result

    def bulk_send(self, topic: str, kmsgs: Iterable[Message], timeout: float = 60) -> Result:
        """Send ready messages, and wait once until all are confirmed.

        Returns: a Result with stdout ``{n} message(s) sent``; a failed one has the uuids that may not have arrived in
            ``retval["failed"]`` and those that have in ``retval["sent"]``. Never raises because of the broker.
        """
        shipments: list[_Shipment] = []
        for kmsg in kmsgs:
            shipment = _Shipment(topic, self._onmessage(kmsg), self._opened)
            shipments.append(shipment)
            try:
                self._hand_over(shipment, None)
            except Error as exc:
                shipment.delivered(exc)
            if len(shipments) % 1000 == 0:
                self._sink.poll(0)
        self._await(shipments, timeout)
        for shipment in shipments:
            self._settle(shipment, shipment.error)
        failed = [s for s in shipments if s.error is not None]
        if not failed:
            return Result(stdout=f"{len(shipments)} message(s) sent")
        first = failed[0].error
        code = first.code if first is not None and first.code else 1
        return Result(
            retcode=code,
            stdout=f"{len(shipments) - len(failed)} message(s) sent",
            stderr=f"{len(failed)} of {len(shipments)} message(s) not sent, the first because: {_text(first)}",
            retval={
                "failed": [s.uuid for s in failed],
                "sent": [s.uuid for s in shipments if s.error is None],
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
        batch = self._local.batch = _Batch()
        try:
            yield self
        finally:
            self._local.batch = None
            self._await(batch.shipments, timeout)
            for shipment in batch.shipments:
                self._settle(shipment, shipment.error)
        failed = [*batch.refused, *(s.uuid for s in batch.shipments if s.error is not None)]
        if failed:
            count = len(batch.refused) + len(batch.shipments)
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

    def _hand_over(self, shipment: _Shipment, key: str | None) -> None:
        kmsg, topic = shipment.kmsg, shipment.topic
        assert kmsg is not None
        if not topic or not isinstance(topic, str):
            raise ValidationError(f"No topic for message {kmsg.entrypoint}[{kmsg.uuid}]: name one")
        record = OutRecord(topic, key_bytes(key or message_key(kmsg)), encode(kmsg, self._limit))
        self._opened.add(shipment)
        try:
            self._sink.produce(record, shipment.delivered)
        except Error as exc:
            shipment.delivered(exc)
            raise

    def _await(self, shipments: list[_Shipment], timeout: float) -> None:
        """Serve callbacks until all of these are done; those that are not after ``timeout`` get a DeliveryError."""
        end = time.monotonic() + timeout
        rest = [s for s in shipments if not s.done]
        while rest:
            left = end - time.monotonic()
            if left <= 0:
                break
            self._sink.flush(min(left, _SLICE_S))
            rest = [s for s in rest if not s.done]
        alone = self._opened.issubset(rest)  # else another thread still waits for some of what is queued
        for shipment in rest:
            if not shipment.done:
                shipment.delivered(
                    DeliveryError(
                        f"Message {shipment.entrypoint}[{shipment.uuid}] was not confirmed by the broker "
                        f"within {timeout} s: is it reachable?",
                        extra={"uuids": [shipment.uuid]},
                    )
                )
        if rest and alone:
            self._sink.drop_queued()

    def _bound(self, batch: _Batch) -> None:
        """Wait when too many are open, so that a long batch needs bounded memory in the client."""
        recent = batch.shipments[-_OPEN_IN_BATCH:]
        if len(recent) == _OPEN_IN_BATCH and not recent[0].done:
            self._sink.flush(1)

    def _settle(self, shipment: _Shipment, error: Error | None) -> None:
        """Make the shipment's Result final, in place; log it and call the hooks."""
        result, kmsg = shipment.result, shipment.kmsg
        if error is None:
            result.retcode = 0
            result.stdout = f"Message {shipment.entrypoint}[{shipment.uuid}] sent in {shipment.topic}"
            if kmsg is None:
                return
            final = self._onsuccess(kmsg, result)
        else:
            kmsg = kmsg or Message(shipment.uuid, shipment.entrypoint)
            failure = results.from_exception(error, shipment.uuid)
            result.retcode, result.stdout = failure.retcode, ""
            result.stderr, result.retval = failure.stderr, failure.retval
            final = self._onerror(kmsg, result)
        if final is not result:
            result.retcode, result.stdout, result.stderr = final.retcode, final.stdout, final.stderr
            result.retval, result.uuid = final.retval, final.uuid


def _text(error: Error | None) -> str:
    return str(error.message) if error is not None else ""
