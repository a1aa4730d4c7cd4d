"""TelemetrySender: tells what goes on in a worker, in ``{group}.telemetry``. A task never waits for it.

A thread looks at the running tasks ten times a second, takes what they have reported, and gives it to a producer of its
own. What tasks report is limited for each of them, and what a slow broker does not take is dropped and counted.
"""

import logging
import os
import platform
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from kser import headers
from kser.context import Control, Reports
from kser.errors import Error
from kser.loghandler import LogFields, fields_of
from kser.sequencing.itinerary import key_bytes
from kser.telemetry import (
    Running,
    Subject,
    TaskHeartbeat,
    TaskLog,
    TaskProgress,
    TaskStarted,
    Telemetry,
    WorkerState,
    telemetry_topic,
)
from kser.tracebacks import TracebackInfo
from kser.transport import OutRecord, Sink, Transport
from kser.version import kser_version
from kser.worker.dispatch import Item
from kser.worker.limits import ProgressLimiter, TokenBucket
from kser.worker.runner import Work

if TYPE_CHECKING:
    from kser.worker.worker import Worker

__all__ = ["TaskReports", "TelemetrySender"]

logger = logging.getLogger(__name__)

#: Seconds between two looks.
_TICK_S: Final = 0.1
#: A task is told to be running once it has been so for so long, in seconds: of short ones their end says all.
STARTED_S: Final = 0.1
#: Least seconds between two heartbeats of a task that are told, and two states of the worker.
_BEAT_S: Final = 5.0
_STATE_S: Final = 5.0
#: Log records a second, and at once: of one task, and of the worker.
_LOG_RATE: Final = 20.0
_LOG_BURST: Final = 200
_LOGS_RATE: Final = 1000.0
_LOGS_BURST: Final = 3000
#: That log records were dropped is told at most every so many seconds.
_TOLD_S: Final = 1.0
#: What waits for the producer, and what that may have in its hands.
_MAX_QUEUED: Final = 5000
_MAX_QUEUED_BYTES: Final = 8 * 1024 * 1024
_MAX_OPEN: Final = 2000
#: Longest wait for the last records at the end, in seconds.
_END_S: Final = 2.0
#: That records are dropped is logged at most every so many seconds.
_LOGGED_S: Final = 60.0
_MAX_RUNNING: Final = 100
#: Longest status line, longest name of a progress group, and deepest one.
_MAX_TEXT: Final = 1024
_MAX_NAME: Final = 200
_MAX_DEPTH: Final = 20


class TaskReports:
    """What one execution tells of itself. Implements kser.context.Reports."""

    def __init__(self, sender: "TelemetrySender", work: Work, control: Control) -> None:
        self.subject = _subject(work, control)
        self.ended = False
        self._sender = sender
        self._control = control
        self._lock = threading.Lock()
        self._progress: ProgressLimiter[TaskProgress] = ProgressLimiter()
        self._logs = TokenBucket(_LOG_RATE, _LOG_BURST)
        #: Log records that were dropped and not told of, and when that was done last.
        self._dropped = 0
        self._dropped_told = float("-inf")
        self._n = 0
        self._started = False
        self._beat = 0.0

    # -- from the task's threads -------------------------------------------------------------------------------------

    def progress(self, group: tuple[str, ...], current: int, total: int, status_line: str) -> None:
        """See Reports."""
        group = tuple(name[:_MAX_NAME] for name in group[:_MAX_DEPTH])
        with self._lock:
            if self.ended:
                return
            self._n += 1
            report = TaskProgress(
                task=self.subject,
                worker=self._sender.worker,
                at=_now_ms(),
                group=group,
                current=current,
                total=total,
                status_line=status_line[:_MAX_TEXT],
                n=self._n,
            )
            taken = self._progress.offer(group, report)
        if not taken:
            self._sender.count("progress")

    def log(self, record: logging.LogRecord) -> None:
        """See Reports."""
        if self._may_log():
            self._tell(fields_of(record))

    def log_fields(self, fields: LogFields) -> None:
        """Take a log record that another process has made plain data of."""
        if self._may_log():
            self._tell(fields)

    def end(self) -> None:
        """See Reports."""
        with self._lock:
            self.ended = True

    def _may_log(self) -> bool:
        with self._lock:
            if self.ended:
                return False
            if self._logs.take(time.monotonic()) and self._sender.may_log():
                return True
            self._dropped += 1
        self._sender.count("log")
        return False

    def _tell(self, fields: LogFields, dropped: int = 0) -> None:
        trace = fields["trace"]
        with self._lock:
            self._n += 1
            n = self._n
        self._sender.put(
            TaskLog(
                task=self.subject,
                worker=self._sender.worker,
                at=fields["at"],
                level=fields["level"],
                logger=fields["logger"],
                message=fields["message"],
                where=fields["where"],
                trace=TracebackInfo.load(trace) if trace is not None else None,
                dropped=dropped,
                n=n,
            )
        )

    # -- from the sender's thread ------------------------------------------------------------------------------------

    def running(self, now: float) -> None:
        """It is running: tell of its start, once, and of its heartbeats."""
        at, worker = _now_ms(), self._sender.worker
        if not self._started:
            self._started = True
            self._sender.put(TaskStarted(task=self.subject, worker=worker, at=at))
        alive = self._control.alive
        if alive > self._beat and now - self._beat >= _BEAT_S:
            self._beat = now
            self._sender.put(
                TaskHeartbeat(task=self.subject, worker=worker, at=at, beat=at - int((now - alive) * 1000))
            )

    def collect(self, now: float) -> bool:
        """Tell what is due; False when nothing more comes of it."""
        with self._lock:
            ended = self.ended
            reports = self._progress.rest() if ended else self._progress.due(now) if self._progress.waiting else []
            dropped = 0
            if self._dropped and (ended or now - self._dropped_told >= _TOLD_S):
                dropped, self._dropped, self._dropped_told = self._dropped, 0, now
        for report in reports:
            self._sender.put(report)
        if dropped:
            text = f"{dropped} log record(s) dropped: a task may tell {_LOG_RATE:g} a second, {_LOG_BURST} at once"
            level, name = logging.WARNING, "kser.telemetry"
            self._tell(
                {"level": level, "logger": name, "message": text, "where": "", "at": _now_ms(), "trace": None}, dropped
            )
        return not ended


class TelemetrySender:
    """Sends the telemetry of one worker.

    Args:
        worker: whose.
        transport: the broker.

    Thread rule: open(), put() and count() from any thread, the rest from the one that runs the worker.
    """

    def __init__(self, worker: "Worker", transport: Transport) -> None:
        self.worker = worker.name
        #: What was not sent: "log" over the limit of its task, "progress" of too many groups, "record" for which the
        #: broker was too slow.
        self.dropped: Counter[str] = Counter()
        #: Gives what runs, each with when it began (time.monotonic()).
        self.executions: Callable[[], Iterable[tuple[Item, float]]] = tuple
        self._of = worker
        self._transport = transport
        self._topic = telemetry_topic(worker.group)
        self._headers = ((headers.GROUP, worker.group.encode()),)
        self._reports: set[TaskReports] = set()
        self._logs = TokenBucket(_LOGS_RATE, _LOGS_BURST)
        self._queue: deque[OutRecord] = deque()
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._sink: Sink | None = None
        self._said = float("-inf")
        self._told = ""
        self._state_due = 0.0
        self._started = _now_ms()
        self._life = f"{time.time_ns():x}"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kser-telemetry", daemon=True)

    def start(self) -> None:
        """Begin. Once only."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Tell what is left, and that the worker has stopped; False when that takes longer than ``timeout_s``."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- from any thread ---------------------------------------------------------------------------------------------

    def open(self, work: Work, control: Control) -> Reports:
        """What takes the reports of an execution."""
        reports = TaskReports(self, work, control)
        with self._lock:
            self._reports.add(reports)
        return reports

    def may_log(self) -> bool:
        """Whether the tasks of this worker may tell one more log record."""
        with self._lock:
            return self._logs.take(time.monotonic())

    def put(self, record: Telemetry) -> None:
        """Have a record sent soon; dropped and counted when too many wait."""
        value = record.to_bytes()
        with self._lock:
            if len(self._queue) < _MAX_QUEUED and self._queued_bytes + len(value) <= _MAX_QUEUED_BYTES:
                self._queue.append(OutRecord(self._topic, key_bytes(record.key), value, self._headers))
                self._queued_bytes += len(value)
                return
        self.count("record")

    def count(self, what: str) -> None:
        """Count what is not sent."""
        with self._lock:
            self.dropped[what] += 1

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._guarded(self._tick)
            if self._stopping.wait(_TICK_S):
                break
        self._guarded(self._end)
        self._guarded(self._close)

    def _guarded(self, step: Callable[[], object]) -> None:
        """Do a step; what goes wrong is logged, and is no reason to end."""
        try:
            step()
        except Exception as exc:
            now = time.monotonic()
            if now - self._said >= _LOGGED_S:
                self._said = now
                logger.warning("Telemetry of %s is not told: %s", self.worker, exc, exc_info=not isinstance(exc, Error))

    def _tick(self) -> None:
        now = time.monotonic()
        self._look(now)
        self._state(now)
        self._pump()

    def _end(self) -> None:
        self._look(time.monotonic())
        self.put(self._state_record("stopped"))
        end = time.monotonic() + _END_S
        while self._queue and time.monotonic() < end:
            self._pump()
            if self._queue and self._sink is not None:
                self._sink.flush(0.05)
        if self._sink is not None:
            self._sink.flush(max(end - time.monotonic(), 0))
            self._sink.drop_queued()

    def _close(self) -> None:
        if self._sink is not None:
            self._sink.close(_END_S)

    def _look(self, now: float) -> None:
        """What runs, and what was reported."""
        for item, since in self.executions():
            if now - since >= STARTED_S and item.control is not None and (reports := item.control.reports) is not None:
                reports.running(now)
        with self._lock:
            open_ = list(self._reports)
        over = [reports for reports in open_ if not reports.collect(now)]
        if over:
            with self._lock:
                self._reports.difference_update(over)

    def _state(self, now: float) -> None:
        state = self._of.state
        if state != self._told or now >= self._state_due:
            self._told, self._state_due = state, now + _STATE_S
            self.put(self._state_record(state))

    def _state_record(self, state: str) -> WorkerState:
        worker, status = self._of, self._of.status()
        longest = sorted(status.running, key=lambda task: -task.seconds)[:_MAX_RUNNING]
        with self._lock:
            dropped = {"log": 0, "record": 0, **self.dropped}
        return WorkerState(
            worker=self.worker,
            at=_now_ms(),
            group=worker.group,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=kser_version(),
            python=platform.python_version(),
            life=self._life,
            started=self._started,
            interval_s=_STATE_S,
            state=state,
            topics=worker.topics,
            partitions=status.assigned if state != "stopped" else {},
            delivery=worker.delivery or "",
            concurrency=worker.concurrency,
            running=[
                Running(
                    uuid=task.uuid,
                    entrypoint=task.entrypoint,
                    seconds=round(max(task.seconds, 0), 3),
                    heartbeat_s_ago=None if task.heartbeat_s_ago is None else round(task.heartbeat_s_ago, 3),
                )
                for task in longest
            ],
            running_count=len(status.running),
            in_flight=status.in_flight,
            unsettled=status.unsettled,
            free_executors=status.free_executors,
            reasons=status.reasons,
            stats=dict(worker.stats),
            dropped=dropped,
        )

    def _pump(self) -> None:
        """Give the producer what it can take."""
        if self._sink is None:
            self._sink = self._transport.sink(failures_only=True)
        room = _MAX_OPEN - self._sink.flush(0)
        while room > 0 and self._queue:
            with self._lock:
                out = self._queue.popleft()
                self._queued_bytes -= len(out.value or b"")
            room -= 1
            try:
                self._sink.produce(out, self._delivered)
            except Error as exc:
                self._delivered(exc)

    def _delivered(self, error: Error | None) -> None:
        if error is None:
            return
        self.count("record")
        now = time.monotonic()
        if now - self._said >= _LOGGED_S:
            self._said = now
            logger.warning("Telemetry of %s is dropped: %s", self.worker, error.message)


def _subject(work: Work, control: Control) -> Subject:
    operation = parent = None
    name = ""
    run, position = work.subject[1], 0
    if work.plain is not None:
        root = work.plain["ops"][0]
        operation, name, parent = root["uuid"], root["entrypoint"], work.plain["ops"][-1]["uuid"]
        position = work.plain["position"]
    elif (itinerary := work.itinerary) is not None:
        position = itinerary.position
        if itinerary.frames:
            operation, parent = itinerary.root.uuid, itinerary.innermost.uuid
            name = itinerary.root.entrypoint
    return Subject(
        uuid=work.kmsg.uuid,
        entrypoint=work.kmsg.entrypoint,
        operation=operation,
        operation_entrypoint=name,
        parent=parent,
        run=run,
        position=position,
        attempt=work.attempt,
        began=control.began,
    )


def _now_ms() -> int:
    return int(time.time() * 1000)
