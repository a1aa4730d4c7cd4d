"""What is wrong with the topics of a group: one function a matter, each gives level, text and cure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from kser.transport import TopicInfo
from kser.worker.topic_plan import FOR_EVER, KAFKA_MAX_BYTES, PlannedTopic, TopicPlan

__all__ = ["MISSING", "Finding", "Level", "count", "find"]

MISSING: Final = "does not exist"

Level = Literal["error", "warning"]
#: A setting as it should be: its name, and its value.
_Setting = tuple[str, object]
#: Level, finding, and a command that cures it, or a setting that does.
_Fault = tuple[Level, str, str | _Setting]

_S_MS: Final = 1000
_UNITS: Final = ((24 * 3600 * _S_MS, "day"), (3600 * _S_MS, "hour"), (60 * _S_MS, "minute"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with one topic."""

    topic: str
    #: "error": a worker refuses to start, or it is not what was asked for. "warning": it works until something happens.
    level: Level
    #: What is wrong, with which value.
    finding: str
    #: A command line that puts it right.
    cure: str


def find(plan: TopicPlan, there: Mapping[str, TopicInfo], *, embedded: bool = False) -> list[Finding]:
    """What is wrong with the topics of the plan, in their order; [] when all is well.

    Args:
        plan: the topics as they should be.
        there: the topics as they are.
        embedded: they are on the embedded broker, which keeps no settings and makes what is missing at its first use.
    """
    look = _embedded if embedded else _faults
    return [found for topic in plan.topics for found in _findings(plan, topic, list(look(plan, topic, there)))]


def count(number: int, noun: str) -> str:
    """``1 partition``, ``2 partitions``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _findings(plan: TopicPlan, topic: PlannedTopic, faults: Sequence[_Fault]) -> Iterator[Finding]:
    """The faults of one topic; one command sets all of its settings right."""
    settings = dict(cure for _, _, cure in faults if not isinstance(cure, str))
    command = plan.set_command(topic.name, settings)
    for level, finding, cure in faults:
        yield Finding(
            topic=topic.name,
            level=level if plan.needs(topic) else "warning",
            finding=finding,
            cure=cure if isinstance(cure, str) else command,
        )


def _faults(plan: TopicPlan, topic: PlannedTopic, there: Mapping[str, TopicInfo]) -> Iterator[_Fault]:
    info = there.get(topic.name)
    if info is None:
        yield "error", MISSING, plan.create_command()
        return
    yield from _partitions(plan, topic, info, there)
    yield from _replicas(plan, topic, info, there)
    yield from _cleanup(topic, info)
    yield from _retention(topic, info)
    yield from _other_settings(plan, topic, info)


def _embedded(plan: TopicPlan, topic: PlannedTopic, there: Mapping[str, TopicInfo]) -> Iterator[_Fault]:
    from kser.confluent.embedded import DEFAULT_PARTITIONS  # here: its package loads the Kafka client

    # What is missing is compared as its first use will make it.
    later = {name: TopicInfo(name=name, partitions=DEFAULT_PARTITIONS, replication=1) for name in plan.names}
    known = later | dict(there)
    for level, finding, _ in _partitions(plan, topic, known[topic.name], known):
        numbers = finding.partition(":")[0]  # what follows is of topics that have to be kept
        if topic.name in there:
            yield level, numbers, plan.broker_command(known)
        else:
            if not topic.is_task:
                level = "warning"  # maybe nothing ever uses it
            yield level, f"does not exist yet, would get {numbers}", plan.broker_command(known)


def _partitions(
    plan: TopicPlan, topic: PlannedTopic, info: TopicInfo, there: Mapping[str, TopicInfo]
) -> Iterator[_Fault]:
    has, wanted = info.partitions, plan.partitions_of(topic, there)
    text = count(has, "partition")
    match topic.kind.partitions:
        case "same" if topic.task in there and has > wanted:
            # The task topic was made anew, with fewer: with that number each key is where its state is again.
            text += f", and {topic.task} has {wanted}: keys are not where their state is"
            yield "error", text, plan.grow_command(topic.task, has)
        case "same" if topic.task in there and has < wanted:
            text += (
                f", and {topic.task} has {wanted}: partitions were added to it, and keys are no longer where their "
                f"state is. To cure it forgets the state: end all work first, or go to a topic of {has} partitions"
            )
            yield "error", text, plan.remake_command(topic.name)
        case "largest" if topic.kind.delay_s and has < wanted and any(task in there for task in plan.tasks):
            text += f", and the largest task topic has {wanted}: fewer workers share its load"
            yield "warning", text, plan.grow_command(topic.name, wanted)
        case "chosen" if (said := plan.said(topic)) is not None and has != said:
            yield "error", f"{text}, expected {said}", _cure_number(plan, topic, has, said, there)


def _cure_number(plan: TopicPlan, topic: PlannedTopic, has: int, said: int, there: Mapping[str, TopicInfo]) -> str:
    """Kafka takes no partition away, and beside a state topic none may be added: then say the number that it has."""
    if has < said and f"{plan.group}.state.{topic.name}" not in there:
        return plan.grow_command(topic.name, said)
    return plan.agree_command(topic, has)


def _replicas(
    plan: TopicPlan, topic: PlannedTopic, info: TopicInfo, there: Mapping[str, TopicInfo]
) -> Iterator[_Fault]:
    has, of_tasks = info.replication, plan.copies_of_tasks(there)
    text, add = count(has, "replica"), plan.copy_command(topic.name)
    if plan.replication is not None and has < plan.replication:
        yield "error", f"{text}, expected {plan.replication}", add
    elif has < of_tasks:
        yield "warning", f"{text}, and a task topic has {of_tasks}", add
    isr = _number(info, "min.insync.replicas")
    if isr is None or has < 2:
        return
    text, two = f"min.insync.replicas is {isr} with {text}", ("min.insync.replicas", 2)
    if has >= 3 and isr < 2:
        yield "warning", f"{text}: the loss of one broker can lose confirmed records", two
    elif isr >= has:
        # More than there are replicas counts as all of them (Kafka 4.3.1, tried).
        yield "warning", f"{text}: while one broker is down nothing can be written", two if has >= 3 else add


def _cleanup(topic: PlannedTopic, info: TopicInfo) -> Iterator[_Fault]:
    policy, wanted = info.config.get("cleanup.policy"), topic.kind.cleanup
    if policy is None:
        return
    text, cure = f"cleanup.policy is {policy or 'empty'}", ("cleanup.policy", wanted)
    if wanted == "compact" and policy != "compact":
        forgets = "what is old is forgotten" if "delete" in policy else "it grows for ever"
        yield "error", f"{text}, not compact: {forgets}", cure
    elif wanted == "delete" and "compact" in policy:
        yield "error", f"{text}, not delete: of records with the same key only the last stays", cure


def _retention(topic: PlannedTopic, info: TopicInfo) -> Iterator[_Fault]:
    kind = topic.kind
    if kind.cleanup != "delete" or "delete" not in info.config.get("cleanup.policy", ""):
        return
    level: Level = "error" if kind.strict else "warning"
    kept, size = _number(info, "retention.ms"), _number(info, "retention.bytes")
    if kept is not None and 0 <= kept < kind.least_ms + kind.delay_s * _S_MS:
        least = _span(kind.least_ms) + (f" beyond its delay of {_span(kind.delay_s * _S_MS)}" if kind.delay_s else "")
        text = f"keeps records for {_span(kept)}, less than {least}: what waits longer is lost"
        yield level, text, ("retention.ms", kind.retention_ms)
    if size is not None and size >= 0:
        text = f"retention.bytes is {size}: a full partition loses its oldest records, however young they are"
        yield level, text, ("retention.bytes", FOR_EVER)


def _other_settings(plan: TopicPlan, topic: PlannedTopic, info: TopicInfo) -> Iterator[_Fault]:
    stamped, wanted = info.config.get("message.timestamp.type"), topic.kind.timestamps
    if wanted is not None and stamped is not None and stamped != wanted:
        text = f"message.timestamp.type is {stamped}, not {wanted}: delays run from the broker's clock"
        yield "error", text, ("message.timestamp.type", wanted)
    largest = _number(info, "max.message.bytes")
    if largest is not None and largest < plan.largest_record:
        text = (
            f"max.message.bytes is {largest}: messages of up to {plan.message_bytes} bytes (KSER_MAX_MESSAGE_BYTES) "
            "and their headers do not fit"
        )
        yield "warning", text, ("max.message.bytes", max(plan.largest_record, KAFKA_MAX_BYTES))
    if info.config.get("unclean.leader.election.enable") == "true":
        text = "unclean.leader.election.enable is true: a replica that lags may become the leader, and the rest is lost"
        yield "warning", text, ("unclean.leader.election.enable", "false")


def _number(info: TopicInfo, name: str) -> int | None:
    """A setting that is a number; None where the broker does not tell it."""
    text = info.config.get(name)
    return int(text) if text is not None else None


def _span(ms: int) -> str:
    """A time in its largest unit: 604800000 -> "7 days", 5400000 -> "1.5 hours", 10000 -> "10 s"."""
    for unit, noun in _UNITS:
        if ms >= unit:
            number = round(ms / unit, 1)
            return f"{number:g} {noun}" + ("" if number == 1 else "s")
    return f"{ms / _S_MS:g} s"
