"""Keyed state of task partitions: StateStore, the one primitive for "the first writer of a key wins".

Who owns partition n of a task topic owns partition n of its state topic, `{group}.state.{topic}`, which is compacted.
So all records that claim a key must have come into one partition, and its owner judges them: a claim holds in memory
at once, and becomes durable in the transaction that settles the record that won it.

What holds, and why:

* A winner is a record, by topic, partition and offset. Is it delivered again, because nothing of it was settled, or at
  least once, because its state was written and its offset was not, it wins again.
* Whoever loads the state first asks for the committed offsets, which wait for transactions that hold some of the
  partition. What those wrote lies before the end of the state then, and the load waits until it is decided. What a
  former owner writes later it cannot commit. So a record is settled together with its claim, or is neither.
* At least once nobody is fenced: a former owner that does not know yet may write a claim after the load, as it may run
  a record a second time.

Memory: about 0.2 KB for each key of the partitions that are owned. A key is kept for the retention, those of FOR_EVER
longer: there is one for each dead letter that was run again, and dead letters are kept for ever, too. So a group that
claims one key a second in a partition for 30 days has 2.6 million, 0.6 GB: shorten the retention, or take more
partitions, for much less than that.
"""

import contextlib
import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, NamedTuple

import orjson

from kser.errors import ConfigurationError, GroupError, ValidationError
from kser.transport import OutRecord, Partition, Record, TopicInfo, Transport
from kser.worker.topic_findings import Finding, find
from kser.worker.topic_plan import KINDS, Feature, TopicPlan
from kser.worker.topics import ensure_group_topics

__all__ = ["FOR_EVER", "RETENTION_S", "Claim", "LoadedState", "StateStore", "Winner", "owner_of", "state_topic"]

logger = logging.getLogger(__name__)

#: How long a key is kept at least, in seconds, where nobody says otherwise: as long as messages in task topics are.
RETENTION_S: Final = 30 * 24 * 3600.0
#: Begin of the keys that are kept for ever.
FOR_EVER: Final = "again:"
#: Expired keys that one claim takes along: more than one, so that there are fewer and fewer of them.
_STEP: Final = 2
#: Seconds between two looks for a topic that was just made.
_AGAIN_S: Final = 0.1
#: A longer key is kept as its digest, in bytes of UTF-8.
_LONG_KEY: Final = 256
#: The owner of a key whose value is not readable: no record is called so.
_UNREADABLE: Final = "?"
_FOR_EVER: Final = FOR_EVER.encode()
_STATE: Final = frozenset({Feature.STATE})
_PATTERN: Final = next(kind.pattern for kind in KINDS if kind.feature is Feature.STATE)


def state_topic(group: str, topic: str) -> str:
    """The name of the state topic of a task topic."""
    return _PATTERN.format(group=group, topic=topic)


def owner_of(record: Record) -> str:
    """What a record is called as the owner of a key: ``topic/partition/offset``."""
    return f"{record.topic}/{record.partition}/{record.offset}"


class Winner(NamedTuple):
    """Who has a key."""

    #: The record, as owner_of() calls it.
    owner: str
    #: When it claimed the key, milliseconds since the epoch, by the clock of its worker.
    at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Claim:
    """The answer to a claim."""

    #: True: the record that claimed is the winner. False: another one is, see ``winner``.
    won: bool
    winner: Winner
    #: What has to be written in the transaction that settles the record, at least once confirmed before anything else
    #: that follows from it; empty for who lost, and for who has it in the state topic already.
    records: tuple[OutRecord, ...] = ()
    of: Partition
    key: bytes = field(repr=False)
    #: Expired keys that ``records`` take out of the topic.
    expired: tuple[bytes, ...] = field(default=(), repr=False)


class StateStore:
    """The keyed state of the partitions that this worker owns.

    The order of calls::

        source.committed(partitions)      # first: it waits for transactions of former owners
        store.load(partitions)            # before a claim of theirs is judged
        claim = store.claim(of, key, owner_of(record))
        ...                               # claim.records go into the transaction that settles the record
        store.settled(claim)              # it is committed, or at least once: confirmed
        store.release(claim)              # or: the record was discarded unsettled, and the partition stays
        store.drop(partitions)            # in on_revoke and on_lost, when nothing of them is settled any more

    Without settled() claims hold just as well, but expired keys stay in memory until the partition goes.

    load() is read(), which may wait and may be called from any thread, and take_in(), which does not wait.

    Thread rule: load(), take_in() and drop() are the poll thread's, the rest may come from any thread. No method but
    load() and read() waits.

    Args:
        transport: where the topics are.
        group: the consumer group of the workers.
        create: make a state topic that is missing; False: claims of its task topic are refused.
        retention_s: how long a key is kept at least, in seconds, unless it is kept for ever. Later claims take it out
            of the topic by and by; one for the same key wins as soon as the time is over.
        now_ms: the clock, milliseconds since the epoch.
    """

    def __init__(
        self,
        transport: Transport,
        group: str,
        *,
        create: bool = True,
        retention_s: float = RETENTION_S,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        if retention_s <= 0:
            raise ConfigurationError(f"The retention of the state is {retention_s} s: it must be more than 0")
        self._transport = transport
        self._group = group
        self._create = create
        self._retention_ms = int(retention_s * 1000)
        self._now_ms = now_ms
        self._lock = threading.Lock()
        self._loaded: dict[Partition, _Keys] = {}
        #: Task topics whose claims are refused, and why.
        self._refusals: dict[str, str] = {}

    def load(self, partitions: Sequence[Partition], timeout_s: float = 60) -> None:
        """Read the state of these partitions of task topics; all of it is there when this returns, or none.

        Raises as read() does.
        """
        self.take_in(self.read(partitions, timeout_s))

    def read(self, partitions: Sequence[Partition], timeout_s: float = 60) -> "LoadedState":
        """The state of these partitions of task topics, for take_in().

        A state topic that is missing is made; where that cannot be, its state is empty and claims are refused.

        Raises:
            ConfigurationError: a state topic has another number of partitions than its task topic, or is not compacted;
                the text says what to do, ``extra["findings"]`` has it as dicts.
            TransportError: no answer, or a transaction was open, for ``timeout_s``.
        """
        end = time.monotonic() + timeout_s
        there = self._look(dict.fromkeys(of.topic for of in partitions), end)
        loaded = {of: _Keys() for of in partitions}
        targets: dict[tuple[str, int], _Keys] = {}
        for of, keys in loaded.items():
            name = state_topic(self._group, of.topic)
            if name in there:
                targets[name, of.partition] = keys
        began, count, unreadable = time.monotonic(), 0, 0
        for batch in self._transport.read([Partition(*target) for target in targets], _left(end)):
            count += len(batch)
            for record in batch:
                unreadable += not targets[record.topic, record.partition].take(record)
        for keys in loaded.values():
            keys.ages.extend(key for key in keys.entries if not key.startswith(_FOR_EVER))
        if unreadable:
            logger.warning("%d records of the state are of no known form: their keys count as claimed", unreadable)
        if count:
            logger.debug(
                "%d keys of %d partitions loaded from %d records in %.1f s",
                *(sum(len(keys.entries) for keys in loaded.values()), len(targets), count, time.monotonic() - began),
            )
        return loaded

    def take_in(self, loaded: "LoadedState") -> None:
        """Have what read() gave: from now on keys of those partitions can be claimed."""
        with self._lock:
            self._loaded |= loaded

    def drop(self, partitions: Iterable[Partition]) -> None:
        """Forget what is in memory of these partitions; those that are not loaded are passed over."""
        with self._lock:
            for of in partitions:
                self._loaded.pop(of, None)

    def get(self, of: Partition, key: str) -> Winner | None:
        """Who has this key, settled or not; None when it is free. Raises GroupError as claim() does."""
        with self._lock:
            raw = self._keys(of).entries.get(_encoded(key))
            winner = _winner(raw) if raw is not None else None
        return winner if winner is not None and self._holds(_encoded(key), winner) else None

    def claim(self, of: Partition, key: str, owner: str) -> Claim:
        """Claim a key for a record. It holds at once, for all who claim later; see the class for what has to follow.

        Args:
            of: the partition of the task topic that the record came from.
            key: what is claimed; everything that may claim it has to come into this partition.
            owner: the record, as owner_of() calls it. The one that has the key wins it again.

        Raises:
            GroupError: the partition is not loaded: it went. Discard the record unsettled.
            ConfigurationError: there is no state topic; the text has the command that makes it.
            ValidationError: the key is empty.
        """
        encoded = _encoded(key)
        with self._lock:
            keys = self._keys(of)
            raw = keys.entries.get(encoded)
            if raw is not None:
                winner = _winner(raw)
                if winner.owner == owner:
                    return keys.unsettled.get(encoded) or Claim(won=True, winner=winner, of=of, key=encoded)
                # While a record that takes it out is on its way, a new one might be written before that, and lost.
                if self._holds(encoded, winner) or encoded in keys.going:
                    return Claim(won=False, winner=winner, of=of, key=encoded)
            if (refusal := self._refusals.get(of.topic)) is not None:
                raise ConfigurationError(f"The key {key[:100]!r} cannot be claimed, there is no state: {refusal}")
            if raw is not None:
                keys.forget(encoded)
            winner = Winner(owner, self._now_ms())
            value = _value(winner)
            expired = keys.next_expired(self._oldest_ms())
            topic = state_topic(self._group, of.topic)
            written = [(encoded, value), *((gone, None) for gone in expired)]
            records = tuple(OutRecord(topic, at, what, partition=of.partition) for at, what in written)
            claim = Claim(won=True, winner=winner, records=records, of=of, key=encoded, expired=expired)
            keys.add(claim, value)
            return claim

    def settled(self, claim: Claim) -> None:
        """The records of this claim are durable. A claim that was lost, or of an earlier assignment, is passed over."""
        with self._lock:
            if (keys := self._loaded.get(claim.of)) is not None:
                keys.settled(claim)

    def release(self, claim: Claim) -> None:
        """Nothing of this claim was written, nor will be: the key is free again. Others are passed over."""
        with self._lock:
            if (keys := self._loaded.get(claim.of)) is not None:
                keys.release(claim)

    def __len__(self) -> int:
        """How many keys are in memory."""
        with self._lock:
            return sum(len(keys.entries) for keys in self._loaded.values())

    # -- inside --------------------------------------------------------------------------------------------------------

    def _keys(self, of: Partition) -> "_Keys":
        keys = self._loaded.get(of)
        if keys is None:
            raise GroupError(f"The state of {of.topic}/{of.partition} is not here: this worker does not own it")
        return keys

    def _holds(self, encoded: bytes, winner: Winner) -> bool:
        """Whether its time is not over yet."""
        return encoded.startswith(_FOR_EVER) or winner.at_ms > self._oldest_ms()

    def _oldest_ms(self) -> int:
        """What was claimed then, or before, is expired."""
        return self._now_ms() - self._retention_ms

    def _look(self, topics: Iterable[str], end: float) -> Mapping[str, TopicInfo]:
        """The state topics that are there, of these task topics, after making those that were not."""
        plan = TopicPlan(group=self._group, tasks=dict.fromkeys(topics), features=_STATE, used=_STATE)
        admin = self._transport.admin()
        embedded = not admin.can_create(_left(end))
        there = admin.describe(plan.names, _left(end))
        refusals: dict[str, str] = {}
        missing = [task for task in plan.tasks if state_topic(self._group, task) not in there]
        if missing and not embedded:
            for task in missing:
                try:
                    ensure_group_topics(
                        admin, self._group, [task], create=self._create, features=_STATE, timeout_s=_left(end)
                    )
                except ConfigurationError as exc:
                    refusals[task] = exc.message
            there = self._seen(plan, [state_topic(self._group, task) for task in missing if task not in refusals], end)
        self._judge(plan, there, refusals, embedded=embedded)
        with self._lock:
            for task in plan.tasks:
                self._refusals.pop(task, None)
            self._refusals |= refusals
        return there

    def _seen(self, plan: TopicPlan, made: Sequence[str], end: float) -> dict[str, TopicInfo]:
        """The topics of the plan, once those that were ``made`` are among them: brokers learn of them one by one."""
        while True:
            there = self._transport.admin().describe(plan.names, _left(end))
            if all(name in there for name in made) or time.monotonic() > end:
                return there
            time.sleep(_AGAIN_S)

    def _judge(
        self, plan: TopicPlan, there: Mapping[str, TopicInfo], refusals: dict[str, str], *, embedded: bool
    ) -> None:
        """Raise what is wrong with a state topic; add to ``refusals`` what is wrong with one that is not there yet."""
        tasks = {state_topic(self._group, task): task for task in plan.tasks}
        problems = [
            found
            for found in find(plan, there, embedded=embedded)
            if found.level == "error" or (found.topic in tasks and found.topic not in there)
        ]
        for found in problems:
            # The embedded broker may be about to make it otherwise than it has to be.
            if found.topic in tasks and found.topic not in there:
                refusals.setdefault(tasks[found.topic], _text(found))
        if wrong := [found for found in problems if found.topic in tasks and found.topic in there]:
            raise ConfigurationError(
                ". ".join(_text(found) for found in wrong), extra={"findings": [asdict(found) for found in wrong]}
            )


class _Keys:
    """The keys of one partition. Thread rule: whoever calls holds the lock of the store."""

    __slots__ = ("ages", "entries", "going", "unsettled")

    def __init__(self) -> None:
        #: Each key with its value, as it is in the topic, or will be.
        self.entries: dict[bytes, bytes] = {}
        #: The keys that expire, the oldest claim first; one that went may still be in it.
        self.ages: deque[bytes] = deque()
        #: Claims that were won here and are not known to be durable.
        self.unsettled: dict[bytes, Claim] = {}
        #: Keys that an unsettled claim takes out of the topic.
        self.going: set[bytes] = set()

    def take(self, record: Record) -> bool:
        """Apply one record of the topic. False: its value is of no known form."""
        key, value = record.key, record.value
        if key is None:
            return False
        self.entries.pop(key, None)  # so that the order is that of the last claims
        if value is None:
            return True
        try:
            _winner(value)
        except (ValueError, TypeError, KeyError):
            self.entries[key] = _value(Winner(_UNREADABLE, record.timestamp_ms))
            return False
        self.entries[key] = value
        return True

    def add(self, claim: Claim, value: bytes) -> None:
        """Note a claim that was won."""
        self.entries[claim.key] = value
        if not claim.key.startswith(_FOR_EVER):
            self.ages.append(claim.key)
        self.unsettled[claim.key] = claim
        self.going.update(claim.expired)

    def forget(self, key: bytes) -> None:
        """Free a key whose time is over."""
        del self.entries[key]
        self.unsettled.pop(key, None)
        with contextlib.suppress(ValueError):
            self.ages.remove(key)

    def settled(self, claim: Claim) -> None:
        """The claim is durable, and the keys it takes along are out of the topic."""
        if self.unsettled.get(claim.key) is claim:
            del self.unsettled[claim.key]
            for key in claim.expired:
                self.going.discard(key)
                self.entries.pop(key, None)
                self.unsettled.pop(key, None)

    def release(self, claim: Claim) -> None:
        """The claim will never be durable."""
        if self.unsettled.get(claim.key) is claim:
            del self.unsettled[claim.key]
            del self.entries[claim.key]
            self.going.difference_update(claim.expired)
            self.ages.extendleft(reversed(claim.expired))

    def next_expired(self, oldest_ms: int) -> tuple[bytes, ...]:
        """The oldest keys that were claimed at ``oldest_ms`` or before and are not on their way out, a few of them."""
        found: list[bytes] = []
        while self.ages and len(found) < _STEP:
            key = self.ages[0]
            raw = self.entries.get(key)
            if raw is not None and _winner(raw).at_ms > oldest_ms:
                break
            self.ages.popleft()
            if raw is not None and key not in self.going and key not in found:
                found.append(key)
        return tuple(found)


#: What StateStore.read() gives: for StateStore.take_in().
LoadedState = dict[Partition, _Keys]


def _encoded(key: str) -> bytes:
    raw = key.encode("utf-8", "backslashreplace")
    if not raw:
        raise ValidationError("The key of a claim is empty: give one, or claim nothing")
    if len(raw) <= _LONG_KEY:
        return raw
    return (_FOR_EVER if raw.startswith(_FOR_EVER) else b"") + b"sha256:" + hashlib.sha256(raw).hexdigest().encode()


def _winner(raw: bytes) -> Winner:
    """Raises ValueError, TypeError or KeyError when it is of no known form."""
    value = orjson.loads(raw)
    owner, at_ms = value["owner"], value["at"]
    if type(owner) is not str or type(at_ms) is not int:
        raise TypeError
    return Winner(owner, at_ms)


def _value(winner: Winner) -> bytes:
    return orjson.dumps({"owner": winner.owner, "at": winner.at_ms})


def _text(found: Finding) -> str:
    return f"Topic {found.topic}: {found.finding}. To cure it: {found.cure}"


def _left(end: float) -> float:
    """Seconds left, at least a little: 0 would mean no limit to some calls."""
    return max(end - time.monotonic(), 0.1)
