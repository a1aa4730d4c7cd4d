"""Consumer groups of the memory transport: who is a member, who gets which partition, what was committed."""

import logging
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from kser.errors import ConfigurationError, GroupError, ValidationError
from kser.transport import Partition, Position

__all__ = ["Group", "Member", "Membership", "Subscription", "assign", "checked_member_id", "to_store"]

logger = logging.getLogger(__name__)

#: What Kafka takes as the name of a static member, as of a topic.
_MEMBER_ID = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}$")

#: Most that can be stored beside an offset: see Position.metadata.
_METADATA_BYTES = 4095


def checked_member_id(member_id: str) -> str:
    """The name of a static member as it is. Raises ConfigurationError for one that Kafka does not take."""
    if not isinstance(member_id, str) or not _MEMBER_ID.match(member_id):
        raise ConfigurationError(
            f"{member_id!r} cannot be the name of a member: use 1 to 249 of the letters a-z, A-Z, 0-9, '.', '_' and '-'"
        )
    return member_id


class Subscription:
    """Topics by name; a name that begins with ``^`` is a regular expression, as for librdkafka."""

    def __init__(self, topics: Iterable[str]) -> None:
        self.topics = tuple(topics)
        self._names = {topic for topic in self.topics if not topic.startswith("^")}
        try:
            self._patterns = [re.compile(topic) for topic in self.topics if topic.startswith("^")]
        except re.error as exc:
            raise ConfigurationError(f"A topic that begins with ^ has to be a regular expression: {exc}") from None

    def matches(self, topic: str) -> bool:
        """True when this topic is one of them."""
        return topic in self._names or any(pattern.match(topic) for pattern in self._patterns)


class Member:
    """One member of a group, from joining until it left or was put out; who comes back is a new member."""

    __slots__ = (
        "alive",
        "generation",
        "name",
        "owned",
        "polling",
        "replaced",
        "seen",
        "static",
        "subscription",
        "target",
    )

    def __init__(self, name: str, subscription: Subscription, now: float, *, static: bool = False) -> None:
        self.name = name
        self.subscription = subscription
        #: Keeps its place when it leaves, until the session timeout.
        self.static = static
        #: False once it left, or was put out because it did not poll, or was replaced.
        self.alive = True
        #: True once another member came with its name.
        self.replaced = False
        #: The generation of the group that it knows of; 0 before its first poll.
        self.generation = 0
        #: What it has, from on_assign until on_revoke returned.
        self.owned: set[Partition] = set()
        #: What it should have.
        self.target: set[Partition] = set()
        #: True while it is inside poll() or close(): then it cannot be put out.
        self.polling = False
        #: When it polled last, in the clock's seconds.
        self.seen = now


@dataclass(frozen=True, slots=True)
class Membership:
    """A member as of one moment: what Source.member() gives."""

    group: str
    member: Member | None
    generation: int

    @property
    def joined(self) -> bool:
        """False before the first poll() of a subscribed source, and after close()."""
        return self.member is not None and self.generation > 0

    @property
    def round(self) -> object:
        """Each generation is another one."""
        return self.member, self.generation


def assign(eligible: Mapping[str, Set[Partition]], previous: Mapping[str, Set[Partition]]) -> dict[str, set[Partition]]:
    """Who gets what: every partition once, loads as even as the subscriptions allow, as little moved as that takes.

    Args:
        eligible: for each member the partitions of the topics it subscribed to.
        previous: the assignment so far; disjoint, members that are gone may be in it.
    """
    result = {name: set(previous.get(name, ())) & wanted for name, wanted in eligible.items()}
    taken = set().union(*result.values())
    for partition in sorted(set().union(*eligible.values()) - taken):
        takers = [name for name, wanted in eligible.items() if partition in wanted]
        result[min(takers, key=lambda name: len(result[name]))].add(partition)
    while move := _move(result, eligible):
        donor, partition, taker = move
        result[donor].remove(partition)
        result[taker].add(partition)
    return result


def _move(
    loads: Mapping[str, Set[Partition]], eligible: Mapping[str, Set[Partition]]
) -> tuple[str, Partition, str] | None:
    """One partition that evens the loads when it moves: (from, what, to); None when nothing does."""
    by_load = sorted(loads, key=lambda name: len(loads[name]))
    for donor in reversed(by_load):
        for partition in sorted(loads[donor], reverse=True):
            for taker in by_load:
                if len(loads[taker]) + 1 >= len(loads[donor]):
                    break
                if partition in eligible[taker]:
                    return donor, partition, taker
    return None


def to_store(positions: Iterable[Position]) -> list[Position]:
    """Those with an offset; the others say that there is none. Raises ValidationError for metadata that is too long."""
    for position in positions:
        size = len(position.metadata.encode())
        if size > _METADATA_BYTES:
            raise ValidationError(
                f"The metadata for {position.topic}/{position.partition} has {size} bytes, at most {_METADATA_BYTES} "
                "can be stored: shorten it",
                extra={"size": size, "limit": _METADATA_BYTES},
            )
    return [position for position in positions if position.offset >= 0]


class Group:
    """One consumer group.

    Partitions move as with cooperative rebalancing: a change of the members or of the topics makes a new generation
    and a new target; a member lets go of what it should not have at its next poll, and only then another one gets it.

    Thread rule: every method is called with the lock of the cluster held.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.generation = 0
        #: In the order they joined.
        self.members: dict[str, Member] = {}
        self._joined = 0
        self._offsets: dict[Partition, tuple[int, Position]] = {}
        self._pending: dict[Partition, int] = {}

    # -- members -----------------------------------------------------------------------------------------------------

    def join(
        self, subscription: Subscription, topics: Mapping[str, int], now: float, member_id: str | None = None
    ) -> Member:
        """A new member. ``topics``: what there is, with partition counts. ``member_id``: the name of a static one."""
        self._joined += 1
        name = f"{self.name}-{self._joined}" if member_id is None else f"{self.name}/{member_id}"
        member = Member(name, subscription, now, static=member_id is not None)
        before = self.members.get(name)
        self.members[name] = member
        if before is not None:
            before.alive, before.replaced = False, True
            member.target = before.target
        if before is None or before.subscription.topics != subscription.topics:
            self.rebalance(topics)
        return member

    def leave(self, member: Member, topics: Mapping[str, int], now: float) -> None:
        """The member is gone, and what it had is free; that of a static one once its session has ended.

        A second call does nothing.
        """
        if member.alive and member.static:
            member.owned.clear()
            member.polling, member.seen = False, now
        elif member.alive:
            self._remove(member, topics)

    def _remove(self, member: Member, topics: Mapping[str, int]) -> None:
        member.alive = False
        del self.members[member.name]
        self.rebalance(topics)

    def rebalance(self, topics: Mapping[str, int]) -> None:
        """A new generation, with a target for each member."""
        self.generation += 1
        eligible = {
            member.name: {
                Partition(topic, number)
                for topic, count in topics.items()
                if member.subscription.matches(topic)
                for number in range(count)
            }
            for member in self.members.values()
        }
        targets = assign(eligible, {member.name: member.target for member in self.members.values()})
        for member in self.members.values():
            member.target = targets[member.name]
        logger.debug("Group %s is in generation %s with %s members", self.name, self.generation, len(self.members))

    def listens_to(self, topic: str) -> bool:
        """True when a member subscribed to this topic."""
        return any(member.subscription.matches(topic) for member in self.members.values())

    def free_for(self, member: Member) -> list[Partition]:
        """What the member should have, does not have, and nobody else has any more."""
        others = (other.owned for other in self.members.values() if other is not member)
        return sorted((member.target - member.owned).difference(*others))

    def put_out_overdue(self, now: float, timeout_s: float, topics: Mapping[str, int]) -> bool:
        """Put out who has not polled for so long; True when there was one."""
        overdue = [m for m in self.members.values() if not m.polling and now >= m.seen + timeout_s]
        for member in overdue:
            logger.info("Member %s did not poll for %s s and is put out", member.name, timeout_s)
            self._remove(member, topics)
        return bool(overdue)

    # -- offsets -----------------------------------------------------------------------------------------------------

    def check_membership(self, membership: Membership, positions: Iterable[Position]) -> None:
        """Raises GroupError unless it is that of a member, in the generation it is in now, which owns all of these."""
        member = membership.member
        if member is None or not membership.joined:
            raise GroupError(f"Nothing can be committed for group {self.name} before it was joined: poll first")
        if not member.alive:
            raise GroupError(f"Member {member.name} of group {self.name} left it or was put out: it owns nothing")
        if membership.generation != member.generation:
            raise GroupError(
                f"Member {member.name} of group {self.name} is in generation {member.generation}, not "
                f"{membership.generation} any more: take a fresh member()"
            )
        self.check_owned(member, positions)

    def check_owned(self, member: Member | None, positions: Iterable[Position]) -> None:
        """Raises GroupError, which names them, when some of these partitions are not the member's (any more)."""
        owned = member.owned if member is not None and member.alive else ()
        foreign = [f"{position.topic}/{position.partition}" for position in positions if position.of not in owned]
        if foreign:
            raise GroupError(f"Not committed, this member of group {self.name} does not own it: {', '.join(foreign)}")

    def store_owned(self, member: Member | None, positions: Iterable[Position], sequence: int) -> None:
        """Commit those of partitions that the member owns; then raise GroupError when there are others."""
        for position in positions:
            if member is not None and member.alive and position.of in member.owned:
                self.store(position, sequence)
        self.check_owned(member, positions)

    def store(self, position: Position, sequence: int) -> None:
        """Commit one position. Of two for one partition the one with the higher sequence stays."""
        known = self._offsets.get(position.of)
        if known is None or known[0] < sequence:
            self._offsets[position.of] = (sequence, position)

    def committed(self, partition: Partition) -> Position:
        """What was committed; offset -1 when nothing was."""
        known = self._offsets.get(partition)
        return known[1] if known is not None else Position(partition.topic, partition.partition, -1)

    def positions(self) -> list[Position]:
        """Everything that was committed, by partition."""
        return [position for _, (_, position) in sorted(self._offsets.items())]

    def hold(self, partition: Partition) -> None:
        """An open transaction is about to commit this partition."""
        self._pending[partition] = self._pending.get(partition, 0) + 1

    def release(self, partition: Partition) -> None:
        """That transaction has ended."""
        self._pending[partition] -= 1
        if not self._pending[partition]:
            del self._pending[partition]

    def held(self, partitions: Iterable[Partition]) -> bool:
        """True when an open transaction may still move the position of one of these."""
        return any(partition in self._pending for partition in partitions)
