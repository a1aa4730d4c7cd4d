"""Fakes for the core's tests: a sink, a producer, and a whole group of workers without a broker."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from kser import Controller, Message, Result
from kser.errors import Error
from kser.events import Event, EventType
from kser.producer import BaseProducer
from kser.sequencing.itinerary import Itinerary, key_bytes, message_key
from kser.sequencing.sequencer import MAX_MESSAGE_BYTES
from kser.transport import DeliveryCallback, OutRecord, Record
from kser.worker.runner import Outcome, Runner

__all__ = ["HOLD", "FakeProducer", "FakeSink", "Group", "Producer", "raw", "record"]

#: An answer of FakeSink: no answer.
HOLD = object()


def raw(uuid: str, entrypoint: str, **fields: Any) -> bytes:
    """The bytes of a message, as any producer may write them."""
    return json.dumps({"uuid": uuid, "entrypoint": entrypoint, **fields}).encode()


def record(value: bytes | None, topic: str = "work", headers: Any = (), offset: int = 0) -> Record:
    """One record as a Source gives it."""
    return Record(topic, 0, offset, b"k", value, list(headers), 0)


class FakeSink:
    """A Sink in memory that confirms in poll() and flush(), as ``answer(record)`` says: None, an Error, or HOLD.

    ``refuse(record)`` may give an Error for produce() to raise.
    """

    def __init__(
        self,
        answer: Callable[[OutRecord], Any] = lambda record: None,
        refuse: Callable[[OutRecord], Error | None] = lambda record: None,
    ) -> None:
        self.answer = answer
        self.refuse = refuse
        #: What produce() took, in order.
        self.records: list[OutRecord] = []
        self.dropped = 0
        self.closed = False
        self._open: deque[tuple[OutRecord, DeliveryCallback | None]] = deque()
        self._lock = threading.Lock()

    def produce(self, record: OutRecord, on_delivery: DeliveryCallback | None = None) -> None:
        if error := self.refuse(record):
            raise error
        with self._lock:
            self.records.append(record)
            self._open.append((record, on_delivery))

    def poll(self, timeout_s: float) -> int:
        with self._lock:
            waiting, self._open = self._open, deque()
        served = 0
        for record, callback in waiting:
            answer = self.answer(record)
            if answer is HOLD:
                with self._lock:
                    self._open.append((record, callback))
                continue
            served += 1
            if callback is not None:
                callback(answer)
        if not served:
            time.sleep(timeout_s)  # what a client does when nothing comes
        return served

    def flush(self, timeout_s: float) -> int:
        self.poll(timeout_s)
        return len(self._open)

    def drop_queued(self) -> None:
        with self._lock:
            self.dropped += len(self._open)
            self._open.clear()

    def close(self, timeout_s: float = 10) -> None:
        self.closed = True


class Producer(BaseProducer):
    """A producer with the class name that services know."""

    def __init__(self, sink: FakeSink | None = None) -> None:
        self.sink = sink or FakeSink()
        super().__init__(self.sink)


class FakeProducer:
    """What a registry needs of a producer: keeps the messages, each as it would travel."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, Message]] = []

    def send(self, topic: str, kmsg: Message, timeout: float = 60, *, key: str | None = None) -> Result:
        self.sent.append((topic, key or message_key(kmsg), type(kmsg).loads(kmsg.to_bytes())))
        return Result(uuid=kmsg.uuid, stdout=f"Message {kmsg.entrypoint}[{kmsg.uuid}] sent in {topic}")


class Group:
    """The workers of one group, one for each topic, and the messages between them. It is a producer too.

    Args:
        controllers: topic -> the controller of the worker that reads it.
        limit: largest message, in bytes.
    """

    def __init__(self, controllers: Mapping[str, Controller], limit: int = MAX_MESSAGE_BYTES) -> None:
        self.runners = {topic: Runner(c, "g", f"w-{topic}", limit) for topic, c in controllers.items()}
        self.queue: deque[Record] = deque()
        #: Every message, in the order it was sent.
        self.messages: list[Record] = []
        #: Every event, in the order it was told.
        self.events: list[Event] = []
        #: What each message became, in the order they were run.
        self.kinds: list[str] = []

    def send(self, topic: str, kmsg: Message, timeout: float = 60, *, key: str | None = None) -> Result:
        self.put(OutRecord(topic, key_bytes(key or message_key(kmsg)), kmsg.to_bytes()))
        return Result(uuid=kmsg.uuid, stdout="sent")

    def put(self, out: OutRecord) -> None:
        if out.topic == "g.events":
            self.events.append(Event.loads(out.value))
            return
        taken = Record(out.topic, 0, len(self.messages), out.key, out.value, list(out.headers), 0)
        self.messages.append(taken)
        self.queue.append(taken)

    def run_one(self) -> Outcome:
        """Run the oldest message there is."""
        taken = self.queue.popleft()
        outcome = self.runners[taken.topic].run(taken)
        self.kinds.append(outcome.kind)
        for out in outcome.records:
            self.put(out)
        return outcome

    def run(self, at_most: int = 50_000) -> "Group":
        """Run until there is nothing more to do."""
        for _ in range(at_most):
            if self.queue:
                self.run_one()
        assert not self.queue, f"not at its end after {at_most} messages"
        return self

    def of(self, *types: str) -> list[Event]:
        """The events of these types."""
        return [event for event in self.events if event.type in types]

    @property
    def steps(self) -> list[Event]:
        """Tasks that ended."""
        return self.of(EventType.STEP_DONE, EventType.STEP_FAILED)

    def end_of(self, uuid: str) -> Event:
        """The one event that tells the end of this operation."""
        (found,) = [event for event in self.of(EventType.OPERATION_ENDED) if event.uuid == uuid]
        return found

    def itinerary(self, index: int) -> Itinerary | None:
        """The itinerary of a message."""
        return Itinerary.of(Message.loads(self.messages[index].value or b""))
