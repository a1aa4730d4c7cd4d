"""ControlWatch: what people told this group, as its worker knows it: what is aborted, what is paused.

A thread reads `{group}.control` from its start and goes on reading. Everything that was there when the thread began is
known when wait_ready() gives True; what comes later is known as soon as it is fetched. Looking something up is a look
into a dict or a set: no call here asks the broker.

Aborts hold for ``keep_s``. Those that are older are forgotten by each worker, by its own clock, and taken out of the
topic by whichever comes to it first: by age and not when an operation has ended, because messages of it may be left
even so (delivered again, in a tier, sent twice), and without the abort they would run.
"""

import difflib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from kser.control import (
    KEEP_S,
    NOTE_KEEP_S,
    Abort,
    Change,
    ControlSet,
    Pause,
    PauseKind,
    WorkerNote,
    control_topic,
    send_control,
)
from kser.errors import ConfigurationError, Error
from kser.transport import Reader, Record, Transport
from kser.worker.runner import Runner

__all__ = ["Aborted", "ControlWatch"]

logger = logging.getLogger(__name__)

#: Longest wait of one poll, in seconds: that quick it notices that it has to stop.
_SLICE_S: Final = 0.5
#: Seconds until the topic is opened again when it could not be read; and when the brokers refuse it.
_AGAIN_S: Final = 1.0
_REFUSED_AGAIN_S: Final = 30.0
#: The topic is read anew after so many seconds. Records without a value are kept for a day (delete.retention.ms), so
#: who was cut off for longer has missed some, and would hold for ever what they took away.
_ANEW_S: Final = 6 * 3600.0
#: What has grown old is looked for so often, in seconds, at a moment that differs between workers.
_OLD_EVERY_S: Final = 3600.0
#: Records of one batch that takes out what has grown old, and the longest wait for its confirmation, in seconds.
_BATCH: Final = 1000
_WRITE_S: Final = 10.0
_CLOSE_S: Final = 2.0
#: How often a worker says that it is there, in seconds; and the longest wait to say that it is not any more.
_TELL_EVERY_S: Final = NOTE_KEEP_S / 4
_LEAVE_S: Final = 2.0
#: Names of which it is remembered who knows them, and workers that are named for one.
_ANSWERS: Final = 1000
_NAMED: Final = 3
#: How much alike names are of which one may be meant by the other.
_CLOSE: Final = 0.8
#: Seconds until something is written again.
_WRITE_AGAIN_S: Final = 10.0

_NONE: Final[frozenset[str]] = frozenset()


class Aborted:
    """Which messages belong to what people aborted.

    Args:
        watch: knows the aborts.
        runner: reads the messages.

    Thread rule: may be used from any thread.
    """

    def __init__(self, watch: "ControlWatch", runner: Runner) -> None:
        self._watch = watch
        self._runner = runner

    @property
    def version(self) -> int:
        """Another one once more is aborted; 0: nothing ever was."""
        return self._watch.version

    def means(self, record: Record) -> bool:
        """Whether the message in this record is to be run no more."""
        if not self._watch.aborts:
            return False
        subject = self._runner.subject_of(record)
        return subject is not None and self._watch.aborted(*subject) is not None


class ControlWatch:
    """Knows what is aborted and what is paused in a group.

    In this order::

        watch = ControlWatch(transport, group, changed=wake)
        watch.start()
        if not watch.wait_ready(60): ...            # dispatch nothing before
        if watch.aborts and (told := watch.aborted(root_uuid, run)): ...
        if watch.version != seen: ...               # something changed: look at what runs and what is paused
        watch.stop()

    Broker away: goes on with what it knows. No topic: nothing is aborted or paused until there is one.

    Args:
        transport: where the topic is.
        group: the workers' group.
        changed: called after each change, in the thread of the watch, once for what came together. Must not raise.
        keep_s: how long an abort holds, in seconds.
        clean: take aborts that are older out of the topic.
        note: makes what this worker tells of itself as long as it runs, at this time; None: nothing.
        now_ms: the clock, milliseconds since the epoch.

    Thread rule: everything may be read and called from any thread. The sets are replaced and never changed; ``aborts``
    is changed in place, so look things up in it and do not iterate over it.
    """

    def __init__(
        self,
        transport: Transport,
        group: str,
        *,
        changed: Callable[[], object] = lambda: None,
        keep_s: float = KEEP_S,
        clean: bool = True,
        note: Callable[[int], WorkerNote] | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        if keep_s <= 0:
            raise ConfigurationError(f"Aborts are kept for {keep_s} s: it must be more than 0")
        #: Grows with each change, after the sets have it.
        self.version = 0
        #: By uuid. Empty nearly always: ask that first.
        self.aborts: dict[str, Abort] = {}
        #: Names of topics, of classes in messages, and of workers.
        self.paused_topics = _NONE
        self.paused_tasks = _NONE
        self.paused_workers = _NONE
        #: Whether the whole group is paused.
        self.paused_group = False
        #: Why the topic cannot be read; None while it can, as far as it is known.
        self.problem: Error | None = None
        self._transport = transport
        self._group = group
        self._topic = control_topic(group)
        self._changed = changed
        self._keep_ms = int(keep_s * 1000)
        self._clean = clean
        self._note_at = note
        #: What it told of itself last, and when it does so next (time.monotonic()).
        self._own: WorkerNote | None = None
        self._tell_at = 0.0
        #: Who could run what: an answer for each name, as long as the workers are these.
        self._could: tuple[dict[str, WorkerNote], dict[tuple[str, int], str]] = ({}, {})
        self._now_ms = now_ms
        self._known = ControlSet()
        self._pauses: dict[str, Pause] = {}
        #: When what has grown old is looked for, and when something may be written again (time.monotonic()).
        self._look_at = 0.0
        self._write_at = 0.0
        self._ready = False
        #: What wait_ready() has to raise.
        self._refusal: ConfigurationError | None = None
        #: Set when it is ready, and when it will not be.
        self._news = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kser-control", daemon=True)

    # -- asking --------------------------------------------------------------------------------------------------------

    def aborted(self, uuid: str, run: int = 1) -> Abort | None:
        """The abort that means this run of an operation, by the uuid of its root; None when there is none."""
        told = self.aborts.get(uuid)
        return told if told is not None and run <= told.run else None

    def aborted_task(self, uuid: str, run: int = 1) -> Abort | None:
        """The abort of a task that belongs to no operation. ``run``: 1 and how often it was replayed."""
        return self.aborted(uuid, run)

    def pause_of(self, worker: str) -> Pause | None:
        """The pause of the whole group or, when there is none, of the worker of this name; None: it may take more."""
        if not self.paused_group and worker not in self.paused_workers:
            return None
        pauses = self._pauses
        return pauses.get(Pause(PauseKind.GROUP).key) or pauses.get(Pause(PauseKind.WORKER, worker).key)

    def pauses(self) -> tuple[Pause, ...]:
        """All that is paused, and by whom."""
        return tuple(self._pauses.values())

    def workers(self) -> list[WorkerNote]:
        """The workers of the group that are there, as far as they tell."""
        return self._known.workers_at(self._now_ms())

    def who_could_run(self, entrypoint: str, itinerary: int) -> str:
        """Which workers know this name and read itineraries of this version, as a phrase; "" when nobody tells."""
        known = self._known.workers
        if self._could[0] is not known or len(self._could[1]) > _ANSWERS:
            self._could = known, {}
        answers = self._could[1]
        if (entrypoint, itinerary) not in answers:
            answers[entrypoint, itinerary] = _who_could(self.workers(), entrypoint, itinerary)
        return answers[entrypoint, itinerary]

    # -- from start to end ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, in the background. Once only: RuntimeError."""
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """True once all that was in the topic when the watch started is known; False after ``timeout_s``.

        Raises ConfigurationError when the brokers refuse that this client reads the topic: they are asked again every
        30 s, so it may be called again.
        """
        self._news.wait(timeout_s)
        refusal, self._refusal = self._refusal, None
        if refusal is None or self._ready:
            return self._ready
        self._news.clear()
        if self._ready or self._stopping.is_set():
            self._news.set()
        raise refusal

    def stop(self, timeout_s: float = 5) -> bool:
        """End; what is known stays. False when it has not ended within ``timeout_s``: then it ends later.

        It takes up to 0.5 s, and 10 s while no broker answers. It may be called again, and without start().
        """
        self._stopping.set()
        self._news.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        stopping = self._stopping
        while not stopping.is_set():
            try:
                self._read()
            except Exception as exc:  # noqa: BLE001 - it never ends by itself
                refused = isinstance(exc, ConfigurationError)
                self._note(exc)
                stopping.wait(_REFUSED_AGAIN_S if refused else _AGAIN_S)
        if self._own is not None:
            self._send(Change(self._own.key, None), _LEAVE_S)

    def _read(self) -> None:
        """Read the topic from its start, and on for a while."""
        reader = self._transport.reader([self._topic], "beginning")
        try:
            found = ControlSet()
            while not reader.at_end():
                if self._stopping.is_set():
                    return
                for record in reader.poll(_SLICE_S):
                    found.apply(record)
            self._take_over(found)
            anew_at = time.monotonic() + _ANEW_S
            while not self._stopping.is_set() and time.monotonic() < anew_at:
                self._follow(reader)
        finally:
            reader.close()

    def _follow(self, reader: Reader) -> None:
        records = reader.poll(_SLICE_S)
        if records:
            self._take(records)
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _OLD_EVERY_S * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
            self._known.expire(self._oldest_ms())
            old: list[Abort | WorkerNote] = [*self._known.expired.values(), *self._old_workers()]
            self._write([Change(told.key, None, told.at_ms) for told in old])
        self._tell_of_itself(now)
        if self._known.wronged and now >= self._write_at:
            self._write([Change(told.key, told) for told in self._known.wronged.values()])

    def _take_over(self, found: ControlSet) -> None:
        """From now on ``found`` is what is known: all of the topic was read."""
        before, self._known = self._known, found
        found.expire(self._oldest_ms())
        self.aborts = found.aborts
        for key in before.pauses.keys() | found.pauses.keys():
            if before.pauses.get(key) != found.pauses.get(key):
                _tell(key, found.pauses.get(key))
        if self.problem is not None:
            logger.info("Topic %s is read again", self._topic)
            self.problem = None
        if not self._ready:
            # Workers that were started together do not all look at the same time.
            self._look_at = time.monotonic() + _OLD_EVERY_S * random.random()  # noqa: S311 - no secret
        if found.pauses != before.pauses or found.aborts != before.aborts:
            self._publish()
        self._ready = True
        self._news.set()

    def _take(self, records: Iterable[Record]) -> None:
        """What has come since."""
        known, changed, oldest_ms = self._known, False, self._oldest_ms()
        for record in records:
            change = known.apply(record)
            if change is not None and change.key.startswith("worker:"):
                if self._own is not None and change.key == self._own.key and change.entry is None:
                    self._tell_at = 0.0  # an old note of this name was taken out, and the new one with it
            elif change is not None:
                changed = True
                _tell(change.key, change.entry)
                if isinstance(change.entry, Abort) and change.entry.at_ms <= oldest_ms:
                    known.expire(oldest_ms)
        if changed:
            self._publish()

    def _publish(self) -> None:
        self._pauses = pauses = dict(self._known.pauses)
        self.paused_topics = _names(pauses, PauseKind.TOPIC)
        self.paused_tasks = _names(pauses, PauseKind.TASK)
        self.paused_workers = _names(pauses, PauseKind.WORKER)
        self.paused_group = any(entry.kind == PauseKind.GROUP for entry in pauses.values())
        self.version += 1
        self._changed()

    def _note(self, exc: Exception) -> None:
        if not isinstance(exc, Error):
            logger.error("Reading topic %s failed: it is read anew", self._topic, exc_info=exc)
            return
        if self._stopping.is_set():
            return
        first, self.problem = self.problem is None, exc
        if first:
            logger.warning(
                "Topic %s cannot be read: what is aborted or paused from now on is not known here. Trying again: %s",
                self._topic,
                exc.message,
            )
        if isinstance(exc, ConfigurationError):
            self._refusal = exc
            self._news.set()

    # -- what has grown old --------------------------------------------------------------------------------------------

    def _oldest_ms(self) -> int:
        """What was told then, or before, holds no more."""
        return self._now_ms() - self._keep_ms

    def _old_workers(self) -> list[WorkerNote]:
        """Those that ended without a word."""
        there = self.workers()
        return [note for note in self._known.workers.values() if note not in there]

    def _tell_of_itself(self, now: float) -> None:
        """Write what this worker is, now and then; not where the first record would make the topic."""
        if self._note_at is None or now < self._tell_at or self._stopping.is_set():
            return
        note = self._note_at(self._now_ms())
        if self._send(Change(note.key, note), _WRITE_S):
            self._own, self._tell_at = note, now + _TELL_EVERY_S
        else:
            self._tell_at = now + _REFUSED_AGAIN_S

    def _send(self, change: Change, timeout_s: float) -> bool:
        """Write what is of this worker; False when that could not be, which does no harm."""
        try:
            if not self._transport.admin().describe([self._topic], timeout_s):
                return False
            sink = self._transport.sink()
            try:
                send_control(sink, self._group, [change], timeout_s)
            finally:
                sink.close(_CLOSE_S)
        except Error as exc:
            logger.info("Topic %s does not say what this worker knows: %s", self._topic, exc.message)
            return False
        return True

    def _write(self, changes: Sequence[Change]) -> None:
        """Write these, some at a time. What fails is done again later, here or by another worker."""
        if not changes or not self._clean:
            return
        sink = self._transport.sink()
        try:
            for at in range(0, len(changes), _BATCH):
                if self._stopping.is_set():
                    return
                send_control(sink, self._group, changes[at : at + _BATCH], _WRITE_S)
        except Error as exc:
            logger.info("Topic %s could not be cleaned: %s", self._topic, exc.message)
        finally:
            sink.close(_CLOSE_S)
            self._write_at = time.monotonic() + _WRITE_AGAIN_S


def _names(pauses: Mapping[str, Pause], kind: PauseKind) -> frozenset[str]:
    return frozenset(entry.name for entry in pauses.values() if entry.kind == kind) or _NONE


def _who_could(workers: Sequence[WorkerNote], entrypoint: str, itinerary: int) -> str:
    if not workers:
        return ""
    able = [note.name for note in workers if entrypoint in note.entrypoints and note.itinerary >= itinerary]
    if able:
        more = f" and {len(able) - _NAMED} more" if len(able) > _NAMED else ""
        return f"{', '.join(able[:_NAMED])}{more} can run it"
    known = frozenset[str]().union(*(note.entrypoints for note in workers))
    close = difflib.get_close_matches(entrypoint, sorted(known), _NAMED, _CLOSE) if entrypoint not in known else []
    doubt = "" if all(note.complete for note in workers) else "tells that it "
    like = f"; they know {', '.join(close)}" if close else ""
    return f"no worker of the group {doubt}can run it{like}"


def _tell(key: str, entry: Abort | Pause | WorkerNote | None) -> None:
    verb, _, what = key.partition(":")
    if isinstance(entry, Abort):
        logger.info("Told: %s up to run %d is %s", entry.uuid, entry.run, entry.reason)
    elif verb == "abort":
        logger.info("Told: %s is aborted no more", what)
    else:
        told = f"is {entry.reason}" if isinstance(entry, Pause) else "goes on"
        logger.info("Told: the %s %s", what.replace(":", " ", 1), told)
