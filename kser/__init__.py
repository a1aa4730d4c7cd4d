"""kser: a Kafka message-driven operation sequencer."""
