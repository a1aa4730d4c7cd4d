"""kafka-python's options as librdkafka's properties.

A program written for ``kser.python_kafka`` of kser 0.8 keeps its settings. Where the two clients differ in what they
do by themselves, kafka-python's habit is kept if it shows: brokers on localhost. What decides about loss is kser's: a
new group starts with the oldest message, offsets are committed after the work, and every write is confirmed.

Source: DEFAULT_CONFIG of KafkaConsumer and KafkaProducer in kafka-python 3.0; options of 2.x that were dropped since
are accepted where they meant nothing to the data.
"""

import difflib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from kser.errors import ConfigurationError

__all__ = ["consumer_config", "producer_config"]

logger = logging.getLogger(__name__)

#: A value of kafka-python's to one of librdkafka's, None to leave the property out. Raises ValueError: what to give.
_Translation = Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


def _addresses(value: Any) -> str:
    given = value if isinstance(value, (list, tuple)) else [value]
    if not given or not all(isinstance(address, str) and address.strip() for address in given):
        raise ValueError("give 'host:port', several with commas between, or a list of them")
    return ",".join(address.strip() for address in given)


def _start(value: Any) -> str:
    known = {"earliest": "earliest", "smallest": "earliest", "latest": "latest", "largest": "latest", "none": "error"}
    if value not in known:
        raise ValueError("give 'earliest' or 'latest'")
    return known[value]


def _acks(value: Any) -> str:
    known = {"0": "0", "1": "1", "-1": "all", "all": "all"}
    if str(value) not in known:
        raise ValueError("give 0, 1 or 'all'")
    return known[str(value)]


def _retries(value: Any) -> int | None:
    if value is None or value == math.inf:
        return None  # until delivery_timeout_ms, which is what both clients do by themselves
    return _whole(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError("give a whole number")
    return int(value)


def _at_least_one(value: Any) -> int:
    return max(_whole(value), 1)  # 0 means one message a request


def _kilobytes(value: Any) -> int:
    return max(_whole(value) // 1024, 1)


def _hostname_check(value: Any) -> str:
    return "https" if value else "none"


def _protocol(value: Any) -> str:
    return str(value).lower()


def _strategies(value: Any) -> str:
    """Assignors as kafka-python takes them, classes or instances with a ``name``; names are fine too."""
    names = [str(getattr(v, "name", v)) for v in (value if isinstance(value, (list, tuple)) else [value])]
    unknown = [name for name in names if name not in ("range", "roundrobin", "cooperative-sticky")]
    if unknown or not names:
        raise ValueError("give assignors named range, roundrobin or cooperative-sticky, or leave it out")
    if "cooperative-sticky" in names and len(names) > 1:
        raise ValueError("cooperative-sticky does not mix with the others: give it alone, or leave it out")
    return ",".join(names)


#: option -> property and translation of its value.
_CLIENT: Final[dict[str, tuple[str, _Translation]]] = {
    "bootstrap_servers": ("bootstrap.servers", _addresses),
    "client_id": ("client.id", _same),
    "request_timeout_ms": ("socket.timeout.ms", _same),
    "retry_backoff_ms": ("retry.backoff.ms", _same),
    "reconnect_backoff_ms": ("reconnect.backoff.ms", _same),
    "reconnect_backoff_max_ms": ("reconnect.backoff.max.ms", _same),
    "max_in_flight_requests_per_connection": ("max.in.flight", _same),
    "metadata_max_age_ms": ("topic.metadata.refresh.interval.ms", _same),
    "client_dns_lookup": ("client.dns.lookup", _same),
    "receive_buffer_bytes": ("socket.receive.buffer.bytes", _same),
    "send_buffer_bytes": ("socket.send.buffer.bytes", _same),
    "receive_message_max_bytes": ("receive.message.max.bytes", _same),
    "connections_max_idle_ms": ("connections.max.idle.ms", _same),
    "allow_auto_create_topics": ("allow.auto.create.topics", _same),
    "security_protocol": ("security.protocol", _protocol),
    "sasl_mechanism": ("sasl.mechanism", _same),
    "sasl_plain_username": ("sasl.username", _same),
    "sasl_plain_password": ("sasl.password", _same),
    "sasl_kerberos_service_name": ("sasl.kerberos.service.name", _same),
    "ssl_check_hostname": ("ssl.endpoint.identification.algorithm", _hostname_check),
    "ssl_cafile": ("ssl.ca.location", _same),
    "ssl_certfile": ("ssl.certificate.location", _same),
    "ssl_keyfile": ("ssl.key.location", _same),
    "ssl_password": ("ssl.key.password", _same),
    "ssl_crlfile": ("ssl.crl.location", _same),
    "ssl_ciphers": ("ssl.cipher.suites", _same),
}
_CONSUMER: Final[dict[str, tuple[str, _Translation]]] = {
    "group_id": ("group.id", _same),
    "group_instance_id": ("group.instance.id", _same),
    "client_rack": ("client.rack", lambda value: value or None),
    "auto_offset_reset": ("auto.offset.reset", _start),
    "enable_auto_commit": ("enable.auto.commit", _same),
    "auto_commit_interval_ms": ("auto.commit.interval.ms", _same),
    "isolation_level": ("isolation.level", _same),
    "check_crcs": ("check.crcs", _same),
    "fetch_max_wait_ms": ("fetch.wait.max.ms", _same),
    "fetch_min_bytes": ("fetch.min.bytes", _same),
    "fetch_max_bytes": ("fetch.max.bytes", _same),
    "max_partition_fetch_bytes": ("max.partition.fetch.bytes", _same),
    "max_poll_interval_ms": ("max.poll.interval.ms", _same),
    "session_timeout_ms": ("session.timeout.ms", _same),
    "heartbeat_interval_ms": ("heartbeat.interval.ms", _same),
    "partition_assignment_strategy": ("partition.assignment.strategy", _strategies),
}
_PRODUCER: Final[dict[str, tuple[str, _Translation]]] = {
    "acks": ("acks", _acks),
    "enable_idempotence": ("enable.idempotence", _same),
    "transaction_timeout_ms": ("transaction.timeout.ms", _same),
    "delivery_timeout_ms": ("delivery.timeout.ms", _same),
    "compression_type": ("compression.type", _same),
    "retries": ("retries", _retries),
    "batch_size": ("batch.size", _at_least_one),
    "linger_ms": ("linger.ms", _same),
    "max_request_size": ("message.max.bytes", _same),
    "buffer_memory": ("queue.buffering.max.kbytes", _kilobytes),
}
#: Options that do nothing here, because kser or librdkafka does that work in its own way.
_IGNORED: Final = frozenset(
    [
        "api_version",
        "api_version_auto_timeout_ms",
        "bootstrap_timeout_ms",
        "consumer_timeout_ms",
        "enable_incremental_fetch_sessions",
        "exclude_internal_topics",
        "kafka_client",
        "legacy_iterator",
        "max_block_ms",
        "metric_group_prefix",
        "metric_reporters",
        "metrics_enabled",
        "metrics_num_samples",
        "metrics_sample_window_ms",
        "selector",
        "sock_chunk_buffer_count",
        "sock_chunk_bytes",
        "socket_options",
        "state_change_callback",
    ]
)
#: Options without a counterpart -> what to do.
_REFUSED: Final[dict[str, str]] = {
    "key_deserializer": "kser decodes messages itself (Controller.TRANSPORT); leave it out",
    "value_deserializer": "kser decodes messages itself (Controller.TRANSPORT); leave it out",
    "key_serializer": "kser encodes messages itself; leave it out",
    "value_serializer": "kser encodes messages itself; leave it out",
    "partitioner": "kser places keys as Java's producers and kafka-python's own partitioner do; leave it out",
    "transactional_id": "kser names its transactional producers itself; leave it out",
    "default_offset_commit_callback": "kser commits after the work and reports failures itself; leave it out",
    "ssl_context": "give ssl_cafile, ssl_certfile, ssl_keyfile and ssl_password instead",
    "sasl_oauth_token_provider": "use kser.confluent with sasl.oauthbearer.* or oauth_cb instead",
    "sasl_kerberos_name": "give sasl_kerberos_service_name instead",
    "sasl_kerberos_domain_name": "give sasl_kerberos_service_name instead",
    "proxy_url": "librdkafka knows no proxies; give addresses that can be reached directly",
    "socks5_proxy": "librdkafka knows no proxies; give addresses that can be reached directly",
}
#: kafka-python's, kept because it shows. Its auto_offset_reset, latest, is not kept: what was sent before the first
#: worker of a group started would never be run.
_CLIENT_DEFAULTS: Final = {"bootstrap.servers": "localhost:9092"}
#: Not kafka-python's 500: what was taken and not run would wait behind a long task.
_MAX_POLL_RECORDS: Final = 1


def consumer_config(options: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The properties of librdkafka for the options of a KafkaConsumer, and ``max_poll_records`` (default 1).

    Raises ConfigurationError for an option that does not exist, has no counterpart or a value that cannot be.
    """
    given = dict(options)
    records = given.pop("max_poll_records", None)
    config = _CLIENT_DEFAULTS | _translated(given, _CLIENT | _CONSUMER, _PRODUCER, "producers")
    if records is None:
        return config, _MAX_POLL_RECORDS
    try:
        return config, _at_least_one(records)
    except ValueError as exc:
        raise _wrong("max_poll_records", records, str(exc)) from None


def producer_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The properties of librdkafka for the options of a KafkaProducer. Raises as consumer_config() does."""
    others = {"max_poll_records": ("", _same), **_CONSUMER}
    return _CLIENT_DEFAULTS | _translated(options, _CLIENT | _PRODUCER, others, "consumers")


def _translated(
    options: Mapping[str, Any],
    table: Mapping[str, tuple[str, _Translation]],
    others: Mapping[str, tuple[str, _Translation]],
    other_kind: str,
) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise ConfigurationError(
            f"The configuration is a {type(options).__name__}: give a dict of kafka-python's options, as in "
            '{"bootstrap_servers": "host:9092"}'
        )
    config: dict[str, Any] = {}
    for option, value in options.items():
        if option in _REFUSED:
            if value is not None:
                raise ConfigurationError(
                    f"Option {option} has no counterpart: {_REFUSED[option]}", extra={"option": option}
                )
        elif option in _IGNORED:
            logger.debug("Option %s has no effect here", option)
        elif option not in table:
            raise _unknown(option, table, others, other_kind)
        elif value is not None:
            name, translate = table[option]
            try:
                translated = translate(value)
            except ValueError as exc:
                raise _wrong(option, value, str(exc)) from None
            if translated is not None:
                config[name] = translated
    return config


def _wrong(option: str, value: object, cure: str) -> ConfigurationError:
    return ConfigurationError(f"Option {option}={value!r}: {cure}", extra={"option": option})


def _unknown(
    option: object, table: Mapping[str, Any], others: Mapping[str, Any], other_kind: str
) -> ConfigurationError:
    name = str(option)
    known = sorted({*table, *_IGNORED, *_REFUSED, "max_poll_records"})
    underscored = name.replace(".", "_")
    near = [underscored] if underscored in known else difflib.get_close_matches(underscored, known, n=1)
    if name in others:
        why = f"is for {other_kind} only; leave it out"
    elif near:
        why = f"does not exist; did you mean {near[0]}?"
    else:
        why = "does not exist; leave it out, or use kser.confluent with librdkafka's property names"
    return ConfigurationError(f"Option {name} {why}", extra={"option": name})
