"""What one record becomes: decode, dispatch, execute, and what follows from it. No I/O of its own."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kser import context, results
from kser.controller import Controller
from kser.entry import Entrypoint
from kser.errors import Error, InternalError
from kser.events import Event, EventType, events_topic
from kser.results import ACCEPTED, Result
from kser.schemas import Message
from kser.sequencing.itinerary import METADATA_KEY, Itinerary, key_bytes, message_key
from kser.sequencing.operation import Operation
from kser.sequencing.sequencer import MAX_MESSAGE_BYTES, Consequences, Outgoing, Sequencer
from kser.sequencing.task import Task, UnregisteredTask
from kser.status import Status
from kser.transport import OutRecord, Record

__all__ = ["GROUP_HEADER", "Outcome", "Runner"]

logger = logging.getLogger(__name__)

#: Header of every message a worker emits: only workers of this group run it.
GROUP_HEADER = "kser-group"


@dataclass(slots=True)
class Outcome:
    """What one record became. Its records are all there is to send before its offset may be committed."""

    #: "done", "failed", "rejected" (no message) or "foreign" (of another group).
    kind: str
    records: list[OutRecord] = field(default_factory=list)
    #: How many of the records the task itself sent. They go first, the rest when all of them are confirmed: one that is
    #: refused fails the task, and then its operation must not have gone on.
    ahead: int = 0
    #: Gives the records to send instead, when the broker refuses a message for good.
    refused: Callable[[Error], list[OutRecord]] | None = None


class _Outbox:
    """What the running task sends. Implements context.Delivery."""

    def __init__(self, sequencer: Sequencer, topic: str, itinerary: Any = None) -> None:
        self.sequencer = sequencer
        self.topic = topic
        #: Of the running message, as it came.
        self.itinerary = itinerary
        self.messages: list[Outgoing] = []

    def send(self, kmsg: Message, topic: str | None, key: str | None) -> Result:
        target = topic or self.topic
        if self.itinerary is not None and kmsg.metadata.get(METADATA_KEY) == self.itinerary:
            # Metadata handed on by hand, in postinit() say: a second message with this itinerary forks the sequence.
            metadata = {k: v for k, v in kmsg.metadata.items() if k != METADATA_KEY}
            kmsg = type(kmsg)(kmsg.uuid, kmsg.entrypoint, kmsg.params, kmsg.result, metadata)
        try:
            self.messages.append(self.sequencer.outgoing(kmsg, target, key or message_key(kmsg)))
        except Error as exc:
            return results.from_exception(exc, kmsg.uuid)
        return Result(
            uuid=kmsg.uuid,
            retcode=ACCEPTED,
            stdout=f"Message {kmsg.entrypoint}[{kmsg.uuid}] leaves for {target} when the running task is settled",
        )

    def drop(self) -> None:
        self.messages.clear()


class Runner:
    """Runs records.

    Args:
        controller: decodes and dispatches; its hooks are called.
        group: the workers' group.
        worker: name of this worker, for the events.
        limit: largest message, in bytes.
        events: False to emit no events.

    Thread rule: belongs to one thread; ``doing`` may be read by others.
    """

    def __init__(
        self,
        controller: Controller | type[Controller],
        group: str,
        worker: str = "",
        limit: int = MAX_MESSAGE_BYTES,
        *,
        events: bool = True,
    ) -> None:
        self.controller = controller
        self.worker = worker
        self.sequencer = Sequencer(controller, limit)
        #: What was run last, ``entrypoint[uuid]``.
        self.doing = ""
        self._group = group.encode()
        self._headers = ((GROUP_HEADER, self._group),)
        self._events_topic = events_topic(group) if events else None

    def run(self, record: Record) -> Outcome:
        """Run one record to its end. Never raises an Exception."""
        if record.headers:
            group = record.header(GROUP_HEADER)
            if group is not None and group != self._group:
                return Outcome("foreign")
        try:
            kmsg = self.controller.decode(record.value if record.value is not None else b"")
        except Exception as exc:  # noqa: BLE001 - data that is no message; a user's TRANSPORT may raise anything
            return self._reject(record, self.controller.reject(record.value, exc), None)
        try:
            itinerary = Itinerary.of(kmsg)
        except Error as exc:
            return self._reject(record, self.controller.reject(record.value, exc), kmsg)
        self.doing = f"{kmsg.entrypoint}[{kmsg.uuid}]"
        outbox = _Outbox(self.sequencer, record.topic, kmsg.metadata.get(METADATA_KEY))
        try:
            with context.delivering(outbox):
                return self._run(record, kmsg, itinerary, outbox)
        except Exception:
            raise
        except BaseException as exc:  # sys.exit() in a hook of the controller: it must not end the thread unseen
            raise InternalError(f"{self.doing} raised {type(exc).__name__} outside of its task: {exc}") from exc

    def _run(self, record: Record, kmsg: Message, itinerary: Itinerary | None, outbox: _Outbox) -> Outcome:
        if itinerary is not None and itinerary.end is not None:
            consequences = self.sequencer.operation_ended(kmsg.result, itinerary, record.topic)
            outcome = self._outcome("done", consequences, outbox)
            outcome.refused = lambda error: self._refused(
                error,
                f"{kmsg.entrypoint}[{kmsg.uuid}]",
                kmsg.uuid,
                record.topic,
                lambda failure: self.sequencer.operation_ended(failure, itinerary, record.topic),
            )
            return outcome
        task: Task | None = None
        try:
            with context.id_scope(f"{kmsg.uuid}:init"):
                entrypoint = self._dispatch(kmsg)
        except BaseException as exc:  # noqa: BLE001 - not registered, or a constructor that raised
            result = results.from_exception(exc, kmsg.uuid)
        else:
            if isinstance(entrypoint, Operation):
                return self._launch(record, entrypoint, itinerary, outbox)
            task = entrypoint if isinstance(entrypoint, Task) else None
            with context.id_scope(entrypoint.uuid):
                result = self._execute(entrypoint)
        if task is None:  # nobody's class, or a bare Entrypoint: for the sequence it is a task all the same
            task = UnregisteredTask(uuid=kmsg.uuid, params=kmsg.params)
            task.entrypoint = kmsg.entrypoint
        with context.id_scope(f"{kmsg.uuid}:hooks"):
            result = self.controller._onresult(kmsg, result)
        if not results.is_success(result):
            outbox.drop()  # nothing of a failed task leaves
        consequences = self.sequencer.task_ended(task, result, itinerary, record.topic)
        outcome = self._outcome("done" if results.is_success(result) else "failed", consequences, outbox)
        if outcome.records:
            outcome.refused = lambda error: self._task_refused(error, task, itinerary, record.topic)
        return outcome

    def _launch(self, record: Record, operation: Operation, itinerary: Itinerary | None, outbox: _Outbox) -> Outcome:
        consequences = self.sequencer.operation_reached(operation, itinerary, record.topic)
        outcome = self._outcome("failed" if operation.status == Status.FAILED else "done", consequences, outbox)
        outcome.refused = lambda error: self._refused(
            error,
            f"{operation.path}[{operation.uuid}]",
            operation.uuid,
            record.topic,
            lambda failure: self.sequencer.operation_refused(operation, failure, itinerary, record.topic),
        )
        return outcome

    def _dispatch(self, kmsg: Message) -> Entrypoint:
        """The task, without the itinerary in its metadata: what a task hands on by hand must not fork the sequence."""
        entrypoint = self.controller.dispatch(kmsg)
        if METADATA_KEY in entrypoint.metadata:
            entrypoint.metadata = {k: v for k, v in entrypoint.metadata.items() if k != METADATA_KEY}
        return entrypoint

    def _execute(self, task: Entrypoint) -> Result:
        try:
            return task.execute()
        except BaseException as exc:  # noqa: BLE001 - sys.exit() in a task ends the task, not the worker
            return task._finish(results.from_exception(exc, task.uuid))

    def _task_refused(self, error: Error, task: Task, itinerary: Itinerary | None, topic: str) -> list[OutRecord]:
        def consequences(failure: Result) -> Consequences:
            if itinerary is not None and itinerary.frames:
                return self.sequencer.failed(task, failure, itinerary, topic)
            event = Event(
                type=EventType.STEP_FAILED, uuid=task.uuid, entrypoint=task.path, status="FAILED", result=failure
            )
            return Consequences(events=[event])

        return self._refused(error, f"{task.path}[{task.uuid}]", task.uuid, topic, consequences)

    def _refused(
        self, error: Error, what: str, uuid: str, topic: str, consequences: Callable[[Result], Consequences]
    ) -> list[OutRecord]:
        """What is sent instead of records that the broker refused for good: what follows from a failure."""
        logger.error("What follows from %s was refused by the broker: %s", what, error.message)
        outbox = _Outbox(self.sequencer, topic)
        with context.delivering(outbox):
            return self._outcome("failed", consequences(results.from_exception(error, uuid)), outbox).records

    def _reject(self, record: Record, result: Result, kmsg: Message | None) -> Outcome:
        where = f"{record.topic}/{record.partition}/{record.offset}"
        event = Event(
            type=EventType.MESSAGE_REJECTED,
            uuid=kmsg.uuid if kmsg is not None else where,
            entrypoint=kmsg.entrypoint if kmsg is not None else "",
            status="FAILED",
            result=result,
            note=f"record {where}",
        )
        return Outcome("rejected", self._records([], [event]))

    def _outcome(self, kind: str, consequences: Consequences, outbox: _Outbox) -> Outcome:
        return Outcome(
            kind,
            self._records([*outbox.messages, *consequences.messages], consequences.events),
            ahead=len(outbox.messages),
        )

    def _records(self, messages: list[Outgoing], events: list[Event]) -> list[OutRecord]:
        records = [OutRecord(m.topic, key_bytes(m.key), m.value, self._headers) for m in messages]
        if self._events_topic is not None:
            for event in events:
                value = event.to_bytes(self.worker)
                records.append(OutRecord(self._events_topic, key_bytes(event.key), value, self._headers))
        return records
