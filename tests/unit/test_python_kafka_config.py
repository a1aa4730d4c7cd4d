"""kser.python_kafka.config: options of kafka-python as properties of librdkafka."""

import logging
import math

import pytest

from kser.confluent.config import checked, new_group_start
from kser.errors import ConfigurationError
from kser.python_kafka.config import consumer_config, producer_config


def test_a_consumers_options_become_properties_that_librdkafka_takes():
    config, max_poll_records = consumer_config(
        {
            "bootstrap_servers": ["a:1", "b:2"],
            "group_id": "shop",
            "client_id": "me",
            "auto_offset_reset": "earliest",
            "enable_auto_commit": False,
            "session_timeout_ms": 9000,
            "heartbeat_interval_ms": 1000,
            "max_poll_interval_ms": 600000,
            "max_poll_records": 5,
            "fetch_min_bytes": 1,
            "fetch_max_wait_ms": 50,
            "request_timeout_ms": 20000,
            "metadata_max_age_ms": 10000,
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": "PLAIN",
            "sasl_plain_username": "bob",
            "sasl_plain_password": "secret",
            "ssl_check_hostname": False,
            "partition_assignment_strategy": ["range", "roundrobin"],
        }
    )
    assert max_poll_records == 5
    assert config == {
        "bootstrap.servers": "a:1,b:2",
        "group.id": "shop",
        "client.id": "me",
        "auto.offset.reset": "earliest",
        "enable.auto.commit": False,
        "session.timeout.ms": 9000,
        "heartbeat.interval.ms": 1000,
        "max.poll.interval.ms": 600000,
        "fetch.min.bytes": 1,
        "fetch.wait.max.ms": 50,
        "socket.timeout.ms": 20000,
        "topic.metadata.refresh.interval.ms": 10000,
        "security.protocol": "sasl_plaintext",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "bob",
        "sasl.password": "secret",
        "ssl.endpoint.identification.algorithm": "none",
        "partition.assignment.strategy": "range,roundrobin",
    }
    checked(config)


def test_a_producers_options_become_properties_that_librdkafka_takes():
    config = producer_config(
        {
            "bootstrap_servers": "a:1, b:2",
            "acks": "all",
            "retries": 3,
            "linger_ms": 5,
            "batch_size": 0,
            "compression_type": "gzip",
            "max_request_size": 900_000,
            "buffer_memory": 33554432,
            "delivery_timeout_ms": 60000,
            "max_in_flight_requests_per_connection": 5,
        }
    )
    assert config == {
        "bootstrap.servers": "a:1, b:2",
        "acks": "all",
        "retries": 3,
        "linger.ms": 5,
        "batch.size": 1,
        "compression.type": "gzip",
        "message.max.bytes": 900_000,
        "queue.buffering.max.kbytes": 32768,
        "delivery.timeout.ms": 60000,
        "max.in.flight": 5,
    }
    checked(config)


def test_tls_files_are_named_for_librdkafka():
    files = {
        "ssl_cafile": "ca",
        "ssl_certfile": "cert",
        "ssl_keyfile": "key",
        "ssl_password": "pw",
        "ssl_crlfile": "crl",
    }
    config = producer_config(files | {"security_protocol": "SSL"})
    assert config == {
        "bootstrap.servers": "localhost:9092",
        "security.protocol": "ssl",
        "ssl.ca.location": "ca",
        "ssl.certificate.location": "cert",
        "ssl.key.location": "key",
        "ssl.key.password": "pw",
        "ssl.crl.location": "crl",
    }


def test_habits_of_kafka_python_are_kept_where_they_lose_nothing():
    """Brokers on localhost. Not its other two: a new group starts with the oldest message, and takes one at a time."""
    config, max_poll_records = consumer_config({"group_id": "g"})
    assert config == {"bootstrap.servers": "localhost:9092", "group.id": "g"}
    assert new_group_start(checked(config)) == "earliest"
    assert max_poll_records == 1
    assert producer_config({}) == {"bootstrap.servers": "localhost:9092"}


@pytest.mark.parametrize("value", [None, math.inf])
def test_endless_retries_are_what_librdkafka_does_by_itself(value):
    assert "retries" not in producer_config({"retries": value})


@pytest.mark.parametrize(("acks", "expected"), [(0, "0"), (1, "1"), ("all", "all"), (-1, "all"), ("1", "1")])
def test_acks(acks, expected):
    assert producer_config({"acks": acks})["acks"] == expected


def test_an_option_set_to_none_is_not_set():
    config, _ = consumer_config({"group_id": None, "client_rack": "", "ssl_context": None, "value_deserializer": None})
    assert config == {"bootstrap.servers": "localhost:9092"}


def test_what_kser_does_in_its_own_way_is_accepted_and_said_at_debug_level(caplog):
    with caplog.at_level(logging.DEBUG):
        config, _ = consumer_config({"api_version": (2, 6, 0), "consumer_timeout_ms": 1000, "group_id": "g"})
    assert set(config) == {"bootstrap.servers", "group.id"}
    assert [r.levelname for r in caplog.records] == ["DEBUG", "DEBUG"]
    assert "api_version" in caplog.text


def test_assignors_may_be_given_as_the_classes_of_kafka_python():
    class RoundRobinPartitionAssignor:
        name = "roundrobin"

    config, _ = consumer_config({"partition_assignment_strategy": (RoundRobinPartitionAssignor,)})
    assert config["partition.assignment.strategy"] == "roundrobin"


@pytest.mark.parametrize(
    ("translate", "options", "words"),
    [
        (
            consumer_config,
            {"value_deserializer": bytes.decode},
            ["value_deserializer", "no counterpart", "leave it out"],
        ),
        (consumer_config, {"key_deserializer": bytes.decode}, ["key_deserializer", "no counterpart"]),
        (producer_config, {"value_serializer": str.encode}, ["value_serializer", "no counterpart"]),
        (producer_config, {"partitioner": hash}, ["partitioner", "no counterpart"]),
        (producer_config, {"transactional_id": "t"}, ["transactional_id", "no counterpart"]),
        (consumer_config, {"ssl_context": object()}, ["ssl_context", "ssl_cafile"]),
        (consumer_config, {"socks5_proxy": "socks5://x"}, ["socks5_proxy", "no counterpart"]),
        (consumer_config, {"gruop_id": "g"}, ["gruop_id does not exist", "did you mean group_id?"]),
        (consumer_config, {"bootstrap.servers": "a:1"}, ["bootstrap.servers", "did you mean bootstrap_servers?"]),
        (consumer_config, {"zzz": 1}, ["zzz does not exist", "kser.confluent"]),
        (consumer_config, {"acks": 1}, ["acks is for producers only"]),
        (producer_config, {"group_id": "g"}, ["group_id is for consumers only"]),
        (producer_config, {"max_poll_records": 1}, ["max_poll_records is for consumers only"]),
        (producer_config, {"acks": 2}, ["acks=2", "0, 1 or 'all'"]),
        (producer_config, {"retries": "many"}, ["retries='many'", "whole number"]),
        (consumer_config, {"max_poll_records": "some"}, ["max_poll_records='some'", "whole number"]),
        (consumer_config, {"max_poll_records": True}, ["max_poll_records=True"]),
        (consumer_config, {"bootstrap_servers": []}, ["bootstrap_servers=[]", "host:port"]),
        (consumer_config, {"auto_offset_reset": "start"}, ["auto_offset_reset='start'", "earliest"]),
        (consumer_config, {"partition_assignment_strategy": ["sticky"]}, ["partition_assignment_strategy", "range"]),
        (consumer_config, {"partition_assignment_strategy": ["range", "cooperative-sticky"]}, ["does not mix"]),
    ],
)
def test_what_has_no_counterpart_or_does_not_exist_is_refused_by_name_with_what_to_do(translate, options, words):
    with pytest.raises(ConfigurationError) as caught:
        translate(options)
    for word in words:
        assert word in str(caught.value.message)
    assert caught.value.extra["option"] == next(iter(options))
