"""What one record becomes: decode, dispatch, execute, and what follows from it. No I/O of its own."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from kser import context, results
from kser.controller import Controller
from kser.entry import Entrypoint
from kser.errors import Error
from kser.events import Event, EventType, events_topic
from kser.results import ACCEPTED, Result
from kser.schemas import Message
from kser.sequencing.itinerary import METADATA_KEY, Itinerary, message_key
from kser.sequencing.operation import Operation
from kser.sequencing.sequencer import MAX_MESSAGE_BYTES, Consequences, Outgoing, Sequencer
from kser.sequencing.task import Task, UnregisteredTask
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
    #: Gives the records to send instead, when the broker refuses one of these for good.
    refused: Callable[[Error], list[OutRecord]] | None = None


class _Outbox:
    """What the running task sends. Implements context.Delivery."""

    def __init__(self, sequencer: Sequencer, topic: str) -> None:
        self.sequencer = sequencer
        self.topic = topic
        self.messages: list[Outgoing] = []

    def send(self, kmsg: Message, topic: str | None, key: str | None) -> Result:
        target = topic or self.topic
        try:
            self.messages.append(self.sequencer.outgoing(kmsg, target, key or message_key(kmsg)))
        except Error as exc:
            return results.from_exception(exc, kmsg.uuid)
        return Result(
            uuid=kmsg.uuid,
            retcode=ACCEPTED,
            stdout=f"Message {kmsg.entrypoint}[{kmsg.uuid}] leaves for {target} when the running task is settled",
        )


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
        outbox = _Outbox(self.sequencer, record.topic)
        with context.delivering(outbox):
            return self._run(record, kmsg, itinerary, outbox)

    def _run(self, record: Record, kmsg: Message, itinerary: Itinerary | None, outbox: _Outbox) -> Outcome:
        if itinerary is not None and itinerary.end is not None:
            consequences = self.sequencer.operation_ended(kmsg.result, itinerary, record.topic)
            return self._outcome("done", consequences, outbox)
        task: Task | None = None
        try:
            entrypoint = self._dispatch(kmsg)
        except BaseException as exc:  # noqa: BLE001 - not registered, or a constructor that raised
            result = results.from_exception(exc, kmsg.uuid)
        else:
            if isinstance(entrypoint, Operation):
                consequences = self.sequencer.operation_reached(entrypoint, itinerary, record.topic)
                return self._outcome("done", consequences, outbox)
            task = entrypoint if isinstance(entrypoint, Task) else None
            with context.id_scope(entrypoint.uuid):
                result = self._execute(entrypoint)
        if task is None:  # nobody's class, or a bare Entrypoint: for the sequence it is a task all the same
            task = UnregisteredTask(uuid=kmsg.uuid, params=kmsg.params)
            task.entrypoint = kmsg.entrypoint
        result = self.controller._onresult(kmsg, result)
        if not results.is_success(result):
            outbox.messages.clear()  # nothing of a failed task leaves
        consequences = self.sequencer.task_ended(task, result, itinerary, record.topic)
        outcome = self._outcome("done" if results.is_success(result) else "failed", consequences, outbox)
        if outcome.records:
            outcome.refused = lambda error: self._refused(error, task, itinerary, record.topic)
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
            failure = results.from_exception(exc, task.uuid)
            failure.stderr = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
            return task._finish(failure)

    def _refused(self, error: Error, task: Task, itinerary: Itinerary | None, topic: str) -> list[OutRecord]:
        failure = results.from_exception(error, task.uuid)
        logger.error("What follows from %s[%s] was refused by the broker: %s", task.path, task.uuid, error.message)
        if itinerary is None or not itinerary.frames:
            return self._records(
                [],
                [
                    Event(
                        type=EventType.STEP_FAILED,
                        uuid=task.uuid,
                        entrypoint=task.path,
                        status="FAILED",
                        result=failure,
                    )
                ],
            )
        outbox = _Outbox(self.sequencer, topic)
        with context.delivering(outbox):
            consequences = self.sequencer.failed(task, failure, itinerary, topic)
        return self._outcome("failed", consequences, outbox).records

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
        return Outcome(kind, self._records([*outbox.messages, *consequences.messages], consequences.events))

    def _records(self, messages: list[Outgoing], events: list[Event]) -> list[OutRecord]:
        records = [OutRecord(m.topic, m.key.encode(), m.value, self._headers) for m in messages]
        if self._events_topic is not None:
            for event in events:
                value = event.to_bytes(self.worker)
                records.append(OutRecord(self._events_topic, event.key.encode(), value, self._headers))
        return records
