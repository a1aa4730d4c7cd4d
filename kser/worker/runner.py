"""What one record becomes: decode, dispatch, execute, and what follows from it. No I/O of its own."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from kser import context, headers, results
from kser.controller import Controller, is_silent
from kser.entry import Entrypoint, EntrypointMeta
from kser.errors import AbortedError, EntrypointNotFoundError, Error, InternalError
from kser.events import Event, EventType, events_topic
from kser.results import ACCEPTED, Result
from kser.schemas import Message
from kser.sequencing.itinerary import METADATA_KEY, VERSION, Itinerary, key_bytes, message_key
from kser.sequencing.operation import Operation
from kser.sequencing.plain_step import is_plain
from kser.sequencing.sequencer import MAX_MESSAGE_BYTES, Consequences, Outgoing, Sequencer, step_event
from kser.sequencing.task import Task, UnregisteredTask, facts_of, made_plain
from kser.status import Status
from kser.tracebacks import TracebackInfo, log_raised
from kser.transport import OutRecord, Record
from kser.worker.dead_letters import MAX_BYTES, dead_letter
from kser.worker.tiers import dead_letter_topic

__all__ = ["Outcome", "Runner", "Work"]

logger = logging.getLogger(__name__)

_ON_CANCEL = Entrypoint.on_cancel
#: What a dead letter has beside its value: where messages may be larger, it may be, too.
_ROOM_BYTES = 12 * 1024
#: A message that nobody here can run comes back after so many seconds, to be looked at again.
_LOOK_AGAIN_S = 10.0


class Outcome:
    """What one record became. Its records are all there is to send before its offset may be committed.

    Args:
        kind: "done", "failed", "rejected" (no message), "foreign" (of another group), "retry" (another attempt
            follows), "delayed" (not yet due) or "waiting" (for somebody who can run it).
        records: what to send.
        ahead: how many of the records the task itself sent. They go first, the rest when all of them are confirmed: one
            that is refused fails the task, and then its operation must not have gone on.
        refused: gives the records to send instead, when the broker refuses a message for good.
        again_s: the record itself is run again after so many seconds; None: it is not.
        reason: why it waits, for people.
        since_ms: since when it waits, in milliseconds since the epoch.
    """

    #: The broker refused its dead letter, which is the least that it can be now.
    shortened = False
    again_s: float | None = None
    reason = ""
    since_ms = 0

    def __init__(
        self,
        kind: str,
        records: list[OutRecord] | None = None,
        ahead: int = 0,
        refused: Callable[[Error], list[OutRecord]] | None = None,
        *,
        again_s: float | None = None,
        reason: str = "",
        since_ms: int = 0,
    ) -> None:
        self.kind = kind
        self.records = records if records is not None else []
        self.ahead = ahead
        self.refused = refused
        if again_s is not None:
            self.again_s, self.reason, self.since_ms = again_s, reason, since_ms


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
    def runs(self) -> bool:
        """Whether somebody's code may be run for it here. Not for what nobody here registered: that waits, or fails."""
        return self.cls is not None or ((itinerary := self.itinerary) is not None and itinerary.end is not None)

    @property
    def tells_failure(self) -> bool:
        """Whether it is no task, but tells the end of an operation that has failed."""
        itinerary = self.itinerary
        return itinerary is not None and itinerary.end is not None and itinerary.end.status == Status.FAILED

    @property
    def subject(self) -> tuple[str, int]:
        """What an abort has to name to mean this: the uuid of the root operation, or of a lone task, and the run."""
        if self.plain is not None:
            return self.plain["ops"][0]["uuid"], self.plain["run"]
        itinerary = self._itinerary
        if itinerary is None:
            return self.kmsg.uuid, 1 + headers.number(self.record.headers, headers.REDRIVE)
        return (itinerary.root.uuid if itinerary.frames else self.kmsg.uuid), itinerary.run

    @property
    def name(self) -> str:
        """``entrypoint[uuid]``, for people."""
        return f"{self.kmsg.entrypoint}[{self.kmsg.uuid}]"


class _Outbox(context.Scope):
    """What the running task sends, and what its new ids are derived from. Implements context.Delivery.

    Args:
        sequencer: encodes messages.
        topic: where the running message came from.
        itinerary: of the running message, as it came.
        attempt: which attempt this execution is.
    """

    #: When the execution began, in milliseconds since the epoch; 0: it has not.
    began = 0
    #: Where the exception came from that it failed by.
    trace: TracebackInfo | None = None

    traced = True

    def __init__(self, sequencer: Sequencer, topic: str, itinerary: Any = None, *, attempt: int = 1) -> None:
        self._parent = None
        self._suffix = ""
        self.made = 0
        self.sequencer = sequencer
        self.topic = topic
        self.itinerary = itinerary
        self.messages: list[Outgoing] = []
        self.attempt = attempt

    @property
    def delivery(self) -> context.Delivery:
        """Itself."""
        return self

    def send(self, kmsg: Message, topic: str | None, key: str | None, headers: headers.Headers = ()) -> Result:
        target = topic or self.topic
        if self.itinerary is not None and kmsg.metadata.get(METADATA_KEY) == self.itinerary:
            # Metadata handed on by hand, in postinit() say: a second message with this itinerary forks the sequence.
            metadata = {k: v for k, v in kmsg.metadata.items() if k != METADATA_KEY}
            kmsg = type(kmsg)(kmsg.uuid, kmsg.entrypoint, kmsg.params, kmsg.result, metadata)
        try:
            message = self.sequencer.outgoing(kmsg, target, key or message_key(kmsg))
            self.messages.append(message._replace(headers=headers) if headers else message)
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
        dead_letters: whether the message of what failed is kept in ``{group}.dlq``.
        wait_s: how long a message that nobody here can run waits for a worker that can, before it fails.

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
        dead_letters: bool = False,
        wait_s: float = 0,
    ) -> None:
        self.controller = controller
        self.worker = worker
        self.wait_s = wait_s
        #: Says who could run what names this entrypoint, with an itinerary of this version; "": nobody knows.
        self.who_could_run: Callable[[str, int], str] = lambda _entrypoint, _itinerary: ""
        self.sequencer = Sequencer(controller, limit)
        #: Messages are read and routed as ever, and nothing is called or logged for those that go well.
        self._silent = False
        self.look()
        self._group = group.encode()
        self._headers = ((headers.GROUP, self._group),)
        self._events_topic = events_topic(group) if events else None
        self._dead_topic = dead_letter_topic(group) if dead_letters else None

    def look(self) -> None:
        """Look whether the controller is as it was; now and then, because it may be changed."""
        self._silent = is_silent(self.controller)

    def run(self, record: Record) -> Outcome:
        """Run one record to its end. Never raises an Exception."""
        work = self.open(record)
        return work if isinstance(work, Outcome) else self.execute(work)

    def subject_of(self, record: Record) -> tuple[str, int] | None:
        """What an abort has to name to mean this record (see Work.subject); None when it cannot be read."""
        try:
            kmsg = self.controller.decode(record.value if record.value is not None else b"")
            return Work(record, kmsg, None, Itinerary.of(kmsg), None, 1).subject
        except Exception:  # noqa: BLE001 - data that is no message; a user's TRANSPORT may raise anything
            return None

    def open(self, record: Record, *, early: bool = False) -> "Work | Outcome":
        """What a record asks for, or its Outcome when there is nothing to run. Runs hooks of the controller only.

        ``early``: whether it is due does not matter.
        """
        attempt = 1
        if record.headers:
            found = dict(record.headers)  # the last of a name, as record.header() gives it
            group = found.get(headers.GROUP)
            if group is not None and group != self._group:
                return Outcome("foreign")
            if headers.ATTEMPT in found:
                attempt = max(headers.number(record.headers, headers.ATTEMPT, 1), 1)
            if headers.NOT_BEFORE in found and not early:
                not_before = headers.number(record.headers, headers.NOT_BEFORE)
                if not_before and (left_ms := not_before - time.time() * 1000) > 0:
                    return Outcome("delayed", again_s=left_ms / 1000)
        try:
            if self._silent:
                kmsg = Message.loads(record.value if record.value is not None else b"")
            else:
                kmsg = self.controller.decode(record.value if record.value is not None else b"")
        except Exception as exc:  # noqa: BLE001 - data that is no message; a user's TRANSPORT may raise anything
            return self._reject(record, self.controller.reject(record.value, exc), None)
        data = kmsg.metadata.get(METADATA_KEY)
        if data is None or is_plain(data):
            return Work(record, kmsg, data, None, self.controller.find(kmsg.entrypoint), attempt)
        try:
            itinerary = Itinerary.of(kmsg)
        except Error as exc:
            version = exc.extra.get("version")
            if isinstance(version, int) and version > VERSION and (wait := self._wait(record, kmsg, exc)) is not None:
                return wait
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

    def fail_unseen(self, work: "Work", error: Exception) -> Outcome:
        """As fail(), without any code of the user's: making its objects, or a hook, is what ends the process."""
        kmsg, topic = work.kmsg, work.record.topic
        task, result = _stand_in(kmsg), results.from_exception(error, kmsg.uuid)
        outbox = _Outbox(self.sequencer, topic, attempt=work.attempt)
        retry = work.cls.retry if work.cls is not None else None
        if retry is not None and (delay_s := retry.delay_s(work.attempt, error, kmsg.uuid)) is not None:
            return self._again(work, task, result, delay_s, outbox)
        nobody: Any = SimpleNamespace(TRANSPORT=self.controller.TRANSPORT, find=lambda _name: None)
        sequencer = Sequencer(nobody, self.sequencer.limit)
        itinerary = work.itinerary
        if itinerary is not None and itinerary.end is not None:
            consequences = sequencer.operation_ended(result, itinerary, topic)
        else:
            consequences = sequencer.task_ended(task, result, itinerary, topic)
        if itinerary is None:
            _number_run(consequences, work)
        outcome = self._outcome("failed", consequences, outbox)
        outcome.refused = partial(self._task_refused, task, work)
        self._keep_failed(outcome.records, work, result)
        return outcome

    def abort(self, work: "Work", why: str) -> Outcome:
        """What follows for a message whose operation was aborted: it is not run, and neither is what comes after it.

        It is kept in the dead letters, because somebody may want to resume the operation.
        """
        task = _stand_in(work.kmsg)
        result = results.from_exception(AbortedError(f"{work.name} {why}"), work.kmsg.uuid)
        outbox = _Outbox(self.sequencer, work.record.topic, attempt=work.attempt)
        with context.within(outbox):
            consequences = self.sequencer.aborted(task, result, work.itinerary)
            if work.itinerary is None:
                _number_run(consequences, work)
            outcome = self._outcome("abort", consequences, outbox)
        self._keep_failed(outcome.records, work, result, Status.ABORTED)
        outcome.refused = lambda _error: []
        return outcome

    def refused_for(self, work: "Work", outcome: Outcome) -> None:
        """Give an Outcome that was made in another process what it needs when the broker refuses its records."""
        task = _stand_in(work.kmsg)
        outcome.refused = partial(self._task_refused, task, work)

    def instead_of_waiting(self, record: Record, error: Error) -> list[OutRecord]:
        """What is sent instead of a record that was not run, and that the broker refuses, for good, to let wait."""
        try:
            kmsg = self.controller.decode(record.value if record.value is not None else b"")
            itinerary = Itinerary.of(kmsg)
        except Exception:  # noqa: BLE001 - data that is no message, or a newer itinerary
            return self._reject(record, self.controller.reject(record.value, error), None).records
        attempt = max(headers.number(record.headers, headers.ATTEMPT, 1), 1)
        task = _stand_in(kmsg)
        return self._task_refused(task, Work(record, kmsg, None, itinerary, None, attempt), error)

    def _guarded(self, work: "Work", error: Exception | None) -> Outcome:
        kmsg = work.kmsg
        outbox = _Outbox(self.sequencer, work.record.topic, kmsg.metadata.get(METADATA_KEY), attempt=work.attempt)
        if self._events_topic is None:
            outbox.traced = False
        control = context.current_control()
        outbox.began = control.began if control is not None else int(time.time() * 1000)
        token = context._scope.set(outbox)
        try:
            if work.cls is None and (itinerary := work.itinerary) is not None and itinerary.end is not None:
                return self._end(work, itinerary, outbox)
            return self._run(work, outbox, error, control)
        except Exception:
            raise
        except BaseException as exc:  # sys.exit() in a hook of the controller: it must not end the thread unseen
            raise InternalError(f"{work.name} raised {type(exc).__name__} outside of its task: {exc}") from exc
        finally:
            context._scope.reset(token)

    def _end(self, work: Work, itinerary: Itinerary, outbox: _Outbox) -> Outcome:
        kmsg, topic = work.kmsg, work.record.topic
        try:
            self.controller.lookup(kmsg)
        except EntrypointNotFoundError as exc:
            wait = self._wait(work.record, kmsg, exc)
            if wait is not None:
                return wait
        consequences = self.sequencer.operation_ended(kmsg.result, itinerary, topic)
        outcome = self._outcome("done", consequences, outbox)
        self._keep_failed_end(outcome, consequences, work)
        outcome.refused = lambda error: self._refused(
            error, work, lambda failure: self.sequencer.operation_ended(failure, itinerary, topic)
        )
        return outcome

    def _run(self, work: Work, outbox: _Outbox, error: Exception | None, control: context.Control | None) -> Outcome:
        kmsg, topic, cls = work.kmsg, work.record.topic, work.cls
        task: Task | None = None
        if error is None and self._silent and cls is not None and (made := _made(cls, kmsg, control)) is not None:
            outbox.derive_from(made.uuid)
            task = made
            try:
                result = made._execute_plain()
            except BaseException as exc:  # noqa: BLE001 - as in _execute()
                result = self._finish(made, exc)
            outbox.trace = made._trace
        else:
            try:
                outbox.derive_from(kmsg.uuid, ":init")
                entrypoint = self._dispatch(kmsg)
            except BaseException as exc:  # noqa: BLE001 - not registered, or a constructor that raised
                if error is None and isinstance(exc, EntrypointNotFoundError):
                    wait = self._wait(work.record, kmsg, exc)
                    if wait is not None:
                        return wait
                result = results.from_exception(error or exc, kmsg.uuid)
                trace = TracebackInfo.from_exception(error or exc)
                outbox.trace = trace if trace.tells else None
            else:
                if isinstance(entrypoint, Operation):
                    return self._launch(work, entrypoint, outbox, control)
                task = entrypoint if isinstance(entrypoint, Task) else None
                outbox.derive_from(entrypoint.uuid)
                entrypoint._control = control
                result = self._execute(entrypoint) if error is None else self._finish(entrypoint, error)
                outbox.trace = entrypoint._trace
        if task is None:  # nobody's class, or a bare Entrypoint: for the sequence it is a task all the same
            task = _stand_in(kmsg)
        if control is not None and control.again_s is not None and not results.is_success(result):
            outbox.drop()
            return self._again(work, task, result, control.again_s, outbox)
        if not self._silent or not results.is_success(result):
            outbox.derive_from(kmsg.uuid, ":hooks")
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
        elif work.itinerary is None:
            if self._events_topic is None and not outbox.messages:
                return Outcome("done")  # nothing follows from it
            if self._silent:  # as _ended() has it
                event = Event(
                    EventType.STEP_DONE,
                    task.uuid,
                    task.path,
                    None,
                    None,
                    work.subject[1],
                    0,
                    Status.SUCCESS,
                    result,
                    task.params,
                )
                outcome = self._outcome("done", Consequences(events=[event]), outbox)
                outcome.refused = partial(self._task_refused, task, work)
                return outcome
        if self._silent:
            outbox.derive_from(kmsg.uuid, ":hooks")
        return self._ended(work, task, result, outbox)

    def _again(self, work: Work, task: Task, result: Result, delay_s: float, outbox: _Outbox) -> Outcome:
        """Another attempt follows: nothing but an event says that this one failed."""
        note = f"attempt {work.attempt} failed, the next one in {delay_s:.3g} s"
        event = step_event(task, result, work.itinerary)
        event = event._replace(type=EventType.STEP_RETRYING, status=Status.PENDING, run=work.subject[1], note=note)
        if isinstance(task, Operation) and event.operation is None:
            event = event._replace(operation=task.uuid)
        refused = partial(self._task_refused, task, work)
        return Outcome("retry", self._records([], [event], outbox), refused=refused, again_s=delay_s)

    def _wait(self, record: Record, kmsg: Message, error: Error) -> Outcome | None:
        """Nobody here can run it; None once it has waited for a worker that can for as long as it may.

        While a new release is rolled out its messages may come to workers of the old one: that is no failure.
        """
        now_ms = int(time.time() * 1000)
        waited_since = headers.number(record.headers, headers.WAITING)
        left_s = self.wait_s - (now_ms - (waited_since or now_ms)) / 1000
        if left_s <= 0:
            return None
        reason = f"{error.message}, on worker {self.worker} of group {self._group.decode()}"
        version = error.extra.get("version")
        if who := self.who_could_run(kmsg.entrypoint, version if isinstance(version, int) else VERSION):
            reason += f"; {who}"
        events = []
        if not waited_since:
            logger.warning(
                "%s[%s] waits up to %.3g s for a worker that can run it: %s", kmsg.entrypoint, kmsg.uuid, left_s, reason
            )
            task = _stand_in(kmsg)
            try:
                itinerary = Itinerary.of(kmsg)
            except Error:
                itinerary = None  # of a newer release: whoever can read it tells the rest
            event = step_event(task, results.from_exception(error, kmsg.uuid), itinerary)
            if event.parent == event.uuid and itinerary is not None:  # what waits is the operation's own end
                around = itinerary.leave()
                event = event._replace(parent=around.innermost.uuid if around.frames else None)
            events = [event._replace(type=EventType.MESSAGE_WAITING, status=Status.PENDING, note=reason)]
        return Outcome(
            "waiting",
            self._records([], events),
            again_s=min(left_s, _LOOK_AGAIN_S),
            reason=reason,
            since_ms=waited_since or now_ms,
        )

    def _ended(self, work: Work, task: Task, result: Result, outbox: _Outbox) -> Outcome:
        consequences = self.sequencer.task_ended(task, result, work.itinerary, work.record.topic)
        if work.itinerary is None:
            _number_run(consequences, work)
        outcome = self._outcome("done" if results.is_success(result) else "failed", consequences, outbox)
        outcome.refused = partial(self._task_refused, task, work)
        if outcome.kind == "failed":
            self._keep_failed(outcome.records, work, result)
        else:
            self._keep_failed_end(outcome, consequences, work)
        return outcome

    def _keep_failed(self, records: list[OutRecord], work: Work, result: Result, status: str = Status.FAILED) -> None:
        """Add the dead letter of a message that failed for good or was aborted, and the event that tells of it.

        Not of one that tells the end of an operation that had failed: what failed it was kept where it did, and is what
        a new run begins with.
        """
        if work.tells_failure:
            return
        itinerary, kmsg = work.itinerary, work.kmsg
        inside = itinerary is not None and bool(itinerary.frames)
        launches = work.cls is not None and issubclass(work.cls, Operation)
        event = Event(
            type=EventType.MESSAGE_DEAD_LETTERED,
            uuid=kmsg.uuid,
            entrypoint=kmsg.entrypoint,
            operation=itinerary.root.uuid if inside and itinerary else kmsg.uuid if launches else None,
            parent=itinerary.innermost.uuid if inside and itinerary else None,
            run=work.subject[1],
            position=itinerary.position if itinerary is not None else 0,
            status=status,
            attempt=work.attempt,
        )
        self._keep(records, work.record, kmsg, result, event)

    def _keep_failed_end(self, outcome: Outcome, consequences: Consequences, work: Work) -> None:
        """Add the dead letter of a message whose task went well, when the operation around it failed all the same.

        Its next message could not be sent, or a hook of its end raised.
        """
        if work.tells_failure:
            return
        for event in consequences.events:
            if event.type == EventType.OPERATION_ENDED and event.status == Status.FAILED:
                kept = event._replace(type=EventType.MESSAGE_DEAD_LETTERED, result=None, attempt=work.attempt)
                self._keep(outcome.records, work.record, work.kmsg, event.result or work.kmsg.result, kept)
                return
        if consequences.failure is not None:
            self._keep_failed(outcome.records, work, consequences.failure)

    def _keep(
        self, records: list[OutRecord], record: Record, kmsg: Message | None, result: Result, event: Event
    ) -> None:
        """Add the dead letter of a record, and the event that tells of it."""
        if self._dead_topic is None:
            return
        records.append(
            dead_letter(
                record,
                self._dead_topic,
                error=result,
                kmsg=kmsg,
                attempt=event.attempt,
                group=self._group.decode(),
                worker=self.worker,
                now_ms=int(time.time() * 1000),
                max_bytes=max(MAX_BYTES, self.sequencer.limit + _ROOM_BYTES),
            )
        )
        records += self._records([], [event._replace(note=f"kept in {self._dead_topic}")])

    def _launch(self, work: Work, operation: Operation, outbox: _Outbox, control: context.Control | None) -> Outcome:
        itinerary, topic = work.itinerary, work.record.topic
        if itinerary is None and (run := work.subject[1]) > 1:
            itinerary = Itinerary(run=run)  # it came back from the dead letters
        operation._control = control
        consequences = self.sequencer.operation_reached(operation, itinerary, topic)
        if control is not None and control.again_s is not None and consequences.failure is not None:
            outbox.drop()
            return self._again(work, operation, consequences.failure, control.again_s, outbox)
        outcome = self._outcome("failed" if operation.status == Status.FAILED else "done", consequences, outbox)
        outcome.refused = lambda error: self._refused(
            error,
            work,
            lambda failure: self.sequencer.operation_refused(operation, failure, itinerary, topic),
        )
        if outcome.kind == "failed":
            self._keep_failed(outcome.records, work, operation.result)
        else:
            self._keep_failed_end(outcome, consequences, work)
        return outcome

    def _dispatch(self, kmsg: Message) -> Entrypoint:
        """The task, without the itinerary in its metadata: what a task hands on by hand must not fork the sequence."""
        entrypoint = self.controller.dispatch(kmsg)
        if METADATA_KEY in entrypoint.metadata:
            entrypoint.metadata = {k: v for k, v in entrypoint.metadata.items() if k != METADATA_KEY}
        return entrypoint

    def _execute(self, task: Entrypoint) -> Result:
        if type(task).on_cancel is not _ON_CANCEL and (control := task._control) is not None:
            control.cancel = partial(_tell, task)
        try:
            return task.execute()
        except BaseException as exc:  # noqa: BLE001 - sys.exit() in a task ends the task, not the worker
            return self._finish(task, exc)

    def _finish(self, task: Entrypoint, error: BaseException) -> Result:
        """The failed Result of a task, after its onerror()."""
        failure = results.from_exception(error, task.uuid)
        task._trace_back(error)
        try:
            return task._finish(failure)
        except BaseException:  # noqa: BLE001 - user code; it is logged
            log_raised(logger, "%s.OnError: %s[%s] raised", type(task).__name__, task.path, task.uuid)
            return failure

    def _task_refused(self, task: Task, work: Work, error: Error) -> list[OutRecord]:
        itinerary, topic = work.itinerary, work.record.topic

        def consequences(failure: Result) -> Consequences:
            if itinerary is not None and itinerary.frames:
                return self.sequencer.failed(task, failure, itinerary, topic)
            event = Event(
                type=EventType.STEP_FAILED,
                uuid=task.uuid,
                entrypoint=task.path,
                status="FAILED",
                result=failure,
                params=task.params,
            )
            return Consequences(events=[event])

        return self._refused(error, work, consequences)

    def _refused(self, error: Error, work: Work, consequences: Callable[[Result], Consequences]) -> list[OutRecord]:
        """What is sent instead of records that the broker refused for good: what follows from a failure."""
        logger.error("What follows from %s was refused by the broker: %s", work.name, error.message)
        outbox = _Outbox(self.sequencer, work.record.topic, attempt=work.attempt)
        failure = results.from_exception(error, work.kmsg.uuid)
        with context.within(outbox):
            records = self._outcome("failed", consequences(failure), outbox).records
        self._keep_failed(records, work, failure)
        return records

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
        outcome = Outcome("rejected", self._records([], [event]))
        kept = event._replace(type=EventType.MESSAGE_DEAD_LETTERED, result=None)
        self._keep(outcome.records, record, kmsg, result, kept)
        return outcome

    def _outcome(self, kind: str, consequences: Consequences, outbox: _Outbox) -> Outcome:
        sent = outbox.messages
        messages = [*sent, *consequences.messages] if sent else consequences.messages
        return Outcome(kind, self._records(messages, consequences.events, outbox), len(sent))

    def _records(self, messages: list[Outgoing], events: list[Event], of: _Outbox | None = None) -> list[OutRecord]:
        """These as records to send; ``of``: the execution that the events tell of."""
        own, topic = self._headers, self._events_topic
        records = [
            _out(OutRecord, (m.topic, key_bytes(m.key), m.value, (*own, *m.headers) if m.headers else own, None))
            for m in messages
        ]
        if topic is not None:
            for event in events:
                if of is None:
                    value = event.to_bytes(self.worker)
                else:
                    value = event.to_bytes(self.worker, attempt=of.attempt, began=of.began, trace=of.trace)
                records.append(_out(OutRecord, (topic, key_bytes(event.key), value, own, None)))
        return records


#: OutRecord(...), at half the cost: there is one for each task.
_out: Any = tuple.__new__


def _made(cls: type[Entrypoint], kmsg: Message, control: context.Control | None) -> Task | None:
    """What Runner._dispatch() makes where only run() is the user's, with nothing to log; else None."""
    facts = EntrypointMeta.facts.get(cls) or facts_of(cls)
    if not facts.makes or not facts.runs or cls._logger.isEnabledFor(logging.DEBUG):
        return None
    metadata = kmsg.metadata
    if METADATA_KEY in metadata:
        metadata = {k: v for k, v in metadata.items() if k != METADATA_KEY} if len(metadata) > 1 else {}
    return made_plain(cls, kmsg, metadata, control)  # type: ignore[arg-type]  # only a Task has such facts


def _stand_in(kmsg: Message) -> UnregisteredTask:
    task = UnregisteredTask(uuid=kmsg.uuid, params=kmsg.params)
    task.entrypoint = kmsg.entrypoint
    return task


def _tell(task: Entrypoint) -> None:
    """Call on_cancel(), in a thread of its own: it is the user's, and who tells has no time."""
    threading.Thread(target=task.on_cancel, name="kser-cancel", daemon=True).start()


def _number_run(consequences: Consequences, work: Work) -> None:
    """A lone task that came back from the dead letters is in a run of its own, like an operation that was resumed."""
    run = work.subject[1]
    if run > 1:
        consequences.events[:] = [event._replace(run=run) for event in consequences.events]
