"""The loop of a worker: poll, dispatch, collect, give what is finished to be settled.

One thread owns the consumer and does nothing that may take long: tasks run in the executor's threads, transactions in
the settle thread. Everything here happens in the thread that called Worker.run().
"""

import contextlib
import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import TYPE_CHECKING, Final

from kser import headers
from kser.errors import (
    AbortedError,
    ConfigurationError,
    Error,
    FencedError,
    GroupError,
    OffsetLostError,
    TaskCrashedError,
    TaskTimeoutError,
    TransportError,
    ValidationError,
)
from kser.events import events_topic
from kser.results import Result
from kser.transport import GroupMember, Partition, Position, Record, Sink, Source, Transport
from kser.worker.control import ControlWatch
from kser.worker.dead_letters import LEAST_BYTES, dead_letter
from kser.worker.dispatch import Dispatcher, Item
from kser.worker.executor import Executor
from kser.worker.health import HealthStatus
from kser.worker.lockfiles import LockFiles
from kser.worker.offsets import METADATA_BYTES, SUSPECT_AFTER, Parked, PartitionState, decode
from kser.worker.parking import KEYS, LONGEST_S, Backlog, ParkingLot, size_of
from kser.worker.runner import Outcome, Runner, Work
from kser.worker.settle import TWIN_S, AtLeastOnce, Batch, ExactlyOnce, Settler, Verdict
from kser.worker.state import StateStore, owner_of, state_topic
from kser.worker.state_loader import StateLoader
from kser.worker.telemetry import TelemetrySender
from kser.worker.tiers import MAX_DELAY_S, SHORTEST_S, dead_letter_topic, to_tier

if TYPE_CHECKING:
    from kser.worker.pool import IsolatedPool
    from kser.worker.worker import Worker

__all__ = ["Loop"]

logger = logging.getLogger(__name__)

#: While tasks run, what is finished is settled this often, in seconds, or when there is so much of it.
_SETTLE_EVERY_S: Final = 0.02
_SETTLE_COUNT: Final = 2000
#: Seconds before something the broker refused for now is tried again.
_BACKOFF_S: Final = 0.5
#: Seconds between two "Consumer is paused" lines.
_PAUSED_EVERY_S: Final = 30
#: A full worker leaves the client alone for this long before it pauses what it owns: a pause throws away what the
#: client has fetched ahead, and short tasks make room before that.
_JAM_S: Final = 0.25
#: How often one of the quiet partitions is looked at, in seconds.
_KICK_S: Final = 5.0
#: What goes to a topic whose brokers took nothing is left out of transactions for so long, at first and at most, in
#: seconds: one of them would hold up all the others for as long as a transaction may take.
_AWAY_S: Final = 2.0
_LONGEST_AWAY_S: Final = 60.0
#: How long the group may take before it is said that it does, in seconds.
_JOIN_S: Final = 30.0
#: Longest wait of one turn of the loop: how late a stop or a pause may be seen.
_TURN_S: Final = 0.2
#: Longest wait for a task while new messages may come: short after something happened, longer in quiet times.
_WAITS: Final = ((0.05, 0.001), (1.0, 0.005), (float("inf"), 0.02))
#: Bytes of the metadata of a commit beyond which its partition is paused: room is left for what is under way.
_MUCH: Final = METADATA_BYTES // 2
#: What a record leaves behind on its way into a tier: its claim, which it has won already; and once it was run, since
#: when and why it waited for somebody who can do that.
_WON: Final = frozenset({headers.CLAIM})
_NOT_ALONG: Final = _WON | {headers.WAITING, headers.REASON}
#: The headers of a record that has none, by name.
_UNNAMED: Final[Mapping[str, bytes | None]] = {}
#: What is left as it is, for the next owner: its partition went while it ran, or it broke the worker.
_LEFT: Final = frozenset({"aborted", "broken"})
#: How long it may take to commit by itself that partitions are worked on, or let go of, in seconds.
_STORE_S: Final = 5.0
#: How long it may take to read what is committed before something is settled, in seconds.
_VERIFY_S: Final = 2.0
#: How long partitions that come wait for a batch of their last assignment, in seconds, on top of two settle limits.
_UNRESOLVED_S: Final = 30.0
#: How long it is asked where partitions that come were left, in seconds, and for how long at a time: that late is a
#: stop heard. Shorter, and a slow coordinator would never be heard.
_COMMITTED_S: Final = 60.0
_ASK_S: Final = 5.0


class _DeclinedError(Error):
    """Out of a callback of the source, through poll(): the partitions that came are not wanted any more."""


class Inbox:
    """What other threads tell the poll thread.

    Not a queue.SimpleQueue: its get() with a timeout waits for ever when a signal comes just before the timeout does
    (CPython up to 3.12: what is left of the timeout is negative then, which means no timeout), so one SIGTERM in thirty
    was not seen before the running task had ended.

    Thread rule: put() from anywhere, the rest from one thread.
    """

    def __init__(self) -> None:
        self._items: deque[Verdict | None] = deque()
        self._wake = threading.Lock()
        self._wake.acquire()

    def put(self, item: "Verdict | None") -> None:
        """Leave it there, and wake the reader."""
        self._items.append(item)
        with contextlib.suppress(RuntimeError):  # it is awake already
            self._wake.release()

    def get(self, timeout: float) -> "Verdict | None":
        """The next one. Raises queue.Empty when there is none within ``timeout`` seconds, and now and then earlier."""
        if not self._items:
            self._wake.acquire(timeout=timeout)
        return self.get_nowait()

    def get_nowait(self) -> "Verdict | None":
        """The next one. Raises queue.Empty."""
        try:
            return self._items.popleft()
        except IndexError:
            raise queue.Empty from None


class Loop:
    """One run of a worker."""

    def __init__(
        self,
        worker: "Worker",
        transport: Transport,
        runner: Runner,
        delivery: str,
        pool: "IsolatedPool | None",
        *,
        static: bool,
        watch: ControlWatch | None = None,
        telemetry: TelemetrySender | None = None,
    ) -> None:
        self.worker = worker
        self.stats = worker.stats
        self.runner = runner
        self.exactly_once = delivery == "exactly_once"
        self.events_topic = events_topic(worker.group)
        self.dead_topic = dead_letter_topic(worker.group)
        self._transport = transport
        self._pool = pool
        self._static = static
        self.source: Source = self._new_source()
        #: Wakes this thread: None when something is finished, or a Verdict.
        self._inbox = Inbox()
        self.executor = Executor(
            runner,
            concurrency=worker.concurrency,
            coroutines=worker.coroutines,
            isolated=self._run_isolated if pool is not None else None,
            children=worker.isolated,
            max_abandoned=worker.max_abandoned,
            wake=lambda: self._inbox.put(None),
            told=watch,
            open_reports=telemetry.open if telemetry is not None else None,
        )
        if telemetry is not None:
            telemetry.executions = self.executor.executions
        self.watch = watch
        self._watched = 0
        self.dispatcher = Dispatcher(worker.ordering, self.executor.submit)
        self.files = LockFiles()
        self.parts: dict[Partition, PartitionState] = {}
        #: Paused because the worker is full or told to pause, and because too much of one partition is unfinished.
        self.halted: set[Partition] = set()
        self.bounded: set[Partition] = set()
        #: Paused because people paused their topic.
        self.stilled: set[Partition] = set()
        self.in_flight = 0
        self.bytes_in_flight = 0
        #: Of the records that were run and are not settled.
        self.bytes_unsettled = 0
        #: What waits for its next attempt, and what waits behind it; not in flight.
        self.lot = ParkingLot()
        self.backlog = Backlog(self.lot, self.dispatcher, worker.max_in_flight, worker.max_bytes)
        #: Paused because too much of them waits.
        self.clogged: set[Partition] = set()
        #: Paused because the next crash would make suspects of what comes, until less of that is unfinished.
        self.guarded: dict[Partition, PartitionState] = {}
        self._guard_at = 0.0
        #: Who was first with a key. Not loaded before the first claim of a partition comes: most never see one.
        self.store = StateStore(transport, worker.group, create=worker.create_topics)
        self.loader = StateLoader(self.store, lambda: self._inbox.put(None))
        #: Finished, not settled, in the order they finished.
        self.pending: list[Item] = []
        self.batch: Batch | None = None
        #: A batch whose commit got no answer.
        self.unknown: Batch | None = None
        #: At least once: partitions with settled records whose offsets are not stored yet.
        self.uncommitted: set[PartitionState] = set()
        #: Those whose offsets the broker has been asked to store.
        self._storing: set[PartitionState] = set()
        #: Up to where that lets records of them be started.
        self._reaches: dict[PartitionState, int] = {}
        self._commit_due = 0.0
        self.draining = False
        #: Topics whose brokers took nothing: until when what goes there waits, and for how long that is.
        self._away: dict[str, tuple[float, float]] = {}
        self.failure: Error | None = None
        #: True once more threads were given up than may be: it drains, and a new worker starts without them.
        self.worn = False
        #: When producers of this worker were fenced.
        self._fences: deque[float] = deque(maxlen=1)
        self._settler: Settler = self._new_settler()
        self._ready = False
        self._life = f"{time.time_ns():x}"
        self._count = 0
        self._not_before = 0.0
        self._settled_at = 0.0
        self._busy_at = 0.0
        self._paused_said = 0.0
        self._polled = self._turned = time.monotonic()
        self._joined = False
        self._join_said = time.monotonic()
        #: When a quiet partition was looked at, and which in turn.
        self._kicked = time.monotonic()
        self._kick_turn = 0
        #: Whether it has been in the group, and when it joined once more.
        self._was_in = False
        self._joined_again = float("-inf")
        #: When the budget of a stop ends: draining and the last on_revoke() share it.
        self.stop_by = float("inf")

    def _new_source(self) -> Source:
        return self._transport.source(self.worker.group, member_id=self.worker.name if self._static else None)

    # -- from start to end -------------------------------------------------------------------------------------------

    def run(self, *, until_idle: bool) -> None:
        """Until asked to stop, or idle. Raises what made it end."""
        try:
            self.source.subscribe(self.worker.topics, self)
            idle = False
            while not (self._should_stop() or (until_idle and idle)):
                idle = self.turn()
            self._drain()
        finally:
            self._leave()
        if self.failure is not None:
            raise self.failure
        if self.worn:
            raise TransportError(
                f"{len(self.executor.abandoned)} threads were given up because their task ignores its timeout: the "
                "worker ended, so that a new one starts without them"
            )

    def _should_stop(self) -> bool:
        return bool(self.worker.stopping) or self.worn or self.failure is not None or self.files.terminate

    def turn(self) -> bool:
        """One round: fetch unless there is enough, then settle what has ended. True when there was nothing to do."""
        self._turned = time.monotonic()
        if not self._joined:
            self._wait_to_join(self._turned)
        self._throttle()
        records: Sequence[Record] = ()
        now = time.monotonic()
        if self.lot.items:
            self._unpark(now)
        if self.watch is not None and self.watch.version != self._watched:
            self._heed(self.watch)
        self._clog()
        if self.guarded:
            self._guard(now)
        loading = bool(self.loader.loading) and self._load()
        working = bool(self.in_flight or self.pending or self.batch is not None or loading)
        full = self._full()
        if not full or self.halted or now - self._polled > _JAM_S:
            self._polled = now
            self._halt(full or bool(self._pause()))
            records = self._poll(0 if working else min(_TURN_S, max(self.lot.next_due - now, 0)))
            if records and self.watch is not None and self.watch.paused_topics:
                records = self._give_back(records, self.watch.paused_topics)
            if records:
                self._busy_at = now
                self._take(records)
            elif now - self._kicked > _KICK_S:
                self._kick(now)
        waiting = self.in_flight or self.batch is not None or loading
        self._collect(self._wait(now) if waiting and not records else 0)
        self._settle()
        self.executor.look_after()
        if self.executor.exhausted and not self.worn:
            self.worn = True
            logger.error("Stopping: more threads were given up than may be (max_abandoned)")
        busy = working or records or self.in_flight or self.pending or self.uncommitted or self._storing
        return bool(self.parts) and not (busy or loading or self.lot.items or self.guarded)

    def _load(self) -> bool:
        """Go on with the partitions whose state is here now; whether others wait for theirs."""
        try:
            self._go_on(self.loader.collect())
        except Error as exc:
            self.failure = self.failure or exc
        return bool(self.loader.loading)

    def _full(self) -> bool:
        """Whether there is so much taken and not run, or run and not settled, that no more is fetched."""
        worker, waits = self.worker, self.backlog
        taken, most = self._taken()
        size = self.bytes_in_flight + self.bytes_unsettled + self.lot.bytes - waits.bytes
        return (
            taken >= most
            or len(self.pending) >= worker.max_in_flight
            or size >= worker.max_bytes - min(waits.bytes, waits.most_bytes)
        )

    def _taken(self) -> tuple[int, int]:
        """Records taken and not run that do not wait behind another, and how many these may be."""
        waits = self.backlog
        taken = self.in_flight + self.lot.items - waits.items
        return taken, self.worker.max_in_flight - min(waits.items, waits.most_items)

    def _clog(self) -> None:
        """Pause the partitions of which too much waits: a key that waits must not stop all others."""
        lot, waits = self.lot, self.backlog
        much = self.in_flight + lot.items > waits.most_items or self.bytes_in_flight + lot.bytes > waits.most_bytes
        if waits.clogged or (much and lot.items):
            waits.look(self.parts)
        else:
            waits.clear()
        if waits.clogged != self.clogged:
            more, less = waits.clogged - self.clogged, self.clogged - waits.clogged
            self.clogged = set(waits.clogged)
            if more:
                logger.info("Paused until less of it waits: %s", ", ".join(f"{of.topic}/{of.partition}" for of in more))
                self.source.pause(more)
            self._go_on(less)

    def _go_on(self, partitions: Iterable[Partition]) -> None:
        """Fetch those again that nothing else keeps paused."""
        kept = (self.halted, self.bounded, self.stilled, self.clogged, self.guarded, self.loader.loading)
        free = [of for of in partitions if of in self.parts and not any(of in paused for paused in kept)]
        if free:
            self.source.resume(free)

    def _wait_to_join(self, now: float) -> None:
        """Notice that the group has taken this worker in; say so when it does not: Kafka tells no error."""
        self._joined = self.source.joined
        self._was_in = self._was_in or self._joined
        if not self._joined and now - self._join_said > _JOIN_S:
            self._join_said = now
            logger.warning(
                "Group %s has not taken this worker in for %g s. Do the brokers know the group protocol? "
                "group.protocol=consumer needs Kafka 4.0; without it the classic protocol is used",
                self.worker.group,
                _JOIN_S,
            )

    def _wait(self, now: float) -> float:
        quiet = now - self._busy_at
        return next(wait for until, wait in _WAITS if quiet < until)

    def _poll(self, timeout_s: float) -> Sequence[Record]:
        try:
            return self.source.poll(timeout_s, self.worker.max_poll_records)
        except OffsetLostError as exc:
            self._offset_lost(exc)
        except GroupError as exc:
            self._join_again(exc)
        except _DeclinedError as exc:
            logger.info("%s", exc.message)
        return ()

    def _join_again(self, exc: GroupError) -> None:
        """Another member has this static worker's name: a twin, or its own join, whose answer a dying broker lost.

        Both look the same, so it joins once more. Fenced again within a minute it is a twin.
        """
        now = time.monotonic()
        if not self._static or not self._was_in or now - self._joined_again < TWIN_S:
            raise FencedError(
                f"{exc.message} (--name), or end the other one", extra={**exc.extra, "twin": True}
            ) from exc
        self._joined_again = now
        logger.warning("Joining the group once more: %s", exc.message)
        with contextlib.suppress(_DeclinedError):  # asked to stop meanwhile: that is for run() to see
            self.source.close(5)
        self.source = self._new_source()
        self._storing = set()  # of partitions that are gone; the client that was asked may never answer
        self.source.subscribe(self.worker.topics, self)
        self._joined, self._join_said = False, now

    def _kick(self, now: float) -> None:
        """Fetch a quiet partition anew when there is more of it than was given.

        Seen once under KIP-848, after a node was killed and came back at once: a partition of a live member gave
        nothing for a minute, with records above its position. Markers look like records from here, so each end of a
        partition is met once.
        """
        self._kicked = now
        paused = self.halted | self.bounded | self.stilled | self.clogged | self.guarded.keys() | self.loader.loading
        quiet = [state for of, state in self.parts.items() if of not in paused]
        if not quiet:
            return
        self._kick_turn += 1
        state = quiet[self._kick_turn % len(quiet)]
        try:
            end = self.source.watermarks(state.of, timeout_s=2)[1]
            if state.position < 0 or state.closed or end <= state.position or (state.position, end) == state.met:
                return
            if state.seen == (state.position, end):  # the same twice: it does not come by itself
                state.met = state.seen
                self.source.seek(Position(*state.of, state.position))
            state.seen = (state.position, end)
        except TransportError as exc:
            logger.debug("Looking at %s/%s: %s", *state.of, exc.message)

    def _offset_lost(self, exc: OffsetLostError) -> None:
        partition = Partition(exc.extra["topic"], exc.extra["partition"])
        choice = self.worker.on_lost_offset
        if choice == "stop":
            raise OffsetLostError(
                f"{exc.message}. What was there is gone; choose where to go on: --on-lost-offset earliest (the oldest "
                "message there is) or latest (only what comes from now on)",
                extra=exc.extra,
            ) from exc
        low, high = self.source.watermarks(partition)
        offset = low if choice == "earliest" else high
        logger.warning(
            "The committed offset of %s/%s does not exist any more: going on at %s, the %s", *partition, offset, choice
        )
        state = self.parts.get(partition)
        if state is not None:
            state.restart(offset)
        self.source.seek(Position(*partition, offset))

    # -- taking ------------------------------------------------------------------------------------------------------

    def _take(self, records: Sequence[Record]) -> None:
        items: list[Item] = []
        parts, size = self.parts, 0
        fresh: dict[PartitionState, Position] = {}
        settle_id = ""
        early: dict[PartitionState, int] = {}
        beyond: dict[PartitionState, int] = {}
        topic, partition, state = "", -1, None  # of the record before: they come by partition
        for record in records:
            if record.partition != partition or record.topic != topic:
                topic, partition = record.topic, record.partition
                state = parts.get((topic, partition))  # type: ignore[call-overload]
                if state is not None and state.closed:
                    state = None
            if state is None or (early and state in early) or (beyond and state in beyond):
                continue
            named = dict(record.headers) if record.headers else _UNNAMED
            key = named.get(headers.CLAIM)
            if key and state.of not in self.loader.loaded:
                early[state] = record.offset
                continue
            if not state.marked:
                settle_id = settle_id or self._settle_id()
                fresh[state] = self._mark(state, record.offset, settle_id)
            if state.crashes and state.beyond(record.offset):
                beyond[state] = record.offset
                state.pass_gap(record.offset)  # from here on it is counted what may be started
                continue
            wanted = state.take(record.offset)
            if not wanted:
                self.stats["skipped" if wanted is None else "came again"] += 1
                continue
            item = Item(state, record)
            items.append(item)
            if state.parked and (parked := state.parked.get(record.offset)) is not None:
                # As its last owner left it: its attempt, and when that is due.
                item.record = _with(record, {headers.ATTEMPT: parked.attempt, headers.NOT_BEFORE: parked.due_ms})
            if state.crashes:
                crashes = state.crashes_of(record.offset)
                item.suspect, item.deadly = crashes >= SUSPECT_AFTER, crashes > SUSPECT_AFTER
            if named.get(headers.SUSPECT) is not None:
                item.suspect = True
            if item.suspect:
                self.stats["suspects"] += 1
            if key and not self._claim(item, key):
                items.pop()
                continue
            if record.value is not None:
                size += len(record.value)
        if early:
            self._hold_back(early)
        if beyond:
            self._give_slices(beyond)
        if fresh:
            self._open(fresh, settle_id)
            if any(state.closed for state in fresh):  # others had it
                items = [item for item in items if not item.state.closed]
                size = size_of(items)
        if items:
            self.in_flight += len(items)
            self.bytes_in_flight += size
            self.dispatcher.take(items)

    def _claim(self, item: Item, key: bytes) -> bool:
        """Whether a record that may run only if it is the first one to bring ``key`` is that; if not it is finished."""
        record, state = item.record, item.state
        name = key.decode("utf-8", "backslashreplace")
        try:
            claim = self.store.claim(state.of, name, owner_of(record))
        except ConfigurationError as exc:
            item.error = exc
            return True
        if claim.won:
            item.claim = claim
            return True
        where = f"{record.topic}/{record.partition}/{record.offset}"
        logger.info("Record %s is dropped: %s was there before, with the same key %s", where, claim.winner.owner, name)
        self.stats["duplicates"] += 1
        item.outcome = Outcome("duplicate")
        state.finished(record.offset)
        self.pending.append(item)
        self.bytes_unsettled += len(record.value or b"")
        return False

    def _hold_back(self, early: Mapping[PartitionState, int]) -> None:
        """Fetch from these offsets on again once it is known who was first with a key."""
        for state, offset in early.items():
            self.loader.start(state)
            self.source.pause([state.of])
            self.source.seek(Position(*state.of, offset))

    def _give_slices(self, beyond: Mapping[PartitionState, int]) -> None:
        """Fetch from these offsets on again once less of what the next crash makes suspects is unfinished."""
        for state, offset in beyond.items():
            self.guarded[state.of] = state
            self.source.pause([state.of])
            self.source.seek(Position(*state.of, offset))

    def _guard(self, now: float) -> None:
        """Go on with those of which more may be started: each commit says up to where."""
        free: list[Partition] = []
        quiet: dict[PartitionState, Position] = {}
        settle_id = ""
        for of, state in self.guarded.items():
            if state.reach > state.position:
                free.append(of)
                state.apart = 0
                continue
            state.apart = self._apart(state)
            if self._guard_at <= now and len(state.running) <= state.apart and not self._has_unsettled(state):
                settle_id = settle_id or self._settle_id()  # no commit comes by itself
                with contextlib.suppress(ValidationError):  # when more of it is finished
                    quiet[state] = state.commit_point(settle_id)
        for of in free:
            del self.guarded[of]
        self._go_on(free)
        if quiet:
            self._open(quiet, settle_id)
            if any(state.reach <= state.position for state in quiet):
                self._guard_at = time.monotonic() + _BACKOFF_S

    def _apart(self, state: PartitionState) -> int:
        """How many records of a partition have begun, or wait behind another one, for their time or for a place."""
        lanes = sum(map(len, self.dispatcher.waiting(state)))
        parked = sum(len(unit) for unit in self.lot if unit[0].state is state)
        return lanes + parked + self.executor.apart(state)

    def _has_unsettled(self, state: PartitionState) -> bool:
        """Whether something of it was run whose commit is still to come, or out."""
        batches = [batch for batch in (self.batch, self.unknown) if batch is not None]
        return (
            state in self.uncommitted
            or state in self._storing
            or any(state in batch.states for batch in batches)
            or any(item.state is state for item in self.pending)
        )

    def _mark(self, state: PartitionState, offset: int, settle_id: str) -> Position:
        """What to commit before the first record of a partition is run, the one with this offset."""
        if state.position < 0:
            state.position = offset
        state.marked = True
        position = state.commit_point(settle_id)
        state.confirm(state.asked)  # nothing of it is run before that is tried
        return position

    def _open(self, fresh: dict[PartitionState, Position], settle_id: str) -> None:
        """Commit that these partitions are being worked on: whoever finds that later knows that this worker crashed.

        Before anything of them is run, because a task that ends its process at once would never be found out.
        """
        try:
            self._store(list(fresh.values()), settle_id, set(fresh))
        except TransportError as exc:
            # Nothing is lost by it: it comes with the next offsets, and a crash until then is not counted. Another
            # commit of its own would tell of what is finished by then and not settled. Nothing is settled while it is
            # still out: see _settle().
            logger.log(
                logging.INFO if isinstance(exc, GroupError) else logging.WARNING,
                "Not noted that partitions are being worked on: %s",
                exc.message,
            )

    def _store(self, positions: list[Position], settle_id: str, states: set[PartitionState]) -> None:
        """Commit these now, with nothing that follows. Raises TransportError when that is not done within 5 s.

        Exactly once in a transaction: one that comes late is refused, because it names the membership it was made in.
        The consumer sends a commit that waits for its coordinator as what it is by then, maybe as a member that has
        not had these partitions for long, and sets back what others have settled.
        """
        end = time.monotonic() + _STORE_S
        if not self.exactly_once:
            self.source.commit(positions, _STORE_S)
            for state in states:
                state.confirm(state.asked)
            return
        while self._wait_for_settler(end):
            member = self.source.member()
            if not member.joined:
                raise GroupError("This worker is not in the group")
            if not self._verify(states, member):
                raise GroupError("It is not sure that the partitions are this worker's")
            batch = self.batch = Batch([], positions, member, settle_id, states)
            self._settler.give(batch)
            self._wait_for_settler(end)
            if batch.settled:
                return
            time.sleep(min(max(self._not_before - time.monotonic(), 0), max(end - time.monotonic(), 0)))
        raise TransportError(f"Not committed within {_STORE_S:g} s", retriable=True)

    def _wait_for_settler(self, end: float) -> bool:
        """Wait until the settle thread has nothing to do; False when it is not so far by ``end``, or never will be."""
        while self.batch is not None or self.unknown is not None or not self._ready:
            if self.failure is not None or time.monotonic() >= end:
                return False
            self._collect(0.02)
            if self.batch is not None or self.unknown is not None:
                self._settle()
        return time.monotonic() < end

    def _settle_id(self) -> str:
        self._count += 1
        return f"{self.worker.name}.{self._life}.{self._count}"

    # -- what is run again later -------------------------------------------------------------------------------------

    def _unpark(self, now: float) -> None:
        """Run what has become due."""
        self._run_units(self.lot.due(now))

    def _run_units(self, units: Sequence[deque[Item]]) -> None:
        for unit in units:
            self.in_flight += len(unit)
            self.bytes_in_flight += size_of(unit)
        if units:
            self.executor.submit([*units])

    def _later(self, item: Item, outcome: Outcome) -> bool:
        """Have a record run again: parked, with its key, or by a tier. False when it is parked and not settled now."""
        record, state, delay_s = item.record, item.state, outcome.again_s or 0.0
        rest: deque[Item] = item.rest or deque()
        item.rest = None
        attempt = headers.number(record.headers, headers.ATTEMPT, 1)
        # What an earlier owner had parked has its room: it stays where it was, with those of its key behind it.
        stays = outcome.kind == "delayed" and record.offset in state.parked
        if outcome.kind == "retry":
            attempt += 1
            cls = item.work.cls
            stays = cls is not None and cls.order == "strict"
        room = len(state.parked) < KEYS and self.lot.items < self.backlog.most_items and state.of not in self.clogged
        short = delay_s <= LONGEST_S and room
        if outcome.kind != "waiting" and (short or stays):
            again = Item(state, record if outcome.kind == "delayed" else _with(record, {headers.ATTEMPT: attempt}))
            again.last, again.suspect, again.deadly = item.last, item.suspect, item.deadly
            again.subject = item.work.subject if item.work is not None else None
            if outcome.kind == "delayed":
                again.claim = item.claim
            rest.appendleft(again)
            self.in_flight -= len(rest) - 1
            self.bytes_in_flight -= size_of(rest) - len(record.value or b"")
            self.lot.put(rest, time.monotonic() + delay_s)
            if outcome.kind == "delayed":
                return False
            state.park(record.offset, Parked(attempt, int((time.time() + delay_s) * 1000)))
            return True
        changed: dict[str, int | str] = {headers.ATTEMPT: attempt} if attempt > 1 else {}
        if item.suspect:
            changed[headers.SUSPECT] = 1
        if outcome.kind == "waiting":
            changed |= {headers.WAITING: outcome.since_ms or int(time.time() * 1000), headers.REASON: outcome.reason}
        delay_ms = int(min(max(delay_s, SHORTEST_S), MAX_DELAY_S) * 1000)
        if outcome.kind == "delayed" and item.claim is not None:
            item.claimed()  # it is finished here; of the others it is done already
        kept = _with(record, changed, without=_NOT_ALONG if outcome.kind == "retry" else _WON)
        if outcome.refused is None:
            outcome.refused = lambda error: self.runner.instead_of_waiting(record, error)
        outcome.records.append(
            to_tier(self.worker.group, record.topic, record.key, record.value, kept.headers, delay_ms)
        )
        if rest:
            self.executor.submit([rest])
        state.finished(record.offset)
        return True

    def _throttle(self) -> None:
        """Obey the pause file and what people told the group, and tell what runs."""
        if why := self._pause():
            now = time.monotonic()
            if not self._paused_said or now - self._paused_said > _PAUSED_EVERY_S:
                self._paused_said = now
                logger.warning("Consumer is paused%s", why)
            self.executor.hold()
        else:
            self._paused_said = 0.0
            self.executor.release()
        if self.files.due:
            self.files.running(self.executor.doing)

    def _pause(self) -> str | None:
        """Why this worker takes no message, as the end of a sentence; None when it does."""
        if self.files.paused:
            return ": its pause file is there"
        if self.watch is not None and self.watch.version:
            pause = self.watch.pause_of(self.worker.name)
            if pause is not None:
                return f": {pause.reason}"
        return None

    def _heed(self, watch: ControlWatch) -> None:
        """People told the group something."""
        self._watched = watch.version
        self._still(self.parts)
        if not watch.aborts:
            return
        self.executor.abort_those(lambda work: watch.aborted(*work.subject) is not None)
        units = self.lot.take(lambda item: item.subject is not None and watch.aborted(*item.subject) is not None)
        self._run_units(units)

    def _still(self, partitions: Iterable[Partition]) -> None:
        """Fetch nothing of topics that people paused, and go on with those that they did not."""
        if self.watch is None:
            return
        topics = self.watch.paused_topics
        mine = [of for of in partitions if of in self.parts]
        pause = [of for of in mine if of.topic in topics and of not in self.stilled]
        resume = [of for of in mine if of.topic not in topics and of in self.stilled]
        if pause:
            self.stilled.update(pause)
            self.source.pause(pause)
        if resume:
            self.stilled.difference_update(resume)
            self._go_on(resume)

    def _give_back(self, records: Sequence[Record], topics: AbstractSet[str]) -> list[Record]:
        """The records without those of paused topics, which came before the pause did: they are fetched again."""
        kept: list[Record] = []
        first: dict[Partition, int] = {}
        for record in records:
            if record.topic in topics:
                first.setdefault(record.of, record.offset)
            else:
                kept.append(record)
        self._still(self.parts)
        for of, offset in first.items():
            if of in self.parts:
                self.source.seek(Position(*of, offset))
        return kept

    def _halt(self, full: bool) -> None:
        """Pause fetching what is owned, or let it go on: owned by the worker, and renewed after each rebalance."""
        if full:
            more = self.parts.keys() - self.halted
            if more:
                self.source.pause(more)
                self.halted |= more
        elif self.halted and len(self.pending) <= self.worker.max_in_flight // 2:
            taken, most = self._taken()
            if taken <= most // 2:
                halted, self.halted = self.halted, set()
                self._go_on(halted)

    def _bound(self, positions: Iterable[Position]) -> None:
        """Pause a partition whose unfinished offsets nearly fill what can be stored beside the committed one."""
        for position in positions:
            size, of = len(position.metadata), position.of
            if size > _MUCH and of not in self.bounded and of in self.parts:
                logger.info("%s/%s is paused until more of it is finished", *of)
                self.bounded.add(of)
                self.source.pause([of])
            elif size < _MUCH // 2 and of in self.bounded:
                self.bounded.discard(of)
                self._go_on([of])

    def _run_isolated(self, item: Item, work: Work) -> Outcome:
        """Run one record in a child process; in one of the executor's threads."""
        assert self._pool is not None
        cls, control = work.cls, item.control
        try:
            outcome: Outcome = self._pool.run(
                work.record, cls.timeout if cls is not None else None, lambda: control.aborted, control
            )
        except AbortedError:
            return Outcome("aborted")  # its partition is gone, or the worker ends: it runs again elsewhere
        except (TaskTimeoutError, TaskCrashedError) as exc:
            if item.deadly and isinstance(exc, TaskCrashedError):
                return self.runner.fail_unseen(work, exc)
            return self.runner.fail(work, exc)
        self.runner.refused_for(work, outcome)
        return outcome

    # -- collecting --------------------------------------------------------------------------------------------------

    def _collect(self, wait_s: float) -> None:
        """Take what has been finished or settled; wait up to ``wait_s`` for the first."""
        self._turned = time.monotonic()  # draining and letting go of partitions are progress too
        get = self._inbox.get_nowait
        try:
            told = self._inbox.get(timeout=wait_s) if wait_s else get()
            self._busy_at = time.monotonic()
            while True:
                if told is not None:
                    self._told(told)
                told = get()
        except queue.Empty:
            pass
        if self.executor.finished:
            self._take_back(self.executor.finished)

    def _take_back(self, finished: deque[Item]) -> None:
        """What the executor is done with."""
        freed: list[Item] = []
        pending, size, count, done = self.pending, 0, 0, 0
        left_out = 0
        while finished:
            item = finished.popleft()
            count += 1
            record, state, outcome = item.record, item.state, item.outcome
            if record.value is not None:
                size += len(record.value)
            if outcome is not None and outcome.kind == "done" and item.claim is None and not state.gone:
                done += 1  # as nearly all are
                if item.last:
                    freed.append(item)
                state.finished(record.offset)
                pending.append(item)
                continue
            if outcome is not None and outcome.kind == "broken":
                self._broken()
            if outcome is None or state.gone or outcome.kind in _LEFT:
                self.stats["discarded"] += 1  # whoever owns the partition runs it
                left_out += len(record.value or b"")
                for behind in item.rest or ():  # it was to come after it
                    count += 1
                    size += len(behind.record.value or b"")
                    left_out += len(behind.record.value or b"")
                continue
            if outcome.kind == "done":
                done += 1
            else:
                self.stats[outcome.kind] += 1
                if outcome.again_s is not None:
                    if item.claim is not None and outcome.kind != "delayed":
                        item.claimed()
                    parked = self.lot.items
                    if self._later(item, outcome):
                        pending.append(item)
                    else:
                        left_out += len(record.value or b"")
                    if item.last and self.lot.items == parked:
                        freed.append(item)
                    continue
            if item.claim is not None:
                item.claimed()
            if item.last:
                freed.append(item)
            state.finished(record.offset)
            pending.append(item)
        if done:
            self.stats["done"] += done
        self.in_flight -= count
        self.bytes_in_flight -= size
        self.bytes_unsettled += size - left_out
        if freed and self.worker.ordering != "none":
            self.dispatcher.freed(freed)

    def _broken(self) -> None:
        """A fault of kser itself, at a record that a release with the cure runs, and those of its key after it."""
        self.stats["broken"] += 1
        if not self.worker.stopping:
            logger.error("Stopping: a record broke the worker; it stays unsettled")
            self.worker.stop()

    # -- settling ----------------------------------------------------------------------------------------------------

    def _new_settler(self) -> Settler:
        transport, worker = self._transport, self.worker

        def transactional(number: int) -> Sink:
            return transport.sink(f"{worker.group}.{worker.name}.{number}")

        def plain(_number: int) -> Sink:
            return transport.sink(failures_only=True)

        if self.exactly_once:
            return ExactlyOnce(transactional, self._inbox.put, self._fences)
        return AtLeastOnce(plain, self._inbox.put)

    def _settle(self, *, at_once: bool = False) -> None:
        """Give what is finished to the settle thread when it is time; give that up when it hangs."""
        now = time.monotonic()
        # A commit that is out after its time might be stored after what is settled now, and set the offsets back.
        overdue = self.source.commit_overdue
        if (self.uncommitted or (at_once and self._storing)) and now >= self._commit_due and (at_once or not overdue):
            self._commit(wait=at_once)  # one that waits, waits for the one that is out as well
        if self.batch is not None:
            # At least once every wait is bounded, and giving up would send twice: only a hang is worth that.
            if self._ready and now - self.batch.since > self.worker.settle_limit_s * (1 if self.exactly_once else 5):
                self._abandon()
            return
        if self.unknown is not None:
            self._resolve(now)
            return
        if not self.pending or not self._ready or now < self._not_before or overdue:
            return
        if (
            self.in_flight
            and not at_once
            and len(self.pending) < _SETTLE_COUNT
            and now - self._settled_at < _SETTLE_EVERY_S
        ):
            return
        self._give(now)

    def _give(self, now: float) -> None:
        member = None
        if self.exactly_once:
            member = self.source.member()
            if not member.joined:  # a classic group would take such a commit unchecked (KAFKA.md finding 4)
                self._not_before = now + _BACKOFF_S
                return
        items: list[Item] = self.pending
        later: list[Item] = []
        if self._away:
            items, later = self._without_away(now)
        held: list[Item] = []
        settle_id = self._settle_id()
        positions: list[Position] = []
        states = {item.state for item in items}
        if member is not None and not self._verify(states, member):
            self._not_before = max(self._not_before, now + _SETTLE_EVERY_S)
            return
        for state in states:
            try:
                positions.append(state.commit_point(settle_id, _offsets_of(state, later) if later else ()))
            except ValidationError as exc:
                # Wait until more of it is finished: it takes no more meanwhile.
                logger.warning("%s/%s is paused: %s", *state.of, exc.message)
                held = [*(item for item in items if item.state is state), *held]
                items = [item for item in items if item.state is not state]
        self._bound(positions)
        self._settled_at = now
        if not items:
            self._not_before = now + _SETTLE_EVERY_S
            return
        held += later
        self.pending = held
        self.batch = Batch(items, positions, member, settle_id, states)
        self.batch.size = size_of(items) if held else self.bytes_unsettled
        self._settler.give(self.batch)

    def _verify(self, states: Iterable[PartitionState], member: GroupMember) -> bool:
        """Exactly once: whether nobody else has committed anything of these since this worker did.

        Looked at once in each round of the group. Kafka takes what a member commits of a partition that is not its own
        any more, and a member may not know that yet: after a broker died two members of a KIP-848 group had one
        partition, and both settled what they had run of it.
        """
        doubtful = {state.of: state for state in states if state.round != member.round and not state.gone}
        if not doubtful:
            return True
        try:
            found = self.source.committed(list(doubtful), timeout_s=_VERIFY_S)
        except TransportError as exc:
            logger.info("Not settled before it is known what is committed: %s", exc.message)
            return False
        others = []
        for position in found:
            state = doubtful[position.of]
            if decode(position.offset, position.metadata).settle_id == state.known:
                state.round = member.round
            else:
                others.append(position.of)
        if others:
            self.stats["taken over"] += len(others)
            logger.warning(
                "Others have gone on with %s: what was run here and not settled is dropped",
                ", ".join(f"{of.topic}/{of.partition}" for of in others),
            )
            self.source.retake(others)
        return not others

    def _without_away(self, now: float) -> tuple[list[Item], list[Item]]:
        """What is settled now, and what waits for topics whose brokers are away, with what is behind it in its lane."""
        away = {topic for topic, (until, _) in self._away.items() if until > now}
        if not away:
            return self.pending, []
        items: list[Item] = []
        later: list[Item] = []
        lanes: set[tuple[int, bytes | None]] = set()
        by_key = self.worker.ordering != "partition"
        for item in self.pending:
            lane = id(item.state), item.record.key if by_key else b""
            if lane in lanes or any(record.topic in away for record in item.outcome.records):
                later.append(item)
                if lane[1] is not None:
                    lanes.add(lane)
            else:
                items.append(item)
        return items, later

    def _note_away(self, verdict: Verdict, now: float) -> None:
        if verdict.away is not None:
            _, before_s = self._away.get(verdict.away, (0.0, 0.0))
            pause_s = min(max(2 * before_s, _AWAY_S), _LONGEST_AWAY_S)
            self._away[verdict.away] = now + pause_s, pause_s
            logger.warning("Topic %s takes nothing: what goes there is tried again in %g s", verdict.away, pause_s)
        elif verdict.batch is not None and verdict.settled:
            since = verdict.batch.since  # what was tried with it goes again
            self._away = {topic: kept for topic, kept in self._away.items() if kept[0] > since}

    def _told(self, verdict: Verdict) -> None:
        if verdict.settler is not self._settler:
            return  # one that was given up has come back
        if verdict.fatal is not None:
            self.failure = self.failure or verdict.fatal
            self._ready = False  # its batch stays: whatever became of that, none of its offsets is committed any more
            return
        if verdict.batch is None:
            self._ready = True
            return
        batch, self.batch = self.batch, None
        assert batch is verdict.batch
        if verdict.unknown:
            self.unknown = batch
            self._resolve(time.monotonic())
            return
        self._apply(verdict)

    def _apply(self, verdict: Verdict) -> None:
        now = time.monotonic()
        if verdict.pause_s:
            self._not_before = now + verdict.pause_s
        if verdict.away is not None or self._away:
            self._note_away(verdict, now)
        if verdict.batch is not None and verdict.settled is verdict.batch.items:
            verdict.batch.settle()
            self.bytes_unsettled -= verdict.batch.size
        again = [item for item in verdict.again if not item.state.gone]
        if again:
            self.pending = [*again, *self.pending]
        for item, error in verdict.refused:
            if not item.state.gone:
                self._refused(item, error)
        if verdict.again or verdict.refused:
            self._weigh()
        if self.loader.loaded:
            for item in verdict.settled:
                if item.claim is not None:
                    self.store.settled(item.claim)
        if verdict.settled and verdict.batch is not None and not self.exactly_once:
            self.uncommitted |= {state for state in verdict.batch.states if not state.gone}

    def _refused(self, item: Item, error: Error) -> None:
        """The broker refused what follows from a record, for good: something else follows from it."""
        outcome: Outcome = item.outcome
        where = f"{item.record.topic}/{item.record.partition}/{item.record.offset}"
        if error.extra.get("topic") == self.events_topic:
            logger.error("An event of %s was refused by the broker: %s", where, error.message)
            outcome.records = [record for record in outcome.records if record.topic != self.events_topic]
        elif error.extra.get("topic") == self.dead_topic:
            self._letter_refused(item, error)
        elif outcome.refused is not None:
            # Once: of what tells the refusal, what is refused too is then only logged.
            refused, outcome.refused = outcome.refused, None
            outcome.records, outcome.ahead = refused(error), 0
            if item.claim is not None and error.extra.get("topic") != state_topic(self.worker.group, item.record.topic):
                item.claimed()
        else:
            logger.error("What follows from %s was refused by the broker: %s", where, error.message)
            self._keep_own(item, str(error.extra.get("topic") or ""))
        self.pending.insert(0, item)

    def _keep_own(self, item: Item, refused: str) -> None:
        """What a hook sent at a refusal was refused as well: its dead letter and events are kept, without that."""
        own = {self.events_topic, self.dead_topic, state_topic(self.worker.group, item.record.topic)} - {refused}
        outcome: Outcome = item.outcome
        kept = [(at < outcome.ahead, record) for at, record in enumerate(outcome.records) if record.topic in own]
        outcome.records, outcome.ahead = [record for _, record in kept], sum(ahead for ahead, _ in kept)

    def _letter_refused(self, item: Item, error: Error) -> None:
        """The broker refused a dead letter: the least that one can be is tried, then the worker ends."""
        outcome: Outcome = item.outcome
        if outcome.shortened:
            self.failure = self.failure or TransportError(
                f"A dead letter cannot be written to {self.dead_topic}, so the worker ends and nothing is lost: "
                f"{error.message}"
            )
            return
        outcome.shortened = True
        kmsg = item.work.kmsg if item.work is not None else None
        for at, record in enumerate(outcome.records):
            if record.topic == self.dead_topic:
                outcome.records[at] = dead_letter(
                    item.record,
                    self.dead_topic,
                    error=Result(retcode=1, stderr=headers.text(record.headers, headers.ERROR)),
                    kmsg=kmsg,
                    attempt=headers.number(record.headers, headers.ATTEMPT, 1),
                    group=self.worker.group,
                    worker=self.worker.name,
                    now_ms=headers.number(record.headers, headers.AT),
                    max_bytes=LEAST_BYTES,
                )

    def _commit(self, *, wait: bool) -> None:
        """At least once: what follows from the finished records of ``uncommitted`` is confirmed, store their offsets.

        ``wait``: until they are stored, because the partitions go; else the answer comes by _stored().
        """
        if self._storing and not wait:
            return
        states = self.uncommitted | self._storing
        self.uncommitted, self._storing = set(), set()
        settle_id = self._settle_id()
        positions = []
        open_ = [*self.pending, *self.batch.items] if self.batch is not None else self.pending
        for state in states:
            if state.gone:
                continue
            try:
                positions.append(state.commit_point(settle_id, _offsets_of(state, open_)))
            except ValidationError as exc:
                logger.warning("%s/%s is paused: %s", *state.of, exc.message)
        self._bound(positions)
        if not positions:
            return
        self._storing = states
        committed = {position.of for position in positions}
        self._reaches = {state: state.asked for state in states if state.of in committed}
        try:
            if not wait:
                self.source.commit_later(positions, partial(self._answered, self.source))
                return
            self.source.commit(positions)
        except TransportError as exc:
            self._stored(exc)
        else:
            self._stored(None)

    def _answered(self, source: Source, error: Error | None) -> None:
        if source is self.source:  # else one that was left: nobody waits for it any more
            self._stored(error)

    def _stored(self, error: Error | None) -> None:
        states, self._storing = self._storing, set()
        if error is None:
            for state in states:
                state.confirm(self._reaches.get(state, 0))
            return
        # Nothing is lost: killed before the next try, these records run again. On a GroupError a rebalance is about to
        # say whose the partitions are.
        logger.log(
            logging.INFO if isinstance(error, GroupError) else logging.WARNING,
            "Not committed, will be tried again: %s",
            error.message,
        )
        self._commit_due = time.monotonic() + _BACKOFF_S
        self.uncommitted |= {state for state in states if not state.gone}

    # -- a settle thread that hangs, an answer that got lost ---------------------------------------------------------

    def _abandon(self) -> None:
        logger.warning(
            "A batch has been settling for over %g s: given up, the committed offsets will tell what became of it",
            self.worker.settle_limit_s,
        )
        self.stats["settlers abandoned"] += 1
        self._settler.abandon()
        batch, self.batch = self.batch, None
        assert batch is not None
        if self.exactly_once:
            self.unknown = batch
        else:
            self.pending = [*(item for item in batch.items if not item.state.gone), *self.pending]
        self._ready = False
        self._settler = self._new_settler()
        self._weigh()

    def _resolve(self, now: float) -> None:
        """Find out whether a batch was committed. Its transaction is over once a new producer of its id is ready."""
        batch = self.unknown
        if batch is None or not self._ready or now < self._not_before:
            return
        mine = [p.of for p in batch.positions if (state := self.parts.get(p.of)) is not None and not state.gone]
        if mine:
            try:
                found = self.source.committed(mine, timeout_s=5)
            except TransportError as exc:
                # Ask again, never assume. On a GroupError a rebalance will take the partitions away.
                logger.warning("Not known yet what became of a batch: %s", exc.message)
                self._not_before = now + _BACKOFF_S
                return
            if any(decode(p.offset, p.metadata).settle_id == batch.settle_id for p in found):
                self.stats["answers lost"] += 1
                batch.settle()
                logger.info("The answer to a commit was lost, its transaction was not")
                self.unknown = None
                self._weigh()
                return
        self.unknown = None
        for state in batch.states:
            state.round = None
        logger.info("A batch of %d records was not committed: settled again", len(batch.items))
        self.pending = [*(item for item in batch.items if not item.state.gone), *self.pending]
        self._weigh()

    def _weigh(self) -> None:
        """Count anew what is run and not settled: some of it did not go the usual way."""
        batches = [batch for batch in (self.batch, self.unknown) if batch is not None]
        self.bytes_unsettled = size_of(self.pending) + sum(batch.size for batch in batches)

    # -- rebalances (RebalanceListener) ------------------------------------------------------------------------------

    def on_assign(self, partitions: Sequence[Partition]) -> Sequence[Position]:
        """Start with a new state for each: results of an earlier assignment are worth nothing."""
        self._wait_for_batches_of(set(partitions))
        found = self._committed(partitions)
        for position in found:
            self.parts[position.of] = state = PartitionState(position.of, position)
            if state.was_open:
                self._crashed(state)
            self.guarded.pop(position.of, None)
            for paused in (self.halted, self.bounded, self.stilled, self.clogged, self.backlog.clogged):
                paused.discard(position.of)
        self._watched = -1  # so that topics that people paused are paused again
        logger.debug("Assigned: %s", ", ".join(f"{p.topic}/{p.partition}" for p in partitions))
        return [position for position in found if position.offset >= 0]

    def _committed(self, partitions: Sequence[Partition]) -> list[Position]:
        """Where partitions that come were left. Asked in slices, between which a stop is heard."""
        end = time.monotonic() + _COMMITTED_S
        while True:
            self._decline_when_stopping()
            asked = time.monotonic()
            try:
                return self.source.committed(partitions, timeout_s=_ASK_S)
            except TransportError:
                now = time.monotonic()
                if now < asked + _ASK_S or now >= end:
                    raise  # an answer, if it came before its time was up

    def _decline_when_stopping(self) -> None:
        """Let go of partitions that are just coming, which only poll() can end: nothing of them would be run."""
        if self._should_stop():
            raise _DeclinedError("Partitions that came are not taken over, because the worker stops")

    def _crashed(self, state: PartitionState) -> None:
        """The owner before ended without letting go: what it may have been running is noted."""
        self.stats["crashes found"] += 1
        try:
            end = self.source.watermarks(state.of, timeout_s=5)[1]
        except TransportError:
            end = sys.maxsize  # as if all of it had been there
        state.crashed(end)
        logger.warning("The last owner of %s/%s crashed, or was cut off: what it was running runs again", *state.of)

    def _wait_for_batches_of(self, partitions: set[Partition]) -> None:
        """A batch of an earlier assignment must be over before the offsets are read, or its records run twice."""
        end = time.monotonic() + 2 * self.worker.settle_limit_s + _UNRESOLVED_S
        while any(
            batch is not None and any(p.of in partitions for p in batch.positions)
            for batch in (self.batch, self.unknown)
        ):
            if self.failure is not None:
                raise self.failure
            self._decline_when_stopping()
            if time.monotonic() > end:
                raise TransportError(
                    "It could not be found out whether a batch of the partitions that come was committed: the worker "
                    "stops, so that nothing is run twice"
                )
            self._collect(0.05)
            if self.batch is not None or self.unknown is not None:
                self._settle()

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        """Start nothing more of these, let the running one end within the budget, settle, let go."""
        states = [self.parts[p] for p in partitions if p in self.parts]
        # Of what this callback may take half is for settling.
        budget = min(self.worker.drain_s, self.source.callback_s / 2)
        self._close(states, min(time.monotonic() + budget, self.stop_by))
        self._forget(partitions)
        logger.debug("Revoked: %s", ", ".join(f"{p.topic}/{p.partition}" for p in partitions))

    def on_lost(self, partitions: Sequence[Partition]) -> None:
        """Others may own them already: drop everything, commit nothing."""
        self._shut([self.parts[partition] for partition in partitions if partition in self.parts])
        self._forget(partitions)
        self._joined, self._join_said = False, time.monotonic()
        logger.warning("Lost: %s", ", ".join(f"{p.topic}/{p.partition}" for p in partitions))

    def _shut(self, states: Iterable[PartitionState]) -> None:
        """Start nothing more of these: what was taken and has not begun is left to the next owner."""
        for state in states:
            state.closed = True
            if waiting := self.dispatcher.drop(state):
                self.in_flight -= len(waiting)
                self.bytes_in_flight -= size_of(waiting)
                self.stats["discarded"] += len(waiting)
        self.executor.drop_closed()

    def _close(self, states: Sequence[PartitionState], end: float) -> None:
        self._shut(states)
        closing = set(states)

        def running() -> bool:
            return self.executor.running_of(closing) or bool(self.executor.finished)

        while running() and time.monotonic() < end and self.worker.stopping < 2:
            self._collect(0.02)
            self._settle()
            self.executor.look_after()
        self._collect(0)
        # The membership is still valid here: settle what there is, the batch under way and one more.
        end = time.monotonic() + self.worker.settle_limit_s

        def unsettled() -> bool:
            batches = [b.items for b in (self.batch, self.unknown) if b is not None]
            return not closing.isdisjoint(self.uncommitted | self._storing) or any(
                item.state in closing for items in (self.pending, *batches) for item in items
            )

        while unsettled() and time.monotonic() < end and self.failure is None and self.worker.stopping < 3:
            self._settle(at_once=True)
            self._collect(0.02)
        self._let_go(closing)

    def _let_go(self, closing: AbstractSet[PartitionState]) -> None:
        """Commit that nobody works on these any more. Not while a batch of theirs may still be committed after that."""
        batches = [batch for batch in (self.batch, self.unknown) if batch is not None]
        if any(not closing.isdisjoint(batch.states) for batch in batches):
            return
        if self.exactly_once and self.draining and (batches or not self._ready):
            return  # it was waited for; the next owner takes it for a crash
        settle_id = self._settle_id()
        positions = []
        for state in closing:
            if (state.marked or state.was_open) and not state.gone:
                with contextlib.suppress(ValidationError):
                    positions.append(state.commit_point(settle_id, _offsets_of(state, self.pending), clean=True))
        if not positions:
            return
        try:
            self._store(positions, settle_id, set(closing))
        except TransportError as exc:
            logger.info("Not noted that partitions were let go of as they should be: %s", exc.message)

    def _forget(self, partitions: Sequence[Partition]) -> None:
        gone = [state for p in partitions if (state := self.parts.pop(p, None)) is not None]
        for state in gone:
            state.gone = True
            self.uncommitted.discard(state)
            self.guarded.pop(state.of, None)
            for paused in (self.halted, self.bounded, self.stilled, self.clogged, self.backlog.clogged):
                paused.discard(state.of)
        self.pending = [item for item in self.pending if not item.state.gone]
        self._weigh()
        self.lot.drop(set(gone))
        self.loader.drop(state.of for state in gone)
        self.executor.abort("lost", set(gone))
        self.executor.drop_closed()

    # -- stopping ----------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Take nothing more, let what runs end, settle; the group is left after that (KAFKA.md finding 13)."""
        self.draining = True
        self.worker.drains()
        logger.info("Stopping: up to %s s for what is running", self.worker.drain_s)
        self._shut(self.parts.values())
        self.executor.release()
        self.stop_by = time.monotonic() + self.worker.drain_s
        settle_by = self.stop_by + self.worker.settle_limit_s
        while self.worker.stopping < 2 and self.failure is None:
            now = time.monotonic()
            unsettled = (
                self.pending or self.uncommitted or self._storing or self.batch is not None or self.unknown is not None
            )
            if not (self.in_flight and now < self.stop_by) and not (unsettled and now < settle_by):
                break
            self.source.pause(set(self.parts) - self.halted)
            self.halted |= set(self.parts)
            try:
                self.source.poll(0, 1)  # stays a member
            except _DeclinedError as exc:
                logger.info("%s", exc.message)
            except TransportError as exc:
                logger.warning("The group is lost while this worker stops: %s", exc.message)
                break
            self._collect(0.02)
            self._settle(at_once=True)
            self.executor.look_after()

    def _leave(self) -> None:
        self.draining = True
        self.executor.abort("stopping")
        try:
            self.source.close(10)
        except Error as exc:
            logger.warning("Closing: %s", exc.message)
        if not self._settler.close(10):
            logger.warning("The producers of the worker did not close within 10 s and are left behind")
        running = self.executor.running()
        if not self.executor.stop(0.1):
            running = self.executor.running() or running
            self.worker.left = len(running)
            for one in running:
                logger.warning(
                    "%s[%s] still runs past the budget: it is left unsettled, the next worker runs it again",
                    one.entrypoint,
                    one.uuid,
                )
        self.files.close()

    # -- for onlookers, from any thread ------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """Where it stands: "starting" until the group has taken it in, "running", or "draining"."""
        if self.draining:
            return "draining"
        return "running" if self._joined else "starting"

    def status(self) -> HealthStatus:
        """How it is doing."""
        free, reasons = self.executor.free, []
        if not self._joined:
            reasons.append("not in the group yet")
        if self.draining or self.worker.stopping:
            reasons.append("draining")
        if self._paused_said:
            reasons.append("paused")
        if self.executor.exhausted:
            reasons.append("too many threads were given up")
        elif free <= 0:
            reasons.append("no free executor")
        return HealthStatus(
            worker=self.worker.name,
            group=self.worker.group,
            reasons=tuple(reasons),
            polled_s_ago=time.monotonic() - self._turned,
            running=tuple(self.executor.running()),
            in_flight=self.in_flight,
            unsettled=len(self.pending),
            free_executors=max(free, 0),
            assigned=self._assigned(),
            draining=self.draining,
        )

    def _assigned(self) -> dict[str, list[int]]:
        """Partitions that it owns, by topic."""
        found: dict[str, list[int]] = {}
        for of in sorted(self.parts):
            found.setdefault(of.topic, []).append(of.partition)
        return found


def _with(record: Record, changed: Mapping[str, int | str], without: AbstractSet[str] = frozenset()) -> Record:
    """The record with these headers instead of its own of the same names."""
    kept = [header for header in record.headers if header[0] not in changed and header[0] not in without]
    return record._replace(headers=[*kept, *((name, str(value).encode()) for name, value in changed.items())])


def _offsets_of(state: PartitionState, items: Iterable[Item]) -> list[int]:
    return [item.record.offset for item in items if item.state is state]
