"""ConfluentAdmin: the topics of a Kafka cluster."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

from confluent_kafka import IsolationLevel, KafkaError, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # its __all__ names only some of what it exports
    AdminClient,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    TopicMetadata,
)

from kser.confluent.config import admin_config, new_client
from kser.confluent.errors import kafka_errors, translate, unanswered
from kser.confluent.logs import ClientState
from kser.errors import Error, TransportError
from kser.transport import EMBEDDED_CLUSTERS, Partition, Position, TopicInfo, TopicSpec

__all__ = ["ConfluentAdmin"]

#: Longest wait for answers that are needed inside other calls.
_LOOK_S: Final = 5.0
#: Longest single question, so that a refusal or another broker is noticed before the whole time is over.
_QUESTION_S: Final = 1.0
#: Longest question for the settings of topics, which goes to one node.
_SETTINGS_S: Final = 3.0
#: Seconds between two questions while there is no answer.
_AGAIN_S: Final = 0.05

#: The broker's own defaults of group.consumer.session.timeout.ms and .heartbeat.interval.ms, where it does not tell.
_SESSION_MS: Final = 45_000
_HEARTBEAT_MS: Final = 5_000

_SILENCE: Final = ("_TIMED_OUT", "_TRANSPORT", "_ALL_BROKERS_DOWN", "_RESOLVE")

_T = TypeVar("_T")


class ConfluentAdmin:
    """Looks at topics and makes them. Implements kser.transport.TopicAdmin. May be shared by threads.

    Args:
        user: librdkafka properties that went through checked().
    """

    def __init__(self, user: Mapping[str, Any]) -> None:
        self._config = admin_config(user)
        self._brokers = str(user["bootstrap.servers"])
        self._state = ClientState("admin client", self._brokers)
        # Kept for as long as this lives: futures of a client that was collected end with _DESTROY.
        self._client = new_client(AdminClient, self._config, self._state)
        self._cluster_id = ""

    def cluster_id(self, timeout_s: float = 10) -> str:
        """See TopicAdmin. Asked once, then remembered. ConfigurationError when the brokers refuse this client."""
        if not self._cluster_id:
            end = time.monotonic() + timeout_s
            self._cluster_id = self._ask("Asking for the cluster's name", self._client.cluster_id, end) or ""
        return self._cluster_id

    def can_create(self, timeout_s: float = 10) -> bool:
        """See TopicAdmin."""
        return not self.cluster_id(timeout_s).startswith(EMBEDDED_CLUSTERS)

    def describe(self, names: Sequence[str], timeout_s: float = 10) -> dict[str, TopicInfo]:
        """See TopicAdmin. Creates nothing on any broker."""
        end = time.monotonic() + timeout_s
        found = {}
        for name in names:
            topic = self._look(name, end)
            if topic is not None:
                found[name] = topic
        if not found or not self.can_create(_left(end)):
            return {name: _info(topic, {}) for name, topic in found.items()}
        settings = self._settings(found, end)
        return {name: _info(topic, settings[name]) for name, topic in found.items() if name in settings}

    def create(self, specs: Sequence[TopicSpec], timeout_s: float = 30) -> list[str]:
        """See TopicAdmin. What was made can be seen by this client when it returns."""
        end = time.monotonic() + timeout_s
        wanted = {spec.name: spec for spec in specs}
        if not wanted:
            return []
        if not self.can_create(timeout_s):
            self._check_there(wanted, end)
            return []
        orders = [
            NewTopic(spec.name, spec.partitions, spec.replication or -1, config=dict(spec.config))
            for spec in wanted.values()
        ]
        with self._asking("Creating topics"):
            answers = self._client.create_topics(orders, request_timeout=_left(end), operation_timeout=_left(end))
        made, problems = [], []
        for name, answer in answers.items():
            try:
                self._result(answer, f"Creating topic {name}", end)
                made.append(name)
            except Error as exc:
                if exc.extra.get("kafka_error") != "TOPIC_ALREADY_EXISTS":
                    problems.append(exc)
        if problems:
            raise problems[0]
        self._wait_for(made, end)
        return made

    def delete_records(self, positions: Sequence[Position], timeout_s: float = 30) -> None:
        """See TopicAdmin."""
        end = time.monotonic() + timeout_s
        if not positions:
            return
        if not self.can_create(timeout_s):
            raise TransportError(
                "The embedded broker cannot delete records: it forgets all of them when it is started again"
            )
        wanted = [TopicPartition(topic, number, offset) for topic, number, offset, _ in positions]
        with self._asking("Deleting records"):
            answers = self._client.delete_records(wanted, request_timeout=_left(end), operation_timeout=_left(end))
        problems = []
        for of, answer in answers.items():
            try:
                self._result(answer, f"Deleting the records of {of.topic}/{of.partition} before {of.offset}", end)
            except Error as exc:
                problems.append(exc)
        if problems:
            raise problems[0]

    # -- for the other clients of this package -------------------------------------------------------------------------

    def partitions_of(self, topic: str, timeout_s: float = _LOOK_S) -> int:
        """How many partitions a topic has, 0 when it does not exist."""
        found = self._look(topic, time.monotonic() + timeout_s)
        return len(found.partitions) if found is not None else 0

    def bounds(self, partitions: Sequence[Partition], timeout_s: float = _LOOK_S) -> dict[Partition, tuple[int, int]]:
        """The first offset there is of each, and the one its next record will get, whatever transaction is open there.

        Raises TransportError: there is no such partition, or no answer within ``timeout_s``.
        """
        end = time.monotonic() + timeout_s
        # The ends last: what is written meanwhile belongs to what there is.
        starts = self._offsets(partitions, OffsetSpec.earliest(), end)  # type: ignore[no-untyped-call]
        ends = self._offsets(partitions, OffsetSpec.latest(), end)  # type: ignore[no-untyped-call]
        return {of: (starts[of], ends[of]) for of in starts}

    def offsets_at(self, partitions: Sequence[Partition], time_ms: int, timeout_s: float = 10) -> dict[Partition, int]:
        """See TopicAdmin."""
        end = time.monotonic() + timeout_s
        if not self.can_create(_left(end)):  # librdkafka's mock cluster does not look at timestamps
            return self._offsets(partitions, OffsetSpec.earliest(), end)  # type: ignore[no-untyped-call]
        ends = self._offsets(partitions, OffsetSpec.latest(), end)  # type: ignore[no-untyped-call]
        found = self._offsets(partitions, OffsetSpec.for_timestamp(time_ms), end)
        return {of: offset if offset >= 0 else ends[of] for of, offset in found.items()}

    def session_timeout_s(self, group: str) -> float:
        """After how long without a heartbeat the broker puts a member of this group out, under KIP-848."""
        return self._of_group(group, "consumer.session.timeout.ms", _SESSION_MS) / 1000

    def heartbeat_interval_s(self, group: str) -> float:
        """How often the members of this group tell the broker of themselves, under KIP-848."""
        return self._of_group(group, "consumer.heartbeat.interval.ms", _HEARTBEAT_MS) / 1000

    def _of_group(self, group: str, setting: str, default: int) -> float:
        asked = ConfigResource(ConfigResource.Type.GROUP, group)
        try:
            with self._asking(f"Reading the settings of group {group}"):
                answer = self._client.describe_configs([asked], request_timeout=_LOOK_S)[asked]
            found = self._result(answer, f"Reading the settings of group {group}", time.monotonic() + _LOOK_S)
            return float(found[setting].value)
        except (Error, KeyError, TypeError, ValueError):
            return default

    def touch(self, topics: Iterable[str]) -> None:
        """Ask about these so that a broker which makes topics when asked makes them, as the embedded one does."""
        missing = [topic for topic in topics if not self.partitions_of(topic)]
        if missing:
            maker = new_client(AdminClient, self._config | {"allow.auto.create.topics": True}, self._state)
            for topic in missing:
                end = time.monotonic() + _LOOK_S
                self._ask(f"Making topic {topic}", partial(maker.list_topics, topic), end)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _look(self, name: str, end: float) -> TopicMetadata | None:
        """One topic, or None when there is none of this name. Waits while it is being made."""
        doing = f"Looking at topic {name}"
        while True:
            topic = self._ask(doing, partial(self._client.list_topics, name), end).topics.get(name)
            error = topic.error if topic is not None else None
            if topic is None or (error is not None and error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART):
                return None
            if error is None and topic.partitions:
                return topic
            if error is not None and error.code() != KafkaError.LEADER_NOT_AVAILABLE:
                raise translate(error, doing)
            if time.monotonic() >= end:
                raise TransportError(f"{doing}: it has no leader yet", retriable=True)
            time.sleep(_AGAIN_S)

    def _offsets(self, partitions: Sequence[Partition], which: OffsetSpec, end: float) -> dict[Partition, int]:
        """One offset of each partition, asked again while its leader is not known yet."""
        if not partitions:
            return {}
        doing, asked = "Looking for the bounds of partitions", {TopicPartition(*of): which for of in partitions}
        while True:
            try:
                with self._asking(doing):
                    answers = self._client.list_offsets(
                        asked, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=_left(end)
                    )
                found = {Partition(of.topic, of.partition): answer for of, answer in answers.items()}
                return {
                    of: self._result(answer, f"{doing}: {of.topic}/{of.partition}", end).offset
                    for of, answer in found.items()
                }
            except TransportError as exc:
                # A partition that was made, or whose broker died, a moment ago.
                if not exc.retriable or time.monotonic() >= end:
                    raise
            time.sleep(_AGAIN_S)

    def _settings(self, names: Iterable[str], end: float) -> dict[str, dict[str, str]]:
        """The settings in force of those topics that still exist.

        The client asks one node only, whichever it thinks is up: one that has just died must not be the last word.
        """
        while True:
            try:
                return self._settings_of(names, min(end, time.monotonic() + _SETTINGS_S))
            except TransportError as exc:
                if not exc.retriable or time.monotonic() + _SETTINGS_S > end:
                    raise
                time.sleep(_AGAIN_S)

    def _settings_of(self, names: Iterable[str], end: float) -> dict[str, dict[str, str]]:
        resources = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
        with self._asking("Reading topic settings"):
            answers = self._client.describe_configs(resources, request_timeout=_left(end))
        found = {}
        for resource, answer in answers.items():
            try:
                entries = self._result(answer, f"Reading the settings of topic {resource.name}", end)
            except Error as exc:
                if exc.extra.get("kafka_error") == "UNKNOWN_TOPIC_OR_PART":
                    continue
                raise
            found[resource.name] = {key: entry.value for key, entry in entries.items() if entry.value is not None}
        return found

    def _check_there(self, wanted: Mapping[str, TopicSpec], end: float) -> None:
        missing = [name for name in wanted if self._look(name, end) is None]
        if missing:
            topics = " ".join(f"--topic {name}:{wanted[name].partitions}" for name in missing)
            raise TransportError(
                f"The embedded broker takes no orders to create {', '.join(missing)}: start it with {topics}, or use "
                "them, and it makes them with 4 partitions each",
                extra={"topics": missing},
            )

    def _wait_for(self, names: Sequence[str], end: float) -> None:
        """Brokers learn of a new topic a moment after it was made."""
        for name in names:
            while self._look(name, end) is None:
                if time.monotonic() > end:
                    raise TransportError(
                        f"Topic {name} was created but is not known to the brokers yet", retriable=True
                    )
                time.sleep(_AGAIN_S)

    def _result(self, answer: "Future[_T]", doing: str, end: float) -> _T:
        with self._asking(doing):
            try:
                return answer.result(_left(end) + _LOOK_S)  # its request has a timeout of its own, which says more
            except FutureTimeoutError:
                raise unanswered(doing, _left(end) + _LOOK_S) from None

    def _ask(self, doing: str, question: Callable[[float], _T], end: float) -> _T:
        """The answer to a question that takes a timeout, asked again until ``end`` while nobody answers."""
        started = time.monotonic()
        while True:
            try:
                with self._asking(doing):
                    return question(min(_left(end), _QUESTION_S))
            except TransportError as exc:
                if exc.extra.get("kafka_error") not in _SILENCE:
                    raise
                if time.monotonic() >= end:
                    raise unanswered(f"{doing} at {self._brokers}", end - started) from exc
            time.sleep(_AGAIN_S)

    @contextmanager
    def _asking(self, doing: str) -> Iterator[None]:
        """As kafka_errors(); where the brokers refuse this client, that is the error, not the silence."""
        try:
            with kafka_errors(doing):
                yield
        except TransportError:
            self._client.poll(0)  # what the client noticed meanwhile
            if (refusal := self._state.refusal) is not None:
                raise refusal from None
            raise
        self._state.up()


def _info(topic: TopicMetadata, config: Mapping[str, str]) -> TopicInfo:
    replicas = [len(partition.replicas) for partition in topic.partitions.values()]
    return TopicInfo(
        name=str(topic.topic), partitions=len(replicas), replication=min(replicas, default=0), config=config
    )


def _left(end: float) -> float:
    """Seconds left, at least a little: 0 would mean no limit to some calls."""
    return max(end - time.monotonic(), 0.1)
