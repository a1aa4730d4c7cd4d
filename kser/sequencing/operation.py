"""Operation: a list of tasks executed one after the other."""

import logging
import uuid as uuids
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kser import results
from kser.controller import Controller
from kser.entry import Entrypoint, EntrypointMeta, Finder, set_up, wire_name
from kser.errors import StatusError, ValidationError
from kser.headers import CLAIM, Headers
from kser.results import Result
from kser.schemas import Message
from kser.sequencing.itinerary import METADATA_KEY, Entry, Frame, Itinerary
from kser.sequencing.plain_launch import send_first
from kser.sequencing.task import ORIGINALS, Home, Task, UnregisteredTask, facts_of, found, not_before
from kser.status import Status
from kser.tracebacks import log_raised

if TYPE_CHECKING:
    from kser.storage import Execution

__all__ = ["Operation", "name_failed_task"]

logger = logging.getLogger(__name__)

_EMPTY = "Nothing to do, empty operation !"
_TIMEOUT_S = 60


class Operation(Task):
    """A list of tasks executed linearly: each starts after the one before succeeded, on whichever worker is free.

    Write ``build_tasks()``, then ``MyOperation(params={...}).build().launch()``.

    Args:
        uuid: operation unique identifier.
        params: parameters; build_tasks() gets them as keyword arguments.
        status: name of a Status.
        result: Result forwarded to the first task.
        metadata: context of the operation.
        tasks: the tasks, when they are composed by hand.
        key: message key, for all tasks of this operation (a customer, an order); default its uuid. Messages of one key
            stay in order and in one partition; whole operations of one key do not wait for each other.
        idempotency_key: what the operation is for, in the words of whoever starts it (an order's number). Of several
            operations of this class with the same one, from whichever process, one is started and the others are
            dropped by the worker that meets them; all have the same ``uuid``, which is made of it. For 30 days. They
            have to have the same ``key``, topic and first task.

    Raises ValidationError when both a ``uuid`` and an ``idempotency_key`` are given.
    """

    #: Classes whose REQUIRED_FIELDS the operation needs too.
    TASKS: ClassVar[Sequence[type[Entrypoint]]] = ()

    _logger: ClassVar[logging.Logger] = logger

    #: What this operation is started for, once.
    idempotency_key: str | None = None

    #: What launch() gave.
    _launched: Result | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._straight = cls.directly_follows(Operation, Task, Entrypoint)

    def __init__(
        self,
        uuid: str | None = None,
        params: dict[str, Any] | None = None,
        status: str = "PENDING",
        result: Result | None = None,
        metadata: dict[str, Any] | None = None,
        tasks: Sequence[Task] | None = None,
        key: str | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        self.tasks: list[Task] = []
        if idempotency_key is not None:
            uuid = self._uuid_for(idempotency_key, uuid)
            self.idempotency_key = idempotency_key
        if self._straight:
            if status != "PENDING":
                self.status = Status.parse(status)
            set_up(self, uuid, params, result, metadata)
        else:
            super().__init__(uuid, params, status, result, metadata)
        if key:
            self.key = key
        if tasks:
            self._add_tasks(list(tasks))

    @classmethod
    def _uuid_for(cls, idempotency_key: str, uuid: str | None) -> str:
        """The uuid of the operation of this class that is started with that key."""
        if not isinstance(idempotency_key, str) or not idempotency_key:
            raise ValidationError(f"idempotency_key={idempotency_key!r}: give a text that is not empty")
        if uuid is not None:
            raise ValidationError(
                f"uuid={uuid!r} and idempotency_key={idempotency_key!r}: give one, the uuid is made of the key"
            )
        return str(uuids.uuid5(uuids.NAMESPACE_OID, f"{wire_name(cls)}:{idempotency_key}"))

    # -- building ----------------------------------------------------------------------------------------------------

    @classmethod
    def new(cls, **kwargs: Any) -> Self:
        """``cls(**cls.parse_inputs(**kwargs))``. Deprecated: call the class."""
        warnings.warn("Operation.new() is deprecated: call the class", DeprecationWarning, stacklevel=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            inputs = cls.parse_inputs(**kwargs)
        return cls(**inputs)

    @classmethod
    def parse_inputs(cls, **kwargs: Any) -> dict[str, Any]:
        """The inputs of new(), checked. Deprecated: check in prebuild()."""
        warnings.warn("Operation.parse_inputs() is deprecated: check in prebuild()", DeprecationWarning, stacklevel=2)
        return kwargs

    def add_task(self, task: Task) -> None:
        """Append ``task``. Raises ValidationError when it is no Task, or in the operation already."""
        self._add_tasks((task,))

    def _add_tasks(self, tasks: Sequence[Task]) -> None:
        there = {self.uuid}
        for task in (*self.tasks, *tasks) if self.tasks else tasks:
            if isinstance(task, Task):
                there.add(task.uuid)
        if len(there) <= len(self.tasks) + len(tasks):
            self._refuse_one_of(tasks)
        self.tasks += tasks

    def _refuse_one_of(self, tasks: Sequence[Task]) -> None:
        """Raise for the first of ``tasks`` that cannot be added, if there is one."""
        there = {task.uuid for task in self.tasks} | {self.uuid}
        for task in tasks:
            if not isinstance(task, Task):
                raise ValidationError(
                    f"{self!r} cannot take a {type(task).__name__}: add instances of kser.sequencing.task.Task",
                    extra={"uuid": self.uuid, "type": type(task).__name__},
                )
            if task.uuid in there:
                raise ValidationError(
                    f"{self!r} has a task with uuid {task.uuid} already: make a new one for each step",
                    extra={"uuid": self.uuid, "task": task.uuid},
                )
            there.add(task.uuid)

    def check_required_params(self) -> None:
        """Raise ValidationError for the first required parameter, own or of TASKS, that ``params`` does not have."""
        self._check_params(self.params)

    def _check_params(self, params: Mapping[str, Any]) -> None:
        for owner in (type(self), *self.TASKS):
            for name in owner.REQUIRED_FIELDS:
                if name not in params:
                    raise ValidationError(
                        f"Missing parameter: {name} for {owner.path}", extra={"uuid": self.uuid, "parameter": name}
                    )

    def prebuild(self, **kwargs: Any) -> dict[str, Any] | None:
        """Called before the tasks are built, to check; raising ends the build. A dict it gives is for build_tasks()."""
        return kwargs

    def build_tasks(self, **kwargs: Any) -> list[Task]:  # noqa: ARG002 - a hook to override
        """The tasks, in order. ``kwargs``: the operation's params, or what prebuild() gave."""
        return []

    def compute_tasks(self, **kwargs: Any) -> list[Task]:
        """Check, then build_tasks(). The operation's own ``tasks`` are not changed, so another may take them in.

        Raises ValidationError for a missing parameter, and whatever prebuild() and build_tasks() raise.
        """
        given = {**self.params, **kwargs} if kwargs else self.params
        told = self._logger.isEnabledFor(logging.DEBUG)
        if told:
            self._debug("PreBuild")
        if type(self).REQUIRED_FIELDS or self.TASKS:
            self._check_params(given)
        prebuild = self.prebuild
        if getattr(prebuild, "__func__", None) is not _PREBUILD:
            given = {**given}  # prebuild() may change self.params, and what it gives decides
            given = prebuild(**given) or given
        tasks = self.build_tasks(**given)
        tasks = tasks.copy() if type(tasks) is list else self._as_list(tasks)
        if told:
            self._logger.debug("%s.BuildTasks: %d task(s) found", type(self).__name__, len(tasks), extra=self._extra())
        return tasks

    def _as_list(self, tasks: Any) -> list[Task]:
        """What build_tasks() gave, as a list: a generator or a tuple will do."""
        try:
            return list(tasks)
        except TypeError:
            raise ValidationError(
                f"build_tasks() of {self.path} returned a {type(tasks).__name__}: return a list of tasks",
                extra={"uuid": self.uuid, "type": type(tasks).__name__},
            ) from None

    def finalize(self) -> Self:
        """Called after the build. Gives the operation."""
        return self

    def build(self, **kwargs: Any) -> Self:
        """Add the computed tasks and finalize(). ``self.params`` holds ``{**params, **kwargs}`` afterwards."""
        tasks = self.compute_tasks(**kwargs) if kwargs else self.compute_tasks()
        if kwargs:
            self.params = {**self.params, **kwargs}
        self._add_tasks(tasks)
        return self.finalize()

    # -- status ------------------------------------------------------------------------------------------------------

    def set_status(self, status: str, result: Result | None = None) -> None:  # noqa: ARG002 - for those who override
        """Update the operation's status. Override it to note the status elsewhere, and call super().

        Raises StatusError when the move is not legal.
        """
        self.status = Status.parse(self.status).move(status)

    def _set_status(self, status: str, result: Result | None = None) -> None:
        if self._logger.isEnabledFor(logging.INFO):
            self._logger.info(
                "%s.SetStatus: %s[%s] status update '%s' -> '%s'",
                type(self).__name__,
                self.path,
                self.uuid,
                self.status,
                status,
                extra=self._extra(),
            )
        self.set_status(status, result)

    def _start(self) -> None:
        if self.status in (Status.FAILED, Status.ABORTED, Status.WAITING_FOR_INPUT):
            self.status = Status.PENDING

    def _mark_aborted(self, failure: Result) -> None:
        if not Status.parse(self.status).final:
            try:
                self._set_status(Status.ABORTED, failure)
            except Exception:  # noqa: BLE001 - user code; it is logged
                log_raised(self._logger, "set_status() of %r raised", self)

    def _mark(self, result: Result) -> None:
        status = Status.SUCCESS if results.is_success(result) else Status.FAILED
        if self.status in (Status.SUCCESS, Status.FAILED) and self.status != status:
            self.status = Status.RUNNING  # a hook turned the outcome round: the run was not over before its hooks
        if self.status == status:
            return
        try:
            self._set_status(status, result)
        except Exception:
            if status is Status.SUCCESS:
                raise  # what could not be noted is no success
            log_raised(self._logger, "%s.SetStatus: %s[%s] raised", type(self).__name__, self.path, self.uuid)
            self.status = status  # the failure stays the one to tell, and the operation is not left open

    # -- in this process ---------------------------------------------------------------------------------------------

    def execute(self, result: Result | None = None) -> Result:
        """Run all tasks one after the other in this process; the Result of the last one.

        The first task that fails ends the operation; the Result then has its uuid and path in
        ``retval["failed_task"]``. Tasks that are SUCCESS already are not run again: their Result is handed on. An
        operation without tasks is built first. Never raises an Exception.
        """
        try:
            return self._execute(result, lambda: self._perform_tasks(safe=True))
        except Exception as exc:  # noqa: BLE001 - the promise of this method
            return self._finish(results.from_exception(exc, self.uuid))

    def unsafe_execute(self, result: Result | None = None) -> Result:
        """Like execute(), but what user code raises is raised."""
        return self._execute(result, lambda: self._perform_tasks(safe=False))

    def begin(self) -> Result | None:
        """What comes before the first task: the tasks are built if there are none, RUNNING, prerun().

        Gives None, or the failed Result of an operation without tasks. Raises what the hooks raise.
        """
        if self._broken is not None:
            return self._broken
        if not self.tasks:
            self.build()
        else:
            self.check_required_params()
        if not self.tasks:
            return Result(retcode=1, stderr=_EMPTY, uuid=self.uuid)
        if self.status != Status.RUNNING:
            self._set_status(Status.RUNNING)
        self._debug("PreRun")
        self.prerun()
        return None

    def _perform_tasks(self, *, safe: bool) -> Result:
        failure = self.begin()
        if failure is not None:
            return failure
        last, todo = self.result, list(self.tasks)
        while todo and not self._is_called_off():
            task = todo.pop(0)
            last = task.execute(last) if safe else task.unsafe_execute(last)
            if not results.is_success(last):
                return name_failed_task(last, task, self.uuid)
            if not todo and (following := self.next(task)) is not None:  # a class may add some as it goes
                todo = [following, *(self.tasks[self.tasks.index(following) + 1 :] if following in self.tasks else ())]
        return last

    # -- by messages -------------------------------------------------------------------------------------------------

    def next(self, task: Task) -> Task | None:
        """The task after ``task`` that is not SUCCESS yet; None after the last one, or for a task of another."""
        found = False
        for other in self.tasks:
            if found and other.status != Status.SUCCESS:
                return other
            found = found or str(other.uuid) == str(task.uuid)
        return None

    def launch(self) -> Result:
        """Send the first task; from then on the workers drive the operation by themselves.

        The Result says whether the broker confirmed the message (retcode 202 inside a batch or a task: not yet). An
        operation that was launched already is refused with a failed Result.

        Raises ConfigurationError when there is no producer or no topic.
        """
        if self._launched is not None and self._launched.retcode in (0, results.ACCEPTED):
            return results.from_exception(
                StatusError(
                    f"{self!r} was launched already: build a new operation to run it again", extra={"uuid": self.uuid}
                ),
                self.uuid,
            )
        sent = send_first(self) or self.launch_next()
        self._launched = sent
        if sent.retcode in (0, results.ACCEPTED) and self.status == _PENDING:
            self._set_status(_RUNNING)
        return sent

    def launch_next(self, task: Task | None = None, result: Result | None = None) -> Result:
        """Send the task after ``task`` (without one: the first) with ``result``, or finish the operation.

        It is finished when there is no next task, and FAILED when ``task`` or ``result`` is: then nothing more is sent.

        Args:
            task: the task that ended.
            result: what it gave; default its own ``result``.

        Returns: the Result of the sending, or the final one of the operation.
        """
        if task is None:
            if not self.tasks:
                return Result(retcode=1, stderr=_EMPTY, uuid=self.uuid)
            return self._launch_first(result)
        outcome = result if result is not None else task.result
        if task.status in (Status.FAILED, Status.ABORTED) and results.is_success(outcome):
            outcome = Result(retcode=1, stderr=f"{task!r} is {task.status}", uuid=task.uuid)
        following = self.next(task) if results.is_success(outcome) else None
        if following is None:
            return self.finish(task, outcome)
        return self._send_step(following, outcome, new=False)

    def _launch_first(self, result: Result | None) -> Result:
        """Send the first task that is not SUCCESS yet, with what the one before it gave; all are: finish."""
        done = 0
        while done < len(self.tasks) and self.tasks[done].status == Status.SUCCESS:
            done += 1
        if not done:
            return self._send_step(self.tasks[0], result, new=True)
        before = self.tasks[done - 1]
        if done == len(self.tasks):
            return self.finish(before, before.result)
        return self._send_step(self.tasks[done], result if result is not None else before.result, new=True)

    def finish(self, task: Task, result: Result) -> Result:
        """End the operation with what its last ``task`` gave: set_status(), then onsuccess() or onerror().

        The Result to carry on; a failed one names the task. Never raises an Exception.
        """
        if not results.is_success(result):
            result = name_failed_task(result, task, self.uuid)
        try:
            return self._finish(result)
        except Exception as exc:  # noqa: BLE001 - a hook that raises fails the operation, it does not leave it open
            return self._finish(results.from_exception(exc, self.uuid))

    def _send_step(self, task: Task, result: Result | None, *, new: bool) -> Result:
        position = self.tasks.index(task)
        topic = self.home_topic()
        own = task.own_topic()
        if own is None:
            task.topic = own = topic  # as for the tasks after it, which workers send
        if task._home is None and task.home is None:
            task._home = self.home
        itinerary = Itinerary(
            (self.frame(topic, self.tasks[position + 1 :]),),
            position,
            new=new,
            children=task.carried(own),
            key=task.key,
        )
        task.metadata = {**task.metadata, METADATA_KEY: itinerary.dump()}
        if type(task).send in _OWN_SENDS:
            headers = self._claim() if new else ()
            return task._transmit(result, own, task.key or self.key or self.uuid, _TIMEOUT_S, headers)
        return task.send(result=result)  # overridden: whoever wrote it decides how a task is sent

    # The published interface: it gives the operation itself, for chaining.
    def send(self, *, delay: float | None = None, at: datetime | None = None) -> Self:  # type: ignore[override]
        """Send the operation itself; the worker that takes its message builds it, unless it has tasks, and starts it.

        The delivery's Result is in ``result`` afterwards. ``delay`` and ``at`` are those of Task.send(). Raises
        ConfigurationError when there is no producer or topic, ValidationError for a time that cannot be.
        """
        headers = not_before(delay, at)
        if (self.tasks or self.key) and METADATA_KEY not in self.metadata:
            itinerary = Itinerary(children=self.carried(self.home_topic()), key=self.key)
            self.metadata = {**self.metadata, METADATA_KEY: itinerary.dump()}
        self.result = self._transmit(None, None, None, _TIMEOUT_S, (*headers, *self._claim()))
        return self

    def _claim(self) -> Headers:
        """With this header the first message of all operations of the same idempotency key is run, and no other."""
        return ((CLAIM, f"start:{self.uuid}".encode()),) if self.idempotency_key else ()

    @property
    def home(self) -> Home | None:
        """The registry of this operation's class, else that of its first task that has one."""
        return self._home or next((task.home for task in self.tasks if task.home is not None), None)

    def home_topic(self) -> str | None:
        """The operation's topic, else its registry's, else that of its first task that has one."""
        return self.own_topic() or next((t for task in self.tasks if (t := task.home_topic())), None)

    def frame(self, topic: str | None, tasks: Sequence[Task]) -> Frame:
        """The operation as a frame of an itinerary, with those of ``tasks`` that are not SUCCESS still to run."""
        return Frame(
            uuid=self.uuid,
            entrypoint=self.path,
            params=self.params,
            topic=topic,
            key=self.key,
            metadata={k: v for k, v in self.metadata.items() if k != METADATA_KEY} if self.metadata else {},
            tasks=[task.to_entry(topic) for task in tasks if task.status != Status.SUCCESS],
            hooks=not (EntrypointMeta.facts.get(type(self)) or facts_of(type(self))).ends,
        )

    def carried(self, topic: str | None) -> list[dict[str, Any]] | None:
        """The tasks travel along when there are any, else whoever reaches the operation builds them."""
        return [task.to_entry(topic) for task in self.tasks] if self.tasks else None

    def adopt(self, children: Sequence[Mapping[str, Any]], find: Finder) -> None:
        """Take over the children that travelled with this operation. Raises ItineraryError."""
        self.tasks = [Task.from_entry(Entry.load(child), find) for child in children]

    def _remember(self, known: "Execution", find: Finder) -> None:
        self.tasks = [Task._remembered(task, find) for task in known.tasks]

    def restore(self, kmsg: Message, find: Finder) -> None:
        """Take over the children in the message, if it has any. Raises ItineraryError."""
        itinerary = Itinerary.of(kmsg)
        if itinerary is not None and itinerary.children is not None:
            self.adopt(itinerary.children, find)

    # -- for people --------------------------------------------------------------------------------------------------

    def display(self) -> None:
        """Print the operation, then a line for each task."""
        print(self)  # noqa: T201 - what the method is for
        for task in self.tasks:
            print(f"  - {task}")  # noqa: T201

    def __repr__(self) -> str:
        return f"Operation [{type(self).__name__}](id={self.uuid},status={self.status})"


_OWN_SENDS = (Task.send, Operation.send)
_PREBUILD = Operation.prebuild
_PENDING, _RUNNING = Status.PENDING, Status.RUNNING
ORIGINALS["launches"] = {
    name: found(Operation, name)
    for name in (
        *("__getattribute__", "launch_next", "_send_step", "frame", "home", "home_topic", "own_topic", "path"),
        *("idempotency_key", "set_status", "_set_status"),
    )
}
ORIGINALS["ends"] = {
    name: found(Operation, name)
    for name in (
        *("__init__", "__getattribute__", "__setattr__", "postinit", "next", "finish", "onsuccess", "onerror"),
        *("postrun", "set_status", "_set_status", "_finish", "_mark", "status", "from_Message"),
    )
}
EntrypointMeta.facts = {}
Controller.BUILT_IN[wire_name(Operation)] = Operation  # composed by hand from a service's tasks, nobody registers it


def name_failed_task(result: Result, task: Task, uuid: str) -> Result:
    """The failed Result of the operation ``uuid``: ``result`` with the failing task in ``retval["failed_task"]``.

    The innermost one stays when operations are nested. What a plain task has there was forwarded to it, or is its own:
    it is no name of the task that failed here.
    """
    named = result.retval.get("failed_task") if isinstance(task, (Operation, UnregisteredTask)) else None
    if not isinstance(named, dict):
        named = {"uuid": task.uuid, "path": task.path}
    return Result(
        retcode=result.retcode,
        stdout=result.stdout,
        stderr=result.stderr,
        retval={**result.retval, "failed_task": named},
        uuid=uuid,
    )
