"""ConfluentSource: one member of a consumer group on confluent-kafka."""

import logging
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from kser.confluent.admin import ConfluentAdmin
from kser.confluent.aside import Aside
from kser.confluent.config import Start, is_incremental, new_client
from kser.confluent.errors import LOST, is_fatal, kafka_error, kafka_errors, translate, unanswered
from kser.confluent.logs import ClientState, logger
from kser.confluent.membership import HeartbeatLog, Watch, groups_of
from kser.errors import ConfigurationError, Error, GroupError, OffsetLostError, TransportError, ValidationError
from kser.tracebacks import log_raised
from kser.transport import DeliveryCallback, GroupMember, Partition, Position, RebalanceListener, Record

__all__ = ["ConfluentMember", "ConfluentSource", "message_partition", "to_offsets"]

#: What a broker stores beside an offset is 4096 bytes (its offset.metadata.max.bytes), and the client adds a zero byte.
_METADATA_BYTES: Final = 4095

#: Seconds between two tries of a question that the coordinator cannot answer yet.
_AGAIN_S: Final = 0.1
#: Longest single question to the coordinator, so that the next one can go to another broker.
_QUESTION_S: Final = 5.0
#: Under KIP-848: for so many times as long as nothing is given of new partitions they may be others' too.
_YOUNG: Final = 4
#: A name that a dead member still holds: seconds between two tries to get it, and between two lines in the log.
_NAME_AGAIN_S: Final = 1.0
_NAME_LOG_S: Final = 10.0
#: For how many session timeouts it is waited for.
_NAME_SESSIONS: Final = 3
#: How long the client of such a try may take to end.
_NAME_CLOSE_S: Final = 2.0
#: Longest wait on the embedded broker until all partitions are given up, in seconds.
_STEP_OUT_S: Final = 2.0
#: How long each of its turns waits for a round of the group.
_STEP_S: Final = 0.02
#: How long the client of a member that joins anew may take to leave.
_LEAVE_S: Final = 5.0
#: How group metadata begins: its mark, then the generation (KIP-848: the member epoch) in the machine's byte order.
#: Source: rd_kafka_consumer_group_metadata_write() of librdkafka.
_METADATA_MARK: Final = b"CGMDv2:"
_GENERATION: Final = struct.Struct("=i")

#: Record(...), at half the cost: there is one for each message.
_new_record: Any = tuple.__new__

_Callback = Callable[[Consumer, list[TopicPartition]], None]


@dataclass(frozen=True, slots=True)
class ConfluentMember:
    """The member of a moment, for a transaction of a ConfluentSink."""

    #: What confluent-kafka passes on; opaque.
    metadata: Any
    joined: bool
    #: What it owned at that moment: brokers check the member, not whose the partition is.
    owned: frozenset[tuple[str, int]] = frozenset()
    #: See GroupMember.
    round: object = None


@dataclass(slots=True)
class _Held:
    """How it is waited for a name that another member has. Times are those of time.monotonic()."""

    for_s: float
    until: float = 0.0
    #: When to try to join again; None while a try is under way.
    again_at: float | None = None
    log_at: float = 0.0


def to_offsets(positions: Sequence[Position]) -> list[TopicPartition]:
    """Positions as confluent-kafka takes them. Raises ValidationError when the metadata of one is too long."""
    for p in positions:
        if len(p.metadata) * 4 > _METADATA_BYTES and (size := len(p.metadata.encode())) > _METADATA_BYTES:
            raise ValidationError(
                f"The metadata for {p.topic}[{p.partition}] has {size} bytes, at most {_METADATA_BYTES} can be stored",
                extra={"size": size, "limit": _METADATA_BYTES},
            )
    return [TopicPartition(p.topic, p.partition, p.offset, p.metadata) for p in positions]


class ConfluentSource:
    """A member of a consumer group. Implements kser.transport.Source, whose docstrings say what each method does.

    One thread owns it, with no exception: confluent-kafka 2.16 lets a second thread wait behind a polling one.

    Args:
        config: of consumer_config(): librdkafka properties with ``group.id``.
        start: where a partition starts that the group has committed nothing of.
        admin: of the same brokers; counts partitions inside callbacks, where the consumer must not be asked.
        touch: make topics that do not exist when subscribing to them, which the embedded broker needs.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        admin: ConfluentAdmin,
        *,
        start: Start = "earliest",
        touch: bool = False,
    ) -> None:
        self.group: str = str(config["group.id"])
        #: Records that came a second time within an assignment and were dropped (KAFKA.md finding 12).
        self.came_again = 0
        self._admin = admin
        self._start = start
        self._touch = touch
        self._incremental = is_incremental(config)
        self._state = ClientState(f"consumer of group {self.group}", str(config["bootstrap.servers"]))
        self._config = dict(config)
        #: The name of a static member.
        self._name: str | None = config.get("group.instance.id")
        self._topics: list[str] = []
        #: Set while another member holds that name.
        self._held: _Held | None = None
        # A callback may hold up its rebalance for this long; after twice that the group goes on without this member.
        self._rebalance_s = float(config.get("max.poll.interval.ms", 300_000)) / 2000
        #: Told by _on_commit(), in the order of the requests.
        self._committing: deque[DeliveryCallback] = deque()
        #: Which client this is: it is replaced when the member joins anew.
        self._life = 0
        #: Under KIP-848: whether an answer of the coordinator was missed.
        self._watch: Watch | None = None
        if config.get("group.protocol") == "consumer":
            self._watch = Watch(self.group, partial(groups_of, admin))
            self._state.quiet = HeartbeatLog(self._watch.lost)
            # What it listens to are lines of level 5.
            self._config["log_level"] = max(int(config.get("log_level", 6)), 5)
        self._consumer = self._new_consumer()
        self._aside = Aside()
        self._listener: RebalanceListener | None = None
        #: Partitions owned, and the lowest offset that may still be given of each; negative is a librdkafka mark.
        self._next: dict[tuple[str, int], int] = {}
        self._lost: dict[tuple[str, int], OffsetLostError] = {}
        self._paused: set[tuple[str, int]] = set()
        #: The member id of the group's last round; "" before the first.
        self._member_id = ""
        #: What the client kept of a membership that is over: lost, and to be taken over again by the next poll().
        self._kept: set[tuple[str, int]] = set()
        #: Under KIP-848: partitions that came just now, and until when nothing is given of them; for how long that is.
        self._unsure: dict[tuple[str, int], float] = {}
        self._sure_s: float | None = None
        #: Until when others may believe that what came last is theirs, and which round that is.
        self._young_until = 0.0
        self._round = 0
        #: Assigned during the current consume() call.
        self._just_assigned: set[tuple[str, int]] = set()
        #: What a callback raised or the client reported, for the next poll().
        self._failure: BaseException | None = None
        #: What made the client useless for good.
        self._dead: Error | None = None
        #: A callback of the listener is running, so poll() and close() are further up the stack.
        self._in_callback = False
        #: A poll ended in an exception: what the client had given out by then never reached the caller.
        self._rewind = False
        self._closed = False

    def _new_consumer(self) -> Consumer:
        """A client, and nothing of the commits of the one before it."""
        self._life += 1
        committing: deque[DeliveryCallback] = deque()
        self._committing = committing
        return new_client(
            Consumer, {**self._config, "on_commit": partial(_on_commit, self.group, committing)}, self._state
        )

    # -- the group -----------------------------------------------------------------------------------------------------

    def subscribe(self, topics: Sequence[str], listener: RebalanceListener) -> None:
        """See Source."""
        self._check_open()
        if isinstance(topics, str) or not topics:
            raise ConfigurationError(f"topics={topics!r}: give a list with at least one topic")
        if self._touch:
            self._admin.touch([topic for topic in topics if not topic.startswith("^")])
        self._listener = listener
        self._topics = list(topics)
        self._subscribe()

    def _subscribe(self) -> None:
        self._member_id = ""
        self._kept.clear()
        if self._watch is not None:
            self._learn_topics()
        with kafka_errors(f"Subscribing group {self.group} to {', '.join(self._topics)}"):
            self._consumer.subscribe(
                self._topics,
                on_assign=self._of_this_life(self._on_assign),
                on_revoke=self._of_this_life(self._on_revoke),
                on_lost=self._of_this_life(self._on_lost),
            )

    def _of_this_life(self, callback: _Callback) -> _Callback:
        """Nothing that a client still tells once it was replaced is heard: it may take a while to leave."""
        life = self._life

        def heard(consumer: Consumer, partitions: list[TopicPartition]) -> None:
            if life == self._life:
                callback(consumer, partitions)

        return heard

    def _learn_topics(self) -> None:
        """Under KIP-848: know the topics before the coordinator tells partitions of them.

        It tells ids of topics. While the client asks for the name behind one, its heartbeats say that it has nothing,
        so the coordinator may give to others at once what this member is about to read: seen with two members that
        committed the same records, each in a transaction that was accepted. A try, for want of something better.
        """
        end = time.monotonic() + _QUESTION_S
        for topic in self._topics:
            if topic.startswith("^"):
                continue
            try:
                self._consumer.list_topics(topic, timeout=max(end - time.monotonic(), _AGAIN_S))
            except (KafkaException, RuntimeError) as exc:
                logger.debug("Topic %s could not be looked at before joining group %s: %s", topic, self.group, exc)

    @property
    def joined(self) -> bool:
        """See Source. False again once the group put this member out, until it is back."""
        try:
            return not self._closed and self._dead is None and bool(self._membership()[1])
        except TransportError:
            return False

    def assignment(self) -> list[Partition]:
        """See Source."""
        return [Partition(*key) for key in self._next]

    def member(self) -> GroupMember:
        """See Source. Nor is it a member with the partitions of an earlier membership."""
        self._check_open()
        metadata, member_id = self._membership()
        joined = bool(member_id) and (member_id == self._member_id or not self._next)
        if time.monotonic() < self._young_until:
            self._round += 1
        return ConfluentMember(metadata, joined, frozenset(self._next), (metadata, self._round))

    def close(self, timeout_s: float = 10) -> None:
        """See Source.

        on_revoke is called first, while this is still a member: librdkafka calls it after leaving, where nothing can be
        committed any more (KAFKA.md finding 13). Then the client gets ``timeout_s`` to leave, and is left behind, with
        a warning, when it takes longer; the group learns of it by the session timeout.
        """
        if self._closed:
            return
        self._check_not_in_callback("close()")
        owned, listener = self.assignment(), self._listener
        self._listener = None
        if owned and listener is not None:
            self._guarded(listener.on_revoke, owned)
        self._closed = True
        self._next.clear()
        try:
            self._leave(self._consumer, self._aside, timeout_s, join=bool(self._topics))
        except TimeoutError:
            logger.warning("The consumer of group %s took over %g s to leave and is left behind", self.group, timeout_s)
        except (KafkaException, RuntimeError) as exc:
            logger.warning("Closing the consumer of group %s: %s", self.group, exc)
        self._aside.close()
        self._raise_failure()

    def _leave(self, consumer: Consumer, aside: Aside, timeout_s: float, *, join: bool = False) -> None:
        """Close a client, which leaves the group by that. Raises TimeoutError, and what the client raises."""
        end = time.monotonic() + timeout_s
        if self._touch:
            self._step_out(consumer, aside, min(_STEP_OUT_S, timeout_s / 2), join=join)
        aside.call(consumer.close, max(end - time.monotonic(), 0.1))

    def _step_out(self, consumer: Consumer, aside: Aside, timeout_s: float, *, join: bool) -> None:
        """Give up all partitions, so that close() meets no round of the group.

        confluent-kafka holds Python's lock while it completes one, and inside close() librdkafka may never answer it
        (librdkafka#4041). Seen with the quick groups of the embedded broker only, most often when a member that is just
        about to join leaves, so one that is to ``join`` does so first. Elsewhere a static member would leave the group
        by this, and its partitions would move.
        """
        end = time.monotonic() + timeout_s
        if join:
            join_by = time.monotonic() + timeout_s / 2
            while not self._is_in() and time.monotonic() < join_by:
                consumer.poll(_STEP_S)
            consumer.poll(_STEP_S)  # the round in which it joined
        aside.call(consumer.unsubscribe, timeout_s)
        while True:
            consumer.poll(_STEP_S)
            if not consumer.assignment() or time.monotonic() >= end:
                return

    def _is_in(self) -> bool:
        try:
            return bool(self._membership()[1])
        except TransportError:
            return True  # its client is of no use any more

    # -- records -------------------------------------------------------------------------------------------------------

    def poll(self, timeout_s: float, max_records: int = 500) -> list[Record]:
        """See Source. What a callback of the listener raised comes out here, as it was."""
        self._check_open()
        self._check_not_in_callback("poll()")
        self._raise_failure()
        if self._rewind:
            self._go_back()
        self._raise_lost()
        if self._watch is not None and self._watch.due:
            self._look(self._watch)
            self._raise_failure()
        if self._unsure:
            self._give_sure()
        if self._kept:
            self._take_over_again()
        end = time.monotonic() + timeout_s
        left = max(timeout_s, 0.0)
        while True:
            if self._held is not None:
                if not self._try_again(self._held, left):
                    return []
                left = max(end - time.monotonic(), 0.0)
            self._rewind = True  # until everything fetched below has reached the caller
            messages = self._fetch(left, max_records)
            records = self._records(messages) if messages else []
            self._rewind = False
            if records or self._failure is not None or self._dead is not None or self._lost:
                break
            left = end - time.monotonic()
            if left <= 0:
                break
        if records:
            self._state.up()
            return records  # an error met on the way is raised by the next call: none of these is lost to it
        self._check_open()
        self._raise_failure()
        self._raise_lost()
        if (refusal := self._state.refusal) is not None:
            raise refusal
        return []

    def _fetch(self, timeout_s: float, max_records: int) -> list[Message]:
        """poll() for the wait, then consume() for what is there: consume(n, t) alone would wait all of t."""
        consumer = self._consumer
        with kafka_errors(f"Polling group {self.group}"):
            first = consumer.poll(timeout_s)
            if first is None:
                return []
            if max_records <= 1:
                return [first]
            self._just_assigned.clear()
            messages = [first, *consumer.consume(max_records - 1, 0)]
        return self._without_stale(messages) if self._just_assigned else messages

    def _without_stale(self, messages: list[Message]) -> list[Message]:
        """A partition that came (again) while the batch was collected: what is in the batch may be of its last time."""
        stale = {key for m in messages if (key := (m.topic() or "", message_partition(m))) in self._just_assigned}
        for topic, partition in stale:
            self._place(topic, partition, self._next[topic, partition])
        return [m for m in messages if (m.topic(), m.partition()) not in stale]

    def _records(self, messages: list[Message]) -> list[Record]:
        """The messages that are news, as records; takes note of errors among them."""
        records: list[Record] = []
        reached: dict[tuple[str, int], int] = {}
        add, new = records.append, _new_record
        topic, partition, lowest = "", -1, -1  # of the message before: they come by partition
        for m in messages:
            if (error := m.error()) is not None:
                self._on_message_error(m, error)
                continue
            offset: int = m.offset()  # type: ignore[assignment]  # a message without an error has all of these
            if m.partition() != partition or m.topic() != topic:
                if partition >= 0:
                    reached[topic, partition] = lowest
                topic, partition = m.topic() or "", message_partition(m)
                found = reached.get((topic, partition))
                if found is None and (found := self._next.get((topic, partition))) is None:
                    topic, partition = "", -1  # of a partition that went while the batch was collected
                    continue
                lowest = found
            if offset < lowest:
                self._again((topic, partition), offset, lowest)
                continue
            lowest = offset + 1
            add(new(Record, (topic, partition, offset, m.key(), m.value(), m.headers() or (), m.timestamp()[1])))
        if partition >= 0:
            reached[topic, partition] = lowest
        self._next.update(reached)
        return records

    def _again(self, key: tuple[str, int], offset: int, lowest: int) -> None:
        self.came_again += 1
        self._state.quiet.log(
            logging.WARNING,
            "%s [%s] %s",
            "AGAIN",
            self.group,
            f"{key[0]}[{key[1]}] {offset} came again, below {lowest}",
        )

    def _on_message_error(self, message: Message, error: KafkaError) -> None:
        code = error.code()
        key = (message.topic() or "", message_partition(message))
        where = f"{key[0]}[{key[1]}]" if key[0] else f"group {self.group}"
        if code == KafkaError._PARTITION_EOF:
            return
        if code in LOST:
            if key in self._next:
                lost = translate(error, f"Reading {where} at {message.offset()}", topic=key[0], partition=key[1])
                lost.extra["offset"] = message.offset()
                assert isinstance(lost, OffsetLostError)
                self._lost[key] = lost
            return
        failure = translate(error, f"Reading {where}")
        if self._name and failure.extra.get("kafka_error") == "UNRELEASED_INSTANCE_ID":
            self._on_lost(self._consumer, [])
            self._wait_for_name(self._name)
        elif is_fatal(error):
            self._dead = failure
            self._on_lost(self._consumer, [])
        elif isinstance(failure, ConfigurationError):
            self._failure = self._failure or failure
        else:
            self._state.quiet.log(logging.WARNING, "%s [%s] %s", error.name(), where, error.str())

    # -- the name of a static member, which with KIP-848 a dead one holds until its session ends -----------------------

    def _wait_for_name(self, name: str) -> None:
        now = time.monotonic()
        if self._held is None:
            self._held = _Held(_NAME_SESSIONS * self._admin.session_timeout_s(self.group))
            self._held.until = now + self._held.for_s
        held = self._held
        if now >= held.until:
            self._dead = GroupError(
                f"Another worker that is alive has the name {name} (group.instance.id) in group {self.group}: it kept "
                f"it for {held.for_s:.0f} s, {_NAME_SESSIONS} session timeouts; give each worker a name of its own"
            )
            return
        held.again_at = now + _NAME_AGAIN_S
        if now >= held.log_at:
            held.log_at = now + _NAME_LOG_S
            logger.warning(
                "The name %s in group %s is held by another worker, dead or alive: waiting up to %.0f s for its "
                "session to end",
                name,
                self.group,
                held.until - now,
            )

    def _try_again(self, held: "_Held", timeout_s: float) -> bool:
        """Join with a new client when it is time to; False when that is not within ``timeout_s``."""
        if held.again_at is None:
            if self._membership()[1]:
                self._held = None
            return True
        wait_s = max(held.again_at - time.monotonic(), 0.0)
        time.sleep(min(wait_s, timeout_s))
        if wait_s > timeout_s:
            return False
        held.again_at = None
        refused, self._consumer = self._consumer, self._new_consumer()
        try:
            self._leave(refused, Aside(), _NAME_CLOSE_S)
        except (TimeoutError, KafkaException, RuntimeError) as exc:
            logger.info("Closing a consumer of group %s that did not join: %s", self.group, exc)
        self._subscribe()
        return True

    # -- a member that missed what the coordinator told it (see membership.py) -----------------------------------------

    def _look(self, watch: Watch) -> None:
        if self.joined and watch.look():
            self._join_anew()

    def _join_anew(self) -> None:
        """Let go of everything, as in a rebalance, leave, and join with a new client."""
        logger.warning(
            "Leaving group %s and joining it anew: the answer to a heartbeat was lost, and the group does not come to "
            "rest since then",
            self.group,
        )
        owned, committing = self.assignment(), self._committing
        if owned and self._listener is not None:
            self._guarded(self._listener.on_revoke, owned)  # still a member, so it can commit
        self._forget([(p.topic, p.partition) for p in owned])
        gone = GroupError(f"Group {self.group} was left before it was known whether the offsets were stored")
        while committing:  # before the other thread below can tell them anything
            _tell(committing.popleft(), gone)
        left, self._consumer = self._consumer, self._new_consumer()
        try:
            self._leave(left, Aside(), _LEAVE_S)
        except TimeoutError:
            logger.warning("The consumer of group %s took over %g s to leave and is left behind", self.group, _LEAVE_S)
        except (KafkaException, RuntimeError) as exc:
            logger.warning("Closing a consumer of group %s: %s", self.group, exc)
        self._aside.close()  # a commit that still runs there is of the client that left
        self._aside = Aside()
        if self._watch is not None:
            self._watch.start_over()
        self._subscribe()

    # -- positions -----------------------------------------------------------------------------------------------------

    def pause(self, partitions: Iterable[Partition]) -> None:
        """See Source. Partitions that are not owned are left out."""
        self._check_open()
        keys = {key for p in partitions if (key := (p[0], p[1])) in self._next}
        if keys:
            self._paused |= keys
            with kafka_errors(f"Pausing partitions of group {self.group}"):
                self._consumer.pause([TopicPartition(*key) for key in keys])

    def resume(self, partitions: Iterable[Partition]) -> None:
        """See Source. Partitions that are not owned are left out."""
        self._check_open()
        keys = {key for p in partitions if (key := (p[0], p[1])) in self._next}
        if keys:
            self._paused -= keys
            keys -= self._unsure.keys()
            with kafka_errors(f"Resuming partitions of group {self.group}"):
                self._consumer.resume([TopicPartition(*key) for key in keys])

    def seek(self, position: Position) -> None:
        """See Source. Raises GroupError when the partition is not owned."""
        self._check_open()
        key = (position.topic, position.partition)
        if key not in self._next:
            raise self._not_owned([position], "Seeking")
        target = position.offset if position.offset >= 0 else OFFSET_BEGINNING
        self._place(*key, target)
        self._next[key] = target
        self._lost.pop(key, None)

    def committed(self, partitions: Sequence[Partition], timeout_s: float = 10) -> list[Position]:
        """See Source. Raises GroupError when the group has put this member out."""
        self._check_open()
        doing = f"Reading the committed offsets of group {self.group}"
        asked = [TopicPartition(p[0], p[1]) for p in partitions]
        end = time.monotonic() + timeout_s
        problem: Error = unanswered(doing, timeout_s)
        while asked:
            left = end - time.monotonic()
            if left <= 0:
                raise problem
            try:
                found = self._consumer.committed(asked, timeout=min(left, _QUESTION_S))
            except (KafkaException, RuntimeError) as exc:
                error = kafka_error(exc)
                if error is None:
                    raise TransportError(f"{doing} failed: {exc}") from exc
            else:
                # An offset that came with an error is no offset: a transaction may still be about to move it.
                error = next((t.error for t in found if t.error is not None), None)
                if error is None:
                    self._state.up()
                    return [Position(t.topic, t.partition, max(t.offset, -1), t.metadata or "") for t in found]
            problem = translate(error, doing)
            if isinstance(problem, ConfigurationError) or _is_out(problem):
                raise problem
            time.sleep(min(_AGAIN_S, max(end - time.monotonic(), 0)))
        return []

    def commit(self, positions: Sequence[Position], timeout_s: float = 10) -> None:
        """See Source. May be called by a listener inside its callbacks.

        The client's own commit waits for the coordinator as long as it takes, so it runs in a thread beside and is
        left to itself after ``timeout_s``. It may still be stored later; another commit waits for it first.
        """
        self._check_open()
        gone = [p for p in positions if (p.topic, p.partition) not in self._next]
        owned = [p for p in positions if (p.topic, p.partition) in self._next and p.offset >= 0]
        if owned:
            self._commit(to_offsets(owned), timeout_s)
        if gone:
            # The broker itself checks the member, not what it owns.
            raise self._not_owned(gone, "Committing")

    @property
    def callback_s(self) -> float:
        """See Source: max.poll.interval.ms."""
        return 2 * self._rebalance_s

    @property
    def commit_overdue(self) -> bool:
        """See Source. A commit of a client that left is none: the coordinator refuses it, its member is gone."""
        return self._aside.overdue

    def _commit(self, offsets: list[TopicPartition], timeout_s: float) -> None:
        doing = f"Committing offsets of group {self.group}"
        try:
            with kafka_errors(doing):
                stored = self._aside.call(lambda: self._consumer.commit(offsets=offsets, asynchronous=False), timeout_s)
        except TimeoutError:
            raise unanswered(doing, timeout_s) from None
        self._state.up()
        failures = [(t, translate(t.error, doing)) for t in stored if t.error is not None]
        if failures:
            # One that is out of the group is the news; the others are not stored either.
            failures.sort(key=lambda failure: not isinstance(failure[1], GroupError))
            failures[0][1].extra["partitions"] = [(t.topic, t.partition) for t, _ in failures]
            raise failures[0][1]

    def commit_later(self, positions: Sequence[Position], on_stored: DeliveryCallback) -> None:
        """See Source."""
        self._check_open()
        owned = [p for p in positions if (p.topic, p.partition) in self._next and p.offset >= 0]
        if not owned:
            on_stored(None)
            return
        with kafka_errors(f"Committing offsets of group {self.group}"):
            self._consumer.commit(offsets=to_offsets(owned), asynchronous=True)
        self._committing.append(on_stored)

    def watermarks(self, partition: Partition, timeout_s: float = 10) -> tuple[int, int]:
        """See Source. While a transaction is open in the partition, the second is the offset of its first record."""
        self._check_open()
        doing = f"Reading the watermarks of {partition[0]}[{partition[1]}]"
        end = time.monotonic() + timeout_s
        asked = TopicPartition(partition[0], partition[1])
        while True:
            try:
                with kafka_errors(doing):
                    found = self._consumer.get_watermark_offsets(asked, timeout=max(end - time.monotonic(), _AGAIN_S))
            except TransportError as exc:
                if not exc.retriable or time.monotonic() >= end:
                    raise
                time.sleep(_AGAIN_S)  # its leader is changing, or not known everywhere yet
                continue
            if found is None:
                raise unanswered(doing, timeout_s)
            self._state.up()
            return found

    def _place(self, topic: str, partition: int, offset: int) -> None:
        """Go on reading a partition at ``offset``."""
        target = TopicPartition(topic, partition, offset)
        with kafka_errors(f"Seeking {topic}[{partition}] to {offset}"):
            try:
                self._consumer.seek(target)
                return
            except KafkaException as exc:
                error = kafka_error(exc)
                if error is None or error.code() != KafkaError._STATE:
                    raise
            # A partition whose position was lost is not fetched any more and cannot be sought: take it up anew.
            if self._incremental:
                self._consumer.incremental_unassign([target])
                self._consumer.incremental_assign([target])
            else:
                self._consumer.assign(
                    [target, *(TopicPartition(*k, offset=o) for k, o in self._next.items() if k != (topic, partition))]
                )
            if silent := self._paused | self._unsure.keys():
                self._consumer.pause([TopicPartition(*key) for key in silent])

    def _go_back(self) -> None:
        """After a poll that ended in an exception (a signal handler's): give again what the caller never got."""
        for (topic, partition), offset in self._next.items():
            self._place(topic, partition, offset)
        self._rewind = False

    # -- rebalances: librdkafka calls these inside poll() and consume(), and nothing may be raised out of them --------

    def _on_assign(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._see_membership()
        self._guarded(self._take_over, [(t.topic, t.partition) for t in partitions])

    def _see_membership(self) -> None:
        """In each round of the group: what is owned as another member is lost.

        The client keeps it. It finds out inside a round that the group has put it out, then it only forgets its member
        id, joins as another one with all that it had, and calls no on_lost ("already in progress, skipping" in its
        rdkafka_cgrp.c; seen with 2.16: a worker that was paused while it let go of a partition settled what it had run
        of another one, which others had run to its end meanwhile, and Kafka took it from the new member).
        """
        if self._listener is None:
            return  # it leaves, and inside close() the client may never answer
        try:
            member_id = self._membership()[1]
        except TransportError:
            return
        if member_id and self._member_id and member_id != self._member_id:
            self._lose_all()
        self._member_id = member_id or self._member_id

    def _lose_all(self) -> None:
        """What is owned is lost, and what of it the client keeps is taken over again."""
        kept = {(t.topic, t.partition) for t in self._consumer.assignment()}
        lost = list(self._next)
        if lost:
            logger.warning(
                "Group %s had put this member out and took it in anew: what it had is lost, and taken over again where "
                "it still has that",
                self.group,
            )
        if lost and self._listener is not None:
            self._guarded(self._listener.on_lost, [Partition(*key) for key in lost])
        self._forget(lost)
        self._kept |= kept

    def retake(self, partitions: Sequence[Partition]) -> None:
        """See Source."""
        keys = [key for p in partitions if (key := (p[0], p[1])) in self._next]
        if keys and self._listener is not None:
            self._listener.on_lost([Partition(*key) for key in keys])
        self._forget(keys)
        self._kept.update(keys)

    def _take_over_again(self) -> None:
        """Outside of a round: the client has these partitions, and reads on where it was."""
        keys, self._kept = list(self._kept), set()
        self._guarded(self._take_over, keys)
        self._kept |= {key for key in keys if key not in self._next}  # not done: again at the next poll
        self._raise_failure()

    def _take_over(self, keys: list[tuple[str, int]]) -> None:
        if self._listener is None or not keys:
            return  # closing, or a round that changed nothing; confluent-kafka completes it
        self._state.up()
        self._just_assigned.update(keys)
        self._kept.difference_update(keys)
        self._next.update(dict.fromkeys(keys, OFFSET_BEGINNING))  # owned from here on: the listener may commit
        partitions = [Partition(*key) for key in keys]
        listener, told = self._listener, False
        try:
            given = listener.on_assign(partitions) or ()
            told = True
            starts = {(p.topic, p.partition): p.offset for p in given if p.offset >= 0}
            starts |= self._starts([key for key in keys if key not in starts])
            self._assign(keys, starts)
        except BaseException as exc:
            for key in keys:  # nothing is given of them until they come again
                self._next.pop(key, None)
            if told:
                listener.on_lost(partitions)
            if not _is_out(exc):
                raise
            logger.info("Group %s went on without this member: %s", self.group, exc)

    def _assign(self, keys: list[tuple[str, int]], starts: Mapping[tuple[str, int], int]) -> None:
        for key in keys:
            self._next[key] = starts[key] if starts[key] != OFFSET_INVALID else OFFSET_BEGINNING
            self._lost.pop(key, None)
            self._paused.discard(key)
        targets = [TopicPartition(*key, offset=starts[key]) for key in keys]
        with kafka_errors(f"Taking over partitions of group {self.group}"):
            if self._incremental:
                has = {(t.topic, t.partition) for t in self._consumer.assignment()}
                if again := [TopicPartition(*key) for key in keys if key in has]:
                    self._consumer.incremental_unassign(again)
                self._consumer.incremental_assign(targets)
            elif len(keys) == len(self._next):
                self._consumer.assign(targets)
            else:  # again, some of them
                for target in targets:
                    self._place(target.topic, target.partition, target.offset)
            # librdkafka keeps a pause over revocation and a new assignment.
            self._consumer.resume([TopicPartition(*key) for key in keys])
            self._make_sure(keys)

    def _make_sure(self, keys: list[tuple[str, int]]) -> None:
        """Give nothing of new partitions before the coordinator had the time to say that it thinks otherwise.

        Only under KIP-848: a heartbeat that is sent while partitions are taken over says that there are none. Has the
        coordinator given them to another member meanwhile, it lets that one have them at once, and this one learns of
        it with its next heartbeat. Until then both would run their records and commit, and nobody would refuse it:
        TxnOffsetCommit checks the member, not the partition (seen on Apache Kafka 4.3.1: 52 records doubled).
        """
        if self._watch is None or not self._admin.can_create(_QUESTION_S):  # the embedded broker has no transactions
            return
        if self._sure_s is None:
            self._sure_s = 1.25 * self._admin.heartbeat_interval_s(self.group)
        now = time.monotonic()
        self._unsure.update(dict.fromkeys(keys, now + self._sure_s))
        self._young_until = now + _YOUNG * self._sure_s
        self._consumer.pause([TopicPartition(*key) for key in keys])

    def _give_sure(self) -> None:
        """Give records of those partitions that nobody took back."""
        now = time.monotonic()
        sure = {key for key, until in self._unsure.items() if until <= now}
        if sure:
            for key in sure:
                del self._unsure[key]
            with kafka_errors(f"Resuming partitions of group {self.group}"):
                self._consumer.resume([TopicPartition(*key) for key in sure - self._paused if key in self._next])

    def _starts(self, keys: list[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """Where to start partitions for which the listener gave no position: the committed offset, or the start."""
        found = self.committed([Partition(*key) for key in keys], self._rebalance_s) if keys else []
        starts = {(p.topic, p.partition): p.offset for p in found if p.offset >= 0}
        rest = [key for key in keys if key not in starts]
        if not rest:
            return starts
        if self._start == "latest":
            return starts | self._latest(rest)
        mark = OFFSET_BEGINNING if self._start == "earliest" else OFFSET_INVALID
        return starts | dict.fromkeys(rest, mark)

    def _latest(self, keys: list[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """The ends of these partitions, committed at once: what comes after is not skipped by a restart.

        A partition that was added to a topic the group knows is read from its beginning: what is in it came after the
        group did.
        """
        starts: dict[tuple[str, int], int] = {}
        for topic in {key[0] for key in keys}:
            known = self._group_knows(topic)
            for key in (k for k in keys if k[0] == topic):
                starts[key] = OFFSET_BEGINNING if known else self.watermarks(Partition(*key), _QUESTION_S)[1]
        ends = [Position(*key, offset) for key, offset in starts.items() if offset >= 0]
        if ends:
            self.commit(ends, self._rebalance_s)
        return starts

    def _group_knows(self, topic: str) -> bool:
        """Whether the group has committed an offset in any partition of the topic."""
        partitions = [Partition(topic, n) for n in range(self._admin.partitions_of(topic))]
        return any(p.offset >= 0 for p in self.committed(partitions, self._rebalance_s))

    def _membership(self) -> tuple[Any, str]:
        """The group metadata of this moment, and its member id; "" when it is not that of a member."""
        with kafka_errors(f"Asking for the membership of group {self.group}"):
            metadata = self._consumer.consumer_group_metadata()
            member_id = self._consumer.memberid() or ""
        known = isinstance(metadata, bytes) and metadata.startswith(_METADATA_MARK)
        # It is -1 before the first join, and 0 for one that KIP-848 has put out and that comes again.
        if known and _GENERATION.unpack_from(metadata, len(_METADATA_MARK))[0] <= 0:
            return metadata, ""
        return metadata, member_id

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._see_membership()
        keys = [key for t in partitions if (key := (t.topic, t.partition)) in self._next]
        if keys and self._listener is not None:
            if self._is_put_out():
                self._on_lost(consumer, partitions)
                return
            self._guarded(self._listener.on_revoke, [Partition(*key) for key in keys])
        self._forget(keys)
        self._kept.difference_update((t.topic, t.partition) for t in partitions)

    def _is_put_out(self) -> bool:
        """Whether the group put this member out after the event was queued and before poll() came to it."""
        try:
            return not self._membership()[1]
        except TransportError:
            return False

    def _on_lost(self, _consumer: Consumer, _partitions: list[TopicPartition]) -> None:
        """The membership is lost, so all is; librdkafka may tell it in parts."""
        keys = list(self._next)
        if keys and self._listener is not None:
            self._guarded(self._listener.on_lost, [Partition(*key) for key in keys])
        self._forget(keys)
        self._kept.clear()

    def _forget(self, keys: Iterable[tuple[str, int]]) -> None:
        """After a callback that took partitions away; confluent-kafka completes the rebalance behind it."""
        for key in keys:
            self._next.pop(key, None)
            self._lost.pop(key, None)
            self._paused.discard(key)
            self._unsure.pop(key, None)
            self._just_assigned.discard(key)

    def _guarded(self, callback: Callable[[Any], object], argument: object) -> None:
        """Call the listener's code; what it raises waits for poll(): out of librdkafka it would come garbled."""
        self._in_callback = True
        try:
            callback(argument)
        except BaseException as exc:  # noqa: BLE001 - KeyboardInterrupt too; raised again by poll() or close()
            if self._failure is None:
                self._failure = exc
            else:
                logger.error("A callback of group %s raised once more: %s", self.group, exc)
        finally:
            self._in_callback = False

    # -- inside --------------------------------------------------------------------------------------------------------

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _raise_lost(self) -> None:
        for error in self._lost.values():
            raise error.with_traceback(None)

    def _check_not_in_callback(self, name: str) -> None:
        if self._in_callback:
            raise TransportError(f"{name} of group {self.group} was called inside a callback of its own rebalance")

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"The source of group {self.group} is closed: make a new one")
        if self._dead is not None:
            raise self._dead.with_traceback(None)

    def _not_owned(self, positions: Sequence[Position], doing: str) -> GroupError:
        names = ", ".join(f"{p.topic}[{p.partition}]" for p in positions)
        return GroupError(
            f"{doing} {names}: not owned by this member of group {self.group} any more",
            extra={"partitions": [(p.topic, p.partition) for p in positions]},
        )


def _on_commit(
    group: str, committing: deque[DeliveryCallback], error: KafkaError | None, partitions: list[TopicPartition]
) -> None:
    """Called by the client inside poll(); nothing may be raised."""
    if not committing:
        return
    error = error or next((t.error for t in partitions if t.error is not None), None)
    _tell(committing.popleft(), None if error is None else translate(error, f"Committing offsets of group {group}"))


def _tell(on_stored: DeliveryCallback, outcome: Error | None) -> None:
    try:
        on_stored(outcome)
    except Exception:  # noqa: BLE001 - the caller's code
        log_raised(logger, "on_stored %r raised", on_stored)


def message_partition(message: Message) -> int:
    """The partition of a message; -1 when it has none yet."""
    partition = message.partition()
    return -1 if partition is None else partition


def _is_out(exc: BaseException) -> bool:
    """Whether the group has put this member out, so that only another poll() helps. A stale epoch is not that."""
    return isinstance(exc, GroupError) and exc.extra.get("kafka_error") != "STALE_MEMBER_EPOCH"
