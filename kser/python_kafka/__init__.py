"""The Kafka driver under the option names of kafka-python."""
