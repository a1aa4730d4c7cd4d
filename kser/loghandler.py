"""JobControlLogHandler: what the code of a running task logs becomes a part of its history."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from kser import context
from kser.masking import mask_text
from kser.tracebacks import TracebackInfo, hide, secret_values

__all__ = ["JobControlLogHandler", "LogFields", "fields_of", "installed"]

#: What is kept of one record: its message in characters, and its traceback in bytes.
MAX_MESSAGE: Final = 8192
MAX_TRACE_BYTES: Final = 32 * 1024

#: level, logger, message, where, at and trace of a log record; plain data.
LogFields = dict[str, Any]


class JobControlLogHandler(logging.Handler):
    """Gives what is logged while a task runs to whoever keeps its history: on a worker, its telemetry.

    A worker puts one on the root logger while it runs, and it gets what the levels of the loggers let pass: no level is
    changed. Outside of an execution it does nothing. kser's own lines are no part of a task's log, but those of
    Task.log() are.

    Thread rule: has no state and takes no lock. It never blocks, and what goes wrong in it goes to logging's own
    handleError(), never to the task.
    """

    def createLock(self) -> None:  # noqa: N802 - the name that logging has
        """None: there is nothing to be protected, and two tasks need not wait for each other."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Take one record."""
        if record.name.startswith("kser.") and not getattr(record, "klog", False):
            return
        control = context.current_control()
        if control is None or getattr(_busy, "on", False):
            return
        _busy.on = True  # what is logged on the way, by a repr() say, does not come back here
        try:
            reports = control.reports
            if reports is not None:
                reports.log(record)
        except Exception:  # noqa: BLE001 - the task must not notice
            self.handleError(record)
        finally:
            _busy.on = False


_busy = threading.local()


def fields_of(record: logging.LogRecord) -> LogFields:
    """What is kept of a log record. Raises what its formatting raises."""
    message = record.getMessage()
    exc = record.exc_info[1] if record.exc_info else None
    if exc is not None:
        message = hide(message, secret_values(exc))
    if len(message) > MAX_MESSAGE:
        message = message[: MAX_MESSAGE - 3] + "..."
    trace = TracebackInfo.from_exception(exc).fitted(MAX_TRACE_BYTES).dump() if exc is not None else None
    return {
        "level": record.levelno,
        "logger": record.name,
        "message": mask_text(message)[:MAX_MESSAGE],
        "where": f"{record.filename}:{record.lineno} in {record.funcName}",
        "at": int(record.created * 1000),
        "trace": trace,
    }


@contextmanager
def installed() -> Iterator[None]:
    """Within the block a JobControlLogHandler is on the root logger: one, however many workers run here."""
    root = logging.getLogger()
    handler: JobControlLogHandler | None = None
    with _lock:
        if not any(isinstance(found, JobControlLogHandler) and found not in _ours for found in root.handlers):
            if not _ours:
                _ours.append(JobControlLogHandler())
                root.addHandler(_ours[0])
            handler = _ours[0]
            _users.append(handler)
    try:
        yield
    finally:
        with _lock:
            if handler is not None:
                _users.remove(handler)
                if not _users:
                    root.removeHandler(_ours.pop())


_lock = threading.Lock()
#: The handler that is on the root logger because of installed(), and it once more for each block.
_ours: list[JobControlLogHandler] = []
_users: list[JobControlLogHandler] = []
