"""Child processes that run isolated tasks: to be killed when they must end, and CPU-bound beside the GIL.

A child is a new interpreter (never a fork: librdkafka has threads), started when there is no idle one, kept and used
again. It loads the registry from its MODULE_OR_FILE:NAME and runs one record at a time, all of it: hooks, consequences,
events. What comes back is the Outcome, which its parent settles like any other.

What the two say, each value marshalled with its length in front:

1. ``work``, a socket. Parent: its orders (where the registry is, Runner's arguments, sys.path, sys.argv, log levels).
   Child: ("ready",) or ("unloadable", why), and ends. Then for each record, parent: (number, the record's fields);
   child: any count of ("beat", number), ("progress", number, group, current, total, status line) and ("log", number,
   fields), then one of ("done", number, kind, ahead, records, again_s), ("unknown",
   number, name) for a class that only the parent has registered, ("fault", number, text) for an error that is no
   task's. The parent closes its side to end an idle child.
2. ``control``, a socket the child reads in a thread of its own, while a task runs. Parent: ("abort", number, reason),
   which is the task's ``aborted``; ("end", 0, ""), which says that the SIGTERM that follows is meant. Its end is the
   parent's: the child kills its process group.
3. ``logs``, a socket. Child: the fields of each log line, exceptions as text. The parent's handlers write it, so
   levels, formats and ``extra`` are those of the program; one thread for each child reads it.
4. ``life``, a pipe nothing is written to. When the parent ends, even by SIGKILL, the kernel sends SIGKILL to the
   child's process group (O_ASYNC on Linux), also while a task keeps the GIL.

stdout and stderr are the parent's, and carry nothing of this. A child leads a session of its own, so that a terminal's
Ctrl-C does not reach it; SIGINT it ignores, and SIGTERM unless its parent says it is meant. To kill it: ("end"),
SIGTERM to its process group, half a second later SIGKILL: what its task has started ends with it, unless that has made
itself a session of its own.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, Self

from kser import loading
from kser.context import Control
from kser.errors import (
    AbortedError,
    ConfigurationError,
    InternalError,
    TaskCrashedError,
    TaskTimeoutError,
    ValidationError,
)
from kser.loading import location_of
from kser.schemas import Message
from kser.transport import OutRecord, Record
from kser.worker import child as protocol
from kser.worker.child import Channel
from kser.worker.runner import Outcome
from kser.worker.telemetry import TaskReports

__all__ = ["IsolatedPool", "command", "location_of", "surroundings"]

logger = logging.getLogger(__name__)

#: How late an abort, a stop or the death of a child may be seen, in seconds.
_TURN_S: Final = 0.1
#: What a child gets between SIGTERM and SIGKILL, in seconds.
_TERM_S: Final = 0.5
#: Longest wait for the kernel to take away a process that was killed, in seconds.
_REAP_S: Final = 5.0
#: Processes that may die under a record before it begins in any of them.
_CHILDREN: Final = 3
#: Says where kser is before it is imported; the rest of the path comes with the orders.
_BOOT: Final = "import sys; sys.path.insert(0, sys.argv[-1]); from kser.worker.child import main; main()"


class IsolatedPool:
    """Child processes that run records.

    Args:
        location: ``MODULE_OR_FILE:NAME`` of the registry or controller.
        size: children that are kept. run() may be called by as many threads side by side.
        settings: of the children's Runner: its arguments after the controller, by name.
        reports: whether progress and log lines of tasks are wanted.
        grace_s: what a task that was told to end gets before it is killed, in seconds.
        load_limit_s: what a child gets to load the registry, in seconds.

    Raises ConfigurationError for values that cannot be. No process is started before the first run().

    Thread rule: all of it may be called from any thread.
    """

    def __init__(
        self,
        location: str,
        size: int,
        *,
        settings: Mapping[str, Any],
        reports: bool = False,
        grace_s: float = 2.0,
        load_limit_s: float = 60.0,
    ) -> None:
        loading.guard()
        if size < 1:
            raise ConfigurationError(f"size={size}: isolated tasks need at least 1 child process")
        if os.name != "posix":
            raise ConfigurationError("isolate=True needs POSIX (Linux, macOS): leave it out on this system")
        if not sys.executable:
            raise ConfigurationError("isolate=True needs a Python to start: sys.executable of this program is empty")
        self.size = size
        self._location = loading.absolute(location)
        self._orders = {"runner": dict(settings), "reports": reports}
        self._grace_s = grace_s
        self._load_limit_s = load_limit_s
        self._lock = threading.Lock()
        self._children: set[_Child] = set()
        self._idle: list[_Child] = []
        self._said: set[str] = set()
        #: When the budget of stop() ends; None while nobody has stopped it.
        self._stop_by: float | None = None

    def run(
        self,
        record: Record,
        timeout_s: float | None,
        aborted: Callable[[], str | None],
        control: Control | None = None,
    ) -> Outcome:
        """Run one record in a child and give its Outcome, without ``refused``: Runner.refused_for() makes that. Blocks.

        Args:
            record: what to run.
            timeout_s: seconds after which the child is killed, counted from when it takes the record; None: never.
            aborted: asked every 0.1 s. A reason is told to the task, which has ``grace_s`` to end; what it still gives
                counts. Then its child is killed.
            control: gets in this thread what the task tells: heartbeats, at most ten a second, progress and log lines.

        Raises, and in each case but the last two the child is gone and another will take its place:
            TaskTimeoutError: the time was up.
            AbortedError: killed after an abort (``extra["reason"]``), told before it began, or the pool was stopped.
            TaskCrashedError: the child died by itself.
            InternalError: something that is no task's fault failed in the child.
            ConfigurationError: a child cannot load the registry, or does not know the class.
        """
        reason = aborted()
        if reason is not None:
            raise _aborted(record, reason, "before it began")
        for _ in range(_CHILDREN):
            child = self._take(record, aborted)
            try:
                answer = self._exchange(child, record, timeout_s, aborted, control)
            except _NotBegunError:
                self._lost_idle(child)
                continue
            except BaseException:
                self._end(child)
                raise
            self._give_back(child)
            return self._outcome(record, answer)
        raise _crashed(record, "each process for it ended before it began; see the log")

    def stop(self, timeout_s: float) -> None:
        """End all children. What runs may end within ``timeout_s`` seconds, then it is killed. The pool is over."""
        end = time.monotonic() + timeout_s
        with self._lock:
            self._stop_by = end
            idle, self._idle = self._idle, []
        for child in idle:
            child.work.finish()
        for child in idle:
            child.wait_for_exit(max(end - time.monotonic(), 0))
            self._end(child)
        # The threads in run() see it themselves; the wait is for the time it takes them to kill.
        while self._children and time.monotonic() < end + 2 * _TERM_S:
            time.sleep(0.01)
        for child in tuple(self._children):
            self._end(child)

    def pids(self) -> list[int]:
        """Process ids of the children there are."""
        return sorted(child.process.pid for child in tuple(self._children))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop(5)

    # -- children ----------------------------------------------------------------------------------------------------

    def _take(self, record: Record, aborted: Callable[[], str | None]) -> "_Child":
        """A child that is ready."""
        while True:
            with self._lock:
                if self._stop_by is not None:
                    raise _aborted(record, "stopping", "before it began: the pool of processes was stopped")
                child = self._idle.pop() if self._idle else None
            if child is None:
                return self._start(record, aborted)
            if child.fit():
                return child
            self._lost_idle(child)

    def _start(self, record: Record, aborted: Callable[[], str | None]) -> "_Child":
        child = _Child()
        with self._lock:
            self._children.add(child)
        try:
            child.begin(self._orders | surroundings(self._location))
            self._await_ready(child, record, aborted)
        except BaseException:
            self._end(child)
            raise
        return child

    def _await_ready(self, child: "_Child", record: Record, aborted: Callable[[], str | None]) -> None:
        end = time.monotonic() + self._load_limit_s
        while time.monotonic() < end:
            reason = aborted() or ("stopping" if self._stop_by is not None else None)
            if reason is not None:
                raise _aborted(record, reason, "before it began")
            child.wait(_TURN_S)
            try:
                said = child.work.arrived()
            except EOFError:
                self._unloadable(f"its process ended while it was being loaded, {child.exit_text()}")
            if said is None:
                if child.dead():
                    self._unloadable(f"its process ended while it was being loaded, {child.exit_text()}")
            elif said[0] == protocol.READY:
                return
            else:
                self._unloadable(said[1])
        self._unloadable(
            f"it was not loaded within {self._load_limit_s:g} s: modules must not wait for anything while imported"
        )

    def _unloadable(self, why: str) -> NoReturn:
        text = f"A child process for isolated tasks cannot load {self._location}: {why}"
        if text not in self._said:
            self._said.add(text)
            logger.error("%s", text)
        raise ConfigurationError(text)

    def _lost_idle(self, child: "_Child") -> None:
        logger.warning("An idle process for isolated tasks ended: %s", child.exit_text())
        self._end(child)

    def _give_back(self, child: "_Child") -> None:
        with self._lock:
            if self._stop_by is None and len(self._idle) < self.size:
                self._idle.append(child)
                return
        child.work.finish()
        child.wait_for_exit(_TERM_S)
        self._end(child)

    def _end(self, child: "_Child") -> None:
        try:
            child.kill()
        finally:
            with self._lock:
                self._children.discard(child)

    # -- one record --------------------------------------------------------------------------------------------------

    def _exchange(
        self,
        child: "_Child",
        record: Record,
        timeout_s: float | None,
        aborted: Callable[[], str | None],
        control: Control | None,
    ) -> tuple[Any, ...]:
        """What the child answers."""
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        told: tuple[str, float] | None = None
        child.put(record)
        while True:
            child.wait(max(min(deadline - time.monotonic(), _TURN_S), 0))
            try:
                said = child.work.arrived()
            except EOFError as exc:
                if child.refused or isinstance(exc.__cause__, ConnectionResetError):
                    raise _NotBegunError from None
                raise _crashed(record, child.exit_text()) from None
            if said is not None:
                if said[1] != child.number:
                    continue  # a heartbeat of the record before, from a thread it left behind
                if said[0] not in protocol.TOLD:
                    return tuple(said)
                if control is not None:
                    _tell(control, said)
            elif child.dead():
                raise _crashed(record, child.exit_text())
            now = time.monotonic()
            if now >= deadline:
                raise _timed_out(record, timeout_s)
            if self._stop_by is not None and now >= self._stop_by:
                raise _aborted(record, "stopping", "and its process was killed")
            reason = aborted()
            if reason is None:
                continue
            if told is None:
                told = reason, now + self._grace_s
                child.tell(protocol.ABORT, child.number, reason)
            elif now >= told[1]:
                why = f"and did not end within {self._grace_s:g} s, so its process was killed"
                raise _aborted(record, told[0], why)

    def _outcome(self, record: Record, answer: tuple[Any, ...]) -> Outcome:
        if answer[0] == protocol.DONE:
            _, _, kind, ahead, records, again_s = answer
            return Outcome(kind, [OutRecord(*fields) for fields in records], ahead, again_s=again_s)
        if answer[0] == protocol.UNKNOWN:
            raise ConfigurationError(
                f"{answer[2]} is registered in this process, but not in a child that loads {self._location}: register "
                'it when its module is imported, not in a function and not below if __name__ == "__main__"',
                extra=_extra(record),
            )
        raise InternalError(f"{_what(record)} broke its child process: {answer[2]}", extra=_extra(record))


def _tell(control: Control, said: tuple[Any, ...]) -> None:
    """Pass on what a task has told while it runs."""
    if said[0] == protocol.BEAT:
        control.beat()
        return
    reports = control.reports
    if isinstance(reports, TaskReports):
        if said[0] == protocol.PROGRESS:
            _, _, group, current, total, status_line = said
            reports.progress(tuple(group), current, total, status_line)
        else:
            reports.log_fields(said[2])


def surroundings(location: str) -> dict[str, Any]:
    """What a child needs to import what this process did, and which log lines anybody wants."""
    needs = loading.needs_of(location)
    root = logging.getLogger()
    known = tuple(root.manager.loggerDict.items())
    levels = {name: found.level for name, found in known if isinstance(found, logging.Logger)}
    return {
        "location": location,
        "modules": needs.modules,
        "main": needs.main,
        "names": needs.names,
        "argv": [str(argument) for argument in sys.argv],
        "path": [entry for entry in sys.path if type(entry) is str],
        "level": root.level,
        "disabled": root.manager.disable,
        "logs": bool(root.handlers),
        "levels": {name: level for name, level in levels.items() if level != logging.NOTSET},
    }


class _Child:
    """One child process, as its parent sees it. One thread at a time, but for kill()."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(3)]
        life, self._life = os.pipe()
        theirs = [*(pair[1].fileno() for pair in pairs), life]
        try:
            self.process = subprocess.Popen(  # noqa: S603 - this very Python
                command(_BOOT, *map(str, theirs)),
                stdin=subprocess.DEVNULL,
                pass_fds=theirs,
                start_new_session=True,
            )
        except BaseException:
            for pair in pairs:
                pair[0].close()
            os.close(self._life)
            raise
        finally:
            for pair in pairs:
                pair[1].close()
            os.close(life)
        self.work, self.control, logs = (Channel(pair[0]) for pair in pairs)
        #: Of the record it has now.
        self.number = 0
        #: True once it took nothing any more.
        self.refused = False
        self._rest = memoryview(b"")
        self._poll = select.poll()
        self._poll.register(self.work, select.POLLIN)
        self._killing = threading.Lock()
        self._over = False
        self._logs = threading.Thread(target=_log, args=[logs], name="kser-child-logs", daemon=True)
        self._logs.start()
        _alive.add(self)

    # -- saying and hearing ------------------------------------------------------------------------------------------

    def begin(self, orders: dict[str, Any]) -> None:
        """Send the orders, the first that it hears."""
        self._put(orders)

    def put(self, record: Record) -> None:
        """Send a record; what does not fit yet goes during wait()."""
        self.number += 1
        fields = (*record[:5], [tuple(header) for header in record.headers], record.timestamp_ms)
        self._put((self.number, fields))

    def _put(self, value: Any) -> None:
        self._rest = memoryview(protocol.pack(value))
        self._offer()
        if self._rest:
            self._poll.modify(self.work, select.POLLIN | select.POLLOUT)

    def _offer(self) -> None:
        try:
            self._rest = self.work.offer(self._rest)
        except OSError:
            self._rest = memoryview(b"")  # it died; what arrives next says so too
            self.refused = True

    def wait(self, seconds: float) -> None:
        """Until something has come, at most ``seconds``."""
        if not self._poll.poll(seconds * 1000) or not self._rest:
            return
        self._offer()
        if not self._rest:
            self._poll.modify(self.work, select.POLLIN)

    def tell(self, *said: Any) -> None:
        """Say something beside the records. A child that does not listen is killed a little later anyway."""
        with contextlib.suppress(OSError):
            self.control.offer(memoryview(protocol.pack(said)))

    # -- how it does -------------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Whether an idle child can take a record."""
        try:
            while self.work.arrived() is not None:
                pass  # heartbeats of a thread that a task left behind
        except EOFError:
            return False
        return True

    def dead(self) -> bool:
        """Whether the process has ended. Its socket may stay open in what it has forked."""
        return self.process.poll() is not None

    def wait_for_exit(self, seconds: float) -> bool:
        """Whether it has ended by itself within ``seconds``."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def exit_text(self) -> str:
        """How the process ended; call it when it has, or has closed its socket."""
        if not self.wait_for_exit(_TERM_S):
            return "it closed the connection to its parent"
        code = self.process.returncode
        if code >= 0:
            return f"exit code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"killed by {name}{' (from outside, maybe for want of memory)' if name == 'SIGKILL' else ''}"

    # -- the end -----------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """End the process and its group, and forget it. From any thread; a second call waits for the first."""
        with self._killing:
            if self._over:
                return
            self._over = True
            end = time.monotonic() + _TERM_S
            self.tell(protocol.END, 0, "")
            self._signal(signal.SIGTERM)
            if not self.wait_for_exit(_TERM_S):
                self._signal(signal.SIGKILL)
                if not self.wait_for_exit(_REAP_S):
                    logger.error("Process %s does not end by SIGKILL: the kernel holds it", self.process.pid)
            # The number of a process group is not given to another one as long as a process is in it.
            while self._signal(0) and time.monotonic() < end:
                time.sleep(0.005)
            self._signal(signal.SIGKILL)
            self.close()
            self._logs.join(_TERM_S)

    def _signal(self, number: int) -> bool:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def close(self) -> None:
        """Let go of what connects the two; the child dies of it if it has not yet."""
        _alive.discard(self)
        self.work.close()
        self.control.close()
        if self._life >= 0:
            os.close(self._life)
            self._life = -1


#: Children whose life hangs on this process.
_alive: "weakref.WeakSet[_Child]" = weakref.WeakSet()


def _forked() -> None:
    """In a copy of this process: the children are not its own, and must not live as long as it does."""
    for child in tuple(_alive):
        child.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def command(boot: str, *arguments: str) -> list[str]:
    """Start this very Python with ``boot``, whose last argument is the folder that kser is in."""
    root = str(Path(loading.__file__).resolve().parent.parent)
    return [sys.executable, *_flags(), "-c", boot, *arguments, root]


def _flags() -> list[str]:
    """The options this Python was started with: -O, -W, -X and their like. multiprocessing asks for them this way."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return flags


def _log(channel: Channel) -> None:
    """Hand the log lines of a child to this process's handlers until it ends."""
    with contextlib.closing(channel):
        while True:
            try:
                record = logging.makeLogRecord(channel.receive())
            except EOFError:
                return
            log = logging.getLogger(record.name)
            try:
                if log.isEnabledFor(record.levelno):
                    log.handle(record)
            except Exception:  # noqa: BLE001 - somebody's filter; the child must not wait for a reader for ever
                traceback.print_exc()


# -- errors ----------------------------------------------------------------------------------------------------------


class _NotBegunError(Exception):
    """The child died before it read the record.

    Source: unix(7) sockets in Linux: the end of a process that has not read everything gives its peer ECONNRESET.
    """


def _message(record: Record) -> Message | None:
    try:
        return Message.loads(record.value or b"")
    except ValidationError:
        return None  # written by a TRANSPORT of the user's; the record says enough


def _what(record: Record) -> str:
    kmsg = _message(record)
    name = f"{kmsg.entrypoint}[{kmsg.uuid}]" if kmsg is not None else "A task"
    return f"{name} (record {record.topic}/{record.partition}/{record.offset})"


def _extra(record: Record, **more: Any) -> dict[str, Any]:
    kmsg = _message(record)
    named = {"uuid": kmsg.uuid, "entrypoint": kmsg.entrypoint} if kmsg is not None else {}
    return {**named, "topic": record.topic, "partition": record.partition, "offset": record.offset, **more}


def _timed_out(record: Record, timeout_s: float | None) -> TaskTimeoutError:
    return TaskTimeoutError(
        f"{_what(record)} took longer than its timeout of {timeout_s:g} s: its process was killed",
        extra=_extra(record, timeout=timeout_s),
    )


def _aborted(record: Record, reason: str, how: str) -> AbortedError:
    return AbortedError(f"{_what(record)} was told to end ({reason}) {how}", extra=_extra(record, reason=reason))


def _crashed(record: Record, how: str) -> TaskCrashedError:
    return TaskCrashedError(f"{_what(record)} ended its process: {how}", extra=_extra(record))
