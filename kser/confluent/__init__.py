"""The Kafka drivers: the only importers of confluent_kafka."""

from kser.confluent.transport import ConfluentTransport

__all__ = ["ConfluentTransport"]
