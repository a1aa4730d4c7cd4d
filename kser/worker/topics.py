"""The topics of a group, as they should be, and what is wrong with those there are."""

import logging
from collections.abc import Sequence

from kser.errors import ConfigurationError
from kser.events import events_topic
from kser.transport import TopicAdmin, TopicInfo, TopicSpec

__all__ = ["check_topics", "ensure_group_topics", "group_topics", "task_topic"]

logger = logging.getLogger(__name__)

_DAY_MS = 24 * 3600 * 1000
#: Task messages and events are kept this long: a weekend without workers, or a month, must lose nothing.
RETENTION_MS = 30 * _DAY_MS
DEFAULT_PARTITIONS = 6


def task_topic(name: str, partitions: int = DEFAULT_PARTITIONS, replication: int | None = None) -> TopicSpec:
    """A topic for task messages."""
    return TopicSpec(name=name, partitions=partitions, replication=replication, config=_settings(replication))


def group_topics(group: str, partitions: int = DEFAULT_PARTITIONS, replication: int | None = None) -> list[TopicSpec]:
    """The topics that the workers of ``group`` need beside the task topics."""
    return [
        TopicSpec(
            name=events_topic(group), partitions=partitions, replication=replication, config=_settings(replication)
        )
    ]


def _settings(replication: int | None) -> dict[str, str]:
    settings = {"cleanup.policy": "delete", "retention.ms": str(RETENTION_MS)}
    if replication is not None and replication >= 3:
        settings["min.insync.replicas"] = "2"
    return settings


def ensure_group_topics(admin: TopicAdmin, group: str, topics: Sequence[str], *, create: bool) -> None:
    """Make what is missing of the group's topics, and warn of task topics that do not exist.

    Raises ConfigurationError when a group topic is missing and ``create`` is False.
    """
    wanted = group_topics(group)
    there = admin.describe([spec.name for spec in wanted] + list(topics))
    if not admin.can_create():
        return  # it makes every topic by itself, at the first use
    missing = [spec for spec in wanted if spec.name not in there]
    if missing and not create:
        names = ", ".join(spec.name for spec in missing)
        raise ConfigurationError(
            f"Topics of group {group} are missing: {names}. Create them with: kser topics create --group {group}",
            extra={"topics": [spec.name for spec in missing]},
        )
    for name in admin.create(missing) if missing else []:
        logger.info("Topic %s created", name)
    for topic in topics:
        if topic not in there and not topic.startswith("^"):
            logger.warning(
                "Topic %s does not exist yet, waiting for it. To create it: kser topics create --group %s --topics %s",
                topic,
                group,
                topic,
            )


def check_topics(admin: TopicAdmin, wanted: Sequence[TopicSpec]) -> list[str]:
    """What is wrong with the topics, one sentence each; empty when all is well.

    Raises TransportError when no broker answers.
    """
    there = admin.describe([spec.name for spec in wanted])
    findings: list[str] = []
    for spec in wanted:
        info = there.get(spec.name)
        if info is None:
            findings.append(f"{spec.name}: missing")
        else:
            findings += [f"{spec.name}: {finding}" for finding in _compare(spec, info)]
    return findings


def _compare(spec: TopicSpec, info: TopicInfo) -> list[str]:
    findings = []
    if info.partitions != spec.partitions:
        findings.append(f"{info.partitions} partitions, expected {spec.partitions}")
    if spec.replication is not None and info.replication != spec.replication:
        findings.append(f"{info.replication} replicas, expected {spec.replication}")
    if not info.config:
        return findings  # a broker that tells no settings has none
    kept = int(info.config.get("retention.ms", "-1"))
    wanted = int(spec.config.get("retention.ms", "-1"))
    if "delete" in info.config.get("cleanup.policy", "delete") and 0 <= kept < wanted:
        findings.append(
            f"keeps records for {_days(kept)}, less than {_days(wanted)}: what waits longer is lost; set retention.ms"
        )
    if int(info.config.get("retention.bytes", "-1")) >= 0:
        findings.append(
            f"retention.bytes is {info.config['retention.bytes']}: a full partition loses its oldest records"
        )
    isr = int(info.config.get("min.insync.replicas", "1"))
    if info.replication >= 3 and isr < 2:
        findings.append(f"min.insync.replicas is {isr}: one broker's loss can lose confirmed records; set it to 2")
    if info.replication < isr:
        findings.append(f"min.insync.replicas is {isr} with {info.replication} replicas: nothing can be written")
    return findings


def _days(ms: int) -> str:
    days = ms / _DAY_MS
    return f"{days:.0f} days" if days >= 1 else f"{ms / 1000:.0f} s"
