"""Task: an Entrypoint with a status, which can send itself."""

import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from kser import context, eventloop, results
from kser.entry import Entrypoint, EntrypointMeta, Finder, set_up, wire_name
from kser.errors import AbortedError, ConfigurationError, ValidationError
from kser.headers import NOT_BEFORE, Headers
from kser.results import Result
from kser.schemas import Message
from kser.sequencing.itinerary import Entry
from kser.status import Status

if TYPE_CHECKING:
    from kser.storage import Execution, StorageBase

__all__ = [
    "ORIGINALS",
    "Facts",
    "Home",
    "MessageSender",
    "Task",
    "UnregisteredTask",
    "facts_of",
    "found",
    "function_task",
    "is_plain",
    "made_plain",
    "not_before",
]

logger = logging.getLogger(__name__)


class MessageSender(Protocol):
    """What a task needs of a producer."""

    def send(
        self, topic: str, kmsg: Message, timeout: float = 60, *, key: str | None = None, headers: Headers = ()
    ) -> Result:
        """Send one message; the Result says whether the broker confirmed it."""


class Operator(Protocol):
    """What aborting and resuming need of a producer: kser.operating.OperatingProducer."""

    def abort(
        self, uuid: str, *, group: str = ..., run: int | None = ..., why: str = ..., timeout: float = ...
    ) -> Result:
        """Tell the workers of a group that an operation, or a task of none, is to end."""

    def resume(
        self,
        uuid: str,
        *,
        group: str = ...,
        params: Mapping[str, Any] | None = ...,
        step: str | int | None = ...,
        timeout: float = ...,
    ) -> Result:
        """Begin a new run of a failed operation."""


class Home(Protocol):
    """What a task needs of the registry its class was subscribed to."""

    @property
    def producer(self) -> MessageSender | None:
        """Sends the messages of this registry's tasks."""

    @property
    def topic(self) -> str | None:
        """Topic of this registry's tasks, unless a class names its own."""

    @property
    def transport(self) -> type[Message]:
        """How messages of this registry are written: its controller's TRANSPORT."""

    @property
    def storage(self) -> "StorageBase | str | None":
        """Where Task.init_by_id() looks; None: where KSER_STORAGE says."""

    def find(self, name: str) -> type[Entrypoint] | None:
        """The class subscribed under this name in messages, or None."""


class Task(Entrypoint):
    """A task of an operation, or a lone one. Write ``run()``.

    Args:
        uuid: task unique identifier.
        params: task parameters.
        status: name of a Status.
        result: Result forwarded from a previous task.
        metadata: task context.

    Raises ValidationError when ``status`` is none.
    """

    #: Topic of this task's messages; None: the registry's, else (on a worker) the one the running message came from.
    topic: str | None = None
    #: Where it stands; the name of a Status.
    status: str = Status.PENDING
    #: Key of this task's messages; None: that of its operation, else its own uuid.
    key: str | None = None

    _message_logger: ClassVar[logging.Logger] = logger
    #: Set by OperationRegistry.subscribe().
    _home: Home | None = None
    #: Nobody's constructor is between those of kser.
    _straight: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._straight = cls.directly_follows(Task, Entrypoint)

    def __init__(
        self,
        uuid: str | None = None,
        params: dict[str, Any] | None = None,
        status: str = "PENDING",
        result: Result | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        if status != "PENDING":
            self.status = Status.parse(status)
        if self._straight:
            set_up(self, uuid, params, result, metadata)
        else:
            super().__init__(uuid, params, result, metadata)

    # -- execution ---------------------------------------------------------------------------------------------------

    def execute(self, result: Result | None = None) -> Result:
        """See Entrypoint.execute()."""
        if (
            result is None
            and self._broken is None
            and self.status == Status.PENDING
            and (self._control is None or self._control.aborted is None)
            and (runs := (EntrypointMeta.facts.get(type(self)) or facts_of(type(self))).runs)
            and runs.isdisjoint(self.__dict__)
            and not self._logger.isEnabledFor(logging.DEBUG)
        ):
            return self._execute_plain()
        return super().execute(result)

    def _execute_plain(self) -> Result:
        """execute() of a first run where only run() is the user's: the same, without asking each hook."""
        uuid = self.uuid
        self.status = Status.RUNNING
        token = context._task.set(self)
        try:
            if self.REQUIRED_FIELDS:
                self.check_required_params()
            ran = self.run()
            if ran is not None and type(ran) is not Result:
                if inspect.iscoroutine(ran):
                    ran = eventloop.run(ran)
                ran = self._as_result(ran, "run")
        except Exception as exc:  # noqa: BLE001 - the promise of execute()
            cause = self._overran(exc) or exc
            return self._finish(results.from_exception(cause, uuid), cause)
        finally:
            context._task.reset(token)
        if self._control is not None and self._control.aborted is not None:
            if (late := self._overran(None)) is not None:
                return self._finish(results.from_exception(late, uuid), late)  # what it still gave came too late
            if self._is_called_off():
                return self._call_off()
        forwarded = self._result
        if ran is None:
            done = Result(uuid=uuid) if forwarded is None else results.forward(forwarded, uuid)
        elif forwarded is None:
            done = results.forward(ran, uuid, ran.retcode)
        else:
            done = results.merge(forwarded, ran, uuid)
        if done.retcode != 0:
            return self._finish(done)
        self.status = Status.SUCCESS
        self._result = done
        if self._logger.isEnabledFor(logging.INFO):
            self._log_end(done)
        return done

    def _execute(self, result: Result | None, perform: Callable[[], Result]) -> Result:
        if self.status == Status.SUCCESS:
            return self.result  # not run again: what it gave is handed on
        if self._is_called_off():
            return self._call_off()
        if self._broken is None:
            self._start()
        return super()._execute(result, perform)

    def _finish(self, result: Result, cause: BaseException | None = None) -> Result:
        return self._call_off() if self._is_called_off() else super()._finish(result, cause)

    def _is_called_off(self) -> bool:
        """Whether abort() was called on this object. Not on a worker, which says itself what became of an abort."""
        control = self._control
        return control is not None and control.aborted == "aborted" and context.current_delivery() is None

    def _call_off(self) -> Result:
        """End as aborted: no hook is called."""
        failure = results.from_exception(AbortedError(f"{self.path} was aborted"), self.uuid)
        self._mark_aborted(failure)
        self.result = failure
        return failure

    def _mark_aborted(self, failure: Result) -> None:  # noqa: ARG002 - an Operation tells it
        self.status = Status.ABORTED

    def _start(self) -> None:
        if self.status in (Status.FAILED, Status.ABORTED, Status.WAITING_FOR_INPUT):
            self.status = Status.PENDING  # executing it once more is the explicit retry that these need
        self.status = Status.parse(self.status).move(Status.RUNNING)

    def _mark(self, result: Result) -> None:
        # Assigned, not moved: an onsuccess() that raises turns the SUCCESS it was called with into a FAILED, and the
        # execution is not over before its hooks are.
        self.status = Status.SUCCESS if results.is_success(result) else Status.FAILED

    def _set_aside(self) -> None:
        self.status = Status.PENDING

    def _label(self) -> str:
        return str(self.status)

    # -- sending -----------------------------------------------------------------------------------------------------

    def send(
        self,
        result: Result | None = None,
        *,
        topic: str | None = None,
        key: str | None = None,
        timeout: float = 60,
        delay: float | None = None,
        at: datetime | None = None,
    ) -> Result:
        """Send this task's message; the Result says whether the broker confirmed it.

        Inside a task that a worker runs, the message leaves when that task is settled (retcode 202), and not at all
        if it fails.

        Args:
            result: Result forwarded to the task; default its own.
            topic: where to; default the task's, its class's, its registry's.
            key: message key; default the task's, its operation's, its uuid.
            timeout: seconds to wait for the broker.
            delay: seconds before it is run, by the clock of this machine. The broker has it at once, so it survives
                whatever ends meanwhile; later messages of the same key may run before it.
            at: when it is run, instead of ``delay``; a datetime with a time zone.

        Raises ConfigurationError when there is no producer or no topic, ValidationError for a time that cannot be.
        """
        return self._transmit(result, topic, key, timeout, not_before(delay, at))

    def _transmit(
        self, result: Result | None, topic: str | None, key: str | None, timeout: float, headers: Headers = ()
    ) -> Result:
        kmsg = self.to_Message(result)
        target = topic or self.home_topic()
        delivery = context.current_delivery()
        if delivery is not None:
            return delivery.send(kmsg, target, key or self.key, headers)
        home = self.home
        producer = home.producer if home is not None else None
        if home is None or producer is None:
            raise ConfigurationError(
                f"{self.path} cannot be sent: no producer is configured. Subscribe its class to a registry made with "
                "OperationRegistry(producer=..., topic=...), or call registry.configure(producer=...)",
                extra={"uuid": self.uuid, "entrypoint": self.path},
            )
        if target is None:
            raise ConfigurationError(
                f"{self.path} cannot be sent: no topic is configured. Name it in send(topic=...), in the class "
                "(topic = ...), or in OperationRegistry(topic=...)",
                extra={"uuid": self.uuid, "entrypoint": self.path},
            )
        kmsg = kmsg.sent_as(home.transport)
        if headers:
            return producer.send(target, kmsg, timeout, key=key or self.key, headers=headers)
        return producer.send(target, kmsg, timeout, key=key or self.key)

    def abort(
        self,
        *,
        group: str = "kser",
        run: int | None = None,
        why: str = "",
        timeout: float = 60,
        producer: "Operator | None" = None,
    ) -> Result:
        """Tell the workers of ``group`` that this is to end: a task that is running sees it, nothing more is run of it.

        Its end is told in the events, ABORTED, and cannot be taken back; doing it again changes nothing. A task of an
        operation is refused: abort the operation. This object is aborted too, once the workers are told: execute() does
        not run it, and ``aborted`` of one that runs in this process says so.

        Args:
            group: the workers' group.
            run: the last run that is meant. None: the newest that the events tell of.
            why: for people.
            timeout: seconds for all of it.
            producer: tells them; default that of the registry.

        Returns: a Result; failed when it has ended already, or the workers may not hear of it.

        Raises ConfigurationError when there is no producer that can tell them; this object is aborted all the same.
        """
        try:
            operator = _operator(producer, self.home)
        except ConfigurationError:
            self._abort_here()
            raise
        told = operator.abort(self.uuid, group=group, run=run, why=why, timeout=timeout)
        if results.is_success(told):
            self._abort_here()
        return told

    def _abort_here(self) -> None:
        if self._control is None:
            self._control = context.Control()
        self._control.aborted = self._control.aborted or "aborted"

    @classmethod
    def resume(
        cls,
        uuid: str,
        *,
        group: str = "kser",
        params: Mapping[str, Any] | None = None,
        step: str | int | None = None,
        timeout: float = 60,
        producer: "Operator | None" = None,
    ) -> Result:
        """Begin a new run of what failed, of this uuid, with what it had: an operation goes on at the failed step.

        Of any class: ``Operation.resume(uuid, producer=...)`` needs none of its own.

        Args:
            uuid: of the root operation, or of a task of none.
            group: the workers' group.
            params: these take the place of that step's parameters of the same names.
            step: begin at another step: its name, or its position from 0.
            timeout: seconds to read what is needed, and to be confirmed; each.
            producer: sends it; default that of the class's registry.

        Returns: a Result, ``retval["run"]`` is the new run. Failed, with the reason, while the operation is alive and
            when there is nothing to resume it from. Resumed several times at once, by whomever, it is run once.

        Raises ConfigurationError when there is no producer that can do it.
        """
        return _operator(producer, cls._home).resume(uuid, group=group, params=params, step=step, timeout=timeout)

    @classmethod
    def init_by_id(cls, _id: str) -> "Task":
        """The task or operation with this uuid as the storage knows it: its status, params, Result, and its tasks.

        For people and tools; nothing on a message's way calls it. The storage is that of the class's registry
        (``registry.configure(storage=...)``), else the one at the URL in KSER_STORAGE. Parameters are those that the
        events tell, secrets masked. A class that is not known here gives a task that can be looked at, not run.

        Raises:
            ConfigurationError: no storage is configured, or it cannot be used.
            NotFound: it does not know the uuid.
            StorageError: the database does not answer.
        """
        from kser.storage import load_execution  # here: SQL is for those who ask for it

        home = cls._home

        def find(name: str) -> type[Entrypoint] | None:
            found = home.find(name) if home is not None else None
            return cls if found is None and name == wire_name(cls) else found

        return cls._remembered(load_execution(_id, home.storage if home is not None else None), find)

    @staticmethod
    def _remembered(known: "Execution", find: Finder) -> "Task":
        """The task of what a storage knows."""
        task = Task.from_entry(Entry(known.uuid, known.entrypoint, dict(known.params)), find)
        task.status = Status.parse(known.status)
        if known.result is not None:
            task.result = Result(**known.result)
        task._remember(known, find)
        return task

    def _remember(self, known: "Execution", find: Finder) -> None:
        """Take over what else a storage knows. Only an Operation has tasks."""

    @property
    def home(self) -> Home | None:
        """The registry this task's class was subscribed to, or None."""
        return self._home

    def own_topic(self) -> str | None:
        """The task's topic, else its class's, else its registry's, else None."""
        return self.topic or (self._home.topic if self._home is not None else None)

    def home_topic(self) -> str | None:
        """Where the task is sent when nobody says where."""
        return self.own_topic()

    def to_entry(self, topic: str | None) -> dict[str, Any]:
        """The task as an entry of an itinerary, in an operation whose topic is ``topic``. What is empty is left out."""
        entry: dict[str, Any] = {"uuid": self.uuid, "entrypoint": self.path, "params": self.params}
        own = self.own_topic()
        if own is not None and own != topic:
            entry["topic"] = own
        if self.key:
            entry["key"] = self.key
        if self.metadata:
            entry["metadata"] = self.metadata
        carried = self.carried(own or topic)
        if carried is not None:
            entry["tasks"] = carried
        if self.status == Status.SUCCESS:
            entry["result"] = results.dump(self.result)
        return entry

    def carried(self, topic: str | None) -> list[dict[str, Any]] | None:  # noqa: ARG002 - for operations
        """Entries of the children that travel with this task's message. Only an Operation has any."""
        return None

    @classmethod
    def from_entry(cls, entry: Entry, find: Finder) -> "Task":
        """The task an entry names; an UnregisteredTask when its class is not known here."""
        found = find(entry.entrypoint)
        given = dict(entry.result) if entry.result is not None else None
        kmsg = Message(entry.uuid, entry.entrypoint, dict(entry.params), given, dict(entry.metadata))
        task = (found if found is not None and issubclass(found, Task) else UnregisteredTask).from_Message(kmsg)
        if isinstance(task, UnregisteredTask):
            task.entrypoint = entry.entrypoint
        if entry.topic:
            task.topic = entry.topic
        if entry.key:
            task.key = entry.key
        if entry.tasks is not None:
            task.adopt(entry.tasks, find)
        if given is not None:
            task.status = Status.SUCCESS
        return task

    def adopt(self, children: Sequence[Mapping[str, Any]], find: Finder) -> None:
        """Take over the entries of children that travelled with this task. Only an Operation has any."""

    def __repr__(self) -> str:
        return f"Task [{self.path}](uuid={self.uuid},status={self.status}, params={self.params})"


def not_before(delay: float | None, at: datetime | None) -> Headers:
    """The header of a message that is to be run so many seconds from now, or at that time; none when that is now.

    Raises ValidationError.
    """
    if delay is None and at is None:
        return ()
    now = time.time()
    if delay is not None:
        if at is not None:
            raise ValidationError(f"delay={delay!r} and at={at!r}: give one of them")
        if isinstance(delay, bool) or not isinstance(delay, (int, float)) or not 0 <= delay <= _LONGEST_DELAY_S:
            raise ValidationError(f"delay={delay!r}: give seconds, from 0 to {_LONGEST_DELAY_S} (ten years)")
        due = now + delay
    else:
        if not isinstance(at, datetime) or at.tzinfo is None:
            raise ValidationError(f"at={at!r}: give a datetime with a time zone, as datetime.now(UTC) has one")
        due = at.timestamp()
        if due > now + _LONGEST_DELAY_S:
            raise ValidationError(f"at={at!r}: that is more than ten years from now")
    return ((NOT_BEFORE, b"%d" % math.ceil(due * 1000)),) if due > now else ()


_LONGEST_DELAY_S = 315_360_000


def _operator(given: "Operator | None", home: Home | None) -> Operator:
    """The producer that is given, else that of the registry, when it can abort and resume."""
    producer: Any = given if given is not None or home is None else home.producer
    if producer is None or not hasattr(producer, "abort") or not hasattr(producer, "resume"):
        raise ConfigurationError(
            "No producer that can abort and resume is known here: give producer=kser.confluent.producer.Producer(...), "
            "or subscribe the class to a registry that has one (registry.configure(producer=...))"
        )
    return cast("Operator", producer)


class Facts:
    """What a task class leaves as kser made it. Known of a class until it, or any other one, is changed.

    Each is a set of names, empty when the class changed one of them; an object may still have its own.
    """

    __slots__ = ("ends", "enters", "home", "launches", "makes", "path", "runs", "sends")

    def __init__(self, cls: type[Entrypoint]) -> None:
        order = cls.__mro__
        #: A class of another kind may be changed and nobody notices, so nothing is known of what comes after it.
        watched = all(isinstance(base, EntrypointMeta) for base in order[: order.index(Entrypoint)])
        same = {
            what: frozenset(originals) if watched and all(found(cls, n) is o for n, o in originals.items()) else _NONE
            for what, originals in ORIGINALS.items()
        }
        #: All that execute() asks besides run().
        self.runs = same["runs"]
        #: What making an object from its message asks, and its execution on a worker beside that.
        self.makes = same["makes"]
        #: What send() of a step of an operation asks.
        self.sends = same["sends"]
        #: What launch() of an operation asks.
        self.launches = same.get("launches", _NONE)
        #: What the end of an operation asks.
        self.ends = same.get("ends", _NONE)
        #: What to_entry() asks; only where it says uuid, entrypoint, params, and topic and metadata if they are there.
        self.enters = same["enters"] if not any(found(cls, name) for name in ("uuid", "params", "metadata")) else _NONE
        self.path = wire_name(cls)
        self.home: Home | None = getattr(cls, "_home", None)


_NONE: frozenset[str] = frozenset()


def found(cls: type, name: str) -> Any:
    """What a class has under this name, as it was written there; None when there is nothing."""
    return next((base.__dict__[name] for base in cls.__mro__ if name in base.__dict__), None)


def facts_of(cls: type[Entrypoint]) -> Facts:
    """The Facts of a class; EntrypointMeta.facts has them from now on."""
    known = EntrypointMeta.facts
    facts = known[cls] = Facts(cls)
    return facts


def _originals(*names: str) -> dict[str, Any]:
    return {name: found(Task, name) for name in ("__getattribute__", *names)}


#: What of a class is known together -> name -> how it is when nobody changed it.
ORIGINALS: dict[str, dict[str, Any]] = {
    "runs": _originals(
        *("prerun", "postrun", "onsuccess", "onerror", "check_required_params", "unsafe_execute", "result", "log"),
        *(
            "_execute",
            "_perform",
            "_prerun",
            "_run",
            "_postrun",
            "_finish",
            "_mark",
            "_set_aside",
            "_tried_again",
            "_start",
            "_hooked",
            "_log_end",
        ),
    ),
    "makes": _originals(
        *("__new__", "__init__", "__setattr__", "from_Message", "restore", "postinit", "execute", "on_cancel"),
        *("uuid", "params", "metadata", "status", "_result", "_broken", "_control", "_trace", "_execute_plain"),
    ),
    "enters": _originals("to_entry", "own_topic", "carried", "path", "topic", "key", "status"),
    "sends": _originals(
        *("send", "_transmit", "to_Message", "own_topic", "home_topic", "home", "carried", "path"),
    ),
}


def is_plain(cls: type[Entrypoint]) -> bool:
    """Whether only run() of this class is the user's."""
    return bool((EntrypointMeta.facts.get(cls) or facts_of(cls)).runs)


def made_plain(cls: type[Task], kmsg: Message, metadata: dict[str, Any], control: context.Control | None) -> Task:
    """What from_Message() makes of a class whose Facts have ``makes``, under ``control``, with this metadata."""
    task: Task = cls.__new__(cls)
    task.uuid, task.params, task.metadata = kmsg.uuid, kmsg.params, metadata
    task._result, task._control = kmsg.result, control
    return task


class UnregisteredTask(Task):
    """Stands for a task whose class this process does not know. It can be looked at and sent, not run."""

    entrypoint: str = ""
    #: Why its class is not there, to go on after its name.
    why: str = "is not registered"
    #: What was raised when it was made from its class, if that is why.
    broken: Result | None = None
    children: list[dict[str, Any]] | None = None

    @property
    def path(self) -> str:
        """The name its message has."""
        return self.entrypoint

    def adopt(self, children: Sequence[Mapping[str, Any]], find: Finder) -> None:  # noqa: ARG002
        """Keep the children, so that sending this task sends them along."""
        self.children = [dict(child) for child in children]

    def carried(self, topic: str | None) -> list[dict[str, Any]] | None:  # noqa: ARG002 - they have theirs
        """The children that came with it."""
        return self.children


def function_task(function: Callable[..., Any]) -> type[Task]:
    """A Task class whose run() calls ``function`` with those of the task's params that it names.

    What the function returns: a Result is taken as it is, None forwards what came, a dict becomes ``retval``, anything
    else ``retval["value"]``. Parameters without a default are REQUIRED_FIELDS. ``async def`` works too. The function
    itself stays reachable as the class attribute ``function``.

    Raises ConfigurationError when it is no function, or cannot be called by names.
    """
    if isinstance(function, type) or not callable(function) or not hasattr(function, "__name__"):
        raise ConfigurationError(f"{function!r} is no function: a class is subscribed with subscribe()")
    parameters = inspect.signature(function).parameters.values()
    if unnamed := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]:
        raise ConfigurationError(
            f"{function.__name__}() cannot be a task: {', '.join(unnamed)} can only be given by position, and params "
            "are given by name; drop the '/' from its signature",
            extra={"function": function.__name__},
        )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]

    def call(task: Task) -> Any:
        if takes_all:
            return function(**task.params)
        return function(**{p.name: task.params[p.name] for p in named if p.name in task.params})

    def run(self: Task) -> Result | None:
        return _returned(self, call(self))

    async def run_async(self: Task) -> Result | None:
        return _returned(self, await call(self))

    made: type[Task] = EntrypointMeta(  # type: ignore[assignment]
        function.__name__,
        (Task,),
        {
            "__module__": function.__module__,
            "__qualname__": function.__qualname__,
            "__doc__": function.__doc__,
            "REQUIRED_FIELDS": tuple(p.name for p in named if p.default is p.empty),
            "function": staticmethod(function),
            "run": run_async if inspect.iscoroutinefunction(function) else run,
        },
    )
    return made


def _returned(task: Task, value: Any) -> Result | None:
    if value is None or isinstance(value, Result):
        return value
    return Result(uuid=task.uuid, retval=value if isinstance(value, dict) else {"value": value})
