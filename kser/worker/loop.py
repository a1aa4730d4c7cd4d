"""The loop of a worker: poll, dispatch, collect, settle.

At least once: a record's consequences are produced and every one of them confirmed before its offset is committed. What
is killed in between is run again by the next owner of the partition, with the same uuids.
"""

import logging
import os
import queue
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kser.controller import Controller
from kser.errors import ConfigurationError, DeliveryError, Error, GroupError, TransportError
from kser.events import events_topic
from kser.producer import max_message_bytes
from kser.sequencing.registry import OperationRegistry
from kser.transport import OutRecord, Partition, Position, Record, Sink, Source, Transport
from kser.worker.executor import Executor, Finished
from kser.worker.lockfiles import LockFiles
from kser.worker.offsets import PartitionState
from kser.worker.runner import Runner
from kser.worker.shutdown import stopping_on_signals
from kser.worker.topics import ensure_group_topics

__all__ = ["Worker"]

logger = logging.getLogger(__name__)

#: Seconds between two commits while tasks keep coming; an idle worker commits at once.
_COMMIT_EVERY_S = 0.1
#: Seconds before something the broker refused for now is tried again.
_BACKOFF_S = 0.5
#: Seconds between two "Consumer is paused" lines.
_PAUSED_EVERY_S = 30
#: A full worker leaves the client alone for this long before it pauses what it owns: a pause throws away what the
#: client has fetched ahead, and short tasks make room before that.
_JAM_S = 0.25
#: Longest wait of one turn of the loop: how late a stop or a pause may be seen.
_TURN_S = 0.2


class _Pending:
    """A record that was run, and how many of its consequences the broker has not confirmed."""

    __slots__ = ("due", "error", "finished", "open", "retry", "then")

    def __init__(self, finished: Finished) -> None:
        self.finished = finished
        self.open = 0
        #: What to produce once all that is open is confirmed.
        self.then: list[OutRecord] = []
        #: What to produce again, not before ``due``.
        self.retry: list[OutRecord] = []
        self.due = 0.0
        #: A refusal for good.
        self.error: Error | None = None


class Worker:
    """Runs the tasks of a registry.

    Args:
        registry: an OperationRegistry, or a Controller.
        topics: topics to take messages from.
        group: consumer group; also names the group's own topics, ``{group}.events``.
        config: librdkafka properties, at least ``bootstrap.servers``; not needed with ``transport``.
        transport: the broker, when it is not Kafka by ``config``.
        name: name of this worker in events and logs; default host and process id.
        drain_s: seconds that running tasks get to end when the worker is asked to stop or a partition is taken away.
        max_in_flight: records taken and not settled, beyond which no more are fetched.
        max_poll_records: records taken from the client at a time.
        create_topics: make the group's topics when they are missing; else refuse to start.
        events: False to emit no events.

    Raises ConfigurationError for values that cannot be.
    """

    def __init__(
        self,
        registry: OperationRegistry | Controller | type[Controller],
        *,
        topics: Sequence[str],
        group: str = "kser",
        config: Mapping[str, Any] | None = None,
        transport: Transport | None = None,
        name: str | None = None,
        drain_s: float = 30,
        max_in_flight: int = 500,
        max_poll_records: int = 500,
        create_topics: bool = True,
        events: bool = True,
    ) -> None:
        if isinstance(topics, str) or not topics:
            raise ConfigurationError(f"topics={topics!r}: give a list with at least one topic")
        if not group:
            raise ConfigurationError("group is empty: name the consumer group")
        if drain_s < 0 or max_in_flight < 1 or max_poll_records < 1:
            raise ConfigurationError(
                f"drain_s={drain_s}, max_in_flight={max_in_flight}, max_poll_records={max_poll_records}: the first "
                "must not be negative, the others are at least 1"
            )
        if transport is None and not config:
            raise ConfigurationError("No broker: give config={'bootstrap.servers': 'host:port'}")
        self.controller = registry.controller if isinstance(registry, OperationRegistry) else registry
        self.topics = list(topics)
        self.group = group
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        self.drain_s = drain_s
        self.max_in_flight = max_in_flight
        self.max_poll_records = max_poll_records
        self.create_topics = create_topics
        #: What became of the records so far: done, failed, rejected, foreign, discarded, came again.
        self.stats: Counter[str] = Counter()
        self._config = dict(config or {})
        self._transport = transport
        self._runner = Runner(self.controller, group, self.name, max_message_bytes(), events=events)
        self._stop = 0

    # -- face --------------------------------------------------------------------------------------------------------

    def run(self, *, until_idle: bool = False) -> None:
        """Take and run messages until stop(), SIGTERM, SIGINT or the terminate file. Blocks.

        Args:
            until_idle: return as well once a whole turn (0.2 s) with partitions assigned brought nothing, for tests and
                scripts. On the memory transport that means that everything sent is done.

        On the way out what runs gets ``drain_s`` seconds to end, all that ended is settled, and the group is left. What
        did not end is run by the next owner.

        Raises:
            TransportError: no broker answered at the start, or the client cannot go on.
            ConfigurationError: a setting is wrong, or topics are missing.
        """
        transport = self._transport or self._connect()
        ensure_group_topics(transport.admin(), self.group, self.topics, create=self.create_topics)
        with stopping_on_signals(self.stop):
            _Loop(self, transport, self._runner).run(until_idle=until_idle)

    def stop(self) -> None:
        """Ask run() to end. The first time it drains, the second time it waits for no task. From any thread."""
        self._stop += 1

    @property
    def stopping(self) -> int:
        """How often stop() was called."""
        return self._stop

    def _connect(self) -> Transport:
        from kser.confluent.transport import ConfluentTransport  # here: it loads the Kafka client

        return ConfluentTransport(self._config)


class _Loop:
    """One run of a worker. Everything here happens in the thread that called run(), tasks excepted."""

    def __init__(self, worker: Worker, transport: Transport, runner: Runner) -> None:
        self.worker = worker
        self.stats = worker.stats
        self.events_topic = events_topic(worker.group)
        self.source: Source = transport.source(worker.group)
        self.sink: Sink = transport.sink()
        self.executor = Executor(runner)
        self.files = LockFiles()
        self.parts: dict[Partition, PartitionState] = {}
        self.halted: set[Partition] = set()
        self.in_flight = 0
        self.pending: set[_Pending] = set()
        self.retrying: list[_Pending] = []
        self.commit_due = 0.0
        self.paused_said = 0.0
        self.polled = 0.0
        #: When the budget of a stop ends: draining and the last on_revoke() share it.
        self.stop_by = float("inf")

    def run(self, *, until_idle: bool) -> None:
        """Until asked to stop, or idle."""
        self.source.subscribe(self.worker.topics, self)
        try:
            idle = False
            while not (self._should_stop() or (until_idle and idle)):
                idle = self.turn()
            self._drain()
        finally:
            self._leave()

    def _should_stop(self) -> bool:
        return bool(self.worker.stopping) or self.files.terminate

    def turn(self) -> bool:
        """One round: fetch unless there is enough, then settle what has ended. True when there was nothing to do."""
        self._throttle()
        busy = bool(self.in_flight or self.pending)
        records: Sequence[Record] = ()
        now = time.monotonic()
        if self.in_flight < self.worker.max_in_flight or self.halted or now - self.polled > _JAM_S:
            self.polled = now
            self._halt(self.in_flight >= self.worker.max_in_flight or self.files.paused)
            records = self.source.poll(0 if busy else _TURN_S, self.worker.max_poll_records)
            self._take(records)
        self._collect(0.01 if self.in_flight else 0)
        self._settle()
        return bool(self.parts) and not (busy or records or self.in_flight or self.pending)

    # -- taking ------------------------------------------------------------------------------------------------------

    def _take(self, records: Sequence[Record]) -> None:
        chunk: list[tuple[PartitionState, Record]] = []
        for record in records:
            state = self.parts.get(record.of)
            if state is None or state.closed:
                continue
            if not state.take(record.offset):
                self.stats["came again"] += 1
                continue
            chunk.append((state, record))
        if chunk:
            self.in_flight += len(chunk)
            self.executor.submit(chunk)

    def _throttle(self) -> None:
        """Obey the pause file, and tell what runs."""
        paused = self.files.paused
        if paused:
            self._say_paused()
            self.executor.hold()
        else:
            self.paused_said = 0.0
            self.executor.release()
        self.files.running(self.executor.doing)

    def _halt(self, full: bool) -> None:
        """Pause fetching what is owned, or let it go on: owned by the worker, and renewed after each rebalance."""
        if full:
            more = self.parts.keys() - self.halted
            if more:
                self.source.pause(more)
                self.halted |= more
        elif self.halted and self.in_flight <= self.worker.max_in_flight // 2:
            self.source.resume(self.halted & self.parts.keys())
            self.halted.clear()

    def _say_paused(self) -> None:
        now = time.monotonic()
        if not self.paused_said or now - self.paused_said > _PAUSED_EVERY_S:
            self.paused_said = now
            logger.warning("Consumer is paused")

    # -- settling ----------------------------------------------------------------------------------------------------

    def _collect(self, wait_s: float) -> None:
        """Take what the executor has finished; wait up to ``wait_s`` for the first."""
        try:
            finished = self.executor.finished.get(timeout=wait_s) if wait_s else self.executor.finished.get_nowait()
            while True:
                self._collected(finished)
                finished = self.executor.finished.get_nowait()
        except queue.Empty:
            pass

    def _collected(self, finished: Finished) -> None:
        self.in_flight -= 1
        outcome = finished.outcome
        if outcome is None or self.parts.get(finished.state.of) is not finished.state:
            self.stats["discarded"] += 1  # of an assignment that is over: whoever owns the partition runs it
            return
        self.stats[outcome.kind] += 1
        if outcome.kind == "broken":
            self.worker.stop()
            return
        pending = _Pending(finished)
        self.pending.add(pending)
        if outcome.ahead:
            pending.then = outcome.records[outcome.ahead :]
            self._produce(pending, outcome.records[: outcome.ahead])
        else:
            self._produce(pending, outcome.records)

    def _produce(self, pending: _Pending, records: Sequence[OutRecord]) -> None:
        pending.open += len(records)
        for record in records:
            try:
                self.sink.produce(record, self._confirmation(pending, record))
            except Error as exc:
                self._answered(pending, record, exc)
        self._maybe_settled(pending)

    def _confirmation(self, pending: _Pending, record: OutRecord) -> Callable[[Error | None], None]:
        def confirmed(error: Error | None) -> None:
            self._answered(pending, record, error)
            self._maybe_settled(pending)

        return confirmed

    def _answered(self, pending: _Pending, record: OutRecord, error: Error | None) -> None:
        pending.open -= 1
        if error is None:
            return
        # A delivery that timed out is no verdict: the broker was away, and takes it when it is back.
        if isinstance(error, DeliveryError) or (isinstance(error, TransportError) and error.retriable):
            if not pending.retry:
                pending.due = time.monotonic() + _BACKOFF_S
                self.retrying.append(pending)
            pending.retry.append(record)
            logger.warning("Not confirmed by the broker, will be sent again: %s", error.message)
        elif record.topic == self.events_topic:
            logger.error(
                "An event of %s was refused by the broker: %s", _describe(pending.finished.record), error.message
            )
        else:
            pending.error = error

    def _maybe_settled(self, pending: _Pending) -> None:
        if pending.open or pending.retry:
            return
        if pending.error is not None:
            error, pending.error = pending.error, None
            outcome = pending.finished.outcome
            refused = outcome.refused if outcome is not None else None
            if refused is not None and outcome is not None:
                outcome.refused = None  # once: what tells the refusal may be refused too, and is then only logged
                pending.then = []
                self._produce(pending, refused(error))
                return
            logger.error(
                "What follows from %s was refused by the broker: %s", _describe(pending.finished.record), error.message
            )
        if pending.then:
            records, pending.then = pending.then, []
            self._produce(pending, records)
            return
        self.pending.discard(pending)
        pending.finished.state.settled(pending.finished.record.offset)

    def _settle(self) -> None:
        """Serve confirmations, send again what has to be, commit what is settled when it is time."""
        if self.pending:
            if self.in_flight:
                self.sink.poll(0)
            else:
                self.sink.flush(0.005)  # nothing more is coming: sends at once what still waits for company
        now = time.monotonic()
        if self.retrying and self.retrying[0].due <= now:
            again, self.retrying = self.retrying, []
            for pending in again:
                records, pending.retry = pending.retry, []
                self._produce(pending, records)
        idle = not self.in_flight and not self.pending
        if idle or now >= self.commit_due:
            self._commit(self.parts.values())

    def _commit(self, states: Any) -> None:
        positions: list[Position] = [p for state in states if (p := state.committable()) is not None]
        if not positions:
            return
        try:
            self.source.commit(positions)
        except GroupError as exc:
            # Nothing may have been stored; a rebalance is about to say whose the partitions are.
            logger.info("Not committed, the partition is not ours any more: %s", exc.message)
            self.commit_due = time.monotonic() + _BACKOFF_S
            return
        except TransportError as exc:
            logger.warning("Not committed, will be tried again: %s", exc.message)
            self.commit_due = time.monotonic() + _BACKOFF_S
            return
        self.commit_due = time.monotonic() + _COMMIT_EVERY_S
        for position in positions:
            state = self.parts.get(position.of)
            if state is not None:
                state.committed = position.offset

    # -- rebalances (RebalanceListener) ------------------------------------------------------------------------------

    def on_assign(self, partitions: Sequence[Partition]) -> None:
        """Start with a new state for each: results of an earlier assignment are worth nothing."""
        for partition in partitions:
            self.parts[partition] = PartitionState(partition)
            self.halted.discard(partition)
        logger.debug("Assigned: %s", ", ".join(f"{p.topic}/{p.partition}" for p in partitions))

    def on_revoke(self, partitions: Sequence[Partition]) -> None:
        """Start nothing more of these, let the running one end within the budget, settle, let go."""
        states = [self.parts[p] for p in partitions if p in self.parts]
        self._close(states, min(time.monotonic() + self.worker.drain_s, self.stop_by))
        self._forget(partitions)
        logger.debug("Revoked: %s", ", ".join(f"{p.topic}/{p.partition}" for p in partitions))

    def on_lost(self, partitions: Sequence[Partition]) -> None:
        """Others may own them already: drop everything, commit nothing."""
        for partition in partitions:
            if partition in self.parts:
                self.parts[partition].closed = True
        self._forget(partitions)
        logger.warning("Lost: %s", ", ".join(f"{p.topic}/{p.partition}" for p in partitions))

    def _close(self, states: Sequence[PartitionState], end: float) -> None:
        for state in states:
            state.closed = True
        closing = {id(state) for state in states}

        def unsettled() -> bool:
            running = self.executor.running
            if running is not None and id(running[0]) in closing:
                return True
            return any(id(p.finished.state) in closing for p in self.pending)

        held = not self.executor.finished.empty()
        while (held or unsettled()) and time.monotonic() < end and self.worker.stopping < 2:
            self._collect(0.02)
            self.sink.poll(0.005)
            held = not self.executor.finished.empty()
        self._collect(0)
        self._commit(states)

    def _forget(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            state = self.parts.pop(partition, None)
            self.halted.discard(partition)
            if state is not None:
                self.pending = {p for p in self.pending if p.finished.state is not state}
                self.retrying = [p for p in self.retrying if p.finished.state is not state]

    # -- stopping ----------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Take nothing more, let what runs end, settle; the group is left after that (KAFKA.md finding 13)."""
        if self.worker.stats["broken"]:
            logger.error("Stopping: a record broke the worker; it stays unsettled")
        logger.info("Stopping: up to %s s for what is running", self.worker.drain_s)
        for state in self.parts.values():
            state.closed = True  # what was taken but not started is left to the next owner
        self.executor.release()
        self.stop_by = time.monotonic() + self.worker.drain_s
        while time.monotonic() < self.stop_by and self.worker.stopping < 2:
            if not self.in_flight and not self.pending:
                break
            self.source.pause(set(self.parts) - self.halted)
            self.halted |= set(self.parts)
            self.source.poll(0, 1)  # stays a member
            self._collect(0.02)
            self._settle()
        self._commit(self.parts.values())

    def _leave(self) -> None:
        for close in (self.source.close, self.sink.close):
            try:
                close(10)
            except Error as exc:
                logger.warning("Closing: %s", exc.message)
        if not self.executor.stop(0.1):
            logger.warning(
                "%s still runs past the budget: it is left unsettled, the next worker runs it again",
                self.executor.doing or "A task",
            )
        self.files.close()


def _describe(record: Record) -> str:
    return f"{record.topic}/{record.partition}/{record.offset}"
