"""Settling: a batch of finished records, what follows from them, and their offsets become durable together.

A settle thread owns the sinks and does nothing else, because a transaction may hang for ever in the client
(librdkafka#5456): the poll thread then abandons it and makes a new one, whose sinks have the same transactional ids and
so end what the old ones left. A transaction is open for milliseconds, never while a task runs, and nothing is lost with
one that is aborted: its records stay in memory and go into the next.

Exactly once: begin, produce, send the offsets, commit, with several transactional ids in turn (KAFKA.md finding 7).
At least once: produce and wait for every confirmation; the poll thread commits the offsets then.
"""

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kser.errors import DeliveryError, Error, FencedError, GroupError, TransportError
from kser.transport import GroupMember, OutRecord, Position, Sink
from kser.worker.dispatch import Item
from kser.worker.offsets import PartitionState

__all__ = ["TWIN_S", "AtLeastOnce", "Batch", "ExactlyOnce", "Settler", "Verdict"]

logger = logging.getLogger(__name__)

#: Transactional producers in turn: while the markers of one transaction are written, the next can begin.
PRODUCERS: Final = 3
#: The same call again when it got no answer, at most so often.
_TRIES: Final = 3
#: Fenced again within this time, in seconds, it is a twin. One fence is no proof: a transaction that timed out answers
#: the same (finding 8), and where its sink can tell that it did it does not count at all.
TWIN_S: Final = 60.0
#: Longest wait for the confirmations of one batch, in seconds.
_DELIVERY_S: Final = 15.0
#: Between two tries to reach the transaction coordinator, in seconds.
_AGAIN_S: Final = 0.5


@dataclass(slots=True)
class Batch:
    """What is settled together."""

    items: list[Item]
    #: The offsets to commit once all of it is durable.
    positions: list[Position]
    #: The member that commits them; None at least once, where the poll thread does.
    member: GroupMember | None
    #: In the metadata of each position.
    settle_id: str
    #: The partitions of the items.
    states: set[PartitionState]
    #: When it was given away, time.monotonic().
    since: float = 0.0
    #: Bytes of the records.
    size: int = 0
    #: True once all of it is known to be durable.
    settled: bool = False

    def settle(self) -> None:
        """Note that all of it is durable. In the poll thread."""
        self.settled = True
        committed = {position.of for position in self.positions}
        for state in self.states:
            if state.of in committed:
                state.known = self.settle_id
                if self.member is not None:  # at least once nothing is committed by it
                    state.confirm(state.asked)


@dataclass(slots=True)
class Verdict:
    """What became of a batch. Each of its items is in one of the three lists, unless ``unknown``."""

    settler: "Settler"
    #: None for the first verdict of a settler: it is ready.
    batch: Batch | None
    settled: list[Item] = field(default_factory=list)
    #: Nothing of them is visible, or not all of it: settle them again.
    again: list[Item] = field(default_factory=list)
    #: The broker refused what follows from them, for good.
    refused: list[tuple[Item, Error]] = field(default_factory=list)
    #: The answer to the commit is lost: the committed offsets know.
    unknown: bool = False
    #: Seconds to wait before the next batch.
    pause_s: float = 0.0
    #: The topic whose brokers took nothing, and what else was in the batch fell with it.
    away: str | None = None
    #: The worker cannot go on.
    fatal: Error | None = None


class Settler(ABC):
    """A thread that settles one batch after the other.

    Args:
        new_sink: makes a sink; called in the thread, with the number of the sink.
        tell: takes a Verdict; called in the thread.

    Thread rule: give() and abandon() are the poll thread's.
    """

    def __init__(self, new_sink: Callable[[int], Sink], tell: Callable[[Verdict], None]) -> None:
        self._new_sink = new_sink
        self._tell = tell
        self._inbox: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._abandoned = False
        self._sinks: list[Sink] = []
        self._thread = threading.Thread(target=self._work, name="kser-settle", daemon=True)
        self._thread.start()

    def give(self, batch: Batch) -> None:
        """Settle this batch; a Verdict tells what became of it."""
        batch.since = time.monotonic()
        self._inbox.put(batch)

    def abandon(self) -> None:
        """Let go of a settler that hangs: whatever it still tells is not asked for."""
        self._abandoned = True
        self._inbox.put(None)

    def close(self, timeout_s: float) -> bool:
        """End the thread and close its sinks; False when that takes longer than ``timeout_s``."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            if not self._prepare():
                return
            self._tell(Verdict(self, None))
            while (batch := self._inbox.get()) is not None:
                if self._abandoned:
                    break
                self._tell(self._settle(batch))
        except Exception as exc:
            logger.exception("Settling failed")
            error = exc if isinstance(exc, Error) else TransportError(f"Settling failed: {exc!r}")
            self._tell(Verdict(self, None, fatal=error))
        finally:
            for sink in self._sinks:
                self._let_go(sink)

    def _let_go(self, sink: Sink) -> None:
        try:
            sink.close(5)
        except Error as exc:
            logger.warning("Closing a producer of the worker: %s", exc.message)

    @abstractmethod
    def _prepare(self) -> bool:
        """Make the sinks; False when abandoned meanwhile."""

    @abstractmethod
    def _settle(self, batch: Batch) -> Verdict:
        """Settle one batch."""


class ExactlyOnce(Settler):
    """Records and offsets in one transaction."""

    def __init__(self, new_sink: Callable[[int], Sink], tell: Callable[[Verdict], None], fences: deque[float]) -> None:
        #: When a sink of this worker was fenced, time.monotonic(); its settlers share it, the abandoned ones too.
        self._fences = fences
        super().__init__(new_sink, tell)

    def _prepare(self) -> bool:
        self._turn = 0
        for number in range(PRODUCERS):
            sink = self._begun(number)
            if sink is None:
                return False
            self._sinks.append(sink)
        return True

    def _begun(self, number: int) -> Sink | None:
        """A sink that has ended what an earlier life of its id left open. None when abandoned before that."""
        said = 0.0
        while not self._abandoned:
            sink = self._new_sink(number)
            try:
                sink.begin()
                sink.abort(5)
            except TransportError as exc:
                self._let_go(sink)
                if isinstance(exc, FencedError):
                    raise
                if not said or time.monotonic() - said > 30:
                    said = time.monotonic()
                    logger.warning("Transactions cannot be started, trying again: %s", exc.message)
                time.sleep(_AGAIN_S)
            else:
                return sink
        return None

    def _settle(self, batch: Batch) -> Verdict:
        sink = self._sinks[self._turn]
        asked = False
        records = [record for item in batch.items for record in item.outcome.records]
        try:
            sink.begin()
            if records:
                sink.produce_all(records)
            assert batch.member is not None
            sink.send_offsets(batch.positions, batch.member)
            asked = True
            self._commit(sink)
        except Error as exc:
            return self._failed(batch, sink, exc, asked)
        self._turn = (self._turn + 1) % len(self._sinks)
        return Verdict(self, batch, settled=batch.items)

    def _commit(self, sink: Sink) -> None:
        for left in reversed(range(_TRIES)):
            try:
                sink.commit()
                return
            except TransportError as exc:
                # Retriable: the same call again, never another one. The coordinator answers a repeated commit.
                if not exc.retriable or exc.extra.get("abort") or not left:
                    raise

    def _failed(self, batch: Batch, sink: Sink, exc: Error, asked: bool) -> Verdict:
        """What to do after an error. ``asked``: the coordinator was asked to commit."""
        verdict = Verdict(self, batch)
        if self._aborted(sink, exc, asked):
            refusal = exc.extra.get("record", exc)  # of the client at once, or of the broker when all were handed over
            index = refusal.extra.get("index")
            if index is None or _passes(refusal):
                verdict.again = batch.items
                if index is not None and isinstance(refusal, DeliveryError):
                    verdict.away = refusal.extra.get("topic")
                verdict.pause_s = 0.1 if isinstance(exc, GroupError) else _AGAIN_S
            else:
                culprit = _owner(batch.items, index)
                verdict.refused = [(culprit, refusal)]
                verdict.again = [item for item in batch.items if item is not culprit]
            logger.log(
                logging.INFO if isinstance(exc, GroupError) else logging.WARNING,
                "A transaction of %d records was aborted, nothing is lost: %s",
                len(batch.items),
                exc.message,
            )
            return verdict
        logger.warning("A transaction of %d records broke its producer: %s", len(batch.items), exc.message)
        if self._abandoned:
            return verdict  # nobody hears it; it was fenced by those that took over, which is no sign of a twin
        if isinstance(exc, FencedError) and not exc.extra.get("expired"):
            now = time.monotonic()
            if self._fences and now - self._fences[-1] < TWIN_S:
                verdict.fatal = FencedError(
                    "Another process settles with the transactional ids of this worker: give each worker a name of "
                    f"its own (--name), or end the other one. {exc.message}",
                    extra={"twin": True},
                )
                return verdict
            self._fences.append(now)
        threading.Thread(target=self._let_go, args=[sink], name="kser-let-go", daemon=True).start()  # may hang
        renewed = self._begun(self._turn)
        if renewed is not None:
            self._sinks[self._turn] = renewed
        verdict.unknown = asked
        if not asked:
            verdict.again = batch.items
        return verdict

    def _aborted(self, sink: Sink, exc: Error, asked: bool) -> bool:
        """Whether the transaction could be aborted, so that nothing of it is visible."""
        if isinstance(exc, FencedError) or exc.extra.get("fatal"):
            return False
        if asked and not exc.extra.get("abort"):
            return False  # the commit may have happened
        try:
            sink.abort(15)
        except Error as failed:
            logger.warning("The transaction could not be aborted: %s", failed.message)
            return False
        return True


class AtLeastOnce(Settler):
    """Records are confirmed before their offsets are committed, by whoever gets the Verdict."""

    def _prepare(self) -> bool:
        self._sinks.append(self._new_sink(0))
        return True

    def _settle(self, batch: Batch) -> Verdict:
        verdict = Verdict(self, batch)
        again: set[int] = set()
        refused: dict[int, Error] = {}
        items = batch.items
        if any(item.outcome.ahead for item in items):
            for round_ in _rounds(items):
                left = [numbered for numbered in round_ if numbered[0] not in again and numbered[0] not in refused]
                self._deliver(left, batch, again, refused)
        else:  # as it nearly always is: whose a record is matters when one of them fails
            records = [record for item in items for record in item.outcome.records]
            if records and (failures := self._sinks[0].deliver(records, _DELIVERY_S)):
                numbered = [(n, record) for n, item in enumerate(items) for record in item.outcome.records]
                self._note(failures, numbered, batch, again, refused)
        if not again and not refused:
            verdict.settled = batch.items
            return verdict
        for n, item in enumerate(batch.items):
            if n in refused:
                verdict.refused.append((item, refused[n]))
            elif n in again:
                verdict.again.append(item)
            else:
                verdict.settled.append(item)
        verdict.pause_s = _AGAIN_S if again else 0.0
        return verdict

    def _deliver(
        self, numbered: list[tuple[int, OutRecord]], batch: Batch, again: set[int], refused: dict[int, Error]
    ) -> None:
        if not numbered:
            return
        failures = self._sinks[0].deliver([record for _, record in numbered], _DELIVERY_S)
        if failures:
            self._note(failures, numbered, batch, again, refused)

    def _note(
        self,
        failures: Sequence[tuple[int, Error]],
        numbered: list[tuple[int, OutRecord]],
        batch: Batch,
        again: set[int],
        refused: dict[int, Error],
    ) -> None:
        """Note whose records were not confirmed: ``again`` or, for good, ``refused``, by the numbers of the items."""
        open_: dict[int, set[int]] = {}
        for index, error in failures:
            n, record = numbered[index]
            if _passes(error):
                open_.setdefault(n, set()).add(id(record))
                again.add(n)
            else:
                refused.setdefault(n, error)
        logger.warning("%d of %d records were not confirmed: %s", len(failures), len(numbered), failures[0][1].message)
        sent = {id(record) for _, record in numbered}
        for n, failed in open_.items():  # what is confirmed is not sent again
            outcome = batch.items[n].outcome
            kept = [(at, r) for at, r in enumerate(outcome.records) if id(r) not in sent or id(r) in failed]
            outcome.ahead = sum(1 for at, _ in kept if at < outcome.ahead)
            outcome.records = [r for _, r in kept]


def _rounds(items: Sequence[Item]) -> list[list[tuple[int, OutRecord]]]:
    """The records of a batch, each with the number of its item, in rounds: one is confirmed before the next is sent.

    What a task itself sent is confirmed before what follows from it: is it refused, the task fails, and its operation
    must not have gone on. What follows from later records of the same key waits as well, so their order holds.
    """
    rounds: list[list[tuple[int, OutRecord]]] = [[]]
    lanes: dict[tuple[int, bytes | None], int] = {}
    for n, item in enumerate(items):
        outcome = item.outcome
        lane = id(item.state), item.record.key
        at = lanes.get(lane, 0)
        if outcome.ahead:
            rounds[at] += [(n, record) for record in outcome.records[: outcome.ahead]]
            at += 1
            if item.record.key is not None:
                lanes[lane] = at
            if at == len(rounds):
                rounds.append([])
        rounds[at] += [(n, record) for record in outcome.records[outcome.ahead :]]
    return rounds


def _owner(items: Sequence[Item], index: int) -> Item:
    """The item whose records have the one with this index among all of them."""
    for item in items:
        index -= len(item.outcome.records)
        if index < 0:
            return item
    raise IndexError(index)


def _passes(error: Error) -> bool:
    """Whether the same record may be taken later. A delivery that timed out is no verdict: the broker was away."""
    return isinstance(error, DeliveryError) or (isinstance(error, TransportError) and error.retriable)
