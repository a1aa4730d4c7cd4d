"""The Kafka drivers: the only importers of confluent_kafka."""
