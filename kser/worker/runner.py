"""What one record becomes: decode, dispatch, execute, and what follows from it. No I/O of its own."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
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
from kser.sequencing.plain_step import is_plain
from kser.sequencing.sequencer import MAX_MESSAGE_BYTES, Consequences, Outgoing, Sequencer
from kser.sequencing.task import Task, UnregisteredTask
from kser.status import Status
from kser.transport import OutRecord, Record

__all__ = ["ATTEMPT_HEADER", "GROUP_HEADER", "Outcome", "Runner", "Work"]

logger = logging.getLogger(__name__)

#: Header of every message a worker emits: only workers of this group run it.
GROUP_HEADER = "kser-group"
#: Header of a message that is tried again: which try it is, from 2.
ATTEMPT_HEADER = "kser-attempt"


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


class Work:
    """What a record asks for.

    Args:
        record: the record.
        kmsg: the message in it.
        plain: its itinerary as it came, when it is plain (see is_plain()).
        itinerary: its itinerary when it is not; None for a message of no operation.
        cls: the class it names; None when nobody here registered it, and for the end of an operation.
        attempt: which try it is.
    """

    __slots__ = ("_itinerary", "attempt", "cls", "kmsg", "plain", "record")

    def __init__(
        self,
        record: Record,
        kmsg: Message,
        plain: dict[str, Any] | None,
        itinerary: Itinerary | None,
        cls: type[Entrypoint] | None,
        attempt: int,
    ) -> None:
        self.record = record
        self.kmsg = kmsg
        self.plain = plain
        self._itinerary = itinerary
        self.cls = cls
        self.attempt = attempt

    @property
    def itinerary(self) -> Itinerary | None:
        """The itinerary, read when it is needed; None for a message of no operation."""
        if self._itinerary is None and self.plain is not None:
            self._itinerary = Itinerary.load(self.plain)
        return self._itinerary

    @property
    def name(self) -> str:
        """``entrypoint[uuid]``, for people."""
        return f"{self.kmsg.entrypoint}[{self.kmsg.uuid}]"


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

    Thread rule: has no state; may be shared.
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
        self._group = group.encode()
        self._headers = ((GROUP_HEADER, self._group),)
        self._events_topic = events_topic(group) if events else None

    def run(self, record: Record) -> Outcome:
        """Run one record to its end. Never raises an Exception."""
        work = self.open(record)
        return work if isinstance(work, Outcome) else self.execute(work)

    def open(self, record: Record) -> "Work | Outcome":
        """What a record asks for, or its Outcome when there is nothing to run. Runs hooks of the controller only."""
        attempt = 1
        if record.headers:
            group = record.header(GROUP_HEADER)
            if group is not None and group != self._group:
                return Outcome("foreign")
            attempt = _attempt(record.header(ATTEMPT_HEADER))
        try:
            kmsg = self.controller.decode(record.value if record.value is not None else b"")
        except Exception as exc:  # noqa: BLE001 - data that is no message; a user's TRANSPORT may raise anything
            return self._reject(record, self.controller.reject(record.value, exc), None)
        data = kmsg.metadata.get(METADATA_KEY)
        if data is None or is_plain(data):
            return Work(record, kmsg, data, None, self.controller.find(kmsg.entrypoint), attempt)
        try:
            itinerary = Itinerary.of(kmsg)
        except Error as exc:
            return self._reject(record, self.controller.reject(record.value, exc), kmsg)
        cls = None
        if itinerary is None or itinerary.end is None:
            cls = self.controller.find(kmsg.entrypoint)
        return Work(record, kmsg, None, itinerary, cls, attempt)

    def execute(self, work: "Work") -> Outcome:
        """Run what a record asks for. Never raises an Exception but InternalError, for faults that are no task's."""
        return self._guarded(work, None)

    def fail(self, work: "Work", error: Exception) -> Outcome:
        """What follows when a task failed with ``error`` without having come to its end: its hooks are called.

        For a task whose process or thread had to be given up.
        """
        return self._guarded(work, error)

    def refused_for(self, work: "Work", outcome: Outcome) -> None:
        """Give an Outcome that was made in another process what it needs when the broker refuses its records."""
        task = UnregisteredTask(uuid=work.kmsg.uuid, params=work.kmsg.params)
        task.entrypoint = work.kmsg.entrypoint
        outcome.refused = partial(self._task_refused, task, work)

    def _guarded(self, work: "Work", error: Exception | None) -> Outcome:
        kmsg = work.kmsg
        outbox = _Outbox(self.sequencer, work.record.topic, kmsg.metadata.get(METADATA_KEY))
        scope = context.Scope(outbox)
        token = context._scope.set(scope)
        try:
            if work.cls is None and (itinerary := work.itinerary) is not None and itinerary.end is not None:
                return self._end(work, itinerary, outbox)
            return self._run(work, outbox, error, scope)
        except Exception:
            raise
        except BaseException as exc:  # sys.exit() in a hook of the controller: it must not end the thread unseen
            raise InternalError(f"{work.name} raised {type(exc).__name__} outside of its task: {exc}") from exc
        finally:
            context._scope.reset(token)

    def _end(self, work: Work, itinerary: Itinerary, outbox: _Outbox) -> Outcome:
        kmsg, topic = work.kmsg, work.record.topic
        outcome = self._outcome("done", self.sequencer.operation_ended(kmsg.result, itinerary, topic), outbox)
        outcome.refused = lambda error: self._refused(
            error,
            work.name,
            kmsg.uuid,
            topic,
            lambda failure: self.sequencer.operation_ended(failure, itinerary, topic),
        )
        return outcome

    def _run(self, work: Work, outbox: _Outbox, error: Exception | None, scope: context.Scope) -> Outcome:
        kmsg, topic = work.kmsg, work.record.topic
        task: Task | None = None
        try:
            scope.derive_from(kmsg.uuid, ":init")
            entrypoint = self._dispatch(kmsg)
        except BaseException as exc:  # noqa: BLE001 - not registered, or a constructor that raised
            result = results.from_exception(error or exc, kmsg.uuid)
        else:
            if isinstance(entrypoint, Operation):
                return self._launch(work.record, entrypoint, work.itinerary, outbox)
            task = entrypoint if isinstance(entrypoint, Task) else None
            scope.derive_from(entrypoint.uuid)
            if error is None:
                entrypoint._control = context.current_control()
                result = self._execute(entrypoint)
            else:
                result = self._finish(entrypoint, error)
        if task is None:  # nobody's class, or a bare Entrypoint: for the sequence it is a task all the same
            task = UnregisteredTask(uuid=kmsg.uuid, params=kmsg.params)
            task.entrypoint = kmsg.entrypoint
        scope.derive_from(kmsg.uuid, ":hooks")
        result = self.controller._onresult(kmsg, result)
        if not results.is_success(result):
            outbox.drop()  # nothing of a failed task leaves
            return self._ended(work, task, result, outbox)
        if work.plain is not None:
            consequences = self.sequencer.plain_step(
                task, result, work.plain, topic, events=self._events_topic is not None
            )
            if consequences is not None:
                outcome = self._outcome("done", consequences, outbox)
                outcome.refused = partial(self._task_refused, task, work)
                return outcome
        elif self._events_topic is None and not outbox.messages and work.itinerary is None:
            return Outcome("done")  # nothing follows from it
        return self._ended(work, task, result, outbox)

    def _ended(self, work: Work, task: Task, result: Result, outbox: _Outbox) -> Outcome:
        consequences = self.sequencer.task_ended(task, result, work.itinerary, work.record.topic)
        outcome = self._outcome("done" if results.is_success(result) else "failed", consequences, outbox)
        outcome.refused = partial(self._task_refused, task, work)
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
            return self._finish(task, exc)

    def _finish(self, task: Entrypoint, error: BaseException) -> Result:
        """The failed Result of a task, after its onerror()."""
        failure = results.from_exception(error, task.uuid)
        try:
            return task._finish(failure)
        except BaseException:
            logger.exception("%s.OnError: %s[%s] raised", type(task).__name__, task.path, task.uuid)
            return failure

    def _task_refused(self, task: Task, work: Work, error: Error) -> list[OutRecord]:
        itinerary, topic = work.itinerary, work.record.topic

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
        with context.within(context.Scope(outbox)):
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
        headers = self._headers
        records = [OutRecord(m.topic, key_bytes(m.key), m.value, headers) for m in messages] if messages else []
        if self._events_topic is not None:
            for event in events:
                value = event.to_bytes(self.worker)
                records.append(OutRecord(self._events_topic, key_bytes(event.key), value, self._headers))
        return records


def _attempt(header: bytes | None) -> int:
    try:
        return max(int(header or b"1"), 1)
    except ValueError:
        return 1
