"""ConfluentTransport: Kafka, by confluent-kafka."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from kser.confluent.admin import ConfluentAdmin
from kser.confluent.config import checked, consumer_config, new_group_start, producer_config
from kser.confluent.logs import logger
from kser.confluent.reader import ConfluentReader, read_partitions
from kser.confluent.sink import ConfluentSink
from kser.confluent.source import ConfluentSource
from kser.errors import TransportError
from kser.transport import Partition, Record

__all__ = ["ConfluentTransport"]

#: Longest wait to learn what kind of broker this is, before a member is made for the usual kind.
_KIND_S: Final = 2.0


class ConfluentTransport:
    """A Kafka cluster. Implements kser.transport.Transport. May be shared by threads; what it makes may not, but sinks.

    Args:
        config: librdkafka properties, at least ``bootstrap.servers``; one mapping for consumers and producers.

    Raises ConfigurationError for what cannot work. Nothing is connected before it is needed.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._user = checked(config)
        self._admin = ConfluentAdmin(self._user)

    def source(self, group: str, *, member_id: str | None = None) -> ConfluentSource:
        """See Transport. On the embedded broker groups use the protocol of KIP-848, which is much quicker there."""
        embedded = self._is_embedded()
        config = consumer_config(self._user, group, kip848=embedded, member_id=member_id)
        return ConfluentSource(config, self._admin, start=new_group_start(self._user), touch=embedded)

    def sink(self, transactional_id: str | None = None, *, failures_only: bool = False) -> ConfluentSink:
        """See Transport. Never fails because a broker is down."""
        return ConfluentSink(producer_config(self._user, transactional_id, failures_only=failures_only))

    def reader(self, topics: Sequence[str], start: Literal["beginning", "end"] = "beginning") -> ConfluentReader:
        """See Transport. Raises TransportError when no broker answers within 10 s."""
        return ConfluentReader(self._user, self._admin, topics, start)

    def read(
        self,
        partitions: Sequence[Partition],
        timeout_s: float = 60,
        *,
        starts: Mapping[Partition, int] | None = None,
    ) -> Iterator[list[Record]]:
        """See Transport."""
        return read_partitions(self._user, self._admin, partitions, timeout_s, starts or {})

    def admin(self) -> ConfluentAdmin:
        """See Transport. The same one each time."""
        return self._admin

    def _is_embedded(self) -> bool:
        try:
            return not self._admin.can_create(_KIND_S)
        except TransportError as exc:
            logger.info("The kind of broker is not known yet, a Kafka cluster is assumed: %s", exc.message)
            return False
