"""Relay: takes records out of the tiers when they are due, and puts them where they go next (see tiers.py).

A thread of a worker, a member of a group of its own, `{group}.retry`, over the topics of the tiers. A tier is first in
first out, so a partition is paused while its first record is not due, and plain offsets are committed.

Exactly once: records and offsets are one transaction. It is open between two polls only, so no rebalance meets one. Any
call of it may hang for ever in the client (librdkafka#5456), so another thread makes them, and is left behind when one
hangs. Whatever goes wrong and does not pass by itself ends the session: a new sink of the same transactional id ends
what the old one left open, then a new source begins at what is committed.

At least once: records are confirmed, then their offsets are committed.

What people abort goes back to its origin at once, where a worker ends it. The relay sees what it holds; a hop takes an
hour at most, so the rest comes into its hands within that time. What it has taken out of the middle of a partition is
noted beside the committed offset, so that it is taken once.
"""

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, Protocol

from kser import headers as names
from kser.errors import DeliveryError, Error, FencedError, GroupError, OffsetLostError, TransportError, ValidationError
from kser.transport import GroupMember, OutRecord, Partition, Position, Record, Sink, Source, Transport
from kser.transport.clock import Clock, RealClock
from kser.worker.tiers import coordinates, dead_letter, dead_letter_topic, due_ms, onward, recall, tier_topic
from kser.worker.topic_plan import TIERS

__all__ = ["Relay", "RelayPlan", "RelayStatus", "Session"]

logger = logging.getLogger(__name__)

#: Longest wait of one poll, in seconds: that quick it notices that it has to stop.
_IDLE_S: Final = 0.5
#: Records that fall due within this time are moved together, in seconds.
_TOGETHER_S: Final = 0.05
#: Records in one batch.
_BATCH: Final = 1000
#: Longest wait, in seconds: for the coordinator at the start, for a batch, for confirmations, for offsets.
_BEGIN_S: Final = 45.0
_MOVE_S: Final = 20.0
_DELIVERY_S: Final = 15.0
_OFFSETS_S: Final = 10.0
#: For what is committed, when partitions come: a transaction that holds it is ended by then.
_COMMITTED_S: Final = 30.0
#: How long it may take to read what is committed before something is moved, in seconds.
_VERIFY_S: Final = 5.0
#: An abort, and the first call of a session that gets no answer.
_ABORT_S: Final = 5.0
#: What a batch under way still gets once the relay has to stop, in seconds; and the ends of its source and its sink.
_STOPPING_S: Final = 3.0
_CLOSE_S: Final = 3.0
#: The same commit again when it got no answer, at most so often.
_TRIES: Final = 3
#: So many batches in a row that came to nothing end the session.
_PATIENCE: Final = 10
#: Seconds until the next batch, or session, after one that came to nothing: at first, for a rebalance, at most.
_AGAIN_S: Final = 0.5
_REBALANCE_S: Final = 0.1
_LONGEST_BATCH_S: Final = 5.0
_LONGEST_SESSION_S: Final = 30.0
#: A session that lived so long, in seconds, was a good one.
_GOOD_S: Final = 60.0
#: The same trouble is logged once in this time, in seconds.
_QUIET_S: Final = 300.0
#: Records of a partition that may be taken out before their time: their offsets have to fit beside the committed one.
_MOST_GONE: Final = 400
#: Version of that note.
_NOTE: Final = "r1;"
#: What an entry takes beside its bytes, about.
_ENTRY_BYTES: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayStatus:
    """How a relay is doing."""

    #: False before start() and once it has ended.
    running: bool
    #: Partitions of tiers that it has.
    partitions: int
    #: Records in memory that wait for their time.
    held: int
    #: What became of records so far: "back" in their origin, "hop" into another tier, "dead" letters.
    moved: Mapping[str, int]
    #: What keeps it from moving records; "" when it knows of nothing.
    problem: str
    #: Seconds since its loop turned last. A call that hangs holds it up for 45 s at most.
    turned_s_ago: float


class _Quiet:
    """Logs the same trouble once in a while."""

    def __init__(self) -> None:
        self._said: dict[object, float] = {}

    def warning(self, key: object, text: str, *arguments: object) -> None:
        now = time.monotonic()
        if now - self._said.get(key, -_QUIET_S) >= _QUIET_S:
            self._said[key] = now
            logger.warning(text, *arguments)


class Aborts(Protocol):
    """What a relay asks about aborts: kser.worker.control.Aborted."""

    @property
    def version(self) -> int:
        """Another one once more is aborted; 0: nothing ever was."""

    def means(self, record: Record) -> bool:
        """Whether the message in this record is to be run no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayPlan:
    """What a relay is to do: the arguments of Relay, and what its sessions share."""

    transport: Transport
    group: str
    worker: str
    exactly_once: bool = True
    tiers: Mapping[str, float] = field(default_factory=lambda: TIERS)
    clock: Clock = field(default_factory=RealClock)
    max_records: int = 500
    max_bytes: int = 16 * 1024 * 1024
    on_lost_offset: Literal["stop", "earliest", "latest"] = "stop"
    aborted: Aborts | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    moved: Counter[str] = field(default_factory=Counter)
    quiet: _Quiet = field(default_factory=_Quiet)

    @property
    def sink_id(self) -> str:
        """The transactional id."""
        return f"{self.group}.{self.worker}.relay"

    @property
    def source_group(self) -> str:
        """The group of all relays."""
        return f"{self.group}.retry"


class Relay:
    """A thread that moves records on when they are due. It never ends by itself: whatever is wrong, it tries again.

    Args:
        transport: the broker.
        group: the workers' group, whose tiers they are.
        worker: name of the worker, for the transactional id, ``{group}.{worker}.relay``.
        delivery: "exactly_once", or "at_least_once": then a record may come back twice.
        tiers: the delays of the tiers in seconds, by name; each has the topic ``{group}.retry.{name}``.
        clock: what a record's time is compared with. Is it fast, records come back early by that.
        max_records: of one partition in memory.
        max_bytes: of records in memory, all partitions together.
        on_lost_offset: for a committed offset beyond the end of its partition, as after a topic was made anew: "stop"
            leaves the partition as it is and says so; "earliest" takes all that is in it, what has been moved on
            before too; "latest" nothing. When records were deleted before they were due it goes on behind them, always.
        aborted: which records need not wait any longer; None: all of them do.

    Thread rule: all methods from any thread.
    """

    def __init__(
        self,
        transport: Transport,
        group: str,
        worker: str,
        delivery: Literal["exactly_once", "at_least_once"] = "exactly_once",
        *,
        tiers: Mapping[str, float] = TIERS,
        clock: Clock | None = None,
        max_records: int = 500,
        max_bytes: int = 16 * 1024 * 1024,
        on_lost_offset: Literal["stop", "earliest", "latest"] = "stop",
        aborted: Aborts | None = None,
    ) -> None:
        self._plan = RelayPlan(
            transport=transport,
            group=group,
            worker=worker,
            exactly_once=delivery == "exactly_once",
            tiers=tiers,
            clock=clock or RealClock(),
            max_records=max_records,
            max_bytes=max_bytes,
            on_lost_offset=on_lost_offset,
            aborted=aborted,
        )
        self._session: Session | None = None
        self._problem = ""
        self._turned = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="kser-relay", daemon=True)

    def start(self) -> None:
        """Begin, in the background. Once only: RuntimeError."""
        self._turned = time.monotonic()
        self._thread.start()

    def stop(self, timeout_s: float = 5) -> bool:
        """End; what is under way is finished. False when it has not ended within ``timeout_s``: then it ends later.

        0 only asks it to. It takes 0.5 s, and 10 s when a call of the client hangs. It may be called again.
        """
        self._plan.stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def status(self) -> RelayStatus:
        """How it is doing."""
        session, running = self._session, self._thread.is_alive()
        waiting = "it has not found its brokers yet" if running else ""
        return RelayStatus(
            running=running,
            partitions=session.partitions if session is not None else 0,
            held=session.held if session is not None else 0,
            moved=dict(self._plan.moved),
            problem=self._problem or (session.problem if session is not None else waiting),
            turned_s_ago=time.monotonic() - self._turned,
        )

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        stopping, bad = self._plan.stopping, 0
        while not stopping.is_set():
            session = Session(self._plan)
            began = time.monotonic()
            try:
                session.open()
                self._session = session
                while not stopping.is_set():
                    session.turn()
                    self._turned = time.monotonic()
                    if bad and (session.proved or self._turned - began > _GOOD_S):
                        self._problem, bad = "", 0
            except Exception as exc:  # noqa: BLE001 - it never ends by itself
                self._note(exc)
            self._session = None
            try:
                session.close()
            except Exception:
                logger.exception("Closing a session of the relay failed")
            stopping.wait(min(_AGAIN_S * 2 ** min(bad, 10), _LONGEST_SESSION_S))
            bad += 1

    def _note(self, exc: Exception) -> None:
        if self._plan.stopping.is_set() and isinstance(exc, (Error, TimeoutError)):
            logger.info(
                "The relay stops while this is so: %s", exc if isinstance(exc, Error) else "a call got no answer"
            )
            return
        if isinstance(exc, FencedError):
            why = f"another relay uses its transactional id, or a transaction of it timed out: {exc.message}"
        elif isinstance(exc, Error):
            why = exc.message
        elif isinstance(exc, TimeoutError):
            why = "a call of the Kafka client hangs or found no broker in time, and is left behind"
        else:
            logger.error("The relay of group %s failed and begins again", self._plan.group, exc_info=exc)
            why = f"{type(exc).__name__}: {exc}"
        self._problem = why
        self._plan.quiet.warning(
            (type(exc), getattr(exc, "extra", {}).get("kafka_error")),
            "The relay of group %s begins again at what is committed, and goes on trying, because %s",
            self._plan.group,
            why,
        )


class _Calls:
    """A thread that makes one call after the other for somebody who waits only so long for each."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._orders: queue.SimpleQueue[tuple[Callable[[], object], Future[object]] | None] = queue.SimpleQueue()
        #: A call took longer than it was waited for.
        self.overdue = False
        threading.Thread(target=self._work, name="kser-relay-call", daemon=True).start()

    def call(self, function: Callable[[], Any], timeout_s: float, grace_s: float) -> Any:
        """What ``function`` gives or raises. TimeoutError when it takes longer.

        ``grace_s`` is what it still gets when the relay has to stop meanwhile.
        """
        answer = self.order(function)
        end, told = time.monotonic() + timeout_s, False
        while True:
            if not told and self._stopping.is_set():
                end, told = min(end, time.monotonic() + grace_s), True
            left = end - time.monotonic()
            try:
                return answer.result(max(min(left, _IDLE_S), 0))
            except TimeoutError:
                if answer.done():  # its own
                    raise
                if left <= 0:
                    self.overdue = True
                    raise

    def order(self, function: Callable[[], Any]) -> "Future[Any]":
        """Make this call after those before it, whoever waits for it."""
        answer: Future[Any] = Future()
        self._orders.put((function, answer))
        return answer

    def end(self) -> None:
        """End the thread, after the calls that were ordered."""
        self._orders.put(None)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            function, answer = order
            try:
                answer.set_result(function())
            except BaseException as exc:  # noqa: BLE001 - raised by whoever waits for it
                answer.set_exception(exc)
            del order, function, answer


class _Entry:
    """A record in memory."""

    __slots__ = ("done", "due_ms", "error", "fate", "recalled", "record", "size")

    def __init__(self, record: Record, due: int) -> None:
        self.record = record
        self.due_ms = due
        headers = sum(len(name) + len(value or b"") for name, value in record.headers)
        self.size = _ENTRY_BYTES + len(record.key or b"") + len(record.value or b"") + headers
        #: What is written for it: what the tiers say; is that refused, a dead letter; then one of its coordinates only.
        self.fate: Literal["onward", "dead_letter", "coordinates"] = "onward"
        #: Why it cannot go where it should.
        self.error: Error | None = None
        #: Confirmed, and its offset not committed yet. At least once only.
        self.done = False
        #: What it belongs to was aborted.
        self.recalled = False


class _Lane:
    """What is known of one partition."""

    __slots__ = ("bytes", "entries", "expected", "gone", "known", "lost", "paused", "recalled", "round", "wake_ms")

    def __init__(self, gone: Iterable[int] = (), known: tuple[int, str] = (-1, "")) -> None:
        #: What is committed of it, as far as this session knows: offset and metadata; in which round it was looked at.
        self.known = known
        self.round: object = None
        #: What waits, in the order of offsets, and how much that is.
        self.entries: deque[_Entry] = deque()
        self.bytes = 0
        #: When the next record is due that had to leave the memory; None when there is none such.
        self.wake_ms: int | None = None
        #: Its offset; None when there is none such.
        self.expected: int | None = None
        self.paused = False
        #: Its committed offset does not exist, and nobody said where to go on.
        self.lost = False
        #: Offsets above the committed one that were taken out before their time.
        self.gone = set(gone)
        #: How many entries are to be taken out.
        self.recalled = 0

    @property
    def next_ms(self) -> int | None:
        """When its first record is due; None: that is not known before it is read."""
        return self.entries[0].due_ms if self.entries else self.wake_ms

    def check(self, record: Record) -> None:
        """Raises TransportError when it is not the one that was to be read again: those between would be lost."""
        if self.expected is not None and record.offset != self.expected:
            raise TransportError(
                f"{record.topic}[{record.partition}] was to be read at {self.expected} again, and came at "
                f"{record.offset}: beginning at what is committed"
            )
        self.expected = None

    def add(self, entry: _Entry) -> None:
        self.entries.append(entry)
        self.bytes += entry.size

    def place_after(self, moved: Collection[_Entry]) -> tuple[int, list[int]]:
        """What is to be committed when these are moved: the offset, and those above it that are done with."""
        base = self.entries[0].record.offset
        for entry in self.entries:
            if entry not in moved:
                break
            base = entry.record.offset + 1
        return base, sorted(at for at in self.gone.union(entry.record.offset for entry in moved) if at >= base)

    def forget(self, moved: Collection[_Entry]) -> None:
        """These were moved, and that is committed."""
        self.gone = set(self.place_after(moved)[1])
        self.recalled -= sum(entry.recalled for entry in moved)
        self.bytes -= sum(entry.size for entry in moved)
        self.entries = deque(entry for entry in self.entries if entry not in moved)

    def drop_last(self) -> _Entry:
        entry = self.entries.pop()
        self.bytes -= entry.size
        self.recalled -= entry.recalled
        return entry

    def clear(self) -> None:
        self.entries.clear()
        self.gone.clear()
        self.bytes, self.recalled, self.wake_ms, self.expected = 0, 0, None, None


class Session:
    """One life of a relay's source and sink, and what it holds. A Relay has one after the other.

    Thread rule: one thread uses it: open(), then turn() again and again, then close(), whatever those raised. Another
    one may read ``partitions``, ``held`` and ``problem``.
    """

    def __init__(self, plan: RelayPlan) -> None:
        self._plan = plan
        self._calls = _Calls(plan.stopping)
        #: Topic -> seconds.
        self._delays = {tier_topic(plan.group, tier): delay_s for tier, delay_s in plan.tiers.items()}
        self._own = {*self._delays, dead_letter_topic(plan.group)}
        self._lanes: dict[Partition, _Lane] = {}
        self._source: Source | None = None
        self._sink: Sink | None = None
        self._closed = False
        #: Batches in a row that came to nothing, and when to try the next, by the clock's monotonic().
        self._failures = 0
        self._not_before = 0.0
        #: Partitions that it has, records that it holds, what keeps it from moving them.
        self.partitions = 0
        self.held = 0
        self.problem = ""
        #: Whether it has moved something.
        self.proved = False
        #: The version of the aborts that all entries were compared with.
        self._heeded = 0

    # -- its life ------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """End what an earlier life left open, then join the group.

        In this order: what is committed is asked for as partitions come, and nothing is to move it after that.

        Raises Error when the broker does not let it, TimeoutError when none answers.
        """
        plan = self._plan
        if plan.exactly_once:
            self._sink = plan.transport.sink(plan.sink_id)
            self._calls.call(partial(_fence, self._sink), _BEGIN_S, 0)
        else:
            self._sink = plan.transport.sink(failures_only=True)
        self._source = plan.transport.source(plan.source_group)
        self._source.subscribe(list(self._delays), self)

    def turn(self, idle_s: float = _IDLE_S) -> None:
        """Wait until something comes or is due, at most ``idle_s``, and move what is due. Raises what ends it."""
        source = self._joined()
        self._hold(source)
        try:
            records = source.poll(self._patience_s(idle_s), self._plan.max_records)
        except OffsetLostError as exc:
            self._find_again(source, exc)
            return
        came: list[_Entry] = []
        for record in records:
            if (lane := self._lanes.get(record.of)) is not None:
                lane.check(record)
                if record.offset in lane.gone:
                    continue
                came.append(_Entry(record, due_ms(record, self._delays[record.topic])))
                lane.add(came[-1])
                lane.wake_ms = None
        batch = self._due()
        if self._plan.aborted is not None:
            self._recall(self._plan.aborted, came)
            batch += self._recalled(batch)
        if not batch:
            self._failures, self.problem = 0, self._lost()
        elif self._plan.clock.monotonic() >= self._not_before:
            self._move(source, batch)
        self._trim(source)
        self.partitions, self.held = len(self._lanes), sum(len(lane.entries) for lane in self._lanes.values())

    def close(self) -> None:
        """Let go of the sink, leave the group. Takes 7 s at most; what hangs is left behind. Again: nothing."""
        if self._closed:
            return
        self._closed = True
        self._lanes.clear()
        try:
            if self._sink is not None:
                self._close_sink(self._sink)
        finally:
            self._calls.end()
            if self._source is not None:
                try:
                    self._source.close(_CLOSE_S)
                except Error as exc:
                    logger.info("Closing the relay's consumer: %s", exc.message)

    def _close_sink(self, sink: Sink) -> None:
        close = partial(sink.close, _CLOSE_S)
        if self._calls.overdue:
            self._calls.order(close)
            return
        try:
            self._calls.call(close, _CLOSE_S + 1, _CLOSE_S + 1)
        except TimeoutError:
            logger.warning("The relay's producer does not end and is left behind")
        except Error as exc:
            logger.info("Closing the relay's producer: %s", exc.message)

    def _joined(self) -> Source:
        if self._source is None:
            raise TransportError("This session of a relay is not open: open() it first")
        return self._source

    # -- RebalanceListener ---------------------------------------------------------------------------------------------

    def on_assign(self, partitions: Sequence[Partition]) -> Sequence[Position]:
        """Begin at what is committed, else at the first record there is, whatever new groups do elsewhere."""
        source = self._joined()
        found = source.committed(partitions, _COMMITTED_S)
        self._lanes.update({p.of: _Lane(_noted(p.offset, p.metadata), (p.offset, p.metadata)) for p in found})
        return [p if p.offset >= 0 else p._replace(offset=source.watermarks(p.of)[0]) for p in found]

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        """Forget them: no transaction is under way, and what is not moved the next owner moves."""
        for partition in partitions:
            self._lanes.pop(partition, None)

    def on_lost(self, partitions: Sequence[Partition]) -> None:
        """Forget them."""
        self.on_revoke(partitions)

    # -- what waits ----------------------------------------------------------------------------------------------------

    def _hold(self, source: Source) -> None:
        """Pause the partitions of which nothing more is wanted yet, resume the others."""
        now = self._plan.clock.time_ms()
        pause: list[Partition] = []
        resume: list[Partition] = []
        for partition, lane in self._lanes.items():
            if lane.wake_ms is not None and lane.wake_ms <= now and not lane.entries:
                lane.wake_ms = None
            wanted = not (lane.entries or lane.wake_ms is not None or lane.lost or self._failures)
            if wanted == lane.paused:
                (resume if wanted else pause).append(partition)
                lane.paused = not wanted
        if pause:
            source.pause(pause)
        if resume:
            source.resume(resume)

    def _patience_s(self, idle_s: float) -> float:
        """How long to wait for records: until the first of those that are here is due, and some more with it."""
        clock = self._plan.clock
        soonest = min((at for lane in self._lanes.values() if (at := lane.next_ms) is not None), default=None)
        if soonest is None:
            return idle_s
        left_s = (soonest - clock.time_ms()) / 1000
        if left_s <= 0:
            return min(max(self._not_before - clock.monotonic(), 0), idle_s)
        return min(max(left_s, _TOGETHER_S), idle_s)

    def _due(self) -> list[_Entry]:
        """The next batch: the first records of partitions, in the order in which those are due."""
        now = self._plan.clock.time_ms()
        lanes = [lane for lane in self._lanes.values() if lane.entries and lane.entries[0].due_ms <= now]
        batch: list[_Entry] = []
        for lane in sorted(lanes, key=lambda lane: lane.entries[0].due_ms):
            for entry in lane.entries:
                if entry.due_ms > now or len(batch) >= _BATCH:
                    break
                batch.append(entry)
        return batch

    def _recall(self, aborted: Aborts, came: Sequence[_Entry]) -> None:
        """Mark what need not wait any longer: of what came just now, or of all that is here when more is told."""
        version = aborted.version
        look: Iterable[_Entry] = came
        if version != self._heeded:
            self._heeded = version
            look = [entry for lane in self._lanes.values() for entry in lane.entries]
        if not version:
            return
        for entry in look:
            record = entry.record
            if entry.recalled or names.value_of(record.headers, names.RECALLED) is not None:
                continue
            if aborted.means(record):
                entry.recalled = True
                self._lanes[record.of].recalled += 1

    def _recalled(self, batch: Sequence[_Entry]) -> list[_Entry]:
        """What is to be taken out before its time, and is not in the batch; no more than can be noted."""
        found: list[_Entry] = []
        due = set(batch)
        for lane in self._lanes.values():
            if lane.recalled:
                room = max(min(_MOST_GONE - len(lane.gone), _BATCH - len(due) - len(found)), 0)
                found += [entry for entry in lane.entries if entry.recalled and entry not in due][:room]
        return found

    def _trim(self, source: Source) -> None:
        """Let go of records, those that wait longest first, when they are too many bytes. They are read again."""
        over = sum(lane.bytes for lane in self._lanes.values()) - self._plan.max_bytes
        if over <= 0:
            return
        held = [(partition, lane) for partition, lane in self._lanes.items() if lane.entries]
        for partition, lane in sorted(held, key=lambda item: item[1].entries[0].due_ms, reverse=True):
            last = None
            while over > 0 and lane.entries and not lane.entries[-1].done:
                last = lane.drop_last()
                over -= last.size
            if last is not None:
                lane.expected = last.record.offset
                source.seek(Position(*partition, lane.expected))
                if not lane.entries:
                    lane.wake_ms = last.due_ms

    def _find_again(self, source: Source, exc: OffsetLostError) -> None:
        """A position that does not exist any more."""
        where = Partition(exc.extra["topic"], exc.extra["partition"])
        low, high = source.watermarks(where)
        offset = exc.extra.get("offset", -1)
        name, lane = f"{where.topic}[{where.partition}]", self._lanes.get(where)
        if lane is None:
            raise exc
        if offset < low:
            logger.error("Records of %s were deleted before they were due, %s to %s: they are lost", name, offset, low)
            target = low
            lane.expected = None
        else:
            lane.clear()
            lane.lost = self._plan.on_lost_offset == "stop"
            target = low if self._plan.on_lost_offset == "earliest" else high
            logger.error(
                "Group %s has committed offset %s of %s, which ends at %s, as after a topic was made anew: %s",
                self._plan.source_group,
                offset,
                name,
                high,
                "nothing of it is moved until the group's offset is set" if lane.lost else f"going on at {target}",
            )
        source.seek(Position(*where, target))

    def _lost(self) -> str:
        lost = [f"{partition.topic}[{partition.partition}]" for partition, lane in self._lanes.items() if lane.lost]
        return f"set the offset of group {self._plan.source_group} in {', '.join(lost)}" if lost else ""

    # -- what is due ---------------------------------------------------------------------------------------------------

    def _move(self, source: Source, batch: list[_Entry]) -> None:
        """Write what becomes of these, and commit that. Raises when it is not known what of it is visible."""
        sending = [entry for entry in batch if not entry.done]
        outs = [self._out(entry) for entry in sending]
        sink = self._sink
        assert sink is not None
        if self._plan.exactly_once:
            positions, member = self._positions(batch), source.member()
            self._verify(source, positions, member)
            transact = partial(_transact, sink, outs, positions, member)
            failure: Error | None = self._calls.call(transact, _MOVE_S, _STOPPING_S)
            if failure is None:
                self._moved(batch, outs)
                for position in positions:
                    self._lanes[position.of].known = position.offset, position.metadata
            else:
                self._again(failure, self._culprits(sending, outs, failure.extra.get("record", failure)))
            return
        failures = self._calls.call(partial(sink.deliver, outs, _DELIVERY_S), 2 * _DELIVERY_S, _STOPPING_S)
        self._confirmed(source, batch, sending, outs, failures)

    def _verify(self, source: Source, positions: Sequence[Position], member: GroupMember) -> None:
        """Exactly once, in each round of the group: raise TransportError when others have gone on with one of these.

        As a worker looks before it settles: Kafka takes what a member commits of a partition that is not its own.
        """
        doubtful = [position.of for position in positions if self._lanes[position.of].round != member.round]
        if not doubtful or not member.joined:  # who is in no group is refused
            return
        found = source.committed(doubtful, _VERIFY_S)
        others = [p for p in found if (p.offset, p.metadata) != self._lanes[p.of].known]
        if others:
            where = ", ".join(f"{p.topic}[{p.partition}]" for p in others)
            raise TransportError(f"others have gone on with {where}, and nothing of that is moved here")
        for of in doubtful:
            self._lanes[of].round = member.round

    def _out(self, entry: _Entry) -> OutRecord:
        plan, record, now = self._plan, entry.record, self._plan.clock.time_ms()
        if entry.fate == "onward" or entry.error is None:
            if entry.recalled and entry.due_ms > now:
                with contextlib.suppress(ValidationError):  # nobody knows where to, or when: a dead letter
                    return recall(record, plan.group, plan.tiers)
            return onward(record, plan.group, now, plan.tiers, plan.worker)
        if entry.fate == "dead_letter":
            return dead_letter(record, plan.group, entry.error, now, plan.tiers, plan.worker)
        return coordinates(record, plan.group, entry.error, now, plan.worker)

    def _positions(self, entries: Sequence[_Entry]) -> list[Position]:
        """What to commit when these are done."""
        found: list[Position] = []
        for partition, moved in _by_partition(entries).items():
            base, gone = self._lanes[partition].place_after(moved)
            found.append(Position(*partition, base, _note(base, gone)))
        return found

    def _moved(self, batch: Sequence[_Entry], outs: Sequence[OutRecord]) -> None:
        self._count(outs)
        self._forget(batch)
        self._failures, self.problem, self.proved = 0, self._lost(), True

    def _forget(self, entries: Sequence[_Entry]) -> None:
        for partition, moved in _by_partition(entries).items():
            self._lanes[partition].forget(moved)

    def _count(self, outs: Sequence[OutRecord]) -> None:
        for out in outs:
            tier = out.topic in self._delays
            self._plan.moved["hop" if tier else "dead" if out.topic in self._own else "back"] += 1

    def _confirmed(
        self,
        source: Source,
        batch: list[_Entry],
        sending: list[_Entry],
        outs: list[OutRecord],
        failures: list[tuple[int, Error]],
    ) -> None:
        """At least once: commit what is confirmed, of each partition up to the first record that is not."""
        failed = dict(failures)
        for index, entry in enumerate(sending):
            entry.done = index not in failed
        self._count([out for index, out in enumerate(outs) if index not in failed])
        finished: list[_Entry] = []
        stuck: set[Partition] = set()
        for entry in batch:
            if not entry.done:
                stuck.add(entry.record.of)
            elif entry.record.of not in stuck:
                finished.append(entry)
        if finished:
            try:
                source.commit(self._positions(finished), _OFFSETS_S)
            except Error as exc:  # they stay in memory as done, and it is asked for once more
                self._again(exc, [])
                return
            self._forget(finished)
            self.proved = True
        if failed:
            refused = [(sending[index], error) for index, error in failures if self._refuses(error, outs[index])]
            self._again(failures[0][1], refused)
        else:
            self._failures, self.problem = 0, self._lost()

    def _culprits(self, sending: list[_Entry], outs: list[OutRecord], refusal: Error) -> list[tuple[_Entry, Error]]:
        """Exactly once: what was refused, and why. It is told of one record only; others may have the same topic."""
        index = refusal.extra.get("index")
        if index is None or not self._refuses(refusal, outs[index]):
            return []
        if isinstance(refusal, ValidationError):
            return [(sending[index], refusal)]
        topic = outs[index].topic
        return [(entry, refusal) for entry, out in zip(sending, outs, strict=True) if out.topic == topic]

    def _refuses(self, error: Error, out: OutRecord) -> bool:
        """Whether the record will never be taken as it is; False when the trouble may pass.

        The group's own topics are waited for when they are missing: without them nothing can be done.
        """
        if isinstance(error, ValidationError):  # its size, or something in it
            return True
        passes = isinstance(error, DeliveryError) or (isinstance(error, TransportError) and error.retriable)
        return not passes and out.topic not in self._own

    def _again(self, error: Error, refused: Sequence[tuple[_Entry, Error]]) -> None:
        """Nothing more is visible of the batch. What is ``refused`` becomes something else, all the rest is as it was.

        Raises the error when it has been like that too often: a new session may do better.
        """
        if self._give_up(refused):
            return
        rebalance = isinstance(error, GroupError)
        wait_s = min((_REBALANCE_S if rebalance else _AGAIN_S) * 2**self._failures, _LONGEST_BATCH_S)
        self._failures += 1
        self._not_before = self._plan.clock.monotonic() + wait_s
        if self._failures >= _PATIENCE:
            raise error
        if rebalance:
            logger.info("What is due in the tiers is moved after the rebalance: %s", error.message)
        else:
            self.problem = error.message
            self._plan.quiet.warning(
                (type(error), error.extra.get("kafka_error")),
                "What is due in the tiers of group %s cannot be moved, nothing is lost, trying again: %s",
                self._plan.group,
                error.message,
            )

    def _give_up(self, refused: Sequence[tuple[_Entry, Error]]) -> bool:
        """Let these become dead letters, or what is left of such. False when nothing more can be done for any."""
        changed = False
        for entry, error in refused:
            if entry.fate == "coordinates":
                continue
            changed, record = True, entry.record
            entry.error = entry.error or error  # the first one: why it did not go where it should
            entry.fate = "dead_letter" if entry.fate == "onward" else "coordinates"
            self._plan.quiet.warning(
                ("refused", entry.fate),
                "%s[%s] at %s cannot be moved on, all that will be left is %s; maybe others like it: %s",
                record.topic,
                record.partition,
                record.offset,
                "a dead letter" if entry.fate == "dead_letter" else "a dead letter without its value",
                error.message,
            )
        return changed


def _by_partition(entries: Iterable[_Entry]) -> dict[Partition, set[_Entry]]:
    found: dict[Partition, set[_Entry]] = {}
    for entry in entries:
        found.setdefault(entry.record.of, set()).add(entry)
    return found


def _note(base: int, gone: Sequence[int]) -> str:
    """What stands beside an offset: those above it that are done with, each as the distance from the one before."""
    if not gone:
        return ""
    return _NOTE + ",".join(f"{at - before:x}" for before, at in zip([base, *gone], gone, strict=False))


def _noted(base: int, metadata: str) -> list[int]:
    """The offsets in a note; none when it is not readable: then what was taken out is taken out once more."""
    if not metadata.startswith(_NOTE):
        return []
    try:
        return list(itertools.accumulate((int(part, 16) for part in metadata[len(_NOTE) :].split(",")), initial=base))[
            1:
        ]
    except ValueError:
        return []


# -- calls of a sink that may hang: made in the thread of _Calls -------------------------------------------------------


def _fence(sink: Sink) -> None:
    """End what an earlier life of the transactional id left open."""
    sink.begin()
    sink.abort(_ABORT_S)


def _transact(
    sink: Sink, outs: Sequence[OutRecord], positions: Sequence[Position], member: GroupMember
) -> Error | None:
    """Records and offsets in one transaction. None, or why nothing of it is visible; raises when that is not known."""
    asked = False
    sink.begin()
    try:
        sink.produce_all(outs)
        sink.send_offsets(positions, member)
        asked = True
        _commit(sink)
    except Error as exc:
        if isinstance(exc, FencedError) or exc.extra.get("fatal") or (asked and not exc.extra.get("abort")):
            raise
        sink.abort(_ABORT_S)
        return exc
    return None


def _commit(sink: Sink) -> None:
    for left in reversed(range(_TRIES)):
        try:
            sink.commit()
            return
        except TransportError as exc:
            # Retriable: the same call again, never another one. The coordinator answers a repeated commit.
            if not exc.retriable or exc.extra.get("abort") or not left:
                raise
