"""Make the topics of a group, tell what is wrong with them, and what a worker does of both when it starts."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from kser.errors import ConfigurationError, Error, TransportError
from kser.transport import TopicAdmin, TopicInfo, TopicSpec
from kser.worker.topic_findings import MISSING, Finding, count, find
from kser.worker.topic_plan import WORKER_FEATURES, Feature, TopicPlan

__all__ = ["check_topics", "create_topics", "ensure_group_topics"]

logger = logging.getLogger(__name__)

#: The cluster id of kser.transport.memory.
_IN_MEMORY: Final = "memory"
#: Seconds between two looks for a topic that was just made.
_AGAIN_S: Final = 0.1
#: Longest wait for one answer, so that a broker that is down is told of soon; a creation takes longer.
_ANSWER_S: Final = 10.0
_CREATE_S: Final = 30.0
_ELECTION_S: Final = 30.0
#: Answers of a broker that lets this client create nothing.
_FORBIDDEN: Final = ("TOPIC_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED")


def create_topics(
    admin: TopicAdmin, plan: TopicPlan, *, timeout_s: float = 60
) -> tuple[dict[str, TopicInfo], list[str]]:
    """Make what is missing of the plan. All of its topics as they are then, and the names of those made now.

    What exists stays as it is. Raises TransportError when a broker refuses, or does not answer within ``timeout_s``.
    """
    end = time.monotonic() + timeout_s
    there = admin.describe(plan.names, _left(end))
    made: list[str] = []
    # The task topics first: those of the group are made to match them.
    for names in (list(plan.tasks), plan.names):
        missing = [spec for spec in plan.specs(there) if spec.name in names and spec.name not in there]
        if missing:
            made += admin.create(missing, _left(end, _CREATE_S))
            there |= _seen(admin, [spec.name for spec in missing], end)
    return there, made


def check_topics(admin: TopicAdmin, plan: TopicPlan, *, timeout_s: float = 20) -> list[Finding]:
    """What is wrong with the topics of the plan, [] when all is well. On the embedded broker: with their partitions.

    Raises TransportError when no broker answers within ``timeout_s``.
    """
    end = time.monotonic() + timeout_s
    embedded = not admin.can_create(_left(end))
    return find(plan, admin.describe(plan.names, _left(end)), embedded=embedded)


def ensure_group_topics(
    admin: TopicAdmin,
    group: str,
    topics: Sequence[str],
    *,
    create: bool = True,
    features: frozenset[Feature] = WORKER_FEATURES,
    servers: str | None = None,
    timeout_s: float = 60,
) -> None:
    """What a worker needs of topics is there when this returns: those of its group were made if they were missing.

    What is not right but works is logged as a warning. On the embedded broker only partitions are compared: it makes
    topics by itself and keeps no settings.

    Args:
        admin: the broker.
        group: whose topics.
        topics: the task topics; patterns (``^...``) among them are passed over.
        create: make what is missing of the group's topics, as good as the task topics are; False: refuse.
        features: whose topics this worker needs.
        servers: addresses of brokers for the commands in errors.
        timeout_s: how long it may take altogether.

    Raises:
        ConfigurationError: a task topic is missing, or one of the group's and it may not be made, or one is such that
            messages would get lost. The text says which, and the command that cures it; ``extra["findings"]`` has them
            as dicts (topic, level, finding, cure).
        TransportError: no broker answered in time.
    """
    end = time.monotonic() + timeout_s
    tasks = dict.fromkeys(topic for topic in topics if not topic.startswith("^"))
    plan = TopicPlan(group=group, tasks=tasks, features=features, used=features, servers=servers)
    embedded = not admin.can_create(_left(end))
    # A cluster that answers may be electing a controller, for one that died: that is waited for.
    there = admin.describe(plan.names, _left(end, _ELECTION_S))
    # In memory everything begins empty, in each test: there a worker makes the task topics, too.
    if create and not embedded and (all(task in there for task in tasks) or admin.cluster_id(_left(end)) == _IN_MEMORY):
        missing = [spec for spec in plan.specs(there) if spec.name not in there]
        there |= _make(admin, plan, missing, end)
    findings = find(plan, there, embedded=embedded)
    if create:
        # One of the group's own that is missing still was left out only because a task topic is.
        findings = [found for found in findings if found.finding != MISSING or found.topic in tasks]
    if errors := [found for found in findings if found.level == "error"]:
        raise _refusal(plan, errors)
    if embedded:  # what it has not made yet it may never make
        findings = [found for found in findings if found.topic in there]
    for line in _lines(findings):
        logger.warning("%s", line)


def _make(admin: TopicAdmin, plan: TopicPlan, missing: Sequence[TopicSpec], end: float) -> dict[str, TopicInfo]:
    if not missing:
        return {}
    try:
        made = admin.create(missing, _left(end, _CREATE_S))
    except Error as exc:
        if exc.extra.get("kafka_error") not in _FORBIDDEN:
            raise
        raise ConfigurationError(
            f"{exc.message}. Let somebody create the topics of group {plan.group} who may: {plan.create_command()}"
        ) from exc
    for spec in missing:
        if spec.name in made:
            settings = ", ".join(f"{name}={value}" for name, value in spec.config.items())
            logger.info("Topic %s created: %s, %s", spec.name, count(spec.partitions, "partition"), settings)
    return _seen(admin, [spec.name for spec in missing], end)


def _seen(admin: TopicAdmin, names: Sequence[str], end: float) -> dict[str, TopicInfo]:
    """Topics that were just made, as they are: what another worker made may be unknown to a broker for a moment."""
    while True:
        there = admin.describe(names, _left(end, _ELECTION_S))
        unseen = [name for name in names if name not in there]
        if not unseen:
            return there
        if time.monotonic() > end:
            raise TransportError(
                f"{', '.join(unseen)}: created, but the brokers do not know it yet; try again", retriable=True
            )
        time.sleep(_AGAIN_S)


def _refusal(plan: TopicPlan, errors: Sequence[Finding]) -> ConfigurationError:
    missing = [found.topic for found in errors if found.finding == MISSING]
    words = []
    if missing:
        words.append(
            f"Topics of group {plan.group} are missing: {', '.join(missing)}. Create them with: {plan.create_command()}"
        )
    words += _lines([found for found in errors if found.finding != MISSING])
    return ConfigurationError(". ".join(words), extra={"findings": [asdict(found) for found in errors]})


def _lines(findings: Sequence[Finding]) -> list[str]:
    """What is wrong with each topic, with the cure; one line for what has the same cure."""
    cures: dict[tuple[str, str], list[str]] = {}
    for found in findings:
        cures.setdefault((found.topic, found.cure), []).append(found.finding)
    return [f"Topic {topic}: {'; '.join(texts)}. To cure it: {cure}" for (topic, cure), texts in cures.items()]


def _left(end: float, most: float = _ANSWER_S) -> float:
    """Seconds left for one call, at least a little: 0 is no limit to some calls."""
    return min(max(end - time.monotonic(), 0.1), most)
