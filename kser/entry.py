"""Entrypoint: one unit of work, from its message to its Result."""

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

from kser import context, errors, eventloop, results
from kser.context import new_uuid
from kser.errors import InternalError, TaskTimeoutError, ValidationError
from kser.masking import mask, mask_text
from kser.progress import check_progress, parse_group
from kser.results import Result
from kser.retry import Retry
from kser.schemas import Message
from kser.tracebacks import TracebackInfo, log_raised

__all__ = ["Entrypoint", "Finder"]

logger = logging.getLogger(__name__)


#: Gives the class registered under a name, or None.
Finder = Callable[[str], "type[Entrypoint] | None"]


def result_extra(result: Result) -> dict[str, Any]:
    """What a log record says of a Result: ``kresult``, and ``error`` when it failed with one. Secrets are masked."""
    shown = mask(results.dump(result))
    extra = {"kresult": shown}
    if not results.is_success(result) and isinstance(shown, dict) and isinstance(shown["retval"], dict):
        error = shown["retval"].get("error")
        if error is not None:
            extra["error"] = error
    return extra


class EntrypointMeta(type):
    """Gives every entrypoint class its ``path``, and notices when a class is changed."""

    #: What was found out about classes. Changing one of them puts an empty mapping in its place, so that what somebody
    #: finds out meanwhile, about a class as it was, ends up where nobody looks any more.
    facts: ClassVar[dict[type, Any]] = {}

    def __setattr__(cls, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        EntrypointMeta.facts = {}

    def __delattr__(cls, name: str) -> None:
        super().__delattr__(name)
        EntrypointMeta.facts = {}

    @property
    def path(cls) -> str:
        """Name of the class in messages: ``module.Class``, or the ``name=`` it was subscribed with."""
        return wire_name(cls)

    def directly_follows(cls, *bases: type) -> bool:
        """Whether these come one after the other when an attribute of ``cls`` is looked for, with nobody's between."""
        order = cls.__mro__
        at = order.index(bases[0])
        return order[at : at + len(bases)] == bases


def wire_name(cls: type) -> str:
    """Name of an entrypoint class in messages, as ``cls.path`` gives it."""
    name: str | None = cls.__dict__.get("WIRE_NAME")
    return name or f"{cls.__module__}.{cls.__name__}"


def set_up(
    task: "Entrypoint",
    uuid: str | None,
    params: dict[str, Any] | None,
    result: Result | None,
    metadata: dict[str, Any] | None,
) -> None:
    """What Entrypoint.__init__() does; for the constructors that come before it, when nobody's is between."""
    task.uuid = str(uuid) if uuid else new_uuid()
    task.params = params or {}
    task.metadata = metadata or {}
    if result is not None:
        task._result = result
    try:
        task.postinit()
    except Exception as exc:  # noqa: BLE001 - user code: told now, and again by each execute()
        task._broken = task._finish(results.from_exception(exc, task.uuid))
        if context.current_control() is not None:
            task._trace_back(exc)


class Entrypoint(metaclass=EntrypointMeta):
    """One unit of work. Write ``run()``; the rest of the methods named below are hooks that may be overridden.

    One execution calls prerun() -> run() -> postrun(result) -> onsuccess(result) or onerror(result), in this order.

    Args:
        uuid: identifier; default a random one (on a worker one that a redelivery makes again).
        params: JSON object of parameters.
        result: Result forwarded from the task before.
        metadata: JSON object, the context of the task.
    """

    #: Names that must be in ``params``; None is a value.
    REQUIRED_FIELDS: ClassVar[Sequence[str]] = ()
    #: Name in messages when it is not ``module.Class``. Belongs to the class itself, not to its subclasses.
    WIRE_NAME: ClassVar[str | None] = None

    #: Seconds one execution may take on a worker; None: as long as it takes. An isolated task is killed, any other one
    #: sees ``aborted``; it fails either way.
    timeout: ClassVar[float | None] = None
    #: How many of this class a worker runs side by side; None: as many as it can.
    limit: ClassVar[int | None] = None
    #: True: run in a child process of the worker, beside the GIL and to be killed when it must end.
    isolate: ClassVar[bool] = False
    #: Whether and when a worker tries it again after it failed; None: never.
    retry: ClassVar[Retry | None] = None
    #: What a long wait for the next attempt means for later messages of the same key: "tier": they go first. "strict":
    #: they wait.
    order: ClassVar[Literal["tier", "strict"]] = "tier"

    #: What the worker that runs this task tells it, and the other way round.
    _control: context.Control | None = None

    #: For the lines of an execution, and for those of log().
    _logger: ClassVar[logging.Logger] = logger
    _message_logger: ClassVar[logging.Logger] = logger

    uuid: str
    params: dict[str, Any]
    metadata: dict[str, Any]
    #: What an object starts with; it gets its own when there is something to say.
    _result: Result | None = None
    _broken: Result | None = None
    #: On a worker: where the exception came from that its last execution ended with.
    _trace: TracebackInfo | None = None

    def __init__(
        self,
        uuid: str | None = None,
        params: dict[str, Any] | None = None,
        result: Result | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        set_up(self, uuid, params, result, metadata)

    @property
    def result(self) -> Result:
        """Result forwarded from the task before; after the execution, the one it gave."""
        if self._result is None:
            self._result = Result(uuid=self.uuid)
        return self._result

    @result.setter
    def result(self, result: Result) -> None:
        self._result = result

    @property
    def path(self) -> str:
        """Name of this task's class in messages."""
        return wire_name(type(self))

    # -- on a worker -------------------------------------------------------------------------------------------------

    @property
    def attempt(self) -> int:
        """Which try this is of the same message, from 1. Information only: whoever deduplicates does it by ``uuid``."""
        return self._control.attempt if self._control is not None else 1

    @property
    def aborted(self) -> str | None:
        """Why this execution should end now, else None. A long run() looks at it between its steps and returns.

        "aborted": somebody aborted its operation, what it gives does not count. "timeout": over its ``timeout``, it
        fails whatever it returns. "lost": the partition went to another worker,
        which runs the task again; what this execution gives is dropped. "stopping": the worker ends.
        """
        return self._control.aborted if self._control is not None else None

    def heartbeat(self) -> bool:
        """Tell that a long run() is alive, for whoever looks at the worker. False once it should end (``aborted``)."""
        if self._control is not None:
            self._control.beat()
        return self.aborted is None

    def report_progress(
        self, group_name: "str | Iterable[str] | None", current: int, total: int, status_line: str = ""
    ) -> None:
        """Tell how far a long run() is, for whoever looks on; see kser.progress.report_progress().

        Outside of a worker nobody does, and nothing happens. Raises TypeError as that does.
        """
        check_progress(current, total)
        group = parse_group(group_name)
        if self._control is not None and (reports := self._control.reports) is not None:
            told = mask_text(str.__str__(str(status_line)))
            reports.progress(tuple(map(mask_text, group)), int(current), int(total), told)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def postinit(self) -> None:
        """Called once, when the object is made. If it raises, the task is failed and run() is never called."""

    def check_required_params(self) -> None:
        """Raise ValidationError for the first of REQUIRED_FIELDS that ``params`` does not have."""
        for name in self.REQUIRED_FIELDS:
            if name not in self.params:
                raise ValidationError(f"Missing parameter: {name}", extra={"uuid": self.uuid, "parameter": name})

    def prerun(self) -> Any:
        """Called before run(), once the required parameters are there. What it returns is ignored."""

    def run(self) -> Any:
        """The work: gives a Result, or None for a success that forwards what came. May be ``async def``."""
        raise errors.NotImplemented(f"Task '{self.path}' not implemented", extra={"uuid": self.uuid})

    def postrun(self, result: Result) -> Result | None:
        """Called after run(), also when it raised (then with the failed Result, which it cannot turn into a success).

        Gives the Result to carry on; None keeps ``result``.
        """
        return result

    def onsuccess(self, result: Result) -> Result | None:
        """Called at the end of a successful execution. Gives the Result to carry on; raising fails the task."""
        return result

    def onerror(self, result: Result) -> Result | None:
        """Called at the end of a failed execution. Gives the Result to carry on."""
        return result

    def on_cancel(self) -> None:
        """Called while run() is at work and should end: its operation was aborted, or it is over its ``timeout``.

        In another thread; end there what run() has started. An isolated task is not asked, its processes are ended.
        """

    # -- execution ---------------------------------------------------------------------------------------------------

    def execute(self, result: Result | None = None) -> Result:
        """Run the task and give its Result. Never raises an Exception: one becomes a failed Result, through onerror().

        Args:
            result: Result forwarded from the task before, merged over the one the task has.
        """
        try:
            return self.unsafe_execute(result)
        except Exception as exc:  # noqa: BLE001 - the promise of this method
            return self._finish(results.from_exception(exc, self.uuid), exc)

    def unsafe_execute(self, result: Result | None = None) -> Result:
        """Like execute(), but what user code raises is raised."""
        return self._execute(result, self._perform)

    def _execute(self, result: Result | None, perform: Callable[[], Result]) -> Result:
        if self._broken is not None:
            return self._broken
        if result is not None:
            self.result = results.merge(self.result, result, self.uuid)
        token = context._task.set(self)
        try:
            return self._finish(perform())
        except Exception as exc:
            self._mark(results.from_exception(exc, self.uuid))
            raise
        finally:
            context._task.reset(token)

    def _perform(self) -> Result:
        """Prerun, run, postrun; the Result merged over the forwarded one."""
        self._prerun()
        forwarded = self.result
        try:
            ran = self._as_result(self._run(), "run")
        except Exception as exc:  # noqa: BLE001 - raised again
            failure = self._overran(exc) or exc
            self._postrun_of_failure(results.from_exception(failure, self.uuid))
            raise failure from failure.__cause__
        if self._control is not None and (late := self._overran(None)) is not None:
            self._postrun_of_failure(results.from_exception(late, self.uuid))  # what it still gave came too late
            raise late
        ran = self._postrun(ran if ran is not None else Result(uuid=self.uuid))
        return results.merge(forwarded, ran, self.uuid)

    def _overran(self, cause: Exception | None) -> TaskTimeoutError | None:
        """The failure of a run that its worker has told to end for its timeout; None when it has not."""
        if self._control is None or self._control.aborted != "timeout":
            return None
        failure = TaskTimeoutError(
            f"{self.path}[{self.uuid}] took longer than its timeout of {self.timeout:g} s",
            extra={"uuid": self.uuid, "entrypoint": self.path, "timeout": self.timeout},
        )
        failure.__cause__ = cause
        return failure

    def _prerun(self) -> None:
        self._debug("PreRun")
        self.check_required_params()
        self.prerun()

    def _run(self) -> Any:
        self._debug("Run")
        value = self.run()
        if inspect.iscoroutine(value):
            return eventloop.run(value)
        return value

    def _postrun(self, result: Result) -> Result:
        self._debug("PostRun")
        return self._hooked("postrun", result)

    def _postrun_of_failure(self, failure: Result) -> None:
        try:
            self._postrun(failure)
        except Exception:  # noqa: BLE001 - run() raised first, and that is the failure to tell
            log_raised(self._logger, "%s.PostRun: %s[%s] raised", type(self).__name__, self.path, self.uuid)

    def _finish(self, result: Result, cause: BaseException | None = None) -> Result:
        """Hooks, final status and log line of an execution that gave ``result``; the final Result.

        ``cause``: what was raised, if that is why it failed. A failure that is tried again is not final: no hook.
        """
        if cause is not None and self._control is not None:
            self._trace_back(cause)
        if self.retry is not None and self._tried_again(self.retry, result, cause):
            return result
        self._mark(result)
        if results.is_success(result):
            result = self._hooked("onsuccess", result)
            if not results.is_success(result):
                if self.retry is not None and self._tried_again(self.retry, result, None):
                    return result
                self._mark(result)
        else:
            try:
                result = self._hooked("onerror", result)
            except Exception:  # noqa: BLE001 - the failure that onerror() was called for stays the one to tell
                log_raised(self._logger, "%s.OnError: %s[%s] raised", type(self).__name__, self.path, self.uuid)
            if results.is_success(result):
                self._mark(result)
        self.result = result
        self._log_end(result)
        return result

    def _trace_back(self, exc: BaseException) -> None:
        """Note where an exception came from, for the history."""
        if (delivery := context.current_delivery()) is not None and not delivery.traced:
            return
        trace = TracebackInfo.from_exception(exc)
        self._trace = trace if trace.tells else None

    def _tried_again(self, retry: Retry, result: Result, cause: BaseException | None) -> bool:
        """Whether the worker that runs this will try it again; it is told when."""
        control = self._control
        if control is None or results.is_success(result) or control.aborted not in (None, "timeout"):
            return False
        delay_s = retry.delay_s(control.attempt, cause, self.uuid)
        if delay_s is None:
            return False
        control.again_s = delay_s
        self._set_aside()
        if self._logger.isEnabledFor(logging.WARNING):
            self._logger.warning(
                "%s.Retry: %s[%s]: attempt %d of %d failed, the next one in %.3g s: %s",
                type(self).__name__,
                self.path,
                self.uuid,
                control.attempt,
                retry.attempts,
                delay_s,
                result.stderr,
                extra=self._extra(result),
            )
        return True

    def _set_aside(self) -> None:
        """Note that it will be tried again. An entrypoint has no status; a Task has."""

    def _mark(self, result: Result) -> None:
        """Note how the execution ended. An entrypoint has no status; a Task has."""

    def _hooked(self, hook: str, result: Result) -> Result:
        given = self._as_result(getattr(self, hook)(result), hook)
        return result if given is None else given

    def _as_result(self, value: Any, method: str) -> Result | None:
        if value is None or isinstance(value, Result):
            return value
        raise InternalError(
            f"{method}() of {self.path} returned a {type(value).__name__}: return a Result, or None",
            extra={"uuid": self.uuid, "type": type(value).__name__},
        )

    # -- messages ----------------------------------------------------------------------------------------------------

    def to_Message(self, result: Result | None = None) -> Message:  # noqa: N802 - the published name
        """The message that names this task, with ``result`` (default: the task's own)."""
        return Message(self.uuid, self.path, self.params, self._result if result is None else result, self.metadata)

    @classmethod
    def from_Message(cls, kmsg: Message) -> Self:  # noqa: N802 - the published name
        """The task that ``kmsg`` names, to be executed."""
        return cls(uuid=kmsg.uuid, params=kmsg.params, result=kmsg.result, metadata=kmsg.metadata)

    def restore(self, kmsg: Message, find: Finder) -> None:
        """Take over what else travels in the message. An Operation takes the children that came with it."""

    # -- logging -----------------------------------------------------------------------------------------------------

    def log(self, message: str, level: int = logging.INFO, *args: Any, **kwargs: Any) -> None:
        """Write one log record, prefixed with ``{Name}.{Status}: {path}[{uuid}]: ``.

        Args:
            message: text, with %-placeholders for ``args``.
            level: logging level.
            args: log record arguments.
            kwargs: log record keyword arguments: exc_info, extra, stack_info, stacklevel.
        """
        if not self._message_logger.isEnabledFor(level):
            return
        prefix = f"{type(self).__name__}.{self._label()}: {self.path}[{self.uuid}]: "
        if args:
            prefix = prefix.replace("%", "%%")
        kwargs["extra"] = self._extra() | {"klog": True} | (kwargs.get("extra") or {})
        kwargs.setdefault("stacklevel", 2)
        self._message_logger.log(level, f"{prefix}{message}", *args, **kwargs)

    def _label(self) -> str:
        return "MESSAGE"

    def _extra(self, result: Result | None = None) -> dict[str, Any]:
        extra: dict[str, Any] = {"kmsg": mask(self.to_Message().dump())}
        if result is not None:
            extra |= result_extra(result)
        return extra

    def _debug(self, step: str) -> None:
        if self._logger.isEnabledFor(logging.DEBUG):
            self._logger.debug("%s.%s: %s[%s]", type(self).__name__, step, self.path, self.uuid, extra=self._extra())

    def _log_end(self, result: Result) -> None:
        level, word = (logging.INFO, "Success") if results.is_success(result) else (logging.ERROR, "Failed")
        if self._logger.isEnabledFor(level):
            self._logger.log(
                level,
                "%s.%s: %s[%s]: %s",
                type(self).__name__,
                word,
                self.path,
                self.uuid,
                result,
                extra=self._extra(result),
            )
