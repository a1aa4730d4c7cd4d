"""Whether a member of a KIP-848 group may have missed what the coordinator of the group told it.

With the group protocol of KIP-848 the coordinator tells a member its partitions once, in the answer to a heartbeat. A
member that may have missed an answer has to send a full heartbeat, to be told again. librdkafka (seen in 2.16, and in
the source of 2.15) gives an answer up after one heartbeat interval, sends the next heartbeat as if nothing had
happened, and so never learns what was in it: a coordinator whose replicas are slow for a moment, because a broker died,
is enough. When the lost answer took partitions away, the coordinator waits for the member to let go of them, and nobody
gets them until ``max.poll.interval.ms`` (5 minutes) is over. (When it gave some, the coordinator refuses the member's
next heartbeat, whose epoch is old, and the client joins again.)

The client tells that in its log only. So the log is listened to; after a heartbeat that was given up the coordinator is
asked whether the group comes to rest; if not, the cure is to leave the group and to join it anew. What the coordinator
thinks of this very member would be known from DescribeConsumerGroups, but that request ends the process when a broker
dies at the wrong moment (librdkafka#3663, #4605); ListConsumerGroups goes another way.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from confluent_kafka import ConsumerGroupState, ConsumerGroupType, KafkaException

# Not in the __all__ of confluent_kafka.admin, but documented there.
from confluent_kafka.admin import ListConsumerGroupsResult  # type: ignore[attr-defined]

from kser.confluent.admin import ConfluentAdmin
from kser.confluent.logs import QuietLog, logger

__all__ = ["HeartbeatLog", "Watch", "groups_of"]

#: Seconds from a heartbeat that was given up to the first look, and between two looks.
_FIRST_S: Final = 1.0
_LOOK_S: Final = 5.0
#: How long a group may take to come to rest. What a coordinator has to tell waits for the next heartbeat, and no broker
#: sets its interval above 15 s unless its limits were changed.
_REST_S: Final = 20.0
#: How long after the last heartbeat that was given up a group at rest is believed: the request may be in the hands of
#: the coordinator for as long.
_TRUST_S: Final = 30.0
#: How long an answer may take.
_ANSWER_S: Final = 5.0
#: How often it is looked whether an answer is there.
_GLANCE_S: Final = 0.2


class HeartbeatLog(QuietLog):
    """The log of a client; notes heartbeats of KIP-848 whose answer the client gave up.

    Args:
        lost: called at each, in the thread that polls the client.
    """

    def __init__(self, lost: Callable[[], object]) -> None:
        super().__init__()
        self._lost = lost

    def log(self, level: int, text: str, *args: object) -> None:
        """See QuietLog."""
        if args and args[0] == "REQTMOUT" and "ConsumerGroupHeartbeat" in str(args[-1]):
            self._lost()
        super().log(level, text, *args)


def groups_of(admin: ConfluentAdmin) -> "Future[ListConsumerGroupsResult]":
    """The KIP-848 groups there are; returns at once. Raises KafkaException when the brokers cannot even be asked."""
    answer: Future[ListConsumerGroupsResult] = admin._client.list_consumer_groups(
        types={ConsumerGroupType.CONSUMER}, request_timeout=_ANSWER_S
    )
    return answer


class Watch:
    """After a heartbeat was given up: asks whether the group comes to rest. Never waits.

    Belongs to one thread.

    Args:
        group: the group.
        ask: asks, and returns at once; for example groups_of().
        clock: seconds, for tests.
    """

    def __init__(
        self,
        group: str,
        ask: "Callable[[], Future[ListConsumerGroupsResult]]",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group = group
        self._ask = ask
        self._clock = clock
        #: When a heartbeat was given up last, and when to do something about it.
        self._lost_at = 0.0
        self._due = float("inf")
        self._answer: Future[ListConsumerGroupsResult] | None = None
        #: Since when every answer has said that the group is not at rest.
        self._restless_at: float | None = None

    @property
    def due(self) -> bool:
        """Whether look() has something to do; costs next to nothing."""
        return self._clock() >= self._due

    def lost(self) -> None:
        """A heartbeat was given up: from now on there is something to look at."""
        self._lost_at = self._clock()
        self._due = min(self._due, self._lost_at + _FIRST_S)

    def start_over(self) -> None:
        """Forget all of it: the member is another one now."""
        self._due, self._answer, self._restless_at = float("inf"), None, None

    def look(self) -> bool:
        """True: the group has not come to rest for over 20 s, and this member may be why. It is to join anew."""
        now = self._clock()
        if self._answer is None:
            self._due = now + _GLANCE_S
            try:
                self._answer = self._ask()
            except KafkaException as exc:
                self._unknown(exc)
            return False
        if not self._answer.done():
            self._due = now + _GLANCE_S
            return False
        answer, self._answer = self._answer, None
        self._due = now + _LOOK_S
        try:
            # One of the brokers may not have answered; the group is known to its coordinator only.
            known = answer.result().valid or ()
            state = next((group.state for group in known if group.group_id == self._group), None)
        except Exception as exc:  # noqa: BLE001 - futures of the client raise what they like; the next look may do
            self._unknown(exc)
            return False
        if state is None:
            return False
        if state is ConsumerGroupState.STABLE:
            self._restless_at = None
            if now - self._lost_at > _TRUST_S:
                self.start_over()
            return False
        if self._restless_at is None:
            self._restless_at = now
        return now - self._restless_at >= _REST_S

    def _unknown(self, exc: Exception) -> None:
        self._due = self._clock() + _LOOK_S
        logger.debug("The brokers were asked in vain whether group %s is at rest: %s", self._group, exc)
