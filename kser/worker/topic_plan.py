"""How the topics of a group should be: KINDS is the table, a TopicPlan lays it over a group and its task topics."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Final, Literal, NamedTuple

from kser.control import control_topic
from kser.errors import ConfigurationError
from kser.events import events_topic
from kser.producer import max_message_bytes
from kser.telemetry import telemetry_topic
from kser.transport import TopicInfo, TopicSpec
from kser.transport.names import is_topic_name

__all__ = [
    "DEFAULT_PARTITIONS",
    "FOR_EVER",
    "KAFKA_MAX_BYTES",
    "KINDS",
    "TIERS",
    "WORKER_FEATURES",
    "Feature",
    "Kind",
    "PlannedTopic",
    "TopicPlan",
]

#: Partitions of a topic for which nobody says how many.
DEFAULT_PARTITIONS: Final = 6
#: The constant delays of the retry topics: the end of their names, and seconds.
TIERS: Final[Mapping[str, int]] = {"10s": 10, "1m": 60, "10m": 600, "1h": 3600}
#: retention.ms and retention.bytes without a limit.
FOR_EVER: Final = -1

_DAY_MS: Final = 24 * 3600 * 1000
_WEEK_MS: Final = 7 * _DAY_MS
_MONTH_MS: Final = 30 * _DAY_MS
#: max.message.bytes where nobody sets it.
KAFKA_MAX_BYTES: Final = 1_048_588
#: What a record has beside its value: key, headers (of a dead letter, its error and traceback), the batch around it.
_ROOM_BYTES: Final = 16 * 1024
#: A compacted topic is read to its end at a start, and its open segment is not compacted. Source: Kafka Streams.
_COMPACT_SEGMENT_BYTES: Final = 50 * 1024 * 1024


class Feature(StrEnum):
    """What a worker can do that needs topics of its group."""

    EVENTS = "events"
    TELEMETRY = "telemetry"
    CONTROL = "control"
    STATE = "state"
    DEAD_LETTERS = "dlq"
    RETRIES = "retry"


#: What workers do today: they make and need these topics, and nothing that is wrong with another stops them.
WORKER_FEATURES: Final = frozenset(Feature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How topics of one kind should be: a row of KINDS."""

    #: The name, of {group} and {topic}; one with {topic} is made for each task topic.
    pattern: str
    #: Who needs it; None: it is a task topic.
    feature: Feature | None
    #: "chosen": as somebody says, else DEFAULT_PARTITIONS. "same": as its task topic has, always. "largest": as the
    #: largest task topic has.
    partitions: Literal["one", "chosen", "same", "largest"]
    cleanup: Literal["delete", "compact"] = "delete"
    #: How long records are kept, as kser makes the topic. A compacted one has no such thing.
    retention_ms: int = FOR_EVER
    #: Less than this, beyond the delay, is a finding.
    least_ms: int = 0
    #: Losing records early is an error, not a warning.
    strict: bool = False
    #: How long each record waits here.
    delay_s: int = 0

    @property
    def timestamps(self) -> str | None:
        """The message.timestamp.type it must have; None: either will do.

        A delay runs from the broker's clock: those of the services and workers differ.
        """
        return "LogAppendTime" if self.delay_s else None

    def config(self, *, replication: int | None, message_bytes: int) -> dict[str, str]:
        """Its settings by their Kafka names, for so many replicas (None: not known) and messages of up to that size."""
        config: dict[str, str] = {"cleanup.policy": self.cleanup}
        if self.cleanup == "compact":
            config["segment.bytes"] = str(_COMPACT_SEGMENT_BYTES)
        else:
            config |= {"retention.ms": str(self.retention_ms), "retention.bytes": str(FOR_EVER)}
        if self.timestamps:
            config["message.timestamp.type"] = self.timestamps
        if replication is not None and replication >= 3:
            config["min.insync.replicas"] = "2"
        # Where Kafka's default will do nothing is set: a cluster that allows more to all of its topics still does.
        if message_bytes + _ROOM_BYTES > KAFKA_MAX_BYTES:
            config["max.message.bytes"] = str(message_bytes + _ROOM_BYTES)
        return config


_TASKS: Final = Kind(pattern="{topic}", feature=None, partitions="chosen", retention_ms=_MONTH_MS, least_ms=_WEEK_MS)
#: The topics of a group, in the order in which they are shown. Kind.config() has what all of them share.
KINDS: Final[Sequence[Kind]] = (
    _TASKS,
    Kind(
        pattern=events_topic("{group}"),
        feature=Feature.EVENTS,
        partitions="chosen",
        retention_ms=_MONTH_MS,
        least_ms=_WEEK_MS,
    ),
    Kind(
        pattern=telemetry_topic("{group}"),
        feature=Feature.TELEMETRY,
        partitions="chosen",
        retention_ms=_WEEK_MS,
        least_ms=_DAY_MS,
    ),
    Kind(pattern=control_topic("{group}"), feature=Feature.CONTROL, partitions="one", cleanup="compact"),
    Kind(pattern="{group}.state.{topic}", feature=Feature.STATE, partitions="same", cleanup="compact"),
    Kind(pattern="{group}.dlq", feature=Feature.DEAD_LETTERS, partitions="largest", least_ms=_WEEK_MS, strict=True),
    *(
        Kind(
            pattern="{group}.retry." + tier,
            feature=Feature.RETRIES,
            partitions="largest",
            least_ms=_WEEK_MS,
            strict=True,
            delay_s=delay_s,
        )
        for tier, delay_s in TIERS.items()
    ),
)


class PlannedTopic(NamedTuple):
    """A topic that should be there."""

    name: str
    kind: Kind
    #: The task topic that it is, or belongs to; "" for those of the whole group.
    task: str

    @property
    def is_task(self) -> bool:
        """True for a task topic, False for one of the group's own."""
        return self.kind is _TASKS


@dataclass(frozen=True, kw_only=True)
class TopicPlan:
    """The topics of one group and its task topics, as they should be.

    Raises ConfigurationError for names that no topic can have.
    """

    group: str
    #: Task topics, and how many partitions each has to have; None: not said.
    tasks: Mapping[str, int | None]
    #: Partitions of the others where they are a matter of choice; None: DEFAULT_PARTITIONS where one is made, and one
    #: that has another number is right, too.
    partitions: int | None = None
    #: Copies of each; None: the broker's default for task topics, and for the group's own as many as task topics have.
    replication: int | None = None
    #: Whose topics the plan is made of.
    features: frozenset[Feature] = frozenset(Feature)
    #: Whose topics the workers need: nothing that is wrong with another is an error.
    used: frozenset[Feature] = WORKER_FEATURES
    #: Addresses of brokers, for the commands that cures are; None: left open.
    servers: str | None = None
    #: Largest message that is sent.
    message_bytes: int = field(default_factory=max_message_bytes)

    def __post_init__(self) -> None:
        for topic in self.topics:
            if not is_topic_name(topic.name):
                raise ConfigurationError(
                    f"{topic.name!r} cannot be a topic: names of topics, and of groups, are made of letters, digits, "
                    "'.', '_' and '-', 249 of them at most"
                )
            if not topic.is_task and topic.name in self.tasks:
                raise ConfigurationError(f"{topic.name} is group {self.group}'s own: name another topic for tasks")

    @cached_property
    def topics(self) -> Sequence[PlannedTopic]:
        """All of them."""
        return [
            PlannedTopic(kind.pattern.format(group=self.group, topic=task), kind, task)
            for kind in KINDS
            if kind.feature is None or kind.feature in self.features
            for task in (self.tasks if "{topic}" in kind.pattern else [""])
        ]

    @property
    def names(self) -> list[str]:
        """The names of all of them."""
        return [topic.name for topic in self.topics]

    def specs(self, there: Mapping[str, TopicInfo]) -> list[TopicSpec]:
        """How each should be made, to match those that are ``there`` already."""
        copies = self.copies_of_tasks(there)
        learned = self.replication or (copies if copies > 1 else None)
        made = []
        for topic in self.topics:
            replication = self.replication if topic.is_task else learned
            config = topic.kind.config(replication=replication, message_bytes=self.message_bytes)
            partitions = self.partitions_of(topic, there)
            made.append(TopicSpec(name=topic.name, partitions=partitions, replication=replication, config=config))
        return made

    def partitions_of(self, topic: PlannedTopic, there: Mapping[str, TopicInfo]) -> int:
        """How many partitions the topic should have, beside the task topics that are ``there``."""
        match topic.kind.partitions:
            case "one":
                return 1
            case "same":
                return self._of_task(topic.task, there)
            case "largest" if self.tasks:
                return max(self._of_task(task, there) for task in self.tasks)
        return self.said(topic) or DEFAULT_PARTITIONS

    def _of_task(self, task: str, there: Mapping[str, TopicInfo]) -> int:
        if task in there:
            return there[task].partitions
        return self.tasks[task] or self.partitions or DEFAULT_PARTITIONS

    def said(self, topic: PlannedTopic) -> int | None:
        """The number of partitions that was asked for, of a topic where that is a matter of choice."""
        return (self.tasks[topic.task] if topic.is_task else None) or self.partitions

    def copies_of_tasks(self, there: Mapping[str, TopicInfo]) -> int:
        """How many replicas the task topics have that are ``there``; 0 when none is."""
        return max((there[task].replication for task in self.tasks if task in there), default=0)

    def needs(self, topic: PlannedTopic) -> bool:
        """True when workers cannot do without it."""
        return topic.kind.feature is None or topic.kind.feature in self.used

    @property
    def largest_record(self) -> int:
        """Bytes of the largest message with what is around it."""
        return self.message_bytes + _ROOM_BYTES

    # -- commands that put things right --------------------------------------------------------------------------------

    def create_command(self) -> str:
        """Creates what is missing."""
        return self._kser("create", self.tasks, self.partitions)

    def check_command(self) -> str:
        """Tells what is wrong."""
        return self._kser("check", self.tasks, self.partitions)

    def agree_command(self, topic: PlannedTopic, partitions: int) -> str:
        """Tells what is wrong, when that topic is to have this number of partitions."""
        if topic.is_task:
            return self._kser("check", {**self.tasks, topic.name: partitions}, self.partitions)
        return self._kser("check", self.tasks, partitions)

    def broker_command(self, there: Mapping[str, TopicInfo]) -> str:
        """Starts the embedded broker with all of the topics."""
        words = ["kser", "broker", "--group", self.group]
        for task, said in self.tasks.items():
            words += ["--topic", f"{task}:{said or self._of_task(task, there)}"]
        return shlex.join(words)

    def set_command(self, topic: str, settings: Mapping[str, object]) -> str:
        """Gives a topic these settings."""
        values = ",".join(f"{name}={value}" for name, value in settings.items())
        return f"{self._tool('configs')} --alter --entity-type topics --entity-name {topic} --add-config {values}"

    def grow_command(self, topic: str, partitions: int) -> str:
        """Adds partitions to a topic."""
        return f"{self._tool('topics')} --alter --topic {topic} --partitions {partitions}"

    def remake_command(self, topic: str) -> str:
        """Deletes a topic, with what is in it, and creates it again."""
        return f"{self._tool('topics')} --delete --topic {topic} && {self.create_command()}"

    def copy_command(self, topic: str) -> str:
        """Gives a topic other replicas: docs/topics.md has what is to be written into the file."""
        return f"{self._tool('reassign-partitions')} --reassignment-json-file {topic}.json --execute"

    def _kser(self, command: str, tasks: Mapping[str, int | None], partitions: int | None) -> str:
        words = ["kser", "topics", command, "--group", self.group]
        if tasks:
            words += ["--topics", ",".join(f"{name}:{number}" if number else name for name, number in tasks.items())]
        if partitions is not None:
            words += ["--partitions", str(partitions)]
        if self.replication is not None:
            words += ["--replication", str(self.replication)]
        if self.servers:
            words += ["--bootstrap-servers", self.servers]
        return shlex.join(words)

    def _tool(self, name: str) -> str:
        return f"kafka-{name}.sh --bootstrap-server {shlex.quote(self.servers or 'HOST:PORT')}"
