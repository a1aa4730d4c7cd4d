"""What follows from the end of a task: the next message, or the end of its operations. No I/O.

This is the sequence itself. It is the same for every delivery guarantee: whoever settles sends what it gives.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kser import context, results
from kser.controller import Controller
from kser.entry import EntrypointMeta
from kser.errors import MessageTooLargeError, ValidationError
from kser.events import Event, EventType
from kser.headers import Headers
from kser.results import Result
from kser.schemas import Message, plain_bytes
from kser.sequencing.itinerary import METADATA_KEY, End, Entry, Frame, Itinerary
from kser.sequencing.operation import Operation, name_failed_task
from kser.sequencing.plain_step import next_step
from kser.sequencing.task import Task, UnregisteredTask, facts_of
from kser.status import Status
from kser.tracebacks import log_raised

__all__ = ["MAX_MESSAGE_BYTES", "Consequences", "Outgoing", "Sequencer", "encode", "step_event"]

logger = logging.getLogger(__name__)

#: Largest message kser sends: below Kafka's own limit of 1 MiB, with room for headers and the record's frame.
MAX_MESSAGE_BYTES = 900 * 1024


class Outgoing(NamedTuple):
    """A message to send, encoded already: what cannot be sent is found out while its task can still be failed."""

    topic: str
    key: str
    value: bytes
    #: For the log.
    entrypoint: str
    uuid: str
    #: Beside those that the worker gives to all it sends.
    headers: Headers = ()


@dataclass(slots=True)
class Consequences:
    """What follows from one message."""

    messages: list[Outgoing] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    #: Why an operation failed whose end one of the messages tells to others, who say so in an event, or which is
    #: tried again; else None.
    failure: Result | None = None


def encode(kmsg: Message, limit: int = MAX_MESSAGE_BYTES) -> bytes:
    """The bytes of a message.

    Raises ValidationError when no reader would take it, JSON has no form for it or a dumps() of user code raises, and
    MessageTooLargeError when there are more than ``limit``.
    """
    if (
        type(kmsg.uuid) is not str
        or type(kmsg.entrypoint) is not str
        or not kmsg.uuid
        or not kmsg.entrypoint
        or not isinstance(kmsg.params, dict)
        or not isinstance(kmsg.metadata, dict)
    ):
        _check_fields(kmsg)
    try:
        raw = kmsg.to_bytes()
    except ValidationError:
        raise
    except Exception as exc:
        raise ValidationError(
            f"Message {kmsg.entrypoint}[{kmsg.uuid}] cannot be written: {type(kmsg).__name__}.dumps() raised {exc!r}",
            extra={"uuid": kmsg.uuid, "entrypoint": kmsg.entrypoint},
        ) from exc
    if len(raw) > limit:
        raise MessageTooLargeError(
            f"Message {kmsg.entrypoint}[{kmsg.uuid}]", len(raw), limit, uuid=kmsg.uuid, entrypoint=kmsg.entrypoint
        )
    return raw


def _check_fields(kmsg: Message) -> None:
    """Raise ValidationError for a field that readers refuse."""
    for name, value, kind in (
        ("uuid", kmsg.uuid, str),
        ("entrypoint", kmsg.entrypoint, str),
        ("params", kmsg.params, dict),
        ("metadata", kmsg.metadata, dict),
    ):
        if not isinstance(value, kind) or (kind is str and not value):
            wanted = "a text that is not empty" if kind is str else "a dict"
            raise ValidationError(
                f"Message {kmsg.entrypoint}[{kmsg.uuid}] cannot be sent: {name}={results.shown(value)}, give {wanted}",
                extra={"uuid": str(kmsg.uuid), "entrypoint": str(kmsg.entrypoint), "field": name},
            )


class Sequencer:
    """Advances operations.

    Args:
        controller: knows the classes, and how messages are written (TRANSPORT).
        limit: largest message, in bytes.

    Thread rule: has no state; may be shared.
    """

    def __init__(self, controller: Controller | type[Controller], limit: int = MAX_MESSAGE_BYTES) -> None:
        self.controller = controller
        self.limit = limit

    def plain_step(
        self, task: Task, result: Result, data: dict[str, Any], topic: str, *, events: bool
    ) -> Consequences | None:
        """task_ended() for a success with a plain itinerary, or None where it is not one of two things.

        A plain next task follows; or it was the last one of an operation that is in no other, whose class has no say in
        its end and logs nothing of it.
        """
        messages: list[Outgoing] = []
        over: str | None = None
        ops = data["ops"]
        following = next_step(data, topic)
        if following is None:
            over = self._plain_end(ops)
            if over is None:
                return None
        else:
            target, key, uuid, entrypoint, params, metadata = following
            raw = None
            if self.controller.TRANSPORT is Message and uuid and entrypoint:
                raw = plain_bytes(uuid, entrypoint, params, result, metadata)
            if raw is not None and len(raw) <= self.limit:
                messages.append(Outgoing(target, key, raw, entrypoint, uuid))
            else:
                try:
                    messages.append(self._outgoing(Message(uuid, entrypoint, params, result, metadata), target, key))
                except ValidationError:
                    return None
        out = Consequences(messages)
        if events:
            root, run, position = ops[0]["uuid"], data["run"], data["position"]
            if data.get("new"):
                first = ops[0]
                out.events.append(
                    Event(
                        EventType.OPERATION_STARTED,
                        root,
                        first["entrypoint"],
                        root,
                        None,
                        run,
                        position,
                        Status.RUNNING,
                        None,
                        first["params"],
                    )
                )
            out.events.append(
                Event(
                    EventType.STEP_DONE,
                    task.uuid,
                    task.path,
                    root,
                    ops[-1]["uuid"],
                    run,
                    position,
                    Status.SUCCESS,
                    result,
                    task.params,
                )
            )
            if over is not None:
                out.events.append(
                    Event(EventType.OPERATION_ENDED, root, over, root, None, run, position + 1, Status.SUCCESS, result)
                )
        return out

    def _plain_end(self, ops: list[dict[str, Any]]) -> str | None:
        """The entrypoint of the one operation in ``ops`` when nothing but that is needed to end it; else None."""
        frame = ops[0]
        if len(ops) != 1 or frame["tasks"] or frame.get("hooks"):
            return None
        entrypoint: str = frame["entrypoint"]
        cls = self.controller.find(entrypoint)
        if cls is None:
            return entrypoint  # nobody here knows it, and it has no say
        facts = EntrypointMeta.facts.get(cls) or facts_of(cls)
        plain = facts.ends and not cls._logger.isEnabledFor(logging.INFO)
        return facts.path if plain and issubclass(cls, Operation) else None

    # -- the three things a worker meets -----------------------------------------------------------------------------

    def task_ended(self, task: Task, result: Result, itinerary: Itinerary | None, topic: str) -> Consequences:
        """A task was executed. ``topic``: where its message came from."""
        out = Consequences()
        if itinerary is None or not itinerary.frames:
            out.events.append(step_event(task, result, None))
            return out
        self._started(itinerary, out)
        out.events.append(step_event(task, result, itinerary))
        self._go_on(itinerary.passed(), task, result, topic, out)
        return out

    def operation_reached(self, operation: Operation, itinerary: Itinerary | None, topic: str) -> Consequences:
        """The message of an Operation arrived: build it unless it came with its tasks, and send its first one.

        Where what comes before the first raises, and its Retry has another attempt, nothing follows but ``failure``.
        """
        out = Consequences()
        around = itinerary if itinerary is not None else Itinerary()
        if around.frames:
            self._started(around, out)
        if around.key:
            operation.key = around.key
        operation_topic = operation.own_topic() or topic
        inner, final = None, None
        with context.id_scope(operation.uuid):
            try:
                failure = operation.begin()
                frame = operation.frame(operation_topic, operation.tasks)
                inner = around.enter(frame)._replace(new=False)
            except BaseException as exc:  # noqa: BLE001 - user code built it; sys.exit() in there ends the operation only
                failure = results.from_exception(exc, operation.uuid)
                operation._trace_back(exc)
                if operation.retry is not None and operation._tried_again(operation.retry, failure, exc):
                    return Consequences(failure=failure)
            operation._control = None  # whatever comes from here on is final
            if failure is None and not operation_todo(operation):
                final = self._end(operation, operation.tasks[-1], operation.tasks[-1].result)
        root = around.root.uuid if around.frames else operation.uuid
        out.events.append(
            Event(
                type=EventType.OPERATION_STARTED,
                uuid=operation.uuid,
                entrypoint=operation.path,
                operation=root,
                parent=around.innermost.uuid if around.frames else None,
                run=around.run,
                position=around.position,
                status=Status.RUNNING,
                params=operation.params,
            )
        )
        if failure is None and inner is not None and final is None:
            failure = self._send_next(inner, _forwarded(operation), topic, out)
            if failure is None:
                return out
        if final is None:
            assert failure is not None
            delivery = context.current_delivery()
            if delivery is not None:
                delivery.drop()  # as for a task: nothing leaves of one that failed; what hooks send from now on does
            final = self._fail(operation, failure)
        self._operation_over(around._replace(new=False), operation, final, topic, out)
        return out

    def operation_refused(
        self, operation: Operation, failure: Result, itinerary: Itinerary | None, topic: str
    ) -> Consequences:
        """The first message of an operation that was reached was refused by the broker: it ends FAILED."""
        out = Consequences()
        around = itinerary._replace(new=False) if itinerary is not None else Itinerary()
        self._operation_over(around, operation, self._fail(operation, failure), topic, out)
        return out

    def operation_ended(self, result: Result, itinerary: Itinerary, topic: str) -> Consequences:
        """An end message arrived: another worker saw the end of an operation whose class it does not know.

        Is it not known here either, the operation ends without its hooks.
        """
        out = Consequences()
        end = itinerary.end
        assert end is not None
        task = self._revive(end.task)
        task.status, task.result = end.status, result
        self._go_on(itinerary._replace(end=None), task, result, topic, out, handed_over=True)
        return out

    def aborted(self, task: Task, result: Result, itinerary: Itinerary | None) -> Consequences:
        """The operations around a task were aborted: they end ABORTED, the innermost first. Their hooks are not called.

        set_status() is, where the class is known here.
        """
        out = Consequences()
        if itinerary is None or not itinerary.frames:
            out.events.append(
                step_event(task, result, None)._replace(type=EventType.STEP_ABORTED, status=Status.ABORTED)
            )
            if itinerary is None:
                return out
        around = itinerary
        if around.frames:
            self._started(around, out)
            event = step_event(task, result, around)
            out.events.append(event._replace(type=EventType.STEP_ABORTED, status=Status.ABORTED))
        while around.frames:
            frame = around.innermost
            with context.id_scope(f"{frame.uuid}:{around.position}"):
                operation = self._rebuild(frame, task, result)
                if isinstance(operation, Operation):
                    try:
                        operation._set_status(Status.ABORTED, result)
                    except BaseException:  # noqa: BLE001 - user code; it is logged
                        log_raised(logger, "set_status() of %r raised", operation)
            around = around.leave()
            out.events.append(
                Event(
                    type=EventType.OPERATION_ENDED,
                    uuid=frame.uuid,
                    entrypoint=frame.entrypoint,
                    operation=itinerary.root.uuid,
                    parent=around.innermost.uuid if around.frames else None,
                    run=itinerary.run,
                    position=itinerary.position,
                    status=Status.ABORTED,
                    result=result,
                )
            )
            task = operation
        return out

    def failed(self, task: Task | None, failure: Result, itinerary: Itinerary, topic: str) -> Consequences:
        """What a task sent, or its next message, was refused by the broker: its operation ends FAILED."""
        out = Consequences()
        if itinerary.frames and task is not None:
            self._go_on(itinerary.passed(), task, failure, topic, out)
        return out

    # -- going on ----------------------------------------------------------------------------------------------------

    def _go_on(
        self,
        itinerary: Itinerary,
        task: Task,
        result: Result,
        topic: str,
        out: Consequences,
        *,
        handed_over: bool = False,
    ) -> None:
        """``task`` of the innermost operation ended with ``result``: its next task, else its end, and so on outward."""
        if results.is_success(result):
            failure = self._send_next(itinerary, result, topic, out) if itinerary.innermost.tasks else None
            if failure is None and itinerary.innermost.tasks:
                return
            result = failure or result
        frame = itinerary.innermost
        with context.id_scope(f"{frame.uuid}:{itinerary.position}"):
            operation = self._rebuild(frame, task, result)
            if isinstance(operation, Operation):
                if results.is_success(result) and operation._broken is None:
                    result, more = self._ask_next(itinerary, operation, task, result, topic, out)
                    if more:
                        return
                final = self._end(operation, task, result)
                self._operation_over(itinerary.leave(), operation, final, topic, out)
                return
        assert isinstance(operation, UnregisteredTask)
        note = ""
        if frame.hooks or operation.why != UnregisteredTask.why:
            # Where it cannot be made only another topic has workers that may know better.
            elsewhere = not handed_over and (operation.why == UnregisteredTask.why or frame.topic not in (None, topic))
            if elsewhere and self._hand_over_end(itinerary, task, result, frame.topic or topic, out):
                return
            why = "its end message cannot be sent" if elsewhere else operation.why
            logger.error(
                "Operation %s[%s] ended %s without its hooks: %s on this worker of topic %s",
                frame.entrypoint,
                frame.uuid,
                _status(result),
                why,
                topic,
            )
            note = f"hooks not run: {frame.entrypoint} {why} on the worker that saw the end"
        if not results.is_success(result):
            result = name_failed_task(result, task, frame.uuid)
        elif operation.broken is not None:
            result = operation.broken  # as for a hook that raises: what could not be ended is no success
        self._operation_over(itinerary.leave(), operation, result, topic, out, note)

    def _ask_next(
        self, itinerary: Itinerary, operation: Operation, task: Task, result: Result, topic: str, out: Consequences
    ) -> tuple[Result, bool]:
        """Ask next(task) of an operation that has no tasks left: a class may add some as it goes."""
        try:
            following = operation.next(task)
            if following is None:
                return result, False
            at = operation.tasks.index(following) if following in operation.tasks else len(operation.tasks)
            frame = operation.frame(itinerary.innermost.topic, [following, *operation.tasks[at + 1 :]])
        except BaseException as exc:  # noqa: BLE001 - user code
            return results.from_exception(exc, operation.uuid), False
        if not frame.tasks:
            return result, False  # all it named are SUCCESS already
        extended = itinerary._replace(frames=(*itinerary.frames[:-1], frame))
        failure = self._send_next(extended, result, topic, out)
        return (result, True) if failure is None else (failure, False)

    def _operation_over(
        self, around: Itinerary, operation: Task, final: Result, topic: str, out: Consequences, note: str = ""
    ) -> None:
        """``operation`` ended with ``final``; for the operations ``around`` it, it is a task that ended."""
        operation.status = _status(final)
        operation.result = final
        out.events.append(
            Event(
                type=EventType.OPERATION_ENDED,
                uuid=operation.uuid,
                entrypoint=operation.path,
                operation=around.root.uuid if around.frames else operation.uuid,
                parent=around.innermost.uuid if around.frames else None,
                run=around.run,
                position=around.position,
                status=_status(final),
                result=final,
                note=note,
                trace=None if results.is_success(final) else operation._trace,
            )
        )
        if around.frames:
            self._go_on(around, operation, final, topic, out)

    def _rebuild(self, frame: Frame, task: Task, result: Result) -> Task:
        """The operation of ``frame``, RUNNING, with the task that ended and what remained."""
        operation = self._revive(frame.dump() | {"tasks": None})
        if not isinstance(operation, Operation):
            if not isinstance(operation, UnregisteredTask):
                operation = _stand_in(frame.uuid, frame.entrypoint, "is registered as something else than an Operation")
            return operation
        operation.status = Status.RUNNING
        operation.result = result
        operation.key, operation.topic = frame.key, frame.topic
        if task.status not in (Status.SUCCESS, Status.FAILED, Status.ABORTED):
            task.status = _status(result)
        operation.tasks = [task, *(self._revive(entry) for entry in frame.tasks)]
        return operation

    def _revive(self, data: Mapping[str, Any]) -> Task:
        """The task an entry names, to be looked at; a stand-in when it cannot be made. Raises nothing."""
        try:
            return Task.from_entry(Entry.load(data), self.controller.find)
        except BaseException as exc:  # noqa: BLE001 - constructors are user code, and in a message may be anything
            uuid, name = (str(data.get(key, "")) if isinstance(data, Mapping) else "" for key in ("uuid", "entrypoint"))
            log_raised(logger, "Task %s[%s] cannot be made from its entry", name, uuid)
            task = _stand_in(uuid, name, "cannot be made")
            task.broken = results.from_exception(exc, uuid)
            return task

    def _end(self, operation: Operation, task: Task, result: Result) -> Result:
        """End ``operation`` with what its last ``task`` gave; the Result to carry on. Raises nothing."""
        broken = operation._broken
        if broken is not None:  # told already, when it was made again to be ended
            return name_failed_task(result, task, operation.uuid) if not results.is_success(result) else broken
        try:
            return operation.finish(task, result)
        except BaseException as exc:  # noqa: BLE001 - sys.exit() in a hook ends the operation, not the worker
            log_raised(logger, "A hook of %r raised", operation)
            return results.from_exception(exc, operation.uuid)

    def _fail(self, operation: Operation, failure: Result) -> Result:
        """End ``operation``, none of whose tasks has run, with ``failure``. Raises nothing."""
        if operation._broken is not None:
            return operation._broken  # told already, when it was made
        try:
            return operation._finish(failure)
        except BaseException:  # noqa: BLE001 - user code; it is logged
            log_raised(logger, "A hook of %r raised", operation)
            return failure

    # -- messages ----------------------------------------------------------------------------------------------------

    def _send_next(self, itinerary: Itinerary, result: Result, topic: str, out: Consequences) -> Result | None:
        """Add the message of the next task of the innermost operation; a failed Result when it cannot be sent."""
        try:
            step = itinerary.step()
            assert step is not None
            entry, itinerary = step
            out.messages.append(
                self._outgoing(
                    itinerary.message(entry, result),
                    itinerary.topic_of(entry) or topic,
                    itinerary.key_of(entry) or entry.uuid,
                )
            )
        except ValidationError as exc:
            return results.from_exception(exc, itinerary.innermost.uuid)
        return None

    def _hand_over_end(self, itinerary: Itinerary, task: Task, result: Result, topic: str, out: Consequences) -> bool:
        """Send the end of the innermost operation to its own ``topic``, where a worker knows its class, or will.

        False when no message can tell it, however short.
        """
        frame = itinerary.innermost
        last = {k: v for k, v in task.to_entry(frame.topic).items() if k not in ("tasks", "result")}
        # Key and children are those of the task that ended: the end is a message of its operation. So is the Result.
        ended = itinerary._replace(end=End(last, _status(result)), key=None, children=None)
        metadata = {**frame.metadata, METADATA_KEY: ended.dump()}
        key = ended.key_of() or frame.uuid
        # Its params are in its frame: once is enough. The end must be told, if need be with the reason why the Result
        # cannot be.
        try:
            kmsg = Message(frame.uuid, frame.entrypoint, None, result, metadata)
            out.messages.append(self._outgoing(kmsg, topic, key))
        except ValidationError as exc:
            try:
                short = Result(uuid=frame.uuid, retcode=exc.code or 1, stderr=str(exc.message))
                kmsg = Message(frame.uuid, frame.entrypoint, None, short, metadata)
                out.messages.append(self._outgoing(kmsg, topic, key))
            except ValidationError:
                return False
        if not results.is_success(result):
            out.failure = result
        return True

    def _outgoing(self, kmsg: Message, topic: str, key: str) -> Outgoing:
        kmsg = kmsg.sent_as(self.controller.TRANSPORT)
        return Outgoing(topic, key, encode(kmsg, self.limit), kmsg.entrypoint, kmsg.uuid)

    def outgoing(self, kmsg: Message, topic: str, key: str) -> Outgoing:
        """A message a task sends by itself, encoded. Raises as encode() does."""
        return self._outgoing(kmsg, topic, key)

    def _started(self, itinerary: Itinerary, out: Consequences) -> None:
        """Tell the start of an operation that a service launched: whoever meets its first message does."""
        if itinerary.new:
            root = itinerary.root
            out.events.append(
                Event(
                    type=EventType.OPERATION_STARTED,
                    uuid=root.uuid,
                    entrypoint=root.entrypoint,
                    operation=root.uuid,
                    run=itinerary.run,
                    position=itinerary.position,
                    status=Status.RUNNING,
                    params=root.params,
                )
            )


def _stand_in(uuid: str, name: str, why: str) -> UnregisteredTask:
    task = UnregisteredTask(uuid=uuid)
    task.entrypoint, task.why = name, why
    return task


def operation_todo(operation: Operation) -> list[Task]:
    """Its tasks that are not SUCCESS already."""
    return [task for task in operation.tasks if task.status != Status.SUCCESS]


def _forwarded(operation: Operation) -> Result:
    """What the first task to run gets: the Result of those before it that are SUCCESS already, else the operation's."""
    forwarded = operation.result
    for task in operation.tasks:
        if task.status != Status.SUCCESS:
            break
        forwarded = task.result
    return forwarded


def _status(result: Result) -> Status:
    return Status.SUCCESS if results.is_success(result) else Status.FAILED


def step_event(task: Task, result: Result, itinerary: Itinerary | None) -> Event:
    """That a task ended with ``result``."""
    inside = itinerary is not None and bool(itinerary.frames)
    return Event(
        type=EventType.STEP_DONE if results.is_success(result) else EventType.STEP_FAILED,
        uuid=task.uuid,
        entrypoint=task.path,
        operation=itinerary.root.uuid if inside and itinerary else None,
        parent=itinerary.innermost.uuid if inside and itinerary else None,
        run=itinerary.run if itinerary else 1,
        position=itinerary.position if itinerary else 0,
        status=_status(result),
        result=result,
        params=task.params,
    )
