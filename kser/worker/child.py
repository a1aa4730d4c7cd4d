"""The child process of an IsolatedPool: it loads the registry and runs one record after the other.

What it says to its parent and hears from it is in the docstring of kser.worker.pool.
"""

import atexit
import contextlib
import faulthandler
import logging
import marshal
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from kser import context, loading
from kser.context import Control
from kser.controller import Controller
from kser.errors import Error
from kser.loghandler import JobControlLogHandler, fields_of
from kser.transport import Record
from kser.worker.runner import Outcome, Runner

__all__ = [
    "ABORT",
    "BEAT",
    "DONE",
    "END",
    "FAULT",
    "HEAD",
    "LOG",
    "PROGRESS",
    "READY",
    "TOLD",
    "UNKNOWN",
    "UNLOADABLE",
    "Channel",
    "leave",
    "load",
    "main",
    "pack",
    "set_levels",
]

logger = logging.getLogger(__name__)

# What a child says, the first of a tuple.
READY: Final = "ready"
UNLOADABLE: Final = "unloadable"
DONE: Final = "done"
UNKNOWN: Final = "unknown"
FAULT: Final = "fault"
BEAT: Final = "beat"
PROGRESS: Final = "progress"
LOG: Final = "log"
#: What it says while a task runs.
TOLD: Final = frozenset({BEAT, PROGRESS, LOG})
# What it hears beside its records.
ABORT: Final = "abort"
END: Final = "end"

#: Heartbeats of a task go to the parent at most this often, in seconds: a loop may call heartbeat() at each step.
_BEAT_S: Final = 0.1
#: How long a SIGTERM waits for the parent's word that it was meant, in seconds.
_WORD_S: Final = 0.1
#: Bytes in front of each value, with its length.
HEAD: Final = 4


class Channel:
    """Plain values (what marshal knows) over a socket. send() from any thread, the rest from one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The socket's, -1 when it is closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket; again: nothing."""
        self._sock.close()

    def finish(self) -> None:
        """Tell the other side that nothing more comes."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def send(self, value: Any) -> None:
        """Send a value whole; blocks while the other side does not read. Raises OSError when it is gone."""
        frame = pack(value)
        with self._lock:
            self._sock.sendall(frame)

    def offer(self, frame: memoryview) -> memoryview:
        """Send what can be sent of a frame at once; the rest. Raises OSError when the other side is gone."""
        try:
            return frame[self._sock.send(frame, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return frame

    def receive(self) -> Any:
        """The next value; blocks. Raises EOFError when the other side is gone."""
        while (value := self._taken()) is None:
            self._fill(0)
        return value

    def arrived(self) -> Any:
        """The next value if it is here, else None. Raises EOFError when the other side is gone."""
        while (value := self._taken()) is None:
            try:
                self._fill(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
        return value

    def _fill(self, flags: int) -> None:
        try:
            data = self._sock.recv(65536, flags)
        except BlockingIOError:
            raise
        except OSError as exc:
            raise EOFError(str(exc)) from exc
        if not data:
            raise EOFError("closed")
        self._buffer += data

    def _taken(self) -> Any:
        buffer = self._buffer
        if len(buffer) < HEAD:
            return None
        end = HEAD + int.from_bytes(buffer[:HEAD], "big")
        if len(buffer) < end:
            return None
        value = marshal.loads(buffer[HEAD:end])  # noqa: S302 - the other side is this program
        del buffer[:end]
        return value


def pack(value: Any) -> bytes:
    """The frame of a value. Raises ValueError for one that is not plain."""
    data = marshal.dumps(value)
    return len(data).to_bytes(HEAD, "big") + data


class _Control(Control):
    """Of the task that runs here: its heartbeats go to the parent."""

    __slots__ = ("_channel", "_number")

    def __init__(self, attempt: int, number: int, channel: Channel, *, reports: bool = False) -> None:
        super().__init__(attempt, (lambda _: _Reports(number, channel)) if reports else None)
        self._number = number
        self._channel = channel

    def beat(self) -> None:
        now = time.monotonic()
        if now - self.alive >= _BEAT_S:
            self.alive = now
            self._channel.send((BEAT, self._number))


class _Reports:
    """Gives the parent what the task that runs here tells; the parent limits it. Implements kser.context.Reports."""

    def __init__(self, number: int, channel: Channel) -> None:
        self._number = number
        self._channel = channel
        self._ended = False

    def progress(self, group: tuple[str, ...], current: int, total: int, status_line: str) -> None:
        self._send((PROGRESS, self._number, group, current, total, status_line))

    def log(self, record: logging.LogRecord) -> None:
        self._send((LOG, self._number, fields_of(record)))

    def end(self) -> None:
        self._ended = True

    def _send(self, said: tuple[Any, ...]) -> None:
        if not self._ended:
            with contextlib.suppress(OSError):  # the parent is gone, and with it this process
                self._channel.send(said)


class _Forwarding(logging.Handler):
    """Gives every log line to the parent, whose handlers write it."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = dict(record.__dict__)
            fields["msg"], fields["args"] = record.getMessage(), None
            if record.exc_info:
                fields["exc_text"] = record.exc_text or self._formatter.formatException(record.exc_info)
                fields["exc_info"] = None
            try:
                self._channel.send(fields)
            except ValueError:  # somebody's own objects in ``extra``
                self._channel.send({name: _plain(value) for name, value in fields.items()})
        except OSError:
            pass  # the parent is gone, and with it this process
        except Exception:  # noqa: BLE001 - what logging does with a line that cannot be written
            self.handleError(record)


def _plain(value: Any) -> Any:
    try:
        marshal.dumps(value)
    except ValueError:
        return repr(value)
    return value


class _Child:
    """This process.

    Thread rule: records run in the thread that serves, the main one but for scripts that start their worker in
    another; a thread of its own hears what the parent says meanwhile.
    """

    def __init__(self, work: Channel, control: Channel, orders: dict[str, Any]) -> None:
        self._work = work
        self._control = control
        self._orders = orders
        self._pid = os.getpid()
        self._serving = threading.Lock()
        #: Number and control of the record that runs, and what the parent has said last of one.
        self._running: tuple[int, _Control] | None = None
        self._aborted: tuple[int, str] = (0, "")
        self._ending = False

    # -- beside the tasks --------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Hear what the parent says; end with it."""
        threading.Thread(target=self._listen, name="kser-parent", daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                said, number, reason = self._control.receive()
            except EOFError:
                _end_group()
            if said == END:
                self._ending = True
            else:
                self._aborted = number, reason
                self._tell(self._running)

    def _tell(self, running: tuple[int, _Control] | None) -> None:
        """Let a record know of its end, whichever of the two came first."""
        number, reason = self._aborted
        if running is None or running[0] != number:
            return
        running[1].aborted = reason
        cancel = running[1].cancel
        if cancel is not None:
            cancel()

    def terminated(self, number: int, frame: Any) -> None:  # noqa: ARG002 - the interface of signal handlers
        """Handler of SIGTERM, which ends this process only when the parent means it.

        Whoever stops a service signals all of its processes (systemd does): the parent then decides what may end.
        """
        until = time.monotonic() + _WORD_S
        while not self._ending and time.monotonic() < until:
            time.sleep(0.005)
        if self._ending:
            os._exit(128 + number)

    def forked(self) -> None:
        """In a process that a task made with os.fork(), as multiprocessing does: signals mean there what they mean."""
        for number, handler in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            if signal.getsignal(number) in (self.terminated, _ignore):
                signal.signal(number, handler)

    # -- records -----------------------------------------------------------------------------------------------------

    def start(self) -> NoReturn:
        """Load the registry, then serve."""
        loading.stop_at_guard(self.serve)
        self.serve()

    def serve(self) -> NoReturn:
        """Run what the parent sends, until it sends no more.

        This is called again by a script that is being imported and has come to the run() of its worker.
        """
        try:
            runner = self._load()
        except Error as exc:
            self._refuse(str(exc.message))
        except Exception as exc:  # noqa: BLE001 - user code
            self._refuse(f"{loading.where(exc)}: {type(exc).__name__}: {exc}")
        if not self._serving.acquire(blocking=False):
            threading.Event().wait()  # another thread serves already, and ends the process when it is done
        loading.stop_at_guard(None)
        self._work.send((READY,))
        while True:
            try:
                number, fields = self._work.receive()
            except EOFError:
                leave(0)
            answer = self._answer(runner, number, Record(*fields))
            if os.getpid() != self._pid:
                os._exit(0)  # a copy that the task made with os.fork() and that came back from there
            self._work.send(answer)

    def _load(self) -> Runner:
        return Runner(load(self._orders), **self._orders["runner"])

    def _refuse(self, why: str) -> NoReturn:
        self._work.send((UNLOADABLE, why))
        leave(1)

    def _answer(self, runner: Runner, number: int, record: Record) -> tuple[Any, ...]:
        try:
            work = runner.open(record)
            if isinstance(work, Outcome):
                outcome = work
            elif work.cls is None and (work.itinerary is None or work.itinerary.end is None):
                return UNKNOWN, number, work.kmsg.entrypoint
            else:
                control = _Control(work.attempt, number, self._work, reports=self._orders["reports"])
                self._running = running = (number, control)
                self._tell(running)
                with context.controlling(control):
                    outcome = runner.execute(work)
                control.end()
            return DONE, number, outcome.kind, outcome.ahead, [_fields(out) for out in outcome.records], outcome.again_s
        except Exception as exc:
            logger.exception("Record %s/%s/%s broke its process", record.topic, record.partition, record.offset)
            return FAULT, number, f"{type(exc).__name__}: {exc}"
        finally:
            self._running = None


def load(orders: Mapping[str, Any]) -> Controller | type[Controller]:
    """The controller that a process was told of, with all that its parent knows of it (pool.surroundings())."""
    controller = loading.load_controller(orders["location"])
    for module in orders["modules"]:
        loading.import_target(module)
    if orders["main"] is not None:
        loading.stand_in_for_main(orders["main"], controller)
    loading.answer_to(controller, orders["names"])
    return controller


def _fields(out: Any) -> tuple[Any, ...]:
    # A topic may come from a user's enumeration of them, which no other process has to know.
    return str.__str__(out.topic), out.key, out.value, out.headers, out.partition


def leave(code: int) -> NoReturn:
    """End this process. Not by an exception: a script that is being imported may catch it, and do who knows what."""
    try:
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)


def _end_group() -> NoReturn:
    """End this process and all that it has started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _die_with_parent(life: int) -> None:
    """Let the kernel kill this process group when the parent is gone, however it went.

    The parent holds the other end of the pipe. A thread could see it close as well, but not while a task keeps the GIL.
    """
    import fcntl  # here: Windows has none, and no child either

    if hasattr(fcntl, "F_SETSIG"):  # on Linux; elsewhere the thread has to do
        fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    hangup = select.poll()
    hangup.register(life, 0)
    if hangup.poll(0):  # it went before
        _end_group()


def _ignore(number: int, frame: Any) -> None:
    """Handler of a signal that means nothing here. Not SIG_IGN: what a task starts would inherit that."""


def set_levels(orders: Mapping[str, Any]) -> None:
    """Log what the parent would."""
    logging.getLogger().setLevel(orders["level"])
    logging.disable(orders["disabled"])
    for name, level in orders["levels"].items():
        logging.getLogger(name).setLevel(level)


def main() -> NoReturn:
    """Be a child, with the numbers of four descriptors as arguments: work, control, log lines, life."""
    work_fd, control_fd, logs_fd, life = map(int, sys.argv[1:5])
    signal.signal(signal.SIGINT, _ignore)
    signal.signal(signal.SIGTERM, _ignore)
    for fd in (work_fd, control_fd, logs_fd, life):
        os.set_inheritable(fd, False)
    _die_with_parent(life)
    work, control, logs = (Channel(socket.socket(fileno=fd)) for fd in (work_fd, control_fd, logs_fd))
    faulthandler.enable()
    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what a killed task printed is not lost
    try:
        orders = work.receive()
    except EOFError:
        os._exit(0)
    sys.argv[:], sys.path[:] = orders["argv"], orders["path"]
    logging.getLogger().addHandler(_Forwarding(logs))
    if orders["reports"]:
        logging.getLogger().addHandler(JobControlLogHandler())
    set_levels(orders)
    child = _Child(work, control, orders)
    child.listen()
    signal.signal(signal.SIGTERM, child.terminated)
    os.register_at_fork(after_in_child=child.forked)
    child.start()
